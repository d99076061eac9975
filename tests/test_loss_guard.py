"""A loss that is not a number stops the run with its batch saved, or costs one step, and never reaches the weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from short_text import SHORT
from torch import Tensor

from callbacks import LossGuard
from pdtrim_pl.checkpoints.run_record import RunRecord
from pdtrim_pl.data import Lengths, Parts, PromptResponseDataModule
from pdtrim_pl.module import PDTrimModule


class Poisoned(PDTrimModule):
    """Its loss is not finite in chosen micro-batches."""

    def __init__(self, model: Path, at: tuple[int, ...], value: float) -> None:
        super().__init__(str(model), optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3))
        self.at, self.value, self.seen = at, value, 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.seen += 1
        return loss * self.value if self.seen - 1 in self.at else loss


class Weights(Callback):
    """Keeps a copy of the weights after every batch."""

    def __init__(self) -> None:
        self.after: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.after.append({name: weight.clone() for name, weight in pl_module.student.state_dict().items()})


def fit(
    folder: Path, model: Path, guard: LossGuard, at: tuple[int, ...], value: float = float("nan"), **kwargs: Any
) -> tuple[Trainer, Poisoned, Weights]:
    seed_everything(0, verbose=False)
    data = PromptResponseDataModule(
        str(model), SHORT, Lengths(max_length=24, min_prompt=8, max_prompt=16),
        parts=Parts(validation=0, calibration=4, max_train=16), batch_size=4,
    )  # fmt: skip
    module, weights = Poisoned(model, at, value), Weights()
    trainer = Trainer(
        default_root_dir=folder, callbacks=[guard, weights], max_epochs=1, accelerator="cpu", devices=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, gradient_clip_val=1.0,
        **kwargs,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return trainer, module, weights


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(weight, second[name]) for name, weight in first.items())


class AccumulatesItself(SingleDeviceStrategy):
    """Lightning calls the optimizer's hooks for every batch, as under DeepSpeed."""

    handles_gradient_accumulation = True  # type: ignore[assignment]


@pytest.mark.parametrize("at", [2, 3])
def test_every_batch_of_a_step_counts_where_the_strategy_accumulates(
    at: int, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    own = AccumulatesItself(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"not finite.*at step 1"):
        fit(tmp_path, tiny_llama_dir, LossGuard(), (at,), accumulate_grad_batches=2, strategy=own)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_run_stops_with_the_batch_saved(tiny_llama_dir: Path, tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match=r"not finite.*at step 2, epoch 0.*bad_batches.*`--ckpt_path`"):
        fit(tmp_path, tiny_llama_dir, LossGuard(), (2,), value)
    saved = torch.load(tmp_path / "bad_batches" / "step2-rank0.pt", weights_only=True)
    assert (saved["step"], saved["epoch"], saved["rank"]) == (2, 0, 0)
    assert saved["batch"]["prompt_ids"].shape == saved["batch"]["prompt_mask"].shape
    assert len(saved["batch"]["response_ids"]) == 4


def test_a_skipped_step_leaves_every_weight_as_it_was(tiny_llama_dir: Path, tmp_path: Path) -> None:
    guard = LossGuard(skip=1, output=tmp_path / "mine")
    trainer, _, weights = fit(tmp_path, tiny_llama_dir, guard, (2,))
    assert trainer.global_step == 4
    assert guard.skipped == [2]
    assert same(weights.after[1], weights.after[2])
    assert not same(weights.after[2], weights.after[3]), "the next step learns again"
    assert (tmp_path / "mine" / "step2-rank0.pt").is_file()


def test_a_batch_that_cannot_be_saved_is_skipped_all_the_same(
    tiny_llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken").touch()
    guard = LossGuard(skip=1, output=tmp_path / "taken" / "batches")
    trainer, _, weights = fit(tmp_path, tiny_llama_dir, guard, (2,))
    assert (trainer.global_step, guard.skipped) == (4, [2])
    assert same(weights.after[1], weights.after[2])
    assert any("could not be saved: [Errno" in record.getMessage() for record in caplog.records)


def test_one_bad_batch_takes_its_whole_accumulated_step_along(tiny_llama_dir: Path, tmp_path: Path) -> None:
    guard = LossGuard(skip=1)
    _, _, weights = fit(tmp_path, tiny_llama_dir, guard, (2,), accumulate_grad_batches=2)
    assert guard.skipped == [1]
    assert same(weights.after[1], weights.after[3])


def test_a_run_stops_when_it_has_skipped_enough(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at step 3, epoch 0. 1 step\(s\) were skipped before"):
        fit(tmp_path, tiny_llama_dir, LossGuard(skip=1), (1, 3))


def test_what_was_skipped_is_remembered_in_checkpoints() -> None:
    guard, again = LossGuard(skip=2), LossGuard(skip=2)
    guard.skipped = [3, 9]
    again.load_state_dict(guard.state_dict())
    assert again.skipped == [3, 9]


def test_a_run_without_bad_losses_is_not_touched(tiny_llama_dir: Path, tmp_path: Path) -> None:
    _, _, guarded = fit(tmp_path, tiny_llama_dir, LossGuard(skip=1), ())
    _, _, free = fit(tmp_path, tiny_llama_dir, LossGuard(), ())
    assert same(guarded.after[-1], free.after[-1])
    assert not (tmp_path / "bad_batches").exists()


def test_skipping_under_deepspeed_is_refused_with_the_reason() -> None:
    trainer: Any = SimpleNamespace(strategy=DeepSpeedStrategy.__new__(DeepSpeedStrategy))
    module: Any = None
    with pytest.raises(MisconfigurationException, match=r"`skip` of the loss guard is 2, and DeepSpeed's engine"):
        LossGuard(skip=2).setup(trainer, module, "fit")
    LossGuard().setup(trainer, module, "fit")


def test_the_record_keeps_only_losses_that_are_numbers() -> None:
    record = RunRecord()
    for step, loss in enumerate((1.0, float("nan"), float("inf"), 2.0)):
        record.add_loss(step, loss)
    assert record.losses == [(0, 1.0), (3, 2.0)]


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="`skip` of the loss guard is -1"):
        LossGuard(skip=-1)
