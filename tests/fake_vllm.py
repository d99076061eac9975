"""Two vLLM servers of a pair, as far as the router sees them: the same requests, answers and faults, and no model.

A folder stands for the wire between both engines: each transfer is a file with the positions that were sent.

    python tests/fake_vllm.py -m pdtrim_pl.serving.vllm prefill|decode --export DIR --host H --port N [...]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

TOKENS = 400
"""Length of a response that nothing ends."""


def says(prompt: list[int], answer: list[int]) -> list[int]:
    """What the pair says: tokens of an answer, with the prompt in between."""
    return list(islice(cycle([*answer, *prompt]), TOKENS))


@dataclass
class FakeVllm:
    """One engine."""

    stage: str
    boundary: str
    pair: str
    """Id of the pair that it serves."""
    wire: Path
    answer: list[int]
    context: int = 512
    key: str | None = None
    pause: float = 0.0
    """Seconds before each piece of a stream, and before a whole answer."""
    lose: int = 0
    """Transfers that will be lost."""
    broken_after: int | None = None
    """Tokens after which a stream breaks off without an end."""
    refuses: dict[str, Any] = field(default_factory=dict)
    """An error that is answered instead, with its `code`."""
    connector: bool = True
    healthy: bool = True
    bodies: list[dict[str, Any]] = field(default_factory=list)
    """What was asked."""
    active: int = 0
    aborted: int = 0
    """Requests whose caller has left."""

    def application(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self.models),
                Route("/v1/completions", self.completions, methods=["POST"]),
            ]
        )

    async def health(self, request: Request) -> HttpResponse:
        return HttpResponse(status_code=200 if self.healthy else 503)

    async def models(self, request: Request) -> HttpResponse:
        if not self._admitted(request):
            return JSONResponse({"error": "Unauthorized"}, 401)
        return JSONResponse({"object": "list", "data": [{"id": self.stage, "max_model_len": self.context}]})

    async def completions(self, request: Request) -> HttpResponse:
        if not self._admitted(request):
            return JSONResponse({"error": "Unauthorized"}, 401)
        body = await request.json()
        self.bodies.append(body)
        if self.refuses:
            return JSONResponse({"error": self.refuses}, self.refuses["code"])
        if body.get("model") != self.stage:
            return _error("The model does not exist.", 404)
        if len(body["prompt"]) + body["max_tokens"] > self.context:
            return _error("The prompt is too long.", 400)
        if self.stage == "prefill":
            return await self._encode(request, body)
        return StreamingResponse(self._events(body), media_type="text/event-stream")

    async def _encode(self, request: Request, body: dict[str, Any]) -> HttpResponse:
        """As under vLLM's `with_cancellation`, the request ends when its caller leaves."""
        assert not body.get("stream")
        self.active += 1
        try:
            end = asyncio.get_running_loop().time() + self.pause
            while asyncio.get_running_loop().time() < end:
                if await request.is_disconnected():
                    self.aborted += 1
                    return HttpResponse()
                await asyncio.sleep(0.01)
        finally:
            self.active -= 1
        prompt, params = body["prompt"], body.get("kv_transfer_params") or {}
        handed = None
        if params.get("do_remote_decode") and self.connector:
            name = params["transfer_id"]
            self.lose -= 1
            if self.lose < 0:
                sent = prompt if self.boundary == "prefill" else prompt[:-1]
                (self.wire / name).write_text(json.dumps(sent))
            handed = {"do_remote_prefill": True, "transfer_id": name, "pair": self.pair}
        tokens = says(prompt, self.answer)[: body["max_tokens"]]
        choice = {
            "index": 0, "text": "?", "finish_reason": "length", "stop_reason": None, "prompt_token_ids": prompt,
            "token_ids": tokens,
        }  # fmt: skip
        return JSONResponse({"object": "text_completion", "choices": [choice], "kv_transfer_params": handed})

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        self.active += 1
        over = False
        try:
            tokens = self._arrived(body)
            if tokens is None:
                error = {"message": "Internal server error", "type": "InternalServerError", "param": None, "code": 500}
                yield f"data: {json.dumps({'error': error})}\n\n"
            else:
                async for line in self._pieces(body, tokens):
                    yield line
            yield "data: [DONE]\n\n"
            over = True
        finally:
            self.active -= 1
            self.aborted += not over

    async def _pieces(self, body: dict[str, Any], tokens: list[int]) -> AsyncIterator[str]:
        """One, two, three, one, ... tokens in an event, as a busy engine joins them."""
        stops = [at for at, token in enumerate(tokens) if token in body["stop_token_ids"]]
        ended = bool(stops) and stops[0] < body["max_tokens"]
        tokens = tokens[: stops[0] + 1 if ended else body["max_tokens"]]
        at, sizes = 0, cycle([1, 2, 3])
        while at < len(tokens):
            await asyncio.sleep(self.pause)
            if self.broken_after is not None and at >= self.broken_after:
                raise ConnectionError("the engine has died")
            piece = tokens[at : at + next(sizes)]
            at += len(piece)
            reason = None if at < len(tokens) else "stop" if ended else "length"
            choice = {"index": 0, "text": "?", "finish_reason": reason, "token_ids": piece}
            yield f": keep-alive\n\ndata: {json.dumps({'choices': [choice]})}\n\n"

    def _arrived(self, body: dict[str, Any]) -> list[int] | None:
        """What decode says if it has the keys and values of all tokens but the last; None if they are lost."""
        *handled, last = body["prompt"]
        if handled:
            file = self.wire / (body.get("kv_transfer_params") or {}).get("transfer_id", "none")
            if not file.is_file() or json.loads(file.read_text()) != handled:
                return None
            file.unlink()
        if self.boundary == "decode":
            return says(body["prompt"], self.answer)
        first, *rest = says(handled, self.answer)
        assert last == first, "prefill's token does not follow the prompt"
        return rest

    def _admitted(self, request: Request) -> bool:
        return self.key is None or request.headers.get("authorization") == f"Bearer {self.key}"


def _error(message: str, code: int) -> HttpResponse:
    return JSONResponse({"error": {"message": message, "type": "BadRequestError", "param": None, "code": code}}, code)


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("-m")
    parser.add_argument("stage")
    for name in ("--export", "--host", "--port", "--kv", "--max-num-seqs", "--max-model-len"):
        parser.add_argument(name, required=True)
    own = parser.parse_args()
    assert own.m == "pdtrim_pl.serving.vllm"
    assert os.environ["PDTRIM_SECRET"]
    plan, manifest = (json.loads((Path(own.export) / name).read_text()) for name in ("stage_plan.json", "pair.json"))
    wire = Path(os.environ["FAKE_WIRE"])
    (wire / f"{own.stage}.pid").write_text(str(os.getpid()))
    fake = FakeVllm(
        own.stage, plan["boundary"], manifest["id"], wire, json.loads(os.environ["FAKE_ANSWER"]),
        context=int(own.max_model_len), key=os.environ["VLLM_API_KEY"],
    )  # fmt: skip
    uvicorn.run(fake.application(), host=own.host, port=int(own.port), log_level="error")


if __name__ == "__main__":
    main()
