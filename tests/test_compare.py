"""`pdtrim compare`: every method on a tiny model, finished rows kept, and the same numbers whatever was interrupted."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from typing_extensions import override

from pdtrim_pl.cli.compare import parse
from pdtrim_pl.cli.main import main
from pdtrim_pl.compare import COLUMNS, Bench, Found, Method, Outcome
from pdtrim_pl.compare.methods import Annealed, Distilled, Drop, DropAndRecover, Joint, ReplaceSpan
from pdtrim_pl.evaluation.evaluator import Evaluator
from pdtrim_pl.plan import KVRetentionPolicy, StagePlan

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "configs").glob("compare_*.yaml"))
Settings = dict[str, Any]


def method(class_path: str, **init_args: Any) -> Settings:
    return {"class_path": class_path, "init_args": init_args}


def ours(name: str, **init_args: Any) -> Settings:
    return method(f"pdtrim_pl.compare.methods.{name}", **init_args)


def criterion(name: str) -> Settings:
    return {"class_path": f"pdtrim_pl.criteria.{name}"}


BRIEF = {"evaluations": 4}
EVERY = {
    "last_n": ours("Drop", criterion=criterion("LastN")),
    "random": ours("Drop", criterion=criterion("Random")),
    "shortgpt": ours("Drop", criterion=criterion("CosineRedundancy")),
    "sleb": ours("Drop", criterion=criterion("ResponsePerplexity")),
    "pop": ours(
        "Drop", criterion=criterion("Taylor"), relation="prefill_only", target="prefill", boundary="decode"
    ),
    "iterabre": ours("DropAndRecover", criterion=criterion("GreedyKL")),
    "streamline": ours("ReplaceSpan"),
    "nested": ours("Drop", criterion=criterion("GreedyKL"), relation="nested"),
    "annealed": ours("Annealed", start="nested", annealing=BRIEF),
    "merged": ours("Annealed", start="annealed", annealing=BRIEF, merging={"steps": 2, "min_cosine": 0.0}),
    "merged_distilled": ours("Distilled", start="merged"),
    "span": ours("ReplaceSpan", relation="nested", share=0.4),
    "span_distilled": ours("Distilled", start="span"),
    "free": ours("Joint", start="annealed", annealing=BRIEF),
    "quadratic": ours("Quadratic", tokens=300),
    "minitron": ours("Narrow", start="shortgpt", criterion=criterion("ActivationNorm")),
    "width": ours("Narrow", start="shortgpt", criterion=criterion("LeastSquaresError"), repair_tokens=192),
    "span_width": ours(
        "Narrow", start="shortgpt", criterion=criterion("LeastSquaresError"), repair_tokens=100,
        first=ours("ReplaceSpan", relation="nested", share=0.4),
    ),
    "decode_width": ours(
        "Narrow", start="shortgpt", criterion=criterion("LeastSquaresError"), repair_tokens=100, last_blocks=True,
        first=ours("ReplaceSpan", relation="nested", share=0.4),
    ),
    "mixed": ours("Mixed", start="shortgpt", repair_tokens=192, width={"shares": [0.0, 1.0]}, annealing=BRIEF),
    "width_distilled": ours("Distilled", start="width"),
}  # fmt: skip
TRAINED = {
    "iterabre",
    "streamline",
    "merged",
    "merged_distilled",
    "span",
    "span_distilled",
    "width",
    "span_width",
    "decode_width",
    "mixed",
    "width_distilled",
}


NARROWED = {"minitron", "width", "span_width", "decode_width", "mixed", "width_distilled"}


class EveryOther(Method):
    """A user's own method: drops every second block."""

    @override
    def find(self, bench: Bench, start: Found | None, count: int) -> Found:
        plan = bench.full("unified")
        for block in range(1, 2 * count, 2):
            plan = plan.drop("both", block)
        return Found(plan)


class Stumbles(EveryOther):
    """Fails until a file is there."""

    def __init__(self, needs: str) -> None:
        super().__init__()
        self.needs = needs

    @override
    def find(self, bench: Bench, start: Found | None, count: int) -> Found:
        if not Path(self.needs).exists():
            raise ConnectionAbortedError("the kill")
        return super().find(bench, start, count)


@pytest.fixture
def write(tiny_llama_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a configuration for the tiny model; results go to `tmp_path / folder`."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"Line {number} says {number**3 % 101}." for number in range(60)))

    def written(methods: Settings, folder: str = "out", **settings: Any) -> Path:
        config = {
            "model": {"name": str(tiny_llama_dir), "dtype": "float32", "accelerator": "cpu"},
            "data": {
                "tokenizer": "${model.name}",
                "source": {"path": str(text)},
                "lengths": {"max_length": 24, "min_prompt": 12, "max_prompt": 12},
                "parts": {"validation": 0, "calibration": 4, "test": 4, "max_train": 16},
                "batch_size": 2,
            },
            "rows": {"counts": [1, 2], "guards": {"protect_first": 0, "protect_last": 0}},
            "training": {"tokens": 300, "batch_size": 4, "precision": "32-true"},
            "output": {"folder": str(tmp_path / folder), "name": "tiny"},
            "methods": methods,
        }
        for key, value in settings.items():
            config[key] = {**config.get(key, {}), **value}
        path = tmp_path / f"{folder}.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return path

    return written


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each class of methods was run."""
    calls: Counter[str] = Counter()

    def counting(kind: type[Method]) -> None:
        original = kind.find

        def find(self: Method, bench: Bench, start: Found | None, count: int) -> Found:
            calls[kind.__name__] += 1
            return original(self, bench, start, count)

        monkeypatch.setattr(kind, "find", find)

    for kind in (Annealed, Distilled, Drop, DropAndRecover, Joint, ReplaceSpan):
        counting(kind)
    return calls


def rows(folder: Path, name: str = "tiny.csv") -> list[dict[str, str]]:
    with (folder / name).open() as file:
        return list(csv.DictReader(file))


def without_clock(folder: Path) -> list[dict[str, str]]:
    return [{column: row[column] for column in COLUMNS if column != "search_seconds"} for row in rows(folder)]


TASK = """
task: words
custom_dataset: !function pdtrim_pl.harness.local_data.rows_of_file
dataset_kwargs: {file: words.jsonl}
output_type: multiple_choice
test_split: test
doc_to_text: context
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def tasks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Measures with one task, whose rows are in `words.jsonl`."""
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness (the extra `eval`)")
    (folder / "words.yaml").write_text(TASK)
    questions = [{"context": f"Say {word}", "choices": [word, "none"], "label": 0} for word in ("one", "two", "three")]
    (folder / "words.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    monkeypatch.setenv("PDTRIM_DATA", str(folder))
    return {"tasks": ["words"], "include_path": str(folder)}


def test_every_method_leaves_a_row_a_plan_and_a_policy_at_every_count(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write(EVERY, measures={**tasks(tmp_path, monkeypatch), "recall": 2})
    assert main(["compare", "--config", str(config)]) == 0
    out = tmp_path / "out"
    table = rows(out)
    assert [(row["method"], row["decode_removed"]) for row in table if row["method"] not in {"pop", *NARROWED}] == [
        (name, count) for count in "12" for name in EVERY if name not in {"pop", *NARROWED}
    ]
    for row in table:
        assert (int(row["trained_tokens"]) > 0) == (row["method"] in TRAINED)
        assert int(row["trained_tokens"]) <= 300
        assert float(row["kl"]) > -1e-6
        plan_folder = out / "plans" / f"{row['method']}_{row['prefill_removed'] if row['method'] != 'free' else 1}"
        if row["method"] not in {"free", *NARROWED}:
            plan = StagePlan.load(plan_folder / "stage_plan.json")
            KVRetentionPolicy.load(plan_folder / "kv_policy.json", plan)
            assert plan.relation == row["relation"]
            assert len(plan.removed("decode")) == int(row["decode_removed"])
    accuracy = rows(out, "tiny_accuracy.csv")
    assert [row["method"] for row in accuracy] == ["dense", *(row["method"] for row in table)]
    assert list(accuracy[0]) == ["method", "prefill_removed", "decode_removed", "words", "mean", "recall"]
    text = (out / "tiny.md").read_text()
    assert "## 1 blocks" in text
    assert "| merged* | nested | 2/2 |" in text
    channels = StagePlan.load(out / "plans" / "width_2" / "stage_plan.json").widest("decode")["channels"]
    assert f"| width* | nested | 0/0, {channels} channels |" in text
    assert f"`pdtrim compare --config {config}`" in text
    for picture in ("tiny_prefill_flops.png", "tiny_decode_bytes.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert "span_distilled*" in capsys.readouterr().out


def test_the_columns_are_those_of_the_committed_table(write: Callable[..., Path], tmp_path: Path) -> None:
    assert main(["compare", "--config", str(write({"last_n": EVERY["last_n"]}))]) == 0
    assert (tmp_path / "out" / "tiny.csv").read_text().splitlines()[0] == (
        "method,relation,prefill_removed,decode_removed,trained_tokens,nll,dense_nll,kl,agreement,prefill_flops,"
        "decode_bytes,wire_bytes,search_seconds,block_token_evaluations"
    )


def test_a_joint_search_costs_no_more_than_the_row_it_starts_from(write: Callable[..., Path], tmp_path: Path) -> None:
    chosen = {name: EVERY[name] for name in ("nested", "annealed", "free")}
    assert main(["compare", "--config", str(write(chosen))]) == 0
    table = rows(tmp_path / "out")
    for start, free in zip(table[1::3], table[2::3], strict=True):
        assert (start["method"], free["method"]) == ("annealed", "free")
        for cost in ("prefill_flops", "decode_bytes", "wire_bytes"):
            assert float(free[cost]) <= float(start[cost]) + 1e-6


def test_narrower_blocks_cost_no_more_than_the_row_they_are_measured_against(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    chosen = {name: EVERY[name] for name in ("shortgpt", "minitron", "width", "span_width", "decode_width", "mixed")}
    assert main(["compare", "--config", str(write(chosen))]) == 0
    table = rows(tmp_path / "out")
    for start in range(0, len(table), len(chosen)):
        for row in table[start + 1 : start + len(chosen)]:
            for cost in ("prefill_flops", "decode_bytes"):
                assert float(row[cost]) <= float(table[start][cost]) + 1e-6


def test_blocks_that_leave_before_the_widths_save_their_share_of_the_count(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    chosen = {name: EVERY[name] for name in ("shortgpt", "span_width")}
    assert main(["compare", "--config", str(write(chosen))]) == 0
    one, two = (row for row in rows(tmp_path / "out") if row["method"] == "span_width")
    assert (one["decode_removed"], two["decode_removed"]) == ("1", "1")
    assert int(one["trained_tokens"]) <= 0.4 * 300  # the block alone meets the costs: no text to refit on
    assert 0.4 * 300 < int(two["trained_tokens"]) <= 0.4 * 300 + 100
    plans = [StagePlan.load(path) for path in sorted((tmp_path / "out" / "plans").glob("span_width*/stage_plan.json"))]
    assert sorted("channels" in plan.widest("decode") for plan in plans) == [False, True]


def test_prefill_may_lose_its_last_blocks_where_decode_becomes_narrower(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    known = EVERY["decode_width"]
    enough = {**known, "init_args": {**known["init_args"], "repair_tokens": 240}}  # else held-back text does not agree
    chosen = {"shortgpt": EVERY["shortgpt"], "decode_width": enough}
    assert main(["compare", "--config", str(write(chosen))]) == 0
    plans = [StagePlan.load(path) for path in (tmp_path / "out" / "plans").glob("decode_width*/stage_plan.json")]
    assert any(plan.untied["prefill"] for plan in plans)
    for plan in (plan for plan in plans if plan.kv_only):
        assert (plan.relation, plan.boundary, plan.widest("prefill")) == ("free", "decode", {})
        assert plan.kv_only == plan.decode[-len(plan.kv_only) :]
        assert set(plan.untied["prefill"]) <= set(plan.kv_only)


def test_a_mix_need_not_send_less_where_narrower_blocks_meet_the_other_costs(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    widths = ours("Mixed", start="shortgpt", repair_tokens=0, width={"shares": [1.0]})
    assert main(["compare", "--config", str(write({"shortgpt": EVERY["shortgpt"], "mixed": widths}))]) == 0
    row = next(row for row in rows(tmp_path / "out") if row["method"] == "mixed")
    plan = StagePlan.load(next((tmp_path / "out" / "plans").glob("mixed_*")) / "stage_plan.json")
    assert len(plan.prefill) == len(plan.decode) == plan.model.num_blocks
    assert float(row["wire_bytes"]) == 1.0


def test_a_method_of_the_users_own_is_named_by_its_class_path(write: Callable[..., Path], tmp_path: Path) -> None:
    assert main(["compare", "--config", str(write({"mine": method("test_compare.EveryOther")}))]) == 0
    assert StagePlan.load(tmp_path / "out" / "plans" / "mine_2" / "stage_plan.json").prefill == (0, 2)


def test_a_killed_comparison_repeats_no_finished_row_and_ends_with_the_same_table(
    write: Callable[..., Path], tmp_path: Path, found: Counter[str]
) -> None:
    needed = tmp_path / "up"
    methods = {name: EVERY[name] for name in ("shortgpt", "nested")} | {
        "stumbles": method("test_compare.Stumbles", needs=str(needed)),
        "distilled": ours("Distilled", start="nested"),
    }
    with_file = write(methods, "whole")
    killed = write(methods, "killed")
    with pytest.raises(ConnectionAbortedError, match="the kill"):
        parse_and_run(killed)
    assert found == {"Drop": 2}
    needed.touch()
    parse_and_run(killed)
    assert found == {"Drop": 4, "Distilled": 2}
    assert main(["compare", "--config", str(killed)]) == 0
    assert found == {"Drop": 4, "Distilled": 2}
    assert main(["compare", "--config", str(with_file)]) == 0
    assert without_clock(tmp_path / "killed") == without_clock(tmp_path / "whole")
    for plan in (tmp_path / "whole" / "plans").rglob("*.json"):
        assert plan.read_bytes() == (tmp_path / "killed" / plan.relative_to(tmp_path / "whole")).read_bytes()


def parse_and_run(config: Path, *extra: str) -> tuple[Outcome, ...]:
    """The comparison without its tables and pictures."""
    comparison, settings = parse(["--config", str(config), *extra])
    return comparison.run(settings).outcomes


def test_a_search_killed_in_the_middle_goes_on_and_its_cost_holds_both_parts(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = {"nested": EVERY["nested"]}
    whole = parse_and_run(write(methods, "whole"))
    killed = write(methods, "killed")
    original, left = Evaluator._extend, 5

    def extend(self: Evaluator, *args: Any) -> Any:
        nonlocal left
        if not left:
            raise ConnectionAbortedError("the kill")
        left -= 1
        return original(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Evaluator, "_extend", extend)
        with pytest.raises(ConnectionAbortedError, match="the kill"):
            parse_and_run(killed)
    rest = 0

    def counted(self: Evaluator, *args: Any) -> Any:
        nonlocal rest
        rest += 1
        return original(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Evaluator, "_extend", counted)
        continued = parse_and_run(killed)
    counting = rest
    rest = 0
    with monkeypatch.context() as patched:
        patched.setattr(Evaluator, "_extend", counted)
        parse_and_run(write(methods, "again"))
    assert counting == rest - 5
    assert [asdict(row.judged) for row in continued] == [asdict(row.judged) for row in whole]
    assert [row.plan for row in continued] == [row.plan for row in whole]
    assert continued[0].spent.block_tokens >= whole[0].spent.block_tokens
    assert not list((tmp_path / "killed" / "rows").glob("*journal*"))


def test_a_changed_setting_redoes_only_the_rows_it_touches(write: Callable[..., Path], found: Counter[str]) -> None:
    methods = {name: EVERY[name] for name in ("shortgpt", "nested")} | {"distilled": ours("Distilled", start="nested")}
    config = write(methods)
    parse_and_run(config)
    assert found == {"Drop": 4, "Distilled": 2}
    parse_and_run(config, "--training.tokens=200")
    assert found == {"Drop": 4, "Distilled": 4}
    parse_and_run(config, "--training.tokens=200", "--rows.counts=[1]")
    assert found == {"Drop": 4, "Distilled": 4}
    parse_and_run(config, "--training.tokens=200", "--methods.nested.init_args.criterion.init_args.pool=2")
    assert found == {"Drop": 6, "Distilled": 6}, "what starts from a row that is made again is made again"


def test_other_questions_in_the_same_file_redo_every_row(
    write: Callable[..., Path], found: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measures = tasks(tmp_path, monkeypatch)
    file = tmp_path / "words.jsonl"
    config = write({"shortgpt": EVERY["shortgpt"]}, measures=measures, rows={"counts": [1]})
    for runs in (1, 1):
        parse_and_run(config)
        assert found == {"Drop": runs}
    file.write_text(file.read_text().replace("two", "four"))
    parse_and_run(config)
    assert found == {"Drop": 2}


def test_tasks_without_the_harness_are_refused_in_one_sentence(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    config = write({"shortgpt": EVERY["shortgpt"]}, measures={"tasks": ["piqa"]})
    assert main(["compare", "--config", str(config)]) == 1
    assert "`pip install 'pdtrim_pl[eval]'`" in capsys.readouterr().err


def test_chosen_rows_bring_what_they_start_from(write: Callable[..., Path], tmp_path: Path) -> None:
    config = write(EVERY, rows={"counts": [1], "only": ["annealed"]})
    assert main(["compare", "--config", str(config)]) == 0
    assert [row["method"] for row in rows(tmp_path / "out")] == ["nested", "annealed"]


def test_quick_settings_are_applied_and_the_command_line_still_wins(write: Callable[..., Path]) -> None:
    quick = {"rows.counts": [1], "training.tokens": 100, "data.parts": {"calibration": 2, "test": 2}}
    config = write(EVERY, quick_settings=quick)
    assert parse(["--config", str(config)])[0].rows.counts == (1, 2)
    comparison, _ = parse(["--quick", f"--config={config}", "--training.tokens=200"])
    assert comparison.rows.counts == (1,)
    assert comparison.training.tokens == 200
    assert comparison.data.parts.calibration == 2


@pytest.mark.slow
@pytest.mark.real_model
def test_a_quick_comparison_of_the_real_model_needs_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ROOT / "configs" / "compare_smollm2.yaml"
    asked = ["--quick", "--rows.only=[shortgpt]", f"--output.folder={tmp_path}"]
    assert main(["compare", "--config", str(config), *asked]) == 0
    (row,) = csv.DictReader((tmp_path / "smollm2.csv").open())
    assert (row["method"], row["prefill_removed"], row["decode_removed"]) == ("shortgpt", "2", "2")
    assert 0 < float(row["kl"]) < 2
    assert float(row["nll"]) > float(row["dense_nll"])
    assert (tmp_path / "smollm2_prefill_flops.png").is_file()
    assert "shortgpt" in capsys.readouterr().out


@pytest.mark.parametrize("quick", [[], ["--quick"]], ids=["full", "quick"])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_comparison_builds(path: Path, quick: list[str]) -> None:
    comparison, settings = parse(["--config", str(path), *quick])
    assert comparison.data.tokenizer_name == comparison.model.name
    assert set(comparison.methods) <= set(settings["methods"])
    assert f"--config configs/{path.name}" in path.read_text()
    if quick:
        assert settings["data"]["init_args"]["source"]["path"] == "pydoc", "a quick comparison needs no other file"
        assert settings["measures"]["held_out"] is None
        assert not settings["measures"]["tasks"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--rows.number=[1]"], "rows.number"),
        (["--methods.last_n.init_args.speed=1"], "speed"),
        (["--training.epochs=1"], "epochs"),
        (["--model.accelerator=tpu"], "model.accelerator"),
    ],
)
def test_unknown_and_mistyped_keys_are_refused(
    write: Callable[..., Path], extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["compare", "--config", str(write({"last_n": EVERY["last_n"]})), *extra])
    assert done.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("methods", "settings", "message"),
    [
        ({"free": EVERY["free"]}, {}, "`methods.free` starts from 'annealed', which is not before it (nothing is)"),
        ({"a b": EVERY["last_n"]}, {}, "`methods` has the name 'a b'"),
        (
            {"last_n": EVERY["last_n"]},
            {"rows": {"only": ["sleb"]}},
            "`rows.only` has the unknown method 'sleb' (last_n are",
        ),
        ({"last_n": EVERY["last_n"]}, {"rows": {"counts": [4]}}, "asks for 4 blocks of 4, but Guards(protect_first=0,"),
        ({"odd": ours("Drop", criterion=criterion("LastN"), target="prefill")}, {}, "does not fit `relation: unified`"),
        (
            {
                "shortgpt": EVERY["shortgpt"],
                "width": ours(
                    "Narrow", start="shortgpt", criterion=criterion("ActivationNorm"), first=EVERY["span_distilled"]
                ),
            },
            {},
            "`first` starts from 'span': give a method that starts from the full model",
        ),
        (
            {
                "shortgpt": EVERY["shortgpt"],
                "width": ours("Narrow", start="shortgpt", criterion=criterion("ActivationNorm"), first_share=1.0),
            },
            {},
            "`first_share` is 1.0: give a share of the blocks",
        ),
        ({}, {}, "`methods` names none"),
        ({"last_n": EVERY["last_n"]}, {"rows": {"counts": [3, 2]}}, "`rows.counts` is [3, 2]"),
    ],
)
def test_what_a_user_got_wrong_is_said_before_anything_runs(
    write: Callable[..., Path], methods: Settings, settings: Settings, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["compare", "--config", str(write(methods, **settings))])
    except SystemExit as refused:
        status = int(str(refused.code))
    assert status in (1, 2)
    assert message in capsys.readouterr().err
