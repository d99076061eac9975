"""Merges in the middle of a run: optimizer, checkpoints, resume, and what two processes make of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from merging_run import EPOCHS, fit
from process_group import run_ranks
from tiny_models import saved_tiny_model

from pdtrim_pl.checkpoints.state import CheckpointState
from pdtrim_pl.export import load_plan_and_policy
from pdtrim_pl.export.from_checkpoint import export_checkpoint
from pdtrim_pl.merging import Merging
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.plan import StagePlan
from pdtrim_pl.strategies import PDTrimDeepSpeedStrategy, PDTrimFSDPStrategy, check_merges

ROOT = Path(__file__).parents[1]
TIMEOUT = 300
KINDS = ("own", "shared")


@pytest.fixture(scope="module")
def model(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six blocks with dropout, so that every step draws from the random generator."""
    folder = tmp_path_factory.mktemp("model")
    return saved_tiny_model(folder, tiny_tokenizer_dir, blocks=6, vocab_size=259, initializer_range=0.1)


@pytest.fixture(scope="module")
def dropout_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dropout") / "model"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.2}))
    return folder


@pytest.fixture(scope="module", params=KINDS)
def with_adam(
    request: pytest.FixtureRequest, dropout_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, PDTrimModule]:
    folder = tmp_path_factory.mktemp(f"adam-{request.param}")
    return request.param, folder, fit("auto", 1, dropout_model, folder, request.param, adam=True)


# In one process


@pytest.mark.parametrize("epoch", range(EPOCHS - 1))
def test_a_run_continued_through_a_merge_is_the_uninterrupted_run(
    epoch: int, with_adam: tuple[str, Path, PDTrimModule], dropout_model: Path, tmp_path: Path
) -> None:
    kind, folder, whole = with_adam
    again = fit("auto", 1, dropout_model, tmp_path, kind, folder / f"epoch={epoch}.ckpt", adam=True)
    assert again.record.losses == whole.record.losses
    assert again.plan == whole.plan
    ours, theirs = again.state_dict(), whole.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_merged_weights_train_and_the_optimizer_starts_anew_for_them(with_adam: tuple[str, Path, PDTrimModule]) -> None:
    kind, folder, module = with_adam
    optimizer = module.trainer.optimizers[0]
    steps = {
        name: int(optimizer.state[p]["step"]) for name, p in module.student.named_parameters() if p in optimizer.state
    }
    an_epoch = max(steps.values()) // EPOCHS
    if kind == "own":
        assert module.student.untied == {
            "prefill": module.plan.untied["prefill"],
            "decode": module.plan.untied["decode"],
        }
        ((decode,), (prefill,)) = module.plan.untied["decode"], module.plan.untied["prefill"]
        assert module.plan.merged == {"prefill": {prefill: (1, 2)}, "decode": {decode: (3, 4)}}
        later = {f"layers.{decode}.untied.decode.": 3 * an_epoch, f"layers.{prefill}.untied.prefill.": 2 * an_epoch}
        state = CheckpointState.at(folder / "epoch=2.ckpt")
        assert state is not None
        assert state.added == (("decode", decode), ("prefill", prefill))
    else:
        (into,) = module.plan.merged["decode"]
        assert not any(module.student.untied.values())
        later = {f"layers.{into}.block.": 2 * an_epoch}
    for name, count in steps.items():
        expected = [after for part, after in later.items() if part in name] or [EPOCHS * an_epoch]
        if "untied" in name or expected[0] != EPOCHS * an_epoch:
            assert count == expected[0], name
    assert all(any(part in name for name in steps) for part in later)
    trained = [id(parameter) for parameter in optimizer.param_groups[0]["params"]]
    assert sorted(trained) == sorted(id(parameter) for parameter in module.student.parameters())


def test_a_checkpoint_with_merges_exports(with_adam: tuple[str, Path, PDTrimModule], tmp_path: Path) -> None:
    _, folder, module = with_adam
    export_checkpoint(folder / "epoch=2.ckpt", tmp_path / "export", dtype="float32")
    assert load_plan_and_policy(tmp_path / "export")[0].merged == module.plan.merged


def test_a_checkpoint_from_before_there_were_merges_loads(with_adam: tuple[str, Path, PDTrimModule]) -> None:
    checkpoint = torch.load(with_adam[1] / "epoch=2.ckpt", weights_only=True)
    del checkpoint[CheckpointState.KEY]["added"]
    assert CheckpointState.of(checkpoint).added == ()


def test_merges_that_a_strategy_cannot_take_up_are_refused_before_the_first_step() -> None:
    for strategy, name in ((PDTrimDeepSpeedStrategy(2), "DeepSpeed"), (PDTrimFSDPStrategy(), "FSDP")):
        with pytest.raises(ValueError, match=rf"`trainer.strategy` is {name}.*`tied: true`.*ddp_find_unused"):
            check_merges(strategy, Merging().tied)
        check_merges(strategy, tied=True)
    for strategy in (SingleDeviceStrategy("cpu"), DDPStrategy(process_group_backend="gloo")):
        check_merges(strategy, Merging().tied)


# In two processes


@pytest.mark.slow
def test_two_processes_merge_into_weights_of_their_own_and_train_as_one_does(model: Path, tmp_path: Path) -> None:
    """Merges into weights that the stages share are in the runs of `test_strategies.py`."""
    module = fit("auto", 1, model, tmp_path / "alone", "own")
    strategy = "ddp_find_unused_parameters_true"
    run_ranks("merging_run.py", strategy, "2", str(model), str(tmp_path), folder=tmp_path, timeout=TIMEOUT)
    for part in ("whole", "continued"):
        told = json.loads((tmp_path / part / "told.json").read_text(encoding="utf-8"))
        assert StagePlan.from_json(told["plan"]).merged == module.plan.merged
        for (step, ours), (_, theirs) in zip(told["losses"], module.record.losses, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5), (part, step)
