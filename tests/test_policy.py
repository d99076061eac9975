"""The KV retention policy: counts, bytes, faults, JSON."""

from __future__ import annotations

import copy
import json
import pickle
from math import ceil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import plans, policies

from pdtrim_pl.plan import KVRetentionPolicy, KVShape, ModelRef, Retention, StagePlan, handled_positions

MODEL = ModelRef("tiny", "llama", 6)
PLAN = StagePlan.full(MODEL).drop("decode", 3)
SHAPE = KVShape(3, 64, "bfloat16")


@given(
    st.one_of(st.integers(0, 40), st.floats(0.01, 1.0).map(lambda x: round(x, 2))),
    st.one_of(st.integers(1, 40), st.floats(0.01, 1.0).map(lambda x: round(x, 2))),
    st.integers(0, 100),
)
def test_counts_never_overlap_and_never_exceed_the_prompt(first: float, last: float, positions: int) -> None:
    head, tail = Retention("first_last", first, last).counts(positions)
    assert 0 <= head <= positions
    assert 0 <= tail <= positions - head
    asked = [v if isinstance(v, int) else ceil(round(v * 100) * positions / 100) for v in (first, last)]
    assert head + tail == min(positions, sum(asked))


def test_a_count_and_an_equal_share_are_different_rules() -> None:
    count, share = Retention("first_last", 1), Retention("first_last", 1.0)
    assert count != share
    assert len({count, share, Retention("first_last", 1)}) == 2


def test_a_share_is_the_decimal_it_is_written_as() -> None:
    assert Retention("first_last", 0, 0.07).kept(100) == 7, "0.07 * 100 is 7.000000000000001 in floating point"
    assert Retention("first_last", 0, 0.2).kept(11) == 3, "shares are rounded up"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("first_last", -1, 3), "`first` is -1"),
        (("first_last", 1, 1.5), "`last` is 1.5"),
        (("first_last", 1, 0.0), "`last` is 0.0"),
        (("first_last", True, 3), "`first` is True"),
        (("first_last", 0, 0), "would send nothing"),
        (("all", 1, 0), "belong to `keep: first_last`"),
        (("some", 0, 0), "`keep` is 'some'"),
    ],
)
def test_a_rule_out_of_range_is_refused(arguments: tuple[str, float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Retention(*arguments)  # type: ignore[arg-type]


def test_bytes_follow_the_formula_and_the_reduction_is_against_the_unpruned_model() -> None:
    policy = KVRetentionPolicy("prefill", SHAPE, {1: Retention("first_last", 4, 0.2)})
    per_position = 2 * 3 * 64 * 2
    assert policy.sent_bytes(PLAN, 100) == per_position * (4 * 100 + 24)
    assert policy.full_bytes(PLAN, 100) == per_position * 6 * 100
    row = policy.reduction(PLAN, [100])[0]
    assert row == {"prompt_tokens": 100, "full_bytes": 460800, "sent_bytes": 325632, "ratio": round(600 / 424, 4)}


def test_under_boundary_decode_the_last_prompt_token_is_not_sent() -> None:
    assert handled_positions(100, "decode") == 99
    assert handled_positions(0, "decode") == 0


def test_a_policy_for_a_block_outside_d_is_refused() -> None:
    policy = KVRetentionPolicy("prefill", SHAPE, {3: Retention("first_last", 1, 1)})
    with pytest.raises(ValueError, match=r"rules for block\(s\) \[3\], which decode does not run"):
        policy.check(PLAN)
    assert policy.restricted_to(PLAN).rules == {}


def test_a_policy_for_another_boundary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`boundary: decode` and the plan `boundary: prefill`"):
        KVRetentionPolicy("decode", SHAPE).check(PLAN)


def test_positions_in_the_file_are_those_of_the_exported_checkpoints() -> None:
    plan = StagePlan(MODEL, (0, 2, 5), (0, 1, 5), "free")
    data = KVRetentionPolicy("prefill", SHAPE, {5: Retention("first_last", 4, 0.2)}).to_json(plan)
    assert data["blocks"] == [
        {"original": 0, "prefill": 0, "decode": 0, "keep": "all"},
        {"original": 1, "prefill": None, "decode": 1, "keep": "all"},
        {"original": 5, "prefill": 2, "decode": 2, "keep": "first_last", "first": 4, "last": 0.2},
    ]


def test_a_share_of_one_is_written_as_all() -> None:
    policy = KVRetentionPolicy("prefill", SHAPE, {1: Retention("first_last", 1.0, 3)})
    assert policy.to_json(PLAN)["blocks"][1] == {"original": 1, "prefill": 1, "decode": 1, "keep": "all"}


def test_a_saved_policy_is_read_back_equal(tmp_path: Path) -> None:
    rules = {block: Retention("first_last", 4, 0.25) if block % 2 else Retention() for block in PLAN.decode}
    policy = KVRetentionPolicy("prefill", SHAPE, rules)
    policy.save(tmp_path / "policy.json", PLAN)
    assert KVRetentionPolicy.load(tmp_path / "policy.json", PLAN) == policy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "pdtrim.kv_policy/3"}, "`format` 'pdtrim.kv_policy/3'"),
        ({"blocks": None}, "malformed"),
        ({"kv": {"num_key_value_heads": 0, "head_dim": 64, "dtype": "bfloat16"}}, "at least one head"),
        ({"kv": {"num_key_value_heads": 3, "head_dim": 64, "dtype": "int3"}}, "`kv.dtype` is 'int3'"),
    ],
)
def test_a_broken_policy_file_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps({**KVRetentionPolicy("prefill", SHAPE).to_json(PLAN), **change}))
    with pytest.raises(ValueError, match=message):
        KVRetentionPolicy.load(path)


@given(st.data())
def test_plans_and_policies_can_be_pickled_and_copied(data: st.DataObject) -> None:
    plan = data.draw(plans(6))
    policy = data.draw(policies(plan, codecs=True))
    for original in (plan, policy):
        for again in (pickle.loads(pickle.dumps(original)), copy.deepcopy(original)):
            assert again == original
            assert type(again) is type(original)
