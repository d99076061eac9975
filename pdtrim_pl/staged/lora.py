"""Low-rank adapters beside the linear layers of blocks (LoRA, arXiv 2106.09685), by peft.

peft makes the adapters, computes and merges them. It would also put each into its layer, where one is active for all
passes. Here two stages may run one block with different adapters. So adapters belong to a gate, and a hook adds what
an adapter gives to what its layer gives. Names and shapes of a block's weights stay what they are for exports, merges
and narrow blocks, and copies of a block share its adapters.

Shapes: T tokens of any number of dimensions, I inputs and O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import STAGES, Stage
from pdtrim_pl.staged.layer_hooks import saying

if TYPE_CHECKING:
    from peft.tuners.lora import Linear as Adapter

_MARK = "adds_an_adapter"
"""Name of an attribute that marks layers with the hook. A copy of a layer has both."""
_NAME = "adapter"
"""What peft calls the only adapter of each of its layers."""


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
    dropout: float = 0.0
    """Share of a layer's inputs that its adapter does not see in a training step."""
    rank_stabilized: bool = False
    """Multiply by alpha / sqrt(rank) instead (arXiv 2312.03732)."""
    targets: tuple[str, ...] = ()
    """Names of linear layers that get adapters, in full or from their last dot on: `q_proj`, `mlp.up_proj`. Empty: all
    linear layers of the blocks."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1 or not self.alpha > 0:
            raise UserError(
                f"`trainable` has `rank: {self.rank}` and `alpha: {self.alpha}`: give a rank of at least 1 and a "
                "positive alpha."
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"`trainable` has `dropout: {self.dropout}`: give a share of at least 0 and below 1.")

    def layers_in(self, block: nn.Module) -> dict[str, nn.Linear]:
        """Name -> linear layer of a block that gets an adapter.

        Raises:
            UserError: a name of `targets` names no linear layer of the block.
        """
        layers = {name: layer for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}
        found = {name: layer for name, layer in layers.items() if any(_named(name, t) for t in self.targets)}
        unknown = [target for target in self.targets if not any(_named(name, target) for name in layers)]
        if unknown:
            raise UserError(
                f"`trainable` has `targets: {unknown}`, and no linear layer of a block is called that. There are "
                f"{', '.join(layers)}."
            )
        return found if self.targets else layers


def _named(layer: str, target: str) -> bool:
    return layer == target or layer.endswith(f".{target}")


class _Given(nn.Linear):
    """What peft sees of a layer: its shape and its place. The layer has run already, so the output is given."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.device = layer.weight.device
        self.register_parameter("bias", None)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # no parameter: the block has it
        """Zeros [O, I] in fp32, without memory: adapters are made in their type and on their device."""
        return torch.zeros(1, device=self.device).expand(self.out_features, self.in_features)

    def forward(self, inputs: Tensor, out: Tensor) -> Tensor:  # type: ignore[override]  # peft passes on what it gets
        """What the layer gave for its inputs."""
        return out


class BlockAdapters(nn.Module):
    """The adapters of one block, for one stage or for both. They add nothing until they are trained.

    They are in fp32, whatever the block is.

    Raises:
        UserError: the settings name layers that are not there.
    """

    def __init__(self, block: nn.Module, settings: LoRA) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        super().__init__()
        device = next(block.parameters()).device
        self.layers = nn.ModuleDict(
            {name.replace(".", ":"): _Given(layer) for name, layer in settings.layers_in(block).items()}
        )
        self.layers.hf_device_map = {"": device}  # type: ignore[assignment]  # peft asks, and there are no parameters
        config = LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout,  # type: ignore[arg-type]
            use_rslora=settings.rank_stabilized, target_modules=list(self.layers),
        )  # fmt: skip
        inject_adapter_in_model(config, self.layers, adapter_name=_NAME)
        self.layers.to(device)  # peft leaves adapters of a block on `meta` on the CPU

    def by_name(self) -> Adapters:
        """Name of a layer in the block -> its adapter: inputs [T, I] and the layer's output [T, O] -> [T, O]."""
        found: dict[str, Any] = {name.replace(":", "."): layer for name, layer in self.layers.items()}
        return found


def merged(adapter: Adapter, weight: Tensor) -> Tensor:
    """A layer's weight with its adapter in it, [O, I], in the element type of `weight`."""
    return (weight.float() + adapter.get_delta_weight(_NAME)).to(weight.dtype)


Adapters = Mapping[str, "Adapter"]
"""Name of a layer in a block -> its adapter."""
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
