"""Drops, retention and schedules in real fits of a tiny model; a resumed run equals an uninterrupted one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from short_text import SHORT

from callbacks import (
    BlockDrop,
    ExportPair,
    JointDrop,
    KVRetention,
    PlanLogger,
    Repair,
    RepeatedDrop,
    RequestShape,
    SpanMerge,
    WidthDrop,
)
from pdtrim_pl.checkpoints.state import CheckpointState, PlanCheckpointIO, sidecar
from pdtrim_pl.criteria import CosineRedundancy, Criterion, GreedyKL, ScoringContext
from pdtrim_pl.data import Lengths, Parts, PromptResponseDataModule
from pdtrim_pl.evaluation.evaluator import SearchMemory
from pdtrim_pl.evaluation.quality import measure_quality
from pdtrim_pl.export import load_plan_and_policy, load_stage
from pdtrim_pl.losses import KL
from pdtrim_pl.merging import Merging
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.plan import STAGES, KVRetentionPolicy, Retention, StagePlan, Structure
from pdtrim_pl.search import Annealing, Guards, choose_drops
from pdtrim_pl.selectors import BudgetSelector, Effort, MassSelector, WireMenu
from pdtrim_pl.sizing.cost import CostModel, CostTarget


class FirstCandidate(Criterion):
    """An example of a criterion of one's own: always the first block that may go."""

    name = "first"

    def score(self, context: Any, plan: StagePlan, target: Any, candidates: Any) -> dict[int, float]:
        return {block: float(block) for block in candidates}


def data_for(model: Path) -> PromptResponseDataModule:
    parts = Parts(validation=4, calibration=4, max_train=12)
    return PromptResponseDataModule(
        str(model), SHORT, Lengths(max_length=24, min_prompt=8, max_prompt=16), parts=parts, batch_size=4
    )


def module_for(model: Path, **kwargs: Any) -> PDTrimModule:
    return PDTrimModule(str(model), optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3), **kwargs)


def trainer_for(folder: Path, callbacks: list[Callback], **kwargs: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 3, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "num_sanity_val_steps": 0, "gradient_clip_val": 1.0,
    }  # fmt: skip
    saver = ModelCheckpoint(folder / "checkpoints", filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    return Trainer(
        default_root_dir=folder, callbacks=[*callbacks, saver], plugins=[PlanCheckpointIO()], **{**settings, **kwargs}
    )


def schedule() -> list[Callback]:
    return [
        BlockDrop("decode", GreedyKL(), {0: 1, 1: 1}, Guards(0, 1)),
        BlockDrop("prefill", CosineRedundancy(), {2: 1}, Guards(0, 1)),
        KVRetention(MassSelector(threshold=0.0, first=2, last=0.25)),
        PlanLogger(),
    ]


def fit(folder: Path, model: Path, callbacks: list[Callback], **kwargs: Any) -> tuple[Trainer, PDTrimModule]:
    seed_everything(0, verbose=False)
    ckpt_path = kwargs.pop("ckpt_path", None)
    module, trainer = module_for(model), trainer_for(folder, callbacks, **kwargs)
    trainer.fit(module, datamodule=data_for(model), ckpt_path=ckpt_path)
    return trainer, module


def exported_run(folder: Path, model: Path, callbacks: list[Callback]) -> tuple[Path, PDTrimModule]:
    _, module = fit(folder, model, [*callbacks, ExportPair(folder / "export", "float32", new_tokens=2)])
    return folder, module


@pytest.fixture(scope="module")
def whole_run(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PDTrimModule]:
    return exported_run(tmp_path_factory.mktemp("whole"), tiny_llama_dir, schedule())


def test_blocks_leave_on_schedule_and_the_policy_follows_the_last_round(whole_run: tuple[Path, PDTrimModule]) -> None:
    folder, module = whole_run
    blocks = []
    for epoch in range(3):
        state = CheckpointState.at(folder / "checkpoints" / f"epoch={epoch}.ckpt")
        assert state is not None
        blocks.append((len(state.plan.prefill), len(state.plan.decode), state.policy is not None))
    assert blocks == [(4, 3, False), (4, 2, False), (3, 2, True)]
    assert [(r.stage, r.round, r.criterion) for r in module.plan.history] == [
        ("decode", 0, "greedy_kl"), ("decode", 1, "greedy_kl"), ("prefill", 0, "cosine"),
    ]  # fmt: skip
    assert module.policy is not None
    assert set(module.policy.rules) == set(module.plan.decode), "a threshold of 0 trims every block"


def test_the_record_holds_what_the_report_shows(whole_run: tuple[Path, PDTrimModule]) -> None:
    record = whole_run[1].record
    assert [step for step, _ in record.losses] == list(range(1, 10))
    assert [step for step, _ in record.removals] == [0, 3, 6]
    assert len(record.validations) == 3
    assert set(record.redundancy["prefill"]) == {0, 1, 2, 3}
    assert set(record.attention_mass) == set(whole_run[1].plan.decode)


def test_the_teacher_is_frozen_and_never_saved(whole_run: tuple[Path, PDTrimModule]) -> None:
    folder, module = whole_run
    checkpoint = torch.load(folder / "checkpoints" / "epoch=2.ckpt", weights_only=True)
    assert not any(name.startswith("teacher") for name in checkpoint["state_dict"])
    assert not module.teacher.training
    assert not any(parameter.requires_grad for parameter in module.teacher.parameters())


def test_a_block_that_left_both_stages_keeps_its_weights(whole_run: tuple[Path, PDTrimModule]) -> None:
    _, module = whole_run
    gone = set(module.plan.removed("prefill")) & set(module.plan.removed("decode"))
    assert gone
    for block in gone:
        assert not any(parameter.requires_grad for parameter in module.student.gates[block].parameters())


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_run_continued_in_the_middle_of_its_schedule_equals_the_uninterrupted_one(
    whole_run: tuple[Path, PDTrimModule], tiny_llama_dir: Path, tmp_path: Path, epoch: int
) -> None:
    folder, whole = whole_run
    ckpt_path = folder / "checkpoints" / f"epoch={epoch}.ckpt"
    _, module = fit(tmp_path, tiny_llama_dir, schedule(), ckpt_path=ckpt_path)
    assert module.plan == whole.plan
    assert module.policy == whole.policy
    assert module.record.losses == whole.record.losses
    for name, weight in module.student.state_dict().items():
        assert torch.equal(weight, whole.student.state_dict()[name]), name


def test_the_export_holds_the_trained_student(whole_run: tuple[Path, PDTrimModule]) -> None:
    folder, module = whole_run
    decode = load_stage(folder / "export", "decode")
    assert decode.originals == module.plan.decode
    trained = module.student.gates[module.plan.decode[-1]].block.state_dict()
    for name, weight in decode.gates[module.plan.decode[-1]].block.state_dict().items():
        assert torch.equal(weight, trained[name]), name
    assert {"report.html", "README.md", "stage_plan.json", "kv_policy.json"} <= {
        path.name for path in (folder / "export").iterdir()
    }


def test_an_export_target_that_is_taken_fails_before_the_first_step(
    whole_run: tuple[Path, PDTrimModule], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    taken = whole_run[0] / "export"
    with pytest.raises(ValueError, match=r"exists.*overwrite"):
        fit(tmp_path, tiny_llama_dir, [ExportPair(taken)])
    assert not (tmp_path / "checkpoints").exists()


def test_a_damaged_checkpoint_is_named(
    whole_run: tuple[Path, PDTrimModule], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    torn = tmp_path / "torn.ckpt"
    whole = (whole_run[0] / "checkpoints" / "epoch=1.ckpt").read_bytes()
    torn.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"torn.ckpt cannot be read"):
        fit(tmp_path, tiny_llama_dir, schedule(), ckpt_path=torn)


def test_a_checkpoint_of_another_format_is_refused(
    whole_run: tuple[Path, PDTrimModule], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    checkpoint = torch.load(whole_run[0] / "checkpoints" / "epoch=1.ckpt", weights_only=True)
    checkpoint["pdtrim"]["format"] = "pdtrim.checkpoint/9"
    torch.save(checkpoint, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match=r"`format` 'pdtrim.checkpoint/9'"):
        fit(tmp_path, tiny_llama_dir, schedule(), ckpt_path=tmp_path / "foreign.ckpt")


def test_files_beside_a_checkpoint_go_with_it(whole_run: tuple[Path, PDTrimModule], tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    writer = PlanCheckpointIO()
    writer.save_checkpoint(torch.load(whole_run[0] / "checkpoints" / "epoch=2.ckpt", weights_only=True), path)
    files = [sidecar(path, name) for name in ("stage_plan.json", "kv_policy.json", "config.yaml")]
    assert all(file.is_file() for file in files)
    writer.remove_checkpoint(path)
    assert not any(tmp_path.iterdir())


def test_a_repeated_drop_ends_exactly_at_its_target() -> None:
    assert RepeatedDrop(blocks=2, every=3, until=5, start=1).by_epoch() == {1: 2, 4: 2, 7: 1}
    with pytest.raises(ValueError, match=r"`schedule` needs `blocks`"):
        RepeatedDrop(blocks=0, every=1, until=1)


def test_a_schedule_from_a_saved_configuration_has_its_epochs_back_as_numbers() -> None:
    drop = BlockDrop("decode", CosineRedundancy(), {"0": 2, "3": 1})  # type: ignore[dict-item]
    assert drop.schedule == {0: 2, 3: 1}
    assert drop.last_round == 3


@pytest.mark.parametrize("schedule", [{}, {-1: 2}, {0: 0}])
def test_a_schedule_that_cannot_be_is_refused(schedule: dict[int, int]) -> None:
    with pytest.raises(ValueError, match=r"`schedule` of the decode drops is"):
        BlockDrop("decode", CosineRedundancy(), schedule)


def test_a_round_after_the_last_epoch_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"round at epoch 3, and `trainer.max_epochs` is 3"):
        fit(tmp_path, tiny_llama_dir, [BlockDrop("decode", FirstCandidate(), {3: 1})])


def test_annealing_searches_from_the_choice_and_a_second_run_reads_its_journal(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    runs = []
    for _ in range(2):
        drop = BlockDrop("decode", FirstCandidate(), {0: 2}, Guards(0, 0), Annealing(20, temperature=0.5))
        _, module = fit(tmp_path, tiny_llama_dir, [drop], max_epochs=1)
        runs.append(module)
        lines = (tmp_path / "checkpoints" / "search_journal.jsonl").read_text().splitlines()
    assert runs[0].plan == runs[1].plan
    assert {entry.criterion for entry in runs[0].plan.history} == {"annealing"}
    assert len(set(lines)) == len(lines), "the second run evaluated nothing again"


def test_until_counts_what_is_gone_whoever_dropped_it(tiny_llama_dir: Path, tmp_path: Path) -> None:
    drops: list[Callback] = [
        BlockDrop("prefill", FirstCandidate(), {0: 1}, Guards(0, 0)),
        BlockDrop("decode", FirstCandidate(), RepeatedDrop(blocks=1, every=1, until=2), Guards(0, 0)),
    ]
    _, module = fit(tmp_path, tiny_llama_dir, drops)
    assert (len(module.plan.prefill), len(module.plan.decode)) == (3, 2)


def test_a_schedule_that_asks_for_too_much_fails_before_the_first_step(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"asks for 5 blocks, and only 2 may leave under `guards`"):
        fit(tmp_path, tiny_llama_dir, [BlockDrop("decode", FirstCandidate(), {0: 1, 1: 4})])


@pytest.mark.parametrize(
    ("parts", "tokens", "message"),
    [
        (Parts(validation=0, calibration=4), 8, r"there is none. Set `data.parts.validation`"),
        (Parts(validation=4, calibration=4), 600, r"`prompt_tokens: 600` .* exceed the context"),
    ],
)
def test_an_export_that_cannot_measure_fails_before_the_first_step(
    parts: Parts, tokens: int, message: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    data = PromptResponseDataModule(str(tiny_llama_dir), SHORT, Lengths(24, 8, 16), parts=parts)
    trainer = trainer_for(tmp_path, [ExportPair(tmp_path / "export", prompt_tokens=tokens)])
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(module_for(tiny_llama_dir), datamodule=data)
    assert trainer.global_step == 0


def test_a_run_that_ends_before_its_rounds_says_so(
    tiny_llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exporter = ExportPair(tmp_path / "export", measure=False)
    fit(tmp_path, tiny_llama_dir, [BlockDrop("decode", FirstCandidate(), {2: 1}), exporter], max_steps=2)
    assert "ended before these rounds (what, epoch): [('decode drops', 2)]" in caplog.text


def test_retention_by_damage_trims_the_blocks_that_hurt_least(tiny_llama_dir: Path, tmp_path: Path) -> None:
    selector = BudgetSelector(1.5, first=1, last=0.2, order="damage", prompt_tokens=16, codecs=["none"])
    trainer, module = fit(tmp_path, tiny_llama_dir, [KVRetention(selector)], max_epochs=1)
    policies = {
        block: KVRetentionPolicy("prefill", module.student.kv_shape, {block: selector.rule}) for block in range(4)
    }
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    damages = {  # the student had the teacher's weights when the rules were chosen
        block: measure_quality(
            module.teacher, module.teacher, data.calibration_dataloader(), plan=module.plan, policy=policy
        ).kl
        for block, policy in policies.items()
    }  # fmt: skip
    assert module.policy is not None
    chosen = list(module.policy.rules)
    assert 0 < len(chosen) < 4
    assert chosen == sorted(sorted(damages, key=lambda block: damages[block])[: len(chosen)])
    assert module.record.attention_mass.keys() == damages.keys()
    journal = (tmp_path / "checkpoints" / "search_journal.jsonl").read_text().splitlines()
    assert len(journal) == 4 * len(data.calibration_dataloader()), "one line a block and batch"


def test_bits_are_counted_in_the_element_type_that_is_exported(tiny_llama_dir: Path, tmp_path: Path) -> None:
    selector = BudgetSelector(3.0, prompt_tokens=64, min_recall=0.0, effort=Effort(examples=2))
    exporter = ExportPair(tmp_path / "export", "bfloat16", measure=False)
    _, module = fit(tmp_path, tiny_llama_dir, [KVRetention(selector), exporter], max_epochs=1)
    plan, policy = load_plan_and_policy(tmp_path / "export")
    assert module.student.model.dtype == torch.float32
    assert policy.kv.dtype == "bfloat16"
    assert policy.full_bytes(plan, 64) / policy.sent_bytes(plan, 64) >= 3.0
    assert all(rule.keep == "all" for rule in policy.rules.values())
    assert not module.record.attention_mass, "nothing looked at it"


def test_a_run_exports_in_the_layout_that_it_is_told(tiny_llama_dir: Path, tmp_path: Path) -> None:
    drop = BlockDrop("decode", FirstCandidate(), {0: 1}, Guards(0, 1))
    callbacks = [drop, ExportPair(tmp_path / "export", "float32", measure=False, layout="padded")]
    _, module = fit(tmp_path, tiny_llama_dir, callbacks, max_epochs=1)
    plan = load_plan_and_policy(tmp_path / "export")[0]
    assert plan == replace(module.plan, layout="padded")
    assert len(plan.decode) < len(plan.held("decode")) == len(plan.held("prefill"))
    for stage in STAGES:
        assert load_stage(tmp_path / "export", stage).model.config.num_hidden_layers == 4


def test_retention_before_a_drop_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"must stand after every BlockDrop"):
        fit(tmp_path, tiny_llama_dir, [KVRetention(MassSelector()), BlockDrop("decode", FirstCandidate(), {0: 1})])


def test_retention_ahead_of_the_last_round_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    late = BlockDrop("decode", FirstCandidate(), {2: 1})
    with pytest.raises(MisconfigurationException, match=r"`epoch` of the KV retention is 1, before the last drop"):
        fit(tmp_path, tiny_llama_dir, [late, KVRetention(MassSelector(), epoch=1)])


def test_a_stage_that_does_not_fit_the_relation_fails_before_the_first_step(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    module = module_for(tiny_llama_dir, structure=Structure("unified"))
    trainer = trainer_for(tmp_path, [BlockDrop("decode", FirstCandidate(), {1: 1})])
    with pytest.raises(ValueError, match=r"`stage: decode` does not fit `relation: unified`"):
        trainer.fit(module, datamodule=data_for(tiny_llama_dir))
    assert trainer.global_step == 0


def test_a_round_that_asks_for_too_much_says_what_is_left() -> None:
    from tiny_models import tiny_model

    from pdtrim_pl.staged import StagedCausalLM

    student = StagedCausalLM(tiny_model("llama"))
    context = ScoringContext(student, student, [])
    with pytest.raises(ValueError, match=r"Only 2 of the 3 blocks of round 0 can leave `decode`.*`schedule`"):
        choose_drops(FirstCandidate(), context, student.plan, "decode", 3)
    with pytest.raises(ValueError, match=r"Only 1 of the 2 blocks"):
        choose_drops(FirstCandidate(), context, student.plan, "decode", 2, guards=Guards(max_removed=1))


def test_a_plan_file_starts_a_run(tiny_llama_dir: Path, tmp_path: Path) -> None:
    module = module_for(tiny_llama_dir)
    module.configure_model()
    module.plan.drop("decode", 2).save(tmp_path / "plan.json")
    again = module_for(tiny_llama_dir, structure=Structure(plan=tmp_path / "plan.json"), losses=[KL()])
    again.configure_model()
    assert again.plan.decode == (0, 1, 3)


def test_a_plan_of_another_model_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    from pdtrim_pl.plan import ModelRef

    StagePlan.full(ModelRef("other", "llama", 9)).save(tmp_path / "plan.json")
    module = module_for(tiny_llama_dir, structure=Structure(plan=tmp_path / "plan.json"))
    with pytest.raises(ValueError, match=r"for a model of 9 blocks, and `model` has 4"):
        module.configure_model()


def test_a_round_may_merge_neighbours_into_weights_of_their_own(tiny_llama_dir: Path, tmp_path: Path) -> None:
    merging = Merging(min_cosine=-1.0, steps=8, learning_rate=3e-3)
    drops: list[Callback] = [
        BlockDrop("decode", GreedyKL(), {0: 1, 1: 1}, Guards(0, 0), merging=merging),
        BlockDrop("prefill", GreedyKL(), {1: 1}, Guards(0, 0), Annealing(10), merging=merging),
    ]
    _, module = fit(tmp_path, tiny_llama_dir, drops)
    actions = {entry.action for entry in module.plan.history}
    assert "merge" in actions, "a fitted pair hurts less than a drop"
    assert (len(module.plan.prefill), len(module.plan.decode)) == (3, 2)
    assert module.student.gates[1].offers == {}, "what was not chosen is gone"
    state = CheckpointState.at(next((tmp_path / "checkpoints").glob("epoch=2*.ckpt")))
    assert state is not None
    assert state.plan == module.plan


@pytest.mark.parametrize("channels", [None, 16])
def test_one_block_takes_the_place_of_a_span_and_the_run_goes_on_from_a_checkpoint(
    channels: int | None, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    merging = Merging(min_cosine=-1.0, steps=8)

    def span() -> list[Callback]:
        merge = SpanMerge(2, 1, merging, screening_steps=2, trailing_blocks=1, guards=Guards(0, 0))
        narrower = [] if channels is None else [WidthDrop("both", {1: channels}, repair=Repair(examples=8))]
        return [merge, *narrower]

    _, module = fit(tmp_path / "whole", tiny_llama_dir, span())
    ((into, run),) = module.plan.merged["prefill"].items()
    assert (len(run), module.plan.merged["decode"]) == (3, {into: run})
    step = next(entry for entry in module.plan.history if entry.action == "merge")
    assert (step.action, step.criterion, step.round) == ("merge", "fitted_kl", 0)
    if channels is not None:
        assert module.plan.widest("decode")["channels"] == module.plan.model.sizes["channels"] - channels
    assert not any(gate.offers for gate in module.student.gates.values())
    for epoch in (0, 1):
        checkpoint = next((tmp_path / "whole" / "checkpoints").glob(f"epoch={epoch}*.ckpt"))
        _, again = fit(tmp_path / f"from-{epoch}", tiny_llama_dir, span(), ckpt_path=checkpoint)
        assert again.plan == module.plan
        ours, theirs = again.state_dict(), module.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_span_that_cannot_be_replaced_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"A span merge needs `blocks` >= 1 and .* has 0, 0, 64 and 2"):
        SpanMerge(0)
    with pytest.raises(ValueError, match=r"`screening_steps` >= 1 .* has 1, 0, 0 and 2"):
        SpanMerge(1, screening_steps=0)
    with pytest.raises(ValueError, match=r"No 4 neighbours of \(0, 1, 2, 3\) can be merged in both stages within"):
        fit(tmp_path, tiny_llama_dir, [SpanMerge(3)])
    short = SpanMerge(1, merging=Merging(min_cosine=1.0, steps=1), screening_steps=1, guards=Guards(0, 0))
    with pytest.raises(ValueError, match=r"reaches a cosine of 0.*`merging.min_cosine` is 1.0. Remove fewer blocks"):
        fit(tmp_path, tiny_llama_dir, [short])


def test_one_search_over_both_stages_meets_its_target_in_rounds(tiny_llama_dir: Path, tmp_path: Path) -> None:
    target = CostTarget(prefill_flops=0.8, decode_bytes=0.8, wire_bytes=0.4)
    menu = WireMenu(("int8", "int4"), Retention("first_last", 1, 1), examples=2)
    drops = JointDrop(target, [0, 2], RequestShape(16, 8), Guards(0, 0), menu, Annealing(10))
    structure = Structure(relation="free")
    seed_everything(0, verbose=False)
    module = module_for(tiny_llama_dir, structure=structure)
    trainer_for(tmp_path, [drops]).fit(module, datamodule=data_for(tiny_llama_dir))
    cost = CostModel.of(module.student, 16, 8)
    assert target.met(cost.shares(module.plan, module.policy))
    assert {(entry.criterion, entry.round) for entry in module.plan.history} <= {("joint", 0), ("joint", 1)}
    first = CheckpointState.at(next((tmp_path / "checkpoints").glob("epoch=0*.ckpt")))
    assert first is not None
    assert drops.share(0).met(cost.shares(first.plan, first.policy))
    assert not target.met(cost.shares(first.plan, first.policy))


def test_a_joint_search_may_merge_neighbours_of_one_stage(tiny_llama_dir: Path, tmp_path: Path) -> None:
    merging = Merging(min_cosine=-1.0, steps=8)
    drops = JointDrop(
        CostTarget(prefill_flops=0.7, decode_bytes=0.7), [0], RequestShape(16, 8), Guards(0, 0), annealing=None,
        merging=merging, memory=SearchMemory(base=10**6),
    )  # fmt: skip
    seed_everything(0, verbose=False)
    module = module_for(tiny_llama_dir, structure=Structure(relation="free"))
    trainer_for(tmp_path, [drops]).fit(module, datamodule=data_for(tiny_llama_dir))
    assert drops.target.met(CostModel.of(module.student, 16, 8).shares(module.plan, module.policy))
    assert "merge" in {entry.action for entry in module.plan.history}, "a fitted pair hurts less than a drop"
    assert module.student.gates[1].offers == {}
    with pytest.raises(ValueError, match=r"`merging.tied` of the joint drops: a joint search merges in one stage"):
        JointDrop(CostTarget(0.5), [0], merging=Merging(tied=True))


def test_joint_drops_refuse_what_they_cannot_do(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`epochs` of the joint drops is \[\]"):
        JointDrop(CostTarget(0.5), [])
    with pytest.raises(ValueError, match=r"asks for nothing"):
        JointDrop(CostTarget(), [0])
    with pytest.raises(MisconfigurationException, match=r"needs `structure.relation: free`, and the plan has `nested`"):
        fit(tmp_path, tiny_llama_dir, [JointDrop(CostTarget(0.8), [0])])
    twice: list[Callback] = [JointDrop(CostTarget(wire_bytes=0.5), [0]), KVRetention(MassSelector())]
    with pytest.raises(MisconfigurationException, match=r"chooses what KV to send, and so does KVRetention"):
        fit(tmp_path, tiny_llama_dir, twice)
