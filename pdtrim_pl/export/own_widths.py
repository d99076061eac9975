"""A configuration in which each block has a width of its own, where the model's classes build such a model.

transformers has `PreTrainedConfig.per_layer_config` for it, which few of its model classes read yet.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from pdtrim_pl.errors import UserError
from pdtrim_pl.models.architectures import Architecture
from pdtrim_pl.models.cuts import Cuts
from pdtrim_pl.plan import Part

PER_LAYER = "per_layer_config"
"""Public setting of `PreTrainedConfig`: position of a block -> its settings that differ from those of the model."""


def with_own_widths(
    config: PreTrainedConfig, model_class: type[PreTrainedModel], architecture: Architecture,
    widths: Sequence[Mapping[Part, int]],
) -> PreTrainedConfig:  # fmt: skip
    """The configuration with other widths for some of its blocks; `config` itself if none differs from the model's.

    Args:
        config: configuration of the blocks, with the channels and heads of the widest.
        model_class: the class that will load the checkpoint. It builds the model once without memory, as a check.
        architecture: adapter of the model's family.
        widths: of each block in order; a part that is missing is as in `config`.

    Raises:
        UserError: the installed classes do not build blocks of these widths.
    """
    cuts, whole = architecture.cuts, config.to_dict()
    wanted = [{cuts[part].setting: wide for part, wide in block.items()} for block in widths]
    own = {
        str(position): {name: wide for name, wide in block.items() if wide != whole[name]}
        for position, block in enumerate(wanted)
    }
    if not any(own.values()):
        return config
    found = type(config).from_dict({**whole, PER_LAYER: {position: names for position, names in own.items() if names}})
    if why := _not_built(found, model_class, architecture, widths):
        raise UserError(
            f"`widths: per_block` cannot be exported: {model_class.__name__} of transformers "
            f"{transformers.__version__} {why}. Use `widths: uniform`, which fills narrower blocks up with zeros."
        )
    return found


def check_own_widths(config: PreTrainedConfig, model_class: type[PreTrainedModel], architecture: Architecture) -> None:
    """Refuse `widths: per_block` for a family whose classes do not build it. For a run that exports at its end.

    Raises:
        UserError: they do not, or the adapter of the family names no channels.
    """
    cut = architecture.cuts.get("channels")
    if cut is None:
        raise UserError(f"`widths: per_block` needs channels, and the adapter of {config.model_type} names none.")
    wide = config.to_dict()[cut.setting]
    widths: list[Mapping[Part, int]] = [
        {"channels": wide - (not position)} for position in range(config.num_hidden_layers)
    ]
    with_own_widths(config, model_class, architecture, widths)


def own_settings(config: PreTrainedConfig) -> dict[int, dict[str, Any]]:
    """The settings of single blocks, by position; empty if all blocks are alike."""
    return {int(position): settings for position, settings in config.to_dict().get(PER_LAYER, {}).items()}


def block_settings(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """All settings of each block, in order."""
    whole, own = config.to_dict(), own_settings(config)
    return [{**whole, **own.get(position, {})} for position in range(config.num_hidden_layers)]


def _not_built(
    config: PreTrainedConfig, model_class: type[PreTrainedModel], architecture: Architecture,
    widths: Sequence[Mapping[Part, int]],
) -> str:  # fmt: skip
    """Why the class does not build these widths; empty if it does."""
    if not hasattr(PreTrainedConfig, PER_LAYER):
        return f"knows no `{PER_LAYER}`"
    try:
        with torch.device("meta"), tempfile.TemporaryDirectory() as folder:
            blocks = architecture.blocks(model_class(config))
            config.save_pretrained(folder)  # which checks the settings
    except (RuntimeError, AttributeError, ValueError, TypeError):  # it reads a width from the whole model's settings
        return "builds all blocks alike"
    for position, wanted in enumerate(widths):
        for part, wide in wanted.items():
            if (found := _units(blocks[position], architecture.cuts, part, config)) != wide:
                return f"gives block {position} {found} {part} instead of {wide}"
    return ""


def _units(block: torch.nn.Module, cuts: Cuts, part: Part, config: PreTrainedConfig) -> int:
    inputs = block.get_submodule(cuts[part].columns).get_parameter("weight").shape[1]
    return inputs if part == "channels" else inputs // int(config.to_dict()["head_dim"])
