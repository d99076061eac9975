"""The engine from the caller's side: it queues requests, feeds both workers, and starts a dead one again."""

from __future__ import annotations

import itertools
import os
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Self

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import STAGES, Stage
from pdtrim_pl.serving.engine import messages as say
from pdtrim_pl.serving.engine.crew import Crew
from pdtrim_pl.serving.engine.frames import check_host
from pdtrim_pl.serving.engine.requests import Ask, Done, Event, Listener, Overloaded, Reason, Running
from pdtrim_pl.serving.engine.running import RunningRequests
from pdtrim_pl.serving.engine.watch import Watch
from pdtrim_pl.serving.exported import ExportedPair

PREFETCHED = 2
"""Prompts beyond the running batch that are encoded ahead."""
RESTARTS = 3
"""How often in a row a worker may die before it is ready."""


class Engine:
    """Serves an exported pair to many requests at once. It is a context manager; calls may come from any thread.

    The workers are spawned: in a script, use it below `if __name__ == "__main__":`.

    Args:
        export: directory of the pair.
        devices: of the prefill and of the decode worker.
        max_batch: most requests that decode runs at once.
        max_waiting: most requests in the queue; one more is refused.
        host: where decode listens for prefill.
        secret: shared by both workers; needed where `host` is no loopback address, else made up.
        start_timeout: seconds for the workers to load and to connect.

    Raises:
        UserError: the directory is not an export, or a worker cannot load its checkpoint.
    """

    def __init__(
        self, export: Path, *, devices: tuple[str, str] = ("cpu", "cpu"), max_batch: int = 8, max_waiting: int = 64,
        host: str = "127.0.0.1", secret: str | None = None, start_timeout: float = 600.0,
    ) -> None:  # fmt: skip
        check_host(host, secret)
        if max_batch < 1 or max_waiting < 1:
            raise UserError("`max_batch` and `max_waiting` need 1 at least.")
        self.pair = ExportedPair.read(Path(export))
        self.watch = Watch()
        """Counts and times of all requests."""
        key = secrets.token_bytes(32) if secret is None else secret.encode()
        self._crew = Crew(
            [
                say.WorkerSpec(stage, self.pair.path, device, host, key, max_batch)
                for stage, device in zip(STAGES, devices, strict=True)
            ]
        )
        self._max_waiting, self._most = max_waiting, max_batch + PREFETCHED
        self._start_timeout = start_timeout
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._new: deque[Running] = deque()
        self._cancelled: set[int] = set()
        self._running = RunningRequests(self.pair, self.watch)
        self._deaths = dict.fromkeys(STAGES, RESTARTS - 1)  # a worker that cannot even start is not started again
        self._connected = threading.Event()
        self._address: say.Address | None = None
        self._ready: set[Stage] = set()
        self._fault: Exception | None = None
        self._closing = self._over = False
        self._ends: tuple[int, ...] = os.pipe()
        """Whoever writes to the second one wakes the engine's thread."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> Self:
        for stage in STAGES:
            self._crew.start(stage)
        self._thread.start()
        try:
            self._connected.wait(self._start_timeout)
            if self._fault is not None or not self._connected.is_set():
                raise self._fault or RuntimeError(
                    f"The workers did not start within {self._start_timeout:g} s and were ended. Raise `start_timeout` "
                    "if loading takes longer."
                )
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End both workers and all requests. May be called again."""
        self._closing = True
        if self._thread.is_alive():
            self._poke()
            self._thread.join()
        self._crew.kill()
        with self._lock:
            ends, self._ends = self._ends, ()
        for end in ends:
            os.close(end)

    @property
    def trouble(self) -> str:
        """Why it cannot serve now; empty if both workers are there and connected."""
        healthy = self._connected.is_set() and self._fault is None and not self._closing
        return "" if healthy else "a worker is starting"

    def submit(self, ask: Ask, tell: Listener) -> int:
        """Queue a request; returns its number, for `cancel`. Arguments and errors as for `TokenEngine.submit`."""
        self.pair.check_ids(ask.prompt_ids, ask.max_new_tokens, ask.forced or ())
        with self._lock:
            if self._over or not self._thread.is_alive():
                raise self._fault or RuntimeError("The engine does not run: use it in a `with` block.")
            waiting = len(self._new) + self._running.count("waiting")
            if waiting >= self._max_waiting:
                self.watch.refused()
                raise Overloaded(f"{waiting} requests wait, as many as `max_waiting` allows: try again later.")
            running = Running(next(self._numbers), ask, tell)
            self._new.append(running)
        self._poke()
        return running.number

    def cancel(self, number: int) -> None:
        """End a request, if it has not ended. Its listener hears `Done`."""
        with self._lock:
            self._cancelled.add(number)
        self._poke()

    def events(self, ask: Ask) -> Iterator[Event]:
        """The events of one request. Closing the iterator cancels it; errors as for `submit`."""
        heard: queue.SimpleQueue[Event] = queue.SimpleQueue()
        number = self.submit(ask, heard.put)
        try:
            while not isinstance(event := heard.get(), Done):
                yield event
            yield event
        finally:
            self.cancel(number)

    # The engine's own thread

    def _run(self) -> None:
        try:
            while not self._closing and self._fault is None:
                self._turn()
        except Exception as error:  # every waiting caller must hear of it
            self._fault = error
        if self._fault is not None:
            self._connected.set()
        message = str(self._fault or "The engine was closed.")
        with self._lock:
            self._over = True
            left = [*self._running, *self._new]
            self._new.clear()
        for running in left:
            self._running.end(running, "error" if self._fault else "cancelled", message)

    def _turn(self) -> None:
        nearest = min((each.ends_at for each in self._running), default=float("inf"))
        timeout = None if nearest == float("inf") else max(nearest - time.monotonic(), 0.0)
        for ready in wait([self._ends[0], *self._crew.pipes.values()], timeout):
            if ready == self._ends[0]:
                os.read(self._ends[0], 4096)
                continue
            for stage in [each for each, pipe in self._crew.pipes.items() if pipe is ready]:
                self._hear(stage)
        self._take_up()
        for running in self._running:
            if running.ends_at <= time.monotonic():
                self._stop(running, "deadline", f"The time of {running.ask.deadline:g} s is over.")
        self._dispatch()

    def _take_up(self) -> None:
        with self._lock:
            while self._new:
                self._running.add(self._new.popleft())
            cancelled, self._cancelled = self._cancelled, set()
        for number in cancelled:
            if (running := self._running.find(number)) is not None:
                self._stop(running, "cancelled")

    def _dispatch(self) -> None:
        """Give prefill the next prompt, if it is free and decode has room. Prompts go one at a time, in order."""
        states = [running.state for running in self._running]
        self.watch.queued(states.count("waiting"), states.count("decode"))
        if not self._connected.is_set() or "prefill" in states or states.count("decode") >= self._most:
            return
        running = next((each for each in self._running if each.state == "waiting"), None)
        if running is None:
            return
        ask, running.state, running.reporting = running.ask, "prefill", True
        handled = len(ask.prompt_ids) - (self.pair.plan.boundary == "decode")
        expect = say.Expect(running.number, handled, ask.max_new_tokens, ask.stop_ids, ask.sampling, ask.forced)
        with_logits = ask.forced is not None and self.pair.plan.boundary == "prefill"
        self._crew.tell("decode", expect)
        self._crew.tell("prefill", say.Encode(running.number, ask.prompt_ids, ask.sampling, with_logits))

    def _hear(self, stage: Stage) -> None:
        """Read one report of a worker; or start it again, if it has died."""
        report = self._crew.hear(stage)
        if report is None:
            self._died(stage)
            return
        if isinstance(report, say.Tokens):
            self._running.tokens(report)
        elif isinstance(report, say.Logits):
            self._running.logits(report)
        elif isinstance(report, say.Encoded):
            self._running.encoded(report)
        elif isinstance(report, say.Lost):
            self._lost(stage, report)
        elif isinstance(report, say.Failed):
            self._died(stage, report)
        elif isinstance(report, say.Ready):
            self._meet(stage, report)
        else:
            self._deaths = dict.fromkeys(STAGES, 0)
            self._connected.set()

    def _meet(self, stage: Stage, report: say.Ready) -> None:
        """Let prefill connect as soon as both workers are there."""
        self._address = report.address or self._address
        self._ready.add(stage)
        if self._ready == set(STAGES):
            assert self._address is not None
            self._crew.tell("prefill", say.Connect(self._address))

    def _lost(self, stage: Stage, report: say.Lost) -> None:
        self.watch.lost()
        other: Stage = "decode" if stage == "prefill" else "prefill"
        if self._running.find(report.request) is not None and self._crew.dead(other):
            died = self._deaths[other]
            while self._deaths[other] == died:  # that is why: hear what it said last, and of its end
                self._hear(other)
        if (running := self._running.find(report.request)) is not None:
            running.reporting &= stage != "prefill"
            self._stop(running, "error", f"The {stage} worker lost the request: {report.message}")

    def _stop(self, running: Running, reason: Reason, message: str = "") -> None:
        """End a request before its response has ended."""
        if running.over is None and running.state != "waiting":
            self._crew.tell("decode", say.Forget(running.number))
        self._running.finish(running, reason, message)

    def _died(self, stage: Stage, report: say.Failed | None = None) -> None:
        """Tell whose requests died with a worker, and start it again. The others go on."""
        error = self._crew.bury(stage, report)
        self._connected.clear()
        self._ready.discard(stage)
        hit = ("prefill",) if stage == "prefill" else ("prefill", "decode")
        for running in self._running:
            if running.state in hit:
                if stage == "prefill":
                    self._crew.tell("decode", say.Forget(running.number))
                self._running.end(running, "error", str(error))
            elif stage == "prefill":
                self._running.reported(running)
        self._deaths[stage] += 1
        self.watch.restarted()
        if isinstance(error, UserError) or self._deaths[stage] >= RESTARTS:
            self._fault = error
            return
        self._crew.start(stage)

    def _poke(self) -> None:
        with self._lock:
            if self._ends:
                os.write(self._ends[1], b"x")
