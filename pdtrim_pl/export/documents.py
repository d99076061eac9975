"""The two documents of an export: the report and the model card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from pdtrim_pl.checkpoints.run_record import RunRecord
from pdtrim_pl.evaluation.summary import Summary
from pdtrim_pl.export.card import write_card
from pdtrim_pl.export.report import write_report
from pdtrim_pl.models.names import split_revision
from pdtrim_pl.plan import ExportWidths, KVRetentionPolicy, Layout
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.description import kv_shape_of


def write_documents(
    folder: Path, staged: StagedCausalLM, record: RunRecord, summary: Summary | None, *, target: Path,
    dtype: torch.dtype, layout: Layout = "compact", widths: ExportWidths = "uniform",
) -> None:  # fmt: skip
    """Write `report.html` and `README.md` into an unfinished export.

    Args:
        folder: where to write.
        staged: the exported student.
        record: what its run measured.
        summary: the measured table, if there is one.
        target: where the export will lie.
        dtype: element type of the exported weights and KV.
        layout: how the checkpoints hold the blocks.
        widths: how wide their blocks are.
    """
    shape = kv_shape_of(staged.model, dtype)
    plan = replace(staged.plan, layout=layout, export_widths=widths)
    policy = replace(staged.policy or KVRetentionPolicy(plan.boundary, shape), kv=shape)
    name = plan.model.name_or_path
    title = f"{name}, trimmed"
    write_report(folder / "report.html", plan=plan, policy=policy, record=record, summary=summary, title=title)
    base, _ = split_revision(name)
    write_card(folder / "README.md", plan=plan, policy=policy, summary=summary, base_model=base, export=target)
