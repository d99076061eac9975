"""The stage plan: which blocks each inference stage runs.

Imports no torch, so command-line tools and other engines read a plan in milliseconds.
A block is always named by its index in the original model, from 0.
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
    """Per stage: blocks for which the stage has weights of its own instead of the shared ones."""
    history: tuple[Removal, ...] = ()
    """Every removal that led to this plan, in order."""

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
        # Read-only mappings cannot be pickled, and a model that holds a plan must be copied and sent to processes.
        merged = {stage: dict(runs) for stage, runs in self.merged.items()}
        shared = (self.model, self.prefill, self.decode, self.relation, self.boundary)
        return StagePlan, (*shared, merged, dict(self.untied), self.history)

    @classmethod
    def full(cls, model: ModelRef, relation: Relation = "nested", boundary: Boundary = "prefill") -> StagePlan:
        """The plan of the unpruned model: both stages run every block."""
        every = tuple(range(model.num_blocks))
        return cls(model, every, every, relation, boundary)

    def blocks(self, stage: Stage) -> tuple[int, ...]:
        """Original indices of the blocks that `stage` runs, in order."""
        return self.prefill if stage == "prefill" else self.decode

    def removed(self, stage: Stage) -> tuple[int, ...]:
        """Original indices of the blocks that `stage` no longer runs, in order."""
        kept = set(self.blocks(stage))
        return tuple(block for block in range(self.model.num_blocks) if block not in kept)

    @property
    def kv_only(self) -> tuple[int, ...]:
        """Blocks of D that prefill does not run: it only projects their keys and values."""
        kept = set(self.prefill)
        return tuple(block for block in self.decode if block not in kept)

    def candidates(self, target: Target, protect_first: int = 1, protect_last: int = 1) -> tuple[int, ...]:
        """Blocks that may still be dropped from `target` without breaking the relation or a guard.

        Under `nested`, the candidates of prefill are the blocks that decode has already dropped: so prefill drops do
        not change the number of decode blocks. If there is no such block, any block may go, and it leaves both stages.
        """
        free = self.drop_candidates(target, protect_first, protect_last)
        if self.relation == "nested" and target == "prefill":
            free = tuple(block for block in free if block not in self.decode) or free
        return free

    def drop_candidates(self, target: Target, protect_first: int = 1, protect_last: int = 1) -> tuple[int, ...]:
        """Every block that `drop` accepts for `target` and that the guards allow."""
        self._check_target(target)
        last = self.model.num_blocks - protect_last
        free = (block for block in range(protect_first, last) if block in self._stage_set(target))
        return tuple(block for block in free if self._leaves_every_stage_a_block(target, block))

    def drop(
        self, target: Target, block: int, *, round: int = 0, criterion: str = "manual", score: float | None = None
    ) -> StagePlan:
        """A new plan without `block` in `target`.

        Under `nested` and `unified`, decode also drops every block that prefill drops. `stages_losing` tells which
        stages lose the block.

        Raises:
            UserError: an unknown stage, a block that the stage does not run, or a stage left without blocks.
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
        """A new plan in which block `into` replaces the neighbouring blocks `run`.

        A merge changes the same stages as a drop of the absorbed blocks: under `nested`, a prefill merge of blocks that
        decode still runs changes both stages.

        Args:
            target: the stage(s) whose blocks are merged.
            run: original indices of neighbours in those stages, `into` among them.
            into: the block that stays, at its own index.
            untied: give the merged block weights of its own in each of those stages.
            round: round number, for the history.
            criterion: name of the criterion, for the history.
            score: score of the criterion, for the history.

        Raises:
            UserError: the blocks are not neighbours in each of those stages.
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
        """The plan as the `pdtrim.stage_plan/1` object. Empty optional keys are left out."""
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
        """Read a plan file.

        Raises:
            UserError: the file is missing, malformed or holds an invalid plan. The message names the file.
        """
        data = read_json(path, "stage plan")
        try:
            return cls.from_json(data)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error

    def _stage_set(self, target: Target) -> tuple[int, ...]:
        """Blocks that can be dropped from `target`: for `both`, the blocks that both stages run."""
        if target == "both":
            return tuple(block for block in self.prefill if block in self.decode)
        return self.blocks(target)

    def stages_losing(self, target: Target, block: int) -> tuple[Stage, ...]:
        """The stages that lose `block` when it is dropped from `target` under this relation."""
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
        raise UserError(f"`merged` has the key {key!r}, which is not a block number.")
    return int(key)
