"""The gate inside a block: a stage runs the block without the MLP channels and query heads that it has lost there.

The block stays whole, so optimizers, shards and checkpoints do not change. In front of the last layer of the MLP and of
the attention, a hook sets the outputs of lost channels and heads to zero. An export leaves them out.

Shapes: I inputs of a last layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from pdtrim_pl.errors import UserError
from pdtrim_pl.models.architectures import Architecture
from pdtrim_pl.models.cuts import Cuts
from pdtrim_pl.plan import PARTS, STAGES, Part, StagePlan, Width
from pdtrim_pl.staged.layer_hooks import saying

Lost = Mapping[str, Tensor]
"""Name of a last layer in the block -> which of its inputs are lost, bool [I]."""

_NOTHING: Lost = MappingProxyType({})
_LOST: ContextVar[Lost] = ContextVar("lost", default=_NOTHING)
_MARK = "lost_inputs_are_zero"
"""Name of an attribute that marks layers with the hook. A copy of a layer has both."""


def lost_inputs(block: nn.Module, cuts: Cuts, sizes: Mapping[Part, int | None], width: Width | None) -> Lost:
    """The inputs of last layers that a block loses under a width.

    Args:
        block: the decoder block.
        cuts: where its channels and heads are, from the adapter of its family.
        sizes: numbers of channels and heads of the whole block.
        width: the channels and heads that it keeps; None keeps everything.
    """
    if width is None:
        return _NOTHING
    lost = {}
    for part, cut in cuts.items():
        units = sizes[part]
        if width.kept(part) is not None:
            layer = block.get_submodule(cut.columns)
            assert isinstance(layer, nn.Linear)
            assert units is not None
            lost[cut.columns] = _lost(width, part, units, layer.in_features, layer.weight.device)
    return lost


def narrowed(block: nn.Module, lost: Lost) -> AbstractContextManager[None]:
    """Inside the `with` block, this thread runs the block without the lost inputs."""
    return saying(_LOST, lost, block, _MARK, lambda layer, name: layer.register_forward_pre_hook(_Zeroing(name)))


def check_widths(block: nn.Module, index: int, architecture: Architecture, plan: StagePlan) -> None:
    """Refuse a plan whose widths do not fit a block.

    Args:
        block: the decoder block.
        index: its original index.
        architecture: adapter of its family.
        plan: the plan that will be applied.

    Raises:
        UserError: the block cannot lose single channels or heads, or has another number of them than the plan says.
    """
    for part in PARTS:
        if all(plan.width(stage, index).kept(part) is None for stage in STAGES):
            continue
        cut, units = architecture.cuts.get(part), plan.model.sizes[part]
        layer = None if cut is None else dict(block.named_modules()).get(cut.columns)
        if not isinstance(layer, nn.Linear):
            raise UserError(
                f"The stage plan takes {part} from block {index}, and {type(architecture).__name__} blocks cannot lose "
                "them one by one: `cuts` of the Architecture names no layers for them. Drop whole blocks instead."
            )
        if units is None or layer.in_features % units or (part == "channels" and layer.in_features != units):
            raise UserError(
                f"The stage plan is for a model whose blocks have {units} {part}, and the last layer behind them has "
                f"{layer.in_features} inputs in `model`. Use the plan of this model."
            )


class _Zeroing:
    """Forward pre-hook of a last layer: sets lost inputs to zero, if the current pass has lost any of them."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        lost = _LOST.get().get(self.name)
        # Fill with zeros, do not multiply by zero: an infinite output of a lost channel would become NaN.
        return None if lost is None else (args[0].masked_fill(lost, 0.0), *args[1:])


@lru_cache(maxsize=1024)
def _lost(width: Width, part: Part, units: int, inputs: int, device: torch.device) -> Tensor:
    kept = width.kept(part)
    assert kept is not None
    with torch.inference_mode(False):  # training uses the same mask as validation, and cannot use inference tensors
        lost = torch.ones(units, dtype=torch.bool)
        lost[list(kept)] = False
        return lost.repeat_interleave(inputs // units).to(device)
