"""The router: each request goes to a vLLM engine of the prefill half, and then to one of the decode half."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import PairManifest
from pdtrim_pl.serving.engine.requests import Ask, Done, Listener, Overloaded, Reason, Running, Token
from pdtrim_pl.serving.engine.watch import Watch
from pdtrim_pl.serving.exported import ExportedPair
from pdtrim_pl.serving.router.upstream import Failed, Gone, Upstream

log = logging.getLogger(__name__)

LOOK = 2.0
"""Seconds between looks whether the engines are healthy."""
UNKNOWN = ("header_bytes", "restarts")
"""Counters of `Watch` that only the engines could count."""
SEEDS = 2**63
"""Number of seeds that vLLM takes."""


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
        self._id = PairManifest.load(export).id
        self._begins = self.pair.plan.boundary == "prefill"
        """Whether the prefill engine's token begins the response."""
        self._engines, (self._prefill, self._decode) = engines, engines
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
        """Queue a request; returns its number, for `cancel`. Arguments and errors as for `Engine.submit`."""
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
            elif isinstance(error, TimeoutError):
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
        ask, first = running.ask, list[int]()
        async with asyncio.timeout(ask.deadline), self._rows:
            transfer = await self._encode(running, first)
            if any(token in ask.stop_ids for token in first):
                return "stop"
            if len(first) == ask.max_new_tokens:
                return "length"
            try:
                return await self._continue(running, first, transfer)
            except Failed as error:
                if running.tokens > len(first) or error.status < 500:
                    raise
                self.watch.lost()
                log.warning("Request %d is sent to the engines once more. %s", running.number, error)
            return await self._continue(running, first, await self._encode(running, first))

    async def _encode(self, running: Running, first: list[int]) -> Mapping[str, Any] | None:
        """Let the prefill engine encode the prompt.

        Args:
            running: the request.
            first: gets the token that begins the response, unless it has it from an earlier transfer.

        Returns:
            What the decode engine must know of the transfer; None if there is none.
        """
        ask, running.state = running.ask, "prefill"
        self._count()
        if not self._begins and len(ask.prompt_ids) == 1:
            return None  # decode computes the last token of a prompt, and there is no other
        body = {"prompt": ask.prompt_ids, "max_tokens": 1, **_sampling(ask, 0)}
        alone = self._begins and ask.max_new_tokens == 1  # decode has nothing to do
        if not alone:
            body["kv_transfer_params"] = {"do_remote_decode": True, "transfer_id": uuid.uuid4().hex}
        began = time.monotonic()
        answer = await self._prefill.whole(body)
        sent = 0 if alone else self.pair.policy.sent_bytes(self.pair.plan, len(ask.prompt_ids))
        self.watch.encoded(sent, 0, time.monotonic() - began)
        transfer = None if alone else self._transfer(answer)
        if self._begins and not first:
            first += answer["choices"][0]["token_ids"]
            self._token(running, first[0])
        return transfer

    def _transfer(self, answer: Mapping[str, Any]) -> Mapping[str, Any]:
        found = answer.get("kv_transfer_params")
        if not found or "pair" not in found:
            raise Failed(
                f"The prefill engine at {self._prefill.url} hands nothing over: start it with `python -m "
                "pdtrim_pl.serving.vllm prefill`.", 400,
            )  # fmt: skip
        if found["pair"] != self._id:
            raise Failed(
                f"The prefill engine at {self._prefill.url} serves pair {found['pair'][:12]}, and the router "
                f"{self._id[:12]}: start all of them from copies of one export.", 400,
            )  # fmt: skip
        assert isinstance(found, dict)
        return found

    async def _continue(self, running: Running, first: list[int], transfer: Mapping[str, Any] | None) -> Reason:
        """Tell the tokens of the decode engine, which goes on behind `first`."""
        ask, running.state, reason = running.ask, "decode", None
        self._count()
        body = {
            "prompt": [*ask.prompt_ids, *first], "max_tokens": ask.max_new_tokens - len(first),
            "stop_token_ids": list(ask.stop_ids), **_sampling(ask, 1),
        }  # fmt: skip
        if transfer is not None:
            body["kv_transfer_params"] = transfer
        async with aclosing(self._decode.pieces(body)) as pieces:
            async for piece in pieces:
                for token in piece.get("token_ids") or ():
                    self._token(running, token)
                reason = piece.get("finish_reason") or reason
        if reason in ("stop", "length"):
            return "stop" if reason == "stop" else "length"
        raise Failed(f"The decode engine at {self._decode.url} ended the request: {reason}.", 500)

    def _token(self, running: Running, token: int) -> None:
        if running.first is None:
            running.first = time.monotonic()
            self.watch.first_token(running.first - running.began)
        running.tokens += 1
        running.tell(Token(token))


def _sampling(ask: Ask, part: int) -> dict[str, Any]:
    """How vLLM chooses tokens. Each engine begins its random numbers anew, so each `part` needs a seed of its own."""
    wanted = ask.sampling
    found: dict[str, Any] = {
        "temperature": wanted.temperature, "top_p": wanted.top_p, "top_k": wanted.top_k or 0,
    }  # fmt: skip
    if wanted.temperature > 0:
        found["seed"] = (2 * wanted.seed + part) % SEEDS
    return found
