"""The quickstart, shortened, on the real model: one command from nothing to text out of the exported pair."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdtrim_pl.export import load_plan_and_policy, validate_file

ROOT = Path(__file__).parents[1]


def shortened(folder: Path) -> tuple[Path, Path]:
    """The shipped configuration with fewer and shorter texts and fewer candidates, and one that only trains a step."""
    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    config["data"] |= {
        "parts": {"max_train": 4, "validation": 1, "calibration": 2}, "batch_size": 4,
        "lengths": {"max_length": 40, "min_prompt": 24, "max_prompt": 32},
    }  # fmt: skip
    callbacks = {each["class_path"]: each for each in config["trainer"]["callbacks"]}
    callbacks["callbacks.WidthDrop"]["init_args"]["repair"]["examples"] = 4
    selector = callbacks["callbacks.KVRetention"]["init_args"]["selector"]["init_args"]
    selector |= {"effort": {"examples": 1}, "min_recall": 0.0}  # the recall of one example says nothing
    callbacks["callbacks.ExportPair"]["init_args"] |= {"prompt_tokens": 32, "new_tokens": 2}
    whole, step = folder / "quickstart.yaml", folder / "step.yaml"
    whole.write_text(yaml.safe_dump(config), encoding="utf-8")
    kept = ("callbacks.ExportPair", "lightning.pytorch.callbacks.ModelCheckpoint")
    callbacks["callbacks.ExportPair"]["init_args"]["measure"] = False
    config["trainer"] |= {"max_steps": 1, "callbacks": [callbacks[name] for name in kept]}
    step.write_text(yaml.safe_dump(config), encoding="utf-8")
    return whole, step


def run(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pdtrim_pl", *args], cwd=cwd, env=environment, capture_output=True, text=True,
        check=False, timeout=900,
    )  # fmt: skip


@pytest.mark.real_model
def test_the_python_of_the_readme_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["logits"].shape == (2, 16, 49152)
    assert names["tokens"].shape == (2, 16)


@pytest.mark.real_model
@pytest.mark.slow
def test_the_quickstart_exports_a_pair_that_talks_and_can_be_run_again(tmp_path: Path) -> None:
    whole, step = shortened(tmp_path)
    for config in (step, whole):  # what the first one leaves is in the way
        done = run("fit", "--config", str(config), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "runs" / "quickstart" / "export" / "stage_plan.json").is_file()
        assert (tmp_path / "runs" / "quickstart" / "checkpoints" / "last.ckpt").is_file()
    for row in ("blocks in prefill", "channels in decode", "response perplexity", "top-1 agreement", "prefill ms/token",
                "decode ms/token", "KV bytes", "Export:"):  # fmt: skip
        assert row in done.stdout
    assert "validation: perplexity" in done.stderr, "progress is told when the output is no terminal"

    export = tmp_path / "runs" / "quickstart" / "export"
    plan, policy = load_plan_and_policy(export)
    assert (len(plan.prefill), len(plan.decode)) == (30, 30)
    assert plan.widest("decode") == plan.widest("prefill") == {"channels": 1203}
    assert policy.reduction(plan, [256])[0]["ratio"] >= 2.5
    for name in ("stage_plan.json", "kv_policy.json"):
        validate_file(export / name)

    said = run("generate", "--export", str(export), "--prompt", "The", "--max_new_tokens", "8", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip()
    assert "KV sent" in said.stderr
    assert "KV sent" not in said.stdout
