"""Copies of a decoder block: with weights of its own, or with one layer of its own.

Both share the configuration object with the model, so that a change of attention implementation reaches them.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


def copy_of(block: nn.Module) -> nn.Module:
    """A copy of a block with weights of its own, which take gradients."""
    return copy.deepcopy(block, _shared(_configs(block))).requires_grad_(True)


def with_layer(block: nn.Module, name: str, weight: Tensor) -> nn.Module:
    """A block that shares all weights with `block`, but for those of one linear layer.

    Args:
        block: the decoder block; it is not changed.
        name: name of the layer.
        weight: its weights in the new block, [outputs, inputs].
    """
    other = copy.deepcopy(block, _shared([*_configs(block), *block.parameters(), *block.buffers()]))
    layer = other.get_submodule(name)
    layer.weight = nn.Parameter(weight.to(layer.get_parameter("weight")), requires_grad=False)
    return other


def _configs(block: nn.Module) -> list[Any]:
    configs = [vars(module).get("config") for module in block.modules()]
    return [config for config in configs if config is not None]


def _shared(things: list[Any]) -> dict[int, Any]:
    return {id(thing): thing for thing in things}
