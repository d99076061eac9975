"""`pdtrim eval`: reads its options, and prints and keeps what was measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pdtrim_pl.cli.parsing import OneLineErrors
from pdtrim_pl.plan.json_files import write_whole


def run(args: Sequence[str]) -> int:
    """Run one evaluation."""
    options = _parser().parse_args(list(args))
    from pdtrim_pl.harness.evaluate import evaluate_pair
    from pdtrim_pl.harness.measures import MeasureSettings
    from pdtrim_pl.harness.tasks import TaskSettings

    tasks = TaskSettings(
        _names(options.tasks), options.include_path, options.num_fewshot, options.limit, options.batch_size
    )
    measures = MeasureSettings(
        _names(options.measures),
        options.source,
        options.examples,
        options.new_tokens,
        options.prompts,
        options.recall_margin,
    )
    found = evaluate_pair(
        options.export, tasks, measures, mode=options.mode, against=options.against, model=options.model,
        device=options.device,
    )  # fmt: skip
    if options.output is not None:
        # One mode alone is written as the harness itself would.
        content: dict[str, Any] = (
            {**found.to_json(), "results": found.results} if options.against else {**found.results[options.mode]}
        )
        write_whole(options.output, json.dumps(content, indent=2, default=_as_text) + "\n")
    if options.save:
        from pdtrim_pl.export.measurements import EVALUATION_FILE, save_measurement

        save_measurement(options.export, EVALUATION_FILE, found.to_json())
    print(found.table())
    return 0


def _parser() -> OneLineErrors:
    parser = OneLineErrors(
        prog="pdtrim eval",
        description="Tasks of lm-evaluation-harness and measures of generation on an exported pair.",
    )
    parser.add_argument("--export", type=Path, required=True, help="directory written by fit or `pdtrim export`")
    parser.add_argument("--tasks", type=str, default="", help="names, with commas; `lm_eval ls tasks` lists them")
    parser.add_argument(
        "--measures", type=str, default="", help="agreement, second_turn, recall; with commas; they need --against"
    )
    parser.add_argument(
        "--mode", choices=["disaggregated", "unified", "dense"], default="disaggregated",
        help="both halves as they serve, the decode checkpoint alone, or the unpruned model",
    )  # fmt: skip
    parser.add_argument(
        "--against", type=Literal["dense"] | None, default=None,
        help="dense: the unpruned model answers the same documents; prints both with their paired differences",
    )  # fmt: skip
    parser.add_argument("--model", type=str | None, help="where the unpruned model is now")
    parser.add_argument("--num_fewshot", type=int | None, help="examples in a prompt, if not what the task says")
    parser.add_argument("--limit", type=int | None, help="most documents of a task, for a try")
    parser.add_argument("--batch_size", type=str, default="1", help="a number, or auto")
    parser.add_argument("--device", type=str | None, help="cuda if there is a GPU, else cpu")
    parser.add_argument("--include_path", type=Path | None, help="folder with further task files")
    parser.add_argument("--source", type=str, default="pydoc", help="text of the measures: a file, a glob, a Hub id")
    parser.add_argument("--examples", type=int, default=16, help="prompts of the measures")
    parser.add_argument("--new_tokens", type=int, default=64, help="tokens of a continuation")
    parser.add_argument("--prompts", type=list[int], default=[256, 1024], help="prompt lengths of recall")
    parser.add_argument("--recall_margin", type=float, default=0.03, help="share lost beyond which the report warns")
    parser.add_argument("--output", type=Path | None, help="file for the results and all answers as JSON")
    parser.add_argument(
        "--save", action="store_true", help="keep the figures in the export and show them in its report"
    )
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _as_text(value: Any) -> Any:
    """What the harness keeps beside plain values: numbers of numpy, functions of a task."""
    return value.item() if isinstance(value, np.generic) else str(value)
