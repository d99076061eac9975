"""Starts to train a model that its files hold in part, on two CPU processes, for `test_model_files.py`.

    python tests/partial_run.py MODEL FOLDER STRATEGY

Each process runs this script. FOLDER/told-STRATEGY-RANK.json has each one's refusal.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from distributed_run import strategy_of
from lightning.pytorch import Trainer
from short_text import SHORT

from pdtrim_pl.data import Lengths, Parts, PromptResponseDataModule
from pdtrim_pl.module import PDTrimModule

torch.set_num_threads(1)


def main(model: Path, folder: Path, strategy: str) -> None:
    trainer = Trainer(
        max_steps=1, accelerator="cpu", devices=2, strategy=strategy_of(strategy), logger=False,
        enable_progress_bar=False, enable_checkpointing=False, num_sanity_val_steps=0, default_root_dir=folder,
    )  # fmt: skip
    data = PromptResponseDataModule(
        str(model),
        SHORT,
        lengths=Lengths(16, 8, 8),
        parts=Parts(validation=4, calibration=4, max_train=4),
        batch_size=1,
    )
    try:
        trainer.fit(PDTrimModule(str(model)), datamodule=data)
    except ValueError as error:
        (folder / f"told-{strategy}-{trainer.global_rank}.json").write_text(json.dumps(str(error)), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
