"""Short runs of `test_deepspeed.py` on the real DeepSpeed engine, two CPU processes, one run after the other.

    python tests/deepspeed_run.py MODEL FOLDER

Each process runs this script. FOLDER/told-RANK.json says how every run went.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from distributed_run import CPUDeepSpeed, Named, strategy_of
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from short_text import SHORT
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from typing_extensions import override

from callbacks import BlockDrop, Preemption
from callbacks.preemption import Preempted
from pdtrim_pl.checkpoints.continuation import Continuation, latest_valid_checkpoint
from pdtrim_pl.checkpoints.sharded import unfinished
from pdtrim_pl.criteria import ScoringContext, Taylor
from pdtrim_pl.data import Lengths, Parts, PromptResponseDataModule
from pdtrim_pl.losses import KL, CrossEntropy
from pdtrim_pl.models.loading import Loading
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.plan import StagePlan, Target
from pdtrim_pl.search import Guards
from pdtrim_pl.staged import StagedCausalLM

torch.set_num_threads(1)
DROPPED, FROZEN = 2, 1
GLOBAL_BATCH = 4


@dataclass(frozen=True)
class Run:
    """One run of three epochs of two steps; a block leaves both stages when the second epoch starts."""

    stage: int = 2
    precision: Any = "32-true"
    offload: tuple[str, ...] = ()
    without: tuple[type[Any], str] | None = None
    """A cure to leave out: the class and its method."""
    recompute: bool = False
    """Gradient checkpointing, as in `configs/llama3_70b.yaml`."""
    frozen: bool = False
    """A block that runs takes no gradient (transformers#47254)."""

    @property
    def settings(self) -> dict[str, Any]:
        """What is no matter of the engine."""
        return {"precision": self.precision, "recompute": self.recompute, "frozen": self.frozen}


OFFLOADED = ("offload_optimizer", "offload_parameters")
WHOLE: dict[str, Run] = {
    "zero2": Run(),
    "zero2 bf16": Run(precision="bf16-true"),
    "zero2 offloaded": Run(offload=OFFLOADED[:1]),
    "zero2 offloaded, gradients kept": Run(offload=OFFLOADED[:1], without=(CPUDeepSpeed, "forget_gradients")),
    "zero3": Run(3),
    "zero3 bf16": Run(3, precision="bf16-true"),
    "zero3 not frozen": Run(3, without=(StagedCausalLM, "freeze_unused")),
    "zero3 offloaded": Run(3, offload=OFFLOADED),
    "zero3 recomputed": Run(3, recompute=True),
    "zero3 recomputed frozen": Run(3, recompute=True, frozen=True),
}
INTERRUPTED = ("zero2", "zero3 offloaded")
"""Of these, a second run is asked to leave, and continued."""


class Watch(Callback):
    """After every step: this process's part of the dropped block, and the norm of all gradients."""

    def __init__(self, freezes: bool = False) -> None:
        self.freezes = freezes
        self.frozen: list[Tensor] = []
        """The frozen block's weights at the start of every epoch and behind the last."""
        self.taylor: list[float] = []
        self.weights: list[Tensor] = []
        self.norms: list[float] = []
        self.offloaded: list[str] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy, CPUDeepSpeed):
            # What the engine itself says; ZeRO-2 has another name for the first.
            names = ("cpu_offload", "offload_optimizer", "offload_param")
            self.offloaded = [name for name in names if vars(trainer.strategy.deepspeed_engine.optimizer).get(name)]

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, PDTrimModule)
        self.weights.append(own_part(pl_module.student.gates[DROPPED].block))
        if isinstance(trainer.strategy, CPUDeepSpeed):
            self.norms.append(float(trainer.strategy.deepspeed_engine.get_global_grad_norm() or 0.0))

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PDTrimModule)
        if self.freezes:  # again after a drop, which lets everything train that is used
            block = pl_module.student.gates[FROZEN].block.requires_grad_(False)
            self.frozen.append(own_part(block))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PDTrimModule)
        if self.freezes:
            self.frozen.append(own_part(pl_module.student.gates[FROZEN].block))

    def moves(self) -> list[float]:
        """Largest change of a weight from step to step."""
        return [float((after - before).abs().max()) for before, after in pairwise(self.weights)]


class Probed(Named):
    """Drops the block it was given, and tells what Taylor says of it and another one."""

    def __init__(self, watch: Watch) -> None:
        super().__init__(DROPPED)
        self.watch = watch

    @override
    def score(
        self, context: ScoringContext, plan: StagePlan, target: Target, candidates: Sequence[int]
    ) -> dict[int, float]:
        self.watch.taylor = list(Taylor().score(context, plan, target, (FROZEN, DROPPED)).values())
        return super().score(context, plan, target, candidates)


class Notify(Callback):
    """Sends the second process, and no other, a signal in the middle of the first step after the drop."""

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx, trainer.global_rank) == (1, 0, 1):
            os.kill(os.getpid(), signal.SIGUSR1)


def own_part(module: nn.Module) -> Tensor:
    """All weights, or this process's shards of them, in one vector."""
    parts = [vars(parameter).get("ds_tensor", parameter) for parameter in module.parameters()]
    return torch.cat([part.detach().float().flatten().clone() for part in parts])


def fit(
    model: Path, strategy: Strategy | str, processes: int, *extra: Callback, precision: Any = "32-true",
    ckpt_path: Path | None = None, recompute: bool = False, frozen: bool = False,
) -> tuple[PDTrimModule, Watch]:  # fmt: skip
    """One run to its end."""
    seed_everything(0, verbose=False)
    # Without momentum or decay, a block that gets no gradient does not move.
    module = PDTrimModule(
        str(model), losses=[KL(), CrossEntropy(1.0)], optimizer=partial(torch.optim.SGD, lr=0.3), chunk_tokens=16,
        loading=Loading(gradient_checkpointing=recompute),
    )  # fmt: skip
    watch = Watch(freezes=frozen)
    drop = BlockDrop("both", Probed(watch) if recompute else Named(DROPPED), {1: 1}, Guards(1, 1))
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", devices=processes, strategy=strategy, callbacks=[drop, watch, *extra],
        precision=precision, gradient_clip_val=0.5, logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=model,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in extra),
    )  # fmt: skip
    data = PromptResponseDataModule(
        str(model), SHORT, Lengths(24, 8, 16), parts=Parts(validation=4, calibration=4, max_train=8),
        batch_size=GLOBAL_BATCH // processes,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module, watch


def engine(run: Run) -> CPUDeepSpeed:
    return CPUDeepSpeed(run.stage, process_group_backend="gloo", **dict.fromkeys(run.offload, True))


def told(module: PDTrimModule, watch: Watch, model: Path) -> dict[str, Any]:
    tables = dict(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).named_buffers())
    kinds = {"student": module.student, "teacher": module.teacher}
    return {
        "losses": module.record.losses, "validations": module.record.validations, "moves": watch.moves(),
        "norms": watch.norms, "offloaded": watch.offloaded, "taylor": watch.taylor,
        "frozen stays": len(watch.frozen) == 4 and all(torch.equal(*pair) for pair in pairwise(watch.frozen)),
        "types": {name: sorted({str(x.dtype) for x in kind.parameters()}) for name, kind in kinds.items()},
        "tables are exact": {
            name: [torch.equal(buffer, tables[key]) for key, buffer in kind.model.named_buffers()]
            for name, kind in kinds.items()
        },
        "weights": hashlib.sha256(own_part(module.student).numpy().tobytes()).hexdigest(),
    }  # fmt: skip


def uncured(run: Run, go: Callable[[], Any]) -> Any:
    """Call it with a method of some class made to do nothing."""
    if run.without is None:
        return go()
    owner, name = run.without
    kept = getattr(owner, name)
    setattr(owner, name, lambda *_: None)
    try:
        return go()
    finally:
        setattr(owner, name, kept)


def interrupted(run: Run, model: Path, folder: Path) -> dict[str, Any]:
    """Leaves when it is asked to; its checkpoint, which a kill has kept from its name, is found and continued."""

    def callbacks() -> list[Callback]:
        return [ModelCheckpoint(folder, save_top_k=0, save_last=True), Preemption()]

    try:
        fit(model, engine(run), 2, Notify(), *callbacks())
    except Preempted as left:
        status = left.code
    path = folder / "last.ckpt"
    if torch.distributed.get_rank() == 0:
        path.rename(unfinished(path))
    torch.distributed.barrier()
    found = latest_valid_checkpoint(folder, run=Continuation(str(model), 2, run.stage))
    torch.distributed.barrier()
    module, watch = fit(model, engine(run), 2, *callbacks(), ckpt_path=found)
    left_there = sorted(entry.name for entry in folder.iterdir())
    return {
        **told(module, watch, model), "status": status, "found": None if found is None else found.name,
        "left": left_there,
    }  # fmt: skip


def main(model: Path, folder: Path) -> None:
    strategy_of("zero2")  # sets DeepSpeed up
    every: dict[str, Any] = {}
    for name, run in WHOLE.items():
        module, watch = uncured(run, partial(fit, model, engine(run), 2, **run.settings))
        every[name] = told(module, watch, model)
    for name in INTERRUPTED:
        run = WHOLE[name]
        every[f"{name} interrupted"] = interrupted(run, model, folder / name)
    (folder / f"told-{module.global_rank}.json").write_text(json.dumps(every), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
