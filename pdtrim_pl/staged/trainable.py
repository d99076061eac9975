"""Which of a student's weights train."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from pdtrim_pl.plan import STAGES, StagePlan
from pdtrim_pl.staged.gate import Gate
from pdtrim_pl.staged.lora import LoRA, adapters_of

Trainable = Literal["all", "merged", "norms", "lora"]
"""`all` weights; those of blocks that stand for several (`merged`); the `norms`; or adapters alone (`lora`)."""


def trained_in(gate: Gate, plan: StagePlan, trainable: Trainable | LoRA) -> Iterator[nn.Parameter]:
    """The parameters of a block that train: of what some stage of the plan uses, the kind that `trainable` names."""
    for stage in STAGES:
        projects = stage == "prefill" and gate.index in plan.kv_only
        if gate.index not in plan.blocks(stage) and not projects:
            continue
        block, kv = gate.weights(stage, plan), gate.architecture.kv_modules
        if isinstance(trainable, LoRA):
            for name, adapter in adapters_of(gate.adapters, stage).items():
                if not projects or name in kv:
                    yield from adapter.parameters()
        elif trainable != "merged" or gate.index in plan.merged[stage]:
            for used in [block.get_submodule(name) for name in kv] if projects else [block]:
                yield from _norms(used) if trainable == "norms" else used.parameters()


def freeze_outside(model: PreTrainedModel, gates: list[Gate], trainable: Trainable | LoRA) -> None:
    """Disable gradients of embeddings, head and final norm, as far as `trainable` does not name them.

    `all` changes nothing: `freeze_embeddings` may have frozen some of them.
    """
    if trainable == "all":
        return
    inside = {id(parameter) for gate in gates for parameter in gate.parameters()}
    kept = {id(parameter) for parameter in _norms(model)} if trainable == "norms" else set[int]()
    for parameter in model.parameters():
        if id(parameter) not in inside:
            parameter.requires_grad_(id(parameter) in kept)


def _norms(module: nn.Module) -> Iterator[nn.Parameter]:
    """Scales and offsets of norms: of every module whose own weight has one dimension."""
    for part in module.modules():
        weight = dict(part.named_parameters(recurse=False)).get("weight")
        if weight is not None and weight.dim() == 1:
            yield from part.parameters(recurse=False)
