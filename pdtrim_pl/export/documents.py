"""The two documents of an export: the report and the model card."""

from __future__ import annotations

from pathlib import Path

from pdtrim_pl.checkpoints.run_record import RunRecord
from pdtrim_pl.evaluation.summary import Summary
from pdtrim_pl.export.card import write_card
from pdtrim_pl.export.load import load_plan_and_policy
from pdtrim_pl.export.report import write_report
from pdtrim_pl.models.names import split_revision


def write_documents(folder: Path, record: RunRecord, summary: Summary | None, *, target: Path) -> None:
    """Write `report.html` and `README.md` into an unfinished export, from the plan and the policy in it.

    Args:
        folder: the unfinished export.
        record: what its run measured.
        summary: the measured table, if there is one.
        target: where the export will lie.
    """
    plan, policy = load_plan_and_policy(folder)
    name = plan.model.name_or_path
    title = f"{name}, trimmed"
    write_report(folder / "report.html", plan=plan, policy=policy, record=record, summary=summary, title=title)
    base, _ = split_revision(name)
    write_card(folder / "README.md", plan=plan, policy=policy, summary=summary, base_model=base, export=target)
