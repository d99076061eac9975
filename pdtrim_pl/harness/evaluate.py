"""`pdtrim eval`: tasks of lm-evaluation-harness on an exported pair."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan.json_files import write_whole


@contextmanager
def needs_harness() -> Iterator[None]:
    """Say how to install lm-evaluation-harness if an import of it fails.

    Raises:
        UserError: it is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise UserError(
            "Tasks need lm-evaluation-harness, which is not installed: `pip install 'pdtrim_pl[eval]'`."
        ) from error


def evaluate_pair(
    export: Path, tasks: str, *, mode: Literal["disaggregated", "unified", "dense"] = "disaggregated",
    model: str | None = None, num_fewshot: int | None = None, limit: int | None = None, batch_size: str = "1",
    device: str | None = None, include_path: Path | None = None, output: Path | None = None,
) -> str:  # fmt: skip
    """Run tasks of the harness on a pair.

    Args:
        export: directory of the pair.
        tasks: names of tasks, with commas.
        mode: see `PairLM`.
        model: see `PairLM`.
        num_fewshot: examples in a prompt; by default what the task says.
        limit: most documents of a task, for a try.
        batch_size: a number, or `auto`.
        device: default `cuda` if there is a GPU, else `cpu`.
        include_path: folder with further task files.
        output: file for the results as JSON.

    Returns:
        The table of results, with standard errors.

    Raises:
        UserError: the harness is not installed, a task is unknown, or the export cannot be loaded.
    """
    with needs_harness():
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import handle_non_serializable, make_table

        from pdtrim_pl.harness.model import PairLM
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    names = [name for name in tasks.split(",") if name]
    found = manager.match_tasks(names)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown or not found:
        raise UserError(
            f"`tasks` names no known task: {', '.join(unknown) or repr(tasks)}. `--include_path` adds a folder of task "
            "files."
        )
    pair = PairLM(str(export), mode, model, device, batch_size=batch_size)
    results: dict[str, Any] = simple_evaluate(
        pair, tasks=found, num_fewshot=num_fewshot, limit=limit, task_manager=manager, log_samples=output is not None
    )
    if output is not None:
        write_whole(output, json.dumps(results, indent=2, default=handle_non_serializable) + "\n")
    table: str = make_table(results)
    return table
