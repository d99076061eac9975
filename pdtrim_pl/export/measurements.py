"""Measurements of a finished export, kept beside it: `evaluation.json` and `bench.json`. Its report shows them."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdtrim_pl.checkpoints.run_record import RunRecord
from pdtrim_pl.errors import UserError
from pdtrim_pl.evaluation.recall import lost_recall
from pdtrim_pl.export.load import load_plan_and_policy
from pdtrim_pl.export.recall_figure import recall_sweep
from pdtrim_pl.export.report import write_report
from pdtrim_pl.export.templates import rendered
from pdtrim_pl.plan import PairManifest
from pdtrim_pl.plan.json_files import read_json, write_whole

EVALUATION_FILE = "evaluation.json"
BENCH_FILE = "bench.json"
REPORT_FILE = "report.html"
FIGURE_COLUMNS = ("task", "figure", "documents", "pair", "dense", "difference", "of dense kept")
START, END = "<!-- measured on the finished pair -->", "<!-- end of what was measured -->"


@dataclass(frozen=True)
class Measurements:
    """What was measured on a pair after its export."""

    evaluation: Mapping[str, Any] | None = None
    bench: Mapping[str, Any] | None = None
    stale: tuple[str, ...] = ()
    """Files that belong to another pair."""

    @classmethod
    def of(cls, export: Path) -> Measurements:
        """Read the files of an export. One that carries the id of another pair is not shown.

        Raises:
            UserError: a file is damaged.
        """
        own = PairManifest.load(export).id
        found: dict[str, Mapping[str, Any] | None] = {}
        stale = []
        for name in (EVALUATION_FILE, BENCH_FILE):
            path = export / name
            content: Any = read_json(path, "measurement") if path.is_file() else None
            if content is not None and content.get("pair") != own:
                stale.append(name)
                content = None
            found[name] = content
        return cls(found[EVALUATION_FILE], found[BENCH_FILE], tuple(stale))

    def warnings(self) -> list[str]:
        """Sentences about recall that the policy loses, one for each prompt length beyond the margin."""
        recall = None if self.evaluation is None else self.evaluation.get("recall")
        if recall is None or recall["everything_sent"] is None:
            return []
        told = []
        for length, own, whole in zip(recall["prompts"], recall["pair"], recall["everything_sent"], strict=True):
            lost = lost_recall(sum(own) / len(own), sum(whole) / len(whole), recall["margin"])
            if lost is not None:
                told.append(f"Prompts of {length} tokens: {lost}")
        return told

    def section(self) -> str:
        """The part of the report about them, in HTML; empty if there is nothing to show."""
        recall = None if self.evaluation is None else self.evaluation.get("recall")
        rows = [] if self.evaluation is None else [figure_row(figure) for figure in self.evaluation["figures"]]
        return rendered(
            "measured.html", columns=FIGURE_COLUMNS, rows=rows, evaluation=self.evaluation, bench=self.bench,
            stale=self.stale, warnings=self.warnings(),
            picture=None if recall is None else b64encode(recall_sweep(recall)).decode("ascii"),
        )  # fmt: skip


def save_measurement(export: Path, name: str, content: Mapping[str, Any]) -> None:
    """Keep a measurement in an export, and show it in the report.

    Args:
        export: directory of the pair.
        name: `EVALUATION_FILE` or `BENCH_FILE`.
        content: JSON values; `pair` is the id of the pair.

    Raises:
        UserError: the export has no report that could show it, and none can be written.
        OSError: the export cannot be written.
    """
    write_whole(export / name, json.dumps(content, indent=2) + "\n")
    refresh_report(export)


def refresh_report(export: Path) -> Path:
    """Show in the report of an export what was measured on it; all else in it stays. Returns the report.

    An export without a report gets one, without the run's own facts, which only the run has.

    Raises:
        UserError: the export or a measurement cannot be read.
    """
    path = export / REPORT_FILE
    section = Measurements.of(export).section()
    if not path.is_file():
        plan, policy = load_plan_and_policy(export)
        write_report(path, plan=plan, policy=policy, record=RunRecord(), title=f"{plan.model.name_or_path}, trimmed")
    page = path.read_text(encoding="utf-8")
    before, start, rest = page.partition(START)
    if start:
        _, end, after = rest.partition(END)
        if not end:
            raise UserError(f"{path} has no `{END}`: it was changed by hand. Move it away, and run this again.")
    else:  # written by an earlier version
        at = page.rfind("</body>")
        before, after = page[:at], page[at:]
    write_whole(path, f"{before}{START}\n{section}{END}{after}")
    return path


def figure_row(figure: Mapping[str, Any]) -> list[str]:
    """A figure as a row of a table: `FIGURE_COLUMNS`. Errors follow their values."""

    def shown(value: str, sign: str = "") -> str:
        return f"{figure[value]:{sign}.4f}{_error(figure['stderr' if value == 'value' else f'{value}_stderr'])}"

    kept, error = figure["kept"], figure["kept_stderr"]
    share = "" if kept is None else f"{100 * kept:.1f}{_error(None if error is None else 100 * error, 1)} %"
    metric = figure["metric"] if figure["higher_is_better"] else f"{figure['metric']} (lower is better)"
    count = "" if figure["documents"] is None else str(figure["documents"])
    return [figure["task"], metric, count, shown("value"), shown("dense"), shown("difference", "+"), share]


def _error(stderr: float | None, digits: int = 4) -> str:
    return "" if stderr is None else f" ± {stderr:.{digits}f}"
