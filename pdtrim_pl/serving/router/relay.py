"""The way of one request: to the prefill engine for a token and a transfer, then to the decode engine for the rest."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import aclosing
from typing import Any

from pdtrim_pl.plan import PairManifest
from pdtrim_pl.serving.engine.requests import Ask, Reason, Running, Token
from pdtrim_pl.serving.engine.watch import Watch
from pdtrim_pl.serving.exported import ExportedPair
from pdtrim_pl.serving.router.upstream import Failed, Upstream

log = logging.getLogger(__name__)

SEEDS = 2**63
"""Number of seeds that vLLM takes."""


class Relay:
    """Takes requests to both engines.

    Args:
        pair: that the engines serve.
        engines: the prefill and the decode engine.
        watch: hears of times and bytes.
        moved: called when a request has moved on to the next engine.
    """

    def __init__(
        self, pair: ExportedPair, engines: tuple[Upstream, Upstream], watch: Watch, moved: Callable[[], None]
    ) -> None:
        self._pair, (self._prefill, self._decode), self._watch, self._moved = pair, engines, watch, moved
        self._id = PairManifest.load(pair.path).id
        self._begins = pair.plan.boundary == "prefill"
        """Whether the prefill engine's token begins the response."""

    async def serve(self, running: Running) -> Reason:
        """Answer a request, and tell its tokens.

        Raises:
            Gone: an engine cannot be reached.
            Failed: an engine fails, or lost the prompt's keys and values twice.
        """
        ask, first = running.ask, list[int]()
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
            self._watch.lost()
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
        self._moved()
        if not self._begins and len(ask.prompt_ids) == 1:
            return None  # decode computes the last token of a prompt, and there is no other
        body = {"prompt": ask.prompt_ids, "max_tokens": 1, **_sampling(ask, 0)}
        alone = self._begins and ask.max_new_tokens == 1  # decode has nothing to do
        if not alone:
            body["kv_transfer_params"] = {"do_remote_decode": True, "transfer_id": uuid.uuid4().hex}
        began = time.monotonic()
        answer = await self._prefill.whole(body)
        sent = 0 if alone else self._pair.policy.sent_bytes(self._pair.plan, len(ask.prompt_ids))
        self._watch.encoded(sent, 0, time.monotonic() - began)
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
        self._moved()
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
            self._watch.first_token(running.first - running.began)
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
