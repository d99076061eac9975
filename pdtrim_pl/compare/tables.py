"""The tables of a comparison as CSV, as Markdown and on the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from platform import processor, python_version
from typing import Any

import lightning
import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table

from pdtrim_pl import __version__
from pdtrim_pl.compare.outcome import COLUMNS, Outcome
from pdtrim_pl.plan import PARTS, STAGES, StagePlan
from pdtrim_pl.plan.json_files import write_whole

WIDEST = 240
CPU_FACTS = Path("/proc/cpuinfo")
SHOWN: Mapping[str, str] = {
    "method": "method", "relation": "relation", "blocks": "removed P/D", "kl": "KL", "nll": "NLL",
    "agreement": "agreement", "prefill_flops": "prefill FLOPs", "decode_bytes": "decode bytes",
    "wire_bytes": "KV bytes", "trained_tokens": "trained tokens", "search_seconds": "search s",
    "block_token_evaluations": "block-token evaluations",
}  # fmt: skip


def write_csv(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write all rows; the columns are `COLUMNS`. Costs are shares of the dense model's."""
    _write_rows(path, COLUMNS, [outcome.row() for outcome in outcomes])


def write_accuracy_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the accuracy table: shares of right answers by task."""
    _write_rows(path, list(rows[0]), rows)


def to_markdown(outcomes: Sequence[Outcome], accuracy: Sequence[Mapping[str, Any]], facts: Mapping[str, str]) -> str:
    """The facts of the run, one table for each count, and the accuracy table, in Markdown."""
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    lines += [
        "",
        "`*` marks rows that train. KL, NLL (nats) and agreement are means over held-out response tokens; costs are "
        f"shares of the dense model, whose NLL is {outcomes[0].judged.dense_nll:.3f}.",
    ]
    for count in sorted({outcome.count for outcome in outcomes}):
        chosen = [outcome for outcome in outcomes if outcome.count == count]
        lines += ["", f"## {count} blocks", "", *_markdown(list(SHOWN.values()), [_shown(o) for o in chosen])]
    if accuracy:
        rows = [[_text(value) for value in row.values()] for row in accuracy]
        lines += [
            "",
            "## Accuracy",
            "",
            "Figures of lm-evaluation-harness: `acc_norm` of a task that has it, else exact matches or `acc`.",
        ]
        lines += ["", *_markdown([name.replace("_", " ") for name in accuracy[0]], rows)]
    return "\n".join(lines) + "\n"


def print_table(outcomes: Sequence[Outcome], console: Console) -> None:
    """Print the rows, with a line between counts."""
    table = Table(box=box.ASCII)
    for index, name in enumerate(SHOWN.values()):
        table.add_column(name, justify="left" if index < 2 else "right", no_wrap=True)
    for before, outcome in zip([None, *outcomes], outcomes, strict=False):
        if before is not None and before.count != outcome.count:
            table.add_section()
        table.add_row(*_shown(outcome))
    drawn = io.StringIO()
    Console(file=drawn, width=WIDEST).print(table)  # a narrower console would squeeze the columns
    for line in drawn.getvalue().splitlines():
        console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)


def facts_of(settings: Mapping[str, Any], command: str, device: torch.device) -> dict[str, str]:
    """Facts of the run: command, model, data as named in the settings, versions, machine and date."""
    measures = settings["measures"]
    texts = [settings["data"]["init_args"]["source"]["path"]]
    texts += [measures["held_out"]["path"]] if measures["held_out"] else []
    versions = {"pdtrim_pl": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    versions |= {"lightning": lightning.__version__, "python": python_version()}
    return {
        "command": f"`{command}`",
        "model": f"{settings['model']['name']} ({settings['model']['dtype']})",
        "data": ", ".join(f"`{path}`" for path in texts),
        **(
            {"tasks": f"{', '.join(measures['tasks'])}, {measures['limit']} documents each"}
            if measures["tasks"]
            else {}
        ),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "machine": machine(device),
        "date": datetime.now(UTC).date().isoformat(),
    }


def machine(device: torch.device) -> str:
    """Name of the processor, and of the GPU if `device` is one."""
    names = [line.partition(":")[2].strip() for line in _cpu_lines() if line.startswith("model name")]
    cpu = f"{names[0]}, {len(names)} core(s)" if names else processor() or "unknown processor"
    threads = f"{cpu}, {torch.get_num_threads()} thread(s)"
    return f"{torch.cuda.get_device_name(device)}; {threads}" if device.type == "cuda" else threads


def _cpu_lines() -> list[str]:
    return CPU_FACTS.read_text(encoding="utf-8").splitlines() if CPU_FACTS.is_file() else []


def _write_rows(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_text(row[column]) for column in columns] for row in rows)
    write_whole(path, text.getvalue())


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _shown(outcome: Outcome) -> list[str]:
    row = outcome.row()
    row["method"] += "*" if outcome.trained_tokens else ""
    row["blocks"] = f"{row['prefill_removed']}/{row['decode_removed']}" + _widths(outcome.plan)
    for name, form in (("search_seconds", ".0f"), ("block_token_evaluations", ".3g"), ("trained_tokens", ",")):
        row[name] = format(row[name], form)
    return [f"{row[name]:.3f}" if isinstance(row[name], float) else str(row[name]) for name in SHOWN]


def _widths(plan: StagePlan) -> str:
    """The widths of a plan as text, such as `, 1126 channels`; nothing if all blocks are whole."""
    found = [plan.widest(stage) for stage in STAGES]
    parts = [part for part in PARTS if any(part in widest for widest in found)]
    sizes = {part: [str(widest.get(part, plan.model.sizes[part])) for widest in found] for part in parts}
    return "".join(f", {'/'.join(dict.fromkeys(sizes[part]))} {part}" for part in parts)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    head = ["| " + " | ".join(columns) + " |", "|---" * 2 + "|---:" * (len(columns) - 2) + "|"]
    return head + ["| " + " | ".join(row) + " |" for row in rows]
