"""The report of an export: one HTML file that needs no other. `templates/report.html` holds its words."""

from __future__ import annotations

import json
import platform
from base64 import b64encode
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pdtrim_pl
from pdtrim_pl.checkpoints.run_record import RunRecord
from pdtrim_pl.evaluation.summary import COLUMNS, Summary
from pdtrim_pl.export import report_figures as figures
from pdtrim_pl.export.secrets import redacted
from pdtrim_pl.export.templates import rendered
from pdtrim_pl.plan import NO_CODEC, STAGES, KVRetentionPolicy, StagePlan

REPORT_PROMPTS = (128, 512, 1024, 4096, 8192, 32768)
PACKAGES = ("torch", "transformers", "lightning", "safetensors")


def write_report(
    path: Path,
    *,
    plan: StagePlan,
    policy: KVRetentionPolicy,
    record: RunRecord,
    summary: Summary | None = None,
    title: str = "PDTrim report",
) -> None:
    """Write what a run measured, what it decided and what resulted, as one HTML file.

    A section without data says so in a sentence.

    Args:
        path: the file to write.
        plan: what each stage runs.
        policy: what crosses between them.
        record: losses, validations, removals, redundancy, attention mass and notes of the run.
        summary: the final table, if it was measured.
        title: heading of the page.
    """
    policy.check(plan)
    rules = {block: policy.rule(block) for block in plan.decode if policy.rule(block).keep == "first_last"}
    steps = {removal: step for step, removal in record.removals}
    mass = {block: value for block, value in record.attention_mass.items() if block in plan.decode}
    notes = {name: text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
             for name, text in redacted(record.notes).items()}  # fmt: skip
    cosines = {stage: record.redundancy[stage] for stage in STAGES if record.redundancy[stage]}
    page = rendered(
        "report.html", title=title, plan=plan, policy=policy, record=record, summary=summary, columns=COLUMNS,
        pictures=_pictures(plan, policy, record, mass),
        fates={stage: _counted(figures.fates(plan, stage)) for stage in STAGES},
        removed={stage: ", ".join(map(str, plan.removed(stage))) or "none" for stage in STAGES},
        most_redundant=[(stage, *max(of.items(), key=lambda item: item[1])) for stage, of in cosines.items()],
        steps=sorted(set(steps.values())), step_of={entry: steps.get(entry, "") for entry in plan.history},
        mass=mass, trimmed=list(rules), codecs=policy.codecs(plan),
        rules=list(Counter(rule.written_as(NO_CODEC) for rule in rules.values()).items()),
        reduction=policy.reduction(plan, REPORT_PROMPTS),
        notes=notes, versions=installed_versions(),
    )  # fmt: skip
    path.write_text(page, encoding="utf-8")


def installed_versions() -> dict[str, str]:
    """Versions of Python, of this package and of what it computes with."""
    found = {"python": platform.python_version(), "pdtrim_pl": pdtrim_pl.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _pictures(
    plan: StagePlan, policy: KVRetentionPolicy, record: RunRecord, mass: dict[int, float]
) -> dict[str, str | None]:
    """Each picture in base64; None if there is nothing to draw."""
    drawn = {
        "stage_map": figures.stage_map(plan),
        "redundancy": figures.redundancy(plan, record.redundancy) if any(record.redundancy.values()) else None,
        "loss_curve": figures.loss_curve(record) if figures.loss_panels(record) else None,
        "attention": figures.attention(plan, policy, mass),
    }
    return {name: None if png is None else b64encode(png).decode("ascii") for name, png in drawn.items()}


def _counted(fates: list[str]) -> str:
    return ", ".join(f"{count} {fate}" for fate, count in Counter(fates).items())
