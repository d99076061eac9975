"""Refit the projections of the blocks of which prefill only makes keys and values.

Such a KV-only block projects a hidden state that blocks before it did not change, since they are gone or narrower. By
least squares, its projections give the keys and values that the teacher has at the same tokens. Prefill then has
projections of its own. They cost no FLOPs. (SwiftKV, arXiv 2410.03960, trains such projections.)

Shapes: N prompt tokens, I inputs of a block's projections, O outputs of all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from pdtrim_pl.criteria.base import ScoringContext
from pdtrim_pl.data.collate import Batch
from pdtrim_pl.evaluation.mode import eval_mode
from pdtrim_pl.evaluation.spread import shared_steps
from pdtrim_pl.merging.refit import Moments, best_change
from pdtrim_pl.plan import StagePlan
from pdtrim_pl.search.narrow import Narrowed
from pdtrim_pl.staged import Request, StagedCausalLM
from pdtrim_pl.staged.refit import Refit

log = logging.getLogger(__name__)

RIDGES = (1.0, 1e-1, 1e-2, 1e-3)
"""Values to add to the diagonal of the Gram matrix, as shares of its mean."""

Layers = dict[str, nn.Linear]
"""Name in the block -> projection. All projections of a block read the same inputs."""


def refit_kv_only(context: ScoringContext, batches: Sequence[Batch]) -> Narrowed:
    """Refit the projections of all KV-only blocks of the student's plan.

    Every rank measures the whole text. The student is not changed: apply the plan and the refits that are returned.

    Args:
        context: student under its plan, teacher and device.
        batches: text to fit to, the same on every rank. A quarter of it is held back: a refit is made only if it
            reduces the error there. So nothing is refitted on a single batch.

    Returns:
        The plan, under which prefill has weights of its own for the refitted blocks, and the refits.
    """
    own: list[Narrowed] = []
    if not context.student.plan.kv_only:
        return Narrowed(context.student.plan)
    if not _comparable(context.student, context.teacher):
        log.warning(
            "Keys and values of KV-only blocks are not refitted: the teacher is of another shape than the student."
        )
        return Narrowed(context.student.plan)
    context.ranks.together(lambda: own.append(_refitted(context, batches)))
    return own[0].agreed(context.ranks)


@torch.no_grad()
def _refitted(context: ScoringContext, batches: Sequence[Batch]) -> Narrowed:
    student, plan = context.student, context.student.plan
    text = [batch.on(context.device) for batch in shared_steps(context.ranks, batches)]
    held_back = len(text) // 4 or min(1, len(text) - 1)
    sums: list[dict[int, Moments]] = [{}, {}]
    with eval_mode(student), eval_mode(context.teacher):
        for index, batch in enumerate(text):
            context.ranks.check_in()
            of_part = sums[index < held_back]
            for block, moments in _moments(student, context.teacher, batch).items():
                of_part[block] = of_part[block] + moments if block in of_part else moments
            context.progress(f"keys and values of KV-only blocks, {index + 1} of {len(text)}")
    refits: list[Refit] = []
    fitted, judged = sums
    for block in plan.kv_only:
        if block not in fitted:
            continue  # every prompt is one token, which decode handles
        change = best_change(fitted[block], judged.get(block), RIDGES).change
        if change is not None:
            layers = _projections(student, plan, block)
            parts = change.split([layer.out_features for layer in layers.values()])
            refits += [
                Refit(block, ("prefill",), name, layer.weight.detach().float() + part)
                for (name, layer), part in zip(layers.items(), parts, strict=True)
            ]
    return Narrowed(plan.untie("prefill", (refit.block for refit in refits)), refits)


def _moments(student: StagedCausalLM, teacher: StagedCausalLM, batch: Batch) -> Mapping[int, Moments]:
    """What the inputs of each KV-only block's projections are, and what their outputs lack, over one batch."""
    request = Request.of(*batch.request, student.plan.boundary)
    tokens, valid = request.tokens["prefill"], request.valid["prefill"]
    if not tokens.shape[1]:
        return {}
    found: dict[int, Moments] = {}
    ours = {block: _projections(student, student.plan, block) for block in student.plan.kv_only}
    theirs = {block: _projections(teacher, teacher.plan, block) for block in ours}
    with _watched(ours) as (inputs, outputs), _watched(theirs) as (_, wanted):
        student.prefill(tokens, valid)
        teacher.prefill(tokens, valid)
    with torch.autocast(tokens.device.type, enabled=False):  # autocast would multiply in bf16
        for block in ours:
            x, target = inputs[block][valid].float(), torch.cat(wanted[block], -1)[valid].float()
            missing = target - torch.cat(outputs[block], -1)[valid].float()
            found[block] = Moments(
                (x.T @ x).double(), (x.T @ missing).double(), float(missing.double().square().sum()),
                float(target.double().square().sum()),
            )  # fmt: skip
    return found


def _projections(model: StagedCausalLM, plan: StagePlan, block: int) -> Layers:
    weights = model.gates[block].weights("prefill", plan)
    layers = {name: weights.get_submodule(name) for name in model.architecture.kv_modules}
    return {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}


@contextmanager
def _watched(layers: Mapping[int, Layers]) -> Iterator[tuple[dict[int, Tensor], dict[int, list[Tensor]]]]:
    """Inputs [B, T, I] of each block's projections, and the outputs of each, from a pass inside the `with` block."""
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, list[Tensor]] = {block: [] for block in layers}

    def watch(block: int, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def see(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            inputs[block] = args[0]
            outputs[block].append(out)

        return layer.register_forward_hook(see)

    with ExitStack() as hooks:
        for block, of_block in layers.items():
            for layer in of_block.values():
                hooks.callback(watch(block, layer).remove)
        yield inputs, outputs


def _comparable(student: StagedCausalLM, teacher: StagedCausalLM) -> bool:
    """Whether the blocks of both models have keys and values of one shape, block by block."""
    ours, theirs = student.kv_shape, teacher.kv_shape
    heads = (ours.num_key_value_heads, ours.head_dim) == (theirs.num_key_value_heads, theirs.head_dim)
    return heads and student.plan.model.num_blocks == teacher.plan.model.num_blocks
