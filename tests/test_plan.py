"""The stage plan: relations, drops, merges, faults, JSON."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdtrim_pl.plan import STAGES, ModelRef, StagePlan

MODEL = ModelRef("tiny", "llama", 6)
FULL = StagePlan.full(MODEL)


def test_the_full_plan_runs_every_block_in_both_stages() -> None:
    assert FULL.prefill == FULL.decode == (0, 1, 2, 3, 4, 5)
    assert FULL.kv_only == FULL.removed("prefill") == ()


def test_under_nested_a_decode_drop_leaves_prefill_alone_and_a_prefill_drop_leaves_both() -> None:
    plan = FULL.drop("decode", 3).drop("prefill", 2)
    assert plan.prefill == (0, 1, 3, 4, 5)
    assert plan.decode == (0, 1, 4, 5)
    assert [(entry.stage, entry.block) for entry in plan.history] == [("decode", 3), ("prefill", 2), ("decode", 2)]


def test_under_nested_prefill_first_takes_what_decode_has_lost() -> None:
    assert FULL.candidates("prefill") == (1, 2, 3, 4)
    plan = FULL.drop("decode", 3)
    assert plan.candidates("prefill") == (3,)
    assert plan.drop("prefill", 3).candidates("prefill") == (1, 2, 4)


def test_under_free_a_prefill_drop_makes_a_kv_only_block() -> None:
    plan = StagePlan.full(MODEL, "free").drop("prefill", 2)
    assert plan.kv_only == (2,)
    assert plan.decode == FULL.decode


def test_under_unified_only_both_stages_can_lose_a_block() -> None:
    plan = StagePlan.full(MODEL, "unified")
    assert plan.drop("both", 2).prefill == plan.drop("both", 2).decode == (0, 1, 3, 4, 5)
    with pytest.raises(ValueError, match=r"`stage: decode` does not fit `relation: unified`"):
        plan.drop("decode", 2)


def test_under_prefill_only_decode_keeps_every_block() -> None:
    plan = StagePlan.full(MODEL, "prefill_only").drop("prefill", 2)
    assert plan.kv_only == (2,)
    with pytest.raises(ValueError, match=r"does not fit `relation: prefill_only`"):
        plan.drop("decode", 2)


@given(st.data(), st.sampled_from(["nested", "unified", "prefill_only", "free"]))
def test_any_row_of_drops_keeps_the_relation_and_its_history_tells_all(data: st.DataObject, relation: str) -> None:
    plan = StagePlan.full(MODEL, relation)  # type: ignore[arg-type]
    targets = {"unified": ["both"], "prefill_only": ["prefill"]}.get(relation, ["prefill", "decode", "both"])
    for _ in range(data.draw(st.integers(0, 6))):
        target = data.draw(st.sampled_from(targets))
        candidates = plan.candidates(target)  # type: ignore[arg-type]
        if not candidates:
            break
        plan = plan.drop(target, data.draw(st.sampled_from(candidates)))  # type: ignore[arg-type]
    for stage in STAGES:
        told = sorted(entry.block for entry in plan.history if entry.stage == stage)
        assert told == list(plan.removed(stage))
        assert {0, 5} <= set(plan.blocks(stage)), "the guards keep the first and last block"
    assert StagePlan.from_json(plan.to_json()) == plan


def test_a_merge_stands_for_its_run_and_is_told_in_the_history() -> None:
    plan = FULL.merge("decode", (3, 4), into=3)
    assert plan.decode == (0, 1, 2, 3, 5)
    assert plan.merged["decode"] == {3: (3, 4)}
    assert plan.untied["decode"] == (3,)
    assert [(entry.action, entry.block) for entry in plan.history] == [("merge", 4)]
    twice = plan.merge("decode", (2, 3), into=2)
    assert twice.merged["decode"] == {2: (2, 3, 4)}
    assert StagePlan.from_json(twice.to_json()) == twice


def test_a_dropped_block_takes_its_merge_and_its_own_weights_with_it() -> None:
    plan = FULL.merge("decode", (3, 4), into=3).drop("decode", 3)
    assert plan.merged["decode"] == {}
    assert plan.untied["decode"] == ()


def test_under_unified_a_merge_is_made_in_both_stages() -> None:
    plan = StagePlan.full(MODEL, "unified").merge("both", (3, 4), into=4, untied=False)
    assert plan.merged["prefill"] == plan.merged["decode"] == {4: (3, 4)}
    assert plan.untied == {"prefill": (), "decode": ()}


def test_under_nested_a_prefill_merge_is_made_in_both_stages() -> None:
    plan = FULL.merge("prefill", (3, 4), into=3)
    assert plan.merged["prefill"] == plan.merged["decode"] == {3: (3, 4)}


@pytest.mark.parametrize(("run", "into"), [((1, 5), 1), ((2, 3), 4), ((2,), 2)])
def test_only_neighbours_can_be_merged(run: tuple[int, ...], into: int) -> None:
    with pytest.raises(ValueError, match=r"Cannot merge .* in `decode`: give at least two neighbours"):
        FULL.merge("decode", run, into=into)


def test_dropping_the_last_block_of_a_stage_is_refused() -> None:
    plan = StagePlan(MODEL, (0, 1), (1,))
    with pytest.raises(ValueError, match=r"would leave the `decode` stage without blocks.*`schedule`"):
        plan.drop("decode", 1)
    assert plan.candidates("decode", 0, 0) == ()


def test_dropping_a_block_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Cannot drop block 2 from `decode`: it is not there"):
        FULL.drop("decode", 2).drop("decode", 2)


def test_an_unknown_stage_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Unknown `stage` 'encode': choose one of prefill, decode, both"):
        FULL.drop("encode", 2)  # type: ignore[arg-type]


def test_all_faults_of_a_plan_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"`prefill` has no blocks.*`decode.blocks` names \[9\].*nested"):
        StagePlan(MODEL, (), (1, 9))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prefill": (0, 0, 1), "decode": (0,)}, "must be rising and without repeats"),
        ({"prefill": (0, 1), "decode": (0, 1, 2)}, "prefill lacks \\[2\\]"),
        ({"prefill": (0, 1), "decode": (0,), "relation": "unified"}, "wants equal stages"),
        ({"prefill": (0, 1), "decode": (0,), "relation": "prefill_only"}, "wants every block in decode"),
        ({"prefill": (0, 1), "decode": (0,), "relation": "loose"}, "`relation` is 'loose'"),
        ({"prefill": (0, 1), "decode": (0,), "boundary": "middle"}, "`boundary` is 'middle'"),
        ({"prefill": (0.0, 1.0), "decode": (0,)}, r"must be whole numbers"),
        ({"prefill": (0, 1), "decode": (0,), "untied": {"decode": (1,)}}, "`untied.decode` names \\[1\\]"),
        ({"prefill": (0, 1), "decode": (0,), "untied": {"both": (1,)}}, "unknown stage\\(s\\) \\['both'\\]"),
        ({"prefill": (0, 1), "decode": (0, 1), "merged": {"decode": {0: (0, 1)}}}, "which the stage still runs"),
        ({"prefill": (0, 1), "decode": (0,), "merged": {"decode": {1: (0, 1)}}}, "must be a block of that stage"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StagePlan(MODEL, **kwargs)  # type: ignore[arg-type]


def test_a_plan_file_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"format": "pdtrim.stage_plan/9"}')
    with pytest.raises(
        ValueError, match=r"plan.json: .*`format` 'pdtrim.stage_plan/9', and this version of pdtrim_pl reads"
    ):
        StagePlan.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not valid JSON"), ('{"format": "pdtrim.stage_plan/1"}', "malformed near 'model'")],
)
def test_a_broken_plan_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        StagePlan.load(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("merged", {"prefil": {}}), ("untied", {"prefil": [1]}), ("widths", {"prefil": {"1": {"channels": "0-3"}}})],
)
def test_a_plan_file_that_names_an_unknown_stage_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` names the unknown stage\(s\) \['prefil'\]"):
        StagePlan.from_json({**FULL.to_json(), name: value})


@pytest.mark.parametrize("name", ["merged", "untied", "widths"])
def test_a_plan_file_with_a_list_in_place_of_stages_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="malformed near"):
        StagePlan.from_json({**FULL.to_json(), name: [1]})


def test_a_missing_plan_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no stage plan at .*nowhere.json"):
        StagePlan.load(tmp_path / "nowhere.json")


def test_a_saved_plan_is_read_back_equal(tmp_path: Path) -> None:
    plan = FULL.drop("decode", 3, round=1, criterion="kl", score=0.25).merge("prefill", (1, 2), into=1)
    plan.save(tmp_path / "plan.json")
    assert StagePlan.load(tmp_path / "plan.json") == plan


def test_kv_only_blocks_that_do_not_follow_from_the_blocks_are_refused() -> None:
    data = StagePlan.full(MODEL, "free").drop("prefill", 2).to_json()
    data["prefill"]["kv_only"] = [3]
    with pytest.raises(ValueError, match=r"`prefill.kv_only` is \[3\]"):
        StagePlan.from_json(data)


def test_plan_and_policy_import_no_torch() -> None:
    code = "import sys, pdtrim_pl.plan, pdtrim_pl.checkpoints.run_record; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0
