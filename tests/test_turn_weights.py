"""Weights of assistant turns: from a chat to its examples, its batches and the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from jsonargparse import ArgumentParser
from row_files import lines, texts, written
from test_data import make_module
from test_losses import batch, module_with

from pdtrim_pl.data import Batch, Collator, Lengths, Parts, PromptResponseDataModule, TextSource, TokenExamples
from pdtrim_pl.data.examples import Example
from pdtrim_pl.data.formatting import encode
from pdtrim_pl.data.mixture import MixedIn
from pdtrim_pl.data.sources import load_rows
from pdtrim_pl.losses import KL, CrossEntropy, LossTerm, token_weights, training_loss
from pdtrim_pl.losses.rows import Rows
from pdtrim_pl.losses.stored import run_alone, stored_terms
from pdtrim_pl.models.pretrained import load_tokenizer

TERMS: list[LossTerm] = [KL(temperature=2.0), CrossEntropy(0.5)]
LONG = Lengths(256, 1, 192)


def chat(*weights: float | None, name: str = "") -> dict[str, Any]:
    """A chat of as many turns; None leaves a message without a weight."""
    messages: list[dict[str, Any]] = []
    for turn, weight in enumerate(weights):
        answer = {"role": "assistant", "content": f"{name}answer {turn}"}
        messages += [{"role": "user", "content": f"{name}question {turn}"}]
        messages += [answer if weight is None else {**answer, "weight": weight}]
    return {"messages": messages}


def encoded(tokenizer: Path, path: str, **source: Any) -> TokenExamples:
    return encode(load_rows(TextSource(path, **source)), load_tokenizer(str(tokenizer)), LONG, 0)


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        ((1.0,), [1, 1, 1, 1]),
        ((0.5, 1.0), [0.5, 0.5, 1, 1]),
        ((0.25, 0.5, 2.0), [0.25, 0.5, 2, 2]),
        ((9.0, 0.25, 0.5, 1.0), [0.25, 0.5, 1, 1]),
    ],
)
def test_turns_are_weighed_from_the_last_one(
    given: tuple[float, ...], weights: list[float], tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    path = written(tmp_path, lines(chat(None, None, None), chat(None)))
    examples = encoded(tiny_tokenizer_dir, path, turns="all", turn_weights=given)
    assert [example.weight for example in examples] == weights


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_weight_in_a_message_wins(ending: str, tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    rows = [chat(None, 0.75, None), chat(3)]
    path = written(tmp_path, lines(*rows))
    if ending == "parquet":
        Dataset.from_list(rows).to_parquet(path := str(tmp_path / "data.parquet"))
    examples = encoded(tiny_tokenizer_dir, path, turns="all", turn_weights=(0.5, 1.0))
    assert [example.weight for example in examples] == [0.5, 0.75, 1, 3]
    last = encoded(tiny_tokenizer_dir, path)
    assert [example.weight for example in last] == [1, 3]


def test_a_turn_of_weight_0_is_part_of_later_prompts_and_no_response(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    whole = texts(
        tiny_tokenizer_dir, encoded(tiny_tokenizer_dir, written(tmp_path, lines(chat(None, None, None))), turns="all")
    )
    path = written(tmp_path, lines(chat(None, 0, None)))
    assert texts(tiny_tokenizer_dir, encoded(tiny_tokenizer_dir, path, turns="all")) == [whole[0], whole[2]]
    only = encoded(tiny_tokenizer_dir, path, turns="all", turn_weights=(0.0, 1.0))
    assert texts(tiny_tokenizer_dir, only) == [whole[2]]
    with pytest.raises(ValueError, match=r"every response of .*data\.jsonl has the weight 0"):
        encoded(tiny_tokenizer_dir, written(tmp_path, lines(chat(0, 0))), turns="all")


@pytest.mark.parametrize("weight", [-1, "1", True, float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(weight: Any, tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    path = written(tmp_path, lines(chat(None), chat(None, weight)))
    with pytest.raises(ValueError, match=r"line 2: column `messages` has a message with the weight .*at least 0"):
        encoded(tiny_tokenizer_dir, path, turns="all")


def test_weights_that_cannot_be_are_refused() -> None:
    for weights in ((), (-1.0,), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match=r"`source\.turn_weights`=.* must be numbers of at least 0"):
            TextSource(turns="all", turn_weights=weights)
    with pytest.raises(ValueError, match=r"set `source\.turns: all`, or give weights in the messages"):
        TextSource(turn_weights=(0.5, 1.0))


def weighed(weights: list[float]) -> Batch:
    given = batch()
    return given._replace(response_weights=torch.tensor(weights)[:, None].expand(given.response_mask.shape))


def loss_and_gradient(given: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    module = module_with(TERMS)
    loss, _ = training_loss(TERMS, module.distilled(given), chunk_tokens=4)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in module.student.parameters() if p.grad is not None])


def test_a_batch_without_weights_counts_every_response_once() -> None:
    mask = batch().response_mask
    assert torch.equal(token_weights(mask, response_weights=batch().response_weights), token_weights(mask))
    for ours, theirs in zip(loss_and_gradient(weighed([1.0, 1.0, 1.0])), loss_and_gradient(batch()), strict=True):
        assert torch.equal(ours, theirs)


def test_the_loss_is_the_mean_of_each_rows_loss_times_its_weight() -> None:
    weights = [2.0, 0.25, 0.75]
    rows = [loss_and_gradient(row) for row in batch().cut(1)]
    found = loss_and_gradient(weighed(weights))
    for index in range(2):
        wanted = torch.stack([weight * row[index] for weight, row in zip(weights, rows, strict=True)]).mean(dim=0)
        torch.testing.assert_close(found[index], wanted, atol=1e-6, rtol=1e-4)


def test_rows_of_weight_0_are_as_if_they_were_absent() -> None:
    """With a mean weight of 1, as in a training part."""
    found, wanted = loss_and_gradient(weighed([0.0, 0.0, 3.0])), loss_and_gradient(batch().cut(1)[2])
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_a_stored_teacher_weighs_as_a_loaded_one() -> None:
    terms: list[LossTerm] = [KL()]
    module, given = module_with(terms), weighed([2.0, 0.25, 0.75])
    rows = Rows.top_k(module.teacher.logits(module.distilled(given).teacher), 64, 1.0).packed().detach()
    stored = training_loss(stored_terms(terms, "top_k"), run_alone(module.student, given, rows))[0]
    torch.testing.assert_close(stored, training_loss(terms, module.distilled(given))[0])


def test_weights_stay_with_their_rows() -> None:
    rows = [Example(torch.tensor([5, 6]), torch.tensor([7]), 0.5), Example(torch.tensor([8]), torch.tensor([9]), 3.0)]
    given = Collator(0, mean_weight=2.0)(rows)
    assert given.response_weights.tolist() == [[0.25], [1.5]]
    assert [row.response_weights.tolist() for row in given.cut(1)] == [[[0.25]], [[1.5]]]
    assert given.with_decode().response_weights[:, 0].tolist() == [0.25, 1.5]
    assert given.on("cpu").response_weights.tolist() == [[0.25], [1.5]]


def epoch(module: PromptResponseDataModule) -> dict[str, float]:
    """Response -> weight, of one epoch of the training part."""
    module.setup()
    found = {}
    for given in module.train_dataloader():
        for ids, mask, weights in zip(given.response_ids, given.response_mask, given.response_weights, strict=True):
            (weight,) = set(weights.tolist())
            found[str(module.tokenizer.decode(ids[mask]))] = weight
    return found


@pytest.mark.parametrize("batches", ["shuffled", "by_length"])
def test_weights_of_a_training_part_have_a_mean_of_1(batches: str, tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    def module(*weights: float | None, **source: Any) -> PromptResponseDataModule:
        path = written(tmp_path, lines(*(chat(*weights, name=f"{number} ") for number in range(20))))
        settings = {"parts": Parts(repeated_training_prompts=0.25), "batches": batches, "lengths": LONG}
        made = make_module(tiny_tokenizer_dir, path, **settings)
        made.source = TextSource(path, turns="all", **source)
        return made

    found = epoch(module(None, None, turn_weights=(0.5, 1.0)))
    assert sum(found.values()) / len(found) == pytest.approx(1.0, abs=1e-6)
    assert max(found.values()) == pytest.approx(2 * min(found.values()))
    assert set(epoch(module(None, None)).values()) == {1.0}
    assert epoch(module(0.3, 0.3)) == epoch(module(None, None)), "only ratios count"


def test_sources_of_a_mixture_keep_their_weights(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    half = written(tmp_path, lines(*(chat(0.5, name=f"half {number} ") for number in range(20))), "half.jsonl")
    plain = written(tmp_path, lines(*({"prompt": f"{n}", "response": f"plain {n}"} for n in range(20))), "plain.jsonl")
    module = make_module(
        tiny_tokenizer_dir, half, lengths=LONG, mixed_in=[MixedIn(TextSource(plain), 0.5)], parts=Parts(0, 0)
    )
    found = epoch(module)
    assert {said.split()[0]: round(weight, 4) for said, weight in found.items()} == {"half": 0.6667, "plain": 1.3333}


def test_turn_weights_are_read_from_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False, parser_mode="omegaconf")
    parser.add_class_arguments(PromptResponseDataModule, "data")
    yaml = "{data: {tokenizer: x, source: {path: a.jsonl, turns: all, turn_weights: [0.5, 1]}}}"
    assert parser.instantiate(parser.parse_string(yaml)).data.source.turn_weights == (0.5, 1.0)
