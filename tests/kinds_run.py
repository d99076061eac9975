"""Short training runs of `test_kinds.py`, one for every kind of weights that may train under a strategy.

    python tests/kinds_run.py STRATEGY PROCESSES MODEL FOLDER

Each process runs this script. Every run sees the same examples at every step.
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

from pdtrim_pl.losses import KL, CrossEntropy
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.plan import Structure
from pdtrim_pl.staged.lora import LoRA

torch.set_num_threads(1)
KINDS: dict[str, Any] = {
    "all": "all", "merged": "merged", "norms": "norms", "lora": LoRA(4), "lora, one a stage": LoRA(4, tied=False),
}  # fmt: skip


def fit(name: str, processes: int, model: Path, folder: Path, kind: str) -> PDTrimModule:
    """Train a student under `model/plan.json`, in which a block stands for two, for one epoch."""
    seed_everything(0, verbose=False)
    module = PDTrimModule(
        str(model), losses=[KL(), CrossEntropy(0.5)], optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        structure=Structure(plan=model / "plan.json"), trainable=KINDS[kind],
    )  # fmt: skip
    trainer = Trainer(
        default_root_dir=folder, max_epochs=1, accelerator="cpu", devices=processes, strategy=strategy_of(name),
        enable_checkpointing=False, logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, gradient_clip_val=0.5,
    )  # fmt: skip
    trainer.fit(module, datamodule=data_of(model, processes))
    return module


def main(name: str, processes: int, model: Path, folder: Path, *kinds: str) -> None:
    for kind in kinds:
        module = fit(name, processes, model, folder, kind)
        if module.global_rank == 0:
            (folder / f"{kind}.json").write_text(json.dumps(module.record.losses), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), *sys.argv[5:])
