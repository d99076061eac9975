"""The two worker processes from the engine's side: it starts them, talks to them, and always ends them."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import Stage
from pdtrim_pl.serving.engine import messages as say

GRACE_SECONDS = 5.0
"""For a worker that has failed to end."""
LAST_MOMENT = 0.1
"""Seconds between a worker's last connection that breaks and its end."""


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Block SIGINT, which Ctrl-C sends to every process of a terminal. Workers that start here inherit the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(spec: say.WorkerSpec, parent: Connection) -> None:
    """Import models in the worker: the caller's process needs none."""
    from pdtrim_pl.serving.engine.process import run_worker

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
        spawn = multiprocessing.get_context("spawn")  # a forked child would inherit broken threads and CUDA state
        self.pipes[stage], theirs = spawn.Pipe()
        process = spawn.Process(target=_work, args=(self._specs[stage], theirs), name=f"pdtrim {stage}", daemon=True)
        with interrupts_held_back():
            process.start()
        theirs.close()  # else it would stay open after the worker has died
        self._processes[stage] = process

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

    def dead(self, stage: Stage) -> bool:
        """Whether a worker has died, or does so now, and was not buried yet."""
        if stage not in self.pipes:
            return False
        self._processes[stage].join(LAST_MOMENT)
        return not self._processes[stage].is_alive()

    def bury(self, stage: Stage, failure: say.Failed | None) -> Exception:
        """Let a dead worker go.

        Args:
            stage: which one.
            failure: its last words, if it had any.

        Returns:
            Why it died: a UserError for a user's mistake, else a RuntimeError.
        """
        process = self._processes[stage]
        process.join(GRACE_SECONDS)
        process.kill()
        self.pipes.pop(stage).close()
        if failure is None:
            hint = " Exit code -9 often means that memory ran out." if process.exitcode == -9 else ""
            failure = say.Failed(f"it died without a word (exit code {process.exitcode}).{hint}", setting=False)
        if failure.setting:
            return UserError(f"The {stage} worker refused: {failure.message}")
        return RuntimeError(f"The {stage} worker failed: {failure.message}")

    def kill(self) -> None:
        """End both workers at once: they have nothing to save. May be called again."""
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.join()
        for pipe in self.pipes.values():
            pipe.close()
