"""Criteria and the evaluator: the fast evaluation equals the naive one, and choices are the best ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import plans
from tiny_models import tiny_model

from pdtrim_pl.criteria import CosineRedundancy, GreedyKL, LastN, Random, ResponsePerplexity, ScoringContext, Taylor
from pdtrim_pl.data.collate import Batch
from pdtrim_pl.evaluation.evaluator import Evaluator, SearchMemory
from pdtrim_pl.evaluation.fingerprint import _total
from pdtrim_pl.evaluation.neighbours import WIDEST
from pdtrim_pl.evaluation.quality import measure_quality
from pdtrim_pl.evaluation.tokens import CHUNK_TOKENS
from pdtrim_pl.plan import StagePlan
from pdtrim_pl.search import Guards, choose_drops
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.gate import current_pass


def batches(seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    out = []
    for rows, prompt, response in ((3, 9, 6), (2, 5, 8)):
        ids = torch.randint(3, 64, (rows, prompt + response), generator=generator)
        prompt_mask, response_mask = torch.ones(rows, prompt).bool(), torch.ones(rows, response).bool()
        prompt_mask[0, :2] = False
        response_mask[1, -3:] = False
        out.append(Batch(ids[:, :prompt], prompt_mask, ids[:, prompt:], response_mask))
    return out


@pytest.fixture(scope="module")
def pair() -> tuple[StagedCausalLM, StagedCausalLM]:
    student = StagedCausalLM(tiny_model("llama", blocks=5))
    with torch.no_grad():  # a student that is no longer its teacher
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return student.eval(), StagedCausalLM(tiny_model("llama", blocks=5)).eval()


def same_plans(data: st.DataObject, student: StagedCausalLM) -> list[StagePlan]:
    """Random plans without weights of their own, at one boundary, as a search would ask for them."""
    from dataclasses import replace

    drawn = data.draw(st.lists(plans(5, model=student.plan.model), min_size=1, max_size=4))
    return [replace(plan, boundary=drawn[0].boundary, merged={}, untied={}) for plan in drawn]


@settings(max_examples=25)
@given(st.data(), st.sampled_from([None, 25_000, 40_000, 60_000]))
def test_the_evaluator_equals_a_naive_evaluation_whatever_it_kept_before(
    pair: tuple[StagedCausalLM, StagedCausalLM], data: st.DataObject, cache_bytes: int | None
) -> None:
    student, teacher = pair
    base, *asked = same_plans(data, student)
    little = SearchMemory(base=0, teacher=0)
    memory = SearchMemory() if cache_bytes is None else SearchMemory(cache_bytes, teacher=cache_bytes // 10)
    fast = Evaluator(student, teacher, batches(), memory=memory)
    bare = Evaluator(student, teacher, batches(), memory=little)
    assert fast.neighbours.kept == (1 if cache_bytes == 25_000 else 2)
    assert bare.neighbours.kept == 0
    assert [bare.reference.distributions(index) for index in range(2)] == [None, None]
    fast.rebase(base)
    bare.rebase(base)
    for plan in (base, *asked):
        naive = measure_quality(student, teacher, batches(), plan=plan).kl
        assert fast.energy_below(plan, naive - 1e-3) is None
        assert fast.energy_below(plan, naive + 1e-3) == pytest.approx(naive, abs=1e-6)
        assert fast.energy(plan) == pytest.approx(naive, abs=1e-6)
        assert bare.energy(plan) == pytest.approx(naive, abs=1e-6)


def test_little_memory_keeps_fewer_places_to_start_from(pair: tuple[StagedCausalLM, StagedCausalLM]) -> None:
    sizes = (40_000, 60_000, 10**9)
    strides = [Evaluator(*pair, batches(), memory=SearchMemory(size)).neighbours.stride for size in sizes]
    assert WIDEST >= strides[0] > strides[1] > strides[2] == 1


def test_where_memory_is_too_little_for_all_batches_some_are_kept(
    pair: tuple[StagedCausalLM, StagedCausalLM], caplog: pytest.LogCaptureFixture
) -> None:
    spent = {}
    for size in (0, 25_000, 10**9):
        evaluator = Evaluator(*pair, batches(), memory=SearchMemory(size))
        evaluator.rebase(pair[0].plan)
        for block in range(1, 5):
            evaluator.energy(pair[0].plan.drop("decode", block))
        spent[size] = evaluator.block_tokens
    assert spent[0] > spent[25_000] > spent[10**9]
    kept = [record.getMessage() for record in caplog.records]
    assert [line[:68] for line in kept] == [
        "What candidates have in common is kept for 0 of 2 calibration batche",
        "What candidates have in common is kept for 1 of 2 calibration batche",
    ]


def test_the_search_is_the_same_whatever_the_number_of_threads(pair: tuple[StagedCausalLM, StagedCausalLM]) -> None:
    many = torch.randn(2**22 + 5, generator=torch.Generator().manual_seed(0))
    threads, totals = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            totals.add(_total(many))
    finally:
        torch.set_num_threads(threads)
    assert len(totals) == 1
    many[7] += 1e-6
    assert _total(many) not in totals


def test_prompts_run_once_while_only_decode_changes(
    pair: tuple[StagedCausalLM, StagedCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = pair
    evaluator = Evaluator(student, teacher, batches())
    calls = []
    run = student.prefill
    monkeypatch.setattr(student, "prefill", lambda *args, **kwargs: (calls.append(1), run(*args, **kwargs))[1])
    full = student.plan
    evaluator.rebase(full)
    for plan in (full.drop("decode", 1), full.drop("decode", 2), full.drop("decode", 2).drop("decode", 3)):
        evaluator.energy(plan)
    assert len(calls) == len(batches())
    evaluator.energy(full.drop("both", 1))
    assert len(calls) == 2 * len(batches())


def test_a_neighbour_costs_only_the_blocks_from_where_it_differs(pair: tuple[StagedCausalLM, StagedCausalLM]) -> None:
    student, teacher = pair
    evaluator = Evaluator(student, teacher, batches())
    evaluator.rebase(student.plan)
    assert evaluator.block_tokens == 0, "nothing has been asked for yet"
    evaluator.energy(student.plan.drop("decode", 2))
    before = evaluator.block_tokens
    evaluator.energy(student.plan.drop("decode", 3))
    fed = sum(int(batch.response_mask[:, 1:].sum()) for batch in batches())
    assert evaluator.block_tokens - before == fed * 1, "decode without block 3, from block 3 on: block 4 alone"


def test_greedy_takes_the_drop_of_least_energy_each_time(pair: tuple[StagedCausalLM, StagedCausalLM]) -> None:
    student, teacher = pair
    context = ScoringContext(student, teacher, batches())
    plan = choose_drops(GreedyKL(), context, student.plan, "decode", 2, guards=Guards(0, 0))
    expected = student.plan
    for _ in range(2):
        trials = {block: expected.drop("decode", block) for block in expected.decode}
        energies = {b: measure_quality(student, teacher, batches(), plan=t).kl for b, t in trials.items()}
        expected = trials[min(energies, key=lambda block: energies[block])]
    assert plan.decode == expected.decode
    assert [entry.criterion for entry in plan.history] == ["greedy_kl"] * 2


def test_a_pool_scores_only_the_most_redundant(pair: tuple[StagedCausalLM, StagedCausalLM]) -> None:
    student, teacher = pair
    context = ScoringContext(student, teacher, batches())
    every = CosineRedundancy().score(context, student.plan, "decode", range(5))
    scored = GreedyKL(pool=2).score(context, student.plan, "decode", range(5))
    assert set(scored) < set(sorted(every, key=lambda block: every[block])[:2])
    with pytest.raises(ValueError, match=r"`pool` is 0"):
        GreedyKL(pool=0)


def test_cosine_of_a_drop_from_both_stages_is_the_mean_over_both(pair: tuple[StagedCausalLM, StagedCausalLM]) -> None:
    student, teacher = pair
    context = ScoringContext(student, teacher, batches())
    redundancy = context.redundancy
    both = CosineRedundancy().score(context, student.plan, "both", [2])[2]
    assert both == pytest.approx(1 - (redundancy["prefill"][2] + redundancy["decode"][2]) / 2)


def test_perplexity_takes_the_block_without_which_the_nll_is_least(pair: tuple[StagedCausalLM, StagedCausalLM]) -> None:
    student, teacher = pair
    context = ScoringContext(student, teacher, batches())
    scores = ResponsePerplexity().score(context, student.plan, "decode", range(5))
    trials = {block: student.plan.drop("decode", block) for block in range(5)}
    naive = {b: measure_quality(student, teacher, batches(), plan=plan).nll for b, plan in trials.items()}
    best = min(naive, key=lambda block: naive[block])
    assert scores == {best: pytest.approx(naive[best], abs=1e-6)}


@pytest.mark.parametrize("target", ["prefill", "decode", "both"])
def test_taylor_is_the_first_order_change_of_the_loss(pair: tuple[StagedCausalLM, StagedCausalLM], target: str) -> None:
    """Against a finite difference: scale what the block adds by 1 - e in the named stages."""
    student, teacher = pair
    free = StagePlan.full(student.plan.model, "free")
    batch, step = batches()[0], 1e-3
    tokens = int(batch.response_mask.sum())
    harm = 0.0
    for example in batch.cut(1):
        losses = []
        for scale in (1 + step, 1 - step):
            handle = _scaled(student, 2, scale, target)
            losses.append(measure_quality(student, teacher, [example], plan=free).nll)
            handle()
        harm += abs(losses[0] - losses[1]) / (2 * step) * int(example.response_mask.sum()) / tokens
    for parts in ([batch], batch.cut(1)):
        score = Taylor().score(ScoringContext(student, teacher, parts), free, target, [2])[2]  # type: ignore[arg-type]
        assert score == pytest.approx(harm, rel=0.05, abs=1e-4), "whatever the batches"


def test_taylor_makes_logits_chunk_by_chunk_and_keeps_none_for_backward(
    pair: tuple[StagedCausalLM, StagedCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = pair
    batch = Batch(*(torch.cat([part] * 20) for part in batches()[0]))
    vocabulary, head, rows, kept = student.model.config.vocab_size, student.logits, list[int](), list[torch.Tensor]()

    def counted(hidden: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        return head(hidden)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-1:] == (vocabulary,):
            kept.append(tensor)
        return tensor

    monkeypatch.setattr(student, "logits", counted)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        Taylor().score(ScoringContext(student, teacher, [batch]), student.plan, "both", [2])
    tokens = int(batch.response_mask.sum())
    assert tokens > 2 * CHUNK_TOKENS
    assert max(rows) == CHUNK_TOKENS
    assert sum(rows) == 2 * tokens, "once for the loss, once more for its gradient"
    assert not kept


def _scaled(student: StagedCausalLM, block: int, scale: float, target: str) -> Callable[[], None]:
    """Make a gate add `scale` times what its block adds, in the target's stages; returns how to undo it."""

    def hook(_: object, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
        stage = current_pass().stage
        return args[0] + scale * (out - args[0]) if target in (stage, "both") else out

    return student.gates[block].register_forward_hook(hook).remove


def test_choices_without_data_are_what_they_say(pair: tuple[StagedCausalLM, StagedCausalLM]) -> None:
    student, teacher = pair
    context = ScoringContext(student, teacher, batches())
    assert choose_drops(LastN(), context, student.plan, "decode", 2).decode == (0, 1, 4)
    once, again, other = (
        choose_drops(Random(seed), context, student.plan, "decode", 2, guards=Guards(0, 0)) for seed in (3, 3, 4)
    )
    assert once == again
    assert once.decode != other.decode


def test_an_empty_calibration_set_is_refused(pair: tuple[StagedCausalLM, StagedCausalLM]) -> None:
    with pytest.raises(ValueError, match=r"calibration set has no response token"):
        Evaluator(*pair, [])
