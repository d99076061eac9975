"""What only the real engine shows, on two CPU processes: dropped blocks stand still, bf16, offload, full disks."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from deepspeed_run import INTERRUPTED, WHOLE, fit
from full_disk_run import FULL
from process_group import run_ranks, run_script
from tiny_models import TIED, saved_tiny_model, tiny_model

pytestmark = pytest.mark.slow
TIMEOUT = 600
CURED = tuple(name for name, run in WHOLE.items() if run.without is None)
EXACT = tuple(name for name in CURED if "bf16" not in name and "frozen" not in name)
RECOMPUTED = tuple(name for name in CURED if "recomputed" in name)
BF16 = tuple(name for name in CURED if "bf16" in name)
Told = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def model(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks and tied embeddings."""
    return saved_tiny_model(tmp_path_factory.mktemp("model"), tiny_tokenizer_dir, **TIED)


@pytest.fixture(scope="module")
def told(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Told]:
    """What both processes say of every run."""
    folder = tmp_path_factory.mktemp("deepspeed")
    run_ranks("deepspeed_run.py", str(model), str(folder), folder=folder, timeout=TIMEOUT)
    return [json.loads((folder / f"told-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(model: Path) -> Told:
    """The same runs in one process, without an engine."""
    runs = {precision: fit(model, "auto", 1, precision=precision)[0] for precision in ("32-true", "bf16-mixed")}
    return {name: module.record.to_json() for name, module in runs.items()}


def losses(run: dict[str, Any]) -> list[float]:
    return [loss for _, loss in run["losses"]]


@pytest.mark.parametrize("name", EXACT)
def test_two_processes_train_what_one_trains(name: str, told: list[Told], alone: Told) -> None:
    whole = alone["32-true"]
    assert losses(told[0][name]) == pytest.approx(losses(whole), abs=1e-5)
    for (_, ours), (_, theirs) in zip(told[0][name]["validations"], whole["validations"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("name", RECOMPUTED)
def test_zero_3_with_gradient_checkpointing_trains_what_one_process_trains_without(
    name: str, told: list[Told], model: Path
) -> None:
    """Also where a block that runs is frozen, and where Taylor's backward pass comes in between."""
    module, watch = fit(model, "auto", 1, recompute=True, frozen=WHOLE[name].frozen)
    assert module.student.gradient_checkpointing
    for rank in told:
        assert losses(rank[name]) == pytest.approx([loss for _, loss in module.record.losses], abs=1e-5)
        assert rank[name]["taylor"] == pytest.approx(watch.taylor, rel=1e-3)
        assert rank[name]["frozen stays"] == WHOLE[name].frozen
    assert min(watch.taylor) > 0
    if WHOLE[name].frozen:
        assert losses(told[0][name]) != pytest.approx(losses(told[0]["zero3 recomputed"]), abs=1e-4)


@pytest.mark.parametrize("name", BF16)
def test_two_processes_train_in_bf16_what_one_trains_in_bf16(name: str, told: list[Told], alone: Told) -> None:
    for rank in told:
        assert rank[name]["types"] == {"student": ["torch.bfloat16"], "teacher": ["torch.bfloat16"]}
        assert rank[name]["tables are exact"] == {"student": [True, True], "teacher": [True, True]}
    # The engine keeps an fp32 copy of the weights, and so does the one process; the run gains 1.0.
    assert losses(told[0][name]) == pytest.approx(losses(alone["bf16-mixed"]), abs=1e-2)
    assert losses(told[0][name]) != pytest.approx(losses(alone["32-true"]), abs=1e-4)


@pytest.mark.parametrize("name", CURED)
def test_a_dropped_block_stands_still(name: str, told: list[Told]) -> None:
    for rank in told:
        before, *after = rank[name]["moves"]
        assert before > 1e-3
        assert after == [0.0] * 4


def test_a_dropped_block_that_is_not_frozen_gets_its_last_gradient_again_under_zero_3(told: list[Told]) -> None:
    """Why `freeze_unused` is called: DeepSpeed's stale gradients."""
    for rank in told:
        assert min(rank["zero3 not frozen"]["moves"][1:]) > 1e-3
    ours, cured = told[0]["zero3 not frozen"]["norms"], told[0]["zero3"]["norms"]
    assert ours[:2] == cured[:2]
    assert all(norm > 1.04 * right for norm, right in zip(ours[2:], cured[2:], strict=True)), "it is clipped for it too"


def test_an_offloaded_optimizer_gets_the_last_gradient_of_a_dropped_block_again_though_it_is_frozen(
    told: list[Told],
) -> None:
    """Why `forget_gradients` is called."""
    for rank in told:
        assert min(rank["zero2 offloaded, gradients kept"]["moves"][1:]) > 1e-6


@pytest.mark.parametrize(
    ("name", "parts"),
    [("zero2 offloaded", ["cpu_offload"]), ("zero3 offloaded", ["offload_optimizer", "offload_param"])],
)
def test_the_engine_offloads_what_it_is_asked_to(name: str, parts: list[str], told: list[Told]) -> None:
    assert told[0][name]["offloaded"] == parts
    assert told[0][name.split()[0]]["offloaded"] == []


@pytest.mark.parametrize("name", INTERRUPTED)
def test_a_run_of_which_one_process_is_asked_to_leave_continues_to_the_same_end(name: str, told: list[Told]) -> None:
    for rank in told:
        run, whole = rank[f"{name} interrupted"], rank[name]
        assert run["status"] == 75
        assert len(run["moves"]) == 2, "three steps of the six were left"
        for what in ("losses", "validations", "weights"):
            assert run[what] == whole[what], what


@pytest.mark.parametrize("name", INTERRUPTED)
def test_a_checkpoint_that_a_kill_kept_from_its_name_is_continued_and_gets_it(name: str, told: list[Told]) -> None:
    for rank in told:
        assert rank[f"{name} interrupted"]["found"] == "last.ckpt.unfinished"
    left = told[0][f"{name} interrupted"]["left"]
    assert left == ["last.ckpt", "last.config.yaml", "last.stage_plan.json"]


@pytest.fixture(scope="module")
def without_room(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Told]:
    """What both processes say of the runs in which one of them runs out of room."""
    folder = tmp_path_factory.mktemp("full_disk")
    run_ranks("full_disk_run.py", str(model), str(folder), folder=folder, timeout=TIMEOUT)
    return [json.loads((folder / f"told-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_on_one_rank_ends_both_with_one_error_and_leaves_the_earlier_checkpoint(
    name: str, without_room: list[Told]
) -> None:
    _, rank = FULL[name]
    for told in without_room:
        said = rf"{name}/epoch=1.ckpt cannot be written \(rank {rank}, one of 1 that could not: .*untouched. Free some"
        assert re.search(said, told[name]["error"])
        assert told[name]["left"] == ["epoch=0.ckpt", "epoch=0.config.yaml", "epoch=0.stage_plan.json"]
        assert told[name]["steps"] == 4, "two of the six were saved"


def test_processes_that_found_different_checkpoints_do_not_start(without_room: list[Told]) -> None:
    for told in without_room:
        assert "rank 0 from step=0.ckpt; rank 1 from step=1.ckpt" in told["differing"]


@pytest.fixture(scope="module")
def loading(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes say of the loading of 134 MB of weights in many files; no block has more than 17 MB.

    Freed tensors go back to the system at once, so that memory says what is held and not what an allocator keeps.
    """
    folder = tmp_path_factory.mktemp("loading")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_key_value_heads": 4}
    model = tiny_model("llama", blocks=8, vocab_size=259, **sizes)
    model.save_pretrained(folder / "model", max_shard_size="20MB")
    shutil.copytree(tiny_tokenizer_dir, folder / "model", dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
        run_script("loading_run.py", str(folder / "model"), str(folder), folder=folder, timeout=TIMEOUT)
    size = sum(weight.numel() * weight.itemsize for weight in model.parameters())
    told = [json.loads((folder / f"told-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    return [{**rank, "peaks": [peak / size for peak in rank["peaks"]]} for rank in told]


def test_zero_3_cuts_up_the_teacher_with_the_student(loading: list[dict[str, Any]]) -> None:
    for rank in loading:
        assert rank["held"] == pytest.approx({"student": 0.5, "teacher": 0.5}, abs=0.02)


def test_loading_under_zero_3_makes_no_process_hold_a_whole_model(loading: list[dict[str, Any]]) -> None:
    for rank in loading:
        assert len(rank["peaks"]) == 2, "student and teacher"
        assert max(rank["peaks"]) < 0.75, "half of it, and what a block has"
