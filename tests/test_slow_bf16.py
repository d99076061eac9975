"""A run that computes in bf16 on a CPU that is slow at it says so, once."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from test_compare_parts import data, text

from pdtrim_pl.compare.bench import Bench
from pdtrim_pl.compare.found import Found
from pdtrim_pl.compare.settings import Subject, Training
from pdtrim_pl.compare.texts import read_texts
from pdtrim_pl.compare.training import distil
from pdtrim_pl.export import export_pair
from pdtrim_pl.models import loading
from pdtrim_pl.models.loading import SLOW_BF16, Loading, warn_of_slow_bf16
from pdtrim_pl.models.pretrained import load_causal_lm, load_tokenizer
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.search import Guards
from pdtrim_pl.serving.generate import generate_text
from pdtrim_pl.staged import StagedCausalLM


@pytest.fixture(params=["AVX2", "AVX512"])
def expected(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a run in bf16 warns of on such a CPU."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    loading._warn_once.cache_clear()
    return [SLOW_BF16] if request.param == "AVX2" else []


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "pdtrim_pl.models.loading"]


@pytest.mark.parametrize("computed_in", [torch.bfloat16, "bfloat16", "bf16-mixed", "bf16-true"])
def test_bf16_on_the_cpu_is_warned_of_once_in_one_line(
    computed_in: torch.dtype | str, expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        warn_of_slow_bf16("cpu", torch.float32, computed_in)
    assert warned(caplog) == expected
    assert "\n" not in SLOW_BF16


def test_other_types_and_devices_are_not_warned_of(expected: list[str], caplog: pytest.LogCaptureFixture) -> None:
    warn_of_slow_bf16("cpu", torch.float32, torch.float16, "32-true", "16-mixed")
    warn_of_slow_bf16("cuda:1", torch.bfloat16, "bf16-mixed")
    assert warned(caplog) == []


@pytest.mark.parametrize(
    ("precision", "settings", "in_bf16"),
    [
        ("bf16-mixed", Loading(), True),
        ("32-true", Loading(teacher_dtype="bfloat16"), True),
        ("32-true", Loading(), False),
    ],
)
def test_a_trainer_warns_of_its_precision_and_of_both_models(
    precision: Any, settings: Loading, in_bf16: bool, expected: list[str], tiny_llama_dir: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    trainer = Trainer(
        accelerator="cpu", devices=1, precision=precision, default_root_dir=tmp_path, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    texts = data(tiny_llama_dir, text(tmp_path, "Line"))
    trainer.test(PDTrimModule(str(tiny_llama_dir), loading=settings), datamodule=texts)
    assert warned(caplog) == (expected if in_bf16 else [])


@pytest.mark.parametrize(
    ("dtype", "precision", "in_bf16"),
    [("bfloat16", "32-true", True), ("float32", "bf16-mixed", True), ("float32", "32-true", False)],
)
def test_a_comparison_warns_of_its_model_and_of_its_training(
    dtype: Any, precision: Any, in_bf16: bool, expected: list[str], tiny_llama_dir: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    texts = read_texts(data(tiny_llama_dir, text(tmp_path, "Line")), None)
    subject, training = Subject(str(tiny_llama_dir), dtype, "cpu"), Training(tokens=300, precision=precision)
    bench = Bench(subject, texts, training, Guards(0, 0), texts.request(), tmp_path)
    student = bench.student(Found(bench.full("nested").drop("decode", 1)), dtype="float32")
    distil(student, bench.teacher, texts.training_batches(300, 4)[0], training, subject, tmp_path)
    assert warned(caplog) == (expected if in_bf16 else [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_export_and_its_service_warn_of_its_type(
    dtype: torch.dtype, expected: list[str], tiny_llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student = StagedCausalLM(load_causal_lm(str(tiny_llama_dir)))
    export_pair(student, tmp_path / "pair", tokenizer=load_tokenizer(str(tiny_llama_dir)), dtype=dtype)
    exported = warned(caplog)
    assert exported == (expected if dtype == torch.bfloat16 else [])
    loading._warn_once.cache_clear()
    generate_text(tmp_path / "pair", "Hi", max_new_tokens=2, device="cpu", out=io.StringIO(), err=io.StringIO())
    assert warned(caplog) == 2 * exported
