"""`pdtrim policy`: another KV policy for a pair that is already exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from pdtrim_pl.cli import main as cli
from pdtrim_pl.data import Collator, Example
from pdtrim_pl.evaluation.quality import measure_quality
from pdtrim_pl.export import export_pair, load_plan_and_policy, load_stage, validate_file
from pdtrim_pl.models.pretrained import load_causal_lm
from pdtrim_pl.plan import KVRetentionPolicy, PairManifest, Retention
from pdtrim_pl.selectors.allocation import codec_of
from pdtrim_pl.selectors.of_pair import PairMeasures
from pdtrim_pl.staged import StagedCausalLM


@pytest.fixture
def export(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A pair without block 1 in prefill and without block 2 in decode, which sends everything."""
    student = StagedCausalLM(load_causal_lm(str(tiny_llama_dir)))
    plan = student.plan
    student.apply_plan(type(plan).full(plan.model, "free").drop("prefill", 1).drop("decode", 2))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    return export_pair(student, tmp_path / "pair", tokenizer=tokenizer, dtype=torch.float32)


def test_a_policy_is_chosen_for_a_pair_and_written_into_it(
    export: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before, pair = (export / "kv_policy.json").read_text(), PairManifest.load(export)
    asked = ["policy", "--export", str(export), "--reduction", "6", "--examples", "2", "--max_length", "64",
             "--prompt_tokens", "64", "--min_recall", "0"]  # fmt: skip
    assert cli.main([*asked, "--output", str(tmp_path / "other.json")]) == 0
    assert (export / "kv_policy.json").read_text() == before
    assert PairManifest.load(export) == pair
    assert cli.main(asked) == 0
    plan, policy = load_plan_and_policy(export)
    assert validate_file(tmp_path / "other.json") == policy.to_json(plan)
    assert policy.full_bytes(plan, 64) / policy.sent_bytes(plan, 64) >= 6
    assert all(rule.keep == "all" for rule in policy.rules.values())
    assert capsys.readouterr().out.splitlines()[-1] == str(export / "kv_policy.json")
    assert load_stage(export, "decode").policy == policy
    assert PairManifest.load(export) == PairManifest.of(export)
    assert PairManifest.load(export).differences(pair) == ["the policy (kv_policy.json)", "the codecs"]


def test_the_figures_of_a_pair_are_those_of_the_student(export: Path, tiny_llama_dir: Path) -> None:
    plan, policy = load_plan_and_policy(export)
    student = StagedCausalLM(load_causal_lm(str(tiny_llama_dir)), plan)
    ids = torch.randint(3, 250, (2, 40), generator=torch.Generator().manual_seed(0))
    batches = [Collator(0)([Example(row[:30], row[30:]) for row in ids])]
    context = PairMeasures(load_stage(export, "prefill"), load_stage(export, "decode"), batches).context(policy.kv)
    assert context.energy({}, 2) == pytest.approx(0.0, abs=1e-6)
    rules = {block: Retention(codec=codec_of("int2", "int2")) for block in plan.decode}
    coarse = KVRetentionPolicy(plan.boundary, policy.kv, {plan.decode[0]: rules[plan.decode[0]]})
    expected = measure_quality(student, student, batches, plan=plan, policy=coarse).kl
    assert context.damage(plan.decode[0], rules[plan.decode[0]]) == pytest.approx(expected, rel=1e-3)
    assert context.energy(rules, 2) > 0
    assert 0 <= context.recall({}) <= 1


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["policy", "--export", str(tmp_path), "--reduction", "2"]) == 1
    assert "There is no stage plan at" in capsys.readouterr().err
    assert cli.main(["policy", "--export", str(tmp_path), "--examples", "0"]) == 1
    assert "`examples` is 0: give at least 1" in capsys.readouterr().err
