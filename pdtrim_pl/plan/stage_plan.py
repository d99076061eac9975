"""The stage plan: which blocks each inference stage runs. The only truth about structure.

Imports no torch, so command-line tools and other engines read a plan in milliseconds.
Blocks are always named by their index in the original model, from 0.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import get_args

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan.planned_stages import PlannedStages
from pdtrim_pl.plan.stages import ONLY_TARGET, PARTS, STAGES, Removal, Stage, Target
from pdtrim_pl.plan.validity import used_blocks
from pdtrim_pl.plan.width import Width


@dataclass(frozen=True)
class StagePlan(PlannedStages):
    """P and D of the method, and the changes that make a new plan: drop blocks, merge them, or make them narrower."""

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
        self.check_target(target)
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
        self.check_target(target)
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
            # What prefill runs no more, it projects by the weights that it has.
            untied={s: tuple(b for b in self.untied[s] if b in used_blocks(s, kept)) for s in STAGES},
            history=self.history + tuple(entries),
            widths={s: {k: v for k, v in self.widths[s].items() if k in kept[s]} for s in STAGES},
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

    def narrow(
        self, target: Target, block: int, width: Width, *, untied: Collection[Stage] = (), round: int = 0,
        criterion: str = "manual", score: float | None = None,
    ) -> StagePlan:  # fmt: skip
        """A new plan in which `block` keeps no more than `width` in some stages.

        Under `nested` and `unified`, decode also loses what prefill loses; see `stages_losing`.

        Args:
            target: the stage(s) that lose channels or heads.
            block: original index of the block.
            width: the channels and heads that it may keep; those that it has lost before stay lost.
            untied: stages in which the block gets weights of its own.
            round: round number, for the history.
            criterion: name of the criterion, for the history.
            score: score of the criterion, for the history.

        Raises:
            UserError: the stage does not run the block, or the relation or the KV heads do not allow the width.
        """
        self.check_target(target)
        if block not in self._stage_set(target):
            raise UserError(
                f"Cannot narrow block {block} in `{target}`: it is not there. Blocks left: {self._stage_set(target)}."
            )
        widths, entries = {stage: dict(self.widths[stage]) for stage in STAGES}, list[Removal]()
        for stage in self.stages_losing(target, block):
            before, after = self.width(stage, block), self.width(stage, block).within(width)
            widths[stage][block] = after
            for part in PARTS:
                kept = after.kept(part)
                if kept is not None and kept != before.kept(part) and len(kept) != self.model.sizes[part]:
                    entries.append(Removal(round, stage, "narrow", block, criterion, score, len(kept), part))
        own = {stage: {*self.untied[stage], *([block] if stage in untied else [])} for stage in STAGES}
        return replace(
            self,
            widths=widths,
            untied={stage: tuple(sorted(own[stage])) for stage in STAGES},
            history=self.history + tuple(entries),
        )

    def untie(self, stage: Stage, blocks: Iterable[int]) -> StagePlan:
        """A new plan in which a stage has weights of its own for these blocks too."""
        return replace(self, untied={**self.untied, stage: tuple(sorted({*self.untied[stage], *blocks}))})

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

    def check_target(self, target: Target) -> None:
        """Refuse a target that the relation does not allow.

        Raises:
            UserError: an unknown target, or one that the relation excludes. The message gives an alternative.
        """
        if target not in get_args(Target):
            raise UserError(f"Unknown `stage` {target!r}: choose one of {', '.join(get_args(Target))}.")
        if target != ONLY_TARGET.get(self.relation, target):
            why = {
                "unified": "which drops from both: use `both`",
                "prefill_only": "whose decode stage keeps every block: use `prefill`, or another relation",
            }[self.relation]
            raise UserError(f"`stage: {target}` does not fit `relation: {self.relation}`, {why}.")
