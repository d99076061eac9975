"""The content of a plan: which blocks each stage runs, and how wide they are. Checks it, reads and writes it as JSON.

Imports no torch. Blocks, channels and heads are always named by their number in the original model, from 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, get_args

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan.json_files import check_format, read_json, write_whole
from pdtrim_pl.plan.stages import (
    PARTS,
    STAGES,
    Boundary,
    ExportWidths,
    Layout,
    ModelRef,
    Part,
    Relation,
    Removal,
    Stage,
)
from pdtrim_pl.plan.validity import plan_faults
from pdtrim_pl.plan.width import Width, canonical, width_faults

PLAN_FORMAT = "pdtrim.stage_plan/2"
FIRST_PLAN_FORMAT = "pdtrim.stage_plan/1"
"""The first version has no widths. This package still reads it."""
PLAN_FILE = "stage_plan.json"
_EMPTY: Mapping[Any, Any] = MappingProxyType({})


@dataclass(frozen=True)
class PlannedStages:
    """The blocks that each stage runs, in original order: P in `prefill`, D in `decode`.

    Raises:
        UserError: the contract cannot run this plan. The message names every fault.
    """

    model: ModelRef
    prefill: tuple[int, ...]
    decode: tuple[int, ...]
    relation: Relation = "nested"
    boundary: Boundary = "prefill"
    merged: Mapping[Stage, Mapping[int, tuple[int, ...]]] = field(default_factory=lambda: _EMPTY)
    """Per stage: merged block -> the run of original blocks that it replaces, itself included."""
    untied: Mapping[Stage, tuple[int, ...]] = field(default_factory=lambda: _EMPTY)
    """Per stage: blocks for which the stage has weights of its own instead of the shared ones. In prefill they may be
    KV-only: it then projects keys and values by its own weights."""
    history: tuple[Removal, ...] = ()
    """Every removal that led to this plan, in order."""
    widths: Mapping[Stage, Mapping[int, Width]] = field(default_factory=lambda: _EMPTY)
    """Per stage: narrowed block -> the MLP channels and query heads that it keeps."""
    layout: Layout = "compact"
    """How the checkpoints of an export hold the blocks. It changes nothing that is computed."""
    export_widths: ExportWidths = "uniform"
    """How wide the blocks of an export are. It changes nothing that is computed."""

    def __post_init__(self) -> None:
        blocks: dict[Stage, tuple[int, ...]] = {"prefill": self.prefill, "decode": self.decode}
        faults = plan_faults(self.model.num_blocks, blocks, self.relation, self.boundary, self.merged, self.untied)
        faults += width_faults(self.model, blocks, self.relation, self.widths)
        if self.layout not in get_args(Layout):
            faults.append(f"`layout` is {self.layout!r}, not one of {', '.join(get_args(Layout))}")
        if self.export_widths not in get_args(ExportWidths):
            faults.append(f"`export_widths` is {self.export_widths!r}, not one of {', '.join(get_args(ExportWidths))}")
        if faults:
            raise UserError("This stage plan cannot be run: " + "; ".join(faults) + ".")
        merged = {stage: MappingProxyType(dict(self.merged.get(stage, {}))) for stage in STAGES}
        untied = {stage: tuple(self.untied.get(stage, ())) for stage in STAGES}
        object.__setattr__(self, "merged", MappingProxyType(merged))
        object.__setattr__(self, "untied", MappingProxyType(untied))
        widths = {stage: MappingProxyType(cut) for stage, cut in canonical(self.model, self.widths).items()}
        object.__setattr__(self, "widths", MappingProxyType(widths))

    def __reduce__(self) -> tuple[Any, ...]:
        # Read-only mappings cannot be pickled, and a model that holds a plan must be copied and sent to processes.
        merged = {stage: dict(runs) for stage, runs in self.merged.items()}
        widths = {stage: dict(cut) for stage, cut in self.widths.items()}
        shared = (self.model, self.prefill, self.decode, self.relation, self.boundary)
        return type(self), (*shared, merged, dict(self.untied), self.history, widths, self.layout, self.export_widths)

    @classmethod
    def full(cls, model: ModelRef, relation: Relation = "nested", boundary: Boundary = "prefill") -> Self:
        """The plan of the unpruned model: both stages run every block."""
        every = tuple(range(model.num_blocks))
        return cls(model, every, every, relation, boundary)

    def blocks(self, stage: Stage) -> tuple[int, ...]:
        """Original indices of the blocks that `stage` runs, in order."""
        return self.prefill if stage == "prefill" else self.decode

    def held(self, stage: Stage) -> tuple[int, ...]:
        """Original indices of the blocks in the checkpoint of `stage`, in order.

        `compact`: those that the stage runs. `padded`: those that either stage runs, so that both checkpoints have
        equally many; a block that a stage does not run passes its input on unchanged.
        """
        return self.blocks(stage) if self.layout == "compact" else tuple(sorted({*self.prefill, *self.decode}))

    def removed(self, stage: Stage) -> tuple[int, ...]:
        """Original indices of the blocks that `stage` no longer runs, in order."""
        kept = set(self.blocks(stage))
        return tuple(block for block in range(self.model.num_blocks) if block not in kept)

    @property
    def kv_only(self) -> tuple[int, ...]:
        """Blocks of D that prefill does not run: it only projects their keys and values."""
        kept = set(self.prefill)
        return tuple(block for block in self.decode if block not in kept)

    @property
    def stages_are_alike(self) -> bool:
        """Whether both stages run the same blocks with the same weights, merges and widths."""
        alike = self.prefill == self.decode and not any(self.untied.values())
        return alike and all(kept["prefill"] == kept["decode"] for kept in (self.merged, self.widths))

    def width(self, stage: Stage, block: int) -> Width:
        """The width of a block in a stage. A block without an entry in `widths` keeps everything."""
        return self.widths[stage].get(block, Width())

    def kept_units(self, stage: Stage, block: int, part: Part) -> tuple[int, ...]:
        """Numbers of the channels or query heads that a block keeps in a stage."""
        kept = self.width(stage, block).kept(part)
        return tuple(range(self.model.sizes[part] or 0)) if kept is None else kept

    def widest(self, stage: Stage) -> dict[Part, int]:
        """Number of channels and of query heads of every block in the export of a stage: those of its widest block.

        A part of which no block of the stage has lost anything is left out.
        """
        out: dict[Part, int] = {}
        for part in PARTS:
            kept = [self.width(stage, block).kept(part) for block in self.blocks(stage)]
            narrowed = [len(numbers) for numbers in kept if numbers is not None]
            if narrowed:
                whole = self.model.sizes[part] if len(narrowed) < len(kept) else None
                out[part] = whole or max(narrowed)
        return out

    def exported_widths(self, stage: Stage) -> dict[int, dict[Part, int]]:
        """Number of channels and of query heads of each block in the export of a stage, by its original index.

        With `uniform` widths all are those of the widest block, so that every engine can load the export. With
        `per_block` a block that the stage runs has its own. Parts that keep everything are left out.
        """
        found = dict.fromkeys(self.held(stage), self.widest(stage))
        if self.export_widths == "per_block":
            for block in self.blocks(stage):
                kept = {part: self.width(stage, block).kept(part) for part in PARTS}
                found[block] = {part: len(units) for part, units in kept.items() if units is not None}
        return found

    def to_json(self) -> dict[str, Any]:
        """The plan as the `pdtrim.stage_plan/2` object. Empty optional keys are left out."""
        out: dict[str, Any] = {
            "format": PLAN_FORMAT,
            "model": {name: value for name, value in vars(self.model).items() if value is not None},
            "relation": self.relation,
            "boundary": self.boundary,
            "prefill": {"blocks": list(self.prefill), "kv_only": list(self.kv_only)},
            "decode": {"blocks": list(self.decode)},
            "merged": {stage: {str(k): list(v) for k, v in self.merged[stage].items()} for stage in STAGES},
            "history": [entry.to_json() for entry in self.history],
        }
        if any(self.untied.values()):
            out["untied"] = {stage: list(self.untied[stage]) for stage in STAGES}
        if any(self.widths.values()):
            out["widths"] = {s: {str(k): v.to_json() for k, v in self.widths[s].items()} for s in STAGES}
        if self.layout != "compact":
            out["layout"] = self.layout
        if self.export_widths != "uniform":
            out["export_widths"] = self.export_widths
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read a `pdtrim.stage_plan/2` object, or one of version 1, which has no widths.

        Raises:
            UserError: wrong format or version, missing keys, or a plan that cannot be run.
        """
        check_format(data, PLAN_FORMAT, "stage plan", FIRST_PLAN_FORMAT)
        try:
            plan = cls(
                model=ModelRef(**data["model"]),
                prefill=tuple(data["prefill"]["blocks"]),
                decode=tuple(data["decode"]["blocks"]),
                relation=data["relation"],
                boundary=data["boundary"],
                merged={s: {_block(k): tuple(v) for k, v in runs.items()} for s, runs in data["merged"].items()},
                untied={s: tuple(blocks) for s, blocks in data.get("untied", {}).items()},
                history=tuple(Removal(**entry) for entry in data.get("history", ())),
                widths={
                    s: {_block(k): Width.from_json(v) for k, v in cut.items()}
                    for s, cut in data.get("widths", {}).items()
                },
                layout=data.get("layout", "compact"),
                export_widths=data.get("export_widths", "uniform"),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"The stage plan is malformed near {error}. Write it with `StagePlan.save`.") from error
        if list(plan.kv_only) != list(data["prefill"].get("kv_only", plan.kv_only)):
            raise UserError(
                f"`prefill.kv_only` is {data['prefill']['kv_only']}, but the decode blocks that prefill does not run "
                f"are {list(plan.kv_only)}. Remove the key or mend the blocks."
            )
        return plan

    def save(self, path: Path) -> None:
        """Write the plan as indented JSON."""
        write_whole(path, json.dumps(self.to_json(), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a plan file.

        Raises:
            UserError: the file is missing, malformed or holds an invalid plan. The message names the file.
        """
        data = read_json(path, "stage plan")
        try:
            return cls.from_json(data)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error


def _block(key: str) -> int:
    if not key.isdecimal():
        raise UserError(f"`merged` or `widths` has the key {key!r}, which is not a block number.")
    return int(key)
