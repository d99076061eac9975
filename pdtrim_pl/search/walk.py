"""Run a text through the student one block at a time, under the contract, and show the inputs of a layer.

The hidden states behind a block are kept. So after a block is narrowed and refitted, the next one reads its new output.

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
"""Stage -> name of a layer in the block -> what to add to its weights, [outputs, inputs]."""
See = Callable[[int, Stage, Tensor], None]
"""A function that gets a batch's number, a stage, and a layer's inputs at the real tokens of that stage, [N, I]."""


class Walk:
    """A text that has reached one block of the student: `run` measures this block, `advance` moves on to the next.

    Args:
        student: in eval mode; it is not changed.
        batches: the text, on the student's device.
    """

    def __init__(self, student: StagedCausalLM, batches: Sequence[Batch]) -> None:
        self.student = student
        self.requests = [Request.of(*batch.request, student.plan.boundary) for batch in batches]
        self._hidden: list[dict[Stage, Tensor]] = [{} for _ in batches]

    def run(self, block: int, plan: StagePlan, changes: Changes, layer: str, see: See) -> None:
        """Run one block over the text, and show the inputs of one of its layers. The text stays in front of the block.

        Args:
            block: original index of the block.
            plan: gives the width of the block.
            changes: what to add to the weights of the block during this run.
            layer: name of the layer in the block.
            see: called once for every batch and stage.
        """
        for index in range(len(self.requests)):
            self._through(index, block, plan, changes, layer, see)

    def advance(self, block: int, plan: StagePlan, changes: Changes) -> None:
        """Run one block over the text, and keep its output as the input of the next; arguments as of `run`."""
        for index in range(len(self.requests)):
            self._hidden[index].update(self._through(index, block, plan, changes))

    @torch.no_grad()
    def _through(
        self, index: int, block: int, plan: StagePlan, changes: Changes, layer: str = "", see: See | None = None
    ) -> dict[Stage, Tensor]:
        """Hidden states of one batch behind a block, for each stage that runs the block."""
        own = self.student.plan  # its weights exist; `plan` may untie weights that the student does not have yet
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
                    hooks.enter_context(_shown(weights.get_submodule(layer), index, stage, valid, see))
                keep = _keeping(stage, block, after)
                if stage == "prefill":
                    out = self.student.prefill(tokens, valid, plan=alone, observer=keep, resume=resume)
                    sent = out.cache.retained(None if policy is None else policy.restricted_to(alone))
                else:
                    assert sent is not None
                    self.student.decode(tokens, sent, valid, plan=alone, observer=keep, keep_cache=False, resume=resume)
        return after


def _alone(plan: StagePlan, untied: Mapping[Stage, tuple[int, ...]], block: int) -> StagePlan:
    """A plan that runs one block alone, for a pass that starts at this block."""
    prefill = decode = (block,)
    if block not in plan.prefill:
        # The block is KV-only, but a plan must give prefill a block. The output of the next block is not used. If there
        # is no next one, the block before does not run, because the pass starts behind it.
        prefill = (block + 1 if block + 1 < plan.model.num_blocks else block - 1,)
    own = {s: tuple({block} & set(untied[s])) for s in STAGES if block in plan.blocks(s) or s == "prefill"}
    widths = {stage: {block: plan.width(stage, block)} for stage in STAGES if block in plan.blocks(stage)}
    return StagePlan(plan.model, prefill, decode, "free", plan.boundary, untied=own, widths=widths)


def _keeping(stage: Stage, block: int, after: dict[Stage, Tensor]) -> Observer:
    def observe(index: int, _: Tensor, out: Tensor) -> None:
        if index == block:
            after[stage] = out

    return observe


@contextmanager
def _changed(layer: nn.Module, change: Tensor) -> Iterator[None]:
    """Run a linear layer as if `change` were added to its weights. They are not written, since they may be sharded."""

    def add(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return out + F.linear(args[0], change.to(args[0].dtype))

    handle = layer.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _shown(layer: nn.Module, index: int, stage: Stage, valid: Tensor, see: See) -> Iterator[None]:
    """Call `see` with the inputs of a layer inside the `with` block."""
    # Not a hook in front of the layer: it would run before the one that sets lost inputs to zero, if that is new.
    handle = layer.register_forward_hook(lambda _, args, out: see(index, stage, args[0][valid]))
    try:
        yield
    finally:
        handle.remove()
