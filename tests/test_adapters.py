"""An adapter named in YAML by its class path: every command uses it, and an export knows it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import own_family
import pytest
from model_runs import run
from short_text import SHORT
from tiny_models import tiny_model
from transformers import ArceeConfig, ArceeForCausalLM

from pdtrim_pl.cli.main import main
from pdtrim_pl.compare.comparison import Comparison
from pdtrim_pl.compare.methods import Drop
from pdtrim_pl.compare.settings import Subject
from pdtrim_pl.compare.texts import read_texts
from pdtrim_pl.criteria import LastN
from pdtrim_pl.data import Lengths, Parts, PromptResponseDataModule
from pdtrim_pl.export import export_pair, load_plan_and_policy, load_stage, verify_pair
from pdtrim_pl.models.adapters import adapter_at, check_adapter, class_path_of
from pdtrim_pl.models.architectures import ARCHITECTURES, Llama, LlamaLine
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.plan import PLAN_FILE, PLAN_FORMAT, STAGES, ModelRef, StagePlan
from pdtrim_pl.staged import StagedCausalLM

ROOT = Path(__file__).parents[1]
ARCEE = {"architecture": {"class_path": "own_family.Arcee"}}
OWN = {"architecture": {"class_path": "own_family.Own"}}


@pytest.fixture
def arcee(tiny_tokenizer_dir: Path, tmp_path: Path) -> Path:
    """A model of a family without an adapter."""
    return _saved(ArceeForCausalLM(ArceeConfig(**_SIZES)), tiny_tokenizer_dir, tmp_path / "arcee")


@pytest.fixture
def own(tiny_tokenizer_dir: Path, tmp_path: Path) -> Path:
    """A model of a family that only the adapter's module knows."""
    model = own_family.OwnForCausalLM(own_family.OwnConfig(**_SIZES))
    return _saved(model, tiny_tokenizer_dir, tmp_path / "own")


_SIZES = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def _saved(model: ArceeForCausalLM | own_family.OwnForCausalLM, tokenizer: Path, folder: Path) -> Path:
    model.save_pretrained(folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder


@pytest.mark.usefixtures("forked_workers")
def test_a_family_of_ones_own_is_trained_continued_exported_and_served(
    arcee: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run("fit", arcee, folder, **ARCEE) == 0
    assert load_plan_and_policy(folder / "pair")[0].model.architecture == "own_family.Arcee"
    last = folder / "ckpt" / "last.ckpt"
    assert main(["validate", "--config", str(folder / "fit.yaml"), "--ckpt_path", str(last)]) == 0
    again = ["fit", "--config", str(folder / "fit.yaml"), "--ckpt_path", "last", "--trainer.max_epochs", "2"]
    assert main([*again, "--trainer.callbacks.init_args.overwrite", "true"]) == 0
    assert main(["export", "--ckpt_path", str(last), "--output", str(tmp_path / "second")]) == 0
    capfd.readouterr()
    for pair in (folder / "pair", tmp_path / "second"):
        assert main(["generate", "--export", str(pair), "--prompt", "The", "--max_new_tokens", "3"]) == 0
        assert "prompt   3 tokens" in capfd.readouterr().err


@pytest.mark.parametrize("command", ["compare", "dry_run"])
def test_comparisons_and_dry_runs_take_the_adapter_too(command: str, arcee: Path, tmp_path: Path) -> None:
    assert run(command, arcee, tmp_path / "run", **ARCEE) == 0
    if command == "compare":
        (plan,) = [StagePlan.load(file) for file in (tmp_path / "run").rglob("*.json") if _is_plan(file)]
        assert plan.model.architecture == "own_family.Arcee"


def test_rows_that_were_made_before_there_were_adapters_keep_their_keys(tiny_llama_dir: Path, tmp_path: Path) -> None:
    subject, texts = Subject(str(tiny_llama_dir), "float32", "cpu"), read_texts(_data(tiny_llama_dir), None)
    comparison = Comparison(subject, _data(tiny_llama_dir), {"last": Drop(criterion=LastN())})
    before = {"name": str(tiny_llama_dir), "dtype": "float32", "accelerator": "cpu"}
    known = comparison._shared(texts, {}, {"model": before, "measures": {}})
    assert comparison._shared(texts, {}, {"model": {**before, "architecture": None}, "measures": {}}) == known
    assert comparison._shared(texts, {}, {"model": {**before, **ARCEE}, "measures": {}}) != known


def _data(model: Path) -> PromptResponseDataModule:
    parts = Parts(validation=1, calibration=2, test=2, max_train=2)
    return PromptResponseDataModule(str(model), SHORT, Lengths(24, 8, 16), parts=parts)


def _is_plan(file: Path) -> bool:
    found = json.loads(file.read_text(encoding="utf-8"))
    return isinstance(found, dict) and found.get("format") == PLAN_FORMAT


def test_a_family_that_only_the_adapters_module_knows_is_served_by_processes_that_had_not_imported_it(
    own: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert run("fit", own, folder, **OWN) == 0
    command = [sys.executable, "-m", "pdtrim_pl", "generate", "--export", str(folder / "pair"), "--prompt", "The"]
    command += ["--max_new_tokens", "3"]
    environment = {"PATH": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "You are using a model of type" not in done.stderr
    environment["PYTHONPATH"] = str(ROOT)
    lost = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert lost.returncode == 1
    assert "'own_family.Own', which cannot be imported (No module named 'own_family')" in lost.stderr
    assert "PYTHONPATH" in lost.stderr
    assert "Traceback" not in lost.stderr


def test_the_adapter_named_in_yaml_takes_the_place_of_the_packages_own(tiny_llama_dir: Path, tmp_path: Path) -> None:
    own_family.Own.asked.clear()
    plan = StagePlan.full(ModelRef(str(tiny_llama_dir), "llama", 4), "free")
    plan.drop("prefill", 2).save(tmp_path / "plan.json")
    structure = {"plan": str(tmp_path / "plan.json")}
    assert run("validate", tiny_llama_dir, tmp_path / "run", structure=structure, **OWN) == 0
    assert own_family.Own.asked


def test_a_teacher_of_another_family_keeps_the_packages_adapter(
    arcee: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    module = PDTrimModule(str(arcee), architecture=own_family.Arcee())
    module.loading = module.loading.__class__(teacher=str(tiny_llama_dir))
    module.check_models()
    module.configure_model()
    assert isinstance(module.student.architecture, own_family.Arcee)
    assert isinstance(module.teacher.architecture, Llama)
    same = PDTrimModule(str(arcee), architecture=own_family.Arcee())
    same.configure_model()
    assert isinstance(same.teacher.architecture, own_family.Arcee)


def test_only_importable_adapters_of_ones_own_are_named_in_a_plan() -> None:
    class Local(LlamaLine):
        pass

    assert class_path_of(own_family.Arcee(), "arcee") == "own_family.Arcee"
    assert class_path_of(Llama(), "arcee") == "pdtrim_pl.models.architectures.Llama"
    assert class_path_of(Local(), "arcee") is None
    for family, adapter in ARCHITECTURES.items():
        assert class_path_of(adapter, family) is None
    assert isinstance(adapter_at("own_family.Arcee"), own_family.Arcee)


def test_a_plan_names_the_adapter_that_its_model_runs_with(tmp_path: Path) -> None:
    model = tiny_model("llama")
    plan = StagePlan.full(ModelRef("tiny", "llama", 4)).drop("decode", 2)
    staged = StagedCausalLM(model, plan, architecture=own_family.Own())
    assert staged.plan.model.architecture == "own_family.Own"
    export = export_pair(staged, tmp_path / "pair", tokenizer=None)
    assert verify_pair(export, staged) < 1e-5
    for stage in STAGES:
        assert isinstance(load_stage(export, stage).architecture, own_family.Own)
        assert isinstance(load_stage(export, stage, architecture=Llama()).architecture, Llama)
    assert "architecture" not in StagedCausalLM(tiny_model("llama"), plan).plan.to_json()["model"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.Own", r"'nowhere.Own', which cannot be imported \(No module named 'nowhere'\)"),
        ("own_family.Gone", r"'own_family.Gone', which cannot be imported"),
        ("own_family.NoAdapter", r"'own_family.NoAdapter', which is no subclass of pdtrim_pl.staged.Architecture"),
        ("..", r"'\.\.', which cannot be imported"),
    ],
)
def test_a_plan_that_names_no_adapter_is_refused(path: str, message: str, tmp_path: Path) -> None:
    export = export_pair(StagedCausalLM(tiny_model("llama")), tmp_path / "pair", tokenizer=None)
    file = export / PLAN_FILE
    plan = json.loads(file.read_text(encoding="utf-8"))
    plan["model"]["architecture"] = path
    file.write_text(json.dumps(plan), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_stage(export, "decode")


def test_an_adapter_with_settings_of_its_own_is_refused() -> None:
    message = r"`architecture` is a Tuned with settings of its own, factor, .*class attributes"
    for make in (check_adapter, lambda adapter: Subject("m", architecture=adapter)):
        with pytest.raises(ValueError, match=message):
            make(own_family.Tuned(2.0))
    with pytest.raises(ValueError, match=message):
        PDTrimModule("m", architecture=own_family.Tuned(2.0))


def test_a_class_that_is_no_adapter_is_refused_by_the_command_line(
    arcee: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        run("validate", arcee, tmp_path / "run", architecture={"class_path": "own_family.NoAdapter"})
    assert done.value.code == 2
    assert "own_family.NoAdapter" in capsys.readouterr().err
