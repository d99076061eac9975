"""`--ckpt_path last` takes the newest checkpoint that is of this run; a kill in the middle of a save loses none."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, tiny_model

from pdtrim_pl.checkpoints.continuation import Continuation, check_same_checkpoint, latest_valid_checkpoint, settle
from pdtrim_pl.checkpoints.run_record import RunRecord
from pdtrim_pl.checkpoints.sharded import (
    ShardedCheckpoint,
    check_harmless,
    earlier,
    is_whole,
    put_in_place,
    read_sharded,
    remove,
    unfinished,
)
from pdtrim_pl.checkpoints.state import CheckpointState, PlanCheckpointIO, sidecar
from pdtrim_pl.parallel import Parallel
from pdtrim_pl.staged import StagedCausalLM

age = count(1)
SHARDS = ("latest", *(f"checkpoint/shard_{rank}.pt" for rank in range(2)))
UNLISTED = ("a.py", "z.py")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(folder)
    return folder


def student_of(family: str = "llama", **overrides: Any) -> StagedCausalLM:
    """With a block that has weights of its own in decode."""
    staged = StagedCausalLM(tiny_model(family, tie_word_embeddings=True, **overrides))
    staged.gates[1].untie("decode")
    return staged


def state_of(student: StagedCausalLM, processes: int = 1, loss: float = 0.0, **facts: Any) -> CheckpointState:
    record = RunRecord(losses=[(1, loss)])
    return replace(CheckpointState(student.plan, None, record, "", processes, student.untied), **facts)


def save_file(path: Path, student: StagedCausalLM | None = None, processes: int = 1, **facts: Any) -> Path:
    """A checkpoint file, newer than all before it."""
    student = student or student_of()
    weights = {f"student.{name}": value for name, value in student.state_dict().items()}
    torch.save({CheckpointState.KEY: state_of(student, processes, **facts).to_json(), "state_dict": weights}, path)
    return made_newest(path)


def save_shards(
    path: Path | str, student: StagedCausalLM | None = None, *, stage: int = 2, processes: int = 2, loss: float = 0.0,
    **facts: Any,
) -> Path:  # fmt: skip
    """A finished directory of shards, newer than all before it."""
    student = student or student_of()
    Path(path, "checkpoint").mkdir(parents=True)
    for name in (*SHARDS, *UNLISTED):
        Path(path, name).write_bytes(b"a whole shard")
    state = state_of(student, processes, loss, **facts).to_json()
    files = {name: Path(path, name).stat().st_size for name in SHARDS}
    ShardedCheckpoint.of(stage, processes, student, state, files).save(path)
    return made_newest(Path(path))


def made_newest(path: Path) -> Path:
    now = next(age)
    os.utime(path, (now, now))
    return path


# Foreign checkpoints


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_without_memory_has_the_weights_of_a_loaded_one(family: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    student = StagedCausalLM(model)
    student.gates[2].untie("prefill")
    Continuation(str(tmp_path), 1).check(save_file(tmp_path / "a.ckpt", student))
    Continuation(str(tmp_path), 2, 3).check(save_shards(tmp_path / "b.ckpt", student, stage=3))


def with_plan_format(path: Path) -> Path:
    checkpoint = torch.load(save_file(path), weights_only=True)
    checkpoint[CheckpointState.KEY]["plan"]["format"] = "pdtrim.stage_plan/9"
    torch.save(checkpoint, path)
    return made_newest(path)


FOREIGN_FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "family": (lambda path: save_file(path, student_of("qwen3")), "is of .*qwen3, 4 blocks.*llama, 4 blocks"),
    "blocks": (lambda path: save_file(path, student_of(blocks=6)), "llama, 6 blocks"),
    "weights": (lambda path: save_file(path, student_of(intermediate_size=40)), "weights: tensors 15 of another shape"),
    "processes": (lambda path: save_file(path, processes=4), r"a run of 4 process\(es\), and this one has 1"),
    "plan format": (with_plan_format, "stage plan has `format` 'pdtrim.stage_plan/9'"),
    "shards": (save_shards, "is a directory of shards. They are continued with .*PDTrimDeepSpeedStrategy"),
}


@pytest.mark.parametrize("kind", FOREIGN_FILES)
def test_a_foreign_checkpoint_is_passed_over_by_name_and_the_one_before_it_taken(
    kind: str, llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make, reason = FOREIGN_FILES[kind]
    before = save_file(tmp_path / "before.ckpt")
    run = Continuation(str(llama), 1)
    check_passed_over(make(tmp_path / "foreign.ckpt"), before, run, reason, caplog)


FOREIGN_SHARDS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "stage": (lambda path: save_shards(path, stage=3), "saved under ZeRO stage 3, and this run has `stage: 2`"),
    "processes": (lambda path: save_shards(path, processes=8), "a run of 8 process"),
    "weights": (lambda path: save_shards(path, student_of(intermediate_size=40)), "weights of other names or shapes"),
    "file": (save_file, "is no directory of shards. DeepSpeed continues only what DeepSpeed saved"),
}


def cut(shard: Path) -> None:
    shard.write_bytes(b"half")


TORN: dict[str, tuple[Callable[[Path], None], tuple[str, ...], str]] = {
    "one cut": (cut, SHARDS[1:2], r"is torn: shard checkpoint/shard_0.pt has 4 of 13 bytes. Give `ckpt_path` the one"),
    "all cut": (cut, SHARDS, r"latest has 4 of 13 bytes, shard checkpoint/shard_0.pt .*, shard checkpoint/shard_1.pt"),
    "one gone": (Path.unlink, SHARDS[2:], r"is torn: shard checkpoint/shard_1.pt is missing. Give"),
    "all gone": (Path.unlink, SHARDS, r"shard latest is missing, shard checkpoint/shard_0.pt is missing"),
}


def torn(kind: str, path: Path | str) -> Path:
    """One that was finished, and then lost something, as a file system does that loses its power."""
    harm, names, _ = TORN[kind]
    directory = save_shards(path)
    for name in names:
        harm(directory / name)
    return made_newest(directory)


@pytest.mark.parametrize("kind", TORN)
def test_torn_shards_are_passed_over_by_name_and_those_before_them_taken(
    kind: str, llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = save_shards(tmp_path / "before.ckpt")
    check_passed_over(torn(kind, tmp_path / "last.ckpt"), before, Continuation(str(llama), 2, 2), TORN[kind][2], caplog)


@pytest.mark.parametrize("kind", TORN)
def test_torn_shards_are_neither_continued_nor_exported_nor_taken_up(kind: str, tmp_path: Path) -> None:
    path = torn(kind, tmp_path / "last.ckpt")
    assert not is_whole(path)
    for read in (ShardedCheckpoint.load, CheckpointState.at, read_sharded):
        with pytest.raises(ValueError, match=TORN[kind][2]):
            read(path)
    torn(kind, unfinished(tmp_path / "other.ckpt"))
    settle(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_many_torn_shards_are_counted(tmp_path: Path) -> None:
    ShardedCheckpoint(2, 2, "a", {}, {f"shard_{rank}": 9 for rank in range(64)}).save(tmp_path)
    with pytest.raises(ValueError, match=r"shard_2 is missing, and 61 more are like that. Give `ckpt_path`"):
        ShardedCheckpoint.load(tmp_path)


def test_what_the_note_does_not_list_may_go(tmp_path: Path) -> None:
    path = save_shards(tmp_path / "last.ckpt")
    for name in UNLISTED:
        (path / name).unlink()
    assert is_whole(path)


def test_a_checkpoint_from_before_there_was_a_list_of_files_is_taken(llama: Path, tmp_path: Path) -> None:
    path = save_shards(tmp_path / "last.ckpt")
    note = json.loads((path / "pdtrim.json").read_text())
    del note["files"]
    (path / "pdtrim.json").write_text(json.dumps({**note, "format": "pdtrim.sharded_checkpoint/2"}))
    assert latest_valid_checkpoint(tmp_path, run=Continuation(str(llama), 2, 2)) == path


def test_a_link_to_shards_is_read_as_they_are_and_they_outlive_it(llama: Path, tmp_path: Path) -> None:
    target = save_shards(tmp_path / "step=4.ckpt", loss=1.0)
    link = tmp_path / "last.ckpt"
    link.symlink_to(target.name)
    assert losses(link) == [(1, 1.0)]
    save_shards(unfinished(link), loss=2.0)
    put_in_place(link)
    assert (losses(target), losses(link)) == ([(1, 1.0)], [(1, 2.0)])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["last.ckpt", "step=4.ckpt"]
    (tmp_path / "lost.ckpt").symlink_to("gone.ckpt")
    save_shards(unfinished(tmp_path / "lost.ckpt"))
    put_in_place(tmp_path / "lost.ckpt")
    assert is_whole(tmp_path / "lost.ckpt")
    (tmp_path / "best.ckpt").symlink_to(target.name)
    remove(tmp_path / "best.ckpt")
    assert is_whole(target)


@pytest.mark.parametrize("kind", FOREIGN_SHARDS)
def test_foreign_shards_are_passed_over_by_name_and_those_before_them_taken(
    kind: str, llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make, reason = FOREIGN_SHARDS[kind]
    before = save_shards(tmp_path / "before.ckpt")
    run = Continuation(str(llama), 2, 2)
    check_passed_over(make(tmp_path / "foreign.ckpt"), before, run, reason, caplog)


def check_passed_over(
    foreign: Path, before: Path, run: Continuation, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "pdtrim_pl.checkpoints.continuation"):
        assert latest_valid_checkpoint(foreign.parent, run=run) == before
    (said,) = caplog.messages
    assert said.startswith(f"Checkpoint {foreign} is passed over: ")
    with pytest.raises(ValueError, match=reason) as error:
        run.check(foreign)
    assert str(error.value) in said


def test_a_folder_of_foreign_checkpoints_alone_is_refused_with_every_reason(llama: Path, tmp_path: Path) -> None:
    for name, (make, _) in FOREIGN_FILES.items():
        make(tmp_path / f"{name}.ckpt")
    with pytest.raises(ValueError, match=r"No checkpoint in .* can be continued from.*Move them away") as error:
        latest_valid_checkpoint(tmp_path, run=Continuation(str(llama), 1))
    assert all(f"{name}.ckpt: " in str(error.value) for name in FOREIGN_FILES)


def test_the_newest_of_several_folders_is_taken_though_another_holds_only_foreign_ones(
    llama: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    own = save_file(tmp_path / "a" / "own.ckpt")
    save_file(tmp_path / "b" / "foreign.ckpt", processes=4)
    assert latest_valid_checkpoint(tmp_path / "a", tmp_path / "b", run=Continuation(str(llama), 1)) == own


# The furthest, and of which run


def settings_of(seed: int = 1, data: str = "a", epochs: int = 3) -> str:
    return (
        f"seed_everything: {seed}\nmodel: {{model: x}}\ndata: {{source: {data}}}\ntrainer: {{max_epochs: {epochs}}}\n"
    )


def test_the_furthest_is_taken_though_another_is_newer(llama: Path, tmp_path: Path) -> None:
    run = Continuation(str(llama), 1)
    furthest = save_file(tmp_path / "step=4.ckpt", step=4)
    save_file(tmp_path / "step=1.ckpt", step=1)
    assert latest_valid_checkpoint(tmp_path, run=run) == furthest
    newest = save_file(tmp_path / "epoch=1.ckpt", step=4)
    assert latest_valid_checkpoint(tmp_path, run=run) == newest, "of equally far ones"


def test_the_furthest_shards_are_taken_though_others_are_newer(llama: Path, tmp_path: Path) -> None:
    furthest = save_shards(tmp_path / "a.ckpt", step=4)
    save_shards(tmp_path / "b.ckpt", step=2)
    assert latest_valid_checkpoint(tmp_path, run=Continuation(str(llama), 2, 2)) == furthest


def test_a_checkpoint_from_before_steps_were_kept_is_as_far_as_its_last_loss(tmp_path: Path) -> None:
    path = save_file(tmp_path / "old.ckpt", step=9)
    saved = torch.load(path, weights_only=True)
    del saved[CheckpointState.KEY]["step"]
    torch.save(saved, path)
    state = CheckpointState.at(path)
    assert state is not None
    assert state.step == 1


def test_what_a_run_left_behind_when_it_went_back_does_not_count(llama: Path, tmp_path: Path) -> None:
    common = [(1, 3.0), (2, 2.0)]
    save_file(tmp_path / "step=2.ckpt", step=2, run="a", record=RunRecord(losses=common))
    gone_wrong = RunRecord(losses=[*common, (3, 9.0), (4, 99.0)])
    abandoned = save_file(tmp_path / "step=4.ckpt", step=4, run="a", record=gone_wrong)
    again = save_file(tmp_path / "last.ckpt", step=3, run="a", record=RunRecord(losses=[*common, (3, 1.9)]))
    run = Continuation(str(llama), 1)
    assert latest_valid_checkpoint(tmp_path, run=run) == again
    again.write_bytes(b"torn")
    assert latest_valid_checkpoint(tmp_path, run=run) == abandoned, "nobody says any more that it was left"


def test_a_run_with_other_settings_in_the_same_folder_is_passed_over_by_name(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = save_file(tmp_path / "own.ckpt", step=4, run="a", config=settings_of(epochs=2))
    foreign = save_file(tmp_path / "foreign.ckpt", step=9, run="b", config=settings_of(seed=2, data="b"))
    run = Continuation(str(llama), 1, config=settings_of())
    with caplog.at_level(logging.WARNING, "pdtrim_pl.checkpoints.continuation"):
        assert latest_valid_checkpoint(tmp_path, run=run) == own
    said = (
        f"Checkpoint {foreign} is passed over: It is of another run: its settings differ in `seed_everything`, `data`."
    )
    assert caplog.messages == [said]
    own.write_bytes(b"torn")
    assert latest_valid_checkpoint(tmp_path, run=run) == foreign, "one run alone may go on with other settings"


def test_a_run_that_went_on_with_other_settings_is_one_run(llama: Path, tmp_path: Path) -> None:
    furthest = save_file(tmp_path / "4.ckpt", step=4, run="a", config=settings_of(data="b"))
    save_file(tmp_path / "2.ckpt", step=2, run="a", config=settings_of())
    save_file(tmp_path / "9.ckpt", step=9, run="b", config=settings_of(seed=2))
    run = Continuation(str(llama), 1, config=settings_of())
    assert latest_valid_checkpoint(tmp_path, run=run) == furthest


def test_several_runs_of_which_none_has_these_settings_are_refused_by_name(llama: Path, tmp_path: Path) -> None:
    for run in ("a", "b"):
        save_file(tmp_path / f"{run}.ckpt", step=4, run=run, config=settings_of(data=run))
    with pytest.raises(ValueError, match=r"of 2 runs, and none has.*a.ckpt \(step 4, other `data`\).*`--ckpt_path`"):
        latest_valid_checkpoint(tmp_path, run=Continuation(str(llama), 1, config=settings_of(data="c")))


@pytest.mark.parametrize("name", ["../x", "*", "a/b", "a" * 65, 7, None])
def test_a_checkpoint_whose_run_is_no_name_is_refused(name: object, tmp_path: Path) -> None:
    state = state_of(student_of()).to_json()
    assert CheckpointState.from_json({**state, "run": ""}).run == "", "runs from before they had names"
    with pytest.raises(ValueError, match=r"`run` is .*at most 64 letters, digits, _ and -"):
        CheckpointState.from_json({**state, "run": name})


def test_a_link_to_a_checkpoint_that_is_gone_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").symlink_to(tmp_path / "gone.ckpt")
    assert latest_valid_checkpoint(tmp_path) is None


@pytest.mark.parametrize("kind", ["processes", "shards"])
def test_a_foreign_checkpoint_that_is_named_outright_is_refused(kind: str, llama: Path, tmp_path: Path) -> None:
    make, reason = FOREIGN_FILES[kind]
    path = make(tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match=reason):
        CheckpointState.of(PlanCheckpointIO().load_checkpoint(path)).check_processes(1)


# What the processes of a run have found


def test_processes_that_found_different_checkpoints_are_refused() -> None:
    def ranks(*found: str | None) -> Parallel:
        parallel = Parallel()
        parallel.size, parallel.gather = len(found), lambda value: list(found)  # type: ignore[method-assign]
        return parallel

    check_same_checkpoint(Parallel(), None)
    check_same_checkpoint(ranks("a.ckpt", "a.ckpt"), Path("a.ckpt"))
    with pytest.raises(ValueError, match=r"rank 0, 2 from a.ckpt; rank 1 from the beginning.*start again in a minute"):
        check_same_checkpoint(ranks("a.ckpt", None, "a.ckpt"), "a.ckpt")


# Kills in the middle of a save of shards


class Killed(BaseException):
    """In place of SIGKILL: nothing catches it."""


def killed_after(steps: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Put a directory in place, but die instead of the call number `steps` that changes the disk; whether it died."""
    left = count()

    def may_die(change: Callable[..., None]) -> Callable[..., None]:
        def changed(*args: Any, **kwargs: Any) -> None:
            if next(left) == steps:
                raise Killed
            change(*args, **kwargs)

        return changed

    with monkeypatch.context() as patch:
        for name in ("replace", "rmdir", "unlink"):
            patch.setattr(os, name, may_die(getattr(os, name)))
        try:
            put_in_place(path)
        except Killed:
            return True
    return False


def test_a_kill_while_a_checkpoint_gets_its_name_loses_neither_the_new_one_nor_leaves_the_old_one(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Continuation(str(llama), 2, 2)
    for step in count():
        folder = tmp_path / str(step)
        path = folder / "last.ckpt"
        save_shards(path, loss=1.0)
        save_shards(unfinished(path), loss=2.0)
        died = killed_after(step, path, monkeypatch)
        newest = latest_valid_checkpoint(folder, run=run)
        assert newest is not None
        assert losses(newest) == [(1, 2.0)]
        for found in folder.iterdir():
            assert not is_whole(found) or all((found / name).is_file() for name in (*SHARDS, *UNLISTED))
        settle(folder)
        assert losses(path) == [(1, 2.0)]
        assert not list(folder.glob("*.unfinished")) + list(folder.glob("*.earlier"))
        if not died:
            break
    assert step >= 4, "one to put aside, one to rename, and some to delete"


def losses(path: Path) -> list[tuple[int, float]]:
    state = CheckpointState.at(path)
    assert state is not None
    return state.record.losses


def test_a_save_that_a_kill_cut_short_counts_for_nothing_and_goes(llama: Path, tmp_path: Path) -> None:
    path = save_shards(tmp_path / "last.ckpt", loss=1.0)
    Path(unfinished(path), "checkpoint").mkdir(parents=True)
    (tmp_path / "step=4.ckpt.unfinished").write_bytes(b"half of a file")
    assert latest_valid_checkpoint(tmp_path, run=Continuation(str(llama), 2, 2)) == path
    settle(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_run_whose_first_save_was_cut_short_starts_at_the_beginning(tmp_path: Path) -> None:
    Path(unfinished(tmp_path / "last.ckpt")).mkdir()
    assert latest_valid_checkpoint(tmp_path) is None


def test_a_checkpoint_that_was_put_aside_for_one_that_is_damaged_is_found_and_gets_its_name_back(
    llama: Path, tmp_path: Path
) -> None:
    path = tmp_path / "last.ckpt"
    aside = save_shards(earlier(path), loss=1.0)
    Path(unfinished(path)).mkdir()
    assert latest_valid_checkpoint(tmp_path, run=Continuation(str(llama), 2, 2)) == aside
    settle(tmp_path)
    assert losses(path) == [(1, 1.0)]


def test_a_checkpoint_that_was_put_aside_for_one_that_tore_gets_its_name_back(llama: Path, tmp_path: Path) -> None:
    path = torn("one cut", tmp_path / "last.ckpt")
    aside = save_shards(earlier(path), loss=1.0)
    assert latest_valid_checkpoint(tmp_path, run=Continuation(str(llama), 2, 2)) == aside
    settle(tmp_path)
    assert losses(path) == [(1, 1.0)]
    assert not Path(earlier(path)).exists()


def test_a_settled_checkpoint_has_its_own_plan_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    student = student_of()
    state_of(student_of()).write_beside(path)
    student.apply_plan(student.plan.drop("decode", 2))
    save_shards(unfinished(path), student)
    settle(tmp_path)
    assert json.loads(sidecar(path, "stage_plan.json").read_text()) == student.plan.to_json()


class Payload:
    """Leaves a file behind when it is unpickled by somebody who does not look."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (open, (self.path, "w"))


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_shards_that_would_run_code_are_refused_unrun(name: str, tmp_path: Path) -> None:
    path, ran = save_shards(tmp_path / "last.ckpt"), tmp_path / "ran"
    (path / "checkpoint" / "shard_0.pt").unlink()
    (path / "checkpoint" / "shard_1.pt").unlink()
    ShardedCheckpoint.of(2, 1, student_of(), state_of(student_of()).to_json()).save(path)
    torch.save({"module": {}}, path / "checkpoint" / "mp_rank_00_model_states.pt")
    torch.save({"module": {}, "more": Payload(ran)}, path / "checkpoint" / name)
    with pytest.raises(ValueError, match=r"The shard .*states.pt is not loaded: it holds more than tensors .*run code"):
        read_sharded(path)
    assert not ran.exists()


def test_what_deepspeed_itself_writes_into_shards_is_harmless(tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    (tmp_path / "checkpoint").mkdir()
    file = tmp_path / "checkpoint" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save(
        {
            "loss_scaler": LossScaler(scale=1.0), "other": DynamicLossScaler(2.0, 2.0, 10, 1.0, 1, False),
            "zero_stage": ZeroStageEnum(2), "address": fragment_address(3, 1), "states": [torch.ones(2)],
        },
        file,
    )  # fmt: skip
    check_harmless(tmp_path)
    file.write_bytes(b"half")
    with pytest.raises(ValueError, match=r"The shard .* cannot be read"):
        check_harmless(tmp_path)


def test_what_lies_beside_shards_does_not_count(tmp_path: Path) -> None:
    """The files beside are written first: a kill may leave those of a save that has not taken the name yet."""
    path = save_shards(tmp_path / "last.ckpt")
    before = CheckpointState.at(path)
    assert before is not None
    replace(before, plan=before.plan.drop("decode", 2)).write_beside(path)
    assert CheckpointState.at(path) == before
