"""The report of an export: one HTML file that needs nothing else."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Mapping
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pdtrim_pl
from pdtrim_pl.checkpoints.run_record import RunRecord
from pdtrim_pl.evaluation.summary import COLUMNS, Summary, human_bytes
from pdtrim_pl.export import report_figures as figures
from pdtrim_pl.export.report_page import bullets, missing, page, paragraph, picture, section, table
from pdtrim_pl.export.secrets import redacted
from pdtrim_pl.plan import STAGES, KVRetentionPolicy, Stage, StagePlan

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
    """Write what a run decided, what it saw and what came of it as one HTML file.

    A section whose data is missing says so in a sentence.

    Args:
        path: the file to write.
        plan: what each stage runs.
        policy: what crosses between them.
        record: losses, validations, removals, redundancy, attention mass and notes of the run.
        summary: the final table, where it was measured.
        title: heading of the page.
    """
    policy.check(plan)
    sections = [
        _summary(summary),
        _stage_map(plan),
        _redundancy(plan, record.redundancy),
        _losses(record),
        _attention(plan, policy, record.attention_mass),
        _reduction(plan, policy),
        _history(plan, record),
        _notes(record),
        section("Versions", table(("package", "version"), list(installed_versions().items()), text=True)),
    ]
    lead = (
        f"{plan.model.name_or_path} ({plan.model.model_type}, {plan.model.num_blocks} blocks): {len(plan.prefill)} in "
        f"prefill, {len(plan.decode)} in decode. Relation {plan.relation}, boundary {plan.boundary}."
    )
    path.write_text(page(title, lead, sections), encoding="utf-8")


def installed_versions() -> dict[str, str]:
    """Versions of Python, of this package and of what it computes with."""
    found = {"python": platform.python_version(), "pdtrim_pl": pdtrim_pl.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _summary(summary: Summary | None) -> str:
    if summary is None:
        return section("Summary", missing("No summary was measured for this export."))
    return section("Summary", table(COLUMNS, summary.rows()), bullets(summary.notes()))


def _stage_map(plan: StagePlan) -> str:
    counts = {stage: Counter(figures.fates(plan, stage)) for stage in STAGES}
    words = "; ".join(f"{stage}: " + ", ".join(f"{n} {fate}" for fate, n in counts[stage].items()) for stage in STAGES)
    gone = "; ".join(f"{stage}: {_list(plan.removed(stage))}" for stage in STAGES)
    alt = f"Map of {plan.model.num_blocks} blocks in two rows. {words}. Blocks that left, {gone}."
    return section("Blocks per stage", picture(figures.stage_map(plan), alt, words + "."))


def _redundancy(plan: StagePlan, values: Mapping[Stage, Mapping[int, float]]) -> str:
    heading = "Redundancy of each block"
    measured = [stage for stage in STAGES if values[stage]]
    if not measured:
        return section(heading, missing("No redundancy was measured in this run."))
    most = {stage: max(values[stage], key=lambda block: values[stage][block]) for stage in measured}
    alt = "One minus the mean cosine of input and output, by block and stage. Most redundant: " + ", ".join(
        f"block {block} in {stage} ({values[stage][block]:.4f})" for stage, block in most.items()
    )
    caption = "Log scale: the lower a block stands, the less it changes the hidden state, and the more redundant it is."
    return section(heading, picture(figures.redundancy(plan, values), alt + ".", caption))


def _losses(record: RunRecord) -> str:
    heading = "Training"
    if not figures.loss_panels(record):
        return section(heading, missing("No training was recorded for this export."))
    alt = f"Training loss at {len(record.losses)} steps and {len(record.validations)} validations"
    if record.losses:
        alt += f", loss from {record.losses[0][1]:.3f} to {record.losses[-1][1]:.3f}"
    steps = sorted({step for step, _ in record.removals})
    alt += f"; blocks left at step(s) {_list(steps)}." if steps else "; no block left during training."
    caption = "Vertical lines mark where blocks left a stage, and how many."
    return section(heading, picture(figures.loss_curve(record), alt, caption))


def _attention(plan: StagePlan, policy: KVRetentionPolicy, mass: Mapping[int, float]) -> str:
    mass = {block: value for block, value in mass.items() if block in plan.decode}
    trimmed = [block for block in plan.decode if policy.rule(block).keep == "first_last"]
    rules = Counter(policy.rule(block) for block in trimmed)
    words = "; ".join(f"{n} block(s) send first {rule.first} and last {rule.last}" for rule, n in rules.items())
    caption = (words or "Every block of decode sends every position") + (
        ". A whole number counts positions, a fraction is a share of the prompt."
    )
    alt = f"KV retention by block. Blocks that send first and last positions: {_list(trimmed)}."
    if mass:
        low = min(mass, key=lambda block: mass[block])
        alt += f" Attention mass from {mass[low]:.3f} (block {low}) to {max(mass.values()):.3f}."
    drawn = picture(figures.attention(plan, policy, mass), alt, caption)
    return section(
        "Attention mass and KV retention", drawn, *([] if mass else [missing("No attention mass was measured.")])
    )


def _reduction(plan: StagePlan, policy: KVRetentionPolicy) -> str:
    rows = [
        (
            f"{row['prompt_tokens']:,}",
            human_bytes(row["full_bytes"]),
            human_bytes(row["sent_bytes"]),
            "" if row["ratio"] is None else f"{row['ratio']:.2f}x",
        )
        for row in policy.reduction(plan, REPORT_PROMPTS)
    ]
    shape = policy.kv
    text = (
        f"One request's keys and values in {shape.dtype}, {shape.num_key_value_heads} head(s) of {shape.head_dim}, "
        "against the unpruned model sending everything."
    )
    columns = ("prompt tokens", "unpruned", "sent", "reduction")
    return section("KV bytes per request", paragraph(text), table(columns, rows))


def _history(plan: StagePlan, record: RunRecord) -> str:
    heading = "Removals"
    if not plan.history:
        return section(heading, missing("No block was removed."))
    steps = {removal: str(step) for step, removal in record.removals}
    rows = [
        (
            str(entry.round),
            entry.stage,
            entry.action,
            str(entry.block),
            entry.criterion,
            "" if entry.score is None else f"{entry.score:.6g}",
            steps.get(entry, ""),
        )
        for entry in plan.history
    ]
    return section(heading, table(("round", "stage", "action", "block", "criterion", "score", "step"), rows, text=True))


def _notes(record: RunRecord) -> str:
    heading = "Notes of the run"
    if not record.notes:
        return section(heading, missing("The run left no notes."))
    notes = redacted(record.notes)
    said = {n: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for n, v in notes.items()}
    long = {name: text for name, text in said.items() if "\n" in text}
    rows = [(name, text) for name, text in said.items() if name not in long]
    parts = [f"<h3>{escape(name)}</h3>\n<pre>{escape(text)}</pre>" for name, text in long.items()]
    return section(heading, table(("note", "value"), rows, text=True), *parts)


def _list(numbers: list[int] | tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers)) or "none"
