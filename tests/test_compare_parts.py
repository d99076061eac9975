"""The parts of a comparison: budget, schedule, meter, judge, and the two searches that only a comparison has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from pdtrim_pl.compare.bench import Bench
from pdtrim_pl.compare.found import Found
from pdtrim_pl.compare.judge import Judge
from pdtrim_pl.compare.ledger import Ledger
from pdtrim_pl.compare.meter import Meter, Spent
from pdtrim_pl.compare.methods import Annealed, Distilled, Drop, ReplaceSpan
from pdtrim_pl.compare.methods.streamline import most_alike
from pdtrim_pl.compare.settings import Measures, Rows, Subject, Training
from pdtrim_pl.compare.texts import Texts, read_texts
from pdtrim_pl.criteria import CosineRedundancy, Criterion, GreedyKL, LastN, ResponsePerplexity, Taylor
from pdtrim_pl.data import Lengths, Parts, PromptResponseDataModule, TextSource
from pdtrim_pl.evaluation.quality import measure_quality
from pdtrim_pl.evaluation.recall import measure_recall, repeated_requests
from pdtrim_pl.merging import Merging
from pdtrim_pl.models.pretrained import load_tokenizer
from pdtrim_pl.plan import STAGES
from pdtrim_pl.search import Annealing, Guards
from pdtrim_pl.staged import Request, StagedCausalLM
from pdtrim_pl.strategies.layer_rates import LayerRates

NO_GUARDS = Guards(0, 0)


def text(folder: Path, word: str) -> TextSource:
    """A text of some seventy windows."""
    file = folder / f"{word}.txt"
    file.write_text(" ".join(f"{word} {number} says {number**3 % 101}." for number in range(60)))
    return TextSource(path=str(file))


def data(model: Path, source: TextSource, test: int | float = 4) -> PromptResponseDataModule:
    lengths = Lengths(max_length=24, min_prompt=8, max_prompt=16)
    parts = Parts(validation=0, calibration=4, test=test, max_train=10)
    return PromptResponseDataModule(str(model), source, lengths, parts, batch_size=2)


@pytest.fixture(scope="module")
def texts(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Texts:
    return read_texts(data(tiny_llama_dir, text(tmp_path_factory.mktemp("text"), "Line")), None)


@pytest.fixture
def bench(tiny_llama_dir: Path, texts: Texts, tmp_path: Path) -> Iterator[Bench]:
    """A bench over the tiny model, metering."""
    subject = Subject(str(tiny_llama_dir), dtype="float32", accelerator="cpu")
    training = Training(tokens=300, batch_size=4, precision="32-true")
    made = Bench(subject, texts, training, NO_GUARDS, texts.request(), tmp_path)
    with made.row(tmp_path / "journal.jsonl", lambda spent: None):
        yield made


def changed_model(bench: Bench) -> StagedCausalLM:
    student = bench.student(Found(bench.full("nested").drop("both", 1)))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return student


@given(st.integers(100, 2000), st.integers(1, 7))
@settings(max_examples=30)
def test_training_batches_fill_the_budget_to_the_last_whole_batch(texts: Texts, tokens: int, size: int) -> None:
    if tokens < size * 24:
        with pytest.raises(ValueError, match=r"leaves .* tokens for one training, less than one batch"):
            texts.training_batches(tokens, size)
        return
    batches, seen = texts.training_batches(tokens, size)
    counted = [int(batch.prompt_mask.sum() + batch.response_mask.sum()) for batch in batches]
    assert seen == sum(counted) <= tokens
    assert tokens - seen < size * 24, "another batch would have fitted"
    more, _ = texts.training_batches(tokens + size * 24, size)
    assert all(torch.equal(a.prompt_ids, b.prompt_ids) for a, b in zip(batches, more, strict=False))


def test_every_epoch_of_training_text_is_shuffled_anew_and_holds_each_example_once(texts: Texts) -> None:
    batches, _ = texts.training_batches(2 * 10 * 24, 1)
    rows = [tuple(torch.cat([batch.prompt_ids[0], batch.response_ids[0]]).tolist()) for batch in batches]
    first, second = rows[:10], rows[10:20]
    assert set(first) == set(second)
    assert len(set(first)) == 10
    assert first != second


def test_the_three_texts_share_no_example(tiny_llama_dir: Path, tmp_path: Path) -> None:
    for held_out in (None, text(tmp_path, "Verse")):
        found = read_texts(data(tiny_llama_dir, text(tmp_path, "Line")), held_out)
        train, _ = found.training_batches(10 * 24, 1)
        parts = [found.calibration, found.held_out, train]
        seen = [
            {
                tuple(torch.cat([prompt[real], response]).tolist())
                for batch in part
                for prompt, real, response in zip(batch.prompt_ids, batch.prompt_mask, batch.response_ids, strict=True)
            }
            for part in parts
        ]
        assert [len(examples) for examples in seen] == [4, 4, 10]
        assert len(seen[0] | seen[1] | seen[2]) == 18


def test_a_share_of_another_source_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`data.parts.test` is 0.5: with `measures.held_out` give a number"):
        read_texts(data(tiny_llama_dir, text(tmp_path, "Line"), test=0.5), text(tmp_path, "Verse"))


def test_the_learning_rate_rises_and_falls_to_zero_on_a_cosine() -> None:
    training = Training(warmup=0.2)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = training.schedule(optimizer, 20, 0.5)
    rates = []
    for _ in range(20):
        rates.append(2 * optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[12] == pytest.approx(0.5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


@pytest.mark.parametrize("criterion", [GreedyKL(), ResponsePerplexity()], ids=lambda criterion: criterion.name)
def test_the_meter_counts_what_the_evaluator_counts(bench: Bench, criterion: GreedyKL | ResponsePerplexity) -> None:
    student = bench.student(Found(bench.full("unified")))
    context = bench.context(student)
    scored = criterion.score(context, student.plan, "both", (0, 1, 2, 3))
    assert scored
    passes = one_pass(bench) if "redundancy" in vars(context) else 0
    assert bench._meter.spent.block_tokens == context.evaluator.block_tokens + passes


@pytest.mark.parametrize(("criterion", "passes"), [(CosineRedundancy(), 1), (Taylor(), 3)])
def test_a_backward_pass_counts_as_two_forward_ones(bench: Bench, criterion: Criterion, passes: int) -> None:
    student = bench.student(Found(bench.full("unified")))
    criterion.score(bench.context(student), student.plan, "both", (0, 1, 2, 3))
    assert bench._meter.spent.block_tokens == passes * one_pass(bench)


def one_pass(bench: Bench) -> int:
    """Tokens of the calibration set times blocks."""
    requests = [Request.of(*batch.request, "prefill") for batch in bench.texts.calibration]
    return 4 * sum(int(valid.sum()) for request in requests for valid in request.valid.values())


def test_nothing_is_counted_while_the_meter_is_paused() -> None:
    meter = Meter()
    with meter.running(), meter.paused():
        pass
    assert meter.spent.seconds < 1.0
    meter.add(Spent(100.0, 7))
    assert meter.spent.seconds == pytest.approx(100.0, abs=1.0)
    assert meter.spent.block_tokens == 7
    stopped = meter.spent
    assert meter.spent == stopped, "time stands still outside"


def test_the_judge_measures_what_measure_quality_measures(bench: Bench) -> None:
    student = changed_model(bench)
    judge = Judge(bench, Measures(), load_tokenizer(bench.subject.name))
    expected = measure_quality(student, bench.teacher, bench.texts.held_out)
    judged = [judge.judge(student) for _ in range(2)]
    assert judged[0] == judged[1]
    assert (judged[0].nll, judged[0].dense_nll, judged[0].kl, judged[0].agreement) == pytest.approx(
        (expected.nll, expected.teacher_nll, expected.kl, expected.agreement)
    )
    assert judge.accuracy(student) == {}
    looking = Judge(bench, Measures(recall=3), load_tokenizer(bench.subject.name))
    again = repeated_requests(bench.texts.held_out, bench.texts.collate, 3)
    assert looking.accuracy(student) == {"recall": measure_recall(student, again)}


def test_changed_weights_are_all_that_is_needed_to_make_a_student_again(bench: Bench) -> None:
    student = changed_model(bench)
    again = bench.student(Found(student.plan, None, bench.changed(student)))
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))
    untouched = bench.student(Found(student.plan))
    assert bench.changed(untouched) == {}


def test_the_span_chosen_is_the_one_whose_input_and_output_are_most_alike(bench: Bench) -> None:
    student = bench.student(Found(bench.full("unified")))
    for count in (1, 2):
        sums: dict[int, float] = dict.fromkeys(range(4 - count), 0.0)
        tokens = 0
        for batch in bench.texts.calibration:
            request = Request.of(*batch.request, "prefill")
            seen: dict[str, dict[int, list[torch.Tensor]]] = {stage: {} for stage in STAGES}

            def keep(stage: str, into: dict[str, dict[int, list[torch.Tensor]]] = seen):  # type: ignore[no-untyped-def]
                return lambda block, before, after: into[stage].update({block: [before, after]})

            with torch.no_grad():
                student(*batch.request, observers={stage: keep(stage) for stage in STAGES})
            for stage in STAGES:
                tokens += int(request.valid[stage].sum())
                for first in sums:
                    pair = seen[stage][first][0], seen[stage][first + count][1]
                    sums[first] += float(F.cosine_similarity(*pair, dim=-1)[request.valid[stage]].sum())
        best = max(sums, key=lambda first: sums[first])
        span, score = most_alike(bench, student, count)
        assert span == tuple(range(best, best + count + 1))
        assert score == pytest.approx(1 - sums[best] / tokens)


def test_a_replaced_span_is_trained_on_the_budget_and_only_its_block_changes(bench: Bench) -> None:
    found = ReplaceSpan().find(bench, None, 2)
    (into, run), *others = found.plan.merged["prefill"].items()
    assert not others
    assert len(run) == 3
    assert found.plan.merged["decode"] == found.plan.merged["prefill"]
    assert found.trained_tokens == bench.training.tokens // 24 * 24
    assert {name.split(".block.")[0] for name in found.weights} == {f"model.model.layers.{into}"}


def test_blocks_behind_a_replaced_span_change_with_it_where_there_are_some(bench: Bench) -> None:
    found = ReplaceSpan(trailing_blocks=2).find(bench, None, 1)
    ((into, run),) = found.plan.merged["prefill"].items()
    changed = {int(name.split(".block.")[0].rsplit(".", 1)[1]) for name in found.weights}
    assert changed == {into, *range(run[-1] + 1, min(run[-1] + 3, 4))}
    with pytest.raises(ValueError, match=r"`trailing_blocks` is -1: give a number of blocks, 0 for none"):
        ReplaceSpan(trailing_blocks=-1)


def test_of_all_spans_tried_the_one_that_leaves_the_least_kl_is_replaced(bench: Bench) -> None:
    method = ReplaceSpan(screening_share=0.5)
    chosen = method.find(bench, None, 1)
    plan, kl = bench.full("unified"), {}
    batches, _ = bench.texts.training_batches(bench.training.tokens // 2, 1)
    brief = Merging(min_cosine=-1.0, steps=len(batches), learning_rate=method.learning_rate)
    for span in [(1, 2)], [(2, 3)], [(0, 1)]:
        student = bench.student(Found(plan))
        fitted = bench.fit(student, batches, span, brief)
        student.offer(fitted.runs)
        student.apply_plan(fitted.runs[0].move.apply(plan, untied=False))
        kl[span[0]] = measure_quality(student, bench.teacher, bench.texts.calibration).kl
    assert list(chosen.plan.merged["decode"].values()) == [min(kl, key=kl.__getitem__)]
    step = chosen.plan.history[-1]
    assert (step.criterion, step.score) == ("fitted_kl", pytest.approx(min(kl.values()), rel=1e-3))
    with pytest.raises(ValueError, match=r"`screening_share` is 0.6: give a share of the token budget, at least 0"):
        ReplaceSpan(share=0.5, screening_share=0.6)


def test_a_share_of_the_budget_leaves_the_rest_to_distillation(bench: Bench) -> None:
    part = ReplaceSpan(share=0.5).find(bench, None, 2)
    assert 0 < part.trained_tokens <= bench.training.tokens * 0.5
    whole = Distilled("span").find(bench, part, 2)
    assert part.trained_tokens < whole.trained_tokens <= bench.training.tokens
    assert whole.plan == part.plan
    with pytest.raises(ValueError, match=r"`share` is 0: give a share of the token budget, above 0 and at most 1"):
        ReplaceSpan(share=0)
    slower = Distilled("span", rate=0.1).find(bench, part, 2)
    assert slower.trained_tokens == whole.trained_tokens
    moved = [
        sum(float((found.weights[name].float() - part.weights[name].float()).abs().sum()) for name in part.weights)
        for found in (whole, slower)
    ]
    assert 0 < moved[1] < 0.5 * moved[0]
    with pytest.raises(ValueError, match=r"`rate` is 0: give a positive factor of the learning rate"):
        Distilled("span", rate=0)


def test_rates_may_fall_with_the_distance_from_what_left(bench: Bench) -> None:
    start = Found(bench.full("nested").drop("decode", 3).drop("prefill", 3))
    before = dict(bench.student(start).named_parameters())

    def moved(rates: LayerRates | None) -> set[str]:
        after = Distilled("start", layer_rates=rates).find(bench, start, 1).weights
        return {name for name, weight in after.items() if not torch.equal(weight, before[name])}

    everything, near = moved(None), moved(LayerRates(decay=1e-12, floor=0.0))
    assert near == {
        name for name in everything if "embed" not in name and ".layers.0." not in name and ".layers.1." not in name
    }
    assert near < everything


def test_keys_and_values_of_dropped_blocks_are_refitted_within_the_budget(bench: Bench) -> None:
    settings: Any = {"relation": "prefill_only", "target": "prefill", "boundary": "decode", "guards": NO_GUARDS}
    plain, made_good = Drop(LastN(), **settings), Drop(LastN(), refit_tokens=200, **settings)
    assert (plain.trains, made_good.trains) == (False, True)
    found = {method: method.find(bench, None, 2) for method in (plain, made_good)}
    assert [one.plan.prefill for one in found.values()] == [(0, 1), (0, 1)], "the last block too"
    assert (found[plain].trained_tokens, found[plain].plan.untied["prefill"]) == (0, ())
    assert 100 < found[made_good].trained_tokens <= 200
    assert found[made_good].plan.untied["prefill"] == (3,), "block 2 reads what it always did"
    changed = {name for name, x in found[made_good].weights.items() if not torch.equal(x, shared_weight(bench, name))}
    assert {name.split(".untied.prefill.")[1] for name in changed} == {
        "self_attn.k_proj.weight", "self_attn.v_proj.weight"
    }  # fmt: skip


def test_where_prefill_alone_loses_nothing_there_are_no_keys_and_values_to_refit() -> None:
    for relation, target in (("nested", "prefill"), ("free", "decode"), ("unified", "both")):
        settings: Any = {"relation": relation, "target": target}
        with pytest.raises(ValueError, match=r"`refit_tokens: 8` refits keys and values of blocks that prefill alone"):
            Drop(LastN(), refit_tokens=8, **settings)


def shared_weight(bench: Bench, name: str) -> torch.Tensor:
    """The teacher's weight of which a stage has its own."""
    return bench.teacher.get_parameter(name.replace("untied.prefill", "block"))


def test_annealing_with_merges_ends_no_worse_than_its_start(bench: Bench) -> None:
    start = Drop(LastN(), "nested").find(bench, None, 2)
    brief = Annealing(evaluations=6, temperature=0.5)
    annealed = Annealed("last_n", brief).find(bench, start, 2)
    merged = Annealed("last_n", brief, Merging(min_cosine=-1.0, steps=2)).find(bench, annealed, 2)
    energies = []
    for found in (start, annealed, merged):
        student = bench.student(found)
        energies.append(measure_quality(student, bench.teacher, bench.texts.calibration).kl)
        assert found.plan.prefill == found.plan.decode
        assert len(found.plan.removed("prefill")) == 2
    assert energies[0] >= energies[1] - 1e-6
    assert energies[1] >= energies[2] - 1e-6


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"`model.accelerator` is gpu, and torch sees none"):
        _ = Subject("any", accelerator="gpu").device


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`rows.counts` is \[0\]"):
        Rows(counts=(0,))
    with pytest.raises(ValueError, match=r"`measures.limit` is 0"):
        Measures(limit=0)
    with pytest.raises(ValueError, match=r"`measures.recall` is -1: give a number of examples, or 0"):
        Measures(recall=-1)
    with pytest.raises(ValueError, match=r"`measures.tasks` names a task recall, which is a column already"):
        Measures(tasks=("recall",))
    with pytest.raises(ValueError, match=r"`warmup` in \[0, 1\)"):
        Training(warmup=1.0)


def test_a_killed_rows_cost_and_journal_are_kept_for_the_same_settings_alone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for key, kept in (("same", True), ("other", False)):
        ledger.note_spent("nested", 3, "same", Spent(2.5, 7))
        ledger.journal("nested", 3).touch()
        assert ledger.spent_before("nested", 3, key) == (Spent(2.5, 7) if kept else Spent())
        assert ledger.journal("nested", 3).is_file() is kept
    assert ledger.spent_before("sleb", 3, "same") == Spent()
