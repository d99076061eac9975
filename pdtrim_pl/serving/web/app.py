"""The HTTP application: models, completions and chat completions as OpenAI's, health, and metrics for Prometheus."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from pdtrim_pl.errors import UserError
from pdtrim_pl.serving.engine.interface import TokenEngine
from pdtrim_pl.serving.engine.requests import Overloaded
from pdtrim_pl.serving.engine.response import Ended, Response
from pdtrim_pl.serving.generate import decoded
from pdtrim_pl.serving.web import asks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGEST_BODY = 16 * 2**20
"""Bytes."""
STATUS = {"deadline": 504, "error": 500, "cancelled": 503, "unavailable": 503}
"""Reasons for which a request without a stream has no answer -> HTTP status."""
LOOK = 1.0
"""Seconds between looks whether the caller of a request is still there."""


@dataclass(frozen=True, eq=False)
class Served:
    """What the application serves."""

    engine: TokenEngine
    tokenizer: PreTrainedTokenizerBase
    name: str
    """Of the model, as callers see it."""
    stop_ids: tuple[int, ...]
    deadline: float | None = None
    """Seconds for a request."""
    secret: str | None = None
    """What callers send as their API key; None asks for none."""


def application(served: Served) -> Starlette:
    """The application around an engine that runs."""
    page = _Pages(served)
    routes = [
        Route("/v1/models", page.models),
        Route("/v1/completions", page.completions, methods=["POST"]),
        Route("/v1/chat/completions", page.chat, methods=["POST"]),
        Route("/health", page.health),
        Route("/metrics", page.metrics),
    ]
    errors: Mapping[Any, Any] = {
        UserError: lambda _, error: _error(400, str(error)),
        Overloaded: lambda _, error: _error(503, str(error), {"Retry-After": "1"}),
        HTTPException: lambda _, error: _error(error.status_code, error.detail),
        RuntimeError: lambda _, error: _error(503, str(error)),
    }
    return Starlette(routes=routes, exception_handlers=errors)


class _Pages:
    def __init__(self, served: Served) -> None:
        self.served, self.engine = served, served.engine
        self._numbers = itertools.count(1)

    async def models(self, request: Request) -> HttpResponse:
        self._admit(request)
        model = {"id": self.served.name, "object": "model", "created": 0, "owned_by": "pdtrim"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, request: Request) -> HttpResponse:
        trouble = self.engine.trouble
        return JSONResponse({"status": trouble or "ok"}, 503 if trouble else 200)

    async def metrics(self, request: Request) -> HttpResponse:
        return PlainTextResponse(self.engine.watch.metrics(), media_type="text/plain; version=0.0.4")

    async def completions(self, request: Request) -> HttpResponse:
        return await self._answer(request, asks.completion, chat=False)

    async def chat(self, request: Request) -> HttpResponse:
        return await self._answer(request, asks.chat, chat=True)

    def _admit(self, request: Request) -> None:
        """Refuse a caller without the shared secret, if there is one."""
        secret = self.served.secret
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if secret is not None and not hmac.compare_digest(given.encode(), secret.encode()):
            raise HTTPException(401, "Give the shared secret as API key.")

    async def _answer(
        self, request: Request, read: Callable[[Mapping[str, Any], PreTrainedTokenizerBase], asks.Body], *, chat: bool
    ) -> HttpResponse:
        self._admit(request)
        content = await self._content(request)
        if content.get("model") not in (None, self.served.name):
            raise HTTPException(404, f"There is no model {content['model']!r}; this server has {self.served.name!r}.")
        body = read(content, self.served.tokenizer)
        answers = _Answers(self.served, body)
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{next(self._numbers)}", "created": int(time.time()),
            "object": ("chat.completion" if chat else "text_completion"), "model": self.served.name,
        }  # fmt: skip
        if body.stream:
            return StreamingResponse(_events(answers, head, chat), media_type="text/event-stream")
        return await _whole(request, answers, head, chat)

    async def _content(self, request: Request) -> Mapping[str, Any]:
        data = b""
        async for chunk in request.stream():
            data += chunk
            if len(data) > LARGEST_BODY:
                raise HTTPException(413, f"The body has more than {LARGEST_BODY:,} bytes.")
        try:
            content = json.loads(data)
        except ValueError as error:
            raise HTTPException(400, f"The body is not JSON: {error}.") from error
        if not isinstance(content, dict):
            raise HTTPException(400, "The body is not a JSON object.")
        return content


class _Answers:
    """The responses of one HTTP request, one for each of its prompts, as they come."""

    def __init__(self, served: Served, body: asks.Body) -> None:
        self.body = body
        self.ends: dict[int, Ended] = {}
        self._heard: asyncio.Queue[tuple[int, str | Ended]] = asyncio.Queue()
        self._responses: list[Response] = []
        loop = asyncio.get_running_loop()
        engine, tokenizer = served.engine, served.tokenizer
        wanted = [body.ask(at, engine.pair, served.stop_ids, served.deadline) for at in range(len(body.prompts))]
        try:
            for at, ask in enumerate(wanted):

                def tell(event: str | Ended, at: int = at) -> None:
                    with suppress(RuntimeError):  # the server has ended
                        loop.call_soon_threadsafe(self._heard.put_nowait, (at, event))

                response = Response(engine, ask, lambda ids: decoded(tokenizer, ids), body.stop, tell)
                self._responses.append(response)
        except BaseException:
            self.cancel()
            raise

    async def next(self, timeout: float | None = None) -> tuple[int, str | Ended]:
        """The next event, and the prompt that it is of."""
        at, event = await asyncio.wait_for(self._heard.get(), timeout)
        if isinstance(event, Ended):
            self.ends[at] = event
        return at, event

    @property
    def over(self) -> bool:
        """Whether every response has ended."""
        return len(self.ends) == len(self._responses)

    def cancel(self) -> None:
        """End what has not ended."""
        for response in self._responses:
            response.cancel()

    def usage(self) -> dict[str, int]:
        """Counts of tokens."""
        prompt = sum(map(len, self.body.prompts))
        tokens = sum(end.tokens for end in self.ends.values())
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


async def _whole(request: Request, answers: _Answers, head: Mapping[str, Any], chat: bool) -> HttpResponse:
    """One answer at the end. If the caller leaves, the request ends."""
    texts = [""] * len(answers.body.prompts)
    try:
        while not answers.over:
            try:
                at, event = await answers.next(LOOK)
            except TimeoutError:
                if await request.is_disconnected():
                    raise HTTPException(499, "The caller has left.") from None
                continue
            if isinstance(event, str):
                texts[at] += event
    finally:
        answers.cancel()
    for end in answers.ends.values():
        if end.reason in STATUS:
            raise HTTPException(STATUS[end.reason], end.message or f"The request was {end.reason}.")
    choices = [
        {"index": at, "finish_reason": answers.ends[at].reason, "logprobs": None,
         **({"message": {"role": "assistant", "content": text}} if chat else {"text": text})}
        for at, text in enumerate(texts)
    ]  # fmt: skip
    return JSONResponse({**head, "choices": choices, "usage": answers.usage()})


async def _events(answers: _Answers, head: Mapping[str, Any], chat: bool) -> AsyncIterator[str]:
    """Server-sent events. If the caller leaves, the request ends."""
    if chat:
        head = {**head, "object": "chat.completion.chunk"}

    def line(choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {json.dumps({**head, 'choices': choices, **more}, ensure_ascii=False)}\n\n"

    def choice(at: int, text: str | None, reason: str | None) -> dict[str, Any]:
        said = {"delta": {} if text is None else {"content": text}} if chat else {"text": text or ""}
        return {"index": at, "finish_reason": reason, "logprobs": None, **said}

    try:
        if chat:
            yield line([{"index": 0, "finish_reason": None, "delta": {"role": "assistant", "content": ""}}])
        while not answers.over:
            at, event = await answers.next()
            if isinstance(event, str):
                yield line([choice(at, event, None)])
            elif event.reason in STATUS:
                message = event.message or f"The request was {event.reason}."
                yield f"data: {json.dumps({'error': {'message': message, 'type': event.reason}})}\n\n"
                return
            else:
                yield line([choice(at, None, event.reason)])
        if answers.body.usage:
            yield line([], usage=answers.usage())
        yield "data: [DONE]\n\n"
    finally:
        answers.cancel()


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> HttpResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers)
