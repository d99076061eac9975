"""Whether a model's files hold the model that its `config.json` describes; told before a weight is read.

transformers only warns of weights that are missing, and puts random numbers in their place.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from pdtrim_pl.compat import has_model_file, model_file, tensors_of_file
from pdtrim_pl.errors import UserError
from pdtrim_pl.models.architectures import Architecture, check_model_type

LOADER_ERRORS = (
    OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, ImportError, EOFError,
    SafetensorError, StrictDataclassError, pickle.UnpicklingError,
)  # fmt: skip
"""What safetensors and transformers raise on damaged or foreign files: a wrong value in `config.json` surfaces as any
of these, and a format that needs a package that is not there as an ImportError."""
QUANTISED = ("quantization_config", "compression_config", "quantization")
"""Names under which a `config.json` says that its weights are packed; the last is that of MLX."""
PLAIN_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FILES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


def check_description(name: str, description: Mapping[str, Any], architecture: Architecture | None = None) -> None:
    """Refuse what cannot be trimmed from its `config.json` alone.

    Args:
        name: of the model, for the message.
        description: contents of its `config.json`.
        architecture: adapter of the model's family, where the package has none.

    Raises:
        UserError: no adapter for the family, or quantised weights.
    """
    if architecture is None and "model_type" in description:
        check_model_type(description["model_type"])
    for key in QUANTISED:
        if settings := description.get(key):
            method = settings.get("quant_method") if isinstance(settings, Mapping) else None
            raise UserError(
                f"Model `{name}` is quantised: its config.json has `{key}`"
                f"{f' (`quant_method` {method!r})' if method else ''}. Packed weights can be neither trained nor "
                "measured as they are; give the name of the unquantised model that it was made from."
            )


def stored_tensors(path: str) -> dict[str, Tensor]:
    """Names, shapes and element types of a checkpoint's weights, on the meta device; empty where no file is known.

    Args:
        path: a directory or a Hub id.
    """
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(path):
        tensors |= tensors_of_file(file)
    return tensors


def check_element_types(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse quantised weights that no `quantization_config` tells of.

    Raises:
        UserError: naming the first such weight.
    """
    for key, tensor in sorted(tensors.items()):
        if key.endswith("weight") and tensor.dtype not in PLAIN_TYPES:
            raise UserError(
                f"Model `{name}` is quantised, though its config.json has no `quantization_config`: {key} is stored as "
                f"{str(tensor.dtype).removeprefix('torch.')}. Give the name of the unquantised model that it was made "
                "from."
            )


def check_whole(name: str, told: Mapping[str, Collection[Any]]) -> None:
    """Refuse a model that was loaded in part.

    Args:
        name: of the model, for the message.
        told: transformers' loading info. Tied weights and buffers that may be absent are not in it.

    Raises:
        UserError: naming the first missing, unexpected and misshapen weights.
    """
    missing, unexpected = sorted(told["missing_keys"]), sorted(told["unexpected_keys"])
    faults = []
    if missing:
        faults.append(f"they lack {len(missing)} of its weights, first `{missing[0]}`")
    if unexpected:
        faults.append(f"they hold {len(unexpected)} that it has no place for, first `{unexpected[0]}`")
    if misshapen := sorted(told["mismatched_keys"]):
        key, stored, wanted = misshapen[0]
        faults.append(f"`{key}` is {list(stored)} there and {list(wanted)} in the model")
    if faults or told["error_msgs"]:
        raise UserError(
            f"The files of model `{name}` do not hold what its config.json describes: "
            f"{'; '.join([*faults, *told['error_msgs']])}. Random weights would take their place. Save the whole model "
            "again, under its own names, or correct its config.json."
        )


def rehearse(config: PreTrainedConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Collection[Any]]:
    """Load a model on the meta device, without a single value.

    The same on every rank, and under ZeRO-3 too, whose own loading tells neither names nor shapes that do not fit.

    Args:
        config: the model's.
        tensors: what its files hold.

    Returns:
        transformers' loading info, for `check_whole`.

    Raises:
        UserError: the configuration is not that of a causal language model.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"type {config.model_type!r} is no causal language model.")
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with _silent():
        loaded: Any = model_class.from_pretrained(
            None, config=config, state_dict=dict(tensors), device_map="meta", attn_implementation="eager",
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    told: Mapping[str, Collection[Any]] = loaded[1]
    return told


@contextmanager
def _silent() -> Iterator[None]:
    """No progress bar and no report for what is only a rehearsal."""
    shown, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()


def _weight_files(path: str) -> list[str]:
    """The files that transformers reads, in its order of preference; a Hub model's are downloaded as it would."""
    for whole, index in _FILES:
        if has_model_file(path, whole):
            return [model_file(path, whole)]
        if has_model_file(path, index):
            shards = set(json.loads(Path(model_file(path, index)).read_text(encoding="utf-8"))["weight_map"].values())
            return [model_file(path, shard) for shard in sorted(shards)]
    return []
