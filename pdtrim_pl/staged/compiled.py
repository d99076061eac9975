"""Decoder blocks that `torch.compile` has compiled, one by one and in place: names of weights do not change.

Blocks of one kind share what was compiled. A compiled block may not see hooks that its layers get later. So a block
with hooks in its layers (those of a narrow block, or of a criterion that measures) runs as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pdtrim_pl import compat

BACKEND = "inductor"
RECOMPILE_LIMIT = 64
"""Variants of a block: of training and not, of stage, kind of mask and policy. Beyond it, a block runs as it is."""


def compile_block(block: nn.Module) -> None:
    """Compile a block when it runs first."""
    block.compile(backend=BACKEND, recompile_limit=RECOMPILE_LIMIT)


@contextmanager
def as_it_may(block: nn.Module) -> Iterator[None]:
    """Inside the `with` block, a compiled block runs as it is if its layers have hooks."""
    if compat.is_compiled(block) and any(compat.has_hooks(layer) for layer in block.modules()):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield
