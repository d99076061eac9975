"""The stage plan: which blocks each inference stage runs. The only truth about structure.

Imports no torch, so command-line tools and other engines read a plan in milliseconds.
Blocks are always named by their index in the original model, from 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan.json_files import check_format, read_json, write_whole
from pdtrim_pl.plan.stages import ONLY_TARGET, STAGES, Boundary, ModelRef, Relation, Removal, Stage, Target
from pdtrim_pl.plan.validity import plan_faults

PLAN_FORMAT = "pdtrim.stage_plan/1"
PLAN_FILE = "stage_plan.json"
_EMPTY: Mapping[Any, Any] = MappingProxyType({})


@dataclass(frozen=True)
class StagePlan:
    """P and D of the method: the blocks the prefill and the decode stage run, each in original order.

    Raises:
        UserError: naming every fault at once, if the plan is not one the contract can run.
    """

    model: ModelRef
    prefill: tuple[int, ...]
    decode: tuple[int, ...]
    relation: Relation = "nested"
    boundary: Boundary = "prefill"
    merged: Mapping[Stage, Mapping[int, tuple[int, ...]]] = field(default_factory=lambda: _EMPTY)
    """Per stage: the block that stands for a run of original blocks, and that run."""
    untied: Mapping[Stage, tuple[int, ...]] = field(default_factory=lambda: _EMPTY)
    """Per stage: blocks that hold weights of their own there instead of the shared ones."""
    history: tuple[Removal, ...] = ()

    def __post_init__(self) -> None:
        blocks: dict[Stage, tuple[int, ...]] = {"prefill": self.prefill, "decode": self.decode}
        faults = plan_faults(self.model.num_blocks, blocks, self.relation, self.boundary, self.merged, self.untied)
        if faults:
            raise UserError("This stage plan cannot be run: " + "; ".join(faults) + ".")
        merged = {stage: MappingProxyType(dict(self.merged.get(stage, {}))) for stage in STAGES}
        untied = {stage: tuple(self.untied.get(stage, ())) for stage in STAGES}
        object.__setattr__(self, "merged", MappingProxyType(merged))
        object.__setattr__(self, "untied", MappingProxyType(untied))

    def __reduce__(self) -> tuple[Any, ...]:
        # Read-only mappings cannot be pickled; without this no model that holds a plan could be copied or spawned.
        merged = {stage: dict(runs) for stage, runs in self.merged.items()}
        shared = (self.model, self.prefill, self.decode, self.relation, self.boundary)
        return StagePlan, (*shared, merged, dict(self.untied), self.history)

    @classmethod
    def full(cls, model: ModelRef, relation: Relation = "nested", boundary: Boundary = "prefill") -> StagePlan:
        """The plan of the unpruned model: both stages run every block."""
        every = tuple(range(model.num_blocks))
        return cls(model, every, every, relation, boundary)

    def blocks(self, stage: Stage) -> tuple[int, ...]:
        """Original indices of the blocks `stage` runs, in order."""
        return self.prefill if stage == "prefill" else self.decode

    def removed(self, stage: Stage) -> tuple[int, ...]:
        """Original indices of the blocks that left `stage`, in order."""
        kept = set(self.blocks(stage))
        return tuple(block for block in range(self.model.num_blocks) if block not in kept)

    @property
    def kv_only(self) -> tuple[int, ...]:
        """Blocks of D that prefill does not run but projects keys and values for."""
        kept = set(self.prefill)
        return tuple(block for block in self.decode if block not in kept)

    def candidates(self, target: Target, protect_first: int = 1, protect_last: int = 1) -> tuple[int, ...]:
        """Blocks that may still be dropped from `target` without breaking the relation or a guard.

        Under `nested` a prefill drop takes a block that decode has already lost while one is left, so that the
        number of decode blocks stays what its own schedule says; when none is left, a block leaves both stages.
        """
        free = self.drop_candidates(target, protect_first, protect_last)
        if self.relation == "nested" and target == "prefill":
            free = tuple(block for block in free if block not in self.decode) or free
        return free

    def drop_candidates(self, target: Target, protect_first: int = 1, protect_last: int = 1) -> tuple[int, ...]:
        """Every block that `drop` accepts for `target` and the guards allow."""
        self._check_target(target)
        last = self.model.num_blocks - protect_last
        free = (block for block in range(protect_first, last) if block in self._stage_set(target))
        return tuple(block for block in free if self._leaves_every_stage_a_block(target, block))

    def drop(
        self, target: Target, block: int, *, round: int = 0, criterion: str = "manual", score: float | None = None
    ) -> StagePlan:
        """A new plan without `block` in the stage(s) that `target` and the relation name.

        Under `nested` and `unified`, what prefill drops, decode drops too.

        Raises:
            UserError: unknown stage, a block that is not there, or a stage left without blocks.
        """
        self._check_target(target)
        if block not in self._stage_set(target):
            raise UserError(
                f"Cannot drop block {block} from `{target}`: it is not there. Blocks left: {self._stage_set(target)}."
            )
        kept = {stage: self.blocks(stage) for stage in STAGES}
        entries: list[Removal] = []
        for stage in self.stages_losing(target, block):
            if kept[stage] == (block,):
                raise UserError(
                    f"Dropping block {block} would leave the `{stage}` stage without blocks. Lower the number of "
                    "blocks in the `schedule` of its drop callback."
                )
            kept[stage] = tuple(other for other in kept[stage] if other != block)
            entries.append(Removal(round, stage, "drop", block, criterion, score))
        return replace(
            self,
            prefill=kept["prefill"],
            decode=kept["decode"],
            merged={s: {k: v for k, v in self.merged[s].items() if k in kept[s]} for s in STAGES},
            untied={s: tuple(b for b in self.untied[s] if b in kept[s]) for s in STAGES},
            history=self.history + tuple(entries),
        )

    def merge(
        self, target: Target, run: Iterable[int], into: int, *, untied: bool = True, round: int = 0,
        criterion: str = "manual", score: float | None = None,
    ) -> StagePlan:  # fmt: skip
        """A new plan in which block `into` stands for the neighbouring blocks `run`.

        The merge is made in the stages that a drop of the absorbed blocks would take them out of, so under `nested` a
        prefill merge of blocks that decode still runs is made in both.

        Args:
            target: the stage(s) whose blocks are merged.
            run: original indices of neighbours in those stages, `into` among them.
            into: the block that stays, at its own index.
            untied: give the merged block weights of its own in each of those stages.
            round: of the history.
            criterion: of the history.
            score: of the history.

        Raises:
            UserError: blocks that are not neighbours in each of those stages.
        """
        members = tuple(sorted(set(run)))
        absorbed = [block for block in members if block != into]
        stages = {stage for block in absorbed or members for stage in self.stages_losing(target, block)}
        for stage in STAGES:
            blocks = self.blocks(stage)
            places = [blocks.index(block) for block in members if block in blocks]
            neighbours = places == list(range(places[0], places[0] + len(members))) if places else False
            if stage in stages and (not neighbours or into not in members or not absorbed):
                raise UserError(
                    f"Cannot merge {list(members)} into {into} in `{stage}`: give at least two neighbours of that "
                    f"stage, {into} among them. Blocks left: {list(blocks)}."
                )
        plan = self
        for block in absorbed:
            plan = plan.drop(target, block, round=round, criterion=criterion, score=score)
        entries = tuple(replace(entry, action="merge") for entry in plan.history[len(self.history) :])
        runs = {s: tuple(sorted({b for m in members for b in self.merged[s].get(m, (m,))})) for s in stages}
        return replace(
            plan,
            merged={s: {**plan.merged[s], **({into: runs[s]} if s in stages else {})} for s in STAGES},
            untied={s: tuple(sorted({*plan.untied[s], *([into] if untied and s in stages else [])})) for s in STAGES},
            history=self.history + entries,
        )

    def to_json(self) -> dict[str, Any]:
        """The plan as the `pdtrim.stage_plan/1` object. Optional keys are written only where they say something."""
        out: dict[str, Any] = {
            "format": PLAN_FORMAT,
            "model": {name: value for name, value in vars(self.model).items() if value is not None},
            "relation": self.relation,
            "boundary": self.boundary,
            "prefill": {"blocks": list(self.prefill), "kv_only": list(self.kv_only)},
            "decode": {"blocks": list(self.decode)},
            "merged": {stage: {str(k): list(v) for k, v in self.merged[stage].items()} for stage in STAGES},
            "history": [vars(entry).copy() for entry in self.history],
        }
        if any(self.untied.values()):
            out["untied"] = {stage: list(self.untied[stage]) for stage in STAGES}
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StagePlan:
        """Read a `pdtrim.stage_plan/1` object.

        Raises:
            UserError: wrong format or version, missing keys, or a plan that cannot be run.
        """
        check_format(data, PLAN_FORMAT, "stage plan")
        try:
            plan = cls(
                model=ModelRef(**data["model"]),
                prefill=tuple(data["prefill"]["blocks"]),
                decode=tuple(data["decode"]["blocks"]),
                relation=data["relation"],
                boundary=data["boundary"],
                merged={s: {_block(k): tuple(v) for k, v in data["merged"].get(s, {}).items()} for s in STAGES},
                untied={s: tuple(data.get("untied", {}).get(s, ())) for s in STAGES},
                history=tuple(Removal(**entry) for entry in data.get("history", ())),
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
    def load(cls, path: Path) -> StagePlan:
        """Read a plan file; a ValueError names the file."""
        data = read_json(path, "stage plan")
        try:
            return cls.from_json(data)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error

    def _stage_set(self, target: Target) -> tuple[int, ...]:
        if target == "both":
            return tuple(block for block in self.prefill if block in self.decode)
        return self.blocks(target)

    def stages_losing(self, target: Target, block: int) -> tuple[Stage, ...]:
        """The stages that a drop of `block` from `target` takes it out of."""
        if target == "both" or self.relation == "unified":
            return STAGES
        if self.relation == "nested" and target == "prefill" and block in self.decode:
            return STAGES
        return (target,)

    def _leaves_every_stage_a_block(self, target: Target, block: int) -> bool:
        return all(self.blocks(stage) != (block,) for stage in self.stages_losing(target, block))

    def _check_target(self, target: Target) -> None:
        if target not in get_args(Target):
            raise UserError(f"Unknown `stage` {target!r}: choose one of {', '.join(get_args(Target))}.")
        if target != ONLY_TARGET.get(self.relation, target):
            why = {
                "unified": "which drops from both: use `both`",
                "prefill_only": "whose decode stage keeps every block: use `prefill`, or another relation",
            }[self.relation]
            raise UserError(f"`stage: {target}` does not fit `relation: {self.relation}`, {why}.")


def _block(key: str) -> int:
    if not key.isdecimal():
        raise UserError(f"`merged` has the key {key!r}, which is no block number.")
    return int(key)
