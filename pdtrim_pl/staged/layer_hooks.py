"""Hooks in layers of a block that do what the current pass says, and nothing outside of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from torch import nn

T = TypeVar("T")


@contextmanager
def saying(
    current: ContextVar[Mapping[str, T]], values: Mapping[str, T], block: nn.Module, mark: str,
    register: Callable[[nn.Module, str], object],
) -> Iterator[None]:  # fmt: skip
    """Inside the `with` block, the hooks of this thread find `values` in `current`.

    A layer gets its hook when a value first names it, and keeps it.

    Args:
        current: what the hooks read.
        values: name of a layer in the block -> what its hook shall do.
        block: the decoder block.
        mark: name of an attribute that marks layers with the hook. A copy of a layer has both.
        register: registers the hook in a layer of that name.
    """
    for name in values:
        layer = block.get_submodule(name)
        if mark not in vars(layer):
            register(layer, name)
            setattr(layer, mark, True)
    token = current.set(values)
    try:
        yield
    finally:
        current.reset(token)
