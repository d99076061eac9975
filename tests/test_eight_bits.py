"""A teacher in 8 bits: how it is loaded, where it is refused, and what the dry run counts. No GPU is needed here."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from short_text import SHORT
from transformers import AutoModelForCausalLM

from callbacks.export_pair import _untrained
from pdtrim_pl.cli.dry_run import run as dry_run
from pdtrim_pl.data import Lengths, Parts, PromptResponseDataModule
from pdtrim_pl.errors import UserError
from pdtrim_pl.models import eight_bits
from pdtrim_pl.models.loading import Loading
from pdtrim_pl.models.placement import TeacherPlace
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.sizing.load import Layout, Load
from pdtrim_pl.sizing.memory import memory_per_process
from pdtrim_pl.sizing.of_run import model_config
from pdtrim_pl.sizing.shape import Shape
from pdtrim_pl.strategies import PDTrimDeepSpeedStrategy, PDTrimFSDPStrategy, check_teacher_bits
from pdtrim_pl.teacher import identity_of

ROOT = Path(__file__).parents[1]
EIGHT = Loading(teacher_bits=8)
GPU = torch.device("cuda", 1)


def data_of(model: Path) -> PromptResponseDataModule:
    parts = Parts(validation=2, calibration=2, max_train=4)
    return PromptResponseDataModule(str(model), SHORT, Lengths(24, 8, 16), parts, batch_size=2)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `from_pretrained` is asked for, on a machine that seems to have bitsandbytes. It loads ordinary weights."""
    calls: list[dict[str, Any]] = []
    load = AutoModelForCausalLM.from_pretrained

    def loading(*args: Any, **kwargs: Any) -> Any:
        calls.append(dict(kwargs))
        return load(*args, **{k: v for k, v in kwargs.items() if k not in ("quantization_config", "device_map")})

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loading)
    monkeypatch.setattr(eight_bits, "find_spec", lambda name: SimpleNamespace(name=name))
    return calls


def test_the_teacher_alone_is_loaded_in_8_bits_onto_its_gpu(asked: list[dict[str, Any]], tiny_llama_dir: Path) -> None:
    pair = PDTrimModule(str(tiny_llama_dir), loading=EIGHT).pair
    pair.student()
    pair.teacher("prefill", 512, GPU)
    student, teacher = asked
    assert "quantization_config" not in student
    assert "device_map" not in student
    assert teacher["quantization_config"].load_in_8bit
    assert teacher["device_map"] == {"": 1}


def test_8_bits_without_the_library_or_without_a_gpu_are_refused_with_the_way_out(tiny_llama_dir: Path) -> None:
    with pytest.raises(UserError, match=r"needs bitsandbytes, which is not installed: `pip install.*or leave it out"):
        eight_bits.check_eight_bits(GPU)
    with pytest.raises(UserError, match=r"needs a GPU, and the teacher is to compute on cpu. Leave it out, and set"):
        PDTrimModule(str(tiny_llama_dir), loading=EIGHT).pair.teacher("prefill", 512)


def test_a_run_on_a_cpu_is_refused_before_its_data_is_read(tiny_llama_dir: Path, tmp_path: Path) -> None:
    data = data_of(tiny_llama_dir)
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=tmp_path, max_epochs=1)
    with pytest.raises(UserError, match=r"`loading.teacher_bits: 8` needs a GPU"):
        trainer.fit(PDTrimModule(str(tiny_llama_dir), loading=EIGHT), datamodule=data)
    with pytest.raises(UserError, match=r"`loading.teacher_bits: 8` needs a GPU"):
        dry_run(
            ["fit", f"--model.model={tiny_llama_dir}", f"--data.tokenizer={tiny_llama_dir}",
             "--model.loading.teacher_bits=8", "--trainer.accelerator=cpu"], io.StringIO(),
        )  # fmt: skip


@pytest.mark.parametrize(
    "strategy", [PDTrimDeepSpeedStrategy(2), PDTrimDeepSpeedStrategy(3), PDTrimFSDPStrategy()], ids=["2", "3", "fsdp"]
)
def test_strategies_that_cast_or_shard_are_refused_with_the_way_out(strategy: Any) -> None:
    with pytest.raises(UserError, match=r"`loading.teacher_bits: 8` does not go with.* or use `strategy: ddp_find"):
        check_teacher_bits(strategy, 8)
    check_teacher_bits(strategy, None)
    check_teacher_bits("ddp_find_unused_parameters_true", 8)


def test_the_students_own_weights_are_no_teacher_in_8_bits() -> None:
    settings: dict[str, Any] = {"loading": EIGHT, "trainable": "lora"}
    with pytest.raises(UserError, match=r"`loading.teacher_bits` wants others. Leave it out, or use `placement: copy`"):
        PDTrimModule("tiny", teacher=TeacherPlace("shared"), **settings).allowed.places(TeacherPlace("shared"))
    assert PDTrimModule("tiny", **settings).allowed.places(TeacherPlace()) == ["copy"]


def test_the_dry_run_counts_one_byte_for_a_weight_of_a_block() -> None:
    shape = Shape.of(model_config("meta-llama/Llama-3.1-8B", [ROOT / "configs" / "shapes"]))
    layout = Layout(teacher_bytes=2, teacher_eight_bits=True)
    load = Load(batch=1, eval_batch=1, tokens=128, chunk_tokens=128, gradient_checkpointing=True)

    def teacher(**changes: Any) -> int:
        return memory_per_process(shape, shape, replace(layout, **changes), load).device["teacher"]

    assert teacher() == shape.parameters + shape.embeddings + shape.hidden  # two bytes for these
    assert teacher(teacher_eight_bits=False) == 2 * shape.parameters
    assert teacher(placement="offline") == 0
    config = str(ROOT / "configs" / "llama3_8b_1gpu.yaml")
    more = ["--trainer.strategy=auto", "--trainer.precision=bf16-mixed", "--model.loading.dtype=float32"]
    told = []
    for bits in ("null", "8"):
        out = io.StringIO()
        dry_run(["fit", "--config", config, *more, f"--model.loading.teacher_bits={bits}", "--device_memory=999"], out)
        (line,) = [line for line in out.getvalue().splitlines() if line.startswith("  teacher")]
        told.append(float(line.split()[-1]))
    assert told == [14.96, 8.46]


def test_what_a_teacher_in_8_bits_wrote_is_no_cache_of_another(tiny_llama_dir: Path) -> None:
    data = data_of(tiny_llama_dir)
    data.prepare_data()
    data.setup("fit")
    whole, eight = (
        identity_of(PDTrimModule(str(tiny_llama_dir), loading=loading).pair, data, 1.0, [])
        for loading in (Loading(), EIGHT)
    )
    (said,) = whole.differences(eight, same_text=True)
    assert "float32 in the cache, float32 with layers in 8 bits here" in said


def test_an_export_compares_with_weights_that_were_not_rounded(tiny_llama_dir: Path) -> None:
    module = PDTrimModule(str(tiny_llama_dir), loading=EIGHT)
    module.teacher = PDTrimModule(str(tiny_llama_dir)).pair.teacher("prefill", 512)
    assert _untrained(module) is not module.teacher
    module.loading = Loading()
    assert _untrained(module) is module.teacher


def test_nothing_imports_the_library_before_it_is_asked_for() -> None:
    code = "import sys, pdtrim_pl.module, pdtrim_pl.models.pretrained; sys.exit('bitsandbytes' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
