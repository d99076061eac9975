"""Channels leave in the middle of runs of two processes, under every strategy, and all train as one process does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from process_group import run_script
from tiny_models import saved_tiny_model
from width_run import fit

from pdtrim_pl.export import load_plan_and_policy
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.plan import STAGES, StagePlan

TIMEOUT = 300


@pytest.fixture(scope="module")
def model(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return saved_tiny_model(folder, tiny_tokenizer_dir, blocks=3, vocab_size=259, initializer_range=0.1)


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> PDTrimModule:
    return fit("auto", 1, model, tmp_path_factory.mktemp("alone"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_find_unused_parameters_true", "fsdp", "zero2", "zero3"])
def test_two_processes_lose_the_same_channels_and_train_as_one_does(
    strategy: str, alone: PDTrimModule, model: Path, tmp_path: Path
) -> None:
    run_script("width_run.py", strategy, "2", str(model), str(tmp_path), folder=tmp_path, timeout=TIMEOUT)
    shared = strategy != "ddp_find_unused_parameters_true"  # where weights are sharded, no stage loses alone
    for part in ("whole", "continued"):
        told = json.loads((tmp_path / part / "told.json").read_text(encoding="utf-8"))
        plan = StagePlan.from_json(told["plan"])
        assert (plan.prefill, plan.kv_only) == (alone.plan.prefill, alone.plan.kv_only) == ((0, 2), (1,))
        assert plan.widths["prefill"] == alone.plan.widths["prefill"]
        if shared:
            assert plan.widths["prefill"].items() < plan.widths["decode"].items()
            assert not any(plan.untied.values())
        else:
            assert plan.widths["decode"] == alone.plan.widths["decode"]
            assert plan.untied == alone.plan.untied == {"prefill": (1,), "decode": (0, 1, 2)}
        steps = [step for step, _ in alone.record.losses]
        upto = steps[: len(steps) * 2 // 3] if shared else steps
        for (step, ours), (_, theirs) in zip(told["losses"], alone.record.losses, strict=True):
            if step in upto:
                assert ours == pytest.approx(theirs, abs=1e-5), (part, step)
        assert load_plan_and_policy(tmp_path / part / "export")[0].widths == plan.widths
    assert [alone.plan.widest(stage) for stage in STAGES] == [{"channels": 36}, {"channels": 28}]
