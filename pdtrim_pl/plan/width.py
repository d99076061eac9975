"""The width of a block in one stage: which MLP channels and query heads it keeps. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan.stages import PARTS, STAGES, ModelRef, Part, Relation, Stage

MOST_UNITS, MOST_DIGITS = 10**7, 8
"""Bound of what a text may name, so that a typing error does not fill the memory."""


@dataclass(frozen=True)
class Width:
    """The MLP channels and query heads that one block keeps in one stage, by their numbers in the original model."""

    channels: tuple[int, ...] | None = None
    """Rising numbers of channels; None keeps all."""
    heads: tuple[int, ...] | None = None
    """Rising numbers of query heads; None keeps all."""

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Every pass looks widths up, so their thousands of numbers are hashed only once. A copy that is sent to another
        # process takes this number along: before Python 3.12, the hash of None differs between processes.
        return hash((self.channels or (), self.heads or ()))

    def kept(self, part: Part) -> tuple[int, ...] | None:
        """Numbers of the channels or heads that are kept; None if all are."""
        return self.channels if part == "channels" else self.heads

    def within(self, other: Width) -> Width:
        """The channels and heads that both widths keep."""
        return Width(*(_both(self.kept(part), other.kept(part)) for part in PARTS))

    def to_json(self) -> dict[str, str]:
        """Kept numbers as text, such as `0-99,101,120-1535`. A part of which all is kept is left out."""
        kept = {part: self.kept(part) for part in PARTS}
        return {part: ranges(numbers) for part, numbers in kept.items() if numbers is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Width:
        """Read what `to_json` wrote.

        Raises:
            UserError: a text that is not a list of numbers and ranges, or an unknown part.
        """
        unknown = sorted(set(data) - set(PARTS))
        if unknown:
            raise UserError(f"`widths` names the unknown part(s) {unknown}: give {' and '.join(PARTS)}.")
        return cls(**{part: numbers_of(text) for part, text in data.items()})


Widths = Mapping[Stage, Mapping[int, Width]]
"""Per stage: narrowed block -> the channels and heads that it keeps."""


def ranges(numbers: Iterable[int]) -> str:
    """Write rising numbers as text, such as `0-99,101`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def numbers_of(text: str) -> tuple[int, ...]:
    """Read what `ranges` wrote.

    Raises:
        UserError: the text is not a list of numbers and ranges.
    """
    numbers: list[int] = []
    for run in text.split(","):
        first, dash, last = run.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"`widths` has {run!r}, which is neither a number nor a range such as 0-99.")
        if max(len(first), len(last)) > MOST_DIGITS or len(numbers) + int(last or first) - int(first) > MOST_UNITS:
            raise UserError(f"`widths` has {run[:40]!r}: no block has more than {MOST_UNITS:,} channels or heads.")
        if int(last or first) < int(first):
            raise UserError(f"`widths` has the range {run!r}, which ends before it begins.")
        numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)


def canonical(model: ModelRef, widths: Widths) -> dict[Stage, dict[int, Width]]:
    """The widths without entries that keep everything. So plans that mean the same compare equal."""
    out: dict[Stage, dict[int, Width]] = {}
    for stage in STAGES:
        short = {block: _without_whole_parts(model, width) for block, width in sorted(widths.get(stage, {}).items())}
        out[stage] = {block: width for block, width in short.items() if width != Width()}
    return out


def width_faults(
    model: ModelRef, blocks: Mapping[Stage, tuple[int, ...]], relation: Relation, widths: Widths
) -> Iterator[str]:
    """All faults of the widths of a plan; none if the contract can run them."""
    unknown = sorted(set(widths) - set(STAGES))
    if unknown:
        yield f"`widths` names the unknown stage(s) {unknown}"
    sound = True
    for stage in STAGES:
        stray = sorted(set(widths.get(stage, {})) - set(blocks[stage]))
        if stray:
            yield f"`widths.{stage}` names {stray}, which that stage does not run"
        for block, width in widths.get(stage, {}).items():
            faults = [fault for part in PARTS for fault in _part_faults(model, width.kept(part), part)]
            yield from (f"`widths.{stage}.{block}.{fault}" for fault in faults)
            sound = sound and not faults
    if sound:
        yield from _relation_faults(blocks, relation, widths)


def _part_faults(model: ModelRef, kept: tuple[int, ...] | None, part: Part) -> Iterator[str]:
    size = model.sizes[part]
    if kept is None:
        return
    if size is None:
        yield f"{part}` cannot be checked, because `model` does not say how many a block has"
    elif not kept or kept[0] < 0 or kept[-1] >= size or any(one >= other for one, other in pairwise(kept)):
        yield f"{part}` must be rising numbers within 0..{size - 1}, at least one"
    elif part == "heads" and (len(set(counts := _per_group(model, kept))) > 1 or 0 in counts):
        yield f"heads` must leave every KV head the same number of query heads, at least one, and leaves {counts}"


def _per_group(model: ModelRef, heads: tuple[int, ...]) -> list[int]:
    """For each KV head, how many of its query heads are kept."""
    assert model.heads is not None
    counts = [0] * (model.kv_heads or model.heads)
    for head in heads:
        counts[head * len(counts) // model.heads] += 1
    return counts


def _relation_faults(blocks: Mapping[Stage, tuple[int, ...]], relation: Relation, widths: Widths) -> Iterator[str]:
    prefill, decode = (widths.get(stage, {}) for stage in STAGES)
    if relation == "prefill_only" and decode:
        yield f"`relation: prefill_only` wants every block whole in decode, but {sorted(decode)} are not"
    if relation not in ("nested", "unified"):
        return
    shared = [block for block in blocks["decode"] if block in blocks["prefill"]]
    wrong = []
    for block in shared:
        ours, theirs = prefill.get(block, Width()), decode.get(block, Width())
        if theirs.within(ours) != theirs or (relation == "unified" and ours != theirs):
            wrong.append(block)
    if wrong and relation == "nested":
        yield f"`relation: nested` wants what decode keeps inside what prefill keeps, but not so in blocks {wrong}"
    elif wrong:
        yield f"`relation: unified` wants equal widths, but they differ in blocks {wrong}"


def _without_whole_parts(model: ModelRef, width: Width) -> Width:
    kept = {part: width.kept(part) for part in PARTS}
    some = {part: numbers for part, numbers in kept.items() if numbers is not None}
    return Width(**{part: numbers for part, numbers in some.items() if len(numbers) != model.sizes[part]})


def _both(one: tuple[int, ...] | None, other: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if one is None or other is None:
        return other if one is None else one
    return tuple(sorted(set(one) & set(other)))
