"""Memory of a run before it is started: true shapes, exact weights and states, and a refusal of what cannot fit."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tiny_models import tiny_model
from torch import Tensor

from callbacks import BlockDrop, ExportPair, JointDrop, KVRetention, PlanLogger, Repair, SpanMerge, WidthDrop
from pdtrim_pl.cli import main as cli
from pdtrim_pl.cli.dry_run import counted, run
from pdtrim_pl.criteria import LastN
from pdtrim_pl.data import Lengths, PromptResponseDataModule
from pdtrim_pl.merging import Merging
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.plan import StagePlan
from pdtrim_pl.search import WidthMoves
from pdtrim_pl.selectors import BudgetSelector, Effort, KVSelector, MassSelector, NoSelector, SelectorLoad
from pdtrim_pl.sizing.cost import CostTarget
from pdtrim_pl.sizing.load import GIB, Layout, Load
from pdtrim_pl.sizing.memory import HOST_BYTES, MemoryEstimate, block_bytes, block_elements, memory_per_process
from pdtrim_pl.sizing.of_run import Processes, load_of, model_config, size_of
from pdtrim_pl.sizing.shape import Shape
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.description import reference_to

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.name.startswith("compare_"))
SHAPES = ROOT / "configs" / "shapes"
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
    "Qwen/Qwen3-8B": 8_190_735_360,
}
LOAD = Load(batch=2, eval_batch=2, tokens=4096, chunk_tokens=1024, gradient_checkpointing=True, calibration=256)


@pytest.fixture(scope="module")
def eight() -> Shape:
    return Shape.of(model_config("meta-llama/Llama-3.1-8B", [SHAPES]))


def dry_run(config: Path, *extra: str) -> str:
    out = io.StringIO()
    assert run(["fit", "--dry_run", "--config", str(config), *extra], out) == 0
    return out.getvalue()


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_a_shape_has_exactly_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert Shape.of(model_config(name, [SHAPES])).parameters == parameters


def test_a_model_without_a_shape_file_is_read_itself(tiny_llama_dir: Path) -> None:
    shape = Shape.of(model_config(str(tiny_llama_dir), [SHAPES, ROOT / "nowhere"]))
    assert (shape.blocks, shape.hidden, shape.kv) == (4, 32, 16)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_configuration_fits_the_machine_its_header_names(path: Path) -> None:
    said = dry_run(path, "--device_memory", "79")
    assert "total" in said
    assert "parameters in" in said


@pytest.mark.parametrize("change", ["--trainer.devices=1", "--model.loading.gradient_checkpointing=false"])
def test_a_run_that_cannot_fit_is_refused_with_ways_out(change: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = ROOT / "configs" / "llama3_8b_deepspeed.yaml"
    assert cli.main(["fit", "--dry_run", "--config", str(config), change, "--device_memory", "79"]) == 1
    said = capsys.readouterr()
    assert "total" in said.out, "the table comes first"
    assert "GiB on every device, and there are 79.0. Try one of: " in said.err
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    ("config", "needs", "way"),
    [
        ("llama3_8b_1gpu.yaml", "136.6", "offload less"),
        ("llama3_8b_deepspeed.yaml", "31.0", "more nodes with fewer processes"),
        ("llama3_70b.yaml", "804.5", "offload less"),
    ],
)
def test_a_run_that_its_hosts_cannot_hold_is_refused_with_ways_out(config: str, needs: str, way: str) -> None:
    path, enough = ROOT / "configs" / config, f"{float(needs) + 1:.1f}"
    assert f"process(es): {needs}\n" in dry_run(path, "--device_memory", "79")
    assert f"{needs}  of {enough}" in dry_run(path, "--device_memory", "79", "--host_memory", enough)
    with pytest.raises(
        ValueError, match=rf"needs {needs} GiB of the first node's host memory, and there are 16.0.*{way}"
    ):
        dry_run(path, "--device_memory", "79", "--host_memory", "16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--trainer.precision=bf16-true"], r"`trainer.precision: bf16-true` keeps the weights that train in 16 bits"),
        (["--model.loading.dtype=bfloat16"], r"The student's weights are bfloat16 \(`loading.dtype`\)"),
        (
            ["--trainer.strategy=pdtrim_pl.strategies.PDTrimFSDPStrategy", "--trainer.precision=bf16-true"],
            r"Use `precision: bf16-mixed`",
        ),
    ],
)
def test_training_in_sixteen_bits_alone_is_refused_before_a_machine_is_asked_for(
    changes: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        dry_run(ROOT / "configs" / "quickstart.yaml", *changes)


def test_only_fsdp_loads_whole_models_into_host_memory(eight: Shape) -> None:
    def host(**layout: Any) -> int:
        known = Layout(processes=8, student_bytes=2, teacher_bytes=2, loaded_bytes=(4, 2), **layout)
        return memory_per_process(eight, eight, known, LOAD).of_host(8) - 8 * HOST_BYTES

    assert host(zero_stage=3, fsdp=True) == 8 * 6 * eight.parameters
    assert host() == host(zero_stage=2) == 2 * eight.parameters, "the export's copy"
    assert host(zero_stage=3) == 4 * eight.parameters, "and the whole student"


def test_processes_share_whole_batches_of_the_calibration_set(eight: Shape) -> None:
    def search(processes: int) -> int:
        load = replace(LOAD, calibration=64, eval_batch=16, tokens=2048, search_cache_bytes=10**15)
        layout = Layout(processes=processes, student_bytes=2, teacher_bytes=2, compute_bytes=2)
        return memory_per_process(eight, eight, layout, load).device["activations or search"]

    assert search(1) > search(2) > search(4) == search(64), "four batches"


@pytest.mark.parametrize("strategy", ["deepspeed_stage_2", "fsdp"])
def test_strategies_that_fit_would_refuse_are_refused_here(strategy: str, tiny_llama_dir: Path) -> None:
    arguments = ["fit", "--dry_run", f"--model.model={tiny_llama_dir}", f"--data.tokenizer={tiny_llama_dir}"]
    with pytest.raises(ValueError, match=r"`trainer.strategy` is .*Use `strategy: \{class_path"):
        run([*arguments, f"--trainer.strategy={strategy}"])


@pytest.mark.parametrize(
    ("zero_stage", "expected"),
    [(0, (2, 2, 2, 4)), (1, (2, 2, 2, 12 / 8)), (2, (2, 2, 2 / 8, 12 / 8)), (3, (2 / 8, 2 / 8, 2 / 8, 12 / 8))],
)
def test_every_zero_stage_cuts_up_one_thing_more(eight: Shape, zero_stage: int, expected: tuple[float, ...]) -> None:
    layout = Layout(processes=8, zero_stage=zero_stage, student_bytes=2, teacher_bytes=2, compute_bytes=2)
    device = memory_per_process(eight, eight, layout, LOAD).device
    for what, width in zip(("student", "teacher", "gradients", "optimizer"), expected, strict=True):
        assert device[what] == pytest.approx(width * eight.parameters), what


def test_offloading_moves_bytes_to_the_host(eight: Shape) -> None:
    on_device = Layout(processes=8, zero_stage=3, student_bytes=2, teacher_bytes=2, compute_bytes=2)
    moved = Layout(**{**vars(on_device), "offload_optimizer": True, "offload_parameters": True})
    before, after = (memory_per_process(eight, eight, layout, LOAD) for layout in (on_device, moved))
    assert after.total < before.total
    assert set(after.host) == {"optimizer", "student", "teacher"}
    weights = 2 * eight.parameters
    assert after.of_host(4) == 4 * (sum(after.host.values()) + HOST_BYTES) + 2 * weights, "and the export's copies"
    assert not {"optimizer", "student", "teacher", "gradients"} & set(after.device)


@pytest.mark.parametrize(
    ("name", "embeddings"), [("meta-llama/Llama-3.1-8B", 2 * 128_256 * 4096), ("smollm2-135m", 49_152 * 576)]
)
def test_frozen_embeddings_need_neither_gradients_nor_optimizer(name: str, embeddings: int) -> None:
    shape = Shape.of(model_config(name, [SHAPES]))
    assert shape.embeddings == embeddings, "a head that is the embedding counts once"
    whole = memory_per_process(shape, shape, Layout(), LOAD).device
    frozen = memory_per_process(shape, shape, Layout(frozen_embeddings=True), LOAD).device
    saved = {part: whole[part] - frozen[part] for part in whole if whole[part] != frozen[part]}
    assert saved == {"gradients": 4 * embeddings, "optimizer": 8 * embeddings}


def test_merges_need_every_fitted_block_and_those_in_training(eight: Shape) -> None:
    assert eight.block == 218_112_000
    layout = Layout(student_bytes=2, teacher_bytes=2, compute_bytes=2)
    merging = Merging(steps=6, pairs_at_once=8, cache_bytes=10**15)
    load = replace(LOAD, calibration=1, eval_batch=1, tokens=512, merging=merging, fitted_at_once=16)
    without, whole = (
        memory_per_process(eight, eight, layout, asked).device["activations or search"]
        for asked in (replace(load, merging=None, fitted_at_once=0), load)
    )
    states = 8 * 512 * 33 * 4096 * 2
    fits = 16 * 16 * eight.block
    assert whole == states + fits + 31 * eight.block * 2, "eight batches of one example: six steps, and two that judge"
    assert without < whole
    one = replace(load, fitted_at_once=1)
    solving = 4 * eight.block + 24 * 14336 * (14336 + 4096)
    assert solving > 16 * eight.block, "the three matrices of the least squares"
    found = memory_per_process(eight, eight, layout, one).device["activations or search"]
    assert found == states + solving + 31 * eight.block * 2
    capped = replace(load, merging=replace(merging, cache_bytes=1000))
    assert memory_per_process(eight, eight, layout, capped).device["activations or search"] == whole - states + 1000


def test_a_dry_run_counts_the_largest_merges_of_all_callbacks(tiny_llama_dir: Path) -> None:
    module, data = PDTrimModule(str(tiny_llama_dir)), PromptResponseDataModule(str(tiny_llama_dir))
    small, large = Merging(pairs_at_once=2), Merging(pairs_at_once=3)
    drops: list[Callback] = [BlockDrop("decode", LastN(), {0: 1}, merging=each) for each in (None, small, large)]
    assert load_of(module, data, [*drops, PlanLogger()]).merging == large
    assert load_of(module, data, drops[:1]).merging is load_of(module, data).merging is None
    span = SpanMerge(1, merging=Merging(pairs_at_once=1), trailing_blocks=3)
    asked = ([], drops[:1], drops, [span], [*drops, span], [SpanMerge(1, merging=large, trailing_blocks=1)])
    assert [load_of(module, data, callbacks).fitted_at_once for callbacks in asked] == [0, 0, 6, 8, 8, 6]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (NoSelector(), SelectorLoad(eager_attention=True)),
        (MassSelector(), SelectorLoad(eager_attention=True)),
        (BudgetSelector(2.0, codecs=["none"]), SelectorLoad(eager_attention=True)),
        (BudgetSelector(2.0, codecs=["none"], order="damage"), SelectorLoad(calibration=True, eager_attention=True)),
        (BudgetSelector(), SelectorLoad(examples=8)),
        (BudgetSelector(effort=Effort(examples=3, exchanges=True)), SelectorLoad(examples=3)),
    ],
)
def test_a_dry_run_counts_what_the_selector_keeps(
    selector: KVSelector, expected: SelectorLoad, tiny_llama_dir: Path
) -> None:
    module, data = PDTrimModule(str(tiny_llama_dir)), PromptResponseDataModule(str(tiny_llama_dir))
    load = load_of(module, data, [PlanLogger(), KVRetention(selector)])
    assert load.selection == expected
    assert not load.searches
    assert load_of(module, data, [BlockDrop("decode", LastN(), {0: 1}), KVRetention(selector)]).searches
    assert load_of(module, data).selection is None


def test_a_dry_run_counts_what_a_joint_search_over_the_wire_keeps(tiny_llama_dir: Path) -> None:
    module, data = PDTrimModule(str(tiny_llama_dir)), PromptResponseDataModule(str(tiny_llama_dir))
    wire, blocks = (JointDrop(target, [0]) for target in (CostTarget(wire_bytes=0.2), CostTarget(decode_bytes=0.9)))
    assert load_of(module, data, [wire]).selection == SelectorLoad(examples=8)
    assert load_of(module, data, [blocks]).selection is None
    assert load_of(module, data, [wire]).searches


def test_a_dry_run_counts_what_narrower_blocks_are_fitted_on(tiny_llama_dir: Path, eight: Shape) -> None:
    module, data = PDTrimModule(str(tiny_llama_dir)), PromptResponseDataModule(str(tiny_llama_dir))
    fitted, plain = WidthDrop("both", {0: 0.25}, repair=Repair(40)), WidthDrop("both", {0: 0.25}, repair=None)
    asked = ([], [fitted], [fitted, plain])
    assert [load_of(module, data, callbacks).narrowed_on for callbacks in asked] == [0, 40, 256]
    assert not load_of(module, data, [fitted]).searches
    layout = Layout(student_bytes=2, teacher_bytes=2, compute_bytes=2)
    load = replace(LOAD, batch=0, chunk_tokens=0, searches=False, narrowed_on=40)
    needed = memory_per_process(eight, eight, layout, load).device["activations or search"]
    assert needed == 40 * 4096 * 4096 * 2 + 10 * 8 * 14336**2


def test_a_dry_run_counts_the_refitted_layers_that_a_joint_search_offers(tiny_llama_dir: Path, eight: Shape) -> None:
    module, data = PDTrimModule(str(tiny_llama_dir)), PromptResponseDataModule(str(tiny_llama_dir))
    for moves, offered in ((WidthMoves(), 3), (WidthMoves(shared=False), 2), (WidthMoves(examples=0), 0)):
        load = load_of(module, data, [JointDrop(CostTarget(decode_bytes=0.9), [0], width=moves)])
        assert load.widths_offered == offered
        assert load.narrowed_on == (moves.examples or 256)
    layout = Layout(student_bytes=2, teacher_bytes=2, compute_bytes=2)
    load = replace(LOAD, batch=0, chunk_tokens=0, searches=False, widths_offered=2)
    needed = memory_per_process(eight, eight, layout, load).device["activations or search"]
    assert needed == 2 * 32 * 14336 * 4096 * 2


def test_weights_of_a_stages_own_are_those_of_a_real_student() -> None:
    model = tiny_model("llama", blocks=4)
    shape, every = Shape.of(model.config), (0, 1, 2, 3)
    for plan, untied, kv_only in (
        (StagePlan(reference_to(model), (0, 1), every, "prefill_only", untied={"prefill": (2, 3)}), (0, 0), 2),
        (StagePlan(reference_to(model), every, every, untied={"decode": every}), (0, 4), 0),
        (StagePlan(reference_to(model), every, every, untied={"prefill": (0,), "decode": (1, 2)}), (1, 2), 0),
        (StagePlan(reference_to(model), every, every, untied={"prefill": every, "decode": every}), (4, 4), 0),
    ):
        student = StagedCausalLM(tiny_model("llama", blocks=4), plan)
        student.train_only("all")
        asked = replace(LOAD, untied=untied, untied_kv_only=kv_only)
        found = memory_per_process(shape, shape, Layout(), asked).device
        assert found["student"] == 4 * sum(parameter.numel() for parameter in student.parameters())
        norms = 32 * len(plan.kv_only)  # those in front of the projections train too, and are not counted
        trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
        assert found["gradients"] == 4 * (trained - norms)


def test_a_dry_run_counts_the_blocks_that_get_weights_of_their_own(tiny_llama_dir: Path) -> None:
    module, data = PDTrimModule(str(tiny_llama_dir)), PromptResponseDataModule(str(tiny_llama_dir))
    merging, moves = Merging(), WidthMoves(shares=(0, 1))
    two = BlockDrop("prefill", LastN(), {0: 1, 1: 1}, refit_examples=8)
    asked: list[tuple[list[Callback], tuple[int, int], int]] = [
        ([WidthDrop("both", {0: 8})], (0, 0), 0),
        ([WidthDrop("decode", {0: 8})], (0, 4), 0),
        ([WidthDrop("decode", {0: 8}, repair=None)], (0, 0), 0),
        ([WidthDrop("prefill", {0: 8}, repair=Repair(tied=True))], (0, 0), 0),
        ([two], (0, 0), 2),
        ([BlockDrop("prefill", LastN(), {0: 9}, refit_examples=8)], (0, 0), 4),
        ([two, WidthDrop("prefill", {0: 8})], (4, 0), 0),
        ([BlockDrop("prefill", LastN(), {0: 2})], (0, 0), 0),
        ([BlockDrop("prefill", LastN(), {0: 2}), WidthDrop("both", {0: 8})], (0, 0), 2),
        ([BlockDrop("decode", LastN(), {0: 2}, merging=merging)], (0, 2), 0),
        ([BlockDrop("both", LastN(), {0: 2}, merging=merging)], (0, 0), 0),
        ([JointDrop(CostTarget(decode_bytes=0.8), [0], width=moves)], (4, 4), 0),
    ]
    for callbacks, untied, kv_only in asked:
        load = size_of(module, data, callbacks, Processes("auto", "32-true", 1)).load
        assert (load.untied, load.untied_kv_only) == (untied, kv_only), callbacks


def test_a_selection_needs_its_prompt_caches_or_the_scores_of_eager_attention(eight: Shape) -> None:
    layout = Layout(student_bytes=2, teacher_bytes=2, compute_bytes=2)
    load = replace(LOAD, calibration=64, eval_batch=16, chunk_tokens=0, searches=False, search_cache_bytes=10**15)

    def needed(**changes: Any) -> int:
        # One token a training batch: what is kept while a policy is chosen decides.
        asked = replace(load, batch=0, **changes)
        return memory_per_process(eight, eight, layout, asked).device["activations or search"]

    assert needed() == 0
    position = 2 * (32 * (2 * 1024 + 4096) + 4096)
    of_example = 4096 * position
    assert needed(selection=SelectorLoad(examples=8)) == 8 * 3 * of_example, "and as many, twice as long, that repeat"
    assert needed(selection=SelectorLoad(examples=100)) == 64 * 3 * of_example, "no more than there are"
    assert needed(selection=SelectorLoad(calibration=True)) == 64 * of_example
    capped = needed(selection=SelectorLoad(calibration=True), search_cache_bytes=1000)
    assert capped == 1000 + 64 * 4096 * 2 * 4096
    scores = needed(selection=SelectorLoad(eager_attention=True))
    assert scores == 16 * 32 * 4096**2 * 8 + 16 * 4096 * 2 * 32 * 2 * 1024


def test_an_export_that_measures_loads_the_untrained_student_beside_another_teacher(
    tiny_llama_dir: Path, tmp_path: Path, eight: Shape
) -> None:
    module, data = PDTrimModule(str(tiny_llama_dir)), PromptResponseDataModule(str(tiny_llama_dir))
    measures, only_exports = ExportPair(tmp_path), ExportPair(tmp_path, measure=False)
    asked = ([measures], [only_exports], [PlanLogger()])
    assert [load_of(module, data, callbacks, 2).untrained_bytes for callbacks in asked] == [2, 0, 0]
    assert load_of(module, data, [measures]).untrained_bytes == 0, "the teacher's weights are the untrained ones"
    load = replace(LOAD, search_cache_bytes=0, search_teacher_bytes=0)
    layout = Layout(student_bytes=2, teacher_bytes=2, compute_bytes=2)
    needed = [
        memory_per_process(eight, eight, layout, replace(load, untrained_bytes=width)).device["activations or search"]
        for width in (2, 4)
    ]
    assert needed[1] - needed[0] == 2 * eight.parameters


def test_a_dry_run_counts_the_untrained_student_where_the_teacher_is_another_model(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_llama_dir, other)
    names = [f"--model.model={tiny_llama_dir}", f"--data.tokenizer={tiny_llama_dir}", "--trainer.accelerator=cpu"]
    asked: list[Load] = []

    def kept(student: Shape, teacher: Shape, layout: Layout, load: Load) -> MemoryEstimate:
        asked.append(load)
        return memory_per_process(student, teacher, layout, load)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pdtrim_pl.sizing.of_run.memory_per_process", kept)
        for teacher in (tiny_llama_dir, other):
            dry_run(ROOT / "configs" / "quickstart.yaml", *names, f"--model.loading.teacher={teacher}")
    assert [load.untrained_bytes for load in asked] == [0, 4]


def test_more_tokens_need_more_memory_and_checkpointing_less(eight: Shape) -> None:
    def total(**changes: Any) -> int:
        return memory_per_process(eight, eight, Layout(), Load(**{**vars(LOAD), **changes})).total

    assert total(tokens=8192) > total()
    assert total(chunk_tokens=2048) > total()
    assert total(gradient_checkpointing=False) > total() + 10 * GIB


def test_the_optimizer_is_asked_for_its_states(tiny_llama_dir: Path) -> None:
    def optimizer_of(*settings: str) -> float:
        names = [f"--model.model={tiny_llama_dir}", f"--data.tokenizer={tiny_llama_dir}", "--trainer.accelerator=cpu"]
        said = dry_run(ROOT / "configs" / "quickstart.yaml", *names, *settings)
        return float(next(line.split()[1] for line in said.splitlines() if line.startswith("  optimizer")))

    assert optimizer_of("--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1") == 0


def test_activations_are_estimated_within_a_quarter_of_what_autograd_keeps() -> None:
    # Wide enough that hidden sizes count and scores of attention do not.
    model = tiny_model("llama", blocks=2, hidden_size=128, intermediate_size=384)
    staged = StagedCausalLM(model).train()
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = staged.prefill(torch.randint(64, (2, 32)))
    assert out.hidden.requires_grad
    estimated = block_elements(Shape.of(model.config)) * 2 * 2 * 32
    assert sum(kept.values()) == pytest.approx(estimated, rel=0.25)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "autocast"])
def test_activations_of_a_cpu_are_what_autograd_keeps(half: bool) -> None:
    model = tiny_model("llama", blocks=3, hidden_size=128, intermediate_size=384)
    staged = StagedCausalLM(model).train()
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights and tensor.numel() >= 512:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", enabled=half):
        out = staged.prefill(torch.randint(64, (4, 128)))
    assert out.hidden.requires_grad
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    cast = sum(parameter.numel() for parameter in staged.gates[0].block.parameters()) * 3 * 2 if half else 0
    layout = Layout(compute_bytes=2 if half else 4, autocast=half, on_cpu=True)
    assert found - cast == pytest.approx(block_bytes(Shape.of(model.config), layout) * 3 * 4 * 128, rel=0.1)


@pytest.mark.parametrize(
    ("batch_size", "batches", "padding"), [(4, "shuffled", 128), (1, "shuffled", 0), (4, "by_length", 0)]
)
def test_a_batch_is_as_long_as_its_longest_prompt_and_its_longest_response(
    batch_size: int, batches: Any, padding: int
) -> None:
    data = PromptResponseDataModule("a", lengths=Lengths(256, 64, 192), batch_size=batch_size, batches=batches)
    assert load_of(PDTrimModule("a"), data).padding == padding


def test_padding_lengthens_what_a_step_keeps_and_nothing_else(eight: Shape) -> None:
    def device(**changes: int) -> dict[str, int]:
        return dict(memory_per_process(eight, eight, Layout(), replace(LOAD, searches=False, **changes)).device)

    padded, longer, plain = device(padding=512), device(tokens=4608), device()
    assert padded == longer
    assert {name for name in plain if plain[name] != padded[name]} == {"activations or search"}


def test_a_run_on_a_cpu_reserves_no_room_for_a_gpus_libraries_and_its_host_holds_python_too(
    tiny_llama_dir: Path,
) -> None:
    names = [f"--model.model={tiny_llama_dir}", f"--data.tokenizer={tiny_llama_dir}", "--trainer.callbacks=[]"]
    arguments = ["fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), *names]
    on_cpu = counted([*arguments, "--trainer.devices=2"])
    assert on_cpu.memory.device["reserve"] == GIB // 10
    assert on_cpu.host == 2 * (on_cpu.memory.total + GIB * 5 // 8)
    assert counted([*arguments, "--trainer.accelerator=gpu"]).memory.device["reserve"] == 2 * GIB


@pytest.mark.slow
def test_the_estimate_is_near_the_peak_of_a_real_run() -> None:
    # docs/training.md has the figures: within 15 % here. Another machine's kernels and allocator keep other buffers.
    command = [sys.executable, str(ROOT / "benchmarks" / "dry_run.py"), "--json", "--only", "256 x 4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert json.loads(said.splitlines()[-1])["largest_error"] < 0.25
