"""The index of a cache: what it is of, how its rows were made, and its shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pdtrim_pl.errors import UserError
from pdtrim_pl.losses.rows import Kind
from pdtrim_pl.plan.json_files import check_format, read_json, write_whole
from pdtrim_pl.teacher.identity import CacheIdentity

INDEX_FILE = "index.json"
CACHE_FORMAT = "pdtrim.teacher_cache/1"


@dataclass(frozen=True)
class Making:
    """How the rows of a cache are made."""

    kind: Kind = "top_k"
    """`top_k` keeps the most likely tokens and the mass of all others. `sampled` keeps an unbiased sample."""
    kept: int = 64
    """Number of tokens of every distribution: the most likely ones, or draws."""
    exponent: float = 1.0
    """Draws are from p^exponent; only for `sampled`."""
    seed: int = 0
    """Seed of the draws; only for `sampled`."""
    shard_examples: int = 1024
    """Number of examples in a file. A run that was stopped goes on after the last whole file."""

    def __post_init__(self) -> None:
        for name in ("kept", "shard_examples"):
            if self.__dict__[name] < 1:
                raise UserError(f"`{name}` of the teacher's cache is {self.__dict__[name]}: give at least 1.")
        if not self.exponent > 0:
            raise UserError(f"`exponent` of the teacher's cache is {self.exponent}: give a positive number.")


@dataclass(frozen=True)
class CacheIndex:
    """The contents of `index.json`."""

    identity: CacheIdentity
    making: Making
    teacher: str
    """Name or path of the teacher, as it was given; for readers."""
    examples: int
    """Number of examples that a whole cache has."""
    shards: Mapping[str, int] = field(default_factory=dict)
    """Name of a shard -> its bytes; only whole shards."""

    @property
    def count(self) -> int:
        """Number of shards of a whole cache."""
        return -(-self.examples // self.making.shard_examples)

    @property
    def is_whole(self) -> bool:
        """Whether every shard is written."""
        return len(self.shards) == self.count

    def with_shard(self, name: str, size: int) -> CacheIndex:
        """The index with one more shard."""
        return replace(self, shards={**self.shards, name: size})

    def save(self, folder: Path) -> None:
        """Write `index.json` into the folder of the cache, whole or not at all."""
        content = {
            "format": CACHE_FORMAT, "teacher": self.teacher, "identity": self.identity.to_json(),
            "making": dict(vars(self.making)), "examples": self.examples, "shards": dict(self.shards),
        }  # fmt: skip
        write_whole(folder / INDEX_FILE, json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> CacheIndex:
        """Read `index.json`.

        Raises:
            UserError: there is none, it is of another version, or a shard is missing or has another size.
        """
        data: Any = read_json(folder / INDEX_FILE, "index of a teacher's cache (write one with `pdtrim cache-teacher`)")
        check_format(data, CACHE_FORMAT, "index of a teacher's cache")
        identity, making = CacheIdentity.from_json(data["identity"]), Making(**data["making"])
        index = cls(identity, making, data["teacher"], data["examples"], data["shards"])
        for name, size in index.shards.items():
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
            if found != size:
                raise UserError(
                    f"The teacher's cache {folder} is damaged: {name} has {'no' if found is None else found} bytes, "
                    f"and its index says {size}. Copy it again, or delete the folder and run `pdtrim cache-teacher`."
                )
        return index


def shard_name(number: int) -> str:
    """Name of the shard with this number, from 0."""
    return f"shard-{number:05d}.safetensors"
