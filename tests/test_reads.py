"""A training step waits for its device only where a name here allows it: at an optimizer step, and to log losses."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from short_text import SHORT
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from callbacks import LossGuard, PlanProgressBar, Preemption
from pdtrim_pl.data import Lengths, Parts, PromptResponseDataModule
from pdtrim_pl.losses import KL, CrossEntropy, HiddenMatch, KVMatch, LossTerm
from pdtrim_pl.models.loading import Loading
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.plan import Codec, KVRetentionPolicy, Retention

BATCHES = 4
Place = tuple[str, str]
HOST = {("rows", "of"), ("rows", "real_responses"), ("apply_func", "to_item"), ("loader", "__iter__")}
"""Numbers in host memory: what is counted before a batch leaves it, the loss that a bar shows, a loader's state."""
BETWEEN = {("optimizer", "_get_value"), ("flags", "_agreed"), ("resumable", "record_losses")}
"""Once an optimizer step, or once in `log_every_n_steps` batches."""
READS = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default", "aten.equal.default"}
"""Operations whose result the host waits for."""


def place() -> Place:
    """File and function of the innermost frame that belongs to the project, to Lightning or to an optimizer."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if any(part in path.parts for part in ("pdtrim_pl", "callbacks", "lightning", "optim")):
            return path.stem, frame.f_code.co_name
        frame = frame.f_back  # type: ignore[assignment]
    return "?", "?"


class Reads(TorchDispatchMode):
    """Counts by place what waits for the device, or would on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Place] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if str(func) in READS or by_mask:
            self.found[place()] += 1
        return func(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """Counts `tolist` and its like, which a dispatch mode does not see on a CPU."""

    def __init__(self, found: Counter[Place]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.cpu):
            self.found[place()] += 1
        return func(*args, **(kwargs or {}))


class Counting(Callback):
    """Counts from the first batch of an epoch to its end, under a plan and a policy of its own if there are any."""

    def __init__(self, change: Callable[[PDTrimModule], None]) -> None:
        self.change, self.reads = change, Reads()
        self.lists = Lists(self.reads.found)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.change(pl_module)
        self.reads.__enter__()
        self.lists.__enter__()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.lists.__exit__(None, None, None)
        self.reads.__exit__(None, None, None)


def reads(
    model: Path, folder: Path, losses: Sequence[LossTerm], lengths: Lengths, *, every: int = BATCHES,
    change: Callable[[PDTrimModule], None] = lambda module: None, loading: Loading = Loading(),
) -> Counter[Place]:  # fmt: skip
    """The reads of one epoch, with the guard, preemption and a bar; two batches an optimizer step."""
    seed_everything(0, verbose=False)
    data = PromptResponseDataModule(
        str(model), SHORT, lengths, parts=Parts(validation=0, calibration=4, max_train=4 * BATCHES), batch_size=4
    )
    counting, saver = Counting(change), ModelCheckpoint(folder, save_last=True, every_n_epochs=5)
    trainer = Trainer(
        default_root_dir=folder, callbacks=[LossGuard(), Preemption(), PlanProgressBar(), counting, saver],
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_model_summary=False,
        accumulate_grad_batches=2, log_every_n_steps=every,
    )  # fmt: skip
    trainer.fit(PDTrimModule(str(model), losses=list(losses), loading=loading), datamodule=data)
    return counting.reads.found


def drop_and_cut(module: PDTrimModule) -> None:
    """Prefill keeps every block, decode loses one; what is sent is rounded, and of one block only the ends."""
    module.apply_plan(module.plan.drop("decode", 2))
    rules = {0: Retention("first_last", 2, 0.5), 1: Retention(codec=Codec("int4", "int4"))}
    module.apply_policy(KVRetentionPolicy("prefill", module.student.kv_shape, rules))


@pytest.mark.parametrize("lengths", [Lengths(24, 8, 16), Lengths(24, 8, 8)], ids=["padded", "whole"])
@pytest.mark.parametrize(
    ("losses", "change", "loading"),
    [
        ([KL()], lambda module: None, Loading()),
        ([KL(), CrossEntropy(), HiddenMatch(), KVMatch()], lambda module: None, Loading(gradient_checkpointing=True)),
        ([KL(), HiddenMatch(metric="cosine"), KVMatch()], drop_and_cut, Loading()),
        ([KL()], drop_and_cut, Loading(attn_implementation="eager")),
    ],
    ids=["plain", "every loss", "policy", "eager"],
)
def test_a_training_batch_waits_for_nothing_and_an_optimizer_step_for_one_flag(
    losses: list[LossTerm], change: Callable[[PDTrimModule], None], loading: Loading, lengths: Lengths,
    tiny_llama_dir: Path, tmp_path: Path,
) -> None:  # fmt: skip
    found = reads(tiny_llama_dir, tmp_path, losses, lengths, change=change, loading=loading)
    assert set(found) <= HOST | BETWEEN
    assert found["flags", "_agreed"] == BATCHES / 2, "the guard and preemption share one"
    assert found["rows", "of"] > 0
    assert not found["apply_func", "to_item"], "a bar has nothing to show until losses are read"


@pytest.mark.parametrize("every", [1, 3])
def test_losses_are_read_every_so_many_batches_and_shown_from_host_memory(
    every: int, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    found = reads(tiny_llama_dir, tmp_path, [KL()], Lengths(24, 8, 16), every=every)
    assert set(found) <= HOST | BETWEEN
    assert found["resumable", "record_losses"] == 2 * (BATCHES // every), "a copy to the host, and its numbers"
    assert found["apply_func", "to_item"] > 0, "the bar"


def test_a_batch_whose_tokens_nobody_counted_is_read_on_the_device(tiny_llama_dir: Path, tmp_path: Path) -> None:
    def forget(module: PDTrimModule) -> None:
        module._data().on_batch = lambda batch: None  # type: ignore[union-attr]

    found = reads(tiny_llama_dir, tmp_path, [KL()], Lengths(24, 8, 16), change=forget)
    assert found["masks", "is_whole"] >= BATCHES
    assert found["chunked", "spoken_tokens"] == BATCHES
