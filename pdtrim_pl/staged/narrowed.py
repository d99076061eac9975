"""The gate inside a block: what a stage has lost of its channels and heads reaches no last layer.

The block stays whole, so that optimizers, shards and checkpoints do. What is lost is set to zero where the MLP's and
the attention's last layers read it; an export leaves it out.

Shapes: I inputs of a last layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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

Lost = Mapping[str, Tensor]
"""Last layer of a block -> which of its inputs are lost, bool [I]."""

_NOTHING: Lost = MappingProxyType({})
_LOST: ContextVar[Lost] = ContextVar("lost", default=_NOTHING)
_MARK = "lost_inputs_are_zero"
"""Attribute of a layer that has the hook. It is copied with the layer, as hooks are."""


def lost_inputs(block: nn.Module, cuts: Cuts, sizes: Mapping[Part, int | None], width: Width | None) -> Lost:
    """What a block loses by a width.

    Args:
        block: the decoder block.
        cuts: of its family.
        sizes: channels and heads of the whole block.
        width: what it keeps; None keeps everything.
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


@contextmanager
def narrowed(block: nn.Module, lost: Lost) -> Iterator[None]:
    """Inside, by this thread, the block runs without what is lost."""
    for name in lost:
        layer = block.get_submodule(name)
        if _MARK not in vars(layer):
            layer.register_forward_pre_hook(_Zeroing(name))
            setattr(layer, _MARK, True)
    token = _LOST.set(lost)
    try:
        yield
    finally:
        _LOST.reset(token)


def check_widths(block: nn.Module, index: int, architecture: Architecture, plan: StagePlan) -> None:
    """Refuse a plan that takes channels or heads from a block that cannot lose them, or has another number of them.

    Args:
        block: the decoder block.
        index: its original index.
        architecture: of its family.
        plan: what is to be applied.

    Raises:
        UserError: with the reason.
    """
    for part in PARTS:
        if all(plan.width(stage, index).kept(part) is None for stage in STAGES):
            continue
        cut, units = architecture.cuts.get(part), plan.model.sizes[part]
        layer = None if cut is None else dict(block.named_modules()).get(cut.columns)
        if not isinstance(layer, nn.Linear):
            raise UserError(
                f"The stage plan takes {part} from block {index}, and {type(architecture).__name__} blocks cannot lose "
                "them one by one: `cuts` of the Architecture names no such layers. Drop whole blocks instead."
            )
        if units is None or layer.in_features % units or (part == "channels" and layer.in_features != units):
            raise UserError(
                f"The stage plan is for a model whose blocks have {units} {part}, and the last layer behind them has "
                f"{layer.in_features} inputs in `model`. Use the plan of this model."
            )


class _Zeroing:
    """Forward pre-hook of a last layer."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        lost = _LOST.get().get(self.name)
        # Not a product: a lost channel that overflows would leave its mark.
        return None if lost is None else (args[0].masked_fill(lost, 0.0), *args[1:])


@lru_cache(maxsize=1024)
def _lost(width: Width, part: Part, units: int, inputs: int, device: torch.device) -> Tensor:
    kept = width.kept(part)
    assert kept is not None
    with torch.inference_mode(False):  # a mask that validation makes must serve training too
        lost = torch.ones(units, dtype=torch.bool)
        lost[list(kept)] = False
        return lost.repeat_interleave(inputs // units).to(device)
