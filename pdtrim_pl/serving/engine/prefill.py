"""The prefill worker of the engine: encodes prompts and hands them over."""

from __future__ import annotations

import socket
import time

import torch
from typing_extensions import override

from pdtrim_pl.serving.engine import messages as say
from pdtrim_pl.serving.engine.frames import FramedLink, LinkError
from pdtrim_pl.serving.engine.handover import HandoverSender, settle
from pdtrim_pl.serving.engine.worker import LARGEST_MANIFEST, PATIENCE, Worker, agree_on_pair, told


class PrefillWorker(Worker):
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
            self.parent.send(say.Lost(command.request, told(error)))

    def _encode(self, command: say.Encode) -> say.Encoded:
        if self._link is None:
            self._connect()
        assert self._link is not None
        started = time.perf_counter()
        ids = torch.tensor([command.prompt_ids], device=self.device)
        handled = ids.shape[1] - (self.plan.boundary == "decode")
        self._link.begin(command.request)
        with HandoverSender(self._link, self.plan, self.policy) as sender:
            sender.begin(torch.tensor([handled]))
            valid = torch.ones(1, handled, dtype=torch.bool, device=self.device)
            out = self.staged.prefill(ids[:, :handled], valid, on_kv=sender.send_block)
            tokens, logits = ids[:, -1], None
            if self.plan.boundary == "prefill":
                logits = self.staged.logits(out.hidden[:, -1])
                tokens = command.sampling.picker()(logits)
            settle(self.device)
            seconds = time.perf_counter() - started
            traffic = sender.end(tokens, logits if command.with_logits else None)
        header = traffic.header_bytes + self._link.framing_bytes
        return say.Encoded(command.request, traffic.kv_bytes, header, seconds, traffic.seconds)

    def _connect(self) -> None:
        self._close()
        assert self._address is not None, "the engine says where decode listens first"
        try:
            connection = socket.create_connection(self._address, timeout=PATIENCE)
        except OSError as error:
            raise LinkError(f"The decode worker at {self._address} cannot be reached: {error}") from error
        self._link = FramedLink(connection, self.spec.key, bytes.fromhex(self.manifest.id), LARGEST_MANIFEST)
        agree_on_pair(self._link, self.manifest, first=True)

    def _close(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None
