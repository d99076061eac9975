"""How long a request may be: whatever spelling of RoPE scaling a config.json has, and everywhere the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from short_text import SHORT
from tiny_models import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from pdtrim_pl.data import Lengths, Parts, PromptResponseDataModule
from pdtrim_pl.evaluation.timing import measure_timing
from pdtrim_pl.export import export_pair
from pdtrim_pl.models.context import usable_context
from pdtrim_pl.plan.json_files import read_json
from pdtrim_pl.serving.exported import ExportedPair
from pdtrim_pl.staged import StagedCausalLM

YARN = {"factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize("raised", [128, 160, 512])
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_yarn_stretches_the_original_context_by_its_factor(raised: int, spelling: str, kind: str) -> None:
    config = {"max_position_embeddings": raised, spelling: {kind: "yarn", **YARN}}
    assert usable_context(config) == 512


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "yarn", "factor": 4.0}, 512),
        ({"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 100}, 250),
        ({"rope_type": "yarn", "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}, 128),
        ({"rope_type": "dynamic", "factor": 4.0}, 128),
        ({"type": "su", "original_max_position_embeddings": 64}, 64),
        ({"sliding_attention": {"rope_type": "default"}, "full_attention": {"rope_type": "yarn", **YARN}}, 512),
    ],
)
def test_other_scalings_of_a_context_of_128_tokens(rope: dict[str, Any], expected: int) -> None:
    assert usable_context({"max_position_embeddings": 128, "rope_parameters": rope}) == expected


def test_the_older_spelling_wins_as_it_does_in_transformers() -> None:
    both = {"rope_scaling": {"type": "yarn", **YARN}, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    config = AutoConfig.for_model("llama", max_position_embeddings=128, **both)
    assert config.rope_parameters["rope_type"] == "yarn"
    assert usable_context({"max_position_embeddings": 128, **both}) == usable_context(config.to_dict()) == 512


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_request_of_300_tokens_runs_under_yarn_and_one_of_513_is_refused(family: str) -> None:
    staged = StagedCausalLM(tiny_model(family, rope_scaling={"rope_type": "yarn", **YARN}, layered=False)).eval()
    ids = torch.arange(513)[None] % 64
    assert staged(ids[:, :296], ids[:, 296:300]).hidden.shape[1] == 4
    with pytest.raises(ValueError, match=r"take 513 tokens, and the context of `model` is 512"):
        staged(ids[:, :500], ids[:, 500:])
    with pytest.raises(ValueError, match=r"exceed the context of the model, 512 tokens"):
        measure_timing(staged, prompt_tokens=500, new_tokens=13)
    assert measure_timing(staged, prompt_tokens=290, new_tokens=2, repeats=1).prompt_tokens == 290


def test_an_export_of_a_yarn_model_serves_its_whole_context(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", **YARN}
    export = export_pair(StagedCausalLM(tiny_model("llama", rope_scaling=scaling)), tmp_path / "pair", tokenizer=None)
    assert read_json(export / "decode" / "config.json", "model configuration")["max_position_embeddings"] == 128
    pair = ExportedPair.read(export)
    pair.check_prompt(300, 212)
    with pytest.raises(ValueError, match=r"the model's context is 512"):
        pair.check_prompt(300, 213)


def test_data_longer_than_max_position_embeddings_fits_a_yarn_model(tiny_llama_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "yarn"
    shutil.copytree(tiny_llama_dir, folder)
    config = AutoConfig.from_pretrained(folder)
    config.max_position_embeddings = 128
    config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, **YARN}
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    parts = Parts(validation=1, calibration=1, max_train=1)
    for length, fits in ((512, True), (513, False)):
        data = PromptResponseDataModule(str(folder), SHORT, Lengths(length, 8, 16), parts=parts)
        if fits:
            data.setup()
            assert len(data.part("train")) == 1
        else:
            with pytest.raises(ValueError, match=r"`lengths.max_length`=513 is longer than the model's context of 512"):
                data.prepare_data()
