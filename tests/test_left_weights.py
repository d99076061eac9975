"""Weights of blocks that have left both stages leave the device. Here a move spoils them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rates_run
import torch
from left_run import spoil
from process_group import run_ranks
from safetensors.torch import load_file
from test_lora import drops, fit, module_of
from test_placement import SHARED
from tiny_models import TIED, saved_tiny_model
from torch import nn

from callbacks import BlockDrop, ExportPair
from pdtrim_pl.criteria import LastN
from pdtrim_pl.plan import STAGES
from pdtrim_pl.search import Guards
from pdtrim_pl.staged.lora import LoRA
from pdtrim_pl.strategies import data_parallel

META = torch.device("meta")


def drop() -> BlockDrop:
    return BlockDrop("both", LastN(), {1: 1, 2: 1}, Guards(1, 0))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights lie elsewhere than where the run computes: see `spoil`."""
    monkeypatch.setattr(data_parallel.DataParallel, "store", META)
    monkeypatch.setattr(data_parallel, "move", spoil)


def spoilt(module: nn.Module) -> bool:
    parts = [bool(parameter.isnan().all()) for parameter in module.parameters()]
    assert len(set(parts)) == 1, "all or none"
    return parts[0]


@pytest.mark.parametrize("trainable", ["all", "norms", LoRA(2)], ids=["all", "norms", "lora"])
def test_a_run_never_reads_the_weights_of_blocks_that_have_left(
    trainable: Any, tiny_llama_dir: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Neither in steps nor in validation, nor in later rounds, nor after a restart."""
    whole = module_of(tiny_llama_dir, trainable)
    fit(whole, tiny_llama_dir, tmp_path / "whole", drop(), epochs=3)
    request.getfixturevalue("elsewhere")
    for name, start in (("left", None), ("rest", tmp_path / "whole" / "checkpoints" / "epoch=1.ckpt")):
        module = module_of(tiny_llama_dir, trainable)
        trainer = fit(module, tiny_llama_dir, tmp_path / name, drop(), epochs=3, ckpt_path=start)
        assert module.record.losses == whole.record.losses
        assert module.record.validations == whole.record.validations
        assert module.plan.prefill == (0, 1)
        assert [spoilt(gate) for gate in module.student.gates.values()] == [False, False, True, True]
        assert not any(bool(p.isnan().any()) for p in trainer.optimizers[0].state)
        assert module.state_dict().keys() == whole.state_dict().keys(), "checkpoints stay whole"


def test_on_a_cpu_no_weight_moves(tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_parallel, "move", spoil)
    module = module_of(tiny_llama_dir, "all")
    fit(module, tiny_llama_dir, tmp_path, drop(), epochs=3)
    assert module.plan.prefill == (0, 1)
    assert not any(spoilt(gate) for gate in module.student.gates.values())


@pytest.mark.usefixtures("elsewhere")
def test_a_shared_teacher_keeps_the_weights_that_it_runs(tiny_llama_dir: Path, tmp_path: Path) -> None:
    module = module_of(tiny_llama_dir, LoRA(2), teacher=SHARED)
    fit(module, tiny_llama_dir, tmp_path, drop(), epochs=3)
    gate = module.student.gates[3]
    assert 3 not in module.plan.prefill
    assert not spoilt(gate.block)
    assert spoilt(gate.adapters), "its adapters nobody runs"


@pytest.mark.usefixtures("elsewhere")
def test_a_block_that_one_stage_still_runs_stays(tiny_llama_dir: Path, tmp_path: Path) -> None:
    module = module_of(tiny_llama_dir, "all")
    fit(module, tiny_llama_dir, tmp_path, drops())
    assert set(module.plan.prefill) != set(module.plan.decode)
    assert not any(spoilt(gate) for gate in module.student.gates.values())


@pytest.mark.usefixtures("elsewhere")
def test_an_export_needs_no_weights_of_blocks_that_have_left(tiny_llama_dir: Path, tmp_path: Path) -> None:
    module, pair = module_of(tiny_llama_dir, "all"), tmp_path / "pair"
    fit(module, tiny_llama_dir, tmp_path, drop(), ExportPair(pair, prompt_tokens=16, new_tokens=4), epochs=3)
    assert spoilt(module.student.gates[3])
    for stage in STAGES:
        assert not any(bool(tensor.isnan().any()) for tensor in load_file(pair / stage / "model.safetensors").values())


def test_a_move_keeps_the_parameter_and_drops_its_gradient() -> None:
    """A stand-in, since torch moves no parameter between `cpu` and `meta` in place."""
    stays, moves = (SimpleNamespace(device=device, data=torch.ones(2), grad=1.0) for device in (META, "cpu"))
    data_parallel.move([stays, moves], META)  # type: ignore[list-item]
    assert (stays.data.device.type, stays.grad) == ("cpu", 1.0)
    assert (moves.data.device.type, moves.grad) == ("meta", None)


@pytest.mark.slow
def test_ddp_never_reads_the_weights_of_blocks_that_have_left(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    model = saved_tiny_model(tmp_path / "model", tiny_tokenizer_dir, **TIED)
    alone = rates_run.fit("auto", 1, model, tmp_path / "alone")
    strategy = "ddp_find_unused_parameters_true"
    run_ranks("left_run.py", strategy, "2", str(model), str(tmp_path), folder=tmp_path, timeout=300)
    for rank in range(2):
        told = json.loads((tmp_path / f"told-{rank}.json").read_text(encoding="utf-8"))
        assert told["spoilt"] == [3]
        assert dict(map(tuple, told["losses"])) == pytest.approx(dict(alone.record.losses), abs=1e-5)
