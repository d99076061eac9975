"""Training runs of `test_placed_runs.py` on any number of CPU processes: with an offline teacher, and with adapters.

    python tests/placed_run.py STRATEGY PROCESSES MODEL FOLDER

Each process runs this script. Every run sees the same examples at every step. MODEL holds a plan and a cache.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from distributed_run import data_of, strategy_of
from lightning.pytorch import Trainer, seed_everything

from pdtrim_pl.checkpoints.state import PlanCheckpointIO
from pdtrim_pl.losses import KL, CrossEntropy
from pdtrim_pl.models.placement import TeacherPlace
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.plan import Structure
from pdtrim_pl.staged.lora import LoRA

KEPT = 16
"""Tokens of every distribution in the cache."""
ADAPTERS = LoRA(4, 8.0, tied=False)


def module_of(model: Path, **settings: Any) -> PDTrimModule:
    # Unlike Adam's, the steps of SGD scale with the gradients, so that a wrong factor shows.
    return PDTrimModule(
        str(model), losses=[KL(), CrossEntropy(0.1)], optimizer=partial(torch.optim.SGD, lr=0.3, momentum=0.9),
        structure=Structure(plan=model / "plan.json"), chunk_tokens=5, **settings,
    )  # fmt: skip


def runs(name: str, model: Path) -> dict[str, PDTrimModule]:
    """The runs of a strategy; adapters train only where weights are whole."""
    found = {"offline": module_of(model, teacher=TeacherPlace("offline", model / "cache"))}
    if not name.startswith(("zero", "fsdp")):
        found["adapters"] = module_of(model, teacher=TeacherPlace("shared"), trainable=ADAPTERS)
    return found


def fit(name: str, processes: int, model: Path, module: PDTrimModule, folder: Path) -> PDTrimModule:
    """Train for two epochs."""
    seed_everything(0, verbose=False)
    plugins = [] if name.startswith("zero") else [PlanCheckpointIO()]
    trainer = Trainer(
        default_root_dir=folder, max_epochs=2, accelerator="cpu", devices=processes, strategy=strategy_of(name),
        plugins=plugins, accumulate_grad_batches=2, logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data_of(model, processes))
    return module


def main(name: str, processes: int, model: Path, folder: Path) -> None:
    for part, module in runs(name, model).items():
        fit(name, processes, model, module, folder / part)
        if module.global_rank == 0:
            (folder / f"{part}.json").write_text(json.dumps(module.record.to_json()), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
