"""The JSON formats: what the package writes is valid, what is damaged is not."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from strategies import plans, policies

from pdtrim_pl.export.schemas import SCHEMAS, schema_of, validate, validate_file
from pdtrim_pl.plan import (
    PLAN_FORMAT,
    POLICY_FORMAT,
    KVRetentionPolicy,
    KVShape,
    ModelRef,
    Removal,
    Retention,
    StagePlan,
)

PLAN = StagePlan(
    ModelRef("tiny", "llama", 6),
    prefill=(0, 1, 2, 4),
    decode=(0, 2, 5),
    relation="free",
    merged={"decode": {2: (1, 2)}},
    untied={"decode": (2,)},
    history=(Removal(0, "prefill", "drop", 3, "cosine", 0.9), Removal(1, "decode", "merge", 1, "fit", None)),
)
POLICY = KVRetentionPolicy("prefill", KVShape(2, 8), {2: Retention("first_last", 4, 0.2)})

Corruption = Callable[[dict[str, Any]], Any]


def through_text(data: Any) -> Any:
    return json.loads(json.dumps(data, allow_nan=False))


@pytest.mark.parametrize("format", SCHEMAS)
def test_the_schemas_are_valid_json_schemas(format: str) -> None:
    Draft202012Validator.check_schema(schema_of(format))


@given(plan=plans(7))
def test_every_plan_that_is_written_is_valid_and_read_back_equal(plan: StagePlan) -> None:
    data = through_text(plan.to_json())
    validate(data, PLAN_FORMAT)
    assert StagePlan.from_json(data) == plan


@given(data=st.data())
def test_every_policy_that_is_written_is_valid_and_read_back_the_same(data: st.DataObject) -> None:
    plan = data.draw(plans(7))
    policy = data.draw(policies(plan, codecs=True))
    written = through_text(policy.to_json(plan))
    validate(written, POLICY_FORMAT)
    read = KVRetentionPolicy.from_json(written)
    assert through_text(read.to_json(plan)) == written
    for block in plan.decode:
        for positions in (0, 1, 7, 100):
            assert _sent(read.rule(block), positions) == _sent(policy.rule(block), positions)


def _sent(rule: Retention, positions: int) -> set[int]:
    first, last = rule.counts(positions)
    return {*range(first), *range(positions - last, positions)}


@pytest.mark.parametrize(
    ("corrupt", "fault"),
    [
        (lambda plan: plan.pop("relation"), r"at \$: 'relation' is a required property"),
        (lambda plan: plan.update(relation="loose"), r"relation: 'loose' is not one of"),
        (lambda plan: plan.update(boundary=None), "boundary: None is not one of"),
        (lambda plan: plan["model"].update(num_blocks="6"), "model.num_blocks: '6' is not of type 'integer'"),
        (lambda plan: plan["prefill"].update(blocks=[]), "prefill.blocks: .* non-empty"),
        (lambda plan: plan["prefill"].update(blocks=[0, 0.5]), r"prefill.blocks\[1\]: 0.5 is not of type 'integer'"),
        (lambda plan: plan["decode"].update(blocks=[0, 0]), "decode.blocks: .* non-unique"),
        (lambda plan: plan["decode"].update(blocks=[-1]), "-1 is less than the minimum"),
        (lambda plan: plan["decode"].update(kv_only=[]), "kv_only"),
        (lambda plan: plan["merged"].update(encode={}), "encode"),
        (lambda plan: plan["merged"]["decode"].update({"02": [2, 3]}), "02"),
        (lambda plan: plan["merged"]["decode"].update({"4": [4]}), "merged.decode.*too short"),
        (lambda plan: plan["untied"].update(decode="2"), "untied.decode: '2' is not of type 'array'"),
        (lambda plan: plan["history"][0].update(action="split"), "action: 'split' is not one of"),
        (lambda plan: plan["history"][0].pop("score"), "'score' is a required property"),
    ],
)
def test_a_damaged_plan_is_not_valid(corrupt: Corruption, fault: str) -> None:
    data = through_text(PLAN.to_json())
    validate(data, PLAN_FORMAT)
    corrupt(data)
    with pytest.raises(ValueError, match=fault):
        validate(data, PLAN_FORMAT)


@pytest.mark.parametrize(
    ("corrupt", "fault"),
    [
        (lambda policy: policy.pop("kv"), "'kv' is a required property"),
        (lambda policy: policy["kv"].update(dtype="int8"), "kv.dtype: 'int8' is not one of"),
        (lambda policy: policy["kv"].update(head_dim=0), "head_dim: 0 is less than the minimum"),
        (lambda policy: policy.update(blocks=[]), "blocks: .* non-empty"),
        (lambda policy: policy["blocks"][0].pop("decode"), "'decode' is a required property"),
        (lambda policy: policy["blocks"][0].update(keep="some"), "keep: 'some' is not one of"),
        (lambda policy: policy["blocks"][0].update(first=3), r"blocks\[0\]: .*'first': 3.* should not be valid"),
        (lambda policy: policy["blocks"][1].update(first=0, last=0), "should not be valid under"),
        (lambda policy: policy["blocks"][1].update(last=1.5), "last: 1.5 is greater"),
        (lambda policy: policy["blocks"][1].update(first=-1), "first: -1 is not valid"),
        (lambda policy: policy["blocks"][1].update(first=0.0, last=True), "last: True is not valid"),
        (lambda policy: policy["blocks"][1].pop("last"), "'last' is a required property"),
        (lambda policy: policy["blocks"][2].update(prefill="none"), "prefill: 'none' is not of type"),
        (lambda policy: policy["reduction"][0].update(ratio="4x"), "ratio: '4x' is not of type"),
    ],
)
def test_a_damaged_policy_is_not_valid(corrupt: Corruption, fault: str) -> None:
    data = through_text(POLICY.to_json(PLAN))
    validate(data, POLICY_FORMAT)
    assert data["blocks"][2]["prefill"] is None, "block 5 is KV-only"
    corrupt(data)
    with pytest.raises(ValueError, match=fault):
        validate(data, POLICY_FORMAT)


def test_a_file_is_checked_by_the_format_it_names(tmp_path: Path) -> None:
    path = tmp_path / "any-name.json"
    PLAN.save(path)
    assert validate_file(path) == through_text(PLAN.to_json())
    POLICY.save(path, PLAN)
    assert validate_file(path) == through_text(POLICY.to_json(PLAN))


def test_a_file_of_another_format_version_is_named(tmp_path: Path) -> None:
    path = tmp_path / "stage_plan.json"
    newer = copy.deepcopy(PLAN.to_json()) | {"format": "pdtrim.stage_plan/3"}
    path.write_text(json.dumps(newer))
    with pytest.raises(
        ValueError, match=r"stage_plan\.json cannot be used.*'pdtrim.stage_plan/3'.*pdtrim.stage_plan/2"
    ):
        validate_file(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"stage_plan\.json cannot be used.*`format` None"):
        validate_file(path, PLAN_FORMAT)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no stage plan or KV policy at .*gone\.json"):
        validate_file(tmp_path / "gone.json")
    path = tmp_path / "kv_policy.json"
    path.write_text('{"format": ')
    with pytest.raises(ValueError, match=r"kv_policy\.json is not valid JSON"):
        validate_file(path)
