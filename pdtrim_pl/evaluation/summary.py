"""The summary of a run: the table at the end of a run, in the report and on the model card."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.evaluation.mode import eval_mode
from pdtrim_pl.evaluation.quality import Quality, quality_against
from pdtrim_pl.evaluation.recall import lost_recall, measure_recall, requests_within
from pdtrim_pl.evaluation.teacher import TeacherReference
from pdtrim_pl.evaluation.timing import Timing
from pdtrim_pl.plan import PARTS, STAGES, KVRetentionPolicy, KVShape
from pdtrim_pl.staged import StagedCausalLM

COLUMNS = ("", "teacher", "after drops", "distilled", "gain")
TEXT_WIDTH = 79
REPEATED = 16
"""Number of examples on which recall is measured."""


class Row(NamedTuple):
    """One line of the table, as text. A cell that does not apply is empty."""

    label: str
    teacher: str
    dropped: str
    distilled: str
    gain: str


@dataclass(frozen=True)
class Summary:
    """Results of a run: the unpruned teacher, the same weights after the drops, and the distilled student."""

    total_blocks: int
    prefill_blocks: int
    decode_blocks: int
    teacher: Quality
    dropped: Quality
    """The teacher's weights under the student's plan and policy, before distillation."""
    distilled: Quality
    timing: Timing | None
    kv_prompt_tokens: int
    """Length of the prompt for which the KV bytes are counted."""
    kv_full_bytes: int
    kv_sent_bytes: int
    export: str | None = None
    """Path of the export."""
    recall: tuple[float, float, float] | None = None
    """Recall of teacher, dropped and distilled model, each under its own policy; None if it was not measured."""
    recall_everything_sent: float | None = None
    """Recall of the distilled model if everything is sent; None if it was not measured."""
    widths: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Such as `channels in prefill` -> how many a block had and has, for stages whose blocks became narrower."""

    @property
    def warning(self) -> str | None:
        """A sentence if the policy loses more recall than `RECALL_MARGIN`; else None."""
        if self.recall is None or self.recall_everything_sent is None:
            return None
        lost = lost_recall(self.recall[2], self.recall_everything_sent)
        return None if lost is None else f"Warning: {lost}"

    @property
    def kv_reduction(self) -> float | None:
        """Full bytes divided by sent bytes; None if nothing is sent."""
        return self.kv_full_bytes / self.kv_sent_bytes if self.kv_sent_bytes else None

    def at(self, export: Path | str) -> Summary:
        """This summary with the path of the export."""
        return replace(self, export=str(export))

    def rows(self) -> list[Row]:
        """The lines of the table; its columns are `COLUMNS`."""
        return [*self._block_rows(), *self._quality_rows(), *self._timing_rows(), self._kv_row()]

    def render_text(self, console: Console) -> None:
        """Print the table in ASCII with a fixed width, and the notes below it."""
        table = Table(box=box.ASCII, width=TEXT_WIDTH)
        for index, name in enumerate(COLUMNS):
            table.add_column(name, justify="right" if index else "left", no_wrap=index == 0)
        for row in self.rows():
            table.add_row(*row)
        drawn = StringIO()
        Console(file=drawn, width=TEXT_WIDTH).print(table)  # a narrower console would squeeze the columns
        for line in (*drawn.getvalue().splitlines(), *self.notes()):
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    def to_markdown(self) -> str:
        """The table and its notes in GitHub's Markdown."""
        lines = ["| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows()]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes())]) + "\n"

    def to_json(self) -> dict[str, Any]:
        """The summary as JSON values, with the derived figures."""
        out = asdict(self)
        for name, quality in (("teacher", self.teacher), ("dropped", self.dropped), ("distilled", self.distilled)):
            out[name]["perplexity"] = quality.perplexity
        if self.timing is not None:
            out["timing"]["prefill_speedup"] = self.timing.prefill_speedup
            out["timing"]["decode_speedup"] = self.timing.decode_speedup
        return {**out, "kv_reduction": self.kv_reduction}

    def notes(self) -> list[str]:
        """Notes on how the figures were measured, and the path of the export."""
        notes = [
            f"Quality: means over {self.distilled.tokens} response tokens, teacher-forced. After drops: the teacher's "
            "weights under the plan and the KV policy, before distillation."
        ]
        if self.recall is not None:
            notes.append("Recall: share of a text's tokens that are predicted when the whole text was the prompt.")
        if self.warning is not None:
            notes.append(self.warning)
        if self.timing is not None:
            t = self.timing
            notes.append(
                f"Times: dense (first column) and trimmed by turns in one run on {t.device}; prompt {t.prompt_tokens}, "
                f"new tokens {t.new_tokens}, batch {t.batch_size}."
            )
        if self.export is not None:
            notes.append(f"Export: {self.export}")
        return notes

    def _block_rows(self) -> list[Row]:
        stages = (("prefill", self.prefill_blocks), ("decode", self.decode_blocks))
        return [
            Row(f"blocks in {stage}", str(self.total_blocks), str(left), str(left), _fewer(self.total_blocks, left))
            for stage, left in stages
        ] + [
            Row(label, str(whole), str(left), str(left), _fewer(whole, left))
            for label, (whole, left) in self.widths.items()
        ]

    def _quality_rows(self) -> list[Row]:
        return [
            self._quality_row("response perplexity", lambda q: _number(q.perplexity)),
            self._quality_row("top-1 agreement", lambda q: f"{100 * q.agreement:.1f}%"),
            self._quality_row("KL to teacher, nats", lambda q: f"{q.kl:.4f}"),
            *self._recall_rows(),
        ]

    def _recall_rows(self) -> list[Row]:
        if self.recall is None:
            return []
        teacher, dropped, distilled = (f"{value:.3f}" for value in self.recall)
        return [Row("recall, repeated prompt", teacher, dropped, distilled, "")]

    def _quality_row(self, label: str, shown: Callable[[Quality], str]) -> Row:
        return Row(label, shown(self.teacher), shown(self.dropped), shown(self.distilled), "")

    def _timing_rows(self) -> list[Row]:
        if self.timing is None:
            return []
        t = self.timing
        return [
            Row("prefill ms/token", *_times(t.dense.prefill_ms, t.trimmed.prefill_ms), _factor(t.prefill_speedup)),
            Row("decode ms/token", *_times(t.dense.decode_ms, t.trimmed.decode_ms), _factor(t.decode_speedup)),
        ]

    def _kv_row(self) -> Row:
        full, sent = human_bytes(self.kv_full_bytes), human_bytes(self.kv_sent_bytes)
        gain = "" if self.kv_reduction is None else _factor(self.kv_reduction)
        return Row(f"KV bytes, prompt of {self.kv_prompt_tokens}", full, sent, sent, gain)


def summarise(
    student: StagedCausalLM,
    teacher: StagedCausalLM,
    batches: Iterable[Batch],
    *,
    base: StagedCausalLM | None = None,
    timing: Timing | None = None,
    kv_prompt_tokens: int = 1024,
    kv_shape: KVShape | None = None,
    device: torch.device | str = "cpu",
    export: Path | str | None = None,
) -> Summary:
    """Measure quality and recall of the three models and count the KV bytes of one request.

    The column "after drops" shows the weights before training under the student's plan and policy. These weights have
    no merged or untied blocks: the original block of the same index runs in place of a merged block.

    Args:
        student: the student, under its plan and policy.
        teacher: the teacher, under the full plan.
        base: the student before training, if the teacher is another model; the teacher by default.
        batches: validation requests; they are read once.
        timing: result of `measure_timing`; without it the table has no times.
        kv_prompt_tokens: length of the prompt for which the KV bytes are counted.
        kv_shape: shape and element type on the wire, if the export's differ from the student's.
        device: device of the models.
        export: path of the export.

    Raises:
        UserError: the batches have no response token.
    """
    plan = student.plan
    policy = student.policy or KVRetentionPolicy(plan.boundary, student.kv_shape)
    policy = replace(policy, kv=kv_shape or policy.kv)
    bare = replace(plan, merged={}, untied={})
    with eval_mode(student), eval_mode(teacher):
        reference = TeacherReference(teacher, list(batches), device=device)
        distilled = quality_against(reference, student)
        dropped = quality_against(reference, base or teacher, plan=bare, policy=student.policy)
        again = requests_within(teacher, reference.batches, REPEATED)
        recall = (
            measure_recall(teacher, again),
            measure_recall(base or teacher, again, plan=bare, policy=student.policy),
            measure_recall(student, again),
        )
        everything = measure_recall(student, again, plan=plan) if student.policy is not None else recall[2]
    return Summary(
        total_blocks=plan.model.num_blocks,
        prefill_blocks=len(plan.prefill),
        decode_blocks=len(plan.decode),
        teacher=replace(distilled, nll=distilled.teacher_nll, kl=0.0, agreement=1.0),  # compared with itself
        dropped=dropped,
        distilled=distilled,
        timing=timing,
        kv_prompt_tokens=kv_prompt_tokens,
        kv_full_bytes=policy.full_bytes(plan, kv_prompt_tokens),
        kv_sent_bytes=policy.sent_bytes(plan, kv_prompt_tokens),
        export=None if export is None else str(export),
        recall=recall,
        recall_everything_sent=everything,
        widths={
            f"{part} in {stage}": (plan.model.sizes[part] or left, left)
            for part in PARTS
            for stage in STAGES
            if (left := plan.widest(stage).get(part)) is not None
        },
    )


def human_bytes(count: int) -> str:
    """A number of bytes with a binary unit and three or four digits."""
    value, units = float(count), ("B", "KiB", "MiB", "GiB", "TiB")
    for unit in units[:-1]:
        if value < 1024:
            return f"{count} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} {units[-1]}"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10_000 else f"{value:.2e}"


def _fewer(total: int, left: int) -> str:
    return f"{100 * (total - left) / total:.0f}% fewer"


def _factor(ratio: float) -> str:
    return f"{ratio:.2f}x"


def _times(dense: float, trimmed: float) -> tuple[str, str, str]:
    return f"{dense:.2f}", "", f"{trimmed:.2f}"
