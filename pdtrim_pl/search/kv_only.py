"""Refit the projections of the blocks of which prefill only makes keys and values.

Such a KV-only block projects a hidden state that blocks before it did not change, since they are gone or narrower. By
least squares, its projections give what those of the teacher give at the same tokens, before any norm of keys. Prefill
then has projections of its own. They cost no FLOPs. (SwiftKV, arXiv 2410.03960, trains such projections.)

Shapes: N prompt tokens, I inputs of a projection, O outputs of it that become keys and values.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from pdtrim_pl.criteria.base import ScoringContext
from pdtrim_pl.data.collate import Batch
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.mode import eval_mode
from pdtrim_pl.evaluation.spread import shared_steps
from pdtrim_pl.merging.refit import Moments, best_change, held_back
from pdtrim_pl.search.narrow import Narrowed
from pdtrim_pl.staged import Request, StagedCausalLM
from pdtrim_pl.staged.refit import Refit

log = logging.getLogger(__name__)

RIDGES = (1.0, 1e-1, 1e-2, 1e-3)
"""Values to add to the diagonal of the Gram matrix, as shares of its mean."""

Place = tuple[int, str]
"""Original index of a KV-only block, and the name of a projection in it."""


def refit_kv_only(context: ScoringContext, batches: Sequence[Batch]) -> Narrowed:
    """Refit the projections of all KV-only blocks of the student's plan.

    Every rank measures the whole text. The student is not changed: apply the plan and the refits that are returned.

    Args:
        context: student under its plan, teacher and device.
        batches: text to fit to, the same on every rank. A quarter of it is held back: a projection is refitted only if
            that reduces its error there. So nothing is refitted on a single batch.

    Returns:
        The plan, under which prefill has weights of its own for the refitted blocks, and the refits.

    Raises:
        UserError: what the projections read or give is not finite.
    """
    student, teacher = context.student, context.teacher
    if not student.plan.kv_only:
        return Narrowed(student.plan)
    if _outputs(student, student) != _outputs(student, teacher):
        log.warning("Keys and values are not refitted: the teacher is of another shape than the student.")
        return Narrowed(student.plan)
    if len(batches) < 2:
        log.warning(
            "Keys and values are not refitted: there is one batch of text, and a second one would have to judge."
        )
        return Narrowed(student.plan)
    own: list[Narrowed] = []
    context.ranks.together(lambda: own.append(_refitted(context, batches)))
    return own[0].agreed(context.ranks)


@torch.no_grad()
def _refitted(context: ScoringContext, batches: Sequence[Batch]) -> Narrowed:
    student, plan = context.student, context.student.plan
    text = [batch.on(context.device) for batch in shared_steps(context.ranks, batches)]
    fitted, judged = dict[Place, Moments](), dict[Place, Moments]()
    with eval_mode(student), eval_mode(context.teacher):
        for index, batch in enumerate(text):
            context.ranks.check_in()
            sums = judged if index < held_back(len(text)) else fitted
            for place, moments in _moments(student, context.teacher, batch):
                sums[place] = sums[place] + moments if place in sums else moments
            context.progress(f"keys and values of KV-only blocks, {index + 1} of {len(text)}")
    refits: list[Refit] = []
    for place, layer in _projections(student, plan.kv_only).items():
        if not all(sums[place].finite for sums in (fitted, judged)):
            raise UserError(
                f"What {place[1]} of block {place[0]} reads or gives is not finite. Check the weights of `model`. If "
                "they or `trainer.precision` are float16, use bfloat16 or float32."
            )
        change = best_change(fitted[place], judged[place], RIDGES).change
        if change is not None:
            weight = layer.weight.detach().float().clone()
            rows = student.architecture.kv_rows(_block(student, place[0]))
            weight[rows] += change.to(weight.device)
            refits.append(Refit(place[0], ("prefill",), place[1], weight))
    return Narrowed(plan.untie("prefill", {refit.block for refit in refits}), refits)


def _moments(student: StagedCausalLM, teacher: StagedCausalLM, batch: Batch) -> Iterator[tuple[Place, Moments]]:
    """What each projection reads, and what its outputs lack, over the prompts of one batch. The sums are on the CPU."""
    request = Request.of(*batch.request, student.plan.boundary)
    tokens, valid = request.tokens["prefill"], request.valid["prefill"]
    ours, theirs = (_projections(model, student.plan.kv_only) for model in (student, teacher))
    with _watched(ours) as (inputs, outputs), _watched(theirs) as (_, wanted):
        student.prefill(tokens, valid)
        teacher.prefill(tokens, valid)
    grams: dict[int, Tensor] = {}  # the projections of a block mostly read one tensor
    with torch.autocast(tokens.device.type, enabled=False):  # autocast would multiply in bf16
        for place in ours:
            x, rows = inputs[place][valid].float(), student.architecture.kv_rows(_block(student, place[0]))
            target = wanted[place][valid].float()[:, rows]
            missing = target - outputs[place][valid].float()[:, rows]
            if id(inputs[place]) not in grams:
                grams[id(inputs[place])] = (x.T @ x).cpu().double()
            yield place, Moments(
                grams[id(inputs[place])], (x.T @ missing).cpu().double(), float(missing.double().square().sum()),
                float(target.double().square().sum()),
            )  # fmt: skip


def _outputs(student: StagedCausalLM, model: StagedCausalLM) -> tuple[int, dict[Place, int]]:
    """Number of blocks of a model, and of outputs of each projection where the student's blocks are KV-only."""
    blocks = [block for block in student.plan.kv_only if block in model.gates]
    return model.plan.model.num_blocks, {place: x.out_features for place, x in _projections(model, blocks).items()}


def _block(model: StagedCausalLM, index: int) -> nn.Module:
    return model.gates[index].weights("prefill", model.plan)


def _projections(model: StagedCausalLM, blocks: Sequence[int]) -> dict[Place, nn.Linear]:
    """The projections of keys and values that prefill uses for some blocks."""
    found = {(b, name): _block(model, b).get_submodule(name) for b in blocks for name in model.architecture.kv_modules}
    return {place: layer for place, layer in found.items() if isinstance(layer, nn.Linear)}


@contextmanager
def _watched(layers: Mapping[Place, nn.Module]) -> Iterator[tuple[dict[Place, Tensor], dict[Place, Tensor]]]:
    """Inputs [B, T, I] and outputs [B, T, O] of some layers, from a pass inside the `with` block."""
    inputs, outputs = dict[Place, Tensor](), dict[Place, Tensor]()

    def watch(place: Place, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def see(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            inputs[place], outputs[place] = args[0], out

        return layer.register_forward_hook(see)

    with ExitStack() as hooks:
        for place, layer in layers.items():
            hooks.callback(watch(place, layer).remove)
        yield inputs, outputs
