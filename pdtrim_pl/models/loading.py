"""How the models of a run are loaded: settings of the module, element types by name, and a warning of slow ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

import torch

log = logging.getLogger(__name__)

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
)
SLOW_BF16 = (
    "This CPU has no AVX-512: it computes bf16 up to 60 times slower than float32. Where time matters, use float32 "
    "(`dtype`, `loading.teacher_dtype`) and `precision: 32-true`."
)
_BEFORE_AVX512 = ("AVX2", "NO AVX")
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


def warn_of_slow_bf16(device: torch.device | str, *computed_in: torch.dtype | str) -> None:
    """Warn, once a process, of computing in bf16 on an x86 CPU without AVX-512.

    Args:
        device: what computes.
        computed_in: element types of the weights, by name or not, and precisions of the trainer.
    """
    in_bf16 = any("bf16" in str(each) or "bfloat16" in str(each) for each in computed_in)
    if in_bf16 and torch.device(device).type == "cpu" and torch.backends.cpu.get_cpu_capability() in _BEFORE_AVX512:
        _warn_once(SLOW_BF16)


@lru_cache
def _warn_once(line: str) -> None:
    log.warning(line)
