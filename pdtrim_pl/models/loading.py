"""How the models of a run are loaded: settings of the module, element types by name, and a warning of slow bf16."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from types import MappingProxyType
from typing import Literal

import torch

from pdtrim_pl.errors import UserError
from pdtrim_pl.models.names import with_revision

log = logging.getLogger(__name__)

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
)
SLOW_BF16 = (
    "This CPU has no AVX-512: it computes bf16 up to 60 times slower than float32. Where time matters, use float32 "
    "(`dtype`, `loading.teacher_dtype`) and `precision: 32-true`."
)
_WITHOUT_AVX512 = ("AVX2", "NO AVX")
DType = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["sdpa", "eager", "flex_attention", "flash_attention_2"]


@dataclass(frozen=True)
class Loading:
    """How the two models are loaded."""

    dtype: DType = "float32"
    """Element type of the student's weights. Train in float32; only DeepSpeed trains others, with fp32 copies."""
    teacher: str | None = None
    """Name or path of the teacher; the model itself by default."""
    teacher_dtype: DType = "auto"
    """Element type of the teacher's weights; `auto` is the checkpoint's own."""
    teacher_bits: Literal[8] | None = None
    """8: the linear layers of the teacher's blocks are in 8 bits, which takes half of the memory of bf16. It needs
    bitsandbytes and a GPU, and goes with one device and DDP. Everything else of the teacher is in `teacher_dtype`."""
    attn_implementation: Attention = "sdpa"
    """`sdpa` fits most runs. `flex_attention`, and `flash_attention_2` (in 16 bits, by the package flash-attn), are for
    GPUs. They build no mask of tokens times entries for padded rows either."""
    gradient_checkpointing: bool = False
    """Keep only the inputs and outputs of blocks for backward, and recompute the rest."""
    compile: bool = False
    """Compile the blocks of both models with `torch.compile`. The first batches then take minutes. Does not go with
    sharded weights (ZeRO-3, FSDP) or with adapters."""
    liger: bool = False
    """Run the norms and MLPs of both models by Liger's kernels (package liger-kernel, on a GPU), which keep less for
    backward."""
    freeze_embeddings: bool = False
    """Do not train the student's token embeddings and head. This saves memory and time, and few training tokens can do
    them more harm than good."""
    revision: str | None = None
    """Git revision of a Hub model: a branch, a tag or a commit; `main` by default. A teacher that is the model itself
    has it too. The name `org/model@revision` says the same."""
    teacher_revision: str | None = None
    """The same for another teacher from the Hub."""

    def __post_init__(self) -> None:
        if self.compile and self.attn_implementation not in ("sdpa", "eager"):
            raise UserError(
                f"`loading.compile` was not tried with `attn_implementation: {self.attn_implementation}`, which brings "
                "kernels of its own. Use `sdpa`, or leave `compile` out."
            )
        if self.compile and self.liger:
            raise UserError("`loading.compile` and `loading.liger` both replace what blocks run: give one of them.")

    def pinned(self, model: str) -> tuple[str, Loading]:
        """Name of the model with its revision, and these settings with that of the teacher.

        Raises:
            UserError: a revision is given for a model that is not from the Hub, or for no teacher.
        """
        name = with_revision(model, self.revision, "loading.revision")
        if self.teacher is None or (self.teacher == model and self.teacher_revision is None):
            if self.teacher_revision is not None:
                raise UserError(
                    "`loading.teacher_revision` is given without `loading.teacher`. The teacher is the model itself: "
                    "set `loading.revision`."
                )
            return name, replace(self, teacher=None, revision=None)
        teacher = with_revision(self.teacher, self.teacher_revision, "loading.teacher_revision")
        return name, replace(self, teacher=teacher, revision=None, teacher_revision=None)


def check_attention(attention: Attention, device: str, *, sixteen_bits: bool) -> None:
    """Refuse an attention implementation that cannot run where it is to run.

    Args:
        attention: the implementation.
        device: type of the device, such as `cuda`.
        sixteen_bits: whether attention is computed in bf16 or fp16.

    Raises:
        UserError: it cannot run. The message gives the reason and an alternative.
    """
    why = None
    if attention == "flex_attention" and device != "cuda":
        why = f"FlexAttention trains on GPUs, and this device is {device}"
    elif attention == "flash_attention_2" and device != "cuda":
        why = f"FlashAttention runs on GPUs of NVIDIA and AMD, and this device is {device}"
    elif attention == "flash_attention_2" and find_spec("flash_attn") is None:
        why = "the package flash-attn is not installed"
    elif attention == "flash_attention_2" and not sixteen_bits:
        why = "FlashAttention computes in 16 bits only, and `precision: bf16-mixed` is not set"
    if why is not None:
        raise UserError(f"`loading.attn_implementation: {attention}` cannot run here: {why}. Use `sdpa`.")


def dtype_of(name: DType) -> torch.dtype | None:
    """The torch type of that name; None for `auto`."""
    return None if name == "auto" else TORCH_DTYPES[name]


def warn_of_slow_bf16(device: torch.device | str, *computed_in: torch.dtype | str) -> None:
    """Warn, once a process, if an x86 CPU without AVX-512 is to compute in bf16.

    Args:
        device: the device that computes.
        computed_in: element types of the weights (torch types or their names) and precisions of the trainer.
    """
    in_bf16 = any("bf16" in str(each) or "bfloat16" in str(each) for each in computed_in)
    if in_bf16 and torch.device(device).type == "cpu" and torch.backends.cpu.get_cpu_capability() in _WITHOUT_AVX512:
        _warn_once(SLOW_BF16)


@lru_cache
def _warn_once(line: str) -> None:
    log.warning(line)
