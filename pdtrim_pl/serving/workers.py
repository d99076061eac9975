"""The two worker processes from the parent's side: it starts them, watches them, and always ends them."""

from __future__ import annotations

import multiprocessing
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import STAGES, Stage
from pdtrim_pl.serving import messages as say

GRACE_SECONDS = 5.0


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Block SIGINT, which Ctrl-C sends to every process of a terminal. Workers that start here inherit the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def spawned(
    work: Callable[[Any, Connection], None], spec: Any, stage: Stage
) -> tuple[SpawnProcess, Connection]:  # fmt: skip
    """Start a worker process; returns it and our end of the pipe to it.

    Args:
        work: its main function, called with `spec` and with its own end of the pipe.
        spec: what it needs to start.
        stage: for its name.
    """
    spawn = multiprocessing.get_context("spawn")  # a forked child would inherit broken threads and CUDA state
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=work, args=(spec, theirs), name=f"pdtrim {stage}", daemon=True)
    with interrupts_held_back():
        process.start()
    theirs.close()  # else it would stay open after the worker has died
    return process, ours


def _work(spec: say.WorkerSpec, parent: Connection) -> None:
    """Import models in the worker: the parent needs none of its own."""
    from pdtrim_pl.serving.worker import run_worker

    run_worker(spec, parent)


class WorkerPair:
    """A prefill and a decode worker on this host.

    Args:
        export: the exported pair.
        devices: of the prefill and of the decode worker.
        attn_implementation: None means what the model needs.
    """

    def __init__(self, export: Path, devices: tuple[str, str], attn_implementation: say.Attention | None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="pdtrim-serving-")
        self._processes: dict[Stage, SpawnProcess] = {}
        self._connections: dict[Stage, Connection] = {}
        # NCCL needs one GPU per process; two workers on one GPU, or on none, send through the CPU.
        nccl = all(device.startswith("cuda") for device in devices) and devices[0] != devices[1]
        for stage, device in zip(STAGES, devices, strict=True):
            spec = say.WorkerSpec(
                stage, export, device, "nccl" if nccl else "gloo", Path(self._folder.name) / "meet", attn_implementation
            )
            self._processes[stage], self._connections[stage] = spawned(_work, spec, stage)

    @property
    def alive(self) -> bool:
        """Whether any worker process still exists."""
        return any(process.is_alive() for process in self._processes.values())

    def tell(self, stage: Stage, command: say.Command) -> None:
        """Send a command to a worker."""
        try:
            self._connections[stage].send(command)
        except ConnectionError:
            self._give_up(stage, None)

    def reports(self, timeout: float | None = None) -> Iterator[tuple[Stage, say.Report]]:
        """Reports of the workers in the order of their arrival, until the caller stops asking.

        Args:
            timeout: seconds for the workers to start; None waits without limit, but not for a dead worker.

        Raises:
            UserError: a worker found a user's mistake.
            RuntimeError: a worker failed or died, or the time is over. Both workers have been ended.
        """
        end = None if timeout is None else time.monotonic() + timeout
        stages = {self._connections[stage]: stage for stage in STAGES}
        while True:
            ready = wait(list(stages), None if end is None else max(end - time.monotonic(), 0.0))
            if not ready:
                self.kill()
                raise RuntimeError(
                    f"The workers did not start within {timeout:g} s and were ended. Raise `start_timeout` if loading "
                    "takes longer."
                )
            for connection in ready:
                assert isinstance(connection, Connection)
                stage = stages[connection]
                report = self._read(stage)
                if report is None or isinstance(report, say.Failed):
                    self._give_up(stage, report)
                else:
                    yield stage, report

    def kill(self) -> None:
        """End both workers at once: they have nothing to save. May be called again."""
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.join()
        for connection in self._connections.values():
            connection.close()
        self._folder.cleanup()

    def _read(self, stage: Stage) -> say.Report | None:
        """The worker's next report; None if it has died."""
        try:
            report: say.Report = self._connections[stage].recv()
        except (EOFError, ConnectionError):
            return None
        return report

    def _give_up(self, stage: Stage, failure: say.Failed | None) -> None:
        """End both workers and raise one error that names the cause.

        If one worker dies, the other soon reports a broken link. That is a consequence, so look at the first one.
        """
        if failure is not None and failure.kind == "link":
            other: Stage = "decode" if stage == "prefill" else "prefill"
            cause = self._last_words(other)
            if cause is None and not self._processes[other].is_alive():
                stage, failure = other, None
            elif cause is not None and cause.kind != "link":
                stage, failure = other, cause
        self._processes[stage].join(GRACE_SECONDS if failure is None else 0.0)
        code = self._processes[stage].exitcode
        self.kill()
        if failure is None:
            raise RuntimeError(
                f"The {stage} worker died without a word (exit code {code}). Exit code -9 often means that memory ran "
                "out."
            )
        if failure.kind == "setting":
            raise UserError(f"The {stage} worker refused: {failure.message}")
        raise RuntimeError(f"The {stage} worker failed: {failure.message}")

    def _last_words(self, stage: Stage) -> say.Failed | None:
        """The failure that a worker reports within the grace time; its other reports are skipped."""
        end = time.monotonic() + GRACE_SECONDS
        while self._connections[stage].poll(max(end - time.monotonic(), 0.0)):
            report = self._read(stage)
            if report is None:
                self._processes[stage].join(1.0)
                return None
            if isinstance(report, say.Failed):
                return report
        return None
