"""Drop blocks by a criterion, one-shot or greedily."""

from __future__ import annotations

import torch
from typing_extensions import override

from pdtrim_pl.compare.bench import Bench
from pdtrim_pl.compare.found import Found
from pdtrim_pl.compare.method import ReadsTrainingText
from pdtrim_pl.criteria import Criterion
from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import ONLY_TARGET, WITH_KV_ONLY, Boundary, Relation, StagePlan, Target
from pdtrim_pl.search import Guards, refit_kv_only
from pdtrim_pl.search.choose import choose_drops


class Drop(ReadsTrainingText):
    """Drops the `count` blocks of least harm by a criterion, without training.

    ShortGPT, SLEB and POP are this method with their criterion, relation and boundary. A greedy criterion continues
    from the next smaller count, since it would choose the same blocks again. A one-shot criterion starts from the full
    model.

    Args:
        criterion: measures the harm of a drop.
        relation: how the blocks of the two stages relate.
        target: the stage(s) that lose the blocks.
        boundary: which stage handles the prompt's last token.
        refit_tokens: tokens of training text on which the projections of KV-only blocks are refitted: blocks that
            prefill has dropped and decode runs. 0 refits nothing.
        guards: limits on the drops; null takes those of the comparison. Under `boundary: decode` nothing reads the
            output of prefill's last block, so it need not be protected.

    Raises:
        UserError: the relation does not allow this target, or there are no keys and values to refit.
    """

    def __init__(
        self, criterion: Criterion, relation: Relation = "unified", target: Target = "both",
        boundary: Boundary = "prefill", refit_tokens: int = 0, guards: Guards | None = None,
    ) -> None:  # fmt: skip
        super().__init__(None, refit_tokens)
        only = ONLY_TARGET.get(relation, target)
        if target != only:
            raise UserError(f"`target: {target}` does not fit `relation: {relation}`: use `target: {only}`.")
        if refit_tokens and (relation not in WITH_KV_ONLY or target != "prefill"):
            raise UserError(
                f"`refit_tokens: {refit_tokens}` refits keys and values of blocks that prefill alone loses: use "
                "`target: prefill` and `relation: prefill_only` or `free`, or leave it out."
            )
        self.criterion, self.relation, self.target, self.boundary = criterion, relation, target, boundary
        self.guards = guards

    @property
    @override
    def continues(self) -> bool:
        return self.criterion.rescores

    @override
    def find(self, bench: Bench, start: Found | None, count: int) -> Found:
        begun = start or Found(bench.full(self.relation, self.boundary))
        gone = len(begun.plan.removed("decode" if self.target == "decode" else "prefill"))
        context, guards = bench.context(bench.student(begun)), self.guards or bench.guards
        with torch.no_grad():
            plan = choose_drops(self.criterion, context, begun.plan, self.target, count - gone, guards=guards)
        return self._refitted(bench, plan) if self.tokens and plan.kv_only else Found(plan)

    def _refitted(self, bench: Bench, plan: StagePlan) -> Found:
        student = bench.student(Found(plan), dtype="float32")
        text, tokens = bench.refitting_text(self.tokens)
        found = refit_kv_only(bench.context(student), text)
        student.apply_plan(found.plan, refits=found.refits)
        return Found(found.plan, None, bench.changed(student), tokens)
