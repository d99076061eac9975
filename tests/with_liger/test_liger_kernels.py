"""Liger's kernels, run by Triton's interpreter, give losses and gradients of plain blocks: `make test-liger`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("make test-liger runs these, with Triton's interpreter", allow_module_level=True)

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from liger_kernel.ops import geglu, rms_norm
from lightning.pytorch import seed_everything
from test_callbacks import data_for, module_for, trainer_for
from test_compiled import EVERY, change, check_same, module_of, trained
from tiny_models import tiny_model

from pdtrim_pl.losses import CrossEntropy
from pdtrim_pl.models.liger import check_liger, use_liger
from pdtrim_pl.models.loading import Loading
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.plan import Width
from pdtrim_pl.staged import StagedCausalLM

WITH_KERNELS = ("gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the interpreter lacks for these kernels: numbers as tensors, and functions of CUDA's library."""
    plain = interpreter._implicit_cvt

    def converted(value: Any) -> Any:
        if isinstance(value, float):
            return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
        return plain(value)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: 1.0 / tl.sqrt(x))
    monkeypatch.setattr(geglu, "tanh", lambda x: 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


def of_family(family: str) -> PDTrimModule:
    module = module_of(EVERY)
    module.student = StagedCausalLM(tiny_model(family, blocks=3, seed=1))
    module.teacher = StagedCausalLM(tiny_model(family, blocks=3)).requires_grad_(False)
    return module


@pytest.mark.parametrize("family", WITH_KERNELS)
def test_loss_and_gradients_are_those_of_plain_blocks_before_and_after_a_change_of_plan(family: str) -> None:
    plain, fast = of_family(family), of_family(family)
    check_liger(torch.device("cpu"))
    for model in (fast.student, fast.teacher):
        use_liger(model.model)
        assert all("forward" in vars(gate.block.get_submodule("mlp")) for gate in model.gates.values())
    narrower = lambda module: module.student.apply_plan(  # noqa: E731
        module.plan.narrow("both", 2, Width(tuple(range(0, 48, 2))))
    )
    for step in (lambda module: None, change, narrower):
        for module in (plain, fast):
            step(module)
        check_same(trained(fast), trained(plain))


@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_a_run_trains_to_the_losses_of_a_plain_one(trainable: Any, tiny_llama_dir: Path, tmp_path: Path) -> None:
    found = []
    for setting in (False, True):
        seed_everything(0, verbose=False)
        module = module_for(
            tiny_llama_dir, losses=[CrossEntropy()], loading=Loading(liger=setting), trainable=trainable
        )
        trainer_for(tmp_path / str(setting), [], max_epochs=1).fit(module, datamodule=data_for(tiny_llama_dir))
        norms = [gate.block.get_submodule("input_layernorm") for gate in module.student.gates.values()]
        assert all(("forward" in vars(norm)) == setting for norm in norms)
        found.append([loss for _, loss in module.record.losses])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
