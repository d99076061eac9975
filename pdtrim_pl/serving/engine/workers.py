"""The two worker processes of the engine. Each ends when the engine closes its pipe."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import sys
import threading
import time
from abc import ABC, abstractmethod
from functools import partial
from multiprocessing.connection import Connection, wait

import torch
from typing_extensions import override

from pdtrim_pl.errors import UserError, is_out_of_memory
from pdtrim_pl.models.context import usable_context
from pdtrim_pl.plan import PairManifest
from pdtrim_pl.plan.agreement import agree
from pdtrim_pl.serving.engine import messages as say
from pdtrim_pl.serving.engine.batch import Row, RunningBatch
from pdtrim_pl.serving.engine.frames import FramedLink, TransferRefused
from pdtrim_pl.serving.transport import Handover, HandoverSender, LinkError, receive_handover, settle
from pdtrim_pl.staged.cache import KVCache
from pdtrim_pl.staged.decoding import PickToken
from pdtrim_pl.staged.model import StagedCausalLM

LARGEST_MANIFEST = 2**24
"""Bytes. A manifest has about 150 bytes for each file of the export."""
PATIENCE = 30.0
"""Seconds in which a request that arrives must have been announced by the engine."""
ARRIVED_AT_MOST = 2
"""Prompts that wait in decode's memory until a row is free. Beyond that, prefill waits while it sends."""


def run_worker(spec: say.WorkerSpec, parent: Connection) -> None:
    """The main function of a worker process.

    Args:
        spec: which stage to serve, and where.
        parent: gives commands and takes reports.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the engine handles Ctrl-C and stops its workers
    os.dup2(sys.stderr.fileno(), 1)  # standard output is for results
    try:
        from transformers.utils.logging import disable_progress_bar

        from pdtrim_pl.export.load import load_stage

        disable_progress_bar()
        manifest = PairManifest.load(spec.export)
        staged = load_stage(spec.export, spec.stage, device=spec.device).eval()
        worker: type[_Worker] = PrefillWorker if spec.stage == "prefill" else DecodeWorker
        with torch.inference_mode():
            worker(spec, staged, manifest, parent).serve()
    except (EOFError, BrokenPipeError):
        return  # the engine is gone
    except Exception as error:  # the process ends here: the engine must hear of every error
        with contextlib.suppress(ConnectionError):
            parent.send(say.Failed(_told(error), isinstance(error, UserError)))
        sys.exit(1)


class _Worker(ABC):
    """One half of the pair, which does what the engine asks."""

    def __init__(
        self, spec: say.WorkerSpec, staged: StagedCausalLM, manifest: PairManifest, parent: Connection
    ) -> None:
        assert staged.policy is not None
        self.spec, self.staged, self.manifest, self.parent = spec, staged, manifest, parent
        self.plan, self.policy = staged.plan, staged.policy

    @abstractmethod
    def serve(self) -> None:
        """Do what the engine asks until it is gone."""


class PrefillWorker(_Worker):
    """Encodes prompts, one at a time, and sends each block's keys and values as soon as they are there."""

    _address: say.Address | None = None
    _link: FramedLink | None = None

    @override
    def serve(self) -> None:
        self.parent.send(say.Ready(None))
        while True:
            command: say.Command = self.parent.recv()
            if isinstance(command, say.Connect):
                self._address = command.address
                self._connect()
                self.parent.send(say.Connected())
            else:
                assert isinstance(command, say.Encode)
                self._serve(command)

    def _serve(self, command: say.Encode) -> None:
        try:
            self.parent.send(self._encode(command))
        except (LinkError, FloatingPointError, RuntimeError) as error:
            self._close()  # decode must not take what comes next for the rest of this
            self.parent.send(say.Lost(command.request, _told(error)))

    def _encode(self, command: say.Encode) -> say.Encoded:
        if self._link is None:
            self._connect()
        assert self._link is not None
        started = time.perf_counter()
        ids = torch.tensor([command.prompt_ids], device=self.spec.device)
        handled = ids.shape[1] - (self.plan.boundary == "decode")
        self._link.begin(command.request)
        with HandoverSender(self._link, self.plan, self.policy) as sender:
            sender.begin(torch.tensor([handled]))
            valid = torch.ones(1, handled, dtype=torch.bool, device=self.spec.device)
            out = self.staged.prefill(ids[:, :handled], valid, on_kv=sender.send_block)
            tokens = ids[:, -1]
            if self.plan.boundary == "prefill":
                tokens = command.sampling.picker()(self.staged.logits(out.hidden[:, -1]))
            settle(torch.device(self.spec.device))
            seconds = time.perf_counter() - started
            traffic = sender.end(tokens)
        return say.Encoded(command.request, traffic.kv_bytes, traffic.header_bytes, seconds)

    def _connect(self) -> None:
        self._close()
        assert self._address is not None, "the engine says where decode listens first"
        try:
            connection = socket.create_connection(self._address, timeout=PATIENCE)
        except OSError as error:
            raise LinkError(f"The decode worker at {self._address} cannot be reached: {error}") from error
        self._link = FramedLink(connection, self.spec.key, bytes.fromhex(self.manifest.id), LARGEST_MANIFEST)
        _agree(self._link, self.manifest, first=True)

    def _close(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None


class DecodeWorker(_Worker):
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
            self._admit(batch)
            if batch.rows:
                steps = [(row.request, token, row.ended) for row, token in batch.step()]
                self._report(steps)

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
            row = self._row(expected, int(handover.tokens))
            if self.plan.boundary == "prefill":
                row.take(row.fed)
                first.append((request, row.fed, row.ended))
            if not row.ended:
                new.append((row, handover.cache))
        self._report(first)
        batch.join(new)

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

    def _report(self, steps: list[tuple[int, int, bool]]) -> None:
        if steps:
            tokens = [(request, token) for request, token, _ in steps]
            self._say(say.Tokens(tokens, [request for request, _, ended in steps if ended]))

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
            _agree(link, self.manifest, first=False)
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
            handover, _ = receive_handover(link, self.plan, self.policy, torch.device(self.spec.device))
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
            self._say(say.Lost(request, _told(error)))

    def _say(self, report: say.Report) -> None:
        with self._speaking:
            self.parent.send(report)


def _agree(link: FramedLink, manifest: PairManifest, *, first: bool) -> None:
    """Refuse another pair on both sides; see `agree`."""
    agree(partial(link.hello, first=first), manifest)


def _told(error: Exception) -> str:
    if is_out_of_memory(error):
        return f"memory ran out ({str(error).splitlines()[0]})"
    return str(error) if isinstance(error, UserError | LinkError) else f"{type(error).__name__}: {error}"
