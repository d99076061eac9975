"""Which channels and heads leave, and what becomes of the layers behind them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from test_contract import BLOCKS
from test_merging import batches
from tiny_models import FAMILIES, tiny_model
from torch import Tensor

from pdtrim_pl.criteria import (
    ActivationNorm,
    ActivationTimesWeight,
    LeastSquaresError,
    ScoringContext,
    UnitTaylor,
    WidthCriterion,
)
from pdtrim_pl.criteria.unit_effects import unit_effects
from pdtrim_pl.criteria.width import RIDGE, Seen
from pdtrim_pl.data import Batch
from pdtrim_pl.errors import UserError
from pdtrim_pl.merging.refit import RIDGES, refit
from pdtrim_pl.models.architectures import architecture_of
from pdtrim_pl.models.cuts import GATED_MLP
from pdtrim_pl.plan import PARTS, STAGES, Boundary, Part, Relation, Stage, StagePlan, Target, Width
from pdtrim_pl.search import Narrowing, check_units, narrow
from pdtrim_pl.search.narrow import Narrowed
from pdtrim_pl.staged import Request, StagedCausalLM
from pdtrim_pl.staged.description import reference_to
from pdtrim_pl.staged.gate import current_pass

CRITERIA = (ActivationNorm(), ActivationTimesWeight(), UnitTaylor(), LeastSquaresError())
WANDA = CRITERIA[1]
TEXT = batches(24, prompt=12, response=10)


def student_of(family: str = "llama", relation: Relation = "nested", boundary: Boundary = "prefill") -> StagedCausalLM:
    model = tiny_model(family, blocks=BLOCKS)
    return StagedCausalLM(model, StagePlan.full(reference_to(model, family), relation, boundary)).eval()


def context_of(student: StagedCausalLM, text: Sequence[Batch] = TEXT) -> ScoringContext:
    return ScoringContext(student, student, text)


def narrowed(student: StagedCausalLM, asked: Narrowing, text: Sequence[Batch] = TEXT) -> Narrowed:
    return narrow(context_of(student, text), student.plan, asked, text)


def asked(
    target: Target = "both", count: int = 12, part: Part = "channels",
    criterion: WidthCriterion = WANDA, *, repair: bool = True, tied: bool = False,
) -> Narrowing:  # fmt: skip
    return Narrowing(target, part, count, criterion, repair, tied)


@torch.no_grad()
def inputs_of(student: StagedCausalLM, block: int, text: Sequence[Batch]) -> dict[Stage, Tensor]:
    """What the last layer of a block's MLP is fed at the real tokens of each stage, [N, I]."""
    seen: dict[Stage, list[Tensor]] = {stage: [] for stage in STAGES}
    valid: dict[Stage, Tensor] = {}

    def keep(_: object, args: tuple[Tensor, ...]) -> None:
        stage = current_pass().stage
        seen[stage].append(args[0][valid[stage]])

    modules = {id(m): m for m in (student.gates[block].weights(s, student.plan) for s in STAGES)}
    hooks = [module.get_submodule("mlp.down_proj").register_forward_pre_hook(keep) for module in modules.values()]
    for batch in text:
        valid.update(Request.of(*batch.request, student.plan.boundary).valid)
        student(*batch.request)
    for hook in hooks:
        hook.remove()
    return {stage: torch.cat(parts) for stage, parts in seen.items() if parts}


# Criteria


def seen_of(units: int, size: int = 1, hidden: int = 5) -> Seen:
    generator = torch.Generator().manual_seed(units)
    inputs = torch.randn(60, units * size, generator=generator) @ torch.randn(
        units * size, units * size, generator=generator
    )
    weight = torch.randn(hidden, units * size, generator=generator)
    return Seen(weight, (inputs.T @ inputs).double(), torch.arange(units))


@pytest.mark.parametrize("size", [1, 3])
def test_the_least_squares_score_is_the_error_after_the_best_repair_by_all_others(size: int) -> None:
    seen = seen_of(6, size)
    damped = seen.gram + RIDGE * seen.gram.diagonal().mean() * torch.eye(6 * size, dtype=torch.float64)
    expected = []
    for unit in range(6):
        gone = torch.zeros(6, dtype=torch.bool)
        gone[unit] = True
        gone = gone.repeat_interleave(size)
        weight = seen.weight.double()
        change = torch.zeros_like(weight)
        change[:, gone] = -weight[:, gone]
        change[:, ~gone] = torch.linalg.solve(damped[~gone][:, ~gone], damped[~gone][:, gone] @ weight[:, gone].T).T
        expected.append(float(((change @ damped) * change).sum()))
    torch.testing.assert_close(
        LeastSquaresError().harm(seen), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0
    )


def test_norms_are_those_of_inputs_and_of_what_they_give() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(40, 12, generator=generator).double(), torch.randn(5, 12, generator=generator)
    seen = Seen(weight, inputs.T @ inputs, torch.arange(4))
    norms = inputs.view(40, 4, 3).square().sum((0, 2)).sqrt()
    torch.testing.assert_close(ActivationNorm().harm(seen), norms)
    products = torch.stack([(inputs[:, i].norm() * weight[:, i].double().norm()) ** 2 for i in range(12)])
    torch.testing.assert_close(ActivationTimesWeight().harm(seen), products.view(4, 3).sum(1).sqrt())


@pytest.mark.parametrize("part", ["channels", "heads"])
@pytest.mark.parametrize("boundary", ["prefill", "decode"])
def test_the_first_order_effect_is_the_slope_of_the_loss_as_the_unit_fades(part: Part, boundary: Boundary) -> None:
    student = student_of(boundary=boundary)
    student.model.double()
    (batch,) = batches(1)
    one = batch.cut(1)[0]
    effects = unit_effects(context_of(student, [one]), student.plan, part, [one])
    layer = student.gates[2].block.get_submodule(student.architecture.cuts[part].columns)
    units = {"channels": 48, "heads": 4}[part]
    unit = 3

    def loss(stage: Stage, factor: float) -> float:
        def fade(_: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if current_pass().stage != stage:
                return None
            scale = torch.ones(units, dtype=torch.float64)
            scale[unit] = factor
            return (args[0] * scale.repeat_interleave(args[0].shape[-1] // units),)

        hook = layer.register_forward_pre_hook(fade)
        with torch.no_grad():
            logits = student.logits(student(*one.request).hidden)
            value = torch.nn.functional.cross_entropy(
                logits[one.response_mask].float(), one.response_ids[one.response_mask], reduction="sum"
            )
        hook.remove()
        return float(value)

    for stage in STAGES:
        slope = (loss(stage, 1.01) - loss(stage, 0.99)) / 0.02
        assert float(effects[stage, 2][unit]) == pytest.approx(abs(slope), rel=0.02, abs=1e-3)


# What leaves


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda criterion: criterion.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_loses_as_many_units_and_the_student_stays_as_it_is(family: str, criterion: WidthCriterion) -> None:
    student = student_of(family)
    before, plan = copy.deepcopy(student.state_dict()), student.plan
    for part in architecture_of(student.model.config).cuts:
        count = {"channels": 12, "heads": 2}[part]
        found = narrowed(student, asked("both", count, part, criterion), TEXT[:4])
        kept = [found.plan.width(stage, block).kept(part) for stage in STAGES for block in range(BLOCKS)]
        assert {len(numbers or ()) for numbers in kept} == {{"channels": 36, "heads": 2}[part]}
        assert {entry.criterion for entry in found.plan.history} == {criterion.name}
        assert not any(found.plan.untied.values())
    assert student.plan == plan
    for name, weight in student.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_without_repair_the_first_block_loses_the_channels_of_least_norm() -> None:
    student = student_of(relation="free")
    for target in STAGES:
        found = narrowed(student, asked(target, 30, criterion=ActivationNorm(), repair=False))
        norms = inputs_of(student, 0, TEXT)[target].norm(dim=0)
        assert found.plan.width(target, 0).channels == tuple(sorted(norms.topk(18).indices.tolist()))
        assert found.refits == []


def test_under_nested_prefill_first_loses_what_decode_has_lost() -> None:
    student = student_of()
    student.apply_plan(narrowed(student, asked("decode", 20)).plan)
    plan = narrowed(student, asked("prefill", 12)).plan
    assert plan.widest("prefill") == {"channels": 36}
    assert plan.widest("decode") == {"channels": 28}
    assert plan.widths["decode"] == student.plan.widths["decode"]
    fewer = narrowed(student, asked("prefill", 24)).plan
    assert fewer.widest("prefill") == fewer.widest("decode") == {"channels": 24}


# Refits


def assert_solves(inputs: Tensor, old: Tensor, new: Tensor, kept: Sequence[int] | None) -> None:
    """The new weights [H, I] solve one of the ridge regressions of the old output on the kept inputs [N, I]."""
    assert kept is not None
    stay = torch.zeros(48, dtype=torch.bool)
    stay[list(kept)] = True
    gram, change = (inputs.T @ inputs).double(), (new - old).double()
    wanted = gram[stay][:, ~stay] @ old[:, ~stay].T.double()
    found = gram[stay][:, stay] @ change[:, stay].T
    scale = gram[stay][:, stay].diagonal().mean()
    errors = [float((found + ridge * scale * change[:, stay].T - wanted).abs().max()) for ridge in RIDGES]
    assert min(errors) < 1e-3 * float(wanted.abs().max())


def down(student: StagedCausalLM, block: int, stage: Stage) -> Tensor:
    weights = student.gates[block].weights(stage, student.plan)
    return weights.get_submodule("mlp.down_proj").get_parameter("weight").detach()


@pytest.mark.parametrize("target", ["decode", "prefill"])
def test_a_layer_is_fitted_to_all_text_of_its_stage(target: Stage) -> None:
    dense, student = student_of(relation="free"), student_of(relation="free")
    found = narrowed(student, asked(target, 24))
    student.apply_plan(found.plan, refits=found.refits)
    inputs, kept = inputs_of(dense, 0, TEXT)[target], found.plan.width(target, 0).channels
    assert_solves(inputs, down(dense, 0, target), down(student, 0, target), kept)


def test_each_block_is_refitted_behind_what_the_ones_before_it_have_become() -> None:
    dense, student = student_of(), student_of()
    found = narrowed(student, asked("both", 24))
    student.apply_plan(found.plan, refits=found.refits)
    assert [refit.block for refit in found.refits] == list(range(BLOCKS))
    # The last block reads what the others are now, and lost nothing yet.
    before = {stage: {b: w for b, w in found.plan.widths[stage].items() if b < 3} for stage in STAGES}
    student.apply_plan(replace(found.plan, widths=before))
    inputs = torch.cat(list(inputs_of(student, 3, TEXT).values()))
    assert_solves(inputs, down(dense, 3, "decode"), down(student, 3, "decode"), found.plan.width("decode", 3).channels)


def test_the_score_of_a_layer_is_the_error_on_held_back_text_alone() -> None:
    dense = student_of(relation="free")
    found = narrowed(student_of(relation="free"), asked("decode", 24))
    (entry,) = (entry for entry in found.plan.history if entry.block == 0)
    before = torch.ones(48, dtype=torch.bool)
    after = torch.zeros(48, dtype=torch.bool)
    after[list(found.plan.width("decode", 0).channels or ())] = True
    fitted, judged = ((x.T @ x).double() for x in (inputs_of(dense, 0, t)["decode"] for t in (TEXT[6:], TEXT[:6])))
    outcome = refit(down(dense, 0, "decode"), fitted, judged, before, after)
    assert entry.score == pytest.approx(outcome.error, rel=1e-4)
    weight = down(dense, 0, "decode").double()
    plain = -(weight * ~after)
    assert outcome.error < float(((plain @ judged) * plain).sum() / ((weight @ judged) * weight).sum())


def test_a_refit_that_held_back_text_does_not_agree_with_is_not_made() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, fitted, judged = (torch.randn(rows, 8, generator=generator) for rows in (5, 30, 30))
    before, after = torch.ones(8, dtype=torch.bool), torch.arange(8) < 4
    judged[:, 4:] = 0.0  # what is lost was never heard there, so nothing is to be made good
    outcome = refit(weight, (fitted.T @ fitted).double(), (judged.T @ judged).double(), before, after)
    assert (outcome.change, outcome.error) == (None, 0.0)
    alone = refit(weight, (fitted.T @ fitted).double(), None, before, after)
    lost, output = fitted[:, 4:] @ weight[:, 4:].T, fitted @ weight.T
    assert alone.change is None
    assert alone.error == pytest.approx(float(lost.square().sum() / output.square().sum()), rel=1e-5)


def test_a_stage_that_loses_alone_is_refitted_with_weights_of_its_own() -> None:
    dense, student = student_of(), student_of()
    found = narrowed(student, asked("decode", 24))
    student.apply_plan(found.plan, refits=found.refits)
    assert student.plan.untied == {"prefill": (), "decode": tuple(range(BLOCKS))}
    name = "mlp.down_proj.weight"
    for index, gate in student.gates.items():
        before = dense.gates[index].block.get_parameter(name)
        assert torch.equal(gate.block.get_parameter(name), before)
        assert not torch.equal(gate.untied["decode"].get_parameter(name), before)


def test_tied_refits_give_no_block_weights_of_its_own() -> None:
    student = student_of()
    alone = narrowed(student, asked("decode", 24, tied=True))
    assert (alone.refits, alone.plan.untied["decode"]) == ([], ())
    together = narrowed(student, asked("both", 24, tied=True))
    assert [refit.stages for refit in together.refits] == [STAGES] * BLOCKS
    assert not any(together.plan.untied.values())


def test_one_batch_alone_is_not_refitted_on_as_no_other_text_could_tell() -> None:
    assert narrowed(student_of(), asked(), TEXT[:1]).refits == []


def test_heads_and_channels_may_leave_one_after_the_other_and_only_some_blocks_be_there() -> None:
    student = student_of(relation="free")
    student.apply_plan(student.plan.drop("prefill", 0).drop("prefill", 3).drop("decode", 1))
    for part, count, target in (("heads", 2, "prefill"), ("channels", 24, "decode"), ("channels", 10, "both")):
        found = narrowed(student, asked(target, count, part))  # type: ignore[arg-type]
        student.apply_plan(found.plan, refits=found.refits)
    widths = student.plan.widths
    left = {s: {b: [len(w.kept(part) or ()) for part in PARTS] for b, w in widths[s].items()} for s in STAGES}
    assert left == {"prefill": {1: [38, 2], 2: [38, 2]}, "decode": {0: [14, 0], 2: [14, 0], 3: [14, 0]}}


@pytest.mark.parametrize("relation", ["nested", "free"])
@pytest.mark.parametrize("repair", [False, True])
def test_a_block_that_decode_has_lost_is_as_narrow_as_the_others_of_prefill(relation: Relation, repair: bool) -> None:
    student = student_of(relation=relation)
    student.apply_plan(student.plan.drop("decode", 1))
    found = narrowed(student, asked(count=12, repair=repair))
    kept = {stage: {b: len(w.kept("channels") or ()) for b, w in found.plan.widths[stage].items()} for stage in STAGES}
    assert kept == {stage: dict.fromkeys(found.plan.blocks(stage), 36) for stage in STAGES}
    alone = [refit.stages for refit in found.refits if refit.block == 1]
    assert alone == ([("prefill",)] if repair else [])
    assert not any(found.plan.untied.values())  # decode does not use these weights


@pytest.mark.parametrize(
    ("family", "wanted", "message"),
    [
        ("llama", asked("both", 48), "48 channels cannot leave block 0 in `both`: it has 48, and must keep 1"),
        ("llama", asked("both", 1, "heads"), "1 query heads cannot leave: each of the 2 key/value heads"),
        ("llama", asked("both", 4, "heads"), "4 heads cannot leave block 0 in `both`: it has 4, and must keep 2"),
        ("phi3", asked("both", 2, "heads"), r"`part: heads` cannot leave .* its family \(phi3\)"),
    ],
)
def test_what_cannot_leave_is_refused(family: str, wanted: Narrowing, message: str) -> None:
    with pytest.raises(UserError, match=message):
        narrowed(student_of(family), wanted)


@pytest.mark.parametrize("criterion", [WANDA, LeastSquaresError()], ids=lambda criterion: criterion.name)
def test_a_layer_whose_inputs_are_not_finite_is_named(criterion: WidthCriterion) -> None:
    student = student_of()
    with torch.no_grad():
        student.gates[1].block.get_parameter("mlp.up_proj.weight")[3] = torch.inf
    with pytest.raises(UserError, match=r"The inputs of mlp.down_proj in block 1 are not all finite"):
        narrowed(student, asked(criterion=criterion))


def test_what_a_block_has_lost_is_not_measured_again() -> None:
    student = student_of()
    every = {stage: dict.fromkeys(range(BLOCKS), Width(tuple(range(40)))) for stage in STAGES}
    student.apply_plan(replace(student.plan, widths=every))
    with torch.no_grad():
        student.gates[1].block.get_parameter("mlp.up_proj.weight")[45] = torch.inf
    found = narrowed(student, asked())
    assert found.plan.widest("decode") == {"channels": 28}


def test_a_target_that_does_not_fit_the_relation_is_refused() -> None:
    with pytest.raises(UserError, match="`stage: decode` does not fit `relation: unified`"):
        check_units(GATED_MLP["channels"], student_of(relation="unified").plan, asked("decode"))


def test_heads_with_key_value_heads_of_their_own_are_refused() -> None:
    model = tiny_model("llama", blocks=BLOCKS, num_key_value_heads=4)
    student = StagedCausalLM(model, StagePlan.full(reference_to(model)))
    for count in (2, 4):
        with pytest.raises(UserError, match=r"each has a key/value head of its own.* Use `part: channels`"):
            narrowed(student, asked("both", count, "heads"))


def test_a_stage_that_no_token_reaches_is_named() -> None:
    text = [
        batch._replace(response_ids=batch.response_ids[:, :1], response_mask=batch.response_mask[:, :1])
        for batch in TEXT
    ]
    with pytest.raises(UserError, match="No calibration token reaches decode"):
        narrowed(student_of(), asked("decode"), text)


def test_widths_are_written_by_the_plan_alone() -> None:
    found = narrowed(student_of(), asked())
    assert StagePlan.from_json(found.plan.to_json()) == found.plan
    assert found.plan.width("decode", 0) != Width()
