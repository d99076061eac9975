"""Releases that are too old are refused, untested ones are told, and the lock, the ranges and the package agree."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from pdtrim_pl.cli import versions
from pdtrim_pl.cli.versions import TESTED, check_versions

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.lock").read_text(encoding="utf-8"), re.MULTILINE))


def pretend(monkeypatch: pytest.MonkeyPatch, **releases: str) -> None:
    """These releases are installed; of all others, the tested ones."""
    monkeypatch.setattr(versions, "version", lambda name: releases.get(name, TESTED[canonicalize_name(name)]))


def test_the_tested_versions_are_those_of_the_lock() -> None:
    direct = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    assert {name: LOCK[name] for name in sorted(direct)} == TESTED


def test_the_lock_is_within_every_range() -> None:
    extras = PROJECT["optional-dependencies"]
    for line in [*PROJECT["dependencies"], *extras["quickstart"], *extras["dev"]]:
        need = Requirement(line)
        assert need.specifier.contains(LOCK[canonicalize_name(need.name)]), line


def test_every_range_has_a_lower_bound_that_can_be_tested() -> None:
    for line in PROJECT["dependencies"]:
        assert [spec for spec in Requirement(line).specifier if spec.operator == ">="], line


def test_the_tested_versions_are_quiet(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pretend(monkeypatch)
    check_versions()
    assert not caplog.records


def test_a_newer_release_gets_one_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pretend(monkeypatch, transformers="5.99.0", lightning="2.99.0+cu130")
    check_versions()
    (line,) = [record.getMessage() for record in caplog.records]
    assert re.search(
        rf"lightning 2\.99\.0 \(tested up to {TESTED['lightning']}\), transformers 5\.99\.0 \(tested", line
    )


def test_an_older_release_than_the_range_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, transformers="4.57.0")
    with pytest.raises(ValueError, match=r"transformers 4\.57\.0 \(needs 5\..*pip install 'transformers>=5"):
        check_versions()


def test_the_local_part_of_a_version_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, torch=f"{TESTED['torch']}+cpu")
    check_versions()
    assert Version(f"{TESTED['torch']}+cpu") > Version(TESTED["torch"])


def test_the_check_imports_nothing_heavy() -> None:
    code = "import sys, pdtrim_pl.cli.versions as v; v.check_versions(); print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "lightning"} & set(json.loads(done.stdout))
