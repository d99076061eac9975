"""Kills tiny runs at scripted points and continues them; `tests/test_resume.py` compares what is left.

    python tests/resume_run.py MODEL FOLDER PROCESSES POINT...

Every run is forked from this process, which imports once and never trains itself. FOLDER/POINT is left with the run's
checkpoints and export, `result.json` (losses, validations, plan, policy) and `killed.json` (how its processes ended).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from typing_extensions import override

import pdtrim_pl.checkpoints.state
import pdtrim_pl.export.documents
import pdtrim_pl.export.pair
from callbacks import BlockDrop, ExportPair, KVRetention, LossGuard, PlanLogger
from pdtrim_pl.checkpoints.continuation import Continuation, latest_valid_checkpoint
from pdtrim_pl.checkpoints.state import PlanCheckpointIO
from pdtrim_pl.criteria import CosineRedundancy, GreedyKL
from pdtrim_pl.data import Lengths, Parts, PromptResponseDataModule, TextSource
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.plan import StagePlan
from pdtrim_pl.search import Guards
from pdtrim_pl.selectors import MassSelector

WAIT_SECONDS = 90
"""No run here takes a tenth of it: a process that is still there hangs."""


class KillInStep(Callback):
    """Kills between backward and the optimizer's step."""

    def __init__(self, step: int) -> None:
        self.step = step

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.global_step == self.step:
            kill()


class KillInValidation(Callback):
    """Kills after a checkpoint of an epoch's last step, before that of its end."""

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.global_step == 6:
            kill()


def kill() -> None:
    """What the kernel does to a process that is out of memory, and a scheduler to one that is out of time."""
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(owner: Any, name: str, number: int, act: Callable[..., None], *, after: bool = False) -> None:
    """Act before (or after) the `number`-th call of a function."""
    original, calls = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            act(*args)
        result = original(*args, **kwargs)
        if calls == number and after:
            act(*args)
        return result

    setattr(owner, name, counted)


def tear_and_kill(descriptor: int) -> None:
    """Half of the file has reached the disk."""
    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
    kill()


def arm(point: str) -> list[Callback]:
    """Set the trap of one point in this process; `nan` does not kill, it spoils one rank's loss."""
    match point:
        case "first_step":
            return [KillInStep(0)]
        case "step" | "torn":
            return [KillInStep(4)]
        case "last_step":
            return [KillInValidation()]
        case "drop":
            on_call(PDTrimModule, "apply_plan", 2, lambda *_: kill(), after=True)
        case "search":
            on_call(StagePlan, "drop", 6, lambda *_: kill())  # a candidate of the second round
        case "write":
            on_call(pdtrim_pl.checkpoints.state.os, "fsync", 3, tear_and_kill)
        case "rename":
            on_call(pdtrim_pl.checkpoints.state.os, "replace", 6, lambda *_: kill())
        case "nan":
            learn = PDTrimModule.training_step

            def spoil(module: PDTrimModule, *args: Any) -> torch.Tensor:
                loss = learn(module, *args)
                return loss * float("nan") if module.global_step == 4 else loss

            setattr(PDTrimModule, "training_step", spoil)  # noqa: B010
        case "export":
            on_call(pdtrim_pl.export.pair, "verify_pair", 1, lambda *_: kill())
        case "exported":
            on_call(pdtrim_pl.export.pair, "_put_in_place", 1, lambda *_: kill(), after=True)
        case _:
            raise ValueError(f"unknown point {point}")
    return []


def fit(model: Path, folder: Path, processes: int, rank: int, traps: list[Callback]) -> None:
    """One process of one run; it continues from the newest valid checkpoint."""
    seed_everything(rank, verbose=False)
    parts = Parts(validation=4, calibration=4, max_train=12 * processes)
    data = PromptResponseDataModule(
        str(model), TextSource(str(model / "text.txt")), parts=parts, batch_size=4,
        lengths=Lengths(max_length=24, min_prompt=8, max_prompt=16),
    )  # fmt: skip
    module = PDTrimModule(
        str(model), optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    )  # fmt: skip
    checkpoints = folder / "checkpoints"
    callbacks: list[Callback] = [
        BlockDrop("decode", GreedyKL(), {0: 1, 1: 1}, Guards(0, 1)),
        BlockDrop("prefill", CosineRedundancy(), {2: 1}, Guards(0, 1)),
        KVRetention(MassSelector(threshold=0.0, first=2, last=0.25)),
        PlanLogger(),
        LossGuard(skip=1),
        ExportPair(folder / "export", "float32", measure=False),
        ModelCheckpoint(checkpoints, filename="{step}", save_top_k=-1, every_n_train_steps=2),
        ModelCheckpoint(checkpoints, filename="{epoch}", save_top_k=-1, save_last=True),
        *traps,
    ]
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True) if processes > 1 else "auto"
    trainer = Trainer(
        default_root_dir=folder, callbacks=callbacks, plugins=[PlanCheckpointIO()], max_epochs=3, accelerator="cpu",
        devices=processes, strategy=strategy, logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, gradient_clip_val=1.0,
    )  # fmt: skip
    newest = latest_valid_checkpoint(checkpoints, run=Continuation(str(model), processes))
    trainer.fit(module, datamodule=data, ckpt_path=newest)
    if rank == 0:
        result = {
            "losses": module.record.losses, "validations": module.record.validations, "plan": module.plan.to_json(),
            "policy": module.policy.to_json(module.plan) if module.policy else None,
        }  # fmt: skip
        (folder / "result.json").write_text(json.dumps(result))


def work(model: Path, folder: Path, processes: int, rank: int, port: int, point: str | None) -> None:
    """The body of a forked process."""
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if processes > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"WORLD_SIZE": str(processes), "GLOO_SOCKET_IFNAME": "lo"}
    fit(model, folder, processes, rank, arm(point) if point is not None else [])


def run(model: Path, folder: Path, processes: int, point: str | None = None, victim: int = 0) -> list[int | None]:
    """Exit codes by rank, None for a process that hung; only the victim walks into the trap."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = [
        context.Process(target=work, args=(model, folder, processes, rank, port, point if rank == victim else None))
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(WAIT_SECONDS)
    codes = [worker.exitcode for worker in workers]
    for worker in workers:
        worker.kill()
    return codes


def main(model: Path, root: Path, processes: int, points: list[str]) -> None:
    """One uninterrupted run in ROOT/whole, and for every point a killed and continued one."""
    torch.set_num_threads(1)
    pdtrim_pl.export.documents.write_report = lambda *_, **__: None  # pictures take longer than the whole run
    for name in ("whole", *points):
        folder = root / name
        folder.mkdir(parents=True)
        ended: list[int | None] = []
        if name != "whole":
            # Rank 0 alone writes; elsewhere the other one dies.
            alone = ("write", "rename", "export", "exported", "first_step")
            victim = 0 if name in alone else processes - 1
            ended = run(model, folder, processes, name, victim)
            if name == "torn":
                newest = latest_valid_checkpoint(folder / "checkpoints")
                assert newest is not None
                os.truncate(newest, newest.stat().st_size // 2)
        continued = run(model, folder, processes) if name != "nan" else []
        (folder / "killed.json").write_text(json.dumps({"killed": ended, "continued": continued}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
