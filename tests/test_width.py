"""Widths: what a plan says of channels and heads, what gates make of it, what an export leaves out, what it costs."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from own_family import Arcee
from strategies import plans
from test_contract import BLOCKS, Batch, assert_same, forced
from test_cost import counted, parameter_bytes
from tiny_models import FAMILIES, tiny_model
from torch import Tensor

from pdtrim_pl.errors import UserError
from pdtrim_pl.export import load_stage
from pdtrim_pl.export.pair import export_pair
from pdtrim_pl.export.schemas import validate
from pdtrim_pl.models.architectures import architecture_of
from pdtrim_pl.plan import PARTS, PLAN_FORMAT, STAGES, ModelRef, StagePlan, Width
from pdtrim_pl.plan.width import numbers_of, ranges
from pdtrim_pl.sizing.cost import CostModel
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.description import reference_to

MODEL = ModelRef("tiny", "llama", BLOCKS, channels=48, heads=4, kv_heads=2)
FULL = StagePlan.full(MODEL)
FEW = Width(tuple(range(0, 48, 3)), (1, 2))
BATCH = Batch.random([7, 4], [5, 3], seed=1)
RESULTS = Path(__file__).parents[1] / "docs" / "results" / "plans"


def narrow_everywhere(plan: StagePlan, width: Width, *targets: str) -> StagePlan:
    for target in targets or ("both",):
        for block in plan.prefill:
            plan = plan.narrow(target, block, width)  # type: ignore[arg-type]
    return plan


# The plan


@given(st.sets(st.integers(0, 99), min_size=1))
def test_kept_numbers_are_written_as_ranges_and_read_back(numbers: set[int]) -> None:
    kept = tuple(sorted(numbers))
    assert numbers_of(ranges(kept)) == kept
    assert ranges(range(100)) == "0-99"


@given(st.data())
def test_every_plan_with_widths_is_valid_and_read_back_equal(data: st.DataObject) -> None:
    plan = data.draw(plans(BLOCKS, model=MODEL, parts=PARTS))
    written = json.loads(json.dumps(plan.to_json()))
    validate(written, PLAN_FORMAT)
    assert StagePlan.from_json(written) == plan
    assert pickle.loads(pickle.dumps(plan)) == copy.deepcopy(plan) == plan


@given(st.data())
def test_what_decode_keeps_prefill_keeps_under_nested_whatever_is_narrowed(data: st.DataObject) -> None:
    plan = data.draw(plans(BLOCKS, ["nested"], model=MODEL, parts=["channels"]))
    block = data.draw(st.sampled_from(plan.prefill))
    width = Width(tuple(range(data.draw(st.integers(1, 48)))))
    try:
        after = plan.narrow("prefill", block, width)
    except ValueError:
        assert not set(plan.width("decode", block).channels or range(48)) & set(width.channels or ())
        return
    assert after.width("prefill", block) == plan.width("prefill", block).within(width)
    assert block not in plan.decode or after.width("decode", block) == plan.width("decode", block).within(width)
    losing = [s for s in STAGES if block in plan.blocks(s) and after.width(s, block) != plan.width(s, block)]
    assert [(e.stage, e.action, e.part) for e in after.history[len(plan.history) :]] == [
        (stage, "narrow", "channels") for stage in losing
    ]


def test_a_width_that_keeps_everything_is_none() -> None:
    whole = Width(tuple(range(48)), (0, 1, 2, 3))
    assert replace(FULL, widths={"prefill": {1: whole}, "decode": {1: whole}}) == FULL
    assert FULL.narrow("both", 1, whole) == FULL


def test_a_dropped_block_takes_its_width_with_it_and_a_merged_one_keeps_its_own() -> None:
    narrow = FULL.narrow("both", 1, FEW).narrow("decode", 2, FEW)
    assert narrow.drop("decode", 1).widths == {"prefill": {1: FEW}, "decode": {2: FEW}}
    assert narrow.merge("decode", (1, 2), into=2).widths == {"prefill": {1: FEW}, "decode": {2: FEW}}


def test_a_stage_is_as_wide_as_its_widest_block() -> None:
    plan = narrow_everywhere(FULL, Width(tuple(range(30)))).narrow("decode", 2, FEW)
    assert plan.widest("prefill") == {"channels": 30}
    assert plan.widest("decode") == {"channels": 30, "heads": 4}
    assert FULL.widest("decode") == {}


def test_widths_cannot_be_changed() -> None:
    with pytest.raises(TypeError, match="does not support item assignment"):
        FULL.widths["decode"][1] = FEW  # type: ignore[index]


def test_a_width_from_another_process_is_found_among_those_of_this_one() -> None:
    made = "import pickle, sys; from pdtrim_pl.plan import Width; width = Width((0, 1)); hash(width); "
    sent = subprocess.run(
        [sys.executable, "-c", made + "sys.stdout.buffer.write(pickle.dumps(width))"], check=True, capture_output=True
    )
    assert pickle.loads(sent.stdout) in {Width((0, 1))}


@pytest.mark.parametrize(
    ("relation", "widths", "message"),
    [
        ("nested", {"prefill": {1: Width((0, 1))}}, r"nested` wants what decode keeps inside.*blocks \[1\]"),
        ("unified", {"decode": {1: FEW}}, r"unified` wants equal widths, but they differ in blocks \[1\]"),
        ("prefill_only", {"decode": {1: FEW}}, r"prefill_only` wants every block whole in decode, but \[1\]"),
        ("free", {"decode": {9: FEW}}, r"`widths.decode` names \[9\]"),
        ("free", {"both": {1: FEW}}, r"`widths` names the unknown stage\(s\) \['both'\]"),
        ("free", {"decode": {1: Width((1, 0))}}, r"`widths.decode.1.channels` must be rising numbers within 0..47"),
        ("free", {"decode": {1: Width(())}}, r"at least one"),
        ("free", {"decode": {1: Width((48,))}}, r"within 0..47"),
        ("free", {"decode": {1: Width(heads=(0, 1))}}, r"every KV head the same number.* leaves \[2, 0\]"),
        ("free", {"decode": {1: Width(heads=(0, 1, 2))}}, r"every KV head the same number.* leaves \[2, 1\]"),
    ],
)
def test_widths_that_cannot_be_run_are_refused(relation: str, widths: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(FULL, relation=relation, widths=widths)  # type: ignore[arg-type]


def test_widths_of_a_model_of_unknown_size_are_refused() -> None:
    with pytest.raises(ValueError, match="`model` does not say how many"):
        StagePlan.full(ModelRef("tiny", "llama", 4)).narrow("decode", 1, FEW)


@pytest.mark.parametrize("text", ["1-", "a", "1,,2", "-3"])
def test_text_that_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="neither a number nor a range"):
        numbers_of(text)


def test_a_range_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ValueError, match="has the range '5-3', which ends before it begins"):
        numbers_of("0-2,5-3")


@pytest.mark.parametrize("text", ["0-99999999999", "99999999999", "9" * 5000, "0-9999998,0-9999998", "1-" + "9" * 5000])
def test_a_text_that_names_more_than_any_block_has_is_refused_at_once(text: str) -> None:
    with pytest.raises(UserError, match="no block has more than 10,000,000 channels or heads"):
        numbers_of(text)


def test_a_plan_file_of_the_first_version_is_read() -> None:
    path = RESULTS / "nested_3" / "stage_plan.json"
    assert json.loads(path.read_text())["format"] == "pdtrim.stage_plan/1"
    assert StagePlan.load(path).widths == {"prefill": {}, "decode": {}}


# Gates


@torch.no_grad()
def logits_under(student: StagedCausalLM, plan: StagePlan) -> Tensor:
    request = BATCH.prompt_ids, BATCH.response_ids, BATCH.prompt_mask, BATCH.response_mask
    return student.logits(student(*request, plan=plan).hidden)


def staged_under(family: str, plan: StagePlan) -> StagedCausalLM:
    model = tiny_model(family, blocks=BLOCKS)
    return StagedCausalLM(model, replace(plan, model=reference_to(model, family)))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_narrow_block_is_one_whose_last_layers_do_not_read_what_is_lost(family: str) -> None:
    cuts = architecture_of(tiny_model(family).config).cuts
    width = Width(FEW.channels, FEW.heads if "heads" in cuts else None)
    narrow = staged_under(family, narrow_everywhere(replace(FULL, relation="unified"), width))
    zeroed = staged_under(family, replace(FULL, relation="unified"))
    for gate in zeroed.gates.values():
        for part, cut in cuts.items():
            weight = gate.block.get_submodule(cut.columns).get_parameter("weight")
            units = {"channels": 48, "heads": 4}[part]
            lost = [unit for unit in range(units) if unit not in (width.kept(part) or ())]
            weight.view(len(weight), units, -1)[:, lost] = 0.0
    assert_same(forced(narrow, BATCH), forced(zeroed, BATCH), BATCH.response_mask)
    assert not torch.allclose(forced(narrow, BATCH), logits_under(narrow, replace(narrow.plan, widths={})), atol=1e-2)


def test_two_threads_run_one_student_at_two_widths_at_once() -> None:
    student = staged_under("llama", FULL)
    wide = student.plan
    narrow = narrow_everywhere(wide, FEW)

    alone = [logits_under(student, wide), logits_under(student, narrow)]
    wrong: list[int] = []

    def work(which: int, plan: StagePlan) -> None:
        for _ in range(20):
            if not torch.equal(logits_under(student, plan), alone[which]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate((wide, narrow))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not torch.allclose(alone[0], alone[1])


def test_what_validation_has_seen_can_be_trained_on() -> None:
    student = staged_under("llama", narrow_everywhere(FULL, Width(FEW.channels)))
    with torch.inference_mode():
        forced(student, BATCH)
    forced(student, BATCH).square().mean().backward()
    kept = torch.zeros(48, dtype=torch.bool)
    kept[list(FEW.channels or ())] = True
    for gate in student.gates.values():
        for name in ("gate_proj", "up_proj"):
            gradient = gate.block.get_parameter(f"mlp.{name}.weight").grad
            assert gradient is not None
            assert not gradient[~kept].any()
            assert gradient[kept].any()


def test_a_copy_of_a_student_is_as_narrow() -> None:
    student = staged_under("llama", narrow_everywhere(FULL, FEW))
    expected = forced(student, BATCH)
    assert torch.equal(forced(copy.deepcopy(student), BATCH), expected)


def test_families_without_such_layers_are_refused_with_the_reason() -> None:
    plan = narrow_everywhere(FULL, Width(heads=(1, 2)))
    with pytest.raises(UserError, match="takes heads from block 0, and Phi3 blocks cannot lose them one by one"):
        staged_under("phi3", plan)
    model = tiny_model("llama", blocks=BLOCKS)
    with pytest.raises(UserError, match="takes heads from block 0, and Arcee blocks cannot lose them"):
        StagedCausalLM(model, replace(plan, model=reference_to(model)), architecture=Arcee())


def test_a_plan_of_a_wider_model_is_refused() -> None:
    student = StagedCausalLM(tiny_model("llama", blocks=BLOCKS, intermediate_size=40))
    plan = replace(FULL, model=replace(student.plan.model, channels=48))
    with pytest.raises(UserError, match="blocks have 48 channels, and the last layer behind them has 40 inputs"):
        student.apply_plan(plan.narrow("both", 1, FEW))


# Export and costs


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_leaves_out_what_is_lost_and_costs_what_the_cost_model_says(family: str, tmp_path: Path) -> None:
    cuts = architecture_of(tiny_model(family).config).cuts
    heads = (1, 2) if "heads" in cuts else None
    plan = narrow_everywhere(FULL, Width(FEW.channels, heads)).drop("decode", 2)
    for block in plan.decode:
        plan = plan.narrow("decode", block, Width((0, 3, 6, 9)))
    student = staged_under(family, plan)
    export = export_pair(student, tmp_path / "export", tokenizer=None)
    prefill, decode = (load_stage(export, stage) for stage in STAGES)
    for stage, worker, channels in (("prefill", prefill, 16), ("decode", decode, 4)):
        written = json.loads((export / stage / "config.json").read_text())
        assert written["intermediate_size"] == channels
        if heads is not None:
            assert (written["num_attention_heads"], written["head_dim"]) == (2, 8)
        blocks = [gate.block for gate in worker.gates.values()]
        assert all(block.get_submodule(cuts["channels"].columns).in_features == channels for block in blocks)
    cost = CostModel.of(student, 9, 4)
    assert cost.prefill_flops(student.plan) == counted(prefill, prefill.plan, 9)
    whole = staged_under(family, replace(plan, widths={}))
    saved = cost.decode_bytes(whole.plan) - cost.decode_bytes(student.plan)
    before, after = (parameter_bytes(*(model.gates[block].block for block in plan.decode)) for model in (whole, decode))
    assert saved == before - after > 0


def test_a_number_of_heads_that_the_configuration_refuses_is_named(tmp_path: Path) -> None:
    model = tiny_model("llama", num_attention_heads=8, blocks=1)
    plan = StagePlan.full(reference_to(model)).narrow("both", 0, Width(heads=(0, 1, 2, 4, 5, 6)))
    with pytest.raises(UserError, match="No checkpoint can have 6 heads in every block: LlamaConfig refuses it"):
        export_pair(StagedCausalLM(model, plan), tmp_path / "export", tokenizer=None)


def test_an_export_with_another_width_than_its_plan_is_refused(tmp_path: Path) -> None:
    export = export_pair(staged_under("llama", narrow_everywhere(FULL, FEW)), tmp_path / "export", tokenizer=None)
    plan = narrow_everywhere(StagePlan.load(export / "stage_plan.json"), Width((0, 3)), "decode")
    plan.save(export / "stage_plan.json")
    with pytest.raises(UserError, match=r"`intermediate_size` of block 0 is 16, and .* stage 2 channels"):
        load_stage(export, "decode")
