"""A trial (`trainer.fast_dev_run`) runs one batch of everything and leaves every file as it was."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from short_text import SHORT

from pdtrim_pl.cli.lightning_cli import PDTrimCLI
from pdtrim_pl.cli.main import main
from pdtrim_pl.criteria import ScoringContext
from pdtrim_pl.module import PDTrimModule


def written(folder: Path, model: Path, **trainer: Any) -> Path:
    """A configuration of 2 steps an epoch with everything that writes files; `trainer` overrides."""
    drop = {"criterion": {"class_path": "pdtrim_pl.criteria.GreedyKL"}, "guards": {"protect_first": 0}}
    callbacks: list[dict[str, Any]] = [
        {"class_path": "callbacks.BlockDrop", "init_args": {**drop, "stage": "decode", "schedule": {0: 1, 2: 1}}},
        {"class_path": "callbacks.BlockDrop", "init_args": {**drop, "stage": "prefill", "schedule": {1: 1}}},
        {
            "class_path": "callbacks.KVRetention",
            "init_args": {"selector": {"class_path": "pdtrim_pl.selectors.MassSelector"}},
        },
        {"class_path": "callbacks.LossGuard"},
        {
            "class_path": "callbacks.ExportPair",
            "init_args": {"output": str(folder / "export"), "overwrite": True, "measure": False},
        },
        {
            "class_path": "callbacks.PredictionWriter",
            "init_args": {"output": str(folder / "predictions.jsonl")},
        },
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"dirpath": str(folder / "ckpt"), "save_last": True},
        },
        {"class_path": "callbacks.Preemption"},
    ]
    settings: dict[str, Any] = {
        "seed_everything": 1,
        "model": {"model": str(model)},
        "data": {
            "tokenizer": "${model.model}",
            "source": {"path": SHORT.path},
            "lengths": {"max_length": 24, "min_prompt": 8, "max_prompt": 16},
            "parts": {"validation": 4, "calibration": 8, "test": 8, "max_train": 8},
            "batch_size": 4,
        },
        "trainer": {
            "accelerator": "cpu", "devices": 1, "max_epochs": 3, "num_sanity_val_steps": 0, "logger": False,
            "default_root_dir": str(folder), "enable_progress_bar": False, "callbacks": callbacks, **trainer,
        },
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def step_of(checkpoint: Path) -> int:
    step: int = torch.load(checkpoint, weights_only=True)["global_step"]
    return step


def test_a_trial_leaves_every_file_as_it_was_and_the_real_run_goes_on_from_its_own_checkpoint(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    config = str(written(tmp_path, tiny_llama_dir))
    assert main(["fit", "--config", config]) == 0  # an earlier whole run: its export is not to be replaced
    for path in (tmp_path / "ckpt").glob("*.ckpt"):
        path.unlink()
    short = yaml.safe_load(Path(config).read_text())
    del short["trainer"]["callbacks"][4]
    short["trainer"]["callbacks"][0]["init_args"]["schedule"] = {0: 1, 1: 1}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(short))
    real = ["fit", "--config", str(tmp_path / "short.yaml"), "--trainer.max_epochs"]
    assert main([*real, "2"]) == 0
    assert step_of(tmp_path / "ckpt" / "last.ckpt") == 4
    before = files_of(tmp_path)
    assert {"export/origin.json", "ckpt/search_journal.jsonl", "resolved_config.yaml"} <= set(before)

    for last in ([], ["--ckpt_path", "last"]):
        assert main(["fit", "--config", config, "--trainer.fast_dev_run", "true", *last]) == 0
        assert files_of(tmp_path) == before

    assert main([*real, "3", "--ckpt_path", "last"]) == 0
    assert step_of(tmp_path / "ckpt" / "last.ckpt") == 6
    assert not (tmp_path / "ckpt" / "last-v1.ckpt").exists()


def test_a_trial_makes_every_round_on_one_batch_and_then_chooses_what_kv_to_send(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def context(student: Any, teacher: Any, batches: list[Any], *rest: Any) -> ScoringContext:
        seen.append(len(batches))
        return ScoringContext(student, teacher, batches, *rest)

    monkeypatch.setattr("callbacks.removal_rounds.ScoringContext", context)
    config = written(tmp_path, tiny_llama_dir)
    cli = PDTrimCLI(["--config", str(config), "--trainer.fast_dev_run", "true"], run=False)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert isinstance(cli.model, PDTrimModule)
    assert (len(cli.model.plan.prefill), len(cli.model.plan.decode)) == (3, 2)
    assert cli.model.policy is not None
    assert seen == [1, 1, 1], "three rounds, each on one of two calibration batches"
    assert cli.model.global_step == 1
    assert list(tmp_path.iterdir()) == [config]


def test_a_real_run_still_refuses_a_round_after_its_last_epoch(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", str(written(tmp_path, tiny_llama_dir, max_epochs=1))]) == 1
    assert "has a round at epoch 2, and `trainer.max_epochs` is 1" in capsys.readouterr().err


def test_a_trial_of_predict_keeps_what_was_predicted_before(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = str(written(tmp_path, tiny_llama_dir))
    assert main(["predict", "--config", config]) == 0
    before = files_of(tmp_path)
    assert len(before["predictions.jsonl"].splitlines()) == 8
    assert main(["predict", "--config", config, "--trainer.fast_dev_run", "1"]) == 0
    assert files_of(tmp_path) == before


def test_a_trial_whose_loss_is_not_finite_saves_no_batch_and_says_so(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    learn = PDTrimModule.training_step
    monkeypatch.setattr(PDTrimModule, "training_step", lambda *args: learn(*args) * float("nan"))
    config = written(tmp_path, tiny_llama_dir)
    assert main(["fit", "--config", str(config), "--trainer.fast_dev_run", "true"]) == 1
    assert "the batch is not saved: this is a trial" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [config]


def test_a_trial_does_not_hold_back_the_signals_of_a_cluster(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    masks: list[set[signal.Signals]] = []
    learn = PDTrimModule.training_step

    def watched(*args: Any) -> torch.Tensor:
        masks.append({signal.Signals(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())})
        return learn(*args)

    monkeypatch.setattr(PDTrimModule, "training_step", watched)
    cli = PDTrimCLI(["--config", str(written(tmp_path, tiny_llama_dir)), "--trainer.fast_dev_run", "1"], run=False)
    with caplog.at_level(logging.INFO, "pdtrim_pl.checkpoints.fast_dev_run"):
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert masks == [set()]
    assert "no checkpoint, no journal and no export" in caplog.text
