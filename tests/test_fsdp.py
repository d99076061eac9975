"""FSDP gives every weight the gradient that one process gives it, also through the cache."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from fsdp_worker import CASES, PROCESSES, STEPS, compare
from jsonargparse import ArgumentParser
from lightning.pytorch.strategies import Strategy
from process_group import run_workers
from test_criteria import batches
from tiny_models import tiny_model
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from pdtrim_pl.checkpoints.run_record import RunRecord
from pdtrim_pl.checkpoints.state import CheckpointState
from pdtrim_pl.cli.dry_run import run
from pdtrim_pl.cli.lightning_cli import _uses_checkpoint_io
from pdtrim_pl.merging import Merging, fit_runs
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.sizing.load import Load
from pdtrim_pl.sizing.memory import memory_per_process
from pdtrim_pl.sizing.of_run import Processes, layout_of
from pdtrim_pl.sizing.shape import Shape
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.strategies import PDTrimFSDPStrategy, check_drops, check_strategy, fsdp, parallel_of

TIMEOUT = 240


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    """Of every case and step, between a student cut up between two processes and a whole one."""
    folder = tmp_path_factory.mktemp("fsdp")
    run_workers(compare, folder / "told.json", folder=folder, timeout=TIMEOUT, processes=PROCESSES)
    return json.loads((folder / "told.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("case", [" ".join(map(str, case)) for case in CASES])
def test_a_sharded_student_gets_the_gradients_of_a_whole_one(
    differences: dict[str, list[dict[str, float]]], case: str
) -> None:
    assert len(differences[case]) == STEPS
    for step in differences[case]:
        assert step["gradient"] < 1e-4
        assert step["taylor"] < 1e-2
        assert step["loss"] < 1e-5, "sharded, made whole again and never cut up, after the step"
        assert abs(step["step"]) > 1e-4, "the step changed something"


@pytest.mark.slow
def test_a_bf16_step_of_1e_5_moves_the_fp32_shards_and_computes_in_bf16(
    differences: dict[str, list[dict[str, float]]],
) -> None:
    (found,) = differences["bf16"]
    assert found["moved"] > 0.99, "of all weights; of bf16 weights, those above 5e-3 stay"
    assert found["moved in bf16"] < 0.1
    assert found["shards"] == 4
    assert found["logits"] == 2


@pytest.mark.slow
def test_a_sharded_student_generates_what_a_whole_one_does(differences: dict[str, list[dict[str, float]]]) -> None:
    (found,) = differences["generated"]
    assert found["32-true"] == 1.0
    assert found["bf16-mixed"] > 0.9, "a token may fall to the other side of a tie"


def test_the_strategy_is_named_in_yaml_and_taken() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--strategy", type=Strategy)
    asked = {"class_path": "pdtrim_pl.strategies.PDTrimFSDPStrategy", "init_args": {"process_group_backend": "gloo"}}
    strategy = parser.instantiate(parser.parse_object({"strategy": asked})).strategy
    check_strategy(strategy)
    check_drops(strategy)
    assert not parallel_of(strategy).whole
    assert _uses_checkpoint_io(str(strategy)), "its checkpoints are files, written under a temporary name"
    with parallel_of(strategy).whole_weights([]) as nothing:
        assert nothing is None


def test_a_dry_run_counts_its_shards(tiny_llama_dir: Path) -> None:
    out = io.StringIO()
    names = [f"--model.model={tiny_llama_dir}", f"--data.tokenizer={tiny_llama_dir}", "--trainer.devices=8"]
    strategy = "--trainer.strategy.class_path=pdtrim_pl.strategies.PDTrimFSDPStrategy"
    assert run(["fit", "--dry_run", *names, strategy, "--device_memory", "79"], out) == 0
    assert "8 process(es), FSDP." in out.getvalue()


def test_a_dry_run_counts_fp32_shards_of_what_trains_under_mixed_precision() -> None:
    config = tiny_model("llama").config
    config.dtype = torch.bfloat16
    module, shape = PDTrimModule("any"), Shape.of(config)
    processes = Processes(PDTrimFSDPStrategy(), "bf16-mixed", 8)
    load = Load(batch=1, eval_batch=1, tokens=8, chunk_tokens=8, gradient_checkpointing=False)
    device = memory_per_process(shape, shape, layout_of(module, processes, config, config), load).device
    parts = [device[what] for what in ("student", "teacher", "gradients", "optimizer", "communication")]
    assert parts == [*(shape.parameters * width // 8 for width in (4, 2, 4, 8)), 2 * 2 * shape.parameters]
    assert "autocast copies" not in device


def test_an_older_torch_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.12.1+cpu")
    with pytest.raises(ValueError, match=r"needs torch 2.13 and this is 2.12.1\+cpu.*`stage: 3`"):
        PDTrimFSDPStrategy()


def connected() -> PDTrimFSDPStrategy:
    strategy, module = PDTrimFSDPStrategy(), PDTrimModule("any")
    module.student = StagedCausalLM(tiny_model("llama"))
    strategy.connect(module)
    return strategy


def saved(path: Path, student: StagedCausalLM, *, added: bool = False) -> Path:
    state = CheckpointState(student.plan, None, RunRecord(), "", added=(("decode", 2),) if added else ())
    weights = {f"student.{name}": value for name, value in student.state_dict().items()}
    torch.save({CheckpointState.KEY: state.to_json(), "state_dict": weights}, path)
    return path


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[DeviceMesh]:
    store = (tmp_path / "store").as_uri()
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_local_fit_leaves_a_sharded_student_as_it_is(one_process: DeviceMesh) -> None:
    """One process holds all of every shard: a copy must be one."""
    student, teacher = (StagedCausalLM(tiny_model("llama")) for _ in range(2))
    for model in (student, teacher):
        fsdp.shard(model, one_process)
    before = {name: weight.full_tensor().clone() for name, weight in student.state_dict().items()}
    settings = Merging(min_cosine=-1, steps=2, tied=True)
    (run,) = fit_runs(student, teacher, batches(), "both", [(1, 2)], settings, gather=lambda _: nullcontext()).runs
    assert run.cosine != run.plain_cosine
    for name, weight in student.state_dict().items():
        assert torch.equal(weight.full_tensor(), before[name]), name


def test_a_directory_of_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a directory of shards. They are continued with .*DeepSpeedStrategy"):
        connected().load_checkpoint(tmp_path)


def test_weights_of_another_model_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    path = saved(tmp_path / "last.ckpt", StagedCausalLM(tiny_model("llama", intermediate_size=40)))
    with pytest.raises(ValueError, match=r"does not hold this student's weights: tensors 12 of another shape"):
        connected().load_checkpoint(path)


def test_a_run_that_made_weights_on_its_way_is_not_continued(tmp_path: Path) -> None:
    path = saved(tmp_path / "last.ckpt", StagedCausalLM(tiny_model("llama")), added=True)
    with pytest.raises(ValueError, match=r"\[\('decode', 2\)\]\), which FSDP cannot take up. Continue with"):
        connected().load_checkpoint(path)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"PK" + bytes(100))
    with pytest.raises(ValueError, match=r"last.ckpt cannot be read .* It is damaged"):
        connected().load_checkpoint(path)


def test_all_that_leaves_a_block_leaves_through_one_node() -> None:
    hidden, keys, values = (torch.ones(2, 3, requires_grad=True) for _ in range(3))
    out = fsdp._OneNode.apply(hidden, keys, values)
    assert len({id(tensor.grad_fn) for tensor in out}) == 1
    (2 * out[1]).sum().backward()
    gradients = [tensor.grad for tensor in (hidden, keys, values)]
    assert [None if gradient is None else float(gradient.sum()) for gradient in gradients] == [0.0, 12.0, 0.0]
