"""The extra file of a prefill checkpoint: key and value projections of blocks that prefill does not run.

Stock classes do not know these blocks, so the file names them by original index.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from pdtrim_pl.errors import UserError
from pdtrim_pl.export.checkpoints import cast, per_block_settings, projections, resized_config
from pdtrim_pl.export.files import KV_ONLY_FILE, blaming, read_tensors
from pdtrim_pl.export.own_widths import PER_LAYER, own_settings
from pdtrim_pl.models.architectures import Architecture
from pdtrim_pl.plan import PLAN_FILE, StagePlan
from pdtrim_pl.staged import StagedCausalLM

KV_ONLY_FORMAT = "pdtrim.kv_only/1"


def kv_only_tensors(staged: StagedCausalLM, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Tensors of the KV-only blocks that prefill needs, named `blocks.<original index>.<name in the block>`."""
    found: dict[str, Tensor] = {}
    for index in staged.plan.kv_only:
        block = staged.gates[index].weights("prefill", staged.plan)
        for name, tensor in projections(block, staged.architecture).items():
            found[f"blocks.{index}.{name}"] = tensor
    return cast(found, dtype)


def write_kv_only(staged: StagedCausalLM, directory: Path, dtype: torch.dtype) -> None:
    """Write `kv_only.safetensors` into the prefill checkpoint's `directory`, if the plan has KV-only blocks."""
    if not staged.plan.kv_only:
        return
    settings = per_block_settings(staged.model.config)
    blocks = {
        index: {name: values[staged.originals.index(index)] for name, values in settings.items()}
        for index in staged.plan.kv_only
    }
    tensors = {name: x.contiguous() for name, x in kv_only_tensors(staged, dtype).items()}
    save_file(tensors, directory / KV_ONLY_FILE, metadata={"format": KV_ONLY_FORMAT, "blocks": json.dumps(blocks)})


def insert_kv_only(model: PreTrainedModel, plan: StagePlan, path: Path, architecture: Architecture) -> None:
    """Insert the KV-only blocks among the model's blocks. They hold their key and value projections alone.

    Args:
        model: the loaded prefill checkpoint; it and its config are changed in place.
        plan: the export's plan.
        path: the export's `kv_only.safetensors`.
        architecture: adapter of the model's family.

    Raises:
        UserError: the file is missing, damaged, or does not fit this plan and model.
    """
    tensors, metadata = read_tensors(path)
    with blaming(path):
        config = _config_with_kv_only(model.config, plan, metadata)
        parts = _split_by_block(tensors, plan)
        with torch.device("meta"):
            skeleton = type(model)(config)
    blocks = architecture.blocks(model)
    for position, index in enumerate(sorted({*plan.prefill, *plan.kv_only})):
        if index in plan.kv_only:
            block = architecture.blocks(skeleton)[position]
            with blaming(path):
                _keep_only(block, index, parts[index], architecture, model.dtype)
            blocks.insert(position, block.eval())
    _add_missing_rope(model, skeleton, config)
    # The model's own modules hold this config object, so it is changed in place.
    model.config.num_hidden_layers = config.num_hidden_layers
    if own := own_settings(model.config):
        held = sorted({*plan.prefill, *plan.kv_only})
        moved = {held.index(plan.prefill[position]): settings for position, settings in own.items()}
        setattr(model.config, PER_LAYER, moved)
    for name, values in per_block_settings(config).items():
        setattr(model.config, name, values)


def _config_with_kv_only(config: PreTrainedConfig, plan: StagePlan, metadata: Mapping[str, str]) -> PreTrainedConfig:
    """The config of the prefill checkpoint with the KV-only blocks among its own."""
    if metadata.get("format") != KV_ONLY_FORMAT:
        raise UserError(f"its `format` is {metadata.get('format')!r}, and this version reads {KV_ONLY_FORMAT!r}.")
    own = json.loads(metadata.get("blocks", "{}"))
    if sorted(map(int, own)) != list(plan.kv_only):
        raise UserError(f"it holds blocks {sorted(map(int, own))}, and {PLAN_FILE} has KV-only blocks {plan.kv_only}.")
    settings: dict[str, list[Any]] = {}
    for name, values in per_block_settings(config).items():
        by_block = dict(zip(plan.prefill, values, strict=True))
        by_block.update({index: own[str(index)][name] for index in plan.kv_only})
        settings[name] = [by_block[index] for index in sorted(by_block)]
    config = resized_config(config, len(plan.prefill) + len(plan.kv_only), settings)
    if own_settings(config):
        setattr(config, PER_LAYER, None)  # only projections of keys and values are taken from this model
    return config


def _split_by_block(tensors: Mapping[str, Tensor], plan: StagePlan) -> dict[int, dict[str, Tensor]]:
    parts: dict[int, dict[str, Tensor]] = {index: {} for index in plan.kv_only}
    for key, tensor in tensors.items():
        _, index, name = key.split(".", 2)
        parts[int(index)][name] = tensor
    return parts


def _keep_only(
    block: nn.Module, index: int, tensors: Mapping[str, Tensor], architecture: Architecture, dtype: torch.dtype
) -> None:
    """Load `tensors` into a block on the meta device, and remove its other parameters and buffers."""
    needed = {name: x.shape for name, x in projections(block, architecture).items()}
    found = {name: x.shape for name, x in tensors.items()}
    if found != needed:
        raise UserError(f"block {index} has tensors {found}, and the model needs {needed}. Export again.")
    for name, old in [*block.named_parameters(), *block.named_buffers()]:
        owner, _, leaf = name.rpartition(".")
        module, new = block.get_submodule(owner), tensors.get(name)
        if new is not None and new.is_floating_point():
            new = new.to(dtype)
        if isinstance(old, nn.Parameter):
            module.register_parameter(leaf, None if new is None else nn.Parameter(new))
        else:
            module.register_buffer(leaf, new)


def _add_missing_rope(model: PreTrainedModel, skeleton: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Rebuild the RoPE module if it lacks the table of a KV-only block. Gemma 3 has one table per kind of layer."""
    for name, module in model.base_model.named_children():
        wanted = skeleton.base_model.get_submodule(name)
        tables = dict(module.named_buffers(recurse=False)).keys()
        if tables != dict(wanted.named_buffers(recurse=False)).keys():
            setattr(model.base_model, name, type(wanted)(config))
