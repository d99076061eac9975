"""The padded layout: both halves have equally many layers, so an engine without a plan can pair them by position."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from heard import Heard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import BOUNDARIES, plans, policies
from tiny_models import FAMILIES, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from pdtrim_pl.errors import UserError
from pdtrim_pl.export import export_pair, load_stage, stage_tensors, validate_file, verify_pair
from pdtrim_pl.export.card import write_card
from pdtrim_pl.harness.in_process import InProcessPair
from pdtrim_pl.models.architectures import architecture_of
from pdtrim_pl.plan import (
    PLAN_FILE,
    POLICY_FILE,
    STAGES,
    Boundary,
    Codec,
    KVRetentionPolicy,
    PairManifest,
    Retention,
    StagePlan,
)
from pdtrim_pl.plan.json_files import read_json
from pdtrim_pl.serving.engine.engine import Engine
from pdtrim_pl.serving.engine.requests import Ask, Done
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.description import kv_shape_of, reference_to

PROMPT, RESPONSE = [5, 9, 33, 40, 7, 8, 21, 60, 3], [12, 13, 50, 4]
BLOCKS = 5
FREE: dict[str, Any] = {"prefill": (0, 2, 3), "decode": (0, 1, 3), "relation": "free"}
"""Block 1 is KV-only, block 2 is prefill's alone, and nobody runs block 4."""


def student(family: str, boundary: Boundary = "prefill", **changes: Any) -> StagedCausalLM:
    model = tiny_model(family, blocks=BLOCKS)
    return StagedCausalLM(model, StagePlan(reference_to(model, "tiny"), boundary=boundary, **{**FREE, **changes}))


def exported(staged: StagedCausalLM, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """A compact and a padded export."""
    compact = export_pair(staged, folder / "compact", tokenizer=None, dtype=dtype)
    return compact, export_pair(staged, folder / "padded", tokenizer=None, dtype=dtype, layout="padded")


def stock(export: Path) -> Tensor:
    """Logits [R, V] that predict the response. Stock classes know no plan: decode gets prefill's cache as it is."""
    handled = len(PROMPT) - (StagePlan.load(export / PLAN_FILE).boundary == "decode")
    prefill, decode = (AutoModelForCausalLM.from_pretrained(export / stage).eval() for stage in STAGES)
    with torch.no_grad():
        first = prefill(torch.tensor([PROMPT[:handled]]), use_cache=True)
        fed = [*PROMPT[handled:], *RESPONSE[:-1]]
        rest = decode(torch.tensor([fed]), past_key_values=first.past_key_values).logits[0]
    return rest if handled < len(PROMPT) else torch.cat([first.logits[0, -1:], rest])


def in_process(export: Path) -> Tensor:
    (logits,) = InProcessPair.load(export).response_logits([PROMPT], [RESPONSE])
    return logits


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_classes_that_pair_layers_by_position_compute_what_the_pair_does(
    family: str, boundary: Boundary, tmp_path: Path
) -> None:
    staged = student(family, boundary)
    compact, padded = exported(staged, tmp_path)
    layers = [read_json(padded / stage / "config.json", "config")["num_hidden_layers"] for stage in STAGES]
    assert layers == [4, 4]
    assert in_process(padded).equal(in_process(compact))
    with torch.no_grad():
        expected = staged.logits(staged(torch.tensor([PROMPT]), torch.tensor([RESPONSE])).hidden)[0]
    torch.testing.assert_close(stock(padded), expected, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layers_that_are_only_padding_change_no_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    staged = student("llama", prefill=(0, 1, 2, 3), decode=(0, 3), relation="nested")
    compact, padded = exported(staged, tmp_path, dtype)
    prefill, decode = (AutoModelForCausalLM.from_pretrained(compact / stage).eval() for stage in STAGES)
    with torch.no_grad():
        first = prefill(torch.tensor([PROMPT]), use_cache=True)
        cache = first.past_key_values
        cache.layers = [cache.layers[0], cache.layers[3]]
        rest = decode(torch.tensor([RESPONSE[:-1]]), past_key_values=cache).logits[0]
    assert stock(padded).equal(torch.cat([first.logits[0, -1:], rest]))


@settings(max_examples=16, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.sampled_from(FAMILIES), st.integers(0, 99))
def test_any_plan_merged_untied_or_narrow_is_padded_exactly(data: st.DataObject, family: str, seed: int) -> None:
    model = tiny_model(family, blocks=BLOCKS, seed=seed)
    parts = tuple(architecture_of(model.config).cuts)
    staged = StagedCausalLM(model, data.draw(plans(BLOCKS, model=reference_to(model, "tiny"), parts=parts)))
    staged.apply_policy(data.draw(policies(staged.plan, kv=staged.kv_shape, codecs=True)))
    with torch.no_grad():
        for gate in staged.gates.values():
            for parameter in gate.untied.parameters():
                parameter.mul_(1.1)
    with tempfile.TemporaryDirectory() as folder:
        compact, padded = exported(staged, Path(folder))
        assert in_process(padded).equal(in_process(compact))
        everything = replace(staged.policy, rules={}) if staged.policy else None
        staged.apply_policy(everything)
        with torch.no_grad():
            expected = staged.logits(staged(torch.tensor([PROMPT]), torch.tensor([RESPONSE])).hidden)[0]
        torch.testing.assert_close(stock(padded), expected, atol=1e-4, rtol=0.0)


@pytest.mark.usefixtures("forked_workers")
def test_two_processes_serve_a_padded_pair_as_its_compact_one(tmp_path: Path) -> None:
    staged = student("qwen3")
    staged.apply_policy(KVRetentionPolicy("prefill", kv_shape_of(staged.model), {0: Retention("first_last", 2, 0.3)}))
    answers = []
    for export in exported(staged, tmp_path):
        with Engine(export) as engine:
            heard = Heard(engine, Ask(PROMPT, 12))
            assert heard.end() == Done("length")
            answers.append(heard.tokens)
    assert answers[0] == answers[1]


def test_the_files_say_which_layout_they_have_and_where_each_block_is(tmp_path: Path) -> None:
    compact, padded = exported(student("llama"), tmp_path)
    assert "layout" not in read_json(compact / PLAN_FILE, "plan")
    assert read_json(padded / PLAN_FILE, "plan")["layout"] == "padded"
    places = [
        [
            (block["original"], block["prefill"], block["decode"])
            for block in validate_file(export / POLICY_FILE)["blocks"]
        ]
        for export in (compact, padded)
    ]
    assert places == [[(0, 0, 0), (1, None, 1), (3, 2, 2)], [(0, 0, 0), (1, 1, 1), (3, 3, 3)]]
    for export in (compact, padded):
        validate_file(export / PLAN_FILE)
    assert [(export / "prefill" / "kv_only.safetensors").exists() for export in (compact, padded)] == [True, False]
    plan = StagePlan.load(padded / PLAN_FILE)
    assert plan.held("prefill") == plan.held("decode") == load_stage(padded, "decode").originals == (0, 1, 2, 3)
    assert PairManifest.load(compact).differences(PairManifest.load(padded))[:2] == [
        "the plan (stage_plan.json)",
        "the policy (kv_policy.json)",
    ]


def test_a_block_that_a_half_does_not_run_is_zeros_but_for_the_projections_that_it_needs() -> None:
    staged = student("llama")
    plan = replace(staged.plan, layout="padded")
    prefill, decode = (stage_tensors(staged, stage, plan=plan) for stage in STAGES)
    filled = {name for name, x in prefill.items() if name.startswith("model.layers.1.") and bool(x.any())}
    kept = ("input_layernorm", "self_attn.k_proj", "self_attn.v_proj")
    assert filled == {f"model.layers.1.{name}.weight" for name in kept}
    assert not any(bool(x.any()) for name, x in decode.items() if name.startswith("model.layers.2."))


@given(plans(BLOCKS), st.sampled_from(["compact", "padded"]))
def test_a_plan_keeps_its_layout_in_json(plan: StagePlan, layout: Any) -> None:
    plan = replace(plan, layout=layout)
    assert StagePlan.from_json(plan.to_json()) == plan


def test_what_cannot_be_padded_is_refused_with_the_reason(tmp_path: Path) -> None:
    staged = student("gemma2")
    _, padded = exported(staged, tmp_path)
    weights = load_file(padded / "decode" / "model.safetensors")
    weights["model.layers.2.pre_feedforward_layernorm.weight"] += 1.0
    save_file(weights, padded / "decode" / "model.safetensors", metadata={"format": "pt"})
    assert verify_pair(padded, staged) < 1e-4, "a norm alone adds nothing"
    for name in ("gate", "up", "down"):
        weights[f"model.layers.2.mlp.{name}_proj.weight"] += 1.0
    save_file(weights, padded / "decode" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"a block of gemma2 with weights of zero does not \(block 2 of decode\)"):
        verify_pair(padded, staged)
    with pytest.raises(UserError, match="`layout` is 'loose', not one of compact, padded"):
        replace(staged.plan, layout="loose")


def test_a_policy_that_stock_connectors_do_not_know_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    staged = student("llama")
    rules = {0: Retention(codec=Codec("int8", "int8"))}
    staged.apply_policy(KVRetentionPolicy("prefill", kv_shape_of(staged.model), rules))
    with caplog.at_level(logging.WARNING, "pdtrim_pl"):
        exported(staged, tmp_path)
    said = [record.message for record in caplog.records if "layout" in record.message]
    assert said == ["The connectors for which `layout: padded` is made know no KV policy: they send every position."]


def test_the_card_says_how_many_layers_a_padded_pair_has(tmp_path: Path) -> None:
    staged = student("llama")
    policy = KVRetentionPolicy("prefill", kv_shape_of(staged.model))
    for plan, says in ((staged.plan, False), (replace(staged.plan, layout="padded"), True)):
        write_card(tmp_path / "README.md", plan=plan, policy=policy, summary=None, base_model="tiny")
        text = (tmp_path / "README.md").read_text()
        assert ("Layout `padded`: both checkpoints have 4 layers" in text) == says
        assert ("(KV-only blocks)" in text) != says
