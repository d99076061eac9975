"""Low-rank adapters beside the linear layers of blocks (LoRA, arXiv 2106.09685). The blocks themselves do not change.

Adapters belong to a gate, not to its block. So names and shapes of a block's weights stay what they are for exports,
merges and narrow blocks, and copies of a block share its adapters. A hook adds what an adapter gives to what its layer
gives.

Shapes: T tokens of any number of dimensions, I inputs and O outputs of a layer, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import STAGES, Stage
from pdtrim_pl.staged.layer_hooks import saying

_MARK = "adds_an_adapter"
"""Name of an attribute that marks layers with the hook. A copy of a layer has both."""


@dataclass(frozen=True)
class LoRA:
    """Settings of the adapters.

    Raises:
        UserError: a setting is out of range.
    """

    rank: int = 16
    """Number of columns and rows of the two matrices of an adapter."""
    alpha: float = 32.0
    """What an adapter adds is multiplied by alpha / rank."""
    tied: bool = True
    """One adapter a layer for both stages. If false, each stage has its own, and decode is exported with weights of its
    own."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise UserError(
                f"`trainable` has `rank: {self.rank}` and `alpha: {self.alpha}`: give a rank of at least 1 and a "
                "positive alpha."
            )


class LowRank(nn.Module):
    """An adapter of one linear layer. It adds nothing until it is trained. It is in fp32, whatever the layer is."""

    def __init__(self, layer: nn.Linear, settings: LoRA) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": layer.weight.device, "dtype": torch.float32}
        self.down = nn.Parameter(torch.empty(settings.rank, layer.in_features, **place))
        self.up = nn.Parameter(torch.zeros(layer.out_features, settings.rank, **place))
        self.scale = settings.alpha / settings.rank
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, inputs: Tensor, out: Tensor) -> Tensor:
        """The layer's output with the adapter's: inputs [T, I] and output [T, O] -> [T, O], in the type of `out`."""
        if not torch.is_autocast_enabled(inputs.device.type):
            inputs = inputs.to(self.down.dtype)
        low = F.linear(inputs, self.down)
        if low.dtype != out.dtype:
            return out + (F.linear(low, self.up) * self.scale).to(out.dtype)
        # One operation: the tensors in between would be as large as the output.
        rows = torch.addmm(out.flatten(0, -2), low.flatten(0, -2), self.up.t(), alpha=self.scale)
        return rows.view(out.shape)

    def merged(self, weight: Tensor) -> Tensor:
        """The layer's weight with the adapter in it, [O, I], in the element type of `weight`."""
        return (weight.float() + self.scale * (self.up @ self.down)).to(weight.dtype)


class BlockAdapters(nn.Module):
    """The adapters of one block, for one stage or for both."""

    def __init__(self, block: nn.Module, settings: LoRA) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {
                name.replace(".", ":"): LowRank(layer, settings)
                for name, layer in block.named_modules()
                if isinstance(layer, nn.Linear)
            }
        )

    def by_name(self) -> dict[str, LowRank]:
        """Name of a layer in the block -> its adapter."""
        return {name.replace(":", "."): layer for name, layer in self.layers.items() if isinstance(layer, LowRank)}


Adapters = Mapping[str, LowRank]
_NONE: Adapters = MappingProxyType({})
_ADAPTERS: ContextVar[Adapters] = ContextVar("adapters", default=_NONE)
_BARE: ContextVar[bool] = ContextVar("bare", default=False)


def new_adapters(block: nn.Module, settings: LoRA) -> dict[str, BlockAdapters]:
    """Adapters of a block, by stage; under `both` if the stages share them."""
    return {stage: BlockAdapters(block, settings) for stage in (("both",) if settings.tied else STAGES)}


def adapters_of(adapters: nn.ModuleDict, stage: Stage) -> Adapters:
    """The adapters that a stage uses: name of a layer -> adapter.

    Args:
        adapters: those of a gate, by stage.
        stage: which stage.
    """
    if not len(adapters) or _BARE.get():
        return _NONE
    chosen = adapters["both" if "both" in adapters else stage]
    assert isinstance(chosen, BlockAdapters)
    return chosen.by_name()


def adapted(block: nn.Module, adapters: Adapters) -> AbstractContextManager[None]:
    """Inside the `with` block, this thread runs the block with these adapters, and with no others."""
    return saying(_ADAPTERS, adapters, block, _MARK, lambda layer, name: layer.register_forward_hook(_Adding(name)))


@contextmanager
def without_adapters() -> Iterator[None]:
    """Inside the `with` block, passes of this thread run without adapters."""
    token = _BARE.set(True)
    try:
        yield
    finally:
        _BARE.reset(token)


class _Adding:
    """Forward hook of a linear layer: adds the output of its adapter, if the current block has one for it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        adapter = _ADAPTERS.get().get(self.name)
        added: Tensor | None = None if adapter is None else adapter(args[0], out)
        return added
