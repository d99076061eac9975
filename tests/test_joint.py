"""The joint search: meets its target, at the least energy, over both stages and the wire."""

from __future__ import annotations

import random
import weakref
from itertools import combinations

import pytest
from test_criteria import batches
from tiny_models import tiny_model

from pdtrim_pl.evaluation.evaluator import Evaluator
from pdtrim_pl.evaluation.quality import measure_quality
from pdtrim_pl.plan import Move, Retention, StagePlan
from pdtrim_pl.search import Annealing, Guards, JointSearch, anneal
from pdtrim_pl.search.joint import JointState
from pdtrim_pl.selectors import WireMenu, policies_within, selection_context
from pdtrim_pl.sizing.cost import CostModel, CostTarget
from pdtrim_pl.staged import StagedCausalLM

SHORT = Retention("first_last", 1, 1)


@pytest.fixture(scope="module")
def model() -> StagedCausalLM:
    model = StagedCausalLM(tiny_model("llama", blocks=5)).eval()
    model.apply_plan(StagePlan.full(model.plan.model, "free"))
    return model


def joint(
    model: StagedCausalLM, target: CostTarget, guards: Guards | None = None,
    menu: WireMenu = WireMenu(("none",), SHORT, examples=1),
) -> JointSearch:  # fmt: skip
    evaluator, cost = Evaluator(model, model, batches()), CostModel.of(model, prompt=9, response=6)
    context = selection_context(model, model, batches(), model.kv_shape, "cpu")
    policies = None if target.wire_bytes == 1 else policies_within(target.wire_bytes, context, menu, 9)
    return JointSearch(evaluator, model.plan, target, cost, guards=guards or Guards(0, 0), policy_of=policies)


def cost_of(model: StagedCausalLM, prefill: int, decode: int) -> CostTarget:
    """What dropping so many of the last blocks from the stages costs; block 0 keeps every KV-only block away."""
    plan = StagePlan(model.plan.model, tuple(range(5 - prefill)), tuple(range(5 - decode)), "free")
    costs = CostModel.of(model, prompt=9, response=6).shares(plan)
    return CostTarget(costs.prefill_flops, costs.decode_bytes)


def test_annealing_over_both_stages_finds_the_best_plan_that_meets_the_target(model: StagedCausalLM) -> None:
    search = joint(model, cost_of(model, 1, 1))
    first, first_energy = search.greedy()
    assert search.excess(first) == 0
    best, energy = anneal(search, first, Annealing(300, temperature=0.5, cooling=0.99))
    every = range(5)
    plans = [
        StagePlan(model.plan.model, tuple(set(every) - set(out)), tuple(set(every) - set(away)), "free")
        for gone in (1, 2)
        for out in combinations(every, gone)
        for lost in (1, 2)
        for away in combinations(every, lost)
    ]
    allowed = [plan for plan in plans if search.target.met(search.cost.shares(plan))]
    energies = [search.evaluator.energy(plan) for plan in allowed]
    assert energy == min(energies)
    assert energy <= first_energy
    chosen = search.candidate(best).plan
    assert (chosen.prefill, chosen.decode) == (
        allowed[energies.index(energy)].prefill,
        allowed[energies.index(energy)].decode,
    )


@pytest.mark.parametrize(
    "target", [CostTarget(0.7, 0.9, 0.5), CostTarget(wire_bytes=0.3), CostTarget(0.8, 0.8, 0.8), CostTarget(0.75)]
)
def test_every_state_meets_the_target_and_spares_what_it_can(model: StagedCausalLM, target: CostTarget) -> None:
    search, draw = joint(model, target), random.Random(0)
    state = search.greedy()[0]
    for _ in range(60):
        assert search.excess(state) == 0
        assert all(search.excess(state.without(move)) > 0 for move in state.removals)
        candidate = search.candidate(state)
        if candidate.policy is not None:
            candidate.policy.check(candidate.plan)
        other = search.neighbour(state, draw)
        assert other is not None or not state.removals
        state = other or state


def test_choosing_one_stage_anew_never_hurts_and_meets_the_target(model: StagedCausalLM) -> None:
    search = joint(model, cost_of(model, 2, 1))
    start = search.state_of(StagePlan.full(model.plan.model, "unified").drop("both", 3))
    before = search.energy(start)
    state, energy = search.improved(start)
    assert search.excess(state) == 0
    assert before is not None
    assert energy == search.energy(state) <= before


def test_what_decode_loses_leaves_more_bits_to_the_others(model: StagedCausalLM) -> None:
    search = joint(model, CostTarget(wire_bytes=0.5), menu=WireMenu(("int8", "int4"), None, examples=1))
    whole = search.candidate(JointState())
    fewer = search.candidate(JointState((Move("decode", (2,)),)))
    assert whole.policy is not None
    assert fewer.policy is not None
    assert not search.excess(JointState()), "codecs alone meet the target"
    assert all(rule.keep == "all" for rule in whole.policy.rules.values())
    bytes_of_a_block = [
        found.policy.sent_bytes(found.plan, 9) / len(found.plan.decode) for found in (whole, fewer) if found.policy
    ]
    assert bytes_of_a_block[1] > bytes_of_a_block[0]


def test_policies_keep_no_prompt_caches_once_damages_are_measured(model: StagedCausalLM) -> None:
    context = selection_context(model, model, batches(), model.kv_shape, "cpu")
    caches = weakref.ref(context.energy)
    policies = policies_within(0.5, context, WireMenu(("none",), SHORT, examples=1), 9)
    del context
    assert caches() is None
    assert policies(model.plan).rules


def test_nothing_is_trimmed_where_the_wire_may_cost_everything(model: StagedCausalLM) -> None:
    search = joint(model, CostTarget(decode_bytes=0.85))
    state, _ = search.greedy()
    assert search.excess(state) == 0
    assert search.candidate(state).policy is None


def test_the_final_plan_and_policy_have_the_energy_that_the_search_says(model: StagedCausalLM) -> None:
    search = joint(model, CostTarget(0.9, 0.9, 0.4))
    state, energy = search.greedy()
    chosen = search.final(state, 2, energy)
    naive = measure_quality(model, model, batches(), plan=chosen.plan, policy=chosen.policy)
    assert energy == pytest.approx(naive.kl, abs=1e-6)
    assert chosen.policy is not None
    assert {entry.criterion for entry in chosen.plan.history} <= {"joint"}
    assert {entry.round for entry in chosen.plan.history} <= {2}


def test_a_search_may_start_from_another_plan(model: StagedCausalLM) -> None:
    search = joint(model, cost_of(model, 1, 1))
    other = StagePlan.full(model.plan.model, "unified").drop("both", 3)
    start = search.state_of(other)
    assert search.candidate(start).plan.prefill == search.candidate(start).plan.decode == (0, 1, 2, 4)
    assert search.excess(search.state_of(model.plan)) == 0, "what is still missing is drawn"
    merged = model.plan.merge("decode", (1, 2), 1, untied=False)
    with pytest.raises(ValueError, match="only start from a plan that drops blocks"):
        search.state_of(merged)


def test_guards_hold_for_every_state(model: StagedCausalLM) -> None:
    search, draw = joint(model, CostTarget(0.9, 0.9), Guards(2, 1, max_removed=2)), random.Random(1)
    state = search.greedy()[0]
    for _ in range(30):
        plan = search.candidate(state).plan
        assert {0, 1, 4} <= set(plan.prefill) & set(plan.decode)
        assert max(len(plan.removed("prefill")), len(plan.removed("decode"))) <= 2
        state = search.neighbour(state, draw) or state


def test_a_target_out_of_reach_is_refused(model: StagedCausalLM) -> None:
    with pytest.raises(ValueError, match=r"`target` .* cannot be reached"):
        joint(model, CostTarget(0.05)).greedy()


def test_a_joint_search_needs_the_free_relation() -> None:
    model = StagedCausalLM(tiny_model("llama", blocks=5)).eval()
    with pytest.raises(ValueError, match="needs `relation: free`, and the plan has `relation: nested`"):
        joint(model, CostTarget(0.9))
