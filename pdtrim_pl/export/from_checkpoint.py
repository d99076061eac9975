"""Export the pair of a training checkpoint, without data or trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from pdtrim_pl.checkpoint import CheckpointState, PlanCheckpointIO, check_weights
from pdtrim_pl.export.documents import write_documents
from pdtrim_pl.export.pair import check_target, export_pair
from pdtrim_pl.pretrained import load_causal_lm, load_tokenizer
from pdtrim_pl.settings import TORCH_DTYPES
from pdtrim_pl.sharded_checkpoint import read_sharded
from pdtrim_pl.staged import StagedCausalLM, adapter_at


def export_checkpoint(
    ckpt_path: Path, output: Path, *, dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    overwrite: bool = False,
) -> Path:  # fmt: skip
    """Load a checkpoint's student on the CPU and export it as `ExportPair` would, without the measured table.

    Raises:
        ValueError: the checkpoint is missing, damaged or of another format, or the target is taken.
    """
    if not ckpt_path.exists():
        raise ValueError(f"There is no checkpoint at `ckpt_path` {ckpt_path}.")
    check_target(output, overwrite)
    checkpoint = _read(ckpt_path)
    state = CheckpointState.of(checkpoint)
    name = state.plan.model.name_or_path
    adapter = adapter_at(state.plan.model.architecture) if state.plan.model.architecture else None
    model = load_causal_lm(name, dtype=torch.float32, architecture=adapter)
    student = StagedCausalLM(model, state.plan, state.policy, architecture=adapter)
    for stage, blocks in state.untied.items():
        for block in blocks:
            student.gates[block].untie(stage)
    saved = checkpoint["state_dict"]
    weights = {key.removeprefix("student."): v for key, v in saved.items() if key.startswith("student.")}
    check_weights(weights, student.state_dict())
    student.load_state_dict(weights)
    target_dtype: torch.dtype = TORCH_DTYPES[dtype]
    return export_pair(
        student, output, tokenizer=load_tokenizer(name), dtype=target_dtype, overwrite=overwrite,
        extras=lambda folder: write_documents(folder, student, state.record, None, target=output, dtype=target_dtype),
    )  # fmt: skip


def _read(ckpt_path: Path) -> dict[str, Any]:
    """A checkpoint file, or a directory of shards."""
    if ckpt_path.is_dir():
        return read_sharded(ckpt_path)
    return PlanCheckpointIO().load_checkpoint(ckpt_path, map_location=lambda storage, _: storage)
