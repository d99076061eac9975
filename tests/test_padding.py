"""Tokens that a tokenizer has and the model's embedding has not: never for padding, refused in text."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from pdtrim_pl.data import Lengths, PromptResponseDataModule, TextSource
from pdtrim_pl.models.pretrained import load_causal_lm, load_tokenizer
from pdtrim_pl.staged import StagedCausalLM

ROWS = [{"prompt": f"question {number}", "response": f"answer {number}"} for number in range(9)]


def written(directory: Path, rows: Sequence[dict[str, str]]) -> str:
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def module_of(model: Path, path: str) -> PromptResponseDataModule:
    return PromptResponseDataModule(str(model), TextSource(path), Lengths(24, 4, 16), batch_size=4)


def with_added_tokens(model: Path, directory: Path, tokens: dict[str, str]) -> Path:
    """The model with tokens that were added to its tokenizer alone, behind the 259 rows of the embedding."""
    shutil.copytree(model, directory)
    tokenizer = load_tokenizer(str(model))
    tokenizer.add_special_tokens(tokens)
    tokenizer.save_pretrained(directory)
    return directory


def test_padding_that_was_added_behind_the_embedding_never_reaches_the_model(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    padded = with_added_tokens(tiny_llama_dir, tmp_path / "model", {"pad_token": "[PAD]"})
    rows = [{"prompt": "a" * size, "response": "b" * size} for size in range(1, 11)]
    module = module_of(padded, written(tmp_path, rows))
    module.setup()
    assert module.tokenizer.pad_token_id == 259
    assert module.pad_id == 2, "the end-of-sequence token, which the model knows"
    batches = list(module.train_dataloader())
    assert not all(batch.prompt_mask.all() for batch in batches)
    assert max(int(ids.max()) for batch in batches for ids in (batch.prompt_ids, batch.response_ids)) < 259
    model = StagedCausalLM(load_causal_lm(str(padded)))
    assert all(model(*batch.request).hidden.isfinite().all() for batch in batches)


def test_padding_falls_back_to_0_where_the_model_knows_no_end_either(tiny_llama_dir: Path, tmp_path: Path) -> None:
    tokens = {"eos_token": "[END]", "pad_token": "[PAD]"}
    module = module_of(with_added_tokens(tiny_llama_dir, tmp_path / "model", tokens), "unused.jsonl")
    assert (module.tokenizer.pad_token_id, module.tokenizer.eos_token_id, module.pad_id) == (260, 259, 0)


def test_text_with_a_token_behind_the_embedding_stays_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    padded = with_added_tokens(tiny_llama_dir, tmp_path / "model", {"pad_token": "[PAD]"})
    module = module_of(padded, written(tmp_path, [*ROWS, {"prompt": "a [PAD]", "response": "b"}]))
    with pytest.raises(ValueError, match=r"holds the token '\[PAD\]' with id 259, the model's vocabulary has 259; set"):
        module.setup()


def test_a_tokenizer_of_a_larger_model_stays_refused_whatever_the_text(tiny_llama_dir: Path, tmp_path: Path) -> None:
    smaller = tmp_path / "smaller"
    shutil.copytree(tiny_llama_dir, smaller)
    config = json.loads((smaller / "config.json").read_text(encoding="utf-8"))
    (smaller / "config.json").write_text(json.dumps(config | {"vocab_size": 200}), encoding="utf-8")
    with pytest.raises(ValueError, match="The tokenizer has ids up to 258, the model's vocabulary has 200"):
        module_of(smaller, written(tmp_path, ROWS)).setup()
