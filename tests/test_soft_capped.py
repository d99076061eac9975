"""Gemma 2 with default settings: its soft-capped scores are computed in eager attention, and one line says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_runs import run
from tiny_models import saved_tiny_model, tiny_model

from pdtrim_pl.cli.main import main
from pdtrim_pl.export import load_stage
from pdtrim_pl.models.pretrained import load_causal_lm
from pdtrim_pl.plan import STAGES

SAID = "is computed with `attn_implementation: eager`"


@pytest.fixture
def gemma2(tiny_tokenizer_dir: Path, tmp_path: Path) -> Path:
    return saved_tiny_model(tmp_path / "gemma2", tiny_tokenizer_dir, "gemma2", vocab_size=259)


@pytest.mark.usefixtures("forked_workers")
def test_gemma_2_is_trained_compared_exported_and_served_with_the_default_settings(
    gemma2: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run("fit", gemma2, folder) == 0
    said = [line for line in capfd.readouterr().err.splitlines() if SAID in line]
    assert len(said) == 1, "once, though student and teacher are loaded"
    assert str(gemma2) in said[0]
    assert main(["validate", "--config", str(folder / "fit.yaml")]) == 0
    assert run("compare", gemma2, folder) == 0
    last, second = folder / "ckpt" / "last.ckpt", tmp_path / "second"
    assert main(["export", "--ckpt_path", str(last), "--output", str(second)]) == 0
    capfd.readouterr()
    assert main(["generate", "--export", str(second), "--prompt", "The", "--max_new_tokens", "3"]) == 0
    for stage in STAGES:
        load_stage(second, stage)
        assert f"{second / stage} {SAID}" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("family", "cap", "expected"),
    [("gemma2", 5.0, "eager"), ("gemma2", None, "eager"), ("gemma3_text", 5.0, "eager"), ("gemma3_text", None, "sdpa")],
)
def test_a_model_is_computed_in_eager_attention_only_where_sdpa_cannot(
    family: str, cap: float | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tiny_model(family, attn_logit_softcapping=cap)
    original.set_attn_implementation("eager")
    original.save_pretrained(tmp_path)
    said: list[str] = []
    monkeypatch.setattr("pdtrim_pl.models.pretrained.log.info", said.append)
    model = load_causal_lm(str(tmp_path))
    assert load_causal_lm(str(tmp_path), attn_implementation="eager").config._attn_implementation == "eager"
    assert model.config._attn_implementation == expected
    assert said == ([f"{tmp_path} {SAID}: sdpa knows no soft-capped scores."] if expected == "eager" else [])
    ids = torch.arange(12)[None] + 3
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits, atol=1e-5, rtol=1e-5)
