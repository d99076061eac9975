"""The router: each request goes to a vLLM engine of the prefill half, and then to one of the decode half."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from pdtrim_pl.errors import UserError
from pdtrim_pl.serving.engine.requests import Ask, Done, Listener, Overloaded, Reason, Running
from pdtrim_pl.serving.engine.watch import Watch
from pdtrim_pl.serving.exported import ExportedPair
from pdtrim_pl.serving.router.relay import Relay
from pdtrim_pl.serving.router.upstream import Failed, Gone, Upstream

log = logging.getLogger(__name__)

LOOK = 2.0
"""Seconds between looks whether the engines are healthy."""
UNKNOWN = ("header_bytes", "restarts")
"""Counters of `Watch` that only the engines could count."""


class Router:
    """Serves a pair by two vLLM engines, as `Engine` does by two workers. It is a context manager.

    Under `boundary: prefill` the token of the prefill engine begins the response. Under `boundary: decode` it is
    dropped. If a prompt's keys and values do not reach the decode engine, they are sent once more.

    Args:
        export: directory of the pair; both engines serve copies of it.
        engines: the prefill and the decode engine.
        max_batch: most requests that are with the engines at once.
        max_waiting: most requests in the queue; one more is refused.
        start_timeout: seconds to wait for the engines.
        check: called while it waits for the engines; may raise.

    Raises:
        UserError: the directory is not an export, or an engine does not answer.
    """

    def __init__(
        self, export: Path, engines: tuple[Upstream, Upstream], *, max_batch: int = 8, max_waiting: int = 64,
        start_timeout: float = 600.0, check: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        if max_batch < 1 or max_waiting < 1:
            raise UserError("`max_batch` and `max_waiting` need 1 at least.")
        self.pair = ExportedPair.read(export)
        self.watch = Watch(UNKNOWN)
        """Counts and times of all requests. Bytes are those of the policy; the decode engine refuses others."""
        self._engines = engines
        self._relay = Relay(self.pair, engines, self.watch, self._count)
        self._max_waiting = max_waiting
        self._start_timeout, self._check = start_timeout, check
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._running: dict[int, Running] = {}
        self._tasks: dict[int, asyncio.Task[Reason]] = {}
        self._troubles: list[str] = []
        self._rows = asyncio.Semaphore(max_batch)
        self._open = False

    def __enter__(self) -> Self:
        contexts = [each.wait(self._start_timeout, self._check).context for each in self._engines]
        self.pair = replace(self.pair, context=min(self.pair.context, *contexts))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="router", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        self._open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._open = False
        asyncio.run_coroutine_threadsafe(self._end_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def trouble(self) -> str:
        """Why it cannot serve now; empty if both engines are healthy."""
        return "; ".join(self._troubles)

    def submit(self, ask: Ask, tell: Listener) -> int:
        """Queue a request; returns its number, for `cancel`. Arguments and errors as for `TokenEngine.submit`."""
        if ask.forced is not None:
            raise UserError("The router cannot tell the logits of a known response: use the engine of this package.")
        self.pair.check_ids(ask.prompt_ids, ask.max_new_tokens)
        with self._lock:
            if not self._open:
                raise RuntimeError("The router does not run: use it in a `with` block.")
            waiting = sum(each.state == "waiting" for each in self._running.values())
            if waiting >= self._max_waiting:
                self.watch.refused()
                raise Overloaded(f"{waiting} requests wait, as many as `max_waiting` allows: try again later.")
            running = Running(next(self._numbers), ask, tell)
            self._running[running.number] = running
            self._loop.call_soon_threadsafe(self._begin, running)
        return running.number

    def cancel(self, number: int) -> None:
        """End a request, if it has not ended. Its listener hears `Done`."""
        with self._lock:
            if self._open:
                self._loop.call_soon_threadsafe(self._cancel, number)

    # In the router's own thread

    async def _start(self) -> None:
        for engine in self._engines:
            engine.open()
        self._looking = asyncio.create_task(self._look())

    async def _end_all(self) -> None:
        self._looking.cancel()
        tasks = [self._looking, *self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for engine in self._engines:
            await engine.close()

    async def _look(self) -> None:
        while True:
            found = [await engine.trouble() for engine in self._engines]
            self._troubles = [each for each in found if each]
            await asyncio.sleep(LOOK)

    def _begin(self, running: Running) -> None:
        task = asyncio.create_task(self._serve(running))
        self._tasks[running.number] = task
        task.add_done_callback(lambda task: self._ended(running, task))
        self._count()

    def _cancel(self, number: int) -> None:
        if (task := self._tasks.get(number)) is not None:
            task.cancel()

    def _ended(self, running: Running, task: asyncio.Task[Reason]) -> None:
        """Tell how a request ended. A task that is cancelled before it begins runs no code of its own."""
        reason: Reason = "cancelled"
        message = ""
        if not task.cancelled():
            error = task.exception()
            if error is None:
                reason = task.result()
            elif isinstance(error, TimeoutError) and running.ask.deadline is not None:
                reason, message = "deadline", f"The time of {running.ask.deadline:g} s is over."
            else:
                gone = isinstance(error, Gone) or (isinstance(error, Failed) and error.status == 503)
                reason, message = "unavailable" if gone else "error", str(error)
                if not isinstance(error, Gone | Failed):
                    log.error("Request %d failed.", running.number, exc_info=error)
        with self._lock:
            del self._running[running.number]
        del self._tasks[running.number]
        self._count()
        self.watch.ended(running, reason)
        running.tell(Done(reason, message))

    def _count(self) -> None:
        with self._lock:
            states = Counter(each.state for each in self._running.values())
        self.watch.queued(states["waiting"], states["decode"])

    async def _serve(self, running: Running) -> Reason:
        async with asyncio.timeout(running.ask.deadline), self._rows:
            return await self._relay.serve(running)
