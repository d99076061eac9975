"""The house rules that a machine can check: rooms, the order of their floors, and what stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pdtrim_pl"
HOUSE = ROOT / "docs" / "architecture.md"
LOOSE = {"__init__", "__main__", "compat", "errors", "module", "parallel"}
"""Files that may lie at the top of the package."""
FLOORS = (
    {"errors", "compat"},
    {"plan", "parallel", "slurm"},
    {"models", "data", "wire"},
    {"staged"},
    {"losses", "checkpoints"},
    {"strategies", "evaluation"},
    {"criteria", "selectors", "merging", "export"},
    {"module", "sizing", "teacher", "serving"},
    {"search", "harness"},
    {"compare", "callbacks"},
    {"cli"},
)
"""Rooms from the ground up. A file imports from its own room, its own floor and those below."""
ROOMS = set[str]().union(*FLOORS)
LONGEST = 300
"""Lines of a file."""

FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "callbacks").glob("*.py")])


def imported(path: Path) -> set[str]:
    """Modules of this project and others that a file imports, with the names it takes from them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(module: str) -> str:
    """`pdtrim_pl.plan.moves` -> `plan`; `pdtrim_pl.__version__` belongs to no room."""
    parts = module.split(".")
    if parts[0] != "pdtrim_pl":
        return parts[0]
    return parts[1] if len(parts) > 1 and not parts[1].startswith("__") else ""


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def floor(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if name in rooms)


def test_no_new_file_lies_loose_at_the_top() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == LOOSE


def test_every_room_has_a_floor() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | LOOSE - {"__init__", "__main__"}
    assert rooms | {"callbacks"} == ROOMS


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_arrow_runs_up(path: Path) -> None:
    own = room(module_of(path))
    if path.stem == "__main__":
        return
    ours = {name for name in imported(path) if name.split(".")[0] in ("pdtrim_pl", "callbacks") and room(name)}
    up = {name for name in ours if own and floor(room(name)) > floor(own)}
    assert not up


def test_rooms_import_each_other_in_no_circle() -> None:
    arrows: dict[str, set[str]] = {}
    for path in FILES:
        own = room(module_of(path))
        if own and not own.startswith("__"):
            arrows.setdefault(own, set()).update(room(name) for name in imported(path) if room(name) in ROOMS)
            arrows[own].discard(own)
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        pytest.fail(f"rooms in a circle: {error.args[1]}")


def test_files_import_each_other_in_no_circle() -> None:
    known = {module_of(path): path for path in FILES}
    arrows: dict[str, set[str]] = {}
    for name, path in known.items():
        found = {taken if taken in known else taken.rpartition(".")[0] for taken in imported(path)}
        arrows[name] = {other for other in found if other in known and other != name}
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        pytest.fail(f"files in a circle: {error.args[1]}")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


@pytest.mark.parametrize("module", ["plan", "slurm", "checkpoints.run_record", "models.context", "cli.main"])
def test_what_other_tools_read_imports_no_torch(module: str) -> None:
    code = f"import sys, pdtrim_pl.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("module", ["serving.generate", "serving.engine.engine", "serving.engine.response"])
def test_the_parent_of_the_workers_imports_no_model_and_no_training(module: str) -> None:
    heavy = ("transformers", "lightning", "datasets")
    code = f"import sys, pdtrim_pl.{module}; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_every_name_of_the_data_room_is_there_and_no_other() -> None:
    from pdtrim_pl import data

    assert {getattr(data, name).__name__ for name in data.__all__} == set(data.__all__)
    with pytest.raises(AttributeError, match="'TextSources'"):
        _ = data.TextSources


def test_the_map_of_the_house_has_every_room_on_its_floor() -> None:
    found: list[set[str]] = []
    for line in HOUSE.read_text(encoding="utf-8").splitlines():
        if row := re.match(r"\| *(\d*) \| \[`(\w+)`\]", line):
            if row[1]:
                found.append(set())
                assert int(row[1]) == len(found) - 1
            found[-1].add(row[2])
    assert tuple(found) == FLOORS


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_no_test_folder_shadows_the_callbacks_package() -> None:
    assert not (ROOT / "tests" / "callbacks").exists()
