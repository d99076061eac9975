"""Heads under ZeRO-3, gathered once for all chunks of a batch.

DeepSpeed gathers the weights of a module by hooks around its call, and cuts them up again after it. So all chunks are
computed inside one call of the head. In the meantime its layer is called without hooks.

Shapes: N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from pdtrim_pl.staged import StagedCausalLM

T = TypeVar("T")


def gather_heads_once(staged: StagedCausalLM) -> None:
    """Replace the functions of a model that use its head for a whole batch."""
    staged.gathered_logits = partial(_gathered_logits, staged)  # type: ignore[method-assign]
    staged.at_head = partial(_at_head, staged)  # type: ignore[method-assign,assignment]
    staged.whole_head = partial(_whole_head, staged)


class _Bare:
    """A model whose head is called without hooks. Everything else is the model's."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_output_embeddings(self) -> Callable[[Tensor], Tensor]:
        head = _head_of(self._model)
        return partial(type(head).forward, head)


def _gathered_logits(staged: StagedCausalLM, hidden: Tensor) -> Tensor:
    model = cast("PreTrainedModel", _Bare(staged.model))
    return staged.architecture.logits(model, hidden)[..., : staged.compared_tokens]


def _at_head(staged: StagedCausalLM, hidden: Tensor, work: Callable[[Tensor], tuple[Tensor, T]]) -> tuple[Tensor, T]:
    """Call the head with `work` in the place of its forward pass."""
    head, rest = _head_of(staged.model), list[T]()

    def forward(hidden: Tensor) -> Tensor:
        first, second = work(hidden)
        rest.append(second)  # has no gradients: hooks that wait for one would wait forever
        return first

    head.forward = forward
    try:
        return head(hidden), rest[0]
    finally:
        del head.forward


def _whole_head(staged: StagedCausalLM) -> AbstractContextManager[Any]:
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(list(_head_of(staged.model).parameters()))
    return gathered


def _head_of(model: PreTrainedModel) -> nn.Module:
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    return head
