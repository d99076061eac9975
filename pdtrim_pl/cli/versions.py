"""Which releases of the dependencies this package knows: older ones are refused, newer ones get a warning.

Reads metadata only, so that the command line can look before it imports anything heavy.
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
    """Warn once of releases that are newer than any tested, and refuse those below the ranges of this package.

    Raises:
        UserError: a dependency is older than its range; names all of them and how to mend it.
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
    """Versions by normalised name, without a local part such as +cpu. A missing package is left to its own import."""
    found: dict[str, str] = {}
    for name in names:
        try:
            found[canonicalize_name(name)] = Version(version(name)).public
        except PackageNotFoundError:
            continue
    return found
