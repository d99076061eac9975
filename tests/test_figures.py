"""Figures of a pair beside the dense model: standard errors, paired differences, and the measures of generation."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from shutil import copytree
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pdtrim_pl.cli.main import main
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.recall import lost_recall
from pdtrim_pl.export import export_pair
from pdtrim_pl.export.measurements import BENCH_FILE, END, EVALUATION_FILE, START, refresh_report, save_measurement
from pdtrim_pl.harness.figures import Documents, Scored, compared, standard_error, table
from pdtrim_pl.harness.in_process import InProcessPair
from pdtrim_pl.harness.measures import FOLLOW_UP, PASSAGE, Measures, MeasureSettings
from pdtrim_pl.models.pretrained import load_causal_lm
from pdtrim_pl.plan import Codec, KVRetentionPolicy, Retention, StagePlan
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.description import kv_shape_of, reference_to

SHARES = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=30)
WEIGHTED = st.lists(st.tuples(st.floats(-9, -0.1), st.integers(1, 9)), min_size=3, max_size=30)


def documents(values: list[float], form: Any = "mean") -> Documents:
    return Documents({str(at): (value, 1.0) for at, value in enumerate(values)}, form)


@given(SHARES)
def test_errors_of_means_and_of_paired_differences_are_the_usual_ones(answers: list[tuple[bool, bool]]) -> None:
    own, dense = ([float(pair[at]) for pair in answers] for at in (0, 1))
    figure = compared(
        Scored.of("t", "acc", "choice", documents(own)), Scored.of("t", "acc", "choice", documents(dense))
    )
    root = math.sqrt(len(answers))
    assert (figure.value, figure.dense) == pytest.approx((fmean(own), fmean(dense)))
    assert figure.stderr == pytest.approx(stdev(own) / root, abs=1e-12)
    assert figure.difference == pytest.approx(fmean(own) - fmean(dense))
    assert figure.difference_stderr == pytest.approx(
        stdev([a - b for a, b in zip(own, dense, strict=True)]) / root, abs=1e-12
    )


@given(WEIGHTED)
def test_the_influence_of_a_document_is_the_slope_of_the_figure_in_its_weight(values: list[tuple[float, int]]) -> None:
    for form in ("mean", "perplexity", "bits"):
        pairs = {str(at): (a, float(b)) for at, (a, b) in enumerate(values)}
        whole = Documents(pairs, form)  # type: ignore[arg-type]
        influences = whole.influences()
        assert sum(influences.values()) == pytest.approx(0.0, abs=1e-6 * max(1.0, whole.value) * len(values))
        a, b = pairs["0"]
        step = 1e-6
        moved = Documents({**pairs, "0": (a * (1 + step), b * (1 + step))}, form)  # type: ignore[arg-type]
        slope = (moved.value - whole.value) / step * len(values)
        assert slope == pytest.approx(influences["0"], rel=1e-2, abs=1e-3 * max(1.0, whole.value))


def test_the_error_of_a_perplexity_is_relative_to_it() -> None:
    logs = [-1.0, -2.0, -4.0, -1.5]
    score = Scored.of("lambada", "perplexity", "likelihood", documents(logs, "perplexity"), higher_is_better=False)
    assert score.value == pytest.approx(math.exp(-fmean(logs)))
    assert score.stderr == pytest.approx(score.value * stdev(logs) / 2)
    worse = Scored.of(
        "lambada", "perplexity", "likelihood", documents([log - 0.1 for log in logs], "perplexity"),
        higher_is_better=False,
    )  # fmt: skip
    figure = compared(worse, score)
    assert figure.kept == pytest.approx(math.exp(-0.1))
    assert figure.kept_stderr == pytest.approx(0.0, abs=1e-12)  # each document lost the same


def test_one_document_has_no_error_and_nothing_no_share() -> None:
    one = Scored.of("t", "acc", "choice", documents([0.0]))
    figure = compared(one, one)
    assert (figure.stderr, figure.difference_stderr, figure.kept) == (None, None, None)
    assert standard_error({"a": 1.0}) is None
    with pytest.raises(UserError, match="answered different documents of t"):
        compared(one, Scored.of("t", "acc", "choice", Documents({"other": (1.0, 1.0)})))


def test_a_figure_that_is_no_ratio_keeps_the_error_of_the_harness() -> None:
    figure = compared(Scored("t", "f1", "choice", True, 0.5, 0.1), Scored("t", "f1", "choice", True, 0.8, 0.2))
    assert (figure.stderr, figure.dense_stderr, figure.difference_stderr) == (0.1, 0.2, None)
    assert figure.kept == pytest.approx(0.625)


def test_generation_comes_first_in_the_table() -> None:
    kinds = ("text", "choice", "measure", "likelihood", "generation")
    figures = [compared(score, score) for score in (Scored(kind, "x", kind, True, 0.5, None) for kind in kinds)]
    lines = table(figures).splitlines()
    assert [line.split()[1] for line in lines[2:]] == list(reversed(kinds))
    assert len({len(line) for line in lines}) == 1


@pytest.fixture(scope="module")
def export(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load_causal_lm(str(tiny_llama_dir))
    plan = StagePlan.full(reference_to(model, str(tiny_llama_dir)), "nested").drop("decode", 2)
    rules = {0: Retention("first_last", 2, 0.25), 3: Retention(codec=Codec("int4", "int4"))}
    student = StagedCausalLM(model, plan, KVRetentionPolicy(plan.boundary, kv_shape_of(model), rules))
    folder = tmp_path_factory.mktemp("figures") / "pair"
    return export_pair(student, folder, tokenizer=AutoTokenizer.from_pretrained(tiny_llama_dir), dtype=torch.float32)


def measures(export: Path, *names: str) -> Measures:
    settings = MeasureSettings(names, examples=3, new_tokens=8, prompts=(80, 64))
    return Measures(settings, AutoTokenizer.from_pretrained(export / "prefill"), export, 256, (2,), batch_size=2)


def test_a_model_agrees_with_itself_and_a_trimmed_pair_less(export: Path, tiny_llama_dir: Path) -> None:
    asked = measures(export, "agreement", "second_turn", "recall")
    dense = InProcessPair.of(StagedCausalLM(load_causal_lm(str(tiny_llama_dir))).eval())
    reference = asked.dense(dense)
    again = asked.of(dense)
    assert [score.value for score in again] == [score.value for score in reference]
    assert [score.value for score in reference[:4]] == [1.0] * 4
    trimmed = asked.of(InProcessPair.load(export))
    assert [(score.task, score.metric) for score in trimmed] == [(score.task, score.metric) for score in reference]
    assert all(score.value < 1.0 for score in trimmed[:4])


def test_recall_over_all_is_the_mean_of_its_depths_and_lengths(export: Path) -> None:
    whole, *cells = measures(export, "recall").recall(InProcessPair.load(export))
    assert len(cells) == 10
    assert whole.value == pytest.approx(fmean(cell.value for cell in cells))


def test_a_passage_stands_at_its_depth_and_is_asked_for_again(export: Path) -> None:
    asked = measures(export, "recall")
    for depth, start in ((0.0, 0), (0.5, 20), (1.0, 40)):
        example = asked._passage(1, 80, depth)
        passage = asked.material.passage(1, PASSAGE)
        assert len(example.prompt) == 80
        assert example.prompt[start : start + PASSAGE].equal(passage)
        assert torch.cat([example.prompt[-PASSAGE // 4 :], example.response]).equal(passage)


def test_a_second_turn_holds_the_answer_of_the_dense_model(export: Path) -> None:
    asked = measures(export, "second_turn")
    pair = InProcessPair.load(export)
    first, *_ = asked._second_turns(pair)
    text = asked.tokenizer.decode(first, skip_special_tokens=True)
    opening = asked._text(asked.material.prompts[0])
    (answer,) = pair.continuations(
        asked._rendered([[{"role": "user", "content": opening}]]), room=8, stop_ids=(2,)
    )  # fmt: skip
    expected = f"user\n{opening}\nassistant\n{asked._text(answer)}\nuser\n{FOLLOW_UP}\nassistant\n"
    assert text == expected[-len(text) :]
    assert text.endswith(f"{asked._text(answer)}\nuser\n{FOLLOW_UP}\nassistant\n")


def test_measures_need_no_harness_and_are_kept_in_the_export(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    output = tmp_path / "found.json"
    asked = ["eval", "--export", str(export), "--device", "cpu", "--examples", "2", "--new_tokens", "4"]
    asked += ["--prompts", "[64]", "--output", str(output)]
    assert main([*asked, "--measures", "agreement,recall", "--against", "dense"]) == 0
    assert "| recall" in capsys.readouterr().out
    found = json.loads(output.read_text())
    assert found["pair"] == json.loads((export / "pair.json").read_text())["id"]
    assert found["recall"]["depths"] == [0.0, 0.25, 0.5, 0.75, 1.0]
    for name in ("pair", "dense", "everything_sent"):
        assert [len(row) for row in found["recall"][name]] == [5]
    assert [figure["task"] for figure in found["figures"]][:2] == ["agreement", "agreement"]
    for settings, message in (
        (["--measures", "agreement"], "add `--against dense`"),
        ([], "nothing to evaluate"),
        (["--measures", "speed", "--against", "dense"], "`measures` names speed: choose of agreement"),
        (["--measures", "recall", "--mode", "dense", "--against", "dense"], "`against` is dense, as `mode` is"),
        (["--measures", "recall", "--against", "dense", "--prompts", "[9000]"], "`prompts` are"),
        (["--measures", "recall", "--against", "dense", "--prompts", "[32]"], "every one of `prompts` 64"),
    ):
        assert main([*asked, *settings]) == 1
        assert message in capsys.readouterr().err


def test_the_report_shows_what_was_measured_on_its_own_pair_and_warns(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = tmp_path / "pair"
    copytree(export, pair)
    asked = ["eval", "--export", str(pair), "--device", "cpu", "--examples", "2", "--new_tokens", "4", "--save"]
    asked += ["--prompts", "[64]", "--measures", "recall", "--against", "dense", "--recall_margin"]
    assert main([*asked, "-9"]) == 0
    measured = json.loads((pair / EVALUATION_FILE).read_text())
    page = (pair / "report.html").read_text()
    assert page.count("<h2>Evaluation</h2>") == 1
    assert "Measured speed" not in page
    assert all(figure["metric"] in page for figure in measured["figures"])
    assert page.count("<img") == 3  # two of the plan and the policy, and the sweep
    assert ("more than the margin of -900 %" in page) == (sum(measured["recall"]["everything_sent"][0]) > 0)

    cell = {"value": 1.25, "low": 1.2, "high": 1.3}
    names = ("prefill_speedup", "decode_speedup", "ttft_ms", "tpot_ms", "runtime_overhead")
    cells = [{"batch_size": 8, "prompt_tokens": 256, "prefill_bound": 1.5, "decode_bound": 1.6,
              **dict.fromkeys(names, cell)}]  # fmt: skip
    both = {"prompt_tokens": 256, "new_tokens": 32, **dict.fromkeys(("prefill_ms", "transfer_ms", "decode_ms"), cell)}
    bench: dict[str, Any] = {
        "pair": measured["pair"], "cells": cells, "wire_reduction": 4.5, "two_processes": both, "device": "cpu",
        "wire": {"prompt_tokens": 256, "full_bytes": 4096, "sent_bytes": 1024}, "dtype": "float32", "threads": 1,
    }  # fmt: skip
    save_measurement(pair, BENCH_FILE, bench)
    page = (pair / "report.html").read_text()
    assert page.count("<h2>Evaluation</h2>") == page.count("<h2>Measured speed</h2>") == 1
    assert "1.25x (1.20 to 1.30)" in page
    assert "4.00 KiB unpruned, 1.00 KiB sent (4.50 times fewer)" in page
    assert "Most memory" not in page
    peaks = {name: {"prefill": size, "decode": size // 2} for name, size in (("dense", 4096), ("trimmed", 2048))}
    more = {
        "wire": {**bench["wire"], "measured_ms": {"1 Gbit/s": [cell, cell]}},
        "peak_memory": {"batch_size": 8, "prompt_tokens": 256, **peaks},
    }
    save_measurement(pair, BENCH_FILE, {**bench, **more})
    page = (pair / "report.html").read_text()
    assert "1 Gbit/s, 1.25 (1.20 to 1.30) ms unpruned and 1.25 (1.20 to 1.30) ms as the policy says." in page
    assert "prefill 4.00 KiB dense, 2.00 KiB trimmed; decode 2.00 KiB dense, 1.00 KiB trimmed." in page

    save_measurement(pair, BENCH_FILE, {**bench, "pair": "another"})
    page = (pair / "report.html").read_text()
    assert "<h2>Measured speed</h2>" not in page
    assert "bench.json was measured on another pair" in page
    (pair / EVALUATION_FILE).unlink()
    (pair / BENCH_FILE).unlink()
    capsys.readouterr()
    assert main(["report", "--export", str(pair)]) == 0
    assert capsys.readouterr().out == f"{pair / 'report.html'}\n"
    page = (pair / "report.html").read_text()
    assert "Evaluation" not in page
    (pair / "report.html").write_text(page.replace(END, ""))
    with pytest.raises(UserError, match="it was changed by hand"):
        refresh_report(pair)
    (pair / "report.html").write_text("<body>old</body>")
    refresh_report(pair)
    assert (pair / "report.html").read_text() == f"<body>old{START}\n{END}</body>"


def test_only_a_loss_beyond_the_margin_is_told() -> None:
    assert lost_recall(0.98, 1.0, 0.03) is None
    assert lost_recall(0.5, 0.0) is None
    told = lost_recall(0.8, 1.0, 0.1)
    assert told is not None
    assert told.startswith("the KV policy loses 20 % of the recall (0.800 of 1.000 with everything sent)")


COLOURS = """
task: which_colour
custom_dataset: !function pdtrim_pl.harness.local_data.rows_of_file
dataset_kwargs: {file: colours.jsonl}
output_type: multiple_choice
test_split: test
doc_to_text: context
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}]
"""


def test_figures_of_tasks_are_those_of_the_harness_with_their_paired_difference(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness (the extra `eval`)")
    (tmp_path / "which_colour.yaml").write_text(COLOURS)
    rows = [{"context": f"Thing {i} is", "choices": ["red", "blue", "green"], "label": i % 3} for i in range(12)]
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("PDTRIM_DATA", str(tmp_path))
    output = tmp_path / "found.json"
    assert main(
        ["eval", "--export", str(export), "--device", "cpu", "--tasks", "which_colour", "--include_path", str(tmp_path),
         "--against", "dense", "--batch_size", "6", "--output", str(output)]
    ) == 0  # fmt: skip
    assert "| which_colour | acc" in capsys.readouterr().out
    found = json.loads(output.read_text())
    (figure,) = found["figures"]
    answers = {}
    for mode in ("disaggregated", "dense"):
        told = found["results"][mode]["results"]["which_colour"]
        answers[mode] = [sample["acc"] for sample in found["results"][mode]["samples"]["which_colour"]]
        own = "value" if mode == "disaggregated" else "dense"
        error = "stderr" if mode == "disaggregated" else "dense_stderr"
        assert (figure[own], figure[error]) == pytest.approx((told["acc,none"], told["acc_stderr,none"]))
    differences = [a - b for a, b in zip(answers["disaggregated"], answers["dense"], strict=True)]
    assert figure["difference_stderr"] == pytest.approx(stdev(differences) / math.sqrt(12))
