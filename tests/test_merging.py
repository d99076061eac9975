"""Merges: the local fit, weights on offer, and what becomes of them when a plan is applied."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import retentions
from test_contract import BLOCKS, assert_same, forced, token_by_token
from test_contract import Batch as Rows
from test_export import request, student_logits, worker_logits
from tiny_models import FAMILIES, tiny_model
from torch import Tensor

from pdtrim_pl.data import Batch
from pdtrim_pl.export import export_pair
from pdtrim_pl.merging import FittedRun, Merging, fit_runs
from pdtrim_pl.merging.least_squares import PASSES
from pdtrim_pl.merging.recording import record
from pdtrim_pl.merging.trial import Start, Trial
from pdtrim_pl.plan import STAGES, Boundary, KVRetentionPolicy, Move, Relation, Retention, Stage, StagePlan, Target
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.description import reference_to
from pdtrim_pl.staged.gate import Observer

TARGETS: tuple[Target, ...] = ("prefill", "decode", "both")
QUICK = Merging(min_cosine=-1, steps=3)
few = settings(max_examples=5, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


def staged(
    family: str = "llama", relation: Relation = "free", boundary: Boundary = "prefill", **config: float
) -> StagedCausalLM:
    model = tiny_model(family, blocks=BLOCKS, **config)
    return StagedCausalLM(model, StagePlan.full(reference_to(model, "tiny"), relation, boundary)).eval()


def batches(count: int = 4, prompt: int = 7, response: int = 5) -> list[Batch]:
    """Random requests, two rows each, the second one shorter at both ends; padding holds random tokens too."""
    generator = torch.Generator().manual_seed(5)
    prompt_mask, response_mask = torch.ones(2, prompt, dtype=torch.bool), torch.ones(2, response, dtype=torch.bool)
    prompt_mask[1, :2], response_mask[1, response - 1 :] = False, False
    ids = torch.randint(3, 64, (count, 2, prompt + response), generator=generator)
    return [Batch(rows[:, :prompt], prompt_mask, rows[:, prompt:], response_mask) for rows in ids]


def fitted_for(
    student: StagedCausalLM, target: Target, runs: Sequence[tuple[int, ...]], merging: Merging = QUICK
) -> tuple[FittedRun, ...]:
    teacher = staged(student.model.config.model_type, boundary=student.plan.boundary)
    return fit_runs(student, teacher, batches(), target, runs, merging).runs


def far_apart(fitted: Sequence[FittedRun]) -> Sequence[FittedRun]:
    """The same, but no one would take their weights for those of a block of the model."""
    generator = torch.Generator().manual_seed(3)
    for run in fitted:
        assert run.weights is not None
        for parameter in run.weights.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return fitted


# The fit


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("boundary", ["prefill", "decode"])
@pytest.mark.parametrize(("idle", "into"), [(2, 1), (1, 2)])
def test_a_block_whose_neighbour_does_nothing_stands_for_both_without_a_fit(
    target: Target, boundary: Boundary, idle: int, into: int
) -> None:
    student, teacher = staged(boundary=boundary), staged(boundary=boundary)
    for model in (student, teacher):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            torch.nn.init.zeros_(model.gates[idle].block.get_parameter(f"{name}.weight"))
    (run,) = fit_runs(student, teacher, batches(), target, [(1, 2)], replace(QUICK, steps=0)).runs
    assert run.move == Move(target, (1, 2), into)
    assert (run.plain_cosine, run.cosine, run.mse) == pytest.approx((1, 1, 0), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@few
@given(
    target=st.sampled_from(TARGETS),
    boundary=st.sampled_from(["prefill", "decode"]),
    into=st.integers(1, 2),
    rule=st.none() | retentions(),
)
@torch.no_grad()
def test_a_block_on_trial_computes_what_it_computes_in_the_student_once_it_is_merged(
    family: str, target: Target, boundary: Boundary, into: int, rule: Retention | None
) -> None:
    student, batch = staged(family, boundary=boundary), batches(1)[0]
    if rule is not None:
        student.apply_policy(KVRetentionPolicy(boundary, student.kv_shape, {into: rule}))
    stages = STAGES if target == "both" else (target,)
    move = Move(target, (1, 2), into)
    start = Start(move, dict.fromkeys(stages, (1, 2)))
    recording = record(staged(family, boundary=boundary), batch, boundary, start.places)
    trial = Trial.of(student, start)
    for parameter in trial.blocks.parameters():
        parameter.mul_(1.1)

    seen: dict[Stage, Tensor] = {}
    student.offer([FittedRun(move, start.stands_for, 1, 1, 0, trial.blocks[str(into)])])
    plan = QUICK.apply(student.plan, move)
    policy = None if student.policy is None else student.policy.restricted_to(plan)

    def watch(stage: Stage):  # type: ignore[no-untyped-def]
        return lambda block, _, after: seen.update({stage: after}) if block == into else None

    student(*batch.request, plan=plan, policy=policy, observers={stage: watch(stage) for stage in STAGES})
    expected = torch.cat([seen[stage][recording.request.valid[stage]] for stage in stages])
    torch.testing.assert_close(trial.output(recording), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("target", TARGETS)
def test_a_fit_brings_the_block_nearer_to_the_run_on_text_it_was_not_fitted_on(target: Target) -> None:
    student, teacher = staged(), staged()
    merging = Merging(min_cosine=-1, steps=12, batch_size=2, learning_rate=0.01)
    out = fit_runs(student, teacher, batches(8), target, [(1, 2), (0, 1, 2)], merging)
    plain = fit_runs(student, teacher, batches(8), target, [(1, 2), (0, 1, 2)], replace(merging, steps=0))
    for run, unfitted in zip(out.runs, plain.runs, strict=True):
        assert run.move.run == unfitted.move.run
        assert run.cosine > run.plain_cosine
        assert run.cosine > unfitted.cosine
        assert run.mse < unfitted.mse
    tokens = {"prefill": 12, "decode": 7, "both": 19}[target]
    assert out.tokens == 4 * 12 * tokens
    assert plain.tokens == 0
    solved = 4 * (6 + PASSES * 2) * tokens
    assert out.block_tokens == plain.block_tokens + 3 * out.tokens + solved
    assert plain.block_tokens == 8 * 19 * BLOCKS + 2 * 4 * 2 * tokens


@pytest.mark.parametrize("boundary", ["prefill", "decode"])
@torch.no_grad()
def test_blocks_behind_a_run_learn_with_it_and_come_with_the_merge(boundary: Boundary) -> None:
    student, teacher = staged(boundary=boundary), staged(boundary=boundary)
    merging = Merging(min_cosine=-1, steps=12, batch_size=2, learning_rate=0.01)
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    (run,) = fit_runs(student, teacher, batches(8), "both", [(1, 2)], merging, trailing_blocks=1).runs
    assert all(torch.equal(weight, before[name]) for name, weight in student.state_dict().items())
    assert (set(run.trailing_blocks), set(run.blocks)) == ({3}, {3, run.move.into})
    student.offer([run])
    batch = batches(1)[0]
    assert torch.equal(student(*batch.request).hidden, teacher(*batch.request).hidden), "the merge is not made"

    plan, errors = merging.apply(student.plan, run.move), list[Tensor]()
    for judged in batches(8)[:2]:
        held = record(teacher, judged, boundary, {4})
        seen: dict[Stage, Tensor] = {}

        def watch(stage: Stage, seen: dict[Stage, Tensor] = seen) -> Observer:
            return lambda block, _, after: seen.update({stage: after}) if block == 3 else None

        student(*judged.request, plan=plan, observers={stage: watch(stage) for stage in STAGES})
        for stage in STAGES:
            apart = (seen[stage] - held.hidden[stage][4])[held.request.valid[stage]]
            errors.append(apart.square())
    assert float(torch.cat(errors).mean()) == pytest.approx(run.mse, rel=1e-4)
    merged = student(*batch.request, plan=plan).hidden
    student.apply_plan(plan)
    assert torch.equal(student(*batch.request).hidden, merged)
    for index, block in run.blocks.items():
        own = student.gates[index].block
        assert all(torch.equal(own.get_parameter(name), weight) for name, weight in block.named_parameters())


def test_blocks_behind_a_run_must_be_alike_in_both_stages() -> None:
    student = staged()
    student.apply_plan(student.plan.drop("decode", 0))
    with pytest.raises(ValueError, match=r"`trailing_blocks` needs a plan under which both stages run the same blocks"):
        fit_runs(student, staged(), batches(), "both", [(1, 2)], QUICK, trailing_blocks=1)


def test_batches_are_cut_to_the_size_of_a_step() -> None:
    student, teacher = staged(), staged()
    large, small = (Merging(min_cosine=-1, steps=6, batch_size=size) for size in (2, 1))
    cut = [row for batch in batches(4) for row in batch.cut(1)]
    assert [len(row.prompt_ids) for row in cut] == [1] * 8
    whole = fit_runs(student, teacher, batches(4), "both", [(1, 2)], small)
    rows = fit_runs(student, teacher, cut, "both", [(1, 2)], large)
    assert (whole.runs[0].cosine, whole.runs[0].mse) == (rows.runs[0].cosine, rows.runs[0].mse)
    assert whole.tokens == rows.tokens
    assert [small.batches(2), large.batches(2), large.batches(3), small.batches(8)] == [4, 8, 4, 1]


@given(steps=st.integers(1, 4000), batch_size=st.integers(1, 100), size=st.integers(1, 100))
def test_every_step_of_a_fit_has_text_of_its_own_beside_what_is_held_back(
    steps: int, batch_size: int, size: int
) -> None:
    merging, examples = Merging(steps=steps, batch_size=batch_size), min(size, batch_size)
    cut = merging.batches(size) * -(-size // batch_size)
    held = merging.held_back(cut, examples)
    assert cut - held >= steps
    assert held in (max(1, cut // 4), -(-64 // examples))
    assert held * examples < 64 + examples


def test_a_run_is_fitted_alike_whatever_else_is_fitted_and_however_little_memory_there_is() -> None:
    student = staged()
    runs = [(0, 1), (1, 2), (2, 3)]
    together = fitted_for(student, "decode", runs)
    apart = fitted_for(student, "decode", runs, replace(QUICK, pairs_at_once=1, cache_bytes=0))
    alone = fitted_for(student, "decode", [(1, 2)])
    for first, second in [*zip(together, apart, strict=True), (together[1], alone[0])]:
        assert (first.move, first.cosine, first.mse) == (second.move, second.cosine, second.mse)
        assert first.weights is not None
        assert second.weights is not None
        for ours, theirs in zip(first.weights.parameters(), second.weights.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_a_fit_changes_neither_model_nor_random_generator_and_needs_no_gradients_from_its_caller() -> None:
    student, teacher = staged().train(), staged()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    state, plan = torch.get_rng_state(), student.plan
    with torch.no_grad():
        fit_runs(student, teacher, batches(), "decode", [(1, 2)], QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    assert student.plan is plan
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(parameter.grad is None for model in (student, teacher) for parameter in model.parameters())
    assert not any(gate.offers for gate in student.gates.values())
    assert all(module.training for module in student.modules())


def test_a_run_below_the_bar_is_not_kept() -> None:
    out = fit_runs(staged(), staged(), batches(), "decode", [(1, 2)], replace(QUICK, min_cosine=1.0))
    assert out.runs[0].weights is None
    assert out.runs[0].cosine < 1
    assert out.accepted == ()


def test_a_fit_inside_autocast_sees_its_own_steps() -> None:
    def fit(cached: bool) -> FittedRun:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            return fit_runs(staged(), staged(), batches(), "decode", [(1, 2)], QUICK).runs[0]

    assert fit(True).mse == fit(False).mse


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3_text"])
def test_a_bf16_student_is_fitted_in_fp32_and_gets_bf16_weights(family: str) -> None:
    student, teacher = staged(family).to(torch.bfloat16), staged(family).to(torch.bfloat16)
    merging = Merging(min_cosine=-1, steps=10, batch_size=2, learning_rate=0.01)
    (run,) = fit_runs(student, teacher, batches(6), "both", [(1, 2)], merging).runs
    assert run.weights is not None
    assert {parameter.dtype for parameter in run.weights.parameters()} == {torch.bfloat16}
    assert run.cosine > run.plain_cosine
    student.offer([run])
    student(*batches(1)[0].request, plan=merging.apply(student.plan, run.move))


def test_a_merged_block_can_be_merged_again_and_then_stands_for_all() -> None:
    student = staged()
    student.offer(fitted_for(student, "decode", [(1, 2)]))
    into = next(index for index, gate in student.gates.items() if gate.offers)
    student.apply_plan(QUICK.apply(student.plan, Move("decode", (1, 2), into)))
    (again,) = fitted_for(student, "decode", [(into, 3)])
    assert again.stands_for == {"decode": (1, 2, 3)}
    student.offer([again])
    plan = QUICK.apply(student.plan, again.move)
    before = student(*batches(1)[0].request, plan=plan).hidden
    student.apply_plan(plan)
    assert torch.equal(student(*batches(1)[0].request).hidden, before)


def test_under_nested_a_prefill_merge_is_fitted_in_both_stages_while_decode_runs_the_blocks() -> None:
    student = staged(relation="nested")
    assert set(fitted_for(student, "prefill", [(1, 2)])[0].stands_for) == {"prefill", "decode"}
    student.apply_plan(student.plan.drop("decode", 2))
    (run,) = fitted_for(student, "prefill", [(1, 2)])
    assert (run.move.into, set(run.stands_for)) == (1, {"prefill"}), "decode, which runs block 1, cannot lose it for 2"


def test_what_cannot_be_fitted_is_refused_with_the_way_out() -> None:
    student = staged()
    with pytest.raises(ValueError, match=r"Cannot merge \[0, 2\] into 0 in `decode`"):
        fit_runs(student, staged(), batches(), "decode", [(0, 2)], QUICK)
    with pytest.raises(ValueError, match=r"`tied: true` cannot merge \[0, 1\] in `decode`.*leave `tied` out"):
        fit_runs(student, staged(), batches(), "decode", [(0, 1)], replace(QUICK, tied=True))
    with pytest.raises(ValueError, match=r"There is no decode token to fit merged blocks on.*`lengths`"):
        fit_runs(student, staged(), batches(response=1), "decode", [(0, 1)], QUICK)
    with pytest.raises(ValueError, match=r"`loading.teacher` has 5 blocks of width 32 where `model` has 4 of 32"):
        fit_runs(student, StagedCausalLM(tiny_model("llama", blocks=5)), batches(), "decode", [(0, 1)], QUICK)


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_cosine": 1.5},
        {"steps": -1},
        {"learning_rate": 0.0},
        {"pairs_at_once": 0},
        {"cache_bytes": -1},
        {"batch_size": 0},
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Merging(**wrong)  # type: ignore[arg-type]


# Which stages get weights of their own


@pytest.mark.parametrize(
    ("relation", "target", "own"),
    [
        ("free", "decode", ("decode",)), ("free", "prefill", ("prefill",)), ("free", "both", ()),
        ("nested", "decode", ("decode",)), ("nested", "prefill", ()), ("unified", "both", ()),
        ("prefill_only", "prefill", ("prefill",)),
    ],
)  # fmt: skip
def test_a_merged_block_gets_weights_of_its_own_where_another_stage_goes_on_with_the_old_ones(
    relation: Relation, target: Target, own: tuple[Stage, ...]
) -> None:
    plan, move = staged(relation=relation).plan, Move(target, (1, 2), 2)
    merged = QUICK.apply(plan, move, round=3, criterion="annealing", score=0.5)
    assert {stage: (2,) if stage in own else () for stage in STAGES} == dict(merged.untied)
    assert {(entry.action, entry.round, entry.score) for entry in merged.history} == {("merge", 3, 0.5)}
    assert QUICK.allows(plan, move)
    assert replace(QUICK, tied=True).allows(plan, move) is not bool(own)


def test_a_merge_of_blocks_that_are_not_neighbours_is_not_allowed() -> None:
    assert not QUICK.allows(staged().plan, Move("decode", (0, 2), 0))


# On offer, and taken up


def test_weights_on_offer_are_no_part_of_the_model_but_move_with_it() -> None:
    student = staged()
    names, count = list(student.state_dict()), len(list(student.parameters()))
    student.offer(fitted_for(student, "both", [(1, 2)]))
    assert (list(student.state_dict()), len(list(student.parameters()))) == (names, count)
    (offered,) = {weights for gate in student.gates.values() for weights in gate.offers.values()}
    student.to(torch.float64)
    assert {parameter.dtype for parameter in offered.parameters()} == {torch.float64}
    student.withdraw()
    assert not any(gate.offers for gate in student.gates.values())


def test_plans_without_the_merge_run_as_if_nothing_were_on_offer() -> None:
    student, batch = staged(), batches(1)[0]
    plans = (student.plan, student.plan.drop("decode", 1), student.plan.drop("decode", 2))
    before = [student(*batch.request, plan=plan).hidden for plan in plans]
    student.offer(far_apart(fitted_for(student, "decode", [(1, 2), (2, 3)])))
    for plan, hidden in zip(plans, before, strict=True):
        assert torch.equal(student(*batch.request, plan=plan).hidden, hidden)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("boundary", ["prefill", "decode"])
@torch.no_grad()
def test_fitted_weights_obey_the_contract_on_offer_taken_up_and_exported(
    target: Target, boundary: Boundary, tmp_path: Path
) -> None:
    student = staged(boundary=boundary)
    student.apply_policy(KVRetentionPolicy(boundary, student.kv_shape, {1: Retention("first_last", 1, 0.5)}))
    (run,) = far_apart(fitted_for(student, target, [(1, 2)]))
    plan = QUICK.apply(student.plan, run.move)
    student.offer([run])
    prompt, mask, response = request()
    restricted = None if student.policy is None else student.policy.restricted_to(plan)
    offered = student.logits(student(prompt, response, mask, plan=plan, policy=restricted).hidden)
    assert not torch.allclose(offered, student_logits(student), atol=1e-2)
    student.apply_plan(plan)
    assert not any(gate.offers for gate in student.gates.values())
    assert torch.equal(student_logits(student), offered)
    export = export_pair(student, tmp_path / "export", tokenizer=None)
    torch.testing.assert_close(worker_logits(export), offered, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@settings(few, max_examples=2)
@given(target=st.sampled_from(TARGETS))
@torch.no_grad()
def test_teacher_forced_logits_of_a_merged_student_are_the_token_by_token_logits(family: str, target: Target) -> None:
    student = staged(family)
    student.offer(far_apart(fitted_for(student, target, [(1, 2)], replace(QUICK, steps=0))))
    rows = batches(1)[0]
    batch = Rows(rows.prompt_ids, rows.prompt_mask, rows.response_ids, rows.response_mask)
    into = next(index for index, gate in student.gates.items() if gate.offers)
    student.plan = QUICK.apply(student.plan, Move(target, (1, 2), into))  # as a search runs it: nothing is taken up
    offered = forced(student, batch)
    assert_same(offered, token_by_token(student, batch), batch.response_mask)
    student.apply_plan(student.plan)
    assert torch.equal(forced(student, batch), offered)


def test_a_plan_that_would_merge_into_weights_another_stage_needs_is_refused_and_changes_nothing() -> None:
    student = staged()
    (run,) = fitted_for(student, "decode", [(1, 2)])
    student.offer([run])
    tied = run.move.apply(student.plan, untied=False)
    before, plan = copy.deepcopy(student.state_dict()), student.plan
    with pytest.raises(
        ValueError, match=r"would be merged with `tied: true`, and prefill and decode use .*Leave `tied`"
    ):
        student.apply_plan(tied)
    assert student.plan is plan
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_only_the_stage_that_merges_gets_the_fitted_weights() -> None:
    student = staged()
    (run,) = far_apart(fitted_for(student, "decode", [(1, 2)]))
    into = run.move.into
    assert into is not None
    assert run.weights is not None
    shared = copy.deepcopy(student.gates[into].block.state_dict())
    student.offer([run])
    student.apply_plan(QUICK.apply(student.plan, run.move))
    student.freeze_unused()
    gate = student.gates[into]
    assert all(torch.equal(value, shared[name]) for name, value in gate.block.state_dict().items())
    assert all(
        torch.equal(value, gate.untied["decode"].state_dict()[n]) for n, value in run.weights.state_dict().items()
    )
    assert all(parameter.requires_grad for parameter in gate.parameters())
    absorbed = student.gates[3 - into]
    assert all(parameter.requires_grad for parameter in absorbed.parameters()), "prefill still runs it"
