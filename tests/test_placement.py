"""Where the teacher lives: every place gives the same run, and what is not possible is refused with its reason."""

from __future__ import annotations

import io
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import yaml
from lightning.pytorch.strategies import SingleDeviceStrategy
from test_lora import SETTINGS, adapter_parameters, drops, fit, module_of
from test_losses import batch
from tiny_models import FAMILIES, tiny_model

from callbacks import ExportPair
from pdtrim_pl.cli.dry_run import run as dry_run
from pdtrim_pl.evaluation.quality import measure_quality
from pdtrim_pl.losses import KL, HiddenMatch, KVMatch
from pdtrim_pl.models.loading import Loading
from pdtrim_pl.models.placement import Placement, TeacherPlace
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.sizing.load import Layout, Load
from pdtrim_pl.sizing.memory import memory_per_process
from pdtrim_pl.sizing.of_run import model_config
from pdtrim_pl.sizing.shape import Shape
from pdtrim_pl.sizing.trained import trained_weights
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.lora import LoRA
from pdtrim_pl.staged.shared import SharedTeacher
from pdtrim_pl.staged.trainable import Trainable
from pdtrim_pl.teacher.choice import Allowed, choose

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "configs" / "shapes"
SHARED = TeacherPlace("shared")
LOAD = Load(batch=2, eval_batch=2, tokens=4096, chunk_tokens=1024, gradient_checkpointing=True, searches=False)


def trained_student(family: str, settings: LoRA) -> StagedCausalLM:
    student = StagedCausalLM(tiny_model(family))
    student.train_only(settings)
    student.apply_plan(student.plan.drop("decode", 2).drop("prefill", 2).drop("decode", 1))
    for parameter in adapter_parameters(student).values():
        parameter.data.fill_(0.05)
    return student.train()


@pytest.mark.parametrize("settings", SETTINGS, ids=["tied", "one a stage"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_teacher_computes_what_a_copy_computes(family: str, settings: LoRA) -> None:
    student = trained_student(family, settings)
    shared, copy = SharedTeacher(student), StagedCausalLM(tiny_model(family)).eval()
    assert measure_quality(shared, copy, [batch()]).kl == 0.0
    assert measure_quality(student, copy, [batch()]).kl > 1e-3
    assert shared.plan == copy.plan
    assert student.model.training, "the student goes on in its own mode"


def test_a_shared_teacher_has_no_weights_of_its_own() -> None:
    student = trained_student("llama", LoRA(2))
    module = PDTrimModule("tiny", trainable=LoRA(2), teacher=SHARED)
    module.student = student
    module.teacher = SharedTeacher(student)
    assert {id(p) for p in module.parameters()} == {id(p) for p in student.parameters()}
    assert not any(name.startswith("teacher") for name in module.state_dict())
    module.train()
    assert student.model.training


@pytest.mark.parametrize("settings", SETTINGS, ids=["tied", "one a stage"])
def test_a_run_with_a_shared_teacher_is_one_with_a_copy(settings: LoRA, tiny_llama_dir: Path, tmp_path: Path) -> None:
    """With drops, losses on hidden states and caches, validation and a measured export."""
    modules = []
    for place in (SHARED, TeacherPlace("copy")):
        module = module_of(tiny_llama_dir, settings, teacher=place)
        module.losses = [KL(), HiddenMatch(), KVMatch()]
        folder = tmp_path / place.placement
        fit(module, tiny_llama_dir, folder, drops(), ExportPair(folder / "pair", prompt_tokens=16, new_tokens=4))
        modules.append(module)
    shared, copy = modules
    assert isinstance(shared.teacher, SharedTeacher)
    assert shared.plan == copy.plan
    assert dict(shared.record.losses) == pytest.approx(dict(copy.record.losses), rel=1e-3)
    for name, parameter in adapter_parameters(shared.student).items():
        torch.testing.assert_close(parameter, copy.student.get_parameter(name), msg=name)
    for (_, ours), (_, theirs) in zip(shared.record.validations, copy.record.validations, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_a_run_with_a_shared_teacher_is_continued(tiny_llama_dir: Path, tmp_path: Path) -> None:
    whole, first, second = (module_of(tiny_llama_dir, LoRA(4), teacher=SHARED) for _ in range(3))
    fit(whole, tiny_llama_dir, tmp_path / "whole", drops())
    fit(first, tiny_llama_dir, tmp_path / "parts", drops(), epochs=1)
    last = tmp_path / "parts" / "checkpoints" / "epoch=0.ckpt"
    fit(second, tiny_llama_dir, tmp_path / "rest", drops(), ckpt_path=last)
    for name, parameter in adapter_parameters(whole.student).items():
        assert torch.equal(parameter, second.student.get_parameter(name)), name


# What is possible

WHOLE, LORA = Allowed(False, True, False), Allowed(True, True, False)
OTHER, CUT = Allowed(True, False, False), Allowed(False, True, True)
FOLDER = Path("cache")


@pytest.mark.parametrize(
    ("allowed", "asked", "places"),
    [
        (WHOLE, TeacherPlace(), ["copy"]),
        (WHOLE, TeacherPlace(cache=FOLDER), ["copy", "offline"]),
        (LORA, TeacherPlace(), ["copy", "shared"]),
        (LORA, TeacherPlace(cache=FOLDER), ["copy", "shared", "offline"]),
        (OTHER, TeacherPlace(), ["copy"]),
        (CUT, TeacherPlace(), ["sharded"]),
        (CUT, TeacherPlace("offline", FOLDER), ["offline"]),
        (CUT, TeacherPlace("sharded"), ["sharded"]),
        (LORA, SHARED, ["shared"]),
    ],
)
def test_the_places_that_settings_allow(allowed: Allowed, asked: TeacherPlace, places: list[Placement]) -> None:
    assert allowed.places(asked) == places


@pytest.mark.parametrize(
    ("allowed", "asked", "message"),
    [
        (WHOLE, "shared", r"training changes them. Use `trainable: lora`.*or `placement: copy`"),
        (OTHER, "shared", r"`loading.teacher` names another model. Leave it out"),
        (WHOLE, "sharded", r"needs a strategy that shards weights.*PDTrimFSDPStrategy. Use one, or `placement: copy`"),
        (CUT, "copy", r"shards every model. Use `placement: sharded`"),
    ],
)
def test_a_place_that_is_not_possible_is_refused_with_its_reason(
    allowed: Allowed, asked: Placement, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        allowed.places(TeacherPlace(asked))


@pytest.mark.parametrize(
    ("room", "placement", "why"),
    [
        (50, "copy", "copy 40.00, shared 20.00, offline 10.00; there are 50.00$"),
        (39, "shared", "there are 39.00$"),
        (12, "offline", "there are 12.00$"),
        (9, "offline", "none fits, this one needs least$"),
    ],
)
def test_auto_takes_the_first_place_that_fits_and_says_why(room: int, placement: Placement, why: str) -> None:
    needs: Mapping[Placement, int] = {"copy": 40 << 30, "shared": 20 << 30, "offline": 10 << 30}
    found = choose(list(needs), needs.__getitem__, room << 30)
    assert found.placement == placement
    assert re.search(why, found.why)


@pytest.mark.parametrize(("room", "placement"), [(10**15, "copy"), (0, "shared")])
def test_auto_logs_its_choice_in_one_line(
    room: int, placement: Placement, tiny_llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("pdtrim_pl.teacher.placed.room_on_device", lambda *_: room)
    module = module_of(tiny_llama_dir, LoRA(2))
    with caplog.at_level(logging.INFO, "pdtrim_pl"):
        fit(module, tiny_llama_dir, tmp_path, epochs=1)
    (line,) = (record.message for record in caplog.records if "Place of the teacher" in record.message)
    assert line.startswith(f"Place of the teacher: {placement} (GiB needed on a device: copy ")
    assert module.placement == placement
    assert isinstance(module.teacher, SharedTeacher) == (placement == "shared")


def test_a_place_that_was_asked_for_is_refused_before_the_first_step(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Use `trainable: lora`"):
        fit(module_of(tiny_llama_dir, "all", teacher=SHARED), tiny_llama_dir, tmp_path)
    shutil.copytree(tiny_llama_dir, tmp_path / "other")
    module = module_of(tiny_llama_dir, "lora", teacher=SHARED, loading=Loading(teacher=str(tmp_path / "other")))
    with pytest.raises(ValueError, match=r"`loading.teacher` names another model"):
        fit(module, tiny_llama_dir, tmp_path)


# Memory


@pytest.fixture(scope="module")
def eight() -> Shape:
    return Shape.of(model_config("meta-llama/Llama-3.1-8B", [SHAPES]))


@pytest.mark.parametrize("placement", [place for place in get_args(Placement) if place != "auto"])
def test_only_a_copy_has_weights_and_only_an_offline_teacher_has_no_pass(placement: Placement, eight: Shape) -> None:
    layout = Layout(student_bytes=2, teacher_bytes=2, compute_bytes=2)
    copy, found = (
        memory_per_process(eight, eight, Layout(**{**vars(layout), "placement": place}), LOAD).device
        for place in ("copy", placement)
    )
    held = placement in ("copy", "sharded")
    assert found["teacher"] == (2 * eight.parameters if held else 0)
    less = copy["activations or search"] - found["activations or search"]
    assert (less > 0) == (placement == "offline")


@pytest.mark.parametrize("trainable", ["norms", "lora", LoRA(4, tied=False)])
def test_what_trains_is_counted_as_it_is(trainable: Trainable | LoRA) -> None:
    student = StagedCausalLM(tiny_model("llama"))
    student.train_only(trainable)
    count = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert trained_weights(student.model.config, trainable) == (count, 0 if trainable == "norms" else count)
    assert trained_weights(student.model.config, "all") == (None, 0)
    blocks = sum(p.numel() for gate in student.gates.values() for p in gate.block.parameters())
    assert trained_weights(student.model.config, "merged") == (blocks, 0)


def test_adapters_need_gradients_and_states_in_fp32_and_nothing_else_does(eight: Shape) -> None:
    layout = Layout(student_bytes=2, teacher_bytes=2, compute_bytes=2, trained=1000, adapters=1000)
    device = memory_per_process(eight, eight, layout, LOAD).device
    assert device["student"] == 2 * eight.parameters + 4000
    assert (device["gradients"], device["optimizer"]) == (4000, 8000)


def test_the_dry_run_tells_the_place_what_trains_and_less_memory(tiny_llama_dir: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "model": {"model": "meta-llama/Llama-3.1-8B", "trainable": {"rank": 8, "tied": False}},
        "data": {"tokenizer": "${model.model}"}, "trainer": {"accelerator": "gpu", "devices": 1},
    }  # fmt: skip
    (tmp_path / "shapes").symlink_to(SHAPES)
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings))

    def told(*more: str) -> str:
        out = io.StringIO()
        dry_run(["fit", "--dry_run", "--config", str(config), "--model.loading.dtype=bfloat16", *more], out)
        return out.getvalue()

    memory = ["--model.loading.gradient_checkpointing=true", "--device_memory"]
    plenty, tight = told(*memory, "79"), told(*memory, "30")
    assert "41,943,040 weights train, 41,943,040 of them in adapters." in plenty
    assert "teacher: copy (GiB needed on a device: copy " in plenty
    assert "teacher: shared (GiB needed on a device: copy " in tight
    assert "  teacher                     0.00" in tight
    asked = told(*memory, "79", "--model.teacher.placement=offline", "--model.teacher.cache=somewhere")
    assert "teacher: offline (nothing else is possible with these settings)" in asked


def test_a_place_that_is_not_estimated_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Without a trainer, or with data of one's own, two places are possible and none is compared."""
    module = PDTrimModule("tiny", trainable="lora")
    module._trainer = SimpleNamespace(  # type: ignore[assignment]
        strategy=SingleDeviceStrategy("cpu"), datamodule=None, is_global_zero=True, callbacks=[]
    )
    with caplog.at_level(logging.INFO):
        assert module.placement == "copy"
    assert "copy (memory is not estimated without a PromptResponseDataModule)" in caplog.text
    assert "nothing else" not in caplog.text


def test_the_dry_run_refuses_callbacks_that_would_run_a_teacher_that_is_not_there() -> None:
    config = ROOT / "configs" / "llama3_8b_1gpu.yaml"
    offline = ["--model.teacher.placement=offline", "--model.teacher.cache=somewhere", "--device_memory=79"]
    with pytest.raises(
        ValueError, match=r"WidthDrop \(.*; BlockDrop \(.*; KVRetention \(.*; ExportPair \(.*\)\. Leave"
    ):
        dry_run(["fit", "--dry_run", "--config", str(config), *offline], io.StringIO())
