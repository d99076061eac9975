"""Check whether the contract can run a plan. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import get_args

from pdtrim_pl.plan.stages import STAGES, Boundary, Relation, Stage

Merged = Mapping[Stage, Mapping[int, tuple[int, ...]]]
Untied = Mapping[Stage, tuple[int, ...]]


def plan_faults(
    num_blocks: int, blocks: Mapping[Stage, tuple[int, ...]], relation: Relation, boundary: Boundary, merged: Merged,
    untied: Untied,
) -> list[str]:  # fmt: skip
    """All faults of a plan with these parts; empty if the contract can run it. The parts are fields of `StagePlan`."""
    faults = []
    if relation not in get_args(Relation):
        faults.append(f"`relation` is {relation!r}, not one of {', '.join(get_args(Relation))}")
    if boundary not in get_args(Boundary):
        faults.append(f"`boundary` is {boundary!r}, not one of {', '.join(get_args(Boundary))}")
    for stage in STAGES:
        faults += _stage_faults(stage, num_blocks, blocks[stage], merged.get(stage, {}))
        if stray := [block for block in untied.get(stage, ()) if block not in used_blocks(stage, blocks)]:
            faults.append(f"`untied.{stage}` names {stray}, which that stage does not run")
    faults += _relation_faults(num_blocks, set(blocks["prefill"]), set(blocks["decode"]), relation)
    for name, mapping in (("merged", merged), ("untied", untied)):
        unknown = sorted(set(mapping) - set(STAGES))
        if unknown:
            faults.append(f"`{name}` names the unknown stage(s) {unknown}")
    return faults


def used_blocks(stage: Stage, blocks: Mapping[Stage, tuple[int, ...]]) -> set[int]:
    """The blocks whose weights a stage uses: those that it runs, and in prefill those that it only projects."""
    return {*blocks[stage], *(blocks["decode"] if stage == "prefill" else ())}


def _relation_faults(num_blocks: int, prefill: set[int], decode: set[int], relation: Relation) -> Iterable[str]:
    if relation == "nested" and not decode <= prefill:
        yield f"`relation: nested` wants D inside P, but prefill lacks {sorted(decode - prefill)}"
    if relation == "unified" and decode != prefill:
        yield f"`relation: unified` wants equal stages, but they differ in {sorted(decode ^ prefill)}"
    if relation == "prefill_only" and len(decode) != num_blocks:
        yield "`relation: prefill_only` wants every block in decode"


def _stage_faults(
    stage: Stage, num_blocks: int, blocks: tuple[int, ...], merged: Mapping[int, tuple[int, ...]]
) -> Iterable[str]:
    if not blocks:
        yield f"`{stage}` has no blocks"
    if not all(type(block) is int for block in blocks):
        yield f"`{stage}.blocks` must be whole numbers, got {list(blocks)}"
        return
    if list(blocks) != sorted(set(blocks)):
        yield f"`{stage}.blocks` must be rising and without repeats, got {list(blocks)}"
    outside = [block for block in blocks if not 0 <= block < num_blocks]
    if outside:
        yield f"`{stage}.blocks` names {outside}, outside 0..{num_blocks - 1}"
    yield from _merge_faults(stage, blocks, merged)


def _merge_faults(stage: Stage, blocks: tuple[int, ...], merged: Mapping[int, tuple[int, ...]]) -> Iterable[str]:
    taken: set[int] = set()
    for block, run in merged.items():
        others = set(run) - {block}
        if block not in blocks or block not in run or len(run) < 2:
            yield f"`merged.{stage}.{block}` must be a block of that stage and one of at least two it stands for"
        if others & set(blocks):
            yield f"`merged.{stage}.{block}` stands for {sorted(others & set(blocks))}, which the stage still runs"
        if taken & set(run):
            yield f"`merged.{stage}` overlaps at {sorted(taken & set(run))}"
        taken |= set(run)
