"""One stage of a student as an ordinary Hugging Face checkpoint: stock classes, stock names, renumbered blocks."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pdtrim_pl.export.own_widths import with_own_widths
from pdtrim_pl.export.sliced import emptied, narrowed_config, sliced
from pdtrim_pl.models.architectures import Architecture
from pdtrim_pl.plan import Stage, StagePlan
from pdtrim_pl.staged import StagedCausalLM

PER_BLOCK_SETTINGS = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Settings of a config with one entry per block, by name: other lists may have this length by chance."""

CONFIG_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")
CODE_SETTINGS = frozenset({"auto_map", "custom_pipelines"})
"""Settings in these files that name Python files of the model's folder."""


def per_block_settings(config: PreTrainedConfig) -> dict[str, list[Any]]:
    """The settings of `config` with one entry per block."""
    settings = config.to_dict()
    return {name: list(settings[name]) for name in PER_BLOCK_SETTINGS if settings.get(name) is not None}


def resized_config(config: PreTrainedConfig, blocks: int, settings: Mapping[str, Sequence[Any]]) -> PreTrainedConfig:
    """A copy of `config` for another number of blocks, with the per-block `settings` of those blocks."""
    assert all(len(values) == blocks for values in settings.values())
    resized = copy.deepcopy(config)
    resized.num_hidden_layers = blocks
    for name, values in settings.items():
        setattr(resized, name, list(values))
    return resized


def stage_config(config: PreTrainedConfig, positions: Sequence[int]) -> PreTrainedConfig:
    """A copy of `config` that describes only the blocks at `positions`, in that order."""
    sliced = {name: [values[i] for i in positions] for name, values in per_block_settings(config).items()}
    return resized_config(config, len(positions), sliced)


def exported_config(staged: StagedCausalLM, plan: StagePlan, stage: Stage) -> PreTrainedConfig:
    """The configuration of one stage: its blocks, and how many channels and heads they have in the export.

    Raises:
        UserError: a number of heads that the model's configuration class refuses, or blocks of different widths that
            its model class does not build.
    """
    config = stage_config(staged.model.config, [staged.originals.index(index) for index in plan.held(stage)])
    config = narrowed_config(config, staged.architecture.cuts, plan.widest(stage), staged.kv_shape.head_dim)
    widths = plan.exported_widths(stage)
    return with_own_widths(
        config, type(staged.model), staged.architecture, [widths[block] for block in plan.held(stage)]
    )


def stage_tensors(
    staged: StagedCausalLM, stage: Stage, dtype: torch.dtype | None = None, plan: StagePlan | None = None
) -> dict[str, Tensor]:
    """The tensors of one stage under their stock names, blocks renumbered from 0 and cut to the widths of the plan.

    In the `padded` layout, a block that the stage does not run is all zeros. Of KV-only blocks prefill keeps what
    projects keys and values.

    Args:
        staged: the student.
        stage: which stage; a block that is untied there gives that stage's weights.
        dtype: element type of the floating tensors; None keeps each as it is.
        plan: another plan than the student's own.
    """
    plan, cuts = plan or staged.plan, staged.architecture.cuts
    blocks = []
    for index in plan.held(stage):
        block = staged.gates[index].weights(stage, plan)
        if index in plan.blocks(stage):
            blocks.append(sliced(block.state_dict(), cuts, plan, stage, index))
        else:
            kept = projections(block, staged.architecture) if stage == "prefill" and index in plan.kv_only else {}
            blocks.append({**emptied(block.state_dict(), cuts, plan, stage), **kept})
    return stock_tensors(staged, staged.model.state_dict(), blocks, dtype)


def projections(block: nn.Module, architecture: Architecture) -> dict[str, Tensor]:
    """The tensors of a block that project keys and values, by their names in the block."""
    return {
        f"{module}.{name}": tensor
        for module in architecture.kv_modules
        for name, tensor in block.get_submodule(module).state_dict().items()
    }


def stock_tensors(
    staged: StagedCausalLM, tensors: Mapping[str, Tensor], blocks: Sequence[Mapping[str, Tensor]],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Tensors of the student's model under their stock names, with those of `blocks` in its block list, without gates.

    Args:
        staged: the student.
        tensors: of its whole model, by the model's names; those inside the block list do not count.
        blocks: tensors of the blocks, by their names in a block.
        dtype: element type of the floating tensors; None keeps each as it is.
    """
    block_list = staged.architecture.blocks(staged.model)
    prefix = next(name for name, module in staged.model.named_modules() if module is block_list) + "."
    outer = {name: x for name, x in tensors.items() if not name.startswith(prefix)}
    inner = {f"{prefix}{i}.{name}": x for i, block in enumerate(blocks) for name, x in block.items()}
    return cast({**outer, **inner}, dtype)


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The same tensors in host memory, the floating ones as `dtype`; None changes no type.

    They are cast in host memory, one by one: the GPU still holds the optimizer and has no room for copies.
    """
    return {name: x.detach().cpu().to(dtype if x.is_floating_point() else None) for name, x in tensors.items()}


def assembled(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, tensors: Mapping[str, Tensor]
) -> PreTrainedModel:
    """A model of the stock class over `tensors`, without copying them. Non-persistent buffers stay on meta."""
    with torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    return model.eval()


def write_checkpoint(
    staged: StagedCausalLM, stage: Stage, directory: Path, *, tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None, plan: StagePlan | None = None,
) -> None:  # fmt: skip
    """Write one stage of the student as a checkpoint that `AutoModelForCausalLM.from_pretrained` loads.

    Args:
        staged: the student; it is not changed.
        stage: which stage.
        directory: where to write; it is created if it is missing.
        tokenizer: saved beside the weights.
        dtype: element type of the floating tensors; None means the model's own.
        plan: another plan than the student's own.
    """
    dtype, plan = dtype or staged.model.dtype, plan or staged.plan
    config = exported_config(staged, plan, stage)
    model = assembled(type(staged.model), config, stage_tensors(staged, stage, dtype, plan))
    if staged.model.generation_config is not None:
        model.generation_config = _savable(staged.model.generation_config)
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    _name_no_code(directory)


def _name_no_code(directory: Path) -> None:
    """Remove the settings that name Python files of the original model: these checkpoints use stock classes."""
    for file in filter(Path.is_file, (directory / name for name in CONFIG_FILES)):
        settings = json.loads(file.read_text(encoding="utf-8"))
        if settings.keys() & CODE_SETTINGS:
            kept = {name: value for name, value in settings.items() if name not in CODE_SETTINGS}
            file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _savable(config: GenerationConfig) -> GenerationConfig:
    """A copy that transformers agrees to save: it refuses sampling settings without `do_sample`, as in Llama 2."""
    config = copy.deepcopy(config)
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = None
    return config
