"""One training run in which channels leave, of `test_width_runs.py`, on any number of CPU processes.

    python tests/width_run.py STRATEGY PROCESSES MODEL FOLDER

Lightning starts the other processes by running this script again. Every run sees the same examples at every step.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from distributed_run import GLOBAL_BATCH, strategy_of, whole_and_continued
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from callbacks import BlockDrop, ExportPair, Repair, WidthDrop
from pdtrim_pl.checkpoints.state import PlanCheckpointIO
from pdtrim_pl.criteria import CosineRedundancy
from pdtrim_pl.data import Lengths, Parts, PromptResponseDataModule
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.plan import Structure
from pdtrim_pl.strategies import PDTrimDeepSpeedStrategy

torch.set_num_threads(1)
EPOCHS = 3


def fit(strategy: str, processes: int, model: Path, folder: Path, ckpt_path: Path | None = None) -> PDTrimModule:
    """Both stages lose channels in the second epoch, and prefill a block in the third.

    Where weights are not sharded, decode then loses more channels, and the block's keys and values are refitted.
    """
    seed_everything(0, verbose=False)
    make = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    chosen = strategy_of(strategy)
    whole, module = isinstance(chosen, str), PDTrimModule(str(model), optimizer=make, structure=Structure("free"))
    drops: list[Callback] = [WidthDrop("both", {1: 12}, repair=Repair(16, tied=True))]
    if whole:
        drops.append(WidthDrop("decode", {2: 8}, repair=Repair(16)))
    drops.append(BlockDrop("prefill", CosineRedundancy(), {2: 1}, refit_examples=16 if whole else 0))
    data = PromptResponseDataModule(
        str(model), lengths=Lengths(24, 8, 16), parts=Parts(validation=4, calibration=6, max_train=20),
        batch_size=GLOBAL_BATCH // processes, eval_batch_size=2,
    )  # fmt: skip
    io = [] if isinstance(chosen, PDTrimDeepSpeedStrategy) else [PlanCheckpointIO()]
    trainer = Trainer(
        default_root_dir=folder, max_epochs=EPOCHS, accelerator="cpu", devices=processes, strategy=chosen,
        callbacks=[
            *drops, ExportPair(folder / "export", "float32", measure=False),
            ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1),
        ],
        plugins=io, logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


def main(strategy: str, processes: int, model: Path, folder: Path) -> None:
    """Train, and continue from the end of the epoch in which channels left."""
    whole_and_continued(lambda part, ckpt_path: fit(strategy, processes, model, part, ckpt_path), folder)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
