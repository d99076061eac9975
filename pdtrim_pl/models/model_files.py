"""Check that a model's files hold every weight that its `config.json` describes, before any weight is read.

transformers only warns of missing weights and fills them with random numbers.
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
"""What safetensors and transformers raise on damaged or foreign files. A wrong value in `config.json` can cause any of
them. A format that needs a missing package causes an ImportError."""
QUANTISED = ("quantization_config", "compression_config", "quantization")
"""Keys of a `config.json` that say that the weights are quantised. MLX writes the last one."""
PLAIN_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FILES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


def check_description(name: str, description: Mapping[str, Any], architecture: Architecture | None = None) -> None:
    """Refuse a model that cannot be trimmed, as far as its `config.json` tells.

    Args:
        name: name of the model, for the message.
        description: contents of its `config.json`.
        architecture: adapter of the model's family, if the package has none.

    Raises:
        UserError: there is no adapter for the family, or the weights are quantised.
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


def stored_tensors(path: str, revision: str | None = None) -> dict[str, Tensor]:
    """Weights of a checkpoint by name, on the meta device: shapes and element types only.

    Empty if the checkpoint has no file of a known name.

    Args:
        path: a directory or a Hub id.
        revision: git revision of a Hub model; `main` by default.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(path, revision):
        tensors |= tensors_of_file(file)
    return tensors


def check_element_types(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse quantised weights that `config.json` does not declare.

    Args:
        name: name of the model, for the message.
        tensors: see `stored_tensors`.

    Raises:
        UserError: a weight is stored in an integer or 8-bit type. The message names the first one.
    """
    for key, tensor in sorted(tensors.items()):
        if key.endswith("weight") and tensor.dtype not in PLAIN_TYPES:
            raise UserError(
                f"Model `{name}` is quantised, though its config.json has no `quantization_config`: {key} is stored as "
                f"{str(tensor.dtype).removeprefix('torch.')}. Give the name of the unquantised model that it was made "
                "from."
            )


def check_whole(name: str, loading_info: Mapping[str, Collection[Any]]) -> None:
    """Refuse a model whose files do not hold exactly its weights.

    Args:
        name: name of the model, for the message.
        loading_info: what transformers returns with `output_loading_info`. It does not count tied weights and buffers
            that may be absent.

    Raises:
        UserError: weights are missing, unexpected or of another shape. The message names the first of each kind.
    """
    missing, unexpected = sorted(loading_info["missing_keys"]), sorted(loading_info["unexpected_keys"])
    faults = []
    if missing:
        faults.append(f"they lack {len(missing)} of its weights, first `{missing[0]}`")
    if unexpected:
        faults.append(f"they hold {len(unexpected)} that it has no place for, first `{unexpected[0]}`")
    if misshapen := sorted(loading_info["mismatched_keys"]):
        key, stored, wanted = misshapen[0]
        faults.append(f"`{key}` is {list(stored)} there and {list(wanted)} in the model")
    if faults or loading_info["error_msgs"]:
        raise UserError(
            f"The files of model `{name}` do not hold what its config.json describes: "
            f"{'; '.join([*faults, *loading_info['error_msgs']])}. Random weights would take their place. Save the "
            "whole model again, under its own names, or correct its config.json."
        )


def load_on_meta(config: PreTrainedConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Collection[Any]]:
    """Load a model on the meta device, without reading values, to learn which weights do not fit.

    The result is the same on every rank and under every strategy. Loading under ZeRO-3 itself does not report weights
    whose names or shapes do not fit.

    Args:
        config: configuration of the model.
        tensors: see `stored_tensors`.

    Returns:
        The loading info of transformers, for `check_whole`.

    Raises:
        UserError: the configuration is not that of a causal language model.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"type {config.model_type!r} is not a causal language model.")
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with _silent():
        loaded: Any = model_class.from_pretrained(
            None, config=config, state_dict=dict(tensors), device_map="meta", attn_implementation="eager",
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    loading_info: Mapping[str, Collection[Any]] = loaded[1]
    return loading_info


@contextmanager
def _silent() -> Iterator[None]:
    """Switch off the progress bar and the report of transformers: nothing is loaded in earnest."""
    shown, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()


def weight_files(path: str, revision: str | None = None) -> list[str]:
    """The weight files that transformers would read. Files of a Hub model are downloaded into its cache."""
    for whole, index in _FILES:
        if has_model_file(path, whole, revision):
            return [model_file(path, whole, revision)]
        if has_model_file(path, index, revision):
            listed = json.loads(Path(model_file(path, index, revision)).read_text(encoding="utf-8"))
            return [model_file(path, shard, revision) for shard in sorted(set(listed["weight_map"].values()))]
    return []
