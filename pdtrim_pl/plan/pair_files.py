"""Finds and hashes the files of an export that must fit together. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pdtrim_pl.plan.kv_policy import POLICY_FILE
from pdtrim_pl.plan.planned_stages import PLAN_FILE
from pdtrim_pl.plan.stages import STAGES

KINDS = ("weights", "config", "tokenizer")
PAIR_PARTS = ("plan", "policy", *(f"{stage}.{kind}" for stage in STAGES for kind in KINDS))
"""Everything that a manifest lists: each part has its files."""
TOKENIZER_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken"})
"""Further files of a checkpoint that are the tokenizer's: vocabularies, merges, chat templates."""


@dataclass(frozen=True)
class FileHash:
    """What the manifest says of one file."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileHash:
        """Read a file, of any size, and hash it."""
        with path.open("rb") as file:
            return cls(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


Files = Mapping[str, FileHash]
"""Path inside the export -> its hash."""


def paths_of(export: Path) -> dict[str, list[str]]:
    """Part -> the files of an export that belong to it, as paths inside the export."""
    paths: dict[str, list[str]] = {part: [] for part in PAIR_PARTS}
    paths["plan"], paths["policy"] = [PLAN_FILE], [POLICY_FILE]
    for stage in STAGES:
        for name in _visible_files(export / stage):
            kind = _kind(name)
            if kind is not None:
                paths[f"{stage}.{kind}"].append(f"{stage}/{name}")
    return paths


def _visible_files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix()


def _kind(name: str) -> str | None:
    """What a file of a checkpoint is; None if it changes nothing, such as a README."""
    if name.endswith((".safetensors", ".safetensors.index.json")):
        return "weights"
    if name in ("config.json", "generation_config.json"):
        return "config"
    return "tokenizer" if Path(name).suffix in TOKENIZER_SUFFIXES else None


def fault_of(path: Path, listed: FileHash | None, verify: bool) -> str | None:
    """What is wrong with a file of an export; None if nothing is."""
    if listed is None:
        return "is new"
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != listed.bytes:
        return f"has {size:,} bytes instead of {listed.bytes:,}"
    if path.suffix == ".safetensors" and not verify:
        return None
    return None if FileHash.of(path) == listed else "has another hash"


def part_name(part: str) -> str:
    """A part in words: `decode.weights` -> `the decode weights`."""
    return f"the {part.replace('.', ' ')}"
