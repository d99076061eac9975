"""Runs of `test_deepspeed.py` in which one of two processes runs out of room, on the real DeepSpeed engine.

    python tests/full_disk_run.py MODEL FOLDER

Each process runs this script. FOLDER/told-RANK.json says how every run went.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed_run import Run, engine, fit
from distributed_run import strategy_of
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from pdtrim_pl.checkpoints.continuation import Continuation, latest_valid_checkpoint
from pdtrim_pl.module import PDTrimModule

FULL = {"zero2 rank 0": (2, 0), "zero2 rank 1": (2, 1), "zero3 rank 0": (3, 0), "zero3 rank 1": (3, 1)}
"""ZeRO stage, and the process that runs out of room in the second epoch."""


class NoRoom(Callback):
    """From the second epoch on no file of one process may grow past 20 kB."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (trainer.current_epoch, trainer.global_rank) == (1, self.rank):
            limit_files(20_000)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        limit_files(resource.RLIM_INFINITY)


class FoundAnother(Callback):
    """Every process has found another checkpoint."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, PDTrimModule)
        pl_module.found_checkpoint = f"step={trainer.global_rank}.ckpt"


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def full(stage: int, rank: int, model: Path, folder: Path) -> dict[str, Any]:
    """How a run ends that cannot write, what is left, and how many steps follow when there is room again."""
    error = ""
    try:
        fit(model, engine(Run(stage)), 2, saver(folder), NoRoom(rank))
    except OSError as raised:
        error = str(raised)
    left = sorted(entry.name for entry in folder.iterdir())
    found = latest_valid_checkpoint(folder, run=Continuation(str(model), 2, stage))
    torch.distributed.barrier()  # both have looked
    _, watch = fit(model, engine(Run(stage)), 2, saver(folder), ckpt_path=found)
    return {"error": error, "left": left, "steps": len(watch.weights)}


def saver(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)


def differing(model: Path) -> str:
    try:
        fit(model, engine(Run()), 2, FoundAnother())
    except ValueError as raised:
        return str(raised)
    return ""


def main(model: Path, folder: Path) -> None:
    strategy_of("zero2")  # sets DeepSpeed up
    every: dict[str, Any] = {name: full(*case, model, folder / name) for name, case in FULL.items()}
    every["differing"] = differing(model)
    rank = torch.distributed.get_rank()
    (folder / f"told-{rank}.json").write_text(json.dumps(every), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
