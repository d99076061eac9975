"""`pdtrim bench`: times and bytes of an exported pair beside its dense model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from pdtrim_pl.cli import main as cli
from pdtrim_pl.export import export_pair, load_plan_and_policy, load_stage
from pdtrim_pl.models.pretrained import load_causal_lm
from pdtrim_pl.plan import STAGES, Codec, KVRetentionPolicy, Retention
from pdtrim_pl.serving.bench import Load, spread
from pdtrim_pl.serving.peaks import growth
from pdtrim_pl.serving.wire_times import Cargo, wire_times
from pdtrim_pl.sizing.cost import CostModel
from pdtrim_pl.staged import StagedCausalLM


@pytest.fixture
def export(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    student = StagedCausalLM(load_causal_lm(str(tiny_llama_dir)))
    student.apply_plan(type(student.plan).full(student.plan.model, "free").drop("prefill", 1).drop("decode", 2))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    return export_pair(student, tmp_path / "pair", tokenizer=tokenizer, dtype=torch.float32)


@pytest.mark.slow
def test_a_pair_is_timed_beside_its_dense_model(
    export: Path, tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--export", str(export), "--model", str(tiny_llama_dir), "--prompts", "[12, 20]", "--batch_sizes", "[1, 2]",
            "--new_tokens", "4", "--repeats", "2", "--links", "[1, 10]"]  # fmt: skip
    assert cli.main(["bench", *args, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    plan, policy = load_plan_and_policy(export)
    dense = StagedCausalLM(load_causal_lm(str(tiny_llama_dir), dtype=torch.float32))
    shares = CostModel.of(dense, 12, 4).shares(plan, policy)
    assert told["prefill_bound"] == pytest.approx(1 / shares.prefill_flops)
    assert told["decode_bound"] == pytest.approx(1 / shares.decode_bytes)
    assert told["wire_reduction"] == policy.reduction(plan, [12])[0]["ratio"]
    assert [(cell["batch_size"], cell["prompt_tokens"]) for cell in told["cells"]] == [
        (1, 12),
        (1, 20),
        (2, 12),
        (2, 20),
    ]
    for figure in (
        told["prefill_speedup"],
        told["decode_speedup"],
        told["runtime_overhead"],
        told["cells"][3]["ttft_ms"],
    ):
        assert 0 < figure["low"] <= figure["value"] <= figure["high"]
    assert told["memory"]["dense"] > told["memory"]["prefill"], "a block less"
    full, sent = told["wire"]["ms"]["10 Gbit/s"]
    assert full / sent == pytest.approx(told["wire_reduction"], abs=1e-4)
    assert told["two_processes"]["decode_ms"]["value"] > 0
    assert told["two_processes"]["ttft_ms"]["value"] < told["two_processes"]["request_ms"]["value"]
    full, sent = told["wire"]["measured_ms"]["1 Gbit/s"]
    assert full["value"] > told["wire"]["ms"]["1 Gbit/s"][0], "a socket and its frames take no less"
    assert sent["value"] > told["wire"]["ms"]["1 Gbit/s"][1]
    for stage in STAGES:
        assert told["peak_memory"]["trimmed"][stage] >= told["memory"][stage]
    assert told["peak_memory"]["batch_size"] == 2
    assert told["cells"][0]["dense"]["tpot_ms"]["value"] > 0
    assert cli.main(["bench", *args]) == 0
    assert "batch 2, prompt 20: prefill " in capsys.readouterr().out


def test_a_handover_over_a_slow_link_takes_as_long_as_its_bytes(export: Path) -> None:
    prefill = load_stage(export, "prefill").eval()
    assert prefill.policy is not None
    plan, rules = prefill.plan, {0: Retention("first_last", 4, 8), 1: Retention(codec=Codec("int4", "int4"))}
    policy = KVRetentionPolicy(plan.boundary, prefill.policy.kv, rules)
    with torch.no_grad():
        cache = prefill.prefill(torch.arange(400)[None] % 250 + 3).cache
    rate = 0.02
    for sent in (KVRetentionPolicy(plan.boundary, policy.kv), policy):
        least = sent.sent_bytes(plan, 400) * 8 / (rate * 1e9)
        (times,) = wire_times({"cache": Cargo(cache, plan, sent)}, [rate], 1)[rate].values()
        assert least < times[0] / 1e3 < least + 0.5


def test_the_growth_of_memory_is_that_of_what_was_held_at_once() -> None:
    def hold() -> None:
        for _ in range(3):
            torch.ones(40 * 2**20, dtype=torch.uint8)  # each is freed before the next one comes
        both = [torch.ones(40 * 2**20, dtype=torch.uint8) for _ in range(2)]
        assert len(both) == 2

    found = growth(hold, torch.device("cpu"))
    assert found is None or 79 * 2**20 < found < 120 * 2**20


def test_the_spread_are_the_quartiles() -> None:
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"value": 3.0, "low": 2.0, "high": 4.0}
    assert spread([2.0]) == {"value": 2.0, "low": 2.0, "high": 2.0}


def test_a_load_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="`prompts`, `new_tokens`: give positive numbers, and at least 2 `new_tokens`"):
        Load(prompts=(), new_tokens=1)
    with pytest.raises(ValueError, match="`links`: give positive numbers"):
        Load(links=(0.0,))
