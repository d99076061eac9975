"""The house rules that a machine can check."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize(
    "path", sorted((ROOT / "pdtrim_pl").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_the_mechanics_import_nothing_from_callbacks(path: Path) -> None:
    assert not any(name.split(".")[0] == "callbacks" for name in imports_of(path))


@pytest.mark.parametrize("name", ["plan", "policy", "record", "context"])
def test_what_other_tools_read_imports_no_torch(name: str) -> None:
    assert not any(found.split(".")[0] == "torch" for found in imports_of(ROOT / "pdtrim_pl" / f"{name}.py"))


def test_no_test_folder_shadows_the_callbacks_package() -> None:
    assert not (ROOT / "tests" / "callbacks").exists()
