"""`pdtrim export`: the pair of a training checkpoint, without data or trainer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig

from pdtrim_pl.checkpoints.sharded import read_sharded
from pdtrim_pl.checkpoints.state import CheckpointState, PlanCheckpointIO, check_weights
from pdtrim_pl.errors import UserError
from pdtrim_pl.export.documents import write_documents
from pdtrim_pl.export.merged import without_adapters
from pdtrim_pl.export.pair import check_target, export_pair
from pdtrim_pl.models.adapters import adapter_at
from pdtrim_pl.models.loading import TORCH_DTYPES
from pdtrim_pl.models.pretrained import load_causal_lm, load_config, load_tokenizer
from pdtrim_pl.plan import ExportWidths, Layout
from pdtrim_pl.staged import StagedCausalLM


def export_checkpoint(
    ckpt_path: Path, output: Path, *, dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    overwrite: bool = False, model: str | None = None, layout: Layout = "compact",
    widths: ExportWidths = "uniform",
) -> Path:  # fmt: skip
    """Load a checkpoint's student on the CPU and export it as `ExportPair` would, without the measured table.

    Args:
        ckpt_path: the checkpoint.
        output: the directory to create.
        dtype: element type of the exported weights and of the KV on the wire.
        overwrite: replace an earlier export there.
        model: name, path or Hub id of the original model; by default the one that the checkpoint names.
        layout: how the checkpoints hold the blocks, see `StagePlan.held`.
        widths: how wide the blocks of a checkpoint are, see `StagePlan.exported_widths`.

    Raises:
        UserError: the checkpoint is missing, damaged or of another format or model, or the target is taken.
    """
    if not ckpt_path.exists():
        raise UserError(f"There is no checkpoint at `ckpt_path` {ckpt_path}.")
    check_target(output, overwrite)
    checkpoint = _read(ckpt_path)
    state = CheckpointState.of(checkpoint)
    name = model or state.plan.model.name_or_path
    config = _config_of(name, asked=model is not None)
    adapter = adapter_at(state.plan.model.architecture) if state.plan.model.architecture else None
    moved = replace(
        state.plan.model, name_or_path=name, model_type=config.model_type, num_blocks=config.num_hidden_layers
    )
    base = load_causal_lm(name, dtype=torch.float32, architecture=adapter)
    state.check_model(moved)
    student = StagedCausalLM(base, replace(state.plan, model=moved), state.policy, architecture=adapter)
    for stage, blocks in state.untied.items():
        for block in blocks:
            student.gates[block].untie(stage)
    if state.lora is not None:
        student.train_only(state.lora)
    saved = checkpoint["state_dict"]
    weights = {key.removeprefix("student."): v for key, v in saved.items() if key.startswith("student.")}
    check_weights(weights, student.state_dict())
    student.load_state_dict(weights)
    target_dtype: torch.dtype = TORCH_DTYPES[dtype]
    return export_pair(
        without_adapters(student), output, tokenizer=load_tokenizer(name), dtype=target_dtype, overwrite=overwrite,
        layout=layout, widths=widths, extras=lambda folder: write_documents(folder, state.record, None, target=output),
    )  # fmt: skip


def _config_of(name: str, *, asked: bool) -> PreTrainedConfig:
    try:
        return load_config(name)
    except ValueError as error:
        if asked:
            raise
        raise UserError(
            f"The checkpoint is of model `{name}`, which cannot be loaded: where it has moved, say where to with "
            f"`--model`. {error}"
        ) from error


def _read(ckpt_path: Path) -> dict[str, Any]:
    """A checkpoint file, or a directory of shards."""
    if ckpt_path.is_dir():
        return read_sharded(ckpt_path)
    return PlanCheckpointIO().load_checkpoint(ckpt_path, map_location=lambda storage, _: storage)
