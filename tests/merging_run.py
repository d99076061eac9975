"""One training run with merges in it, of `test_merging_runs.py`, on any number of CPU processes.

    python tests/merging_run.py STRATEGY PROCESSES MODEL FOLDER

Each process runs this script. Every run sees the same examples at every step.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from distributed_run import data_of, whole_and_continued
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from merge_at import MergeAt, Merges
from torch.optim.lr_scheduler import LinearLR

from pdtrim_pl.checkpoints.state import PlanCheckpointIO
from pdtrim_pl.merging import Merging
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.plan import Structure

torch.set_num_threads(1)
EPOCHS = 3
OWN: Merges = {0: ("decode", (3, 4)), 1: ("prefill", (1, 2))}
"""Blocks get weights of their own: a later one in decode first, then an earlier one in prefill."""
SHARED: Merges = {1: ("both", (2, 3))}


def fit(
    strategy: str, processes: int, model: Path, folder: Path, kind: str, ckpt_path: Path | None = None, *,
    adam: bool = False,
) -> PDTrimModule:  # fmt: skip
    """Train from a free full plan; `kind` is `own` or `shared`."""
    seed_everything(0, verbose=False)
    make = partial(torch.optim.AdamW, lr=1e-3) if adam else partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    module = PDTrimModule(
        str(model), optimizer=make, lr_scheduler=partial(LinearLR, end_factor=0.5, total_iters=12),
        structure=Structure("free"),
    )  # fmt: skip
    settings = Merging(min_cosine=-1, steps=4, tied=kind == "shared")
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    merging = MergeAt(SHARED if kind == "shared" else OWN, settings)
    trainer = Trainer(
        default_root_dir=folder, max_epochs=EPOCHS, accelerator="cpu", devices=processes, strategy=strategy,
        callbacks=[merging, saver], plugins=[PlanCheckpointIO()], logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data_of(model, processes), ckpt_path=ckpt_path)
    return module


def main(strategy: str, processes: int, model: Path, folder: Path) -> None:
    """Train, and continue from the end of the epoch of the last merge."""
    whole_and_continued(lambda part, ckpt_path: fit(strategy, processes, model, part, "own", ckpt_path), folder)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
