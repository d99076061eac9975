"""The number of weights of one block, and of each of its channels and query heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import nn
from transformers import PreTrainedConfig

from pdtrim_pl.models.architectures import Architecture
from pdtrim_pl.plan import Part


@dataclass(frozen=True)
class BlockSize:
    """The sizes that the costs of one block depend on."""

    parameters: int
    matrices: int
    """Weights in its linear layers: multiply-adds of one position."""
    kv_matrices: int
    """Weights that a KV-only block needs, as this package runs it: a fused projection is run whole."""
    window: int | None
    """Sliding window in tokens; None where it sees everything."""
    units: Mapping[Part, UnitSize]
    """The size of one of its channels and of one of its query heads."""

    @classmethod
    def of(cls, block: nn.Module, position: int, architecture: Architecture, config: PreTrainedConfig) -> BlockSize:
        """Count the weights of a block. It may be on the meta device.

        Args:
            block: the decoder block.
            position: its position in the model.
            architecture: adapter of its family.
            config: configuration of the model.
        """
        return cls(
            parameters=elements(block.parameters()),
            matrices=matrices_of(block),
            kv_matrices=sum(matrices_of(block.get_submodule(name)) for name in architecture.kv_modules),
            window=architecture.window(config, position),
            units=MappingProxyType(_units(block, architecture, config)),
        )

    def narrowed(self, widths: Mapping[Part, int]) -> BlockSize:
        """The size of the block with other numbers of channels and query heads."""
        gone = [(unit, unit.count - widths[part]) for part, unit in self.units.items() if part in widths]
        if not gone:
            return self
        parameters = self.parameters - sum(unit.parameters * count for unit, count in gone)
        return replace(self, parameters=parameters, matrices=self.matrices - sum(u.matrices * n for u, n in gone))


@dataclass(frozen=True)
class UnitSize:
    """The size of one channel or query head of a block."""

    count: int
    """Number of them in the whole block."""
    parameters: int
    matrices: int
    """Weights in linear layers."""


def _units(block: nn.Module, architecture: Architecture, config: PreTrainedConfig) -> dict[Part, UnitSize]:
    """The sizes of one channel and of one query head of a block."""
    units: dict[Part, UnitSize] = {}
    for part, cut in architecture.cuts.items():
        count: int = getattr(config, cut.setting)
        layers = [block.get_submodule(name) for name in cut.rows]
        columns = block.get_submodule(cut.columns).get_parameter("weight").numel() // count
        parameters = sum(elements(layer.parameters()) for layer in layers) // count + columns
        units[part] = UnitSize(count, parameters, sum(map(matrices_of, layers)) // count + columns)
    return units


def elements(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def matrices_of(module: nn.Module) -> int:
    return elements(parameter for parameter in module.parameters() if parameter.dim() == 2)
