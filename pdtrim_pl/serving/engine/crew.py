"""The two worker processes from the engine's side: it starts them, talks to them, and always ends them."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from pdtrim_pl.plan import Stage
from pdtrim_pl.serving.engine import messages as say
from pdtrim_pl.serving.workers import spawned

GRACE_SECONDS = 5.0


def _work(spec: say.WorkerSpec, parent: Connection) -> None:
    """Import models in the worker: the caller's process needs none."""
    from pdtrim_pl.serving.engine.workers import run_worker

    run_worker(spec, parent)


class Crew:
    """A prefill and a decode worker.

    Args:
        specs: one of each stage.
    """

    def __init__(self, specs: Sequence[say.WorkerSpec]) -> None:
        self._specs = {spec.stage: spec for spec in specs}
        self._processes: dict[Stage, SpawnProcess] = {}
        self.pipes: dict[Stage, Connection] = {}
        """Of the workers that have been started and not buried."""

    def start(self, stage: Stage) -> None:
        """Start a worker, the first one or another one."""
        self._processes[stage], self.pipes[stage] = spawned(_work, self._specs[stage], stage)

    def pid(self, stage: Stage) -> int | None:
        """The process id of a worker."""
        return self._processes[stage].pid

    def tell(self, stage: Stage, command: say.Command) -> None:
        """Send a command. A worker that is dead does not hear it; `hear` tells."""
        pipe = self.pipes.get(stage)
        if pipe is not None:
            try:
                pipe.send(command)
            except OSError:
                return

    def hear(self, stage: Stage) -> say.Report | None:
        """The worker's next report; None if it has died."""
        try:
            report: say.Report = self.pipes[stage].recv()
        except (EOFError, OSError):
            return None
        return report

    def bury(self, stage: Stage) -> int | None:
        """Let a dead worker go; returns its exit code."""
        process = self._processes[stage]
        process.join(GRACE_SECONDS)
        process.kill()
        self.pipes.pop(stage).close()
        return process.exitcode

    def kill(self) -> None:
        """End both workers at once: they have nothing to save. May be called again."""
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.join()
        for pipe in self.pipes.values():
            pipe.close()
