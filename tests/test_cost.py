"""The cost model against counts and bytes of the real thing: `FlopCounterMode`, caches, parameters, messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import BOUNDARIES, plans, policies
from tiny_models import FAMILIES, tiny_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pdtrim_pl.plan import Boundary, KVRetentionPolicy, ModelRef, Retention, StagePlan, handled_positions
from pdtrim_pl.sizing.cost import CostModel, Costs, CostTarget
from pdtrim_pl.sizing.of_run import model_config
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.cache import KVCache, Slots, attention_mask, keeper

SHAPES = Path(__file__).parents[1] / "configs" / "shapes"
LINE = ModelRef("line", "llama", 4)


@pytest.fixture(scope="module")
def staged() -> Callable[[str], StagedCausalLM]:
    made: dict[str, StagedCausalLM] = {}
    return lambda family: made.setdefault(family, StagedCausalLM(tiny_model(family)))


def plan_of(model: StagedCausalLM, plan: StagePlan) -> StagePlan:
    return replace(plan, model=model.plan.model, merged={}, untied={})


def prompt_of(tokens: int) -> torch.Tensor:
    return torch.arange(tokens)[None] % 60 + 3


def counted(model: StagedCausalLM, plan: StagePlan, prompt: int) -> int:
    """What `FlopCounterMode` counts around the real prefill and, where prefill predicts, the head."""
    handled = prompt_of(prompt)[:, : handled_positions(prompt, plan.boundary)]
    # The CPU's fused attention is unknown to FlopCounterMode; this one is made of the products it stands for.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        hidden = model.prefill(handled, plan=plan).hidden
        if plan.boundary == "prefill":
            model.logits(hidden[:, -1:])
    return counter.get_total_flops()


def parameter_bytes(*modules: nn.Module) -> int:
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())


def attended_bytes(model: StagedCausalLM, cache: KVCache) -> int:
    """Bytes of the entries of a real cache that its newest token attends to."""
    total = 0
    for index, block in cache.blocks.items():
        newest = Slots(block.slots.positions[:, -1:], block.slots.valid[:, -1:])
        seen = attention_mask(newest, block.slots, model.gates[index].window)[0, 0, 0]
        total += block.keys[:, :, seen].nbytes + block.values[:, :, seen].nbytes
    return total


def steps_of(
    model: StagedCausalLM, plan: StagePlan, policy: KVRetentionPolicy, prompt: int, response: int
) -> list[int]:
    """Bytes that every step of a real decode reads."""
    blocks = [model.gates[index].block for index in plan.decode]
    norm = [child for name, child in model.model.base_model.named_children() if "norm" in name]
    head = model.model.get_output_embeddings()
    row = model.model.get_input_embeddings().get_parameter("weight")[0]
    assert len(norm) == 1
    assert head is not None
    weights = parameter_bytes(*blocks, *norm, head) + row.nbytes
    handled = prompt_of(prompt)[:, : handled_positions(prompt, plan.boundary)]
    cache = model.prefill(handled, plan=plan).cache.retained(policy)
    steps = []
    for _ in range(response - (plan.boundary == "prefill")):
        cache = model.decode(torch.tensor([[5]]), cache, plan=plan).cache
        steps.append(weights + attended_bytes(model, cache))
    return steps


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=6)
def test_prefill_flops_are_those_of_the_real_prefill(
    staged: Callable[[str], StagedCausalLM], family: str, data: st.DataObject
) -> None:
    model, prompt = staged(family), data.draw(st.integers(2, 12))
    plan = plan_of(model, data.draw(plans(4)))
    assert CostModel.of(model, prompt, 4).prefill_flops(plan) == counted(model, plan, prompt)


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=6)
@torch.no_grad()
def test_decode_bytes_are_those_of_real_weights_and_caches(
    staged: Callable[[str], StagedCausalLM], family: str, data: st.DataObject
) -> None:
    model, prompt, response = staged(family), data.draw(st.integers(2, 12)), data.draw(st.integers(2, 9))
    plan = plan_of(model, data.draw(plans(4)))
    policy = data.draw(policies(plan, kv=model.kv_shape))
    steps = steps_of(model, plan, policy, prompt, response)
    cost = CostModel.of(model, prompt, response)
    assert cost.decode_bytes(plan, policy) == pytest.approx(sum(steps) / len(steps), rel=1e-12)


@given(data=st.data())
@settings(max_examples=20)
@torch.no_grad()
def test_wire_bytes_are_those_that_the_transport_sends(
    staged: Callable[[str], StagedCausalLM], data: st.DataObject
) -> None:
    model, prompt = staged("llama"), data.draw(st.integers(2, 12))
    plan = plan_of(model, data.draw(plans(4)))
    policy = data.draw(policies(plan, kv=model.kv_shape, codecs=True))
    handled = prompt_of(prompt)[:, : handled_positions(prompt, plan.boundary)]
    cache, keep = model.prefill(handled, plan=plan).cache, keeper()
    rules = {index: policy.rule(index) for index in plan.decode}
    sent = sum(keep(cache.blocks[index], rule).packed(rule.codec).nbytes for index, rule in rules.items())
    assert CostModel.of(model, prompt, 4).wire_bytes(plan, policy) == sent


@given(data=st.data())
def test_shares_are_of_the_dense_model_and_the_policy_agrees(data: st.DataObject) -> None:
    cost = cost_of_line(data.draw(st.integers(2, 300)))
    plan = replace(data.draw(plans(4)), model=LINE)
    policy = data.draw(policies(plan, kv=cost.kv))
    shares = cost.shares(plan, policy)
    full = StagePlan.full(LINE, boundary=plan.boundary)
    assert cost.shares(full) == Costs(1.0, 1.0, 1.0)
    assert shares.prefill_flops == cost.prefill_flops(plan) / cost.prefill_flops(full)
    assert shares.decode_bytes == cost.decode_bytes(plan, policy) / cost.decode_bytes(full)
    assert cost.wire_bytes(plan, policy) == policy.sent_bytes(plan, cost.prompt)
    assert cost.wire_bytes(full) == policy.full_bytes(plan, cost.prompt)
    assert shares.wire_bytes == policy.sent_bytes(plan, cost.prompt) / policy.full_bytes(plan, cost.prompt)
    assert all(0.0 <= share <= 1.0 for share in vars(shares).values())


@given(data=st.data())
def test_a_drop_never_costs_more(data: st.DataObject) -> None:
    cost = cost_of_line(64)
    plan = replace(data.draw(plans(4, ["nested", "unified"])), model=LINE)
    candidates = plan.drop_candidates("both", 0, 0)
    if candidates:
        fewer = plan.drop("both", data.draw(st.sampled_from(candidates)))
        before, after = vars(cost.shares(plan)), vars(cost.shares(fewer))
        assert all(after[name] < before[name] for name in before)


def cost_of_line(prompt: int) -> CostModel:
    return replace(_line(), prompt=prompt)


@cache
def _line() -> CostModel:
    return CostModel.of_config(tiny_model("llama").config, 64, 16, dtype=torch.bfloat16)


def test_a_kv_only_block_costs_prefill_its_projections_alone(staged: Callable[[str], StagedCausalLM]) -> None:
    model = staged("llama")
    cost, full = CostModel.of(model, 10, 4), replace(model.plan, relation="free")
    attention = model.gates[2].block.get_submodule("self_attn")
    kv = [attention.get_parameter(f"{name}_proj.weight").numel() for name in "kv"]
    gone = cost.prefill_flops(full.drop("both", 2))
    assert cost.prefill_flops(full.drop("prefill", 2)) - gone == 2 * 10 * sum(kv)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_an_eight_billion_model_is_counted_without_its_weights(boundary: Boundary) -> None:
    cost = CostModel.of_config(model_config("meta-llama/Llama-3.1-8B", [SHAPES]), 1000, 100)
    plan = StagePlan.full(ModelRef("8B", "llama", 32), "free", boundary)
    handled, steps = (1000, 99) if boundary == "prefill" else (999, 100)
    embeddings = 128_256 * 4096
    weights = 8_030_261_248 - embeddings + 4096  # of the input table a step reads one row
    kv = 2 * 8 * 128 * 32 * (handled + (steps + 1) / 2)
    assert cost.decode_bytes(plan) == pytest.approx(2 * (weights + kv))
    assert cost.wire_bytes(plan) == 2 * 2 * 8 * 128 * 32 * handled
    matrices = weights - embeddings - 4096 - (2 * 32 + 1) * 4096  # neither rows nor norms
    head = embeddings if boundary == "prefill" else 0
    assert cost.prefill_flops(plan) == 2 * (matrices * handled + head) + 4 * 32 * 4096 * handled**2
    fewer = plan
    for block in range(4, 12):
        fewer = fewer.drop("prefill", block)
    assert 0.75 < cost.shares(fewer).prefill_flops < 0.8, "eight of 32 blocks are KV-only"


def test_tied_embeddings_are_read_as_the_head() -> None:
    tied, apart = (tiny_model("llama", tie_word_embeddings=tied) for tied in (True, False))
    costs = [CostModel.of(StagedCausalLM(model), 8, 8) for model in (tied, apart)]
    assert costs[0] == costs[1]
    assert costs[0].step_parameters == 64 * 32 + 32 + 32  # head, norm, one row


def test_a_share_of_one_is_not_a_count_of_one() -> None:
    cost = cost_of_line(40)
    plan = StagePlan.full(LINE)
    share, count = (
        KVRetentionPolicy("prefill", cost.kv, dict.fromkeys(range(4), Retention("first_last", first)))
        for first in (1.0, 1)
    )
    assert [cost.shares(plan, policy).wire_bytes for policy in (share, count)] == [1.0, 1 / 40]


def test_another_element_type_on_the_wire_changes_bytes_and_not_shares() -> None:
    cost = cost_of_line(40)
    plan = StagePlan.full(LINE).drop("decode", 1)
    wide = KVRetentionPolicy("prefill", replace(cost.kv, dtype="float32"))
    assert cost.wire_bytes(plan, wide) == 2 * cost.wire_bytes(plan)
    assert cost.shares(plan, wide) == cost.shares(plan)


def test_a_model_without_whole_weights_is_counted_all_the_same(staged: Callable[[str], StagedCausalLM]) -> None:
    sharded = StagedCausalLM(tiny_model("llama"))
    for parameter in sharded.parameters():
        parameter.data = torch.empty(0)  # as DeepSpeed leaves them between passes
    assert CostModel.of(sharded, 8, 8) == CostModel.of(staged("llama"), 8, 8)


@pytest.mark.parametrize(("prompt", "response", "named"), [(1, 5, "prompt"), (5, 1, "response"), (0, 2, "prompt")])
def test_a_request_that_leaves_a_stage_without_work_is_refused(prompt: int, response: int, named: str) -> None:
    with pytest.raises(ValueError, match=rf"`{named}` of the cost model is \d token\(s\): give at least 2"):
        CostModel.of_config(tiny_model("llama").config, prompt, response)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, float("nan")])
def test_a_target_out_of_range_is_refused_by_name(share: float) -> None:
    with pytest.raises(ValueError, match=r"`target.decode_bytes` is .*: give a share of the dense model's cost in"):
        CostTarget(decode_bytes=share)
    with pytest.raises(ValueError, match=r"`target.prefill_flops` is .*, `target.wire_bytes` is"):
        CostTarget(share, 1.0, share)


@given(st.tuples(*3 * [st.floats(0.01, 1.0)]), st.tuples(*3 * [st.floats(0.01, 1.0)]))
def test_a_target_is_met_where_nothing_is_in_excess(target: tuple[float, ...], costs: tuple[float, ...]) -> None:
    asked, has = CostTarget(*target), Costs(*costs)
    assert asked.met(has) == (asked.excess(has) == 0.0)
    assert asked.met(Costs(*target))
    assert CostTarget().met(has)
    if asked.excess(has) > 0:
        assert any(cost > most for cost, most in zip(costs, target, strict=True))


def test_every_saving_where_there_is_too_much_lowers_the_excess() -> None:
    target = CostTarget(0.8, 0.5, 0.2)
    excess = [target.excess(Costs(*costs)) for costs in ((1.0, 1.0, 0.1), (0.9, 1.0, 0.1), (0.8, 0.6, 0.2))]
    assert excess == pytest.approx([0.25 + 1.0, 0.125 + 1.0, 0.2])
    assert target.met(Costs(24 / 30, 0.5, 0.1 + 0.1))
