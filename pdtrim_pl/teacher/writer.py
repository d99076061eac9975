"""Write the teacher's distributions over a data part to disk, shard by shard.

A shard holds, for E examples with N response tokens in all: `keys` [E, 16], `bounds` [E + 1] (first row of each
example, then the end), `ids` [N, K], `values` [N, K] and `extra` [N] (see `Rows`), with K kept tokens of each
distribution.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from pdtrim_pl.data.collate import Collator
from pdtrim_pl.data.examples import Example
from pdtrim_pl.errors import UserError
from pdtrim_pl.losses import chunks
from pdtrim_pl.losses.rows import Rows
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.teacher.identity import KEY_BYTES, example_key
from pdtrim_pl.teacher.index import INDEX_FILE, CacheIndex, Making, shard_name


@dataclass(frozen=True)
class Writing:
    """How the teacher is run while its cache is written. Nothing of it changes what is written."""

    batch_size: int = 8
    """Examples in a batch."""
    chunk_tokens: int = 256
    """Number of tokens whose logits are in memory at once."""
    pad_id: int = 0
    """Token id at padded positions."""
    device: torch.device | str = "cpu"


@torch.no_grad()
def write_cache(
    folder: Path, wanted: CacheIndex, teacher: StagedCausalLM, examples: Dataset[Example], writing: Writing = Writing(),
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> CacheIndex:  # fmt: skip
    """Write the shards that are missing, and the index after each of them.

    A run that was stopped at any time can be started again. The result is the same as that of a run without a stop.

    Args:
        folder: the folder of the cache; it is made if it is missing.
        wanted: index of the cache, without shards.
        teacher: in eval mode, on the device of `writing`.
        examples: the data part. It has `len`.
        writing: how the teacher is run.
        progress: called with the number of shards that are written, and of all shards.

    Returns:
        The index of the whole cache.

    Raises:
        UserError: the folder holds a cache of other models, text or settings. The message names what differs.
    """
    index = _begun(folder, wanted)
    for number in range(index.count):
        if shard_name(number) not in index.shards:
            first = number * index.making.shard_examples
            span = range(first, min(first + index.making.shard_examples, index.examples))
            tensors = _shard(teacher, [examples[i] for i in span], index, writing)
            size = _save(tensors, folder / shard_name(number))
            index = index.with_shard(shard_name(number), size)
            index.save(folder)
        progress(number + 1, index.count)
    return index


def _begun(folder: Path, wanted: CacheIndex) -> CacheIndex:
    """The index in a folder, which must be one of the cache that is wanted; `wanted` for a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / INDEX_FILE).exists():
        if any(folder.glob("*.safetensors")):
            raise UserError(f"The folder {folder} holds safetensors files and no cache of a teacher. Name another one.")
        return wanted
    found = CacheIndex.load(folder)
    said = found.identity.differences(wanted.identity, same_text=True)
    theirs = vars(wanted.making)
    said += [
        f"`{name}`: {value} in the cache, {theirs[name]} here"
        for name, value in vars(found.making).items()
        if theirs[name] != value
    ]
    if said:
        raise UserError(
            f"The folder {folder} holds a teacher's cache that differs in {'; '.join(said)}. Name another `--output`, "
            "or delete the folder."
        )
    return found


def _shard(
    teacher: StagedCausalLM, examples: Sequence[Example], index: CacheIndex, writing: Writing
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors of one shard: rows of all examples one after the other, and where each begins."""
    keys = [example_key(*example) for example in examples]
    rows = [
        row
        for first in range(0, len(examples), writing.batch_size)
        for row in _rows(teacher, examples[first : first + writing.batch_size], index, writing)
    ]
    lengths = [len(example.response) for example in examples]
    return {
        "keys": torch.from_numpy(np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES).copy()),
        "bounds": torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int64),
        "ids": torch.cat([row.ids for row in rows]),
        "values": torch.cat([row.values for row in rows]),
        "extra": torch.cat([row.extra for row in rows]),
    }


def _rows(
    teacher: StagedCausalLM, examples: Sequence[Example], index: CacheIndex, writing: Writing
) -> list[Rows]:  # fmt: skip
    """The rows of each example of one batch, in host memory."""
    batch = Collator(writing.pad_id)(examples).on(writing.device)
    hidden = teacher(*batch.request, keep_cache=False).hidden
    found = []
    for states, example in zip(hidden, examples, strict=True):
        states, draws = states[: len(example.response)], _generator(index.making, example, writing.device)
        parts = [
            _made(teacher.compared_logits(states[part]).float(), index, draws)
            for part in chunks(len(states), writing.chunk_tokens)
        ]
        columns = ([vars(part)[name] for part in parts] for name in ("ids", "values", "extra"))
        found.append(Rows(*(torch.cat(column).cpu() for column in columns)))
    return found


def _made(logits: Tensor, index: CacheIndex, draws: torch.Generator) -> Rows:
    making, temperature = index.making, index.identity.temperature
    if making.kind == "top_k":
        return Rows.top_k(logits, making.kept, temperature)
    return Rows.sampled(logits, making.kept, temperature, making.exponent, draws)


def _generator(making: Making, example: Example, device: torch.device | str) -> torch.Generator:
    """Draws of one example depend on the example alone: not on its batch, nor on where a run was stopped."""
    seed = int.from_bytes(example_key(*example)[:7], "little") ^ making.seed
    return torch.Generator(device).manual_seed(seed)


def _save(tensors: dict[str, Tensor], path: Path) -> int:
    """Write a shard whole or not at all; returns its bytes."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    save_file(tensors, unfinished)
    with unfinished.open("rb") as written:
        os.fsync(written.fileno())
    unfinished.replace(path)
    return path.stat().st_size
