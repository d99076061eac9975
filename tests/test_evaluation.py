"""Redundancy, timing and the summary table."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial
from io import StringIO
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny_models import FAMILIES, tiny_model
from torch import Tensor, nn

from pdtrim_pl.data.collate import Batch, Collator
from pdtrim_pl.data.examples import Example
from pdtrim_pl.evaluation.mode import eval_mode
from pdtrim_pl.evaluation.quality import Quality, measure_quality
from pdtrim_pl.evaluation.recall import measure_recall, repeated_requests
from pdtrim_pl.evaluation.redundancy import block_redundancy
from pdtrim_pl.evaluation.summary import COLUMNS, TEXT_WIDTH, Summary, human_bytes, summarise
from pdtrim_pl.evaluation.timing import StageTimes, Timing, measure_timing
from pdtrim_pl.plan import STAGES, Boundary, KVRetentionPolicy, Retention, StagePlan, handled_positions
from pdtrim_pl.staged import StagedCausalLM

LENGTHS = [(9, 4), (5, 2), (3, 8)]


def rows_to_batch(lengths: list[tuple[int, int]]) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = [[torch.randint(3, 64, (n,), generator=generator) for n in row] for row in lengths]
    return Collator(pad_id=0)([Example(prompt, response) for prompt, response in ids])


def _split_cosine(
    cosines: dict[str, list[list[Tensor]]],
    block: int,
    tokens: int,
    _: nn.Module,
    inputs: tuple[Tensor, ...],
    out: Tensor,
) -> None:
    cosine = nn.functional.cosine_similarity(inputs[0][0], out[0], dim=-1)
    cosines["prefill"][block].append(cosine[:tokens])
    cosines["decode"][block].append(cosine[tokens:-1])


@torch.no_grad()
def naive_redundancy(family: str, batch: Batch, boundary: Boundary) -> dict[str, list[float]]:
    """Hooks on the blocks of the plain model, row by row, without padding."""
    model = tiny_model(family)
    cosines: dict[str, list[list[Tensor]]] = {stage: [[] for _ in model.base_model.layers] for stage in STAGES}
    for prompt, seen, response, real in zip(*batch[:4], strict=True):
        tokens = handled_positions(int(seen.sum()), boundary)

        hooks = [
            block.register_forward_hook(partial(_split_cosine, cosines, index, tokens))
            for index, block in enumerate(model.base_model.layers)
        ]
        model(torch.cat([prompt[seen], response[real]])[None])
        for hook in hooks:
            hook.remove()
    return {stage: [float(torch.cat(parts).mean()) for parts in cosines[stage]] for stage in STAGES}


@pytest.mark.parametrize("family", FAMILIES)
def test_redundancy_of_the_full_plan_equals_hooks_on_the_plain_model(family: str) -> None:
    batch, boundary = rows_to_batch(LENGTHS), STAGES[len(family) % 2]
    model = StagedCausalLM(tiny_model(family))
    model.apply_plan(replace(model.plan, boundary=boundary))
    found, expected = block_redundancy(model, [batch]), naive_redundancy(family, batch, boundary)
    for stage in STAGES:
        assert list(found[stage]) == [0, 1, 2, 3]
        assert list(found[stage].values()) == pytest.approx(expected[stage], abs=1e-5)


def test_redundancy_does_not_depend_on_how_requests_are_batched() -> None:
    model = StagedCausalLM(tiny_model("llama"))
    together = rows_to_batch(LENGTHS)
    apart = [Batch(*(tensor[i : i + 1] for tensor in together)) for i in range(len(LENGTHS))]
    one, many = block_redundancy(model, [together]), block_redundancy(model, apart)
    for stage in STAGES:
        assert one[stage] == pytest.approx(many[stage], abs=1e-5)


def test_redundancy_names_only_the_blocks_each_stage_runs() -> None:
    model = StagedCausalLM(tiny_model("llama"))
    model.apply_plan(StagePlan(model.plan.model, (0, 2, 3), (1, 3), "free"))
    found = block_redundancy(model, [rows_to_batch(LENGTHS)])
    assert {stage: list(found[stage]) for stage in STAGES} == {"prefill": [0, 2, 3], "decode": [1, 3]}


def test_redundancy_of_a_stage_without_tokens_is_empty_and_of_no_data_an_error() -> None:
    model = StagedCausalLM(tiny_model("llama"))
    found = block_redundancy(model, [rows_to_batch([(4, 1), (3, 1)])])
    assert len(found["prefill"]) == 4
    assert found["decode"] == {}
    with pytest.raises(ValueError, match="no token to measure redundancy on"):
        block_redundancy(model, [])


def test_eval_mode_gives_every_module_its_own_mode_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout())).train()
    model[1].eval()
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False, False]


def test_timing_measures_both_variants_and_leaves_the_model_as_it_was() -> None:
    model = StagedCausalLM(tiny_model("llama"))
    model.apply_plan(StagePlan(model.plan.model, (0, 3), (0,)))
    model.apply_policy(KVRetentionPolicy("prefill", model.kv_shape, {0: Retention("first_last", 1, 1)}))
    plan, policy = model.plan, model.policy
    model.train()
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    timing = measure_timing(model, prompt_tokens=24, new_tokens=3, batch_size=2, repeats=2)
    assert torch.rand(()) == expected
    assert model.training
    assert (model.plan, model.policy) == (plan, policy)
    for times in (timing.dense, timing.trimmed):
        assert times.prefill_ms > 0
        assert times.decode_ms > 0
    assert timing.prefill_speedup == timing.dense.prefill_ms / timing.trimmed.prefill_ms
    assert timing.decode_speedup == timing.dense.decode_ms / timing.trimmed.decode_ms


def test_timing_takes_turns_after_a_warm_up_and_runs_the_plans_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    model = StagedCausalLM(tiny_model("llama"))
    trimmed = StagePlan(model.plan.model, (0, 1), (1,))
    seen: list[StagePlan | None] = []
    prefill = model.prefill

    def watched(*args: Any, plan: StagePlan | None = None, **kwargs: Any) -> Any:
        seen.append(plan)
        return prefill(*args, plan=plan, **kwargs)

    monkeypatch.setattr(model, "prefill", watched)
    measure_timing(model, plan=trimmed, prompt_tokens=4, new_tokens=1, repeats=2)
    assert seen == [StagePlan.full(model.plan.model), trimmed] * 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"repeats": 0}, "`repeats` is 0"),
        ({"new_tokens": 0, "batch_size": -1}, "`new_tokens` is 0: give at least 1; `batch_size` is -1"),
        ({"prompt_tokens": 128, "new_tokens": 1}, "exceed the context of the model, 128 tokens"),
    ],
)
def test_timing_refuses_what_it_cannot_run(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_timing(StagedCausalLM(tiny_model("llama")), **wrong)


def a_summary(**changes: Any) -> Summary:
    quality = Quality(2.0, 2.0, 0.0, 1.0, 100)
    timing = Timing(((StageTimes(2.0, 30.0), StageTimes(1.0, 20.0)),), 256, 32, 1, "cpu")
    summary = Summary(
        30, 24, 20, quality, replace(quality, nll=11.0, kl=9.0, agreement=0.1), replace(quality, nll=2.3, kl=0.3),
        timing, 1024, 4096, 1024, "runs/x/export",
    )  # fmt: skip
    return replace(summary, **changes)


def test_summary_measures_teacher_drops_and_student() -> None:
    teacher, student = StagedCausalLM(tiny_model("llama")), StagedCausalLM(tiny_model("llama", seed=1))
    plan = StagePlan(student.plan.model, (0, 1, 3), (0, 3), untied={"decode": (3,)}, merged={"decode": {3: (2, 3)}})
    student.apply_plan(plan)
    policy = KVRetentionPolicy("prefill", student.kv_shape, {3: Retention("first_last", 1, 1)})
    student.apply_policy(policy)
    batches = [rows_to_batch(LENGTHS)]
    summary = summarise(student, teacher, iter(batches), kv_prompt_tokens=10, export="runs/x")
    itself = measure_quality(teacher, teacher, batches)
    assert asdict(summary.teacher) == pytest.approx(asdict(itself), abs=1e-6)
    bare = StagePlan(plan.model, plan.prefill, plan.decode)
    assert summary.dropped == measure_quality(teacher, teacher, batches, plan=bare, policy=policy)
    assert summary.distilled == measure_quality(student, teacher, batches)
    assert (summary.total_blocks, summary.prefill_blocks, summary.decode_blocks) == (4, 3, 2)
    assert summary.kv_full_bytes == 10 * 4 * student.kv_shape.bytes_per_position
    assert summary.kv_sent_bytes == (10 + 2) * student.kv_shape.bytes_per_position
    assert summary.timing is None
    half = summarise(
        student, teacher, batches, kv_prompt_tokens=10, kv_shape=replace(student.kv_shape, dtype="bfloat16")
    )
    assert 2 * half.kv_sent_bytes == summary.kv_sent_bytes


def test_an_undistilled_student_costs_what_the_drops_cost() -> None:
    teacher, student = StagedCausalLM(tiny_model("llama")), StagedCausalLM(tiny_model("llama"))
    student.apply_plan(StagePlan(student.plan.model, (0, 1, 3), (0, 3)))
    summary = summarise(student, teacher, [rows_to_batch(LENGTHS)])
    assert summary.dropped == summary.distilled


def test_summary_holds_the_figures_of_a_run() -> None:
    rows = {row.label: row for row in a_summary().rows()}
    assert rows["blocks in prefill"][1:] == ("30", "24", "24", "20% fewer")
    assert rows["response perplexity"][1:] == ("7.39", "5.99e+04", "9.97", "")
    assert rows["top-1 agreement"].dropped == "10.0%"
    assert rows["decode ms/token"][1:] == ("30.00", "", "20.00", "1.50x")
    assert rows["KV bytes, prompt of 1024"][1:] == ("4.00 KiB", "1.00 KiB", "1.00 KiB", "4.00x")


def test_summary_without_times_has_no_rows_of_times() -> None:
    labels = [row.label for row in a_summary(timing=None).rows()]
    assert not any("ms/token" in label for label in labels)
    assert len(labels) == len(a_summary().rows()) - 2


@pytest.mark.parametrize("width", [40, 80, 200])
def test_summary_prints_ascii_of_one_width_to_a_file(width: int) -> None:
    out = StringIO()
    a_summary().render_text(Console(file=out, width=width, force_terminal=False))
    lines = out.getvalue().splitlines()
    assert out.getvalue().isascii()
    assert "Export: runs/x/export" in lines
    table = [line for line in lines if line.startswith(("|", "+"))]
    assert {len(line) for line in table} == {TEXT_WIDTH}
    assert len(table) == len(a_summary().rows()) + 4


def test_summary_as_markdown_is_one_table_with_every_row() -> None:
    lines = a_summary().at("elsewhere").to_markdown().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == len(a_summary().rows()) + 2
    assert {line.count("|") for line in table} == {len(COLUMNS) + 1}
    assert "- Export: elsewhere" in lines


def test_summary_as_json_is_plain_and_holds_the_derived_figures() -> None:
    data = json.loads(json.dumps(a_summary().to_json()))
    assert data["kv_reduction"] == 4.0
    assert data["timing"]["decode_speedup"] == 1.5
    assert data["teacher"]["perplexity"] == pytest.approx(7.389, abs=1e-3)
    assert a_summary(timing=None, kv_sent_bytes=0).to_json()["kv_reduction"] is None


@settings(max_examples=50)
@given(count=st.integers(0, 2**50))
def test_bytes_are_shown_with_a_unit_that_keeps_them_short(count: int) -> None:
    value, unit = human_bytes(count).split()
    factor = 1024 ** ["B", "KiB", "MiB", "GiB", "TiB"].index(unit)
    assert float(value) * factor == pytest.approx(count, rel=0.006, abs=0.5)
    assert float(value) <= 1024


def test_an_example_is_said_again_whole_and_without_padding() -> None:
    collate = Collator(pad_id=0)
    examples = [Example(torch.tensor([5, 6, 7]), torch.tensor([8])), Example(torch.tensor([9]), torch.tensor([1, 2]))]
    batches = [collate(examples), collate(examples[:1])]
    again = repeated_requests(batches, collate, 3)
    assert [row[real].tolist() for b in again for row, real in zip(b.prompt_ids, b.prompt_mask, strict=True)] == [
        [5, 6, 7, 8], [9, 1, 2], [5, 6, 7, 8],
    ]  # fmt: skip
    for batch in again:
        for prompt, response, seen, said in zip(
            batch.prompt_ids, batch.response_ids, batch.prompt_mask, batch.response_mask, strict=True
        ):
            assert prompt[seen].tolist() == response[said].tolist()
    assert [len(batch.prompt_ids) for batch in repeated_requests(batches, collate, 1)] == [1]
    assert repeated_requests(batches, collate, 0) == []
    (first, *_) = repeated_requests(batches, collate, 1, response=3)
    (whole, *_) = repeated_requests(batches, collate, 1)
    text = whole.prompt_ids[0]
    known = len(text) // 4
    assert torch.equal(first.prompt_ids[0], torch.cat([text, text[:known]]))
    assert torch.equal(first.response_ids[0], text[known : known + 3])
    for response in (None, 3):
        for batch in repeated_requests(batches, collate, 9, response, context=10):
            assert (batch.prompt_mask.sum(dim=1) + batch.response_mask.sum(dim=1)).max() <= 10
            assert batch.response_mask.sum(dim=1).min() > 0


def test_recall_is_the_share_of_tokens_that_the_plain_model_would_say() -> None:
    model, collate = tiny_model("llama"), Collator(pad_id=0)
    drawn = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 64, (length,), generator=drawn) for length in (9, 14, 5)]
    batches = [collate([Example(text, text) for text in texts[:2]]), collate([Example(texts[2], texts[2])])]
    says = [model(torch.cat([text, text])[None]).logits[0].argmax(dim=-1)[len(text) - 1 : -1] for text in texts]
    right = sum(int((said == text).sum()) for said, text in zip(says, texts, strict=True))
    assert measure_recall(StagedCausalLM(model), batches, chunk_tokens=4) == right / 28
