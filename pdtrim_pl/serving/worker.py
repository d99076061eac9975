"""A worker process: loads one stage's checkpoint, connects to the other worker, serves until the parent is gone.

Shapes: B batch, P prompt tokens, R response tokens, T new tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from torch import Tensor

from pdtrim_pl.errors import UserError, is_out_of_memory
from pdtrim_pl.plan import KVRetentionPolicy, PairManifest
from pdtrim_pl.serving import messages as say
from pdtrim_pl.serving.handshake import agree_on_pair
from pdtrim_pl.serving.transport import (
    Handover,
    HandoverSender,
    Link,
    LinkError,
    open_link,
    receive_handover,
    settle,
    wire_dtype,
)
from pdtrim_pl.staged.decoding import DecodeLoop
from pdtrim_pl.staged.model import StagedCausalLM

# The parent kills a worker long before this if the other one is gone. This only limits workers without a parent.
LINK_TIMEOUT = timedelta(hours=1)
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
"""The network interface that is closed to other hosts."""


def run_worker(spec: say.WorkerSpec, parent: Connection) -> None:
    """The main function of a worker process.

    Args:
        spec: which stage to serve, and where.
        parent: gives commands and takes reports; the worker exits when it closes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and stops its workers
    os.dup2(sys.stderr.fileno(), 1)  # standard output is for the generated text alone
    # Both workers are on this host; a cluster may have set another interface.
    os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK
    try:
        manifest = PairManifest.load(spec.export)
        staged, policy = _load(spec)
        link = open_link(spec.stage, torch.device(spec.device), spec.backend, spec.meeting_point, LINK_TIMEOUT)
        agree_on_pair(link, manifest)
        worker: type[StageWorker] = PrefillWorker if spec.stage == "prefill" else DecodeWorker
        parent.send(say.Ready())
        worker(staged, policy, link, torch.device(spec.device), parent).serve()
        dist.destroy_process_group()
    except Exception as error:  # the process ends here: the parent must hear of every error
        with contextlib.suppress(ConnectionError):  # the parent may be gone itself
            parent.send(_last_words(error))
        sys.exit(1)


class StageWorker(ABC):
    """Base of both workers: a stage, its end of the wire, and the parent that gives commands."""

    def __init__(
        self, staged: StagedCausalLM, policy: KVRetentionPolicy, link: Link, device: torch.device, parent: Connection
    ) -> None:
        self.staged, self.plan, self.policy = staged, staged.plan, policy
        self.link, self.device, self.parent = link, device, parent

    @torch.inference_mode()
    def serve(self) -> None:
        """Do what the parent asks until it is gone."""
        while True:
            try:
                command: say.Command = self.parent.recv()
            except EOFError:
                return
            self.obey(command)

    @abstractmethod
    def obey(self, command: say.Command) -> None:
        """Carry out one command."""

    def ids(self, rows: say.Rows) -> Tensor:
        """Token ids or a mask on the worker's device, [rows, T]."""
        return torch.tensor(rows, device=self.device)


class PrefillWorker(StageWorker):
    """Encodes prompts and sends their KV to the decode worker."""

    def obey(self, command: say.Command) -> None:
        assert isinstance(command, say.Encode)
        started = time.perf_counter()
        prompt_ids, valid = self.ids(command.prompt_ids), self.ids(command.prompt_mask).bool()
        handled = prompt_ids.shape[1] - (self.plan.boundary == "decode")
        ids, valid = prompt_ids[:, :handled], valid[:, :handled]
        with HandoverSender(self.link, self.plan, self.policy) as sender:
            sender.begin(valid.sum(dim=1))
            out = self.staged.prefill(ids, valid, on_kv=sender.send_block)
            tokens, logits = prompt_ids[:, -1], None
            if self.plan.boundary == "prefill":
                logits = self.staged.logits(out.hidden[:, -1])
                tokens = command.sampling.picker()(logits)
            settle(self.device)
            seconds = time.perf_counter() - started
            traffic = sender.end(tokens, logits if command.with_logits else None)
        self.parent.send(say.Encoded(traffic.kv_bytes, traffic.header_bytes, seconds, traffic.seconds))


class DecodeWorker(StageWorker):
    """Generates responses, or runs given ones, from what prefill sends."""

    def obey(self, command: say.Command) -> None:
        if isinstance(command, say.Cancel):
            return  # it arrived after the last token of its request
        handover, _ = receive_handover(self.link, self.plan, self.policy, self.device)
        started = time.perf_counter()
        if isinstance(command, say.Continue):
            loop = self._loop(handover, command)
            del handover  # the loop has a copy: the prompt's KV must not be held twice for a whole response
            steps = self._generate(loop, chosen=self.plan.boundary == "prefill")
        else:
            assert isinstance(command, say.Force)
            steps = self._force(handover, command)
        self.parent.send(say.Decoded(time.perf_counter() - started, steps))

    def _loop(self, handover: Handover, command: say.Continue) -> DecodeLoop:
        chosen = self.plan.boundary == "prefill"
        return DecodeLoop(
            self.staged,
            handover.cache,
            room=command.max_new_tokens,
            first=handover.tokens if chosen else None,
            last_prompt=handover.tokens,
            pick=command.sampling.picker(start=int(chosen)),
            stop_ids=command.stop_ids,
        )

    def _generate(self, loop: DecodeLoop, *, chosen: bool) -> int:
        """Send the tokens as they come; returns how many steps of decode they took."""
        produced = 0
        for token in loop:
            produced += 1
            self.parent.send(say.Tokens(token.tolist()))
            if self.parent.poll():
                break  # during a request the parent sends nothing but Cancel
        return produced - chosen

    def _force(self, handover: Handover, command: say.Force) -> int:
        response, valid = self.ids(command.response_ids), self.ids(command.response_mask).bool()
        fed, fed_valid = response[:, :-1], valid[:, :-1]
        parts = []
        if self.plan.boundary == "decode":
            fed = torch.cat([handover.tokens[:, None], fed], dim=1)
            fed_valid = torch.cat([torch.ones_like(valid[:, :1]), fed_valid], dim=1)
        else:
            assert handover.logits is not None
            parts.append(handover.logits[:, None])
        if fed.shape[1]:
            out = self.staged.decode(fed, handover.cache, fed_valid, keep_cache=False)
            parts.append(self.staged.logits(out.hidden).float())
        self.parent.send(say.Logits(torch.cat(parts, dim=1).cpu().numpy()))
        return int(fed.shape[1])


def _last_words(error: Exception) -> say.Failed:
    if isinstance(error, UserError):
        return say.Failed("setting", str(error))
    if is_out_of_memory(error):
        ways = "Give a shorter prompt, or another `device`"
        return say.Failed("fault", f"memory ran out ({str(error).splitlines()[0]}). {ways}.")
    return say.Failed("link" if isinstance(error, LinkError) else "fault", f"{type(error).__name__}: {error}")


def _load(spec: say.WorkerSpec) -> tuple[StagedCausalLM, KVRetentionPolicy]:
    # Imported here, after the process has set up its output and signals.
    from transformers.utils.logging import disable_progress_bar

    from pdtrim_pl.export.load import load_stage

    disable_progress_bar()
    staged = load_stage(
        spec.export, spec.stage, device=spec.device, attn_implementation=spec.attn_implementation
    ).eval()
    policy = staged.policy
    assert policy is not None
    if staged.model.dtype != wire_dtype(policy):
        raise UserError(
            f"`kv.dtype` of {spec.export / 'kv_policy.json'} is {policy.kv.dtype!r}, and the {spec.stage} checkpoint "
            f"is in {staged.model.dtype}. Export the pair again."
        )
    return staged, policy
