"""Losses on stored rows of the teacher: equal to the dense ones, exactly or in the mean."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from test_losses import batch, module_with
from torch import Tensor

from pdtrim_pl.losses import JSD, KL, CrossEntropy, HiddenMatch, KVMatch, LossTerm, ReverseKL, TokenLoss, training_loss
from pdtrim_pl.losses.rows import Kind, Rows
from pdtrim_pl.losses.stored import run_alone, stored_terms, temperature_of

DENSE: tuple[TokenLoss, ...] = (KL(), KL(temperature=2.0), ReverseKL(), ReverseKL(temperature=0.5), JSD())


def logits(tokens: int = 6, vocabulary: int = 9, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(tokens, vocabulary, generator=draw, dtype=torch.float64) for _ in range(2))
    return student.to(dtype), teacher.to(dtype)


def stored(term: LossTerm, kind: Kind) -> TokenLoss:
    (found,) = stored_terms([term], kind)
    assert isinstance(found, TokenLoss)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("term", DENSE, ids=lambda term: f"{term.name}_{term.temperature}")
def test_a_row_of_the_whole_vocabulary_gives_the_dense_value_and_gradient(term: TokenLoss, dtype: torch.dtype) -> None:
    student, teacher = logits(dtype=dtype)
    targets = torch.zeros(6, dtype=torch.long)
    rows = Rows.top_k(teacher, 9, temperature_of([term])).packed()
    expected = TokenLoss.with_gradient(term, student, teacher, targets)
    for found in (
        stored(term, "top_k").with_gradient(student, rows, targets),
        TokenLoss.with_gradient(stored(term, "top_k"), student, rows, targets),
    ):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("term", DENSE, ids=lambda term: f"{term.name}_{term.temperature}")
def test_the_tail_counts_as_one_token_whose_probability_is_the_exact_rest(term: TokenLoss) -> None:
    student, teacher = logits()
    heat, kept = temperature_of([term]), 3
    rows = Rows.top_k(teacher, kept, heat)

    def coarse(values: Tensor) -> Tensor:
        p = (values / heat).softmax(dim=-1)
        first = p.gather(-1, rows.ids.long())
        return torch.cat([first, 1 - first.sum(dim=-1, keepdim=True)], dim=-1).log() * heat

    expected = term.per_token(coarse(student), coarse(teacher), torch.zeros(6, dtype=torch.long))
    found = stored(term, "top_k").per_token(student, rows.packed(), torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(found, expected)
    assert (found <= term.per_token(student, teacher, torch.zeros(6, dtype=torch.long)) + 1e-12).all()


@pytest.mark.parametrize("kind", ["top_k", "sampled"])
@pytest.mark.parametrize("heat", [1.0, 2.0])
def test_the_closed_gradient_is_the_one_of_autograd(kind: Kind, heat: float) -> None:
    student, teacher = logits()
    rows = Rows.top_k(teacher, 3, heat) if kind == "top_k" else Rows.sampled(teacher, 5, heat, exponent=0.7)
    loss, targets = stored(KL(temperature=heat), kind), torch.zeros(6, dtype=torch.long)
    found = loss.with_gradient(student, rows.packed(), targets)
    for ours, theirs in zip(found, TokenLoss.with_gradient(loss, student, rows.packed(), targets), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("exponent", [1.0, 0.6, 1.3])
@pytest.mark.parametrize("heat", [1.0, 1.7])
def test_a_sample_has_the_dense_value_and_gradient_as_its_mean(
    exponent: float, heat: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pairs of draws, each with its probability: no tolerance for chance."""
    student, teacher = logits(tokens=1, vocabulary=4)
    targets, term = torch.zeros(1, dtype=torch.long), KL(temperature=heat)
    proposal = ((teacher / heat).log_softmax(-1) * exponent).softmax(-1)[0]
    value, gradient = torch.zeros(1, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)
    for pair in product(range(4), repeat=2):
        monkeypatch.setattr(torch, "multinomial", lambda *_, pair=pair, **__: torch.tensor([pair]))
        rows = Rows.sampled(teacher, 2, heat, exponent).packed()
        found = stored(term, "sampled").with_gradient(student, rows, targets)
        chance = proposal[list(pair)].prod()
        value, gradient = value + chance * found[0], gradient + chance * found[1]
    expected = term.with_gradient(student, teacher, targets)
    torch.testing.assert_close(value, expected[0])
    torch.testing.assert_close(gradient, expected[1])


def test_top_k_alone_is_biased_and_draws_are_not() -> None:
    _, teacher = logits(tokens=1, vocabulary=6)
    p = teacher.softmax(-1)[0]
    draw = torch.Generator().manual_seed(0)
    rows = Rows.sampled(teacher.expand(4000, -1), 8, exponent=0.8, generator=draw)
    mean = torch.zeros(6, dtype=torch.float64).scatter_add_(0, rows.ids.long().flatten(), rows.values.flatten()) / 4000
    torch.testing.assert_close(mean, p, atol=0.01, rtol=0)
    top = Rows.top_k(teacher, 2)
    assert top.values.exp().sum() < 0.99
    torch.testing.assert_close(top.values.exp().sum(-1) + top.extra.exp(), torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize("kept", [1, 4, 9])
def test_rows_are_the_same_after_they_were_packed(kept: int) -> None:
    rows = Rows.top_k(logits(dtype=torch.float32)[1], kept)
    again = Rows.unpacked(rows.packed())
    assert torch.equal(again.ids, rows.ids.long())
    assert torch.equal(again.values, rows.values)
    assert torch.equal(again.extra, rows.extra)


@pytest.mark.parametrize("chunk", [2, 1000])
@pytest.mark.parametrize("min_chunks", [0, 9])
def test_training_on_rows_of_the_whole_vocabulary_is_training_with_the_teacher(chunk: int, min_chunks: int) -> None:
    """Also where backward computes the logits of a chunk again, as with sharded weights."""
    terms: list[LossTerm] = [KL(temperature=1.5), JSD(0.5, temperature=1.5), CrossEntropy(0.1)]
    found = []
    for offline in (False, True):
        module = module_with(terms)
        if offline:
            with torch.no_grad():
                teacher = module.distilled(batch())
                rows = Rows.top_k(module.teacher.logits(teacher.teacher), 64, 1.5).packed()
            distilled = run_alone(module.student, batch(), rows, min_chunks)
            loss, values = training_loss(stored_terms(terms, "top_k"), distilled, chunk_tokens=chunk)
        else:
            loss, values = training_loss(terms, module.distilled(batch()), chunk_tokens=chunk)
        loss.backward()
        gradients = {name: p.grad for name, p in module.student.named_parameters() if p.grad is not None}
        found.append((loss.detach(), values, gradients))
    torch.testing.assert_close(found[1][0], found[0][0])
    torch.testing.assert_close(found[1][1], found[0][1])
    assert found[0][2].keys() == found[1][2].keys()
    for name, gradient in found[0][2].items():
        torch.testing.assert_close(found[1][2][name], gradient, atol=1e-5, rtol=1e-4)


def test_losses_that_need_more_than_rows_are_refused_together_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"hidden reads .*; kv reads .*`teacher.placement: copy`"):
        stored_terms([KL(), HiddenMatch(), KVMatch()], "top_k")
    with pytest.raises(ValueError, match=r"reverse_kl is no mean over the teacher's tokens.*`--kind top_k`"):
        stored_terms([ReverseKL()], "sampled")
    with pytest.raises(ValueError, match=r"different temperatures \(\[1.0, 2.0\]\)"):
        temperature_of([KL(), JSD(temperature=2.0)])
    assert temperature_of([CrossEntropy()]) == 1.0
