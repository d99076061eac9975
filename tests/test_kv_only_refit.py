"""Projections of KV-only blocks that are refitted: prefill then makes keys and values like the teacher's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from strategies import plans
from test_callbacks import data_for, fit, module_for, trainer_for
from test_contract import BLOCKS
from test_merging import batches
from tiny_models import FAMILIES, tiny_model
from torch import Tensor

from callbacks import BlockDrop, ExportPair, JointDrop, KVRetention, Repair, RequestShape, WidthDrop
from pdtrim_pl.criteria import CosineRedundancy, ScoringContext
from pdtrim_pl.data import Batch
from pdtrim_pl.errors import UserError
from pdtrim_pl.export import load_plan_and_policy, load_stage
from pdtrim_pl.models.architectures import architecture_of
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.plan import STAGES, Boundary, StagePlan, Structure, Width
from pdtrim_pl.search import Guards, WidthMoves, refit_kv_only
from pdtrim_pl.search.kv_only import RIDGES
from pdtrim_pl.search.narrow import Narrowed
from pdtrim_pl.selectors import MassSelector
from pdtrim_pl.sizing.callback_load import check_callbacks
from pdtrim_pl.sizing.cost import CostModel, CostTarget
from pdtrim_pl.staged import Request, StagedCausalLM
from pdtrim_pl.staged.description import reference_to
from pdtrim_pl.strategies import PDTrimDeepSpeedStrategy, PDTrimFSDPStrategy, check_kv_refits

TEXT, OTHER = batches(30, prompt=12, response=4)[:24], batches(30, prompt=12, response=4)[24:]
KEYS, VALUES = "self_attn.k_proj", "self_attn.v_proj"


def pair_of(
    *dropped: int, family: str = "llama", boundary: Boundary = "decode", width: Width | None = None
) -> tuple[StagedCausalLM, StagedCausalLM]:
    """A student whose prefill lost blocks and some channels, and its teacher."""
    model = tiny_model(family, blocks=BLOCKS)
    teacher = StagedCausalLM(copy.deepcopy(model)).eval()
    plan = StagePlan.full(reference_to(model, family), "prefill_only", boundary)
    for block in dropped:
        plan = plan.drop("prefill", block)
    for block in plan.prefill if width is not None else ():
        assert width is not None
        plan = plan.narrow("prefill", block, width)
    return StagedCausalLM(model, plan).eval(), teacher


def refitted(student: StagedCausalLM, teacher: StagedCausalLM, text: Sequence[Batch] = TEXT) -> Narrowed:
    found = refit_kv_only(ScoringContext(student, teacher, text), text)
    student.apply_plan(found.plan, refits=found.refits)
    return found


@torch.no_grad()
def sent(model: StagedCausalLM, block: int, boundary: Boundary, text: Sequence[Batch] = TEXT) -> Tensor:
    """Keys and values of a block at the real tokens of the prompts, one row a token."""
    rows = []
    for batch in text:
        request = Request.of(*batch.request, boundary)
        kv = model.prefill(request.tokens["prefill"], request.valid["prefill"]).cache.blocks[block]
        both = torch.cat([kv.keys, kv.values], -1).transpose(1, 2).flatten(2)
        rows.append(both[request.valid["prefill"]])
    return torch.cat(rows)


@torch.no_grad()
def inputs_of(model: StagedCausalLM, block: int) -> Tensor:
    """The inputs of a block's projections at the tokens that prefill handles, [N, H]."""
    seen: list[Tensor] = []
    layer = model.gates[block].weights("prefill", model.plan).get_submodule(KEYS)
    for batch in TEXT:
        request = Request.of(*batch.request, "decode")
        valid = request.valid["prefill"]
        hook = layer.register_forward_hook(lambda _, args, out, valid=valid: seen.append(args[0][valid]))
        model.prefill(request.tokens["prefill"], valid)
        hook.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("boundary", ["prefill", "decode"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_prefill_makes_keys_and_values_more_like_the_teachers_on_other_text(family: str, boundary: Boundary) -> None:
    student, teacher = pair_of(1, 2, family=family, boundary=boundary)
    wanted = {block: sent(teacher, block, boundary, OTHER) for block in (1, 2)}
    before = {block: (sent(student, block, boundary, OTHER) - wanted[block]).square().sum() for block in (1, 2)}
    found = refitted(student, teacher)
    assert found.plan.untied == {"prefill": (2,), "decode": ()}, "block 1 reads what it always did"
    for block, error in before.items():
        after = (sent(student, block, boundary, OTHER) - wanted[block]).square().sum()
        assert after < 0.97 * error if block == 2 else after == error


def test_the_new_projections_solve_the_ridge_regression_on_all_text() -> None:
    student, teacher = pair_of(2, 3, width=Width(channels=tuple(range(30))))
    inputs = {block: inputs_of(student, block).double() for block in (2, 3)}
    wanted = {block: inputs_of(teacher, block).double() for block in (2, 3)}
    found = refitted(student, teacher)
    assert [(refit.block, refit.stages, refit.layer) for refit in found.refits] == [
        (block, ("prefill",), layer) for block in (2, 3) for layer in (KEYS, VALUES)
    ]
    for refit in found.refits:
        old = teacher.gates[refit.block].block.get_submodule(refit.layer).get_parameter("weight").double()
        x, change = inputs[refit.block], refit.weight.double() - old
        slope = x.T @ (x @ refit.weight.double().T - wanted[refit.block] @ old.T)
        damping = (x.T @ x).diagonal().mean() * change.T
        left = [float(((slope + ridge * damping).norm() / slope.norm()).detach()) for ridge in RIDGES]
        assert min(left) < 1e-3, left


@pytest.mark.parametrize("family", ["phi3", "gpt_neox"])
def test_queries_of_a_fused_projection_stay(family: str) -> None:
    student, teacher = pair_of(1, 2, family=family)
    (refit,) = refitted(student, teacher).refits
    old = teacher.gates[2].block.get_submodule(refit.layer).get_parameter("weight")
    changed = (refit.weight != old).any(dim=1)
    expected = torch.zeros_like(changed)
    expected[student.architecture.kv_rows(student.gates[2].block)] = True
    assert torch.equal(changed, expected)
    assert 0 < expected.sum() < len(expected)


@pytest.mark.parametrize("half", [False, True])
def test_a_block_that_prefill_loses_after_it_got_weights_of_its_own_is_refitted_behind_its_own_norm(half: bool) -> None:
    student, teacher = pair_of(1)
    student.apply_plan(student.plan.untie("prefill", [2]))
    own = student.gates[2].untied["prefill"]
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.mul_(1 + 0.5 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(3)))
    student.apply_plan(student.plan.drop("prefill", 2))
    assert student.plan.untied["prefill"] == (2,)
    wanted, before = sent(teacher, 2, "decode", OTHER), sent(student, 2, "decode", OTHER)
    with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
        refitted(student, teacher)
    after = sent(student, 2, "decode", OTHER)
    assert (after - wanted).square().sum() < 0.8 * (before - wanted).square().sum()


def test_numbers_that_are_not_finite_are_refused() -> None:
    student, teacher = pair_of(1, 2)
    with torch.no_grad():
        teacher.gates[2].block.get_parameter(f"{VALUES}.weight")[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"What self_attn.v_proj of block 2 reads or gives is not finite"):
        refitted(student, teacher)


def test_decode_and_the_rest_of_the_block_keep_their_weights() -> None:
    student, teacher = pair_of(1, 2)
    refitted(student, teacher)
    own, shared = student.gates[2].untied["prefill"], student.gates[2].block
    assert all(torch.equal(x, teacher.gates[2].block.state_dict()[name]) for name, x in shared.state_dict().items())
    changed = {name for name, x in own.state_dict().items() if not torch.equal(x, shared.state_dict()[name])}
    assert changed == {f"{layer}.weight" for layer in (KEYS, VALUES)}


def test_where_nothing_is_to_be_made_good_or_judged_nothing_changes(caplog: pytest.LogCaptureFixture) -> None:
    whole, teacher = pair_of()
    assert refitted(whole, teacher).refits == []
    same, teacher = pair_of(BLOCKS - 1)  # the last block reads what the teacher's does
    assert refitted(same, teacher).refits == []
    assert not any(same.plan.untied.values())
    student, teacher = pair_of(1, 2)
    assert refitted(student, teacher, TEXT[:1]).refits == []
    assert "there is one batch of text" in caplog.text
    one_token = batches(4, prompt=1, response=4)
    assert refitted(student, teacher, one_token).refits == []


def test_a_teacher_of_another_shape_is_not_fitted_to(caplog: pytest.LogCaptureFixture) -> None:
    student, _ = pair_of(1, 2)
    other = StagedCausalLM(tiny_model("llama", blocks=BLOCKS + 1)).eval()
    assert refitted(student, other).refits == []
    assert "are not refitted: the teacher is of another shape" in caplog.text


@given(plan=plans(BLOCKS, ["prefill_only", "free"]), data=st.data())
def test_prefill_keeps_its_own_weights_of_a_block_until_decode_loses_it_too(
    plan: StagePlan, data: st.DataObject
) -> None:
    assert StagePlan.from_json(plan.to_json()) == plan
    own = plan.untie("prefill", plan.kv_only)
    assert own.untied["prefill"] == tuple(sorted({*plan.untied["prefill"], *plan.kv_only}))
    target = data.draw(st.sampled_from(STAGES if plan.relation == "free" else STAGES[:1]))
    if candidates := own.drop_candidates(target, 0, 0):
        block = data.draw(st.sampled_from(candidates))
        after = own.drop(target, block)
        assert set(after.untied["prefill"]) == set(own.untied["prefill"]) & {*after.prefill, *after.decode}


def test_decode_has_no_weights_of_its_own_for_a_block_that_it_does_not_run(tmp_path: Path) -> None:
    student, _ = pair_of(1)
    plan = student.plan
    assert plan.untie("prefill", [1]).untied["prefill"] == (1,)
    with pytest.raises(UserError, match=r"`untied.decode` names \[1\], which that stage does not run"):
        StagePlan(plan.model, plan.prefill, (0, 2, 3), "free", untied={"decode": (1,)})


def test_every_family_names_the_projections() -> None:
    for family in FAMILIES:
        model = tiny_model(family, blocks=2)
        names = architecture_of(model.config).kv_modules
        assert any(
            isinstance(m, torch.nn.Linear) for m in map(StagedCausalLM(model).gates[0].block.get_submodule, names)
        )


def removals() -> list[Callback]:
    """Prefill loses a block, whose keys and values are refitted, then channels, after which they are refitted again."""
    return [
        BlockDrop("prefill", CosineRedundancy(), {0: 1}, Guards(1, 1), refit_examples=12),
        WidthDrop("prefill", {1: 0.25}, repair=Repair(12)),
        KVRetention(MassSelector(threshold=0.0, first=2, last=0.25)),
    ]


def free(
    folder: Path, model: Path, ckpt_path: Path | None = None, removing: Callable[[], list[Callback]] = removals
) -> PDTrimModule:
    seed_everything(0, verbose=False)
    module = module_for(model, structure=Structure("free"))
    callbacks = [*removing(), ExportPair(folder / "export", "float32", new_tokens=2)]
    trainer_for(folder, callbacks).fit(module, datamodule=data_for(model), ckpt_path=ckpt_path)
    return module


def test_a_run_refits_exports_and_goes_on_from_a_checkpoint(tiny_llama_dir: Path, tmp_path: Path) -> None:
    whole = free(tmp_path / "whole", tiny_llama_dir)
    (block,) = whole.plan.kv_only
    assert block in whole.plan.untied["prefill"]
    own, shared = whole.student.gates[block].untied["prefill"], whole.student.gates[block].block
    assert not torch.equal(own.get_parameter(f"{KEYS}.weight"), shared.get_parameter(f"{KEYS}.weight"))
    written, _ = load_plan_and_policy(tmp_path / "whole" / "export")  # the export was compared with the student
    assert written.untied == whole.plan.untied
    prefill = load_stage(tmp_path / "whole" / "export", "prefill").gates[block].block
    assert torch.equal(prefill.get_parameter(f"{KEYS}.weight"), own.get_parameter(f"{KEYS}.weight"))
    for epoch in (0, 1):
        checkpoint = next((tmp_path / "whole" / "checkpoints").glob(f"epoch={epoch}*.ckpt"))
        again = free(tmp_path / f"from-{epoch}", tiny_llama_dir, checkpoint)
        assert again.plan == whole.plan
        assert again.record.losses == whole.record.losses
        theirs = whole.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in again.state_dict().items())


def apart() -> list[Callback]:
    """Prefill loses a block, and decode loses channels."""
    first = BlockDrop("prefill", CosineRedundancy(), {0: 1}, Guards(1, 1), refit_examples=12)
    return [first, WidthDrop("decode", {0: 0.25}, repair=Repair(12))]


@pytest.mark.parametrize(("removing", "timed"), [(apart, True), (removals, False)])
def test_a_report_has_times_unless_narrow_blocks_of_prefill_stand_beside_kv_only_ones(
    removing: Callable[[], list[Callback]], timed: bool, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    module = free(tmp_path, tiny_llama_dir, removing=removing)
    assert module.plan.kv_only
    assert module.plan.widths["decode" if timed else "prefill"]
    assert ("prefill ms/token" in (tmp_path / "export" / "README.md").read_text()) == timed


def test_refits_that_a_run_cannot_make_are_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    nested = BlockDrop("prefill", CosineRedundancy(), {0: 1}, refit_examples=8)
    with pytest.raises(MisconfigurationException, match=r"under `relation: nested` there are none. Leave it out"):
        fit(tmp_path, tiny_llama_dir, [nested])
    for stage, examples in (("prefill", -1), ("decode", 8), ("both", 8)):
        with pytest.raises(UserError, match=rf"`refit_examples` of the {stage} drops is {examples}: give 0 or more"):
            BlockDrop(stage, CosineRedundancy(), {0: 1}, refit_examples=examples)  # type: ignore[arg-type]
    for strategy, name in ((PDTrimDeepSpeedStrategy(2), "DeepSpeed"), (PDTrimFSDPStrategy(), "FSDP")):
        with pytest.raises(UserError, match=rf"{name}, whose shards are cut once.* Set `refit_examples: 0`"):
            check_kv_refits(strategy)
    drops = [BlockDrop("prefill", CosineRedundancy(), {0: 1}, refit_examples=8)]
    with pytest.raises(UserError, match=r"BlockDrop would write fitted weights into blocks"):
        check_callbacks(drops, offline=False, adapters=True)


def test_a_joint_search_ends_with_refits_of_the_blocks_that_prefill_alone_lost(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    target, moves = CostTarget(prefill_flops=0.6), WidthMoves(shares=(0.0,), examples=12)
    drops = JointDrop(target, [0], RequestShape(16, 8), Guards(0, 0), annealing=None, width=moves)
    seed_everything(0, verbose=False)
    module = module_for(tiny_llama_dir, structure=Structure("free", "decode"))
    trainer_for(tmp_path, [drops], max_epochs=1).fit(module, datamodule=data_for(tiny_llama_dir))
    assert module.plan.kv_only
    assert set(module.plan.untied["prefill"]) & set(module.plan.kv_only)
    assert target.met(CostModel.of(module.student, 16, 8).shares(module.plan))


def test_narrower_blocks_of_both_stages_refit_what_prefill_only_projects(tiny_llama_dir: Path, tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    module = module_for(tiny_llama_dir, structure=Structure("free"))
    callbacks: list[Callback] = [
        BlockDrop("prefill", CosineRedundancy(), {0: 1}),
        WidthDrop("both", {0: 0.25}, repair=Repair(12)),
    ]
    trainer_for(tmp_path, callbacks, max_epochs=1).fit(module, datamodule=data_for(tiny_llama_dir))
    assert module.plan.kv_only == module.plan.untied["prefill"] != ()
