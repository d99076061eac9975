"""Depth and width in one joint search: what is offered equals what is applied, and the target is met."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from test_callbacks import data_for, fit, module_for, trainer_for
from test_merging import batches
from tiny_models import tiny_model

from callbacks import JointDrop, RequestShape
from pdtrim_pl.checkpoints.state import CheckpointState
from pdtrim_pl.criteria import ScoringContext
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.quality import measure_quality
from pdtrim_pl.merging import Merging
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.plan import PARTS, STAGES, Part, Stage, StagePlan, Structure
from pdtrim_pl.search import Annealing, Guards, JointSearch, WidthMoves, mixed
from pdtrim_pl.search.width_levels import units_to_meet, without
from pdtrim_pl.sizing.cost import CostModel, CostTarget
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.strategies import PDTrimDeepSpeedStrategy, PDTrimFSDPStrategy, check_new_widths

TEXT = batches(12, prompt=12, response=10)
TARGET = CostTarget(prefill_flops=0.8, decode_bytes=0.85)


def student() -> StagedCausalLM:
    model = StagedCausalLM(tiny_model("llama", blocks=5)).eval()
    model.apply_plan(StagePlan.full(model.plan.model, "free"))
    return model


def cost_of(model: StagedCausalLM) -> CostModel:
    return CostModel.of(model, prompt=12, response=10)


def own_cost(cost: CostModel, plan: StagePlan, stage: Stage) -> float:
    costs = cost.shares(plan)
    return costs.prefill_flops if stage == "prefill" else costs.decode_bytes


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("share", [1.0, 0.97, 0.9, 0.8])
def test_the_least_number_of_units_meets_the_target(part: Part, stage: Stage, share: float) -> None:
    model = student()
    cost, each = cost_of(model), 1 if part == "channels" else model.plan.model.kv_heads or 1
    target = CostTarget(prefill_flops=share, decode_bytes=share)
    count = units_to_meet(cost, model.plan, stage, part, target)
    most = (model.plan.model.sizes[part] or 0) - each
    after = without(model.plan, stage, part, count)
    assert {len(after.width(stage, block).kept(part) or range(most + each)) for block in after.blocks(stage)} == {
        most + each - count
    }
    assert count == most or own_cost(cost, after, stage) <= share * (1 + 1e-9)
    if count:
        assert own_cost(cost, without(model.plan, stage, part, count - each), stage) > share


@pytest.mark.parametrize("shared", [True, False])
def test_an_offered_width_gives_what_the_applied_one_gives(shared: bool) -> None:
    model = student()
    context = ScoringContext(model, student(), TEXT[:4])
    moves = WidthMoves(shares=(0.0, 0.5, 1.0), shared=shared)
    found = mixed.starts(context, model.plan, moves, cost_of(model), TARGET, TEXT, repair=True)
    widths = [tuple(start.plan.widest(stage).get("channels", 64) for stage in STAGES) for start in found]
    prefill, decode = (sorted({pair[stage] for pair in widths}) for stage in (0, 1))
    if shared:
        assert widths[0] == (64, 64)
        assert sum(64 not in pair for pair in widths) == 2, "both stages lose the same, by the same share"
        assert all(one == other for one, other in widths if 64 not in (one, other))
    else:
        assert widths == [(p, d) for p in reversed(prefill) for d in reversed(decode)], "all pairs"
        assert len(widths) == 9
    assert any(start.refits for start in found)
    for start in found[1:]:
        assert any(start.plan.untied.values()) == any(len(refit.stages) == 1 for refit in start.refits)
        offered = context.evaluator.energy(start.plan)
        other = student()
        other.apply_plan(start.plan, refits=mixed.refits_under(start.plan, start.refits))
        assert measure_quality(other, context.teacher, context.batches).kl == pytest.approx(offered, rel=1e-4)
    model.withdraw()
    assert not any(gate.refit_offers for gate in model.gates.values())


def test_offers_change_no_weight_of_the_model() -> None:
    model = student()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    context = ScoringContext(model, model, TEXT[:4])
    mixed.starts(context, model.plan, WidthMoves(), cost_of(model), TARGET, TEXT, repair=True)
    assert {*before} == {*model.state_dict()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_mix_of_least_energy_wins_and_meets_the_target() -> None:
    model = student()
    context, cost = ScoringContext(model, student(), TEXT[:4]), cost_of(model)
    found = mixed.starts(context, model.plan, WidthMoves(), cost, TARGET, TEXT, repair=True)
    searches = [JointSearch(context.evaluator, start.plan, TARGET, cost, guards=Guards(0, 0)) for start in found]
    energies = [search.greedy()[1] for search in searches]
    index, state, energy = mixed.least(searches)
    assert energy == min(energies) == energies[index]
    chosen = searches[index].final(state, 0, energy).plan
    assert TARGET.met(cost.shares(chosen))


def test_a_target_that_no_mix_reaches_is_refused() -> None:
    model = student()
    context, cost = ScoringContext(model, model, TEXT[:4]), cost_of(model)
    far = CostTarget(prefill_flops=0.05)
    found = mixed.starts(context, model.plan, WidthMoves(), cost, far, TEXT, repair=True)
    guards = Guards(2, 2)
    with pytest.raises(UserError, match=r"cannot be reached"):
        mixed.least([JointSearch(context.evaluator, start.plan, far, cost, guards=guards) for start in found])


def joint(epochs: list[int]) -> JointDrop:
    width = WidthMoves(shares=(0.5, 1.0), examples=12)
    return JointDrop(TARGET, epochs, RequestShape(16, 8), Guards(0, 0), annealing=Annealing(4), width=width)


def test_a_run_narrows_in_rounds_and_resumes(tiny_llama_dir: Path, tmp_path: Path) -> None:
    def run(folder: Path, **more: Path) -> tuple[JointDrop, PDTrimModule]:
        drops = joint([0, 1])
        seed_everything(0, verbose=False)
        module = module_for(tiny_llama_dir, structure=Structure(relation="free"))
        trainer_for(folder, [drops]).fit(module, datamodule=data_for(tiny_llama_dir), **more)
        return drops, module

    drops, module = run(tmp_path / "whole")
    cost = CostModel.of(module.student, 16, 8)
    assert TARGET.met(cost.shares(module.plan))
    assert "narrow" in {entry.action for entry in module.plan.history}
    first = next((tmp_path / "whole" / "checkpoints").glob("epoch=0*.ckpt"))
    state = CheckpointState.at(first)
    assert state is not None
    assert drops.share(0).met(cost.shares(state.plan))
    _, again = run(tmp_path / "again", ckpt_path=first)
    assert again.plan == module.plan
    ours, theirs = again.state_dict(), module.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_joint_search_offers_merges_and_widths_together(tiny_llama_dir: Path, tmp_path: Path) -> None:
    drops = JointDrop(
        CostTarget(prefill_flops=0.7, decode_bytes=0.75), [0], RequestShape(16, 8), Guards(0, 0), annealing=None,
        merging=Merging(min_cosine=-1.0, steps=4), width=WidthMoves(shares=(0.3,), examples=12),
    )  # fmt: skip
    seed_everything(0, verbose=False)
    module = module_for(tiny_llama_dir, structure=Structure(relation="free"))
    trainer_for(tmp_path, [drops]).fit(module, datamodule=data_for(tiny_llama_dir))
    assert drops.target.met(CostModel.of(module.student, 16, 8).shares(module.plan))
    assert {"narrow", "merge"} <= {entry.action for entry in module.plan.history}


def test_settings_that_cannot_be_are_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`width.shares` is \[1.5\]: give shares in \[0, 1\]"):
        WidthMoves(shares=(1.5,))
    with pytest.raises(UserError, match=r"`width.examples` is -1"):
        WidthMoves(examples=-1)
    for strategy in (PDTrimFSDPStrategy(), PDTrimDeepSpeedStrategy()):
        with pytest.raises(UserError, match=r"JointDrop tries narrower blocks with layers of their own"):
            check_new_widths(strategy)
    with pytest.raises(Exception, match=r"needs `structure.relation: free`"):
        fit(tmp_path, tiny_llama_dir, [joint([0])])
