"""One training run with rates by block, of `test_layer_rates.py`, on any number of CPU processes.

    python tests/rates_run.py STRATEGY PROCESSES MODEL FOLDER

Each process runs this script. Every run sees the same examples at every step.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from distributed_run import Named, data_of, strategy_of, whole_and_continued
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import LinearLR

from callbacks import BlockDrop
from pdtrim_pl.checkpoints.state import PlanCheckpointIO
from pdtrim_pl.losses import KL, CrossEntropy
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.search import Guards
from pdtrim_pl.strategies import PDTrimDeepSpeedStrategy
from pdtrim_pl.strategies.layer_rates import LayerRates

torch.set_num_threads(1)
RATES = LayerRates(decay=0.3, floor=0.05)


def fit(
    name: str, processes: int, model: Path, folder: Path, ckpt_path: Path | None = None, *,
    rates: LayerRates | None = RATES,
) -> PDTrimModule:  # fmt: skip
    """Train; a block of four leaves both stages when the second epoch starts."""
    seed_everything(0, verbose=False)
    module = PDTrimModule(
        str(model), losses=[KL(), CrossEntropy(0.5)], optimizer=partial(torch.optim.SGD, lr=0.3, momentum=0.9),
        lr_scheduler=partial(LinearLR, end_factor=0.5, total_iters=12), layer_rates=rates,
    )  # fmt: skip
    strategy = strategy_of(name)
    trainer = Trainer(
        default_root_dir=folder, max_epochs=3, accelerator="cpu", devices=processes, strategy=strategy,
        callbacks=[
            BlockDrop("both", Named(3), {1: 1}, Guards(1, 0)),
            ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1),
        ],
        plugins=[] if isinstance(strategy, PDTrimDeepSpeedStrategy) else [PlanCheckpointIO()], logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, gradient_clip_val=0.5,
    )  # fmt: skip
    trainer.fit(module, datamodule=data_of(model, processes), ckpt_path=ckpt_path)
    return module


def main(name: str, processes: int, model: Path, folder: Path) -> None:
    whole_and_continued(lambda part, ckpt_path: fit(name, processes, model, part, ckpt_path), folder)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
