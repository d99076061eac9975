"""Finds and runs tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdtrim_pl.errors import UserError

if TYPE_CHECKING:
    from pdtrim_pl.harness.model import InProcessLM


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


@dataclass(frozen=True)
class TaskSettings:
    """Tasks of the harness, and how they run."""

    names: tuple[str, ...] = ()
    """Names of tasks, groups and tags; patterns such as `mmlu_*`."""
    include_path: Path | None = None
    """Folder with further task files."""
    num_fewshot: int | None = None
    """Examples in a prompt; by default what the task says."""
    limit: int | None = None
    """Most documents of a task, from its start; by default all."""
    batch_size: str = "1"
    """A number, or `auto`."""


class Tasks:
    """The tasks of some settings.

    Raises:
        UserError: the harness is not installed, or a task is unknown.
    """

    def __init__(self, settings: TaskSettings) -> None:
        with needs_harness():
            from lm_eval import simple_evaluate
            from lm_eval.tasks import TaskManager
        self.settings, self._evaluate = settings, simple_evaluate
        path = settings.include_path
        own = None if path is None else TaskManager(include_path=str(path), include_defaults=False)
        # The harness reads thousands of files to know its own tasks. A folder that has all of ours spares that.
        self.manager = own if own is not None and not self._unknown(own) else TaskManager(
            include_path=None if path is None else str(path)
        )  # fmt: skip
        unknown = self._unknown(self.manager)
        if unknown or not settings.names:
            raise UserError(
                f"`tasks` names no known task: {', '.join(unknown) or repr('')}. `--include_path` adds a folder of "
                "task files."
            )
        self.names: list[str] = self.manager.match_tasks(list(settings.names))

    def _unknown(self, manager: Any) -> list[str]:
        return [name for name in self.settings.names if not manager.match_tasks([name])]

    def fingerprint(self) -> dict[str, str]:
        """Task -> hash of its settings and of the documents that are used."""
        loaded: Mapping[str, Any] = self.manager.load(self.names)["tasks"]
        return {
            name: sha256(repr((task.dump_config(), list(task.eval_docs)[: self.settings.limit])).encode()).hexdigest()
            for name, task in loaded.items()
        }

    def run(self, model: InProcessLM) -> dict[str, Any]:
        """The results of the harness, with the answer to every document."""
        settings = self.settings
        results: dict[str, Any] = self._evaluate(
            model, tasks=self.names, num_fewshot=settings.num_fewshot, limit=settings.limit,
            task_manager=self.manager, log_samples=True, bootstrap_iters=1000,
        )  # fmt: skip
        return results
