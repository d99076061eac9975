"""A run that is asked to leave saves whole steps, requeues its job so often at most, and continues exactly."""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from short_text import SHORT
from typing_extensions import override

from callbacks import BlockDrop, Preemption
from callbacks.preemption import NOTICES, Preempted
from pdtrim_pl.checkpoints.continuation import latest_valid_checkpoint
from pdtrim_pl.checkpoints.state import CheckpointState, PlanCheckpointIO
from pdtrim_pl.cli.lightning_cli import PDTrimCLI
from pdtrim_pl.cli.main import main
from pdtrim_pl.criteria import CosineRedundancy, Criterion, GreedyKL, ScoringContext
from pdtrim_pl.data import Lengths, Parts, PromptResponseDataModule
from pdtrim_pl.merging import Merging
from pdtrim_pl.merging import local_fits as fitting
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.plan import StagePlan, Target
from pdtrim_pl.search import Guards

SIGNALS = sorted(NOTICES)
CONFIGS = Path(__file__).parents[1] / "configs"
GPU_CONFIGS = [path for path in sorted(CONFIGS.glob("*.yaml")) if "accelerator: gpu" in path.read_text()]


class Notify(Callback):
    """Sends this process a signal in the middle of one step."""

    def __init__(self, epoch: int, batch: int, notice: signal.Signals = signal.SIGUSR1) -> None:
        self.at, self.notice = (epoch, batch), notice

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == self.at:
            os.kill(os.getpid(), self.notice)


class NotifiedSearch(CosineRedundancy):
    """Sends this process a signal while it scores, if asked."""

    def __init__(self, notice: signal.Signals | None = None) -> None:
        self.notice = notice

    @override
    def score(
        self, context: ScoringContext, plan: StagePlan, target: Target, candidates: Sequence[int]
    ) -> dict[int, float]:
        if self.notice is not None:
            os.kill(os.getpid(), self.notice)
        return super().score(context, plan, target, candidates)


@pytest.fixture
def told() -> Iterator[list[str]]:
    """What the callback logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("callbacks.preemption")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job 7 restarted twice, and programs of SLURM that write their arguments to a file: the path of that file."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    for name, answer in (("squeue", "${FAKE_STATE-RUNNING}"), ("scontrol", "")):
        program = folder / name
        program.write_text(f'#!/bin/sh\necho "{name} $*" >>{calls}\necho "{answer}"\nexit "${{FAKE_STATUS:-0}}"\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    return calls


def fit(
    folder: Path, model: Path, *extra: Callback, search: Criterion | None = None,
    savers: Sequence[Callback] | None = None, merging: Merging | None = None, **settings: Any,
) -> PDTrimModule:  # fmt: skip
    """Two epochs of three batches with a drop at the start of the second; continues where it can."""
    seed_everything(0, verbose=False)
    callbacks = [
        BlockDrop("decode", search or NotifiedSearch(), {1: 1}, Guards(0, 1), merging=merging), *extra,
        *(savers or [ModelCheckpoint(folder / "checkpoints", save_last=True, save_top_k=0)]),
    ]  # fmt: skip
    trainer = Trainer(
        default_root_dir=folder, callbacks=callbacks, plugins=[PlanCheckpointIO()], max_epochs=2, accelerator="cpu",
        devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        **settings,
    )  # fmt: skip
    data = PromptResponseDataModule(
        str(model), SHORT, Lengths(max_length=24, min_prompt=8, max_prompt=16), batch_size=2,
        parts=Parts(validation=4, calibration=4, max_train=6),
    )  # fmt: skip
    module = PDTrimModule(str(model), optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3))
    trainer.fit(module, datamodule=data, ckpt_path=latest_valid_checkpoint(folder / "checkpoints"))
    return module


def saved(folder: Path) -> tuple[int, CheckpointState]:
    """Optimizer step and state of the only checkpoint."""
    (path,) = (folder / "checkpoints").glob("*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    return checkpoint["global_step"], CheckpointState.of(checkpoint)


@pytest.fixture(scope="module")
def whole_run(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> PDTrimModule:
    return fit(tmp_path_factory.mktemp("whole"), tiny_llama_dir)


@pytest.mark.parametrize(
    ("epoch", "batch", "notice", "step", "blocks"),
    [
        pytest.param(0, 0, signal.SIGUSR1, 1, 4, id="first step"),
        pytest.param(0, 2, signal.SIGTERM, 3, 4, id="last batch of an epoch"),
        pytest.param(1, 1, signal.SIGTERM, 5, 3, id="middle of an epoch"),
        pytest.param(1, 2, signal.SIGUSR1, 6, 3, id="last batch of all"),
    ],
)
def test_a_run_asked_to_leave_continues_to_the_same_end(
    whole_run: PDTrimModule, tiny_llama_dir: Path, tmp_path: Path, epoch: int, batch: int, notice: signal.Signals,
    step: int, blocks: int,
) -> None:  # fmt: skip
    with pytest.raises(Preempted) as left:
        fit(tmp_path, tiny_llama_dir, Notify(epoch, batch, notice), Preemption())
    assert left.value.code == 75
    assert saved(tmp_path)[0] == step
    assert len(saved(tmp_path)[1].plan.decode) == blocks
    check_same(fit(tmp_path, tiny_llama_dir, Preemption()), whole_run)
    saved(tmp_path)  # still one checkpoint, not a `last-v1.ckpt` beside it


def test_a_notice_after_the_last_evaluation_waits_until_the_drop_is_whole(
    whole_run: PDTrimModule, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(Preempted):
        fit(tmp_path, tiny_llama_dir, Preemption(), search=NotifiedSearch(signal.SIGTERM))
    step, state = saved(tmp_path)
    assert (step, len(state.plan.decode)) == (4, 3)
    check_same(fit(tmp_path, tiny_llama_dir, Preemption()), whole_run)


class SlowSearch(GreedyKL):
    """Sends this process a signal after so many evaluations."""

    def __init__(self, evaluations: int) -> None:
        super().__init__()
        self.left = evaluations

    @override
    def score(
        self, context: ScoringContext, plan: StagePlan, target: Target, candidates: Sequence[int]
    ) -> dict[int, float]:
        def counted(line: str) -> None:
            self.left -= 1
            if not self.left:
                signal.raise_signal(signal.SIGUSR1)  # to this thread: others may not have it blocked

        return super().score(replace(context, progress=counted), plan, target, candidates)


def test_a_search_longer_than_the_notice_is_left_and_continued(
    tiny_llama_dir: Path, tmp_path: Path, told: list[str]
) -> None:
    def run(folder: Path, evaluations: int) -> PDTrimModule:
        saver = ModelCheckpoint(folder / "checkpoints", filename="last", enable_version_counter=False)
        return fit(folder, tiny_llama_dir, Preemption(), search=SlowSearch(evaluations), savers=[saver])

    whole = run(tmp_path / "whole", 1000)
    folder = tmp_path / "left"
    with pytest.raises(Preempted):
        run(folder, 2)
    journal = folder / "checkpoints" / "search_journal.jsonl"
    known = journal.read_text()
    assert len(known.splitlines()) == 2
    step, state = saved(folder)
    assert (step, len(state.plan.decode)) == (3, 4), "the end of the epoch before"
    check_same(run(folder, 1000), whole)
    assert journal.read_text().startswith(known), "what was known is not evaluated again"
    assert journal.read_text() == (tmp_path / "whole" / "checkpoints" / "search_journal.jsonl").read_text()
    assert told[0].startswith(
        "Asked to leave in a search: its evaluations are kept, its local fits begin again. "
        "Continue with the same command"
    )


def test_local_fits_that_take_longer_than_the_notice_are_left_and_made_again(
    tiny_llama_dir: Path, tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit_group, groups, asked = fitting._fit_group, list[int](), True

    def counted(*args: Any, **named: Any) -> Any:
        groups.append(len(groups))
        if asked:
            signal.raise_signal(signal.SIGUSR1)
        return fit_group(*args, **named)

    def run(folder: Path) -> PDTrimModule:
        saver = ModelCheckpoint(folder / "checkpoints", filename="last", enable_version_counter=False)
        merging = Merging(min_cosine=-1, steps=2, pairs_at_once=1)
        return fit(folder, tiny_llama_dir, Preemption(), search=GreedyKL(), savers=[saver], merging=merging)

    monkeypatch.setattr(fitting, "_fit_group", counted)
    with pytest.raises(Preempted):
        run(tmp_path / "left")
    assert groups == [0], "of two pairs"
    assert saved(tmp_path / "left")[0] == 3, "the end of the epoch before"
    assert told[0].startswith("Asked to leave in a search")
    asked = False
    continued, whole = run(tmp_path / "left"), run(tmp_path / "whole")
    assert len(groups) == 1 + 2 * 2
    check_same(continued, whole)


def test_a_notice_between_two_optimizer_steps_waits_for_the_gradients(tiny_llama_dir: Path, tmp_path: Path) -> None:
    for name in ("whole", "left"):
        (tmp_path / name).mkdir()
    settings = {"accumulate_grad_batches": 2}
    whole = fit(tmp_path / "whole", tiny_llama_dir, **settings)
    with pytest.raises(Preempted):
        fit(tmp_path / "left", tiny_llama_dir, Notify(1, 0), Preemption(), **settings)
    assert saved(tmp_path / "left")[0] == 3, "two steps in epoch 0, one after two batches of epoch 1"
    check_same(fit(tmp_path / "left", tiny_llama_dir, Preemption(), **settings), whole)


def savers_of(config: Path, folder: Path) -> list[ModelCheckpoint]:
    """The savers of a configuration, writing elsewhere and every 4 steps instead of every 200."""
    changed = {"dirpath": str(folder), "every_n_train_steps": 4}
    entries = yaml.safe_load(config.read_text())["trainer"]["callbacks"]
    settings = [entry["init_args"] for entry in entries if entry["class_path"].endswith(".ModelCheckpoint")]
    return [ModelCheckpoint(**{name: changed.get(name, value) for name, value in each.items()}) for each in settings]


@pytest.mark.parametrize("config", GPU_CONFIGS, ids=lambda path: path.name)
def test_the_savers_of_a_shipped_configuration_keep_the_last_step_of_a_run(
    config: Path, whole_run: PDTrimModule, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    with pytest.raises(Preempted):
        fit(tmp_path, tiny_llama_dir, Notify(1, 1), Preemption(), savers=savers_of(config, folder))
    check_newest(folder, step=5)
    check_same(fit(tmp_path, tiny_llama_dir, Preemption(), savers=savers_of(config, folder)), whole_run)
    check_newest(folder, step=6)


def check_newest(folder: Path, step: int) -> None:
    newest = latest_valid_checkpoint(folder)
    assert newest == folder / "last.ckpt"
    assert torch.load(newest, weights_only=True)["global_step"] == step
    assert sorted(path.name for path in folder.glob("*.ckpt")) == ["last.ckpt", "step=4.ckpt"]


def check_same(module: PDTrimModule, expected: PDTrimModule) -> None:
    assert module.plan == expected.plan
    assert module.record.losses == expected.record.losses
    assert module.record.validations == expected.record.validations
    for name, weight in module.student.state_dict().items():
        assert torch.equal(weight, expected.student.state_dict()[name]), name


def test_a_run_that_nobody_disturbs_is_the_same_with_the_callback(
    whole_run: PDTrimModule, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    check_same(fit(tmp_path, tiny_llama_dir, Preemption()), whole_run)


@pytest.mark.parametrize("disturbed", [False, True])
def test_signals_mean_again_what_they_meant_before(tiny_llama_dir: Path, tmp_path: Path, disturbed: bool) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, []), [signal.getsignal(notice) for notice in SIGNALS]
    if disturbed:
        with pytest.raises(Preempted):
            fit(tmp_path, tiny_llama_dir, Notify(0, 0), Preemption())
    else:
        fit(tmp_path, tiny_llama_dir, Preemption())
    assert before == (signal.pthread_sigmask(signal.SIG_BLOCK, []), [signal.getsignal(notice) for notice in SIGNALS])


def test_a_job_goes_back_into_the_queue(
    fake_slurm: Path, tiny_llama_dir: Path, tmp_path: Path, told: list[str]
) -> None:
    with pytest.raises(Preempted):
        fit(tmp_path, tiny_llama_dir, Notify(0, 0), Preemption(max_requeues=3))
    assert fake_slurm.read_text().splitlines()[-1] == "scontrol requeue 7"
    assert told[0] == "Restart 2 of job 7, continuing from the beginning: there was no checkpoint yet."
    assert told[-1].endswith("Job 7 is back in the queue, restart 3 of at most 3.")


def test_a_job_restarted_often_enough_is_saved_and_ends(
    fake_slurm: Path, tiny_llama_dir: Path, tmp_path: Path, told: list[str]
) -> None:
    with pytest.raises(Preempted):
        fit(tmp_path, tiny_llama_dir, Notify(0, 0), Preemption(max_requeues=2))
    assert not fake_slurm.exists(), "SLURM is not even asked"
    assert saved(tmp_path)[0] == 1
    assert "Not requeued: restarted 2 times, and `max_requeues` is 2. Continue with the same command" in told[-1]


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"FAKE_STATE": "COMPLETING"}, "job 7 is COMPLETING, not RUNNING: it was cancelled or is ending."),
        ({"FAKE_STATE": ""}, "job 7 is unknown, not RUNNING"),
        ({"FAKE_STATUS": "1"}, "`squeue` failed"),
    ],
)
def test_a_job_that_cannot_be_requeued_is_saved_all_the_same(
    fake_slurm: Path, tiny_llama_dir: Path, tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str], reason: str,
) -> None:  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Preempted):
        fit(tmp_path, tiny_llama_dir, Notify(0, 0), Preemption())
    assert f"Not requeued: {reason}" in told[-1]
    assert "scontrol" not in fake_slurm.read_text()
    assert saved(tmp_path)[0] == 1


def test_without_slurm_the_run_tells_how_to_continue(tiny_llama_dir: Path, tmp_path: Path, told: list[str]) -> None:
    with pytest.raises(Preempted):
        fit(tmp_path, tiny_llama_dir, Notify(0, 0), Preemption())
    assert told[-1].endswith("last.ckpt. Continue with the same command and `--ckpt_path last`.")


def test_a_run_without_a_place_for_checkpoints_is_refused() -> None:
    trainer = Trainer(callbacks=[Preemption()], accelerator="cpu", logger=False, enable_checkpointing=True)
    with pytest.raises(
        MisconfigurationException, match=r"`trainer.callbacks` has none: add one with `save_last: true`"
    ):
        trainer.fit(PDTrimModule("never-loaded"), [0])


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`max_requeues` is -1"):
        Preemption(max_requeues=-1)


def test_lightnings_own_requeue_is_off_under_slurm(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = {"NTASKS": "2", "NTASKS_PER_NODE": "2", "JOB_NAME": "pdtrim", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in task.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    args = ["--model.model", str(tiny_llama_dir), "--data.tokenizer", str(tiny_llama_dir)]
    cli = PDTrimCLI([*args, "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"], run=False)
    environment = cli.trainer.strategy.cluster_environment  # type: ignore[attr-defined]
    assert isinstance(environment, SLURMEnvironment)
    assert not environment.auto_requeue


def test_last_is_the_newest_whole_checkpoint_and_a_new_run_where_there_is_none(
    tiny_llama_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "model": {
            "model": str(tiny_llama_dir),
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        },
        "data": {
            "tokenizer": str(tiny_llama_dir), "source": {"path": SHORT.path},
            "lengths": {"max_length": 24, "min_prompt": 8, "max_prompt": 16},
            "parts": {"validation": 2, "calibration": 2, "max_train": 4}, "batch_size": 2,
        },
        "trainer": {
            "accelerator": "cpu", "devices": 1, "logger": False, "default_root_dir": str(tmp_path),
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"dirpath": str(tmp_path / "checkpoints"), "save_top_k": -1, "save_last": True},
                }
            ],
        },
    }  # fmt: skip
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    command = ["fit", "--config", str(config), "--ckpt_path", "last"]
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert main([*command, "--trainer.max_epochs=1"]) == 0
    first = CheckpointState.of(torch.load(last, weights_only=True)).record.losses
    foreign = torch.load(last, weights_only=True)
    foreign["pdtrim"]["processes"] = 8
    torch.save(foreign, last.with_name("foreign.ckpt"))
    os.truncate(last, 1000)
    assert main([*command, "--trainer.max_epochs=2", "--model.optimizer.init_args.lr=0.5"]) == 0
    said = capfd.readouterr().err
    assert re.search(r"last.ckpt is passed over: .*cannot be read", said)
    assert re.search(r"foreign.ckpt is passed over: .*a run of 8 process\(es\), and this one has 1", said)
    second = CheckpointState.of(torch.load(last.with_name("epoch=1-step=4.ckpt"), weights_only=True)).record.losses
    assert len(second) == 2 * len(first) == 4
    assert second[:2] == first, "continued, for a new run at such a rate has another second loss"
