"""Learning rates by block: the rule, and runs whose rates follow the plan through drops, merges and a restart."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import rates_run
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from merge_at import MergeAt
from process_group import run_ranks
from short_text import SHORT
from tiny_models import TIED, saved_tiny_model
from torch import Tensor

from callbacks import BlockDrop
from pdtrim_pl.criteria import LastN
from pdtrim_pl.data import Lengths, Parts, PromptResponseDataModule
from pdtrim_pl.errors import UserError
from pdtrim_pl.merging import Merging
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.plan import ModelRef, StagePlan, Width
from pdtrim_pl.search import Guards
from pdtrim_pl.staged.lora import LoRA
from pdtrim_pl.strategies.layer_rates import LayerRates
from pdtrim_pl.strategies.schedule import Schedule

RATES = LayerRates(decay=0.5, floor=0.2)
EIGHT = StagePlan.full(ModelRef("tiny", "llama", 8, channels=16))
ADAM = partial(torch.optim.AdamW, lr=0.01)
SGD = partial(torch.optim.SGD, lr=1.0)


@pytest.mark.parametrize(
    ("plan", "factors"),
    [
        (EIGHT, [1.0] * 10),
        (EIGHT.drop("both", 5), [0.2, 0.2, 0.2, 0.25, 0.5, 1.0, 1.0, 1.0, 0.5, 0.25]),
        (EIGHT.drop("decode", 5), [0.2, 0.2, 0.2, 0.25, 0.5, 1.0, 1.0, 1.0, 0.5, 0.25]),
        (EIGHT.drop("both", 5).drop("both", 1), [0.5, 1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.25]),
        (EIGHT.merge("both", (3, 4), 3), [0.2, 0.25, 0.5, 1.0, 1.0, 1.0, 1.0, 0.5, 0.25, 0.2]),
        (EIGHT.narrow("decode", 0, Width(channels=(0, 1))), [1.0, 1.0, 1.0, 0.5, 0.25, 0.2, 0.2, 0.2, 0.2, 0.2]),
    ],
    ids=["nothing", "a drop", "a drop of one stage", "two drops", "a merge", "a narrow block"],
)
def test_the_rate_of_a_block_falls_with_the_distance_from_a_change(plan: StagePlan, factors: list[float]) -> None:
    assert RATES.factors(plan) == pytest.approx(dict(zip(range(-1, 9), factors, strict=True)))


@pytest.mark.parametrize("settings", [{"decay": 0.0}, {"decay": 1.5}, {"floor": -0.1}, {"floor": 2.0}])
def test_rates_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"`layer_rates` has .*give a decay above 0 and up to 1"):
        LayerRates(**settings)


class Steps(Callback):
    """Notes the rate of every group at every optimizer step, and outside of the steps."""

    def __init__(self) -> None:
        self.within: list[dict[int, float]] = []
        self.outside: list[set[float]] = []

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.within.append({group["block"]: group["lr"] for group in optimizer.param_groups})

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.outside.append({group["lr"] for group in trainer.optimizers[0].param_groups})


def module_of(model: Path, rates: LayerRates | None, optimizer: Any = ADAM, **settings: Any) -> PDTrimModule:
    seed_everything(0, verbose=False)
    return PDTrimModule(str(model), optimizer=optimizer, layer_rates=rates, chunk_tokens=5, **settings)


def drop(**schedule: int) -> BlockDrop:
    return BlockDrop("both", LastN(), {int(epoch[1:]): count for epoch, count in schedule.items()}, Guards(1, 0))


def merge() -> MergeAt:
    """Gives a block weights of its own in decode when the second epoch starts."""
    return MergeAt({1: ("decode", (1, 2))}, Merging(min_cosine=-1, steps=2))


def fit(
    module: PDTrimModule, model: Path, folder: Path, *callbacks: Callback, epochs: int = 3, examples: int = 8,
    ckpt_path: Path | None = None,
) -> PDTrimModule:  # fmt: skip
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    Trainer(
        accelerator="cpu", devices=1, default_root_dir=folder, max_epochs=epochs, logger=False, gradient_clip_val=0.5,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, callbacks=[*callbacks, saver],
    ).fit(module, ckpt_path=ckpt_path, datamodule=PromptResponseDataModule(
        str(model), SHORT, Lengths(24, 8, 16), Parts(validation=2, calibration=4, max_train=examples), batch_size=4,
    ))  # fmt: skip
    return module


def weights_of(module: PDTrimModule) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.student.named_parameters()}


def test_rates_that_are_all_one_train_exactly_what_one_rate_trains(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """With a drop, clipped gradients, and a schedule."""
    schedule = Schedule(warmup=0.2)
    plain, by_block = (
        fit(module_of(tiny_llama_dir, rates, schedule=schedule), tiny_llama_dir, tmp_path / name, drop(e1=1))
        for name, rates in (("plain", None), ("by_block", LayerRates(decay=1.0)))
    )
    assert plain.record.losses == by_block.record.losses
    for name, weight in weights_of(plain).items():
        assert torch.equal(weight, weights_of(by_block)[name]), name


@pytest.mark.parametrize("trainable", ["all", LoRA(2)], ids=["all", "lora"])
def test_a_run_with_rates_by_block_is_continued(trainable: Any, tiny_llama_dir: Path, tmp_path: Path) -> None:
    """With drops and a schedule; and where all weights train, a block gets weights of its own before the restart."""
    runs = []
    for name, start in (("whole", None), ("rest", tmp_path / "whole" / "epoch=1.ckpt")):
        module = module_of(tiny_llama_dir, RATES, schedule=Schedule(0.1), trainable=trainable)
        changes = [drop(e2=1), merge()] if trainable == "all" else [drop(e1=1, e2=1)]
        runs.append(fit(module, tiny_llama_dir, tmp_path / name, *changes, ckpt_path=start))
    whole, rest = runs
    assert whole.plan == rest.plan
    assert whole.record.losses == rest.record.losses
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, weights_of(rest)[name]), name


def test_weights_that_a_merge_adds_train_in_the_group_of_their_block(tiny_llama_dir: Path, tmp_path: Path) -> None:
    module = fit(module_of(tiny_llama_dir, RATES), tiny_llama_dir, tmp_path, merge(), epochs=2)
    (own,) = module.plan.untied["decode"]
    optimizer = module.optimizers(use_pl_optimizer=False)
    assert isinstance(optimizer, torch.optim.Optimizer)
    groups = {group["block"]: {id(parameter) for parameter in group["params"]} for group in optimizer.param_groups}
    assert list(groups) == [-1, 0, 1, 2, 3, 4]
    for index, gate in module.student.gates.items():
        assert groups[index] == {id(parameter) for parameter in gate.parameters()}
    assert len(groups[own]) == 2 * len(groups[0])


def test_the_rates_follow_the_plan_after_every_drop_and_the_schedule_never_sees_them(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    steps = Steps()
    module = module_of(tiny_llama_dir, RATES)
    fit(module, tiny_llama_dir, tmp_path, drop(e1=1, e2=1), steps)
    first, second = RATES.factors(module.plan), RATES.factors(StagePlan.full(module.plan.model).drop("both", 3))
    assert module.plan.prefill == (0, 1)
    expected = [dict.fromkeys(first, 1.0)] * 2 + [second] * 2 + [first] * 2
    assert len(steps.within) == 6
    for seen, factors in zip(steps.within, expected, strict=True):
        assert seen == pytest.approx({block: 0.01 * factors[block] for block in seen})
    assert steps.outside == [{0.01}] * 6


def test_a_step_moves_a_block_by_its_factor(tiny_llama_dir: Path, tmp_path: Path) -> None:
    moves: list[dict[str, Tensor]] = []
    for rates in (None, RATES):
        module = module_of(tiny_llama_dir, rates, SGD)
        module.configure_model()
        before = weights_of(module)
        fit(module, tiny_llama_dir, tmp_path / f"{rates}", drop(e0=1), epochs=1, examples=4)
        moves.append({name: after - before[name] for name, after in weights_of(module).items()})
    factors = RATES.factors(module.plan)
    assert factors == {-1: 0.2, 0: 0.25, 1: 0.5, 2: 1.0, 3: 1.0, 4: 1.0}
    for index, gate in module.student.gates.items():
        for name, _ in gate.named_parameters(f"model.model.layers.{index}"):
            torch.testing.assert_close(moves[1][name], factors[index] * moves[0][name], atol=1e-6, rtol=1e-4)
    embeddings = "model.model.embed_tokens.weight"
    torch.testing.assert_close(moves[1][embeddings], 0.2 * moves[0][embeddings], atol=1e-6, rtol=1e-4)
    assert all(moves[0][name].abs().max() > 1e-4 for name in (embeddings, "model.model.norm.weight"))


@pytest.mark.parametrize(
    ("saved", "continued", "message"),
    [(RATES, None, "of a run with rates by block.*set `model.layer_rates` as"),
     (None, RATES, "of a run with one rate for all blocks.*leave `model.layer_rates` out")],
    ids=["left out", "added"],
)  # fmt: skip
def test_a_checkpoint_of_a_run_with_other_groups_is_refused(
    saved: LayerRates | None, continued: LayerRates | None, message: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    fit(module_of(tiny_llama_dir, saved), tiny_llama_dir, tmp_path, epochs=1)
    with pytest.raises(UserError, match=message):
        fit(module_of(tiny_llama_dir, continued), tiny_llama_dir, tmp_path, ckpt_path=tmp_path / "epoch=0.ckpt")


@pytest.fixture(scope="module")
def model(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks and tied embeddings."""
    return saved_tiny_model(tmp_path_factory.mktemp("model"), tiny_tokenizer_dir, **TIED)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_find_unused_parameters_true", "zero1", "zero2", "zero3", "fsdp"])
def test_two_processes_train_with_rates_by_block_what_one_trains(strategy: str, model: Path, tmp_path: Path) -> None:
    """Also continued after the drop. Without the rates, the losses are others."""
    losses = {
        rates: [loss for _, loss in rates_run.fit("auto", 1, model, tmp_path / f"{rates}", rates=rates).record.losses]
        for rates in (rates_run.RATES, None)
    }
    assert losses[None] != pytest.approx(losses[rates_run.RATES], abs=1e-3)
    run_ranks("rates_run.py", strategy, "2", str(model), str(tmp_path), folder=tmp_path, timeout=300)
    for part in ("whole", "continued"):
        told = json.loads((tmp_path / part / "told.json").read_text(encoding="utf-8"))
        assert [loss for _, loss in told["losses"]] == pytest.approx(losses[rates_run.RATES], abs=1e-5), part
