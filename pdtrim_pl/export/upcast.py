"""Computes with 16-bit weights in fp32: only the order of additions then tells two models with equal weights apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pdtrim_pl.staged import StagedCausalLM


def compute_in_float32(staged: StagedCausalLM) -> StagedCausalLM:
    """Make a model compute in fp32 with the numbers that its weights have; the same model.

    Embeddings stay as they are: they only look up. Every other part is cast while it runs, so one block is in memory in
    fp32 at a time. No tensor that another model shares is changed.
    """
    gates = list(staged.gates.values())
    inside = {id(module) for gate in gates for module in gate.modules()}
    others = (m for m in staged.model.modules() if id(m) not in inside and not isinstance(m, nn.Embedding))
    for module in [*gates, *(m for m in others if next(m.parameters(recurse=False), None) is not None)]:
        _Upcast(module)
    return staged


class _Upcast:
    """Casts the weights and the input of one module while it runs."""

    def __init__(self, module: nn.Module) -> None:
        self.kept: list[tuple[nn.Parameter, Tensor]] = []
        module.register_forward_pre_hook(self._cast, with_kwargs=True)
        module.register_forward_hook(self._restore, always_call=True)

    def _cast(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        self.kept = [(parameter, parameter.data) for parameter in module.parameters() if _is_half(parameter)]
        for parameter, data in self.kept:
            parameter.data = data.float()
        return tuple(map(_wide, args)), {name: _wide(value) for name, value in kwargs.items()}

    def _restore(self, module: nn.Module, args: Any, out: Any) -> None:
        for parameter, data in self.kept:
            parameter.data = data
        self.kept = []


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _wide(value: Any) -> Any:
    return value.float() if _is_half(value) else value
