"""Loads student and teacher under ZeRO-3 on two CPU processes, for `test_deepspeed.py`, and says what a process held.

    python tests/loading_run.py MODEL FOLDER

Lightning starts the second process by running this script again. FOLDER/told-RANK.json says how it went.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from distributed_run import held, strategy_of
from lightning.pytorch import Callback, LightningModule, Trainer
from short_text import SHORT
from torch import nn
from typing_extensions import override

from pdtrim_pl.data import Lengths, Parts, PromptResponseDataModule
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.staged import pair as pair_file

torch.set_num_threads(1)


class Peak:
    """The most memory of its own, files that are mapped not counted, that the process has while a model is loaded."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        before = most = own_memory()
        done = threading.Event()

        def watch() -> None:
            nonlocal most
            while not done.wait(0.002):
                most = max(most, own_memory())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            return LOAD(*args, **kwargs)
        finally:
            done.set()
            watcher.join()
            self.bytes.append(max(most, own_memory()) - before)


def own_memory() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Held(Callback):
    """Between two steps, what this process holds of every model."""

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, PDTrimModule)
        self.shares = {"student": held(pl_module.student), "teacher": held(pl_module.teacher)}


LOAD = pair_file.load_causal_lm


def main(model: Path, folder: Path) -> None:
    LOAD(str(model))  # so that no import of a library counts
    peak, shares = Peak(), Held()
    pair_file.load_causal_lm = peak  # type: ignore[assignment]
    trainer = Trainer(
        max_steps=1, accelerator="cpu", devices=2, strategy=strategy_of("zero3"), callbacks=[shares], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
        limit_val_batches=0, default_root_dir=folder,
    )  # fmt: skip
    data = PromptResponseDataModule(
        str(model),
        SHORT,
        lengths=Lengths(16, 8, 8),
        parts=Parts(validation=4, calibration=4, max_train=4),
        batch_size=1,
    )
    trainer.fit(PDTrimModule(str(model)), datamodule=data)
    told = {"peaks": peak.bytes, "held": shares.shares}
    (folder / f"told-{trainer.global_rank}.json").write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
