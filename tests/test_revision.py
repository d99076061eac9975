"""A git revision of a Hub model reaches everything that is loaded by its name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from pdtrim_pl.checkpoints.run_record import RunRecord
from pdtrim_pl.data import PromptResponseDataModule
from pdtrim_pl.export.documents import write_documents
from pdtrim_pl.models.fingerprint import model_fingerprint
from pdtrim_pl.models.loading import Loading
from pdtrim_pl.models.names import EMBEDDED_MODEL, split_revision
from pdtrim_pl.models.pretrained import check_model, load_causal_lm, load_config, load_tokenizer, model_type_of
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.plan import PLAN_FILE, POLICY_FILE, KVRetentionPolicy
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.description import kv_shape_of


@pytest.fixture
def hub(tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Id of a Hub model in the local cache. Its branch `v2` has other weights, another config and another tokenizer."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--me--mine"
    (folder / "refs").mkdir(parents=True)
    for branch, commit in (("main", "1" * 40), ("v2", "2" * 40)):
        (folder / "refs" / branch).write_text(commit)
        shutil.copytree(tiny_llama_dir, folder / "snapshots" / commit)
    second = folder / "snapshots" / ("2" * 40)
    model = load_causal_lm(str(tiny_llama_dir))
    torch.nn.init.constant_(model.get_output_embeddings().weight, 0.5)
    model.config.rms_norm_eps = 0.125
    model.save_pretrained(second)
    tokenizer = load_tokenizer(str(tiny_llama_dir))
    tokenizer.chat_template = "second"
    tokenizer.save_pretrained(second)
    return "me/mine"


def is_second(model: torch.nn.Module) -> bool:
    return bool((model.get_output_embeddings().weight == 0.5).all())  # type: ignore[operator, union-attr]


@pytest.mark.parametrize(("revision", "second"), [("", False), ("@main", False), ("@v2", True), ("@" + "2" * 40, True)])
def test_a_name_with_a_revision_loads_that_revision(revision: str, second: bool, hub: str) -> None:
    name = hub + revision
    assert is_second(load_causal_lm(name)) == second
    assert (load_config(name).rms_norm_eps == 0.125) == second
    assert (check_model(name).rms_norm_eps == 0.125) == second
    assert (load_tokenizer(name).chat_template == "second") == second
    assert model_type_of(name) == "llama"
    assert (model_fingerprint(name) == model_fingerprint(f"{hub}@v2")) == second
    assert (PromptResponseDataModule(name).tokenizer.chat_template == "second") == second


def test_a_revision_that_is_not_there_is_named(hub: str) -> None:
    for load in (load_causal_lm, load_config, load_tokenizer, check_model):
        with pytest.raises(ValueError, match="There is no model `me/mine@v3`"):
            load(f"{hub}@v3")


@pytest.mark.parametrize(
    ("loading", "student", "teacher"),
    [
        (Loading(), False, False),
        (Loading(revision="v2"), True, True),
        (Loading(revision="v2", teacher="me/mine"), True, True),
        (Loading(revision="v2", teacher="me/mine", teacher_revision="main"), True, False),
        (Loading(teacher="me/mine", teacher_revision="v2"), False, True),
        (Loading(teacher="me/mine@v2"), False, True),
    ],
)
def test_model_and_teacher_are_loaded_at_their_revisions(
    loading: Loading, student: bool, teacher: bool, hub: str
) -> None:
    pair = PDTrimModule(hub, loading=loading).pair
    pair.check()
    model, plan, _ = pair.student()
    assert is_second(model) == student
    assert is_second(pair.teacher("prefill", model.config.vocab_size).model) == teacher
    assert is_second(load_causal_lm(plan.model.name_or_path)) == student, "the plan names the revision"


def test_an_export_names_the_model_as_the_hub_does_and_its_plan_the_revision(hub: str, tmp_path: Path) -> None:
    model, plan, _ = PDTrimModule(hub, loading=Loading(revision="v2")).pair.student()
    staged = StagedCausalLM(model, plan)
    plan.save(tmp_path / PLAN_FILE)
    KVRetentionPolicy(plan.boundary, kv_shape_of(model)).save(tmp_path / POLICY_FILE, plan)
    write_documents(tmp_path, RunRecord(), None, target=tmp_path)
    assert f"base_model: {json.dumps(hub)}\n" in (tmp_path / "README.md").read_text()
    assert staged.plan.model.name_or_path == "me/mine@v2"


def test_a_revision_of_what_is_not_from_the_hub_is_refused(tiny_llama_dir: Path) -> None:
    for name in (str(tiny_llama_dir), EMBEDDED_MODEL, "./not/there", "/not/there"):
        with pytest.raises(ValueError, match=f"`loading.revision`='v2' .* `{name}` is on this machine: leave"):
            PDTrimModule(name, loading=Loading(revision="v2"))
        with pytest.raises(ValueError, match=f"`loading.teacher_revision`='v2' .* `{name}` is on this machine: leave"):
            PDTrimModule("me/mine", loading=Loading(teacher=name, teacher_revision="v2"))


def test_two_revisions_of_one_name_and_one_of_no_teacher_are_refused() -> None:
    with pytest.raises(ValueError, match="`me/mine@v1` names a revision too: give one of them"):
        Loading(revision="v2").pinned("me/mine@v1")
    with pytest.raises(ValueError, match=r"`loading.teacher_revision` is given without `loading.teacher`"):
        Loading(teacher_revision="v2").pinned("me/mine")


def test_only_names_as_the_hub_has_them_have_a_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine@v2").mkdir()
    assert split_revision("mine@v2") == ("mine@v2", None), "a directory"
    assert split_revision("mine@refs/pr/1") == ("mine", "refs/pr/1")
    for path in ("./mine@v1", "/data/mine@v1", "a/b/c@v1", "mine", "mine@"):
        assert split_revision(path) == (path, None)
