"""A model that is not what its files say is refused by every command, before anything is tokenised or read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_runs import run
from process_group import run_ranks
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch import Tensor
from transformers import BloomConfig, Gemma3Config, GPT2Config

from pdtrim_pl.cli.main import main
from pdtrim_pl.data import PromptResponseDataModule
from pdtrim_pl.export import export_pair, load_stage
from pdtrim_pl.models import pretrained
from pdtrim_pl.models.pretrained import check_model, load_causal_lm
from pdtrim_pl.staged import StagedCausalLM

Tensors = dict[str, Tensor]
Change = Callable[[Path], None]
COMMANDS = ["fit", "validate", "compare"]


def weights(change: Callable[[Tensors], Tensors]) -> Change:
    """Write other weights."""

    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return apply


def described(**settings: Any) -> Change:
    """Write other settings into `config.json`."""

    def apply(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **settings}), encoding="utf-8")

    return apply


def without(*names: str) -> Change:
    return weights(lambda tensors: {name: x for name, x in tensors.items() if name not in names})


def with_(**more: Tensor) -> Change:
    return weights(lambda tensors: {**tensors, **{name.replace("__", "."): x for name, x in more.items()}})


def as_bin(folder: Path) -> None:
    """An older file of a model in `nn.DataParallel`."""
    file = folder / "model.safetensors"
    torch.save({f"module.{name}": x for name, x in load_file(file).items()}, folder / "pytorch_model.bin")
    file.unlink()


def in_shards(folder: Path) -> None:
    """Two files, of which the index has forgotten a weight."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    last = {"lm_head.weight": tensors.pop("lm_head.weight")}
    tensors.pop("model.layers.2.mlp.up_proj.weight")
    save_file(tensors, folder / "one.safetensors", metadata={"format": "pt"})
    save_file(last, folder / "two.safetensors", metadata={"format": "pt"})
    index = {**dict.fromkeys(tensors, "one.safetensors"), "lm_head.weight": "two.safetensors"}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8"
    )
    file.unlink()


PARTIAL: dict[str, tuple[Change, str]] = {
    "a compiled model's names": (
        weights(lambda tensors: {f"_orig_mod.{name}": x for name, x in tensors.items()}),
        r"lack 39 of its weights, first `lm_head.weight`; .* hold 39 .*, first `_orig_mod.lm_head.weight`",
    ),
    "no head": (without("lm_head.weight"), r"lack 1 of its weights, first `lm_head.weight`"),
    "fewer blocks": (described(num_hidden_layers=6), r"lack 18 .* first `model.layers.4.input_layernorm.weight`"),
    "more blocks": (described(num_hidden_layers=3), r"hold 9 .* first `model.layers.3.input_layernorm.weight`"),
    "another width": (described(intermediate_size=48), r"`model.layers.0.mlp.down_proj.weight` is \[32, 64\] there"),
    "biases": (with_(model__layers__0__self_attn__q_proj__bias=torch.zeros(32)), r"hold 1 .*q_proj.bias"),
    "a reward model": (
        weights(lambda tensors: {name.replace("lm_head", "score"): x for name, x in tensors.items()}),
        r"first `lm_head.weight`; .* first `score.weight`",
    ),
    "a wrapped model in a .bin": (as_bin, r"first `lm_head.weight`; .* first `module.lm_head.weight`"),
    "a shard that lacks one": (in_shards, r"lack 1 of its weights, first `model.layers.2.mlp.up_proj.weight`"),
}
FP8 = {"quant_method": "modelopt", "quant_algo": "FP8"}
QUANTISED: dict[str, tuple[Change, str]] = {
    **{
        method: (described(quantization_config={"quant_method": method, "bits": 4}), rf"`quant_method` '{method}'")
        for method in ("gptq", "awq", "bitsandbytes", "compressed-tensors", "fp8", "mxfp4", "something new")
    },
    "modelopt": (described(quantization_config=FP8), r"`quantization_config` \(`quant_method` 'modelopt'\)"),
    "an older compressed-tensors": (described(compression_config={"format": "pack"}), r"has `compression_config`"),
    "MLX": (described(quantization={"bits": 4, "group_size": 64}), r"has `quantization`"),
    "float8 that nobody tells of": (
        weights(lambda t: {n: x.to(torch.float8_e4m3fn) if "_proj" in n else x for n, x in t.items()}),
        r"no `quantization_config`: model.layers.0.mlp.down_proj.weight is stored as float8_e4m3fn",
    ),
    "int8 that nobody tells of": (
        weights(lambda t: {n: (100 * x).to(torch.int8) if "_proj" in n else x for n, x in t.items()}),
        r"no `quantization_config`: model.layers.0.mlp.down_proj.weight is stored as int8",
    ),
}


@pytest.fixture
def model(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is tokenised and no weight is read."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("too early")

    monkeypatch.setattr(PromptResponseDataModule, "tokenizer", property(refuse))
    monkeypatch.setattr("pdtrim_pl.models.pretrained.AutoModelForCausalLM.from_pretrained", refuse)


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ended with."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("pdtrim: error: ")]
    return line


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("what", PARTIAL)
def test_every_command_refuses_a_model_that_its_files_hold_in_part(
    what: str, command: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = PARTIAL[what]
    change(model)
    assert run(command, model, tmp_path / "run") == 1
    line = refusal(capsys)
    assert re.search(message, line), line
    assert str(model) in line
    assert "Save the whole model again" in line


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("command", [*COMMANDS, "dry_run"])
@pytest.mark.parametrize("what", ["modelopt", "gptq"])
def test_every_command_refuses_a_quantised_model(
    what: str, command: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = QUANTISED[what]
    change(model)
    assert run(command, model, tmp_path / "run") == 1
    line = refusal(capsys)
    assert re.search(message, line), line
    assert "unquantised model" in line


@pytest.mark.parametrize("what", QUANTISED)
def test_every_kind_of_quantised_model_is_refused(what: str, model: Path) -> None:
    change, message = QUANTISED[what]
    change(model)
    for load in (load_causal_lm, check_model):
        with pytest.raises(ValueError, match=rf"Model `{model}` is quantised.*{message}.*unquantised model"):
            load(str(model))


@pytest.mark.parametrize("what", PARTIAL)
def test_loading_alone_refuses_a_model_that_its_files_hold_in_part(what: str, model: Path) -> None:
    change, message = PARTIAL[what]
    change(model)
    with pytest.raises(ValueError, match=message):
        load_causal_lm(str(model))


def test_a_teacher_that_its_files_hold_in_part_is_refused(
    model: Path, tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PARTIAL["fewer blocks"][0](model)
    assert run("validate", tiny_llama_dir, tmp_path / "run", loading={"teacher": str(model)}) == 1
    assert str(model) in refusal(capsys)


@pytest.mark.parametrize("what", ["no head", "fewer blocks"])
def test_export_refuses_a_model_that_has_lost_weights_since_it_was_trained(
    what: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fit", model, tmp_path / "run") == 0
    PARTIAL[what][0](model)
    capsys.readouterr()
    checkpoint = tmp_path / "run" / "ckpt" / "last.ckpt"
    assert main(["export", "--ckpt_path", str(checkpoint), "--output", str(tmp_path / "again")]) == 1
    assert "they lack" in refusal(capsys)
    assert not (tmp_path / "again").exists()


def test_a_whole_model_under_the_full_plan_is_its_teacher(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    from pdtrim_pl.module import PDTrimModule

    monkeypatch.setattr(PDTrimModule, "log_dict", lambda self, values, **_: seen.update(values))
    assert run("validate", model, tmp_path / "run") == 0
    assert seen["val/kl"] == 0.0
    assert seen["val/agreement"] == 1.0
    assert seen["val/ppl"] == seen["val/teacher_ppl"]


@pytest.mark.parametrize(
    ("family", "overrides", "change"),
    [
        ("llama", {"tie_word_embeddings": True}, without("lm_head.weight")),
        ("qwen2", {"tie_word_embeddings": True}, without("lm_head.weight")),
        ("llama", {}, with_(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))),
        (
            "gpt_neox",
            {},
            with_(
                gpt_neox__layers__0__attention__bias=torch.ones(1, 1, 8, 8, dtype=torch.bool),
                gpt_neox__layers__0__attention__masked_bias=torch.tensor(-1e9),
            ),
        ),
        (
            "llama",
            {"tie_word_embeddings": True},
            weights(lambda t: {n.removeprefix("model."): x for n, x in t.items() if n != "lm_head.weight"}),
        ),
    ],
    ids=["a tied head", "a tied head of Qwen 2", "old RoPE tables", "old masks of Pythia", "a tied model without head"],
)
def test_what_may_be_absent_or_left_over_is_no_fault(
    family: str, overrides: dict[str, Any], change: Change, tmp_path: Path
) -> None:
    original = tiny_model(family, **overrides)
    original.save_pretrained(tmp_path)
    change(tmp_path)
    check_model(str(tmp_path))
    loaded = load_causal_lm(str(tmp_path))
    for name, weight in original.named_parameters():
        assert torch.equal(loaded.get_parameter(name), weight), name


def test_checking_changes_neither_the_progress_bars_nor_the_log_of_transformers(model: Path) -> None:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    check_model(str(model))
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before


@pytest.mark.parametrize("wrong", [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"rope_parameters": 3}])
def test_a_wrong_value_in_config_json_ends_in_one_line(
    wrong: dict[str, Any], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    described(**wrong)(model)
    assert run("validate", model, tmp_path / "run") == 1
    assert f"The directory `{model}` does not hold a usable model" in refusal(capsys)


FOREIGN = {
    "gemma3": Gemma3Config().to_dict(),
    "bloom": BloomConfig(n_layer=2).to_dict(),
    "gpt2": GPT2Config(n_layer=2).to_dict(),
    "nobody_knows": {"model_type": "nobody_knows", "auto_map": {"AutoConfig": "configuration_own.Own"}},
    "not_even_code": {"model_type": "not_even_code"},
}


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("command", [*COMMANDS, "dry_run"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_family_without_an_adapter_is_refused_from_its_config_alone(
    kind: str, command: str, tiny_tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_tokenizer_dir, tmp_path / "model"))
    (folder / "config.json").write_text(json.dumps(FOREIGN[kind]), encoding="utf-8")
    assert run(command, folder, tmp_path / "run") == 1
    line = refusal(capsys)
    assert f"`model` is of type {kind!r}, which has no adapter" in line
    assert "`model.architecture: {class_path: my_module.MyFamily}`" in line


def test_a_tokenizer_of_a_family_without_an_adapter_may_be_used(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_tokenizer_dir, tmp_path / "bloom"))
    (folder / "config.json").write_text(json.dumps(FOREIGN["bloom"]), encoding="utf-8")
    PromptResponseDataModule(str(folder))._check_model()


def test_a_quantised_half_of_an_export_is_refused(tmp_path: Path) -> None:
    export = export_pair(StagedCausalLM(tiny_model("llama")), tmp_path / "pair", tokenizer=None)
    described(quantization_config={"quant_method": "gptq", "bits": 4})(export / "decode")
    with pytest.raises(ValueError, match=r"decode` is quantised: its config.json has `quantization_config`"):
        load_stage(export, "decode")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "what"), [("zero3", "more blocks"), ("zero3", "another width"), ("fsdp", "no head")]
)
def test_every_process_refuses_a_model_that_its_files_hold_in_part(
    strategy: str, what: str, model: Path, tmp_path: Path
) -> None:
    """transformers tells of missing weights alone under ZeRO-3, and of wrong shapes on the first process alone."""
    PARTIAL[what][0](model)
    run_ranks("partial_run.py", str(model), str(tmp_path), strategy, folder=tmp_path, timeout=200)
    for rank in range(2):
        told = json.loads((tmp_path / f"told-{strategy}-{rank}.json").read_text(encoding="utf-8"))
        assert re.search(PARTIAL[what][1], told), told


def test_a_gguf_file_that_lacks_weights_is_not_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"missing_keys": {"model.norm.weight"}, "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
    monkeypatch.setattr(
        "pdtrim_pl.models.pretrained.AutoModelForCausalLM.from_pretrained", lambda *_, **__: (tiny_model("llama"), told)
    )
    monkeypatch.setattr("pdtrim_pl.models.pretrained.importlib.util.find_spec", lambda name: name)
    with pytest.raises(ValueError, match=r"`smollm2-135m` .* lack 1 of its weights, first `model.norm.weight`"):
        pretrained._convert(tmp_path / "model.gguf", tmp_path / "target")
    assert not (tmp_path / "target").exists()
