"""One training run of `test_strategies.py` on any number of CPU processes, then the same run continued from its middle.

    python tests/distributed_run.py STRATEGY PROCESSES MODEL FOLDER

Each process runs this script. Every run sees the same examples at every step.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from merge_at import MergeAt
from short_text import SHORT
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LinearLR
from typing_extensions import override

from callbacks import BlockDrop, ExportPair, KVRetention
from pdtrim_pl.checkpoints.state import PlanCheckpointIO
from pdtrim_pl.criteria import Criterion, GreedyKL, ScoringContext
from pdtrim_pl.data import Lengths, Parts, PromptResponseDataModule
from pdtrim_pl.export.from_checkpoint import export_checkpoint
from pdtrim_pl.losses import KL, CrossEntropy
from pdtrim_pl.merging import Merging
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.plan import StagePlan, Structure, Target
from pdtrim_pl.search import Guards
from pdtrim_pl.selectors import MassSelector
from pdtrim_pl.strategies import PDTrimDeepSpeedStrategy, PDTrimFSDPStrategy

torch.set_num_threads(1)
GLOBAL_BATCH = 4
EPOCHS = 3
MIDDLE = "epoch=1.ckpt"
BF16 = {"ddp_find_unused_parameters_true": "bf16-mixed", "fsdp": "bf16-mixed"}
"""How a strategy runs in bf16; DeepSpeed's runs are in `deepspeed_run.py`."""


class CPUDeepSpeed(PDTrimDeepSpeedStrategy):
    """The real engine on gloo: only Lightning's check for CUDA is left out."""

    @override
    def setup_environment(self) -> None:
        self.parallel_devices = [torch.device("cpu", index) for index in range(self.num_processes)]
        super(PDTrimDeepSpeedStrategy.__base__, self).setup_environment()  # type: ignore[arg-type,misc]


def strategy_of(name: str) -> Strategy | str:
    if name == "fsdp":
        return PDTrimFSDPStrategy()
    if not name.startswith("zero"):
        return name
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # Else DeepSpeed compiles an operator in every process.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    stage, *offload = name.removeprefix("zero").split("-")
    return CPUDeepSpeed(int(stage), process_group_backend="gloo", offload_optimizer=offload == ["offload"])


class Named(Criterion):
    """Drops the blocks it was given, in order."""

    name = "named"

    def __init__(self, *blocks: int) -> None:
        self.blocks = blocks

    def score(
        self, context: ScoringContext, plan: StagePlan, target: Target, candidates: Sequence[int]
    ) -> dict[int, float]:
        return {block: float(self.blocks.index(block)) for block in candidates if block in self.blocks}


def schedule(precision: Any) -> list[Callback]:
    # Block 1 ends KV-only, block 3 (which starts with weights of its own in decode) leaves both stages, and one block
    # stands for 5 and 6, with weights that both stages share.
    criterion = GreedyKL() if precision == "32-true" else Named(3, 4)  # rounding may part equals
    return [
        MergeAt({1: ("both", (5, 6))}, Merging(min_cosine=-1, steps=4, tied=True)),
        BlockDrop("decode", criterion, {0: 1, 1: 1}, Guards(2, 3)),
        BlockDrop("prefill", Named(1, 3), {1: 1, 2: 1}, Guards(1, 1)),
        KVRetention(MassSelector(threshold=0.0, first=2, last=0.25)),
    ]


def module_of(model: Path) -> PDTrimModule:
    return PDTrimModule(
        str(model), losses=[KL(), CrossEntropy(0.1)],
        # Unlike Adam's, its steps scale with the gradients, so that a wrong factor shows.
        optimizer=partial(torch.optim.SGD, lr=0.3, momentum=0.9, weight_decay=0.01),
        lr_scheduler=partial(LinearLR, end_factor=0.5, total_iters=8), structure=Structure(plan=model / "plan.json"),
        chunk_tokens=5,
    )  # fmt: skip


def data_of(model: Path, processes: int) -> PromptResponseDataModule:
    # 20 examples: five batches an epoch, so that the last step of an epoch accumulates one batch instead of two.
    return PromptResponseDataModule(
        str(model), SHORT, Lengths(24, 8, 16), parts=Parts(validation=4, calibration=6, max_train=20),
        batch_size=GLOBAL_BATCH // processes,
    )  # fmt: skip


def whole_and_continued(fit: Callable[[Path, Path | None], PDTrimModule], folder: Path) -> None:
    """Train into `whole`, and from the end of its second epoch into `continued`; each tells its losses and plan."""
    for part, ckpt_path in (("whole", None), ("continued", folder / "whole" / MIDDLE)):
        module = fit(folder / part, ckpt_path)
        if module.global_rank == 0:
            told = {"losses": module.record.losses, "plan": module.plan.to_json()}
            (folder / part / "told.json").write_text(json.dumps(told), encoding="utf-8")


def trainer_of(
    folder: Path, strategy: Strategy | str, processes: int, export: Path, precision: Any = "32-true"
) -> Trainer:
    io = [] if isinstance(strategy, PDTrimDeepSpeedStrategy) else [PlanCheckpointIO()]
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_last=True)
    return Trainer(
        default_root_dir=folder, max_epochs=EPOCHS, accelerator="cpu", devices=processes, strategy=strategy,
        callbacks=[*schedule(precision), ExportPair(export, "float32", new_tokens=2, prompt_tokens=8), saver],
        plugins=io, precision=precision, accumulate_grad_batches=2, gradient_clip_val=0.5, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip


def fit(
    name: str, processes: int, model: Path, folder: Path, ckpt_path: Path | None = None, precision: Any = "32-true"
) -> PDTrimModule:  # fmt: skip
    """Train, export to `folder/export`, and return the module."""
    seed_everything(0, verbose=False)
    module = module_of(model)
    trainer = trainer_of(folder, strategy_of(name), processes, folder / "export", precision)
    trainer.fit(module, datamodule=data_of(model, processes), ckpt_path=ckpt_path)
    return module


def held(model: nn.Module) -> float:
    """The share of a model's weights that is in this process's memory."""
    own = whole = 0
    for weight in model.parameters():
        own += weight.to_local().numel() if isinstance(weight, DTensor) else weight.numel()
        own += vars(weight)["ds_tensor"].numel() if "ds_tensor" in vars(weight) else 0
        whole += vars(weight).get("ds_numel", weight.numel())
    return own / whole


def main(name: str, processes: int, model: Path, folder: Path) -> None:
    continued = f"{name}-offload" if name == "zero2" else name
    middle = folder / "whole" / MIDDLE
    parts: list[tuple[str, str, Path | None, str]] = [
        ("whole", name, None, "32-true"), ("continued", continued, middle, "32-true"),
    ]  # fmt: skip
    if name == "fsdp":
        parts.append(("crossed", "ddp_find_unused_parameters_true", middle, "32-true"))
    if name in BF16:
        parts.append(("bf16", name, None, BF16[name]))
    for part, strategy, ckpt_path, precision in parts:
        module = fit(strategy, processes, model, folder / part, ckpt_path, precision=precision)
        shares = {"student": held(module.student), "teacher": held(module.teacher)}
        (folder / part / f"held-{module.global_rank}.json").write_text(json.dumps(shares), encoding="utf-8")
        if module.global_rank == 0:
            types = sorted({str(weight.dtype) for weight in module.student.parameters()})
            told = {"record": module.record.to_json(), "plan": module.plan.to_json(), "types": types}
            (folder / part / "told.json").write_text(json.dumps(told), encoding="utf-8")
    if name in ("zero3", "fsdp"):  # DeepSpeed alone cannot load weights without an optimizer
        trainer = trainer_of(folder / "judged", strategy_of(name), processes, folder / "unused")
        metrics = trainer.validate(
            module_of(model), datamodule=data_of(model, processes), ckpt_path=folder / "whole" / "last.ckpt"
        )
        (folder / f"judged-{trainer.global_rank}.json").write_text(json.dumps(metrics), encoding="utf-8")
    if module.global_rank == 0:
        export_checkpoint(folder / "whole" / "last.ckpt", folder / "converted", dtype="float32")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
