"""One vLLM server, as the router asks it: token ids in, token ids out."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import httpx2

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import Stage

CONNECT = 5.0
"""Seconds in which a connection must stand."""
ANSWER = 10.0
"""Seconds in which an engine must say how it is."""
PAUSE = 0.5
"""Seconds between two tries while an engine starts."""
KEY_VARIABLE = "VLLM_API_KEY"
"""Environment variable in which vLLM's server finds the key that it asks for."""
WITHHELD = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Settings that vLLM takes from the checkpoint's generation configuration unless a request has them."""


class Gone(RuntimeError):
    """An engine cannot be reached."""


class Failed(RuntimeError):
    """An engine answered with an error."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status, also of an error that comes in a stream."""


@dataclass(frozen=True)
class Model:
    """What an engine serves."""

    name: str
    context: int
    """Most tokens of a prompt and its response."""


class Upstream:
    """One of the two engines.

    Args:
        stage: the half that it serves.
        url: of the server, such as `http://127.0.0.1:8100`.
        key: that the server asks for; None for none.
    """

    def __init__(self, stage: Stage, url: str, key: str | None = None) -> None:
        self.stage, self.url = stage, url.rstrip("/")
        self._name = f"The {stage} engine at {self.url}"
        self._settings: dict[str, Any] = {
            "base_url": self.url,
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
            "trust_env": False,  # a proxy of this environment does not know the engines
        }
        self._model = ""
        self._client: httpx2.AsyncClient | None = None

    def wait(self, seconds: float, check: Callable[[], None]) -> Model:
        """Wait until the engine serves, and read what.

        Args:
            seconds: to wait at most.
            check: called before every try; may raise.

        Raises:
            UserError: it does not answer in time, or not as vLLM does.
        """
        end = time.monotonic() + seconds
        try:
            client = httpx2.Client(**self._settings, timeout=httpx2.Timeout(ANSWER, connect=CONNECT))
        except httpx2.InvalidURL as error:
            raise UserError(f"{self.url!r} is no address of a {self.stage} engine: {error}.") from error
        with client:
            while True:
                check()
                try:
                    response = client.get("/v1/models")
                    break
                except httpx2.UnsupportedProtocol as error:
                    raise UserError(f"{self.url!r} is no address of a {self.stage} engine: {error}") from error
                except httpx2.TransportError as error:
                    if time.monotonic() > end:
                        raise UserError(
                            f"{self._name} did not answer within {seconds:g} s ({_said(error)}): start it with "
                            f"`python -m pdtrim_pl.serving.vllm {self.stage}`."
                        ) from error
                time.sleep(PAUSE)
        if response.status_code == HTTPStatus.UNAUTHORIZED:
            raise UserError(f"{self._name} asks for a key: give it in the environment variable {KEY_VARIABLE}.")
        try:
            told = response.raise_for_status().json()["data"][0]
            self._model = told["id"]
            return Model(told["id"], int(told["max_model_len"]))
        except (httpx2.HTTPStatusError, ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"{self._name} does not tell its model as vLLM does: {_said(error)}.") from error

    def open(self) -> None:
        """Make the client for requests; in the event loop that sends them."""
        timeout = httpx2.Timeout(None, connect=CONNECT)  # a request may wait in the engine's queue for long
        limits = httpx2.Limits(max_connections=None)  # the router has a limit of its own
        self._client = httpx2.AsyncClient(**self._settings, timeout=timeout, limits=limits)

    async def close(self) -> None:
        """Close all connections. The engine ends the requests of those that it serves."""
        if self._client is not None:
            await self._client.aclose()

    async def trouble(self) -> str:
        """Why the engine cannot serve now; empty if it can."""
        assert self._client is not None
        try:
            response = await self._client.get("/health", timeout=ANSWER)
        except httpx2.TransportError as error:
            return f"{self._name} cannot be reached: {_said(error)}"
        return "" if response.is_success else f"{self._name} is not healthy: status {response.status_code}"

    async def whole(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Complete a prompt; returns the whole answer.

        Raises:
            Gone: the engine cannot be reached.
            Failed: it refuses, or fails.
        """
        assert self._client is not None
        with self._reached():
            response = await self._client.post("/v1/completions", json=self._body(body))
        self._check(response)
        answer = response.json()
        assert isinstance(answer, dict)
        return answer

    async def pieces(self, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Complete a prompt; yields the choice of each event. Closing the iterator ends the request.

        Raises:
            Gone: the engine cannot be reached, or its answer breaks off.
            Failed: it refuses, or fails.
        """
        assert self._client is not None
        with self._reached():
            asked = self._client.stream("POST", "/v1/completions", json={**self._body(body), "stream": True})
            async with asked as response:
                if not response.is_success:
                    await response.aread()
                    self._check(response)
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        return
                    if not line.startswith("data: "):
                        continue  # an empty line, or a comment that keeps the connection alive
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise self._failed(event, HTTPStatus.INTERNAL_SERVER_ERROR)
                    for choice in event["choices"]:
                        yield choice
        raise Gone(f"{self._name} ended its answer early.")

    def _body(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": self._model, "return_token_ids": True, "ignore_eos": True, **WITHHELD, **body}

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except httpx2.TransportError as error:
            raise Gone(f"{self._name} cannot be reached: {_said(error)}.") from error

    def _check(self, response: httpx2.Response) -> None:
        if response.is_success:
            return
        try:
            told = response.json()
        except ValueError:
            told = {"error": {"message": response.text[:200]}}
        raise self._failed(told, response.status_code)

    def _failed(self, told: Any, status: int) -> Failed:
        error = told.get("error") if isinstance(told, dict) else None
        error = error if isinstance(error, dict) else {"message": told}
        code = error.get("code")
        return Failed(f"{self._name} failed: {error.get('message')}", code if isinstance(code, int) else status)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
