"""Calls SLURM's programs."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence

from pdtrim_pl.errors import UserError

TIMEOUT_SECONDS = 60


class SlurmError(UserError):
    """SLURM is missing, or refused."""


def call(command: Sequence[str], extra_environment: Mapping[str, str] | None = None) -> str:
    """Run one of SLURM's programs and return its standard output.

    Raises:
        SlurmError: the program is missing, does not answer, or fails; the message quotes it.
    """
    environment = {**os.environ, **(extra_environment or {})}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except FileNotFoundError as error:
        raise SlurmError(
            f"`{command[0]}` is not on this machine: run this where SLURM is, or look at the script with `--dry_run`."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"`{command[0]}` did not answer within {TIMEOUT_SECONDS} seconds.") from error
    if done.returncode:
        raise SlurmError(f"`{command[0]}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
