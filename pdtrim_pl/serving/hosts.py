"""Who may connect: addresses of this machine alone, or a secret that both sides share. Imports no torch."""

from __future__ import annotations

import ipaddress
import os

SECRET_VARIABLE = "PDTRIM_SECRET"
"""Environment variable: the shared secret."""


def shared_secret() -> str | None:
    """The shared secret; None if there is none."""
    return os.environ.get(SECRET_VARIABLE) or None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
