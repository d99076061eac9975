"""The decode worker of the engine: takes prompts over and generates from many at once, or scores known responses.

Shapes: R response tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from multiprocessing.connection import Connection, wait

import torch
from torch import Tensor
from typing_extensions import override

from pdtrim_pl.errors import UserError
from pdtrim_pl.models.context import usable_context
from pdtrim_pl.plan import PairManifest
from pdtrim_pl.serving.engine import messages as say
from pdtrim_pl.serving.engine.batch import Row, RunningBatch
from pdtrim_pl.serving.engine.frames import FramedLink, LinkError, TransferRefused
from pdtrim_pl.serving.engine.handover import Handover, receive_handover
from pdtrim_pl.serving.engine.worker import LARGEST_MANIFEST, PATIENCE, Worker, agree_on_pair, told
from pdtrim_pl.staged.cache import KVCache
from pdtrim_pl.staged.decoding import PickToken
from pdtrim_pl.staged.model import StagedCausalLM

ARRIVED_AT_MOST = 2
"""Prompts that wait in decode's memory until a row is free. Beyond that, prefill waits while it sends."""


class DecodeWorker(Worker):
    """Takes prompts over from prefill and generates from many at once."""

    def __init__(
        self, spec: say.WorkerSpec, staged: StagedCausalLM, manifest: PairManifest, parent: Connection
    ) -> None:
        super().__init__(spec, staged, manifest, parent)
        self._expected: dict[int, say.Expect] = {}
        self._forgotten: set[int] = set()
        self._told = threading.Condition()
        """Guards `_expected`; notified when a request is announced."""
        self._arrived: queue.Queue[tuple[int, Handover]] = queue.Queue(ARRIVED_AT_MOST)
        self._wake, self._waker = socket.socketpair()
        self._wake.setblocking(False)
        self._speaking = threading.Lock()
        self._listener = socket.create_server((self.spec.host, 0))

    @override
    def serve(self) -> None:
        threading.Thread(target=self._receive, name="receive", daemon=True).start()
        self._say(say.Ready(self._listener.getsockname()[:2]))
        batch = RunningBatch(self.staged)
        while True:
            if not batch.rows and self._arrived.empty():
                wait([self.parent, self._wake])
            with contextlib.suppress(BlockingIOError):
                self._wake.recv(4096)
            while self.parent.poll():
                self._obey(self.parent.recv(), batch)
            started = time.perf_counter()
            self._admit(batch)
            if batch.rows:
                steps = [(row.request, token, row.ended) for row, token in batch.step()]
                self._report(steps, time.perf_counter() - started)

    def _obey(self, command: say.Command, batch: RunningBatch) -> None:
        if isinstance(command, say.Expect):
            with self._told:
                self._expected[command.request] = command
                self._told.notify_all()
        else:
            assert isinstance(command, say.Forget)
            self._forgotten.add(command.request)
            batch.leave({command.request})

    def _admit(self, batch: RunningBatch) -> None:
        """Take up prompts that have arrived, as long as there are free rows."""
        new: list[tuple[Row, KVCache]] = []
        first: list[tuple[int, int, bool]] = []
        while len(batch.rows) + len(new) < self.spec.max_batch:
            try:
                request, handover = self._arrived.get_nowait()
            except queue.Empty:
                break
            expected = self._taken(request)
            if expected is None:
                continue
            if expected.forced is not None:
                self._say(self._forced(request, handover, expected.forced))
                continue
            row = self._row(expected, int(handover.tokens))
            if self.plan.boundary == "prefill":
                row.take(row.fed)
                first.append((request, row.fed, row.ended))
            if not row.ended:
                new.append((row, handover.cache))
        self._report(first, None)
        batch.join(new)

    def _forced(self, request: int, handover: Handover, response: tuple[int, ...]) -> say.Logits:
        """Run a known response in one pass."""
        started = time.perf_counter()
        fed = torch.tensor([response[:-1]], device=self.device, dtype=torch.int64)
        parts: list[Tensor] = []
        if self.plan.boundary == "decode":
            fed = torch.cat([handover.tokens[:, None], fed], dim=1)
        else:
            assert handover.logits is not None
            parts.append(handover.logits[:, None])
        if fed.shape[1]:
            out = self.staged.decode(fed, handover.cache, keep_cache=False)
            parts.append(self.staged.logits(out.hidden).float())
        values = torch.cat(parts, dim=1)[0].cpu().numpy()
        return say.Logits(request, values, fed.shape[1], time.perf_counter() - started)

    def _taken(self, request: int) -> say.Expect | None:
        """What was asked with a prompt that has arrived; None if nobody waits for it any more.

        Prompts arrive in order, so what was asked with earlier ones that never came is forgotten.
        """
        with self._told:
            expected = self._expected[request]
            self._expected = {number: each for number, each in self._expected.items() if number > request}
        wanted = request not in self._forgotten
        self._forgotten = {number for number in self._forgotten if number > request}
        return expected if wanted else None

    def _row(self, expected: say.Expect, first: int) -> Row:
        chosen = self.plan.boundary == "prefill"
        pick: PickToken = expected.sampling.picker(start=int(chosen))
        return Row(expected.request, pick, frozenset(expected.stop_ids), expected.max_new_tokens, first)

    def _report(self, steps: list[tuple[int, int, bool]], seconds: float | None) -> None:
        if steps:
            tokens = [(request, token) for request, token, _ in steps]
            self._say(say.Tokens(tokens, [request for request, _, ended in steps if ended], seconds))

    # Threads that receive

    def _receive(self) -> None:
        """Accept connections. Each has a thread, so that one that says nothing keeps no other one waiting."""
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._hear, args=(connection,), name="hear", daemon=True).start()

    @torch.inference_mode()
    def _hear(self, connection: socket.socket) -> None:
        """Take over what a connection brings, until it ends or is refused."""
        context = usable_context(self.staged.model.config.to_dict())
        blocks = [self.policy.block_bytes(block, context) for block in self.plan.decode]
        largest = max(LARGEST_MANIFEST, *blocks)  # that of a prompt that fills the context
        link = FramedLink(connection, self.spec.key, bytes.fromhex(self.manifest.id), largest)
        try:
            agree_on_pair(link, self.manifest, first=False)
            while True:
                self._take(link)
        except (TransferRefused, UserError, ValueError) as error:
            self._lose(None, error)
        except LinkError:
            pass  # prefill has ended, or has closed the connection after a fault of its own
        finally:
            link.close()

    def _take(self, link: FramedLink) -> None:
        request = link.next_request()
        with self._told:
            if not self._told.wait_for(lambda: request in self._expected, PATIENCE):
                raise TransferRefused(f"Request {request} arrived, and the engine knows nothing of it.")
            expected = self._expected[request]
        try:
            handover, _ = receive_handover(link, self.plan, self.policy, self.device)
            if handover.cache.lengths.tolist() != [expected.handled]:
                raise TransferRefused(
                    f"Request {request} has prompts of {handover.cache.lengths.tolist()} tokens, and one of "
                    f"{expected.handled} was announced."
                )
        except LinkError as error:
            self._lose(request, error)
            raise LinkError(str(error)) from error  # told already
        self._arrived.put((request, handover))
        self._waker.send(b"x")

    def _lose(self, request: int | None, error: Exception) -> None:
        with contextlib.suppress(OSError):
            self._say(say.Lost(request, told(error)))

    def _say(self, report: say.Report) -> None:
        with self._speaking:
            self.parent.send(report)
