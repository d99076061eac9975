"""A text on its way through the student, block by block under the contract: what last layers see of it, stage by stage.

Each block reads what the blocks before it make of the text as they are by then, so that what is chosen and refitted in
one of them is known to all behind it.

Shapes: B batch, T tokens of a stage, H hidden, I inputs of a last layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.plan import STAGES, Stage, StagePlan
from pdtrim_pl.staged import KVCache, Request, StagedCausalLM
from pdtrim_pl.staged.gate import Observer, Resume

Changes = Mapping[Stage, Mapping[str, Tensor]]
"""Per stage, what is added to the weights of a block's layers by their names, [outputs, inputs]."""
See = Callable[[int, Stage, Tensor], None]
"""Gets the number of a batch, a stage, and a layer's inputs at the batch's real tokens there, [N, I]."""


class Walk:
    """A text in front of one block of the student; `run` looks at the block, `advance` goes behind it.

    Args:
        student: in eval mode; it is not changed.
        batches: the text, on the student's device.
    """

    def __init__(self, student: StagedCausalLM, batches: Sequence[Batch]) -> None:
        self.student = student
        self.requests = [Request.of(*batch.request, student.plan.boundary) for batch in batches]
        self._hidden: list[dict[Stage, Tensor]] = [{} for _ in batches]

    def run(self, block: int, plan: StagePlan, changes: Changes, layer: str, see: See) -> None:
        """Run one block over the text and show what one of its layers gets.

        Args:
            block: original index.
            plan: how wide the block is.
            changes: what is added to its weights meanwhile.
            layer: its name in the block.
            see: gets number of the batch, stage, and inputs at real tokens, [N, I].
        """
        for index in range(len(self.requests)):
            self._through(index, block, plan, changes, layer, see)

    def advance(self, block: int, plan: StagePlan, changes: Changes) -> None:
        """Go behind a block."""
        for index in range(len(self.requests)):
            self._hidden[index].update(self._through(index, block, plan, changes))

    @torch.no_grad()
    def _through(
        self, index: int, block: int, plan: StagePlan, changes: Changes, layer: str = "", see: See | None = None
    ) -> dict[Stage, Tensor]:
        """Hidden states of one batch behind a block, per stage that runs it."""
        own = self.student.plan  # whose weights are there; those that `plan` unties anew are not
        request, alone, after = self.requests[index], _alone(plan, own.untied, block), dict[Stage, Tensor]()
        policy = self.student.policy
        sent: KVCache | None = None
        for stage in STAGES:
            tokens, valid = request.tokens[stage], request.valid[stage]
            if not tokens.shape[1] or (stage == "decode" and block not in plan.decode):
                continue
            if stage == "prefill" and block not in plan.prefill and block not in plan.kv_only:
                continue
            hidden = self._hidden[index].get(stage)
            resume = None if hidden is None else Resume(block, hidden, {})
            weights = self.student.gates[block].weights(stage, own)
            with ExitStack() as hooks:
                for name, change in changes.get(stage, {}).items():
                    hooks.enter_context(_changed(weights.get_submodule(name), change))
                if see is not None:
                    hooks.enter_context(_seen(weights.get_submodule(layer), index, stage, valid, see))
                watch = _keeping(stage, block, after)
                if stage == "prefill":
                    out = self.student.prefill(tokens, valid, plan=alone, observer=watch, resume=resume)
                    sent = out.cache.retained(None if policy is None else policy.restricted_to(alone))
                else:
                    assert sent is not None
                    self.student.decode(
                        tokens, sent, valid, plan=alone, observer=watch, keep_cache=False, resume=resume
                    )
        return after


def _alone(plan: StagePlan, untied: Mapping[Stage, tuple[int, ...]], block: int) -> StagePlan:
    """The plan under which nothing but one block does anything, for a pass that starts there."""
    prefill = decode = (block,)
    if block not in plan.prefill:
        # No stage is without blocks. What one behind it does is not looked at; before the last one the pass has begun.
        prefill = (block + 1 if block + 1 < plan.model.num_blocks else block - 1,)
    own = {stage: tuple({block} & set(untied[stage])) for stage in STAGES if block in plan.blocks(stage)}
    widths = {stage: {block: plan.width(stage, block)} for stage in STAGES if block in plan.blocks(stage)}
    return StagePlan(plan.model, prefill, decode, "free", plan.boundary, untied=own, widths=widths)


def _keeping(stage: Stage, block: int, after: dict[Stage, Tensor]) -> Observer:
    def observe(index: int, _: Tensor, out: Tensor) -> None:
        if index == block:
            after[stage] = out

    return observe


@contextmanager
def _changed(layer: nn.Module, change: Tensor) -> Iterator[None]:
    """Inside, a linear layer has other weights; nothing is written, for it may be sharded."""

    def add(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return out + F.linear(args[0], change.to(args[0].dtype))

    handle = layer.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _seen(layer: nn.Module, index: int, stage: Stage, valid: Tensor, see: See) -> Iterator[None]:
    handle = layer.register_forward_pre_hook(lambda _, args: see(index, stage, args[0][valid]))
    try:
        yield
    finally:
        handle.remove()
