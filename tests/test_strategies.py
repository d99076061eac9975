"""Two processes train what one trains, under DDP and the real DeepSpeed engine; what cannot work is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_run import BF16, EPOCHS, MIDDLE, fit
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy, Strategy
from process_group import run_ranks
from tiny_models import TIED, saved_tiny_model, tiny_model

from callbacks import BlockDrop
from pdtrim_pl.checkpoints.sharded import ShardedCheckpoint, put_in_place, unfinished
from pdtrim_pl.checkpoints.state import CheckpointState, sidecar
from pdtrim_pl.criteria import CosineRedundancy
from pdtrim_pl.export import load_stage
from pdtrim_pl.export.verify import Probe
from pdtrim_pl.export.whole import whole_copy
from pdtrim_pl.losses import chunks
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.plan import STAGES, ModelRef, StagePlan
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.strategies import PDTrimDeepSpeedStrategy, PDTrimFSDPStrategy, check_drops, check_strategy, parallel_of

ROOT = Path(__file__).parents[1]
TIMEOUT = 300
STRATEGIES = ("ddp_find_unused_parameters_true", "zero1", "zero2", "zero3", "fsdp")


@pytest.fixture(scope="module")
def model(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight blocks, tied embeddings; beside the weights a plan whose block 3 has weights of its own in decode."""
    folder = saved_tiny_model(tmp_path_factory.mktemp("model"), tiny_tokenizer_dir, blocks=8, **TIED)
    plan = StagePlan.full(ModelRef(str(folder), "llama", 8), "free")
    replace(plan, untied={"decode": (3,)}).save(folder / "plan.json")
    return folder


Alone = tuple[Path, PDTrimModule]


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """The run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, fit("auto", 1, model, folder)


@pytest.fixture(scope="module", params=STRATEGIES)
def together(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in two processes, and continued from its first epoch."""
    folder = tmp_path_factory.mktemp(request.param)
    run_ranks("distributed_run.py", request.param, "2", str(model), str(folder), folder=folder, timeout=TIMEOUT)
    return folder


def told(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "told.json").read_text(encoding="utf-8"))


def logits_of(export: Path) -> torch.Tensor:
    prefill, decode = (load_stage(export, stage) for stage in STAGES)
    probe = Probe.of(prefill.model.config.vocab_size, 128)
    with torch.no_grad():
        out = prefill.prefill(probe.prompt_ids, probe.prompt_mask)
        first = prefill.logits(out.hidden[:, -1:])
        rest = decode.logits(decode.decode(probe.response_ids[:, :-1], out.cache.retained(prefill.policy)).hidden)
    return torch.cat([first, rest], dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["whole", "continued"])
def test_two_processes_train_what_one_trains(part: str, together: Path, alone: Alone) -> None:
    assert_same_run(told(together / part), alone[1])


@pytest.mark.slow
@pytest.mark.parametrize("together", ["fsdp"], indirect=True)
def test_ddp_continues_what_fsdp_saved(together: Path, alone: Alone) -> None:
    assert_same_run(told(together / "crossed"), alone[1])


@pytest.mark.slow
@pytest.mark.parametrize("together", BF16, indirect=True)
def test_two_processes_train_in_bf16_what_one_trains_in_bf16(together: Path, model: Path, tmp_path: Path) -> None:
    name = together.name.rstrip("0123456789")
    module = fit("auto", 1, model, tmp_path, precision=BF16[name])
    found, exact = told(together / "bf16"), told(together / "whole")
    assert found["types"] == ["torch.bfloat16" if BF16[name] == "bf16-true" else "torch.float32"]
    assert_same_run(found, module, loss=1e-2, validation=5e-2, validation_abs=2.5e-2)
    ours, theirs = (dict(run["record"]["losses"]) for run in (found, exact))
    assert ours != pytest.approx(theirs, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("together", ["fsdp"], indirect=True)
def test_fsdp_cuts_up_the_teacher_with_the_student(together: Path) -> None:
    for rank in range(2):
        shares = json.loads((together / "whole" / f"held-{rank}.json").read_text(encoding="utf-8"))
        assert shares == pytest.approx({"student": 0.5, "teacher": 0.5}, abs=0.02)


def test_the_run_makes_every_change_that_a_plan_knows(alone: Alone) -> None:
    plan = alone[1].plan
    assert (plan.kv_only, plan.merged) == ((1,), {"prefill": {5: (5, 6)}, "decode": {5: (5, 6)}})
    assert (plan.removed("prefill"), plan.removed("decode")) == ((1, 3, 6), (3, 4, 6))


def assert_same_run(
    found: dict[str, Any],
    module: PDTrimModule,
    loss: float = 1e-5,
    validation: float = 1e-4,
    validation_abs: float | None = None,
) -> None:
    """`loss` bounds how far losses are apart, `validation` other means, relatively, or `validation_abs` absolutely.

    Where `validation_abs` is given, up to three of the few tokens may have another most likely token: a random model is
    undecided, and kernels of bf16 differ between CPUs.
    """
    record, plan = module.record, module.plan
    assert [(r.stage, r.block, r.round) for r in StagePlan.from_json(found["plan"]).history] == [
        (r.stage, r.block, r.round) for r in plan.history
    ]
    assert [step for step, _ in found["record"]["losses"]] == [step for step, _ in record.losses]
    for (step, ours), (_, theirs) in zip(found["record"]["losses"], record.losses, strict=True):
        assert ours == pytest.approx(theirs, abs=loss), step
    for (step, ours), (_, theirs) in zip(found["record"]["validations"], record.validations, strict=True):
        ours, theirs = dict(ours), dict(theirs)
        few = None if validation_abs is None else 3.5 / 58  # of 58 tokens
        assert ours.pop("agreement") == pytest.approx(theirs.pop("agreement"), rel=validation, abs=few), step
        assert ours == pytest.approx(theirs, rel=validation, abs=validation_abs), step


@pytest.mark.slow
@pytest.mark.parametrize("export", ["whole/export", "continued/export", "converted"])
def test_what_two_processes_export_computes_what_the_single_process_export_computes(
    export: str, together: Path, alone: Alone
) -> None:
    assert (logits_of(together / export) - logits_of(alone[0] / "export")).abs().max() < 1e-4


@pytest.mark.slow
def test_a_sharded_checkpoint_is_judged_as_its_run_was(together: Path, alone: Alone) -> None:
    if together.name.startswith(("zero3", "fsdp")):
        for rank in range(2):
            (values,) = json.loads((together / f"judged-{rank}.json").read_text(encoding="utf-8"))
            assert values["val/ppl"] == pytest.approx(alone[1].record.validations[-1][1]["ppl"], rel=1e-4)


@pytest.mark.slow
def test_plan_and_policy_lie_beside_every_checkpoint_and_the_teacher_in_none(together: Path) -> None:
    files = {path.name for path in (together / "whole").iterdir()}
    assert {f"epoch={epoch}.ckpt" for epoch in range(EPOCHS)} | {"last.ckpt"} <= files
    assert not any("unfinished" in name or "earlier" in name for name in files)
    state = CheckpointState.at(together / "whole" / "last.ckpt")
    assert state is not None
    assert state.plan == StagePlan.from_json(told(together / "whole")["plan"])
    assert state.policy is not None
    assert (state.processes, state.untied) == (2, {"prefill": (), "decode": (3,)})
    middle = together / "whole" / MIDDLE
    saved = middle if middle.is_file() else middle / "checkpoint"
    names: set[str] = set()
    for file in [saved] if saved.is_file() else sorted(saved.glob("*model_states.pt")):
        state_dict = torch.load(file, map_location="cpu", weights_only=False)
        names |= set(state_dict.get("state_dict", {})) | set(state_dict.get("module", {}))
        names |= set(state_dict.get("frozen_param_fragments") or {})
    assert not any(name.startswith("teacher") for name in names)


def test_a_single_run_is_itself_continued_and_converted(model: Path, alone: Alone) -> None:
    folder, whole = alone
    continued = fit("auto", 1, model, folder / "continued", folder / MIDDLE)
    assert continued.record.losses == whole.record.losses
    assert torch.equal(logits_of(folder / "continued" / "export"), logits_of(folder / "export"))


def test_a_run_that_was_continued_after_its_last_step_still_exports(model: Path, alone: Alone, tmp_path: Path) -> None:
    fit("auto", 1, model, tmp_path, alone[0] / "last.ckpt")
    assert torch.equal(logits_of(tmp_path / "export"), logits_of(alone[0] / "export"))


def ddp(**kwargs: bool) -> DDPStrategy:
    return DDPStrategy(process_group_backend="gloo", **kwargs)


@pytest.mark.parametrize("make", [ddp, lambda: ddp(find_unused_parameters=True, static_graph=True)])
def test_ddp_that_waits_for_dropped_blocks_is_refused_before_the_first_step(make: Callable[[], DDPStrategy]) -> None:
    drop = BlockDrop("decode", CosineRedundancy(), {0: 1})
    trainer = Trainer(accelerator="cpu", devices=2, strategy=make(), callbacks=[drop], logger=False, max_epochs=1)
    with pytest.raises(ValueError, match=r"`trainer.strategy` is DDP.*ddp_find_unused_parameters_true"):
        drop.setup(trainer, PDTrimModule("any"), "fit")


def test_strategies_that_can_drop_are_taken() -> None:
    for strategy in (ddp(find_unused_parameters=True), PDTrimDeepSpeedStrategy(2), SingleDeviceStrategy("cpu")):
        check_strategy(strategy)
        check_drops(strategy)


@pytest.mark.parametrize(
    ("make", "stage", "message"),
    [
        (lambda: DeepSpeedStrategy(stage=2), "fit", r"Lightning's own DeepSpeedStrategy.*PDTrimDeepSpeedStrategy"),
        (FSDPStrategy, "fit", r"own FSDPStrategy, under which .*PDTrimFSDPStrategy.*`stage: 3`"),
        (lambda: PDTrimFSDPStrategy(), "predict", r"`predict` cannot run with sharded weights"),
        (lambda: PDTrimDeepSpeedStrategy(3), "predict", r"`predict` cannot run with sharded weights"),
    ],
)
def test_a_strategy_that_cannot_work_is_refused_with_the_way_out(
    make: Callable[[], Strategy], stage: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_strategy(make(), stage)


def test_stage_and_offload_are_chosen_in_yaml_and_any_optimizer_may_be_offloaded() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--strategy", type=Strategy)
    chosen = {"stage": 3, "offload_optimizer": True, "offload_parameters": True}
    asked = {"class_path": "pdtrim_pl.strategies.PDTrimDeepSpeedStrategy", "init_args": chosen}
    strategy = parser.instantiate(parser.parse_object({"strategy": asked})).strategy
    assert strategy.zero_stage_3
    assert {"offload_optimizer", "offload_param"} <= strategy.config["zero_optimization"].keys()
    assert strategy.config["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize("stage", [0, 4])
def test_a_zero_stage_that_is_none_is_refused(stage: int) -> None:
    with pytest.raises(ValueError, match=rf"`stage` of the DeepSpeed strategy is {stage}: give 1, 2 or 3"):
        PDTrimDeepSpeedStrategy(stage)


def test_shards_of_another_run_are_refused_with_every_difference() -> None:
    saved = ShardedCheckpoint(2, 4, "a", {})
    saved.check(ShardedCheckpoint(2, 4, "a", {}), "x.ckpt")
    with pytest.raises(ValueError, match=r"x.ckpt was saved by 4 process.*2; it .*stage 2.*`stage: 3`; it holds"):
        saved.check(ShardedCheckpoint(3, 2, "b", {}), "x.ckpt")


def test_a_directory_without_its_note_was_never_finished(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unfinished, or not of this package: give `ckpt_path` the one before"):
        ShardedCheckpoint.load(tmp_path)
    (tmp_path / "pdtrim.json").write_text('{"format": "pdtrim.sharded_checkpoint/9"}')
    with pytest.raises(ValueError, match=r"`format` is 'pdtrim.sharded_checkpoint/9'"):
        ShardedCheckpoint.load(tmp_path)
    with pytest.raises(ValueError, match=r"no directory of shards"):
        ShardedCheckpoint.load(tmp_path / "none")


def test_a_finished_directory_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for round in range(2):
        Path(unfinished(path)).mkdir()
        ShardedCheckpoint(2, 2 + round, "a", {}).save(unfinished(path))
        put_in_place(path)
    assert ShardedCheckpoint.load(path).processes == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_student_made_whole_is_the_student(tmp_path: Path) -> None:
    staged = StagedCausalLM(tiny_model("llama", tie_word_embeddings=True))
    staged.apply_plan(replace(staged.plan, untied={"decode": (2,)}).drop("decode", 1))
    with torch.no_grad():
        staged.gates[2].untied["decode"].get_parameter("mlp.up_proj.weight").mul_(2.0)
    opened: list[int] = []

    @contextmanager
    def gather(parameters: Any) -> Any:
        opened.extend(map(id, parameters))
        yield

    whole = whole_copy(staged, gather, keep=True)
    assert whole is not None
    assert len(set(opened)) == len(opened) == len(list(staged.parameters())), "every weight once"
    prompt, response = torch.arange(14).view(2, 7), torch.arange(8).view(2, 4)
    assert torch.equal(whole(prompt, response).hidden, staged(prompt, response).hidden)
    assert not {x.data_ptr() for x in whole.parameters()} & {x.data_ptr() for x in staged.parameters()}
    assert whole_copy(staged, gather, keep=False) is None


def test_whole_weights_need_no_gathering() -> None:
    with parallel_of(SingleDeviceStrategy("cpu")).whole_weights([]) as nothing:
        assert nothing is None


@given(st.integers(0, 50), st.integers(1, 9), st.integers(0, 9))
def test_chunks_cover_every_token_once_and_are_as_many_as_asked(length: int, size: int, at_least: int) -> None:
    tokens = list(range(length))
    parts = chunks(length, size, at_least)
    assert [token for part in parts for token in tokens[part]] == tokens
    assert all(len(tokens[part]) <= size for part in parts)
    assert len(parts) == max(-(-length // size), at_least)


def test_a_kv_only_block_with_decode_weights_of_its_own_trains_only_what_prefill_uses() -> None:
    staged = StagedCausalLM(tiny_model("llama"))
    free = replace(staged.plan, relation="free", untied={"decode": (2,)})
    staged.apply_plan(free.drop("prefill", 2))
    staged.freeze_unused()
    gate = staged.gates[2]
    trained = {name for name, weight in gate.block.named_parameters() if weight.requires_grad}
    assert trained == {"input_layernorm.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"}
    assert all(weight.requires_grad for weight in gate.untied["decode"].parameters())


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox", "phi3"])
def test_rope_tables_that_a_loader_rounded_are_made_exact_again(family: str) -> None:
    staged = StagedCausalLM(tiny_model(family))
    before = {name: buffer.clone() for name, buffer in staged.named_buffers() if "freq" in name}
    assert before
    for module in staged.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if "freq" in name:
                module.register_buffer(name, buffer.bfloat16(), persistent=False)
    staged.rebuild_rope()
    for name, buffer in staged.named_buffers():
        if "freq" in name:
            assert torch.equal(buffer, before[name]), name
            assert buffer.dtype == torch.float32


def test_the_files_beside_a_sharded_checkpoint_go_with_it(tmp_path: Path) -> None:
    strategy = PDTrimDeepSpeedStrategy(2)
    path = tmp_path / "a.ckpt"
    path.mkdir()
    sidecar(path, "stage_plan.json").write_text("{}")
    strategy.remove_checkpoint(path)
    assert not any(tmp_path.iterdir())
