"""A run that is killed at any point and continued ends as if nothing had happened; what cannot go on says why."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from process_group import run_ranks
from safetensors.torch import load_file
from tiny_models import tiny_model

import pdtrim_pl.checkpoints.state
import pdtrim_pl.export.documents
from callbacks import BlockDrop, ExportPair
from pdtrim_pl.checkpoints.continuation import Continuation, latest_valid_checkpoint
from pdtrim_pl.checkpoints.random_state import random_state, restore_random_state
from pdtrim_pl.checkpoints.state import CheckpointState, PlanCheckpointIO, check_writable
from pdtrim_pl.cli import main as cli
from pdtrim_pl.cli.failures import lost_process
from pdtrim_pl.criteria import CosineRedundancy
from pdtrim_pl.data import Lengths, Parts, PromptResponseDataModule, TextSource
from pdtrim_pl.errors import RankLost
from pdtrim_pl.export import export_pair
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.search import Guards
from pdtrim_pl.staged import StagedCausalLM

ALONE = ("first_step", "step", "last_step", "drop", "search", "write", "rename", "export", "exported", "torn")
TOGETHER = ("step", "last_step", "drop", "search", "write", "export", "exported")


@pytest.fixture(scope="module")
def dropout_llama_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with dropout, so that every training step draws from the random generator; and a short text."""
    directory = tmp_path_factory.mktemp("dropout") / "model"
    shutil.copytree(tiny_llama_dir, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.2}))
    (directory / "text.txt").write_text("".join(f"{number} squared is {number**2}.\n" for number in range(400)))
    return directory


# The kill matrix


def killed_and_continued(model: Path, folder: Path, processes: int, points: tuple[str, ...]) -> Path:
    arguments = [str(model), str(folder), str(processes), *points]
    run_ranks("resume_run.py", *arguments, folder=folder, timeout=900, processes=1)  # which forks those of each run
    return folder


@pytest.fixture(scope="module")
def alone(dropout_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return killed_and_continued(dropout_llama_dir, tmp_path_factory.mktemp("alone"), 1, ALONE)


@pytest.fixture(scope="module")
def together(dropout_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return killed_and_continued(dropout_llama_dir, tmp_path_factory.mktemp("together"), 2, (*TOGETHER, "nan"))


def assert_same_end(run: Path, whole: Path) -> None:
    """Losses, validations, plan, policy and every tensor of the export, exactly; nothing unfinished is left."""
    assert not [*run.glob(".*"), *(run / "checkpoints").glob("*.unfinished")]
    assert json.loads((run / "result.json").read_text()) == json.loads((whole / "result.json").read_text())
    tensors = sorted(path.relative_to(whole) for path in (whole / "export").rglob("*.safetensors"))
    assert len(tensors) == 2
    for path in tensors:
        expected, found = load_file(whole / path), load_file(run / path)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), f"{path}: {name}"
    for name in ("stage_plan.json", "kv_policy.json"):
        assert (run / "export" / name).read_text() == (whole / "export" / name).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("point", ALONE)
def test_a_killed_run_ends_like_the_uninterrupted_one(alone: Path, point: str) -> None:
    ended = json.loads((alone / point / "killed.json").read_text())
    assert ended == {"killed": [-signal.SIGKILL], "continued": [0]}
    assert_same_end(alone / point, alone / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("point", TOGETHER)
def test_two_processes_of_which_one_is_killed_end_like_uninterrupted_ones(together: Path, point: str) -> None:
    ended = json.loads((together / point / "killed.json").read_text())
    assert ended["continued"] == [0, 0]
    assert sorted(ended["killed"]) == [-signal.SIGKILL, 1], "the one that is left ends by itself, with an error"
    assert_same_end(together / point, together / "whole")


@pytest.mark.slow
def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(alone: Path) -> None:
    log = (alone / "torn" / "rank0.log").read_text()
    assert "step=4.ckpt is passed over: The checkpoint" in log
    assert "cannot be read" in log


@pytest.mark.slow
def test_the_error_of_a_rank_that_is_lost_in_a_collective_is_known_to_the_command_line(together: Path) -> None:
    survivor = (together / "step" / "rank0.log").read_text()
    said = [line for line in survivor.splitlines() if line.startswith("RuntimeError: ") and "gloo" in line]
    assert said
    assert lost_process(RuntimeError(said[-1].removeprefix("RuntimeError: ")))


@pytest.mark.slow
def test_ranks_that_wait_for_an_export_are_told_that_its_rank_is_lost(together: Path) -> None:
    survivor = (together / "export" / "rank1.log").read_text()
    assert "RankLost: Rank 0 is gone" in survivor
    assert lost_process(RankLost("Rank 0 is gone"))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_all(together: Path) -> None:
    assert json.loads((together / "nan" / "killed.json").read_text())["killed"] == [0, 0]
    for rank in range(2):
        assert "step 4 is skipped (1 of 1)" in (together / "nan" / f"rank{rank}.log").read_text()
    assert [path.name for path in (together / "nan" / "bad_batches").iterdir()] == ["step4-rank1.pt"]


def test_a_lost_process_ends_the_command_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose(command: str, args: list[str]) -> int:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")

    monkeypatch.setattr(cli, "_run", lose)
    assert cli.main(["fit"]) == 1
    error = capsys.readouterr().err
    assert "Another process of the run is gone" in error
    assert "Traceback" not in error


def test_any_other_runtime_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: str, args: list[str]) -> int:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(cli, "_run", fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        cli.main(["fit"])


# In one process


class Steps(Callback):
    """Counts what a run goes through."""

    def __init__(self) -> None:
        self.epochs: list[int] = []
        self.validations = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.epochs.append(trainer.current_epoch)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.validations += 1


def fit(folder: Path, model: Path, ckpt_path: Path | None = None, **kwargs: Any) -> tuple[PDTrimModule, Steps]:
    seed_everything(0, verbose=False)
    data = PromptResponseDataModule(
        str(model), TextSource(str(model / "text.txt")), batch_size=4,
        lengths=Lengths(max_length=24, min_prompt=8, max_prompt=16),
        parts=Parts(validation=4, calibration=4, max_train=8), num_workers=kwargs.pop("num_workers", 0),
    )  # fmt: skip
    module = PDTrimModule(str(model), optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3))
    steps = kwargs.pop("extra", None) or Steps()
    drop = kwargs.pop("drop", None) or BlockDrop("decode", CosineRedundancy(), {1: 1, 2: 1}, Guards(0, 1))
    saver = kwargs.pop("saver", None) or ModelCheckpoint(
        folder / "checkpoints", filename="{step}", save_top_k=-1, every_n_train_steps=1
    )
    trainer = Trainer(
        default_root_dir=folder, callbacks=[drop, steps, saver], plugins=[PlanCheckpointIO()], accelerator="cpu",
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        **{"max_epochs": 3, "devices": 1, "num_sanity_val_steps": 0, **kwargs},
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module, steps


VARIANTS: tuple[tuple[dict[str, Any], tuple[int, ...]], ...] = (
    ({}, (1, 2, 3, 4, 5)),
    ({"limit_val_batches": 0}, (2, 3)),
    ({"check_val_every_n_epoch": 2}, (2, 4)),
    ({"val_check_interval": 1}, (1, 2)),
    ({"accumulate_grad_batches": 2}, (1,)),
)


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "steps"), VARIANTS, ids=str)
def test_a_run_continued_from_after_any_step_equals_the_uninterrupted_one(
    dropout_llama_dir: Path, tmp_path: Path, settings: dict[str, Any], steps: tuple[int, ...]
) -> None:
    whole, _ = fit(tmp_path / "whole", dropout_llama_dir, **settings)
    for step in steps:
        saved = tmp_path / "whole" / "checkpoints" / f"step={step}.ckpt"
        module, _ = fit(tmp_path / saved.stem, dropout_llama_dir, saved, **settings)
        assert_same_run(module, whole)


def assert_same_run(module: PDTrimModule, whole: PDTrimModule) -> None:
    assert module.plan == whole.plan
    assert module.record.losses == whole.record.losses
    assert module.record.removals == whole.record.removals
    weights = module.student.state_dict()
    for name, weight in whole.student.state_dict().items():
        assert torch.equal(weight, weights[name]), name


@pytest.fixture(scope="module")
def saved(dropout_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PDTrimModule, Steps]:
    """A run of three epochs of two steps, its checkpoints after every step."""
    folder = tmp_path_factory.mktemp("saved")
    return (folder / "checkpoints", *fit(folder, dropout_llama_dir))


class OwnWeights(Callback):
    """Gives block 2 weights of its own in decode, and takes it out of decode an epoch later."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        plan = pl_module.plan
        if trainer.current_epoch == 1:
            pl_module.apply_plan(replace(plan, untied={"decode": (2,)}))
        if trainer.current_epoch == 2:
            pl_module.apply_plan(plan.drop("decode", 2))


def test_a_run_continues_though_a_block_with_weights_of_its_own_has_left(
    dropout_llama_dir: Path, tmp_path: Path
) -> None:
    whole, _ = fit(tmp_path / "whole", dropout_llama_dir, drop=OwnWeights())
    path = tmp_path / "whole" / "checkpoints" / "step=5.ckpt"
    module, _ = fit(tmp_path / "again", dropout_llama_dir, path, drop=OwnWeights())
    assert module.student.untied["decode"] == (2,)
    assert 2 not in module.plan.decode
    assert_same_run(module, whole)


def test_after_an_epochs_last_step_its_validation_and_the_next_epochs_start_still_come(
    saved: tuple[Path, PDTrimModule, Steps], dropout_llama_dir: Path, tmp_path: Path
) -> None:
    module, steps = fit(tmp_path, dropout_llama_dir, saved[0] / "step=2.ckpt")
    assert steps.epochs == [1, 2]
    assert steps.validations == 3
    assert module.record.validations == saved[1].record.validations
    assert_same_run(module, saved[1])


@pytest.mark.slow
def test_the_number_of_loading_workers_may_change_in_the_middle_of_an_epoch(
    saved: tuple[Path, PDTrimModule, Steps], dropout_llama_dir: Path, tmp_path: Path
) -> None:
    module, _ = fit(tmp_path, dropout_llama_dir, saved[0] / "step=3.ckpt", num_workers=2)
    assert_same_run(module, saved[1])


@pytest.mark.slow
def test_a_checkpoint_saved_at_the_end_of_validation_continues_too(dropout_llama_dir: Path, tmp_path: Path) -> None:
    def saver(name: str) -> ModelCheckpoint:
        folder = tmp_path / name / "checkpoints"
        return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=False)

    whole, _ = fit(tmp_path / "whole", dropout_llama_dir, saver=saver("whole"))
    path = tmp_path / "whole" / "checkpoints" / "epoch=0.ckpt"
    module, _ = fit(tmp_path / "again", dropout_llama_dir, path, saver=saver("again"))
    assert_same_run(module, whole)
    assert module.record.validations == whole.record.validations


def test_every_random_generator_goes_on_where_it_was() -> None:
    def draw() -> tuple[float, float, float, float]:
        return random.random(), random.gauss(0, 1), float(np.random.normal()), float(torch.randn(()))

    device = torch.device("cpu")
    draw()  # the second value of a pair of normal draws is part of the state
    state = random_state(device)
    drawn = draw()
    draw()
    restore_random_state(state, device)
    assert draw() == drawn


def test_a_checkpoint_holds_the_generators_of_every_process_and_loads_as_plain_data(
    saved: tuple[Path, PDTrimModule, Steps],
) -> None:
    checkpoint = torch.load(saved[0] / "step=3.ckpt", weights_only=True)
    assert [sorted(state) for state in checkpoint["pdtrim_random"]] == [["cuda", "numpy", "python", "torch"]]


# The export of a run that is continued


@pytest.fixture
def exported(dropout_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that has exported, as it is left by a kill after that."""
    monkeypatch.setattr(pdtrim_pl.export.documents, "write_report", lambda *_, **__: None)
    fit(tmp_path, dropout_llama_dir, drop=ExportPair(tmp_path / "export", "float32", measure=False))
    (tmp_path / "weights").write_bytes((tmp_path / "export" / "decode" / "model.safetensors").read_bytes())
    return tmp_path


@pytest.mark.parametrize("step", [4, 6])
def test_a_run_killed_after_its_export_exports_again(dropout_llama_dir: Path, exported: Path, step: int) -> None:
    made = (exported / "export").stat().st_ino
    run, _ = fit(
        exported, dropout_llama_dir, exported / "checkpoints" / f"step={step}.ckpt",
        drop=ExportPair(exported / "export", "float32", measure=False),
    )  # fmt: skip
    assert (exported / "export").stat().st_ino != made
    assert (exported / "export" / "decode" / "model.safetensors").read_bytes() == (exported / "weights").read_bytes()
    assert json.loads((exported / "export" / "origin.json").read_text())["run"] == run.run_name


@pytest.mark.parametrize("other", ["run", "end", "export without an origin"])
def test_what_another_run_exported_is_not_replaced(dropout_llama_dir: Path, exported: Path, other: str) -> None:
    if other == "export without an origin":
        (exported / "export" / "origin.json").unlink()
    export, steps = ExportPair(exported / "export", "float32", measure=False), Steps()
    with pytest.raises(ValueError, match=r"The export target .* exists.*`overwrite: true`"):
        fit(
            exported, dropout_llama_dir, None if other == "run" else exported / "checkpoints" / "step=4.ckpt",
            drop=export, extra=steps, max_epochs=4 if other == "end" else 3,
        )  # fmt: skip
    assert steps.epochs == [], "before the first step"
    assert (exported / "export" / "decode" / "model.safetensors").read_bytes() == (exported / "weights").read_bytes()


# What cannot go on


@pytest.fixture
def folder(saved: tuple[Path, PDTrimModule, Steps], tmp_path: Path) -> Path:
    """Three checkpoints, `step=3` the newest."""
    for age, step in enumerate((3, 2, 1)):
        path = tmp_path / "checkpoints" / f"step={step}.ckpt"
        path.parent.mkdir(exist_ok=True)
        shutil.copy(saved[0] / path.name, path)
        os.utime(path, (1000 - age, 1000 - age))
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_a_damaged_checkpoint_is_passed_over_by_name(
    folder: Path, kept: float, caplog: pytest.LogCaptureFixture
) -> None:
    size = (folder / "step=3.ckpt").stat().st_size
    os.truncate(folder / "step=3.ckpt", int(kept * size) if isinstance(kept, float) else kept)
    os.utime(folder / "step=3.ckpt", (2000, 2000))
    with caplog.at_level(logging.WARNING, "pdtrim_pl.checkpoints.continuation"):
        assert latest_valid_checkpoint(folder) == folder / "step=2.ckpt"
    assert "step=3.ckpt is passed over" in caplog.text


def test_a_checkpoint_of_another_number_of_processes_that_is_named_outright_is_refused(
    dropout_llama_dir: Path, folder: Path, tmp_path: Path
) -> None:
    assert latest_valid_checkpoint(folder, run=Continuation(str(dropout_llama_dir), 1)) == folder / "step=3.ckpt"
    checkpoint = torch.load(folder / "step=3.ckpt", weights_only=True)
    checkpoint["pdtrim"]["processes"] = 2
    torch.save(checkpoint, folder / "step=3.ckpt")
    with pytest.raises(ValueError, match=r"a run of 2 process\(es\), and this one has 1"):
        fit(tmp_path, dropout_llama_dir, folder / "step=3.ckpt")


def test_a_checkpoint_of_another_format_is_passed_over(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = torch.load(folder / "step=3.ckpt", weights_only=True)
    checkpoint["pdtrim"]["format"] = "pdtrim.checkpoint/9"
    torch.save(checkpoint, folder / "step=3.ckpt")
    torch.save({"state_dict": {}}, folder / "foreign.ckpt")
    with caplog.at_level(logging.WARNING, "pdtrim_pl.checkpoints.continuation"):
        assert latest_valid_checkpoint(folder) == folder / "step=2.ckpt"
    assert "'pdtrim.checkpoint/9'" in caplog.text
    assert "foreign.ckpt is passed over" in caplog.text


def test_without_a_checkpoint_a_run_starts_at_the_beginning(tmp_path: Path) -> None:
    assert latest_valid_checkpoint(tmp_path) is None
    assert latest_valid_checkpoint(tmp_path / "missing") is None


def test_what_lies_beside_a_checkpoint_does_not_count_where_the_checkpoint_itself_can_tell(
    saved: tuple[Path, PDTrimModule, Steps], folder: Path
) -> None:
    newer = CheckpointState.at(saved[0] / "step=5.ckpt")
    older = CheckpointState.at(folder / "step=2.ckpt")
    assert newer is not None
    assert older is not None
    newer.write_beside(folder / "step=2.ckpt")
    assert CheckpointState.at(folder / "step=2.ckpt") == older
    assert newer.plan != older.plan


def test_a_full_disk_ends_in_one_error_and_leaves_the_earlier_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = (folder / "step=3.ckpt").read_bytes()
    checkpoint = torch.load(folder / "step=2.ckpt", weights_only=True)
    monkeypatch.setattr(pdtrim_pl.checkpoints.state.os, "fsync", full)
    with pytest.raises(OSError, match=r"step=3.ckpt cannot be written .*No space left.*earlier ones are untouched"):
        PlanCheckpointIO().save_checkpoint(checkpoint, folder / "step=3.ckpt")
    assert (folder / "step=3.ckpt").read_bytes() == before
    assert not list(folder.glob("*.unfinished"))


@contextmanager
def small_files() -> Iterator[None]:
    """No file may grow past 20 kB, as on a disk that is full in the middle of a write.

    Not a fixture: that would still hold when pytest writes its own report to a file.
    """
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_disk_that_fills_up_in_the_middle_of_a_write_ends_the_run_clearly(
    dropout_llama_dir: Path, tmp_path: Path
) -> None:
    with small_files(), pytest.raises(OSError, match=r"step=1.ckpt cannot be written"):
        fit(tmp_path, dropout_llama_dir)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_an_export_that_finds_no_room_leaves_nothing_behind(tmp_path: Path) -> None:
    student = StagedCausalLM(tiny_model("llama"))
    message = r"export .*pair cannot be written .*`pdtrim export` on the last checkpoint"
    with small_files(), pytest.raises(OSError, match=message):
        export_pair(student, tmp_path / "pair", tokenizer=None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("owner", ["ModelCheckpoint", "ExportPair"])
def test_a_folder_that_cannot_be_written_to_fails_before_the_first_step(
    dropout_llama_dir: Path, tmp_path: Path, owner: str
) -> None:
    (tmp_path / "file").write_text("")
    taken = tmp_path / "file" / "folder"
    saver: Callback = ModelCheckpoint(taken) if owner == "ModelCheckpoint" else ExportPair(taken / "export")
    with pytest.raises(ValueError, match=rf"Nothing can be written to .*file/folder.*of {owner}"):
        fit(tmp_path, dropout_llama_dir, saver=saver)


def test_looking_whether_a_folder_can_be_written_to_leaves_nothing_in_it(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder")
    assert not list((tmp_path / "new" / "folder").iterdir())
