"""Channels and heads leave between epochs of real fits of a tiny model; a resumed run equals an uninterrupted one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from test_callbacks import data_for, exported_run, fit, module_for, trainer_for
from tiny_models import tiny_model

from callbacks import BlockDrop, KVRetention, PlanLogger, Repair, WidthDrop
from pdtrim_pl.checkpoints.state import CheckpointState
from pdtrim_pl.criteria import ActivationTimesWeight, CosineRedundancy, LeastSquaresError
from pdtrim_pl.errors import UserError
from pdtrim_pl.export import load_stage
from pdtrim_pl.export.from_checkpoint import export_checkpoint
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.plan import STAGES, ModelRef, Relation, StagePlan, Structure, Target
from pdtrim_pl.search import Guards, Narrowing
from pdtrim_pl.search.stacked import check_together
from pdtrim_pl.selectors import MassSelector
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.description import reference_to
from pdtrim_pl.strategies import PDTrimDeepSpeedStrategy, check_refits

QUICK = Repair(examples=12)


def schedule() -> list[Callback]:
    """Both stages lose channels, then decode alone loses more of them, and a block and heads."""
    return [
        WidthDrop("both", {0: 0.25}, repair=QUICK),
        WidthDrop("decode", {1: 8}, criterion=LeastSquaresError(), repair=QUICK),
        BlockDrop("decode", CosineRedundancy(), {1: 1}, Guards(0, 1)),
        WidthDrop("decode", {2: 2}, "heads", repair=None),
        KVRetention(MassSelector(threshold=0.0, first=2, last=0.25)),
        PlanLogger(),
    ]


@pytest.fixture(scope="module")
def whole_run(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PDTrimModule]:
    return exported_run(tmp_path_factory.mktemp("widths"), tiny_llama_dir, schedule())


def test_channels_and_heads_leave_on_schedule(whole_run: tuple[Path, PDTrimModule]) -> None:
    widths = []
    for epoch in range(3):
        state = CheckpointState.at(whole_run[0] / "checkpoints" / f"epoch={epoch}.ckpt")
        assert state is not None
        widths.append([state.plan.widest(stage) for stage in STAGES])
    assert widths == [
        [{"channels": 48}, {"channels": 48}],
        [{"channels": 48}, {"channels": 40}],
        [{"channels": 48}, {"channels": 40, "heads": 2}],
    ]
    narrowed = {(e.round, e.stage, e.part, e.left) for e in whole_run[1].plan.history if e.action == "narrow"}
    assert narrowed == {
        (0, "prefill", "channels", 48), (0, "decode", "channels", 48), (0, "decode", "channels", 40),
        (0, "decode", "heads", 2),
    }  # fmt: skip


def test_the_export_is_as_narrow_as_the_plan_says(whole_run: tuple[Path, PDTrimModule]) -> None:
    export = whole_run[0] / "export"
    sizes = {}
    for stage in STAGES:
        written = json.loads((export / stage / "config.json").read_text())
        sizes[stage] = written["intermediate_size"], written["num_attention_heads"], written["num_hidden_layers"]
        assert load_stage(export, stage).plan.widths == {"prefill": {}, "decode": {}}
    assert sizes == {"prefill": (48, 4, 4), "decode": (40, 2, 3)}
    card = (export / "README.md").read_text()
    assert "A block of the prefill half has 48 of 64 MLP channels.\n" in card
    assert "A block of the decode half has 40 of 64 MLP channels and 2 of 4 query heads.\n" in card
    assert "narrow to 40 channels" in (export / "report.html").read_text()


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_run_continued_between_two_rounds_equals_the_uninterrupted_one(
    whole_run: tuple[Path, PDTrimModule], tiny_llama_dir: Path, tmp_path: Path, epoch: int
) -> None:
    folder, whole = whole_run
    ckpt_path = folder / "checkpoints" / f"epoch={epoch}.ckpt"
    _, module = fit(tmp_path, tiny_llama_dir, schedule(), ckpt_path=ckpt_path)
    assert module.plan == whole.plan
    assert module.record.losses == whole.record.losses
    for name, weight in module.student.state_dict().items():
        assert torch.equal(weight, whole.student.state_dict()[name]), name


def test_a_checkpoint_is_exported_as_narrow_as_its_run(whole_run: tuple[Path, PDTrimModule], tmp_path: Path) -> None:
    folder, module = whole_run
    export = export_checkpoint(folder / "checkpoints" / "epoch=2.ckpt", tmp_path / "export", dtype="float32")
    for stage in STAGES:
        ours, theirs = (load_stage(path, stage).state_dict() for path in (export, folder / "export"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert module.plan.widest("decode") == {"channels": 40, "heads": 2}


@pytest.mark.parametrize("schedule", [{}, {-1: 4}, {0: 0}, {0: 1.5}, {0: 0.0}])
def test_a_schedule_that_cannot_be_is_refused(schedule: dict[int, int | float]) -> None:
    with pytest.raises(UserError, match="`schedule` of the decode channels is"):
        WidthDrop("decode", schedule)


def test_a_schedule_that_asks_for_too_much_fails_before_the_first_step(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="64 channels cannot leave block 0 in `both`: it has 64, and must keep 1"):
        fit(tmp_path, tiny_llama_dir, [WidthDrop("both", {0: 32, 1: 32})])


@pytest.mark.parametrize(
    ("relation", "drops", "message"),
    [
        (
            "nested",
            [("both", {1: 40}), ("decode", {2: 30})],
            "30 cannot leave `decode` .* removal 2, where 24 are left",
        ),
        ("nested", [("decode", {1: 40}), ("both", {2: 24})], "24 cannot leave `both` .* removal 2, where 24 are left"),
        ("nested", [("prefill", {1: 40}), ("decode", {2: 12, 3: 12})], "removal 3, where 12 are left and 1 must stay"),
        ("free", [("both", {2: 40}), ("prefill", {1: 24})], "40 cannot leave `both` .* removal 2, where 40 are left"),
    ],
)
def test_drops_that_are_possible_one_by_one_and_not_together_fail_before_the_first_step(
    relation: Relation, drops: list[tuple[Target, dict[int, int | float]]], message: str, tiny_llama_dir: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    trainer = trainer_for(tmp_path, [WidthDrop(*drop) for drop in drops], max_epochs=4)
    module, data = module_for(tiny_llama_dir), data_for(tiny_llama_dir)
    module.structure = Structure(relation)
    with pytest.raises(UserError, match=rf"all WidthDrops together take more channels than block 0 has: .*{message}"):
        trainer.fit(module, datamodule=data)
    assert trainer.global_step == 0


@pytest.mark.parametrize(
    ("relation", "removals", "left"),
    [
        ("nested", [("decode", 40), ("prefill", 40)], (24, 24)),  # prefill first loses what decode has lost
        ("nested", [("decode", 40), ("prefill", 50)], (14, 14)),
        ("nested", [("prefill", 40), ("decode", 10)], (24, 14)),
        ("free", [("prefill", 40), ("decode", 60)], (24, 4)),
        ("unified", [("both", 30), ("both", 33)], (1, 1)),
    ],
)
def test_drops_together_leave_each_stage_what_the_relation_lets_it_keep(
    relation: Relation, removals: list[tuple[Target, int]], left: tuple[int, int]
) -> None:
    plan = StagePlan.full(ModelRef("tiny", "llama", 2, channels=64), relation)
    narrowings = [Narrowing(target, "channels", count, ActivationTimesWeight()) for target, count in removals]
    assert check_together(plan, narrowings) == dict(zip(STAGES, left, strict=True))


def test_drops_together_narrow_a_block_in_the_stage_that_still_runs_it() -> None:
    plan = StagePlan.full(ModelRef("tiny", "llama", 2, channels=64), "nested").drop("decode", 0)
    both = Narrowing("both", "channels", 40, ActivationTimesWeight())
    assert check_together(plan, [both]) == dict.fromkeys(STAGES, 24)
    with pytest.raises(UserError, match=r"block 0 has: 40 cannot leave `prefill` .* removal 2, where 24 are left"):
        check_together(plan, [both, both])


def test_a_share_of_a_model_of_unknown_size_fails_before_the_first_step() -> None:
    module, model = PDTrimModule("tiny"), tiny_model("llama")
    plan = StagePlan.full(replace(reference_to(model), channels=None))
    module.student = StagedCausalLM(model, plan)
    with pytest.raises(UserError, match="`part: channels` cannot leave"):
        WidthDrop("both", {0: 0.25}).on_fit_start(Trainer(logger=False, accelerator="cpu"), module)


def test_layers_are_refitted_however_large_a_batch_is(tiny_llama_dir: Path, tmp_path: Path) -> None:
    module, data = module_for(tiny_llama_dir), data_for(tiny_llama_dir)
    trainer_for(tmp_path, [WidthDrop("decode", {0: 8}, repair=Repair(4))], max_epochs=1).fit(module, datamodule=data)
    assert module.student.untied["decode"]


def test_one_batch_of_text_refits_nothing_and_says_so(
    tiny_llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, data = module_for(tiny_llama_dir), data_for(tiny_llama_dir)
    data.eval_batch_size = 12
    trainer_for(tmp_path, [WidthDrop("decode", {0: 8}, repair=QUICK)], max_epochs=1).fit(module, datamodule=data)
    assert not module.student.untied["decode"]
    assert "`repair` refits no layer" in caplog.text


def test_a_round_after_the_last_epoch_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="of the both channels has a round at epoch 3"):
        fit(tmp_path, tiny_llama_dir, [WidthDrop("both", {3: 1})])


def test_strategies_that_shard_refit_only_what_stages_share() -> None:
    sharding = PDTrimDeepSpeedStrategy(stage=2)
    with pytest.raises(UserError, match=r"`trainer.strategy` is DeepSpeed.*`repair: \{tied: true\}`"):
        check_refits(sharding, tied=False)
    check_refits(sharding, tied=True)


def test_widths_need_no_repair_and_a_module_of_ones_own_text(tiny_llama_dir: Path, tmp_path: Path) -> None:
    module, data = module_for(tiny_llama_dir), data_for(tiny_llama_dir)
    trainer_for(tmp_path, [WidthDrop("decode", {0: 8}, repair=None)], max_epochs=1).fit(module, datamodule=data)
    assert module.plan.widest("decode") == {"channels": 56}
    assert not any(module.student.untied.values())
