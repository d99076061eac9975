"""How the models of a run are loaded: settings of the module, and element types by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
)
DType = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Loading:
    """How the two models are loaded."""

    dtype: DType = "float32"
    """Element type of the student's weights. They train in float32; DeepSpeed alone keeps fp32 copies of others."""
    teacher: str | None = None
    """Name or path of the teacher; the model itself by default."""
    teacher_dtype: DType = "auto"
    """Element type of the teacher's weights; `auto` is the checkpoint's own."""
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    gradient_checkpointing: bool = False
    """Keep only block inputs and outputs for backward, and run blocks again."""
    freeze_embeddings: bool = False
    """Keep the student's token embeddings and head as they are: less memory and time, and on few tokens less harm."""


def dtype_of(name: DType) -> torch.dtype | None:
    """The element type of that name; None leaves it to the checkpoint."""
    return None if name == "auto" else TORCH_DTYPES[name]
