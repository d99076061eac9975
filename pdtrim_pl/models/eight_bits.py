"""Load a model with its linear layers in 8 bits, by bitsandbytes (LLM.int8(), arXiv 2208.07339), on a GPU."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from pdtrim_pl.errors import UserError


def check_eight_bits(device: torch.device) -> None:
    """Refuse 8 bits where they cannot be computed.

    Args:
        device: where the model is to compute.

    Raises:
        UserError: it is no GPU, or bitsandbytes is missing.
    """
    if device.type != "cuda":
        raise UserError(
            f"`loading.teacher_bits: 8` needs a GPU, and the teacher is to compute on {device}. Leave it out, and set "
            "`loading.teacher_dtype: bfloat16`."
        )
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "`loading.teacher_bits: 8` needs bitsandbytes, which is not installed: `pip install 'pdtrim_pl[int8]'`, or "
            "leave it out, and set `loading.teacher_dtype: bfloat16`."
        )


def in_eight_bits(device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` that load the linear layers of blocks in 8 bits onto a GPU.

    Embeddings, norms and head keep their element type.

    Raises:
        UserError: see `check_eight_bits`.
    """
    check_eight_bits(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": index}}
