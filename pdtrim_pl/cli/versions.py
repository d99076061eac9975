"""Checks the releases of dependencies: too old ones are refused, untested newer ones get a warning.

Reads metadata only, before anything heavy is imported.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from pdtrim_pl import __version__
from pdtrim_pl.errors import UserError

log = logging.getLogger(__name__)

TESTED: Mapping[str, str] = json.loads((Path(__file__).parent / "tested_versions.json").read_text(encoding="utf-8"))
"""The newest release of every direct dependency with which the tests pass; `make lock` writes the file."""


def check_versions() -> None:
    """Warn of releases that are newer than the tested ones, and refuse those that are too old.

    Raises:
        UserError: a dependency is too old; the message names all such and the command that updates them.
    """
    try:
        required = [Requirement(line) for line in requires("pdtrim_pl") or []]
    except PackageNotFoundError:  # run from its source folder, not installed
        return
    found = _installed([need.name for need in required if need.marker is None or need.marker.evaluate({"extra": ""})])
    bounds: dict[str, str] = {
        canonicalize_name(need.name): spec.version
        for need in required
        for spec in need.specifier
        if spec.operator == ">="
    }
    old = [name for name, release in found.items() if name in bounds and Version(release) < Version(bounds[name])]
    if old:
        told = ", ".join(f"{name} {found[name]} (needs {bounds[name]})" for name in old)
        wanted = " ".join(f"'{name}>={bounds[name]}'" for name in old)
        raise UserError(f"Older than pdtrim_pl {__version__} works with: {told}. Run `pip install {wanted}`.")
    new = [name for name, release in found.items() if name in TESTED and Version(release) > Version(TESTED[name])]
    if new:
        told = ", ".join(f"{name} {found[name]} (tested up to {TESTED[name]})" for name in new)
        log.warning("Newer than pdtrim_pl %s was tested with: %s. If something breaks, go back.", __version__, told)


def _installed(names: list[str]) -> dict[str, str]:
    """Versions by normalised name, without a local part such as +cpu. Missing packages are left out."""
    found: dict[str, str] = {}
    for name in names:
        try:
            found[canonicalize_name(name)] = Version(version(name)).public
        except PackageNotFoundError:
            continue
    return found
