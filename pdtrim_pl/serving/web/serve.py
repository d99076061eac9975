"""`pdtrim serve`: an exported pair behind OpenAI's HTTP interface."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pdtrim_pl.errors import UserError
from pdtrim_pl.serving.devices import devices_of
from pdtrim_pl.serving.engine.engine import Engine
from pdtrim_pl.serving.engine.frames import check_host
from pdtrim_pl.serving.engine.interface import TokenEngine
from pdtrim_pl.serving.generate import load_export_tokenizer, stop_ids_of
from pdtrim_pl.serving.hosts import shared_secret

SERVER = ("starlette", "uvicorn", "httpx2")
"""Packages of the extra `serve`."""


@dataclass(frozen=True)
class Front:
    """Settings of the HTTP server, whatever engine is behind it."""

    host: str = "127.0.0.1"
    """Address to listen on. Others than those of this machine need a `shared_secret`, which callers send as their API
    key."""
    port: int = 8000
    name: str | None = None
    """Of the model, as callers see it; by default that of the unpruned model."""
    max_batch: int = 8
    """Most requests that run at once."""
    max_waiting: int = 64
    """Most requests in the queue; one more gets status 503."""
    deadline: float | None = None
    """Seconds for a request; none by default."""


def serve(export: Path, front: Front, *, device: str = "auto") -> None:
    """Serve with our own engine until the process is told to end.

    Args:
        export: directory of the pair.
        front: settings of the server.
        device: see `devices_of`.

    Raises:
        UserError: a setting cannot be served, or the server is not installed.
        RuntimeError: a worker fails again and again.
    """
    with (
        _bound(front) as port,
        Engine(
            export, devices=devices_of(device), max_batch=front.max_batch, max_waiting=front.max_waiting,
            secret=shared_secret(),
        ) as engine,
    ):  # fmt: skip
        _run(engine, front, port)


def serve_vllm(export: Path, front: Front, python: str, args: Sequence[str] = ()) -> None:
    """Start both vLLM engines, and serve with them until the process is told to end, or an engine ends.

    Args:
        export: directory of the pair.
        front: settings of the server.
        python: of the environment with vLLM and this package.
        args: further options of vLLM's server, for both engines.

    Raises:
        UserError: a setting cannot be served, the server is not installed, or an engine has ended.
    """
    with _needs_server():
        from pdtrim_pl.serving.router.engines import VllmEngines
        from pdtrim_pl.serving.router.router import Router
    with (
        _bound(front) as port,
        VllmEngines(export, python, args, front.max_batch) as engines,
        Router(
            export, engines.upstreams, max_batch=front.max_batch, max_waiting=front.max_waiting, check=engines.check
        ) as router,
    ):  # fmt: skip
        _run(router, front, port, engines.when_one_ends)
        engines.check()


def serve_running_vllm(export: Path, front: Front, prefill: str, decode: str) -> None:
    """Serve with two vLLM engines that run elsewhere, until the process is told to end.

    Args:
        export: directory of the pair, a copy of that which the engines serve.
        front: settings of the server.
        prefill: URL of the prefill engine.
        decode: URL of the decode engine.

    Raises:
        UserError: a setting cannot be served, the server is not installed, or an engine does not answer.
    """
    with _needs_server():
        from pdtrim_pl.serving.router.router import Router
        from pdtrim_pl.serving.router.upstream import KEY_VARIABLE, Upstream
    key = os.environ.get(KEY_VARIABLE)
    engines = Upstream("prefill", prefill, key), Upstream("decode", decode, key)
    with (
        _bound(front) as port,
        Router(export, engines, max_batch=front.max_batch, max_waiting=front.max_waiting) as router,
    ):
        _run(router, front, port)


@contextmanager
def _bound(front: Front) -> Iterator[socket.socket]:
    """The server's port, taken before the engines start; nobody can connect yet.

    Raises:
        UserError: it cannot be taken, or the server is not installed.
    """
    check_host(front.host, shared_secret())
    with _needs_server():
        import uvicorn  # noqa: F401

        from pdtrim_pl.serving.web import app  # noqa: F401
    with socket.socket(socket.AF_INET6 if ":" in front.host else socket.AF_INET) as port:
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            port.bind((front.host, front.port))
        except OSError as error:
            raise UserError(
                f"{front.host}:{front.port} cannot be listened on ({error}): give another `port`."
            ) from error
        yield port


@contextmanager
def _needs_server() -> Iterator[None]:
    """Say how to install the server if an import of it fails.

    Raises:
        UserError: it is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in SERVER:
            raise
        raise UserError(
            f"`pdtrim serve` needs {', '.join(SERVER)}, and {error.name} is not installed: `pip install "
            "'pdtrim_pl[serve]'`."
        ) from error


def _run(
    engine: TokenEngine, front: Front, port: socket.socket,
    when_over: Callable[[Callable[[], None]], None] | None = None,
) -> None:  # fmt: skip
    """Run the HTTP server until it is told to end.

    Args:
        engine: answers the requests.
        front: settings of the server.
        port: on which it listens.
        when_over: calls what it is given when the server must end.
    """
    import uvicorn

    from pdtrim_pl.serving.web.app import Served, application

    export = engine.pair.path
    tokenizer = load_export_tokenizer(export)
    served = Served(
        engine, tokenizer, front.name or engine.pair.plan.model.name_or_path, stop_ids_of(export, tokenizer),
        front.deadline, shared_secret(),
    )  # fmt: skip
    server = uvicorn.Server(uvicorn.Config(application(served), timeout_graceful_shutdown=10))

    def end() -> None:
        server.should_exit = True

    if when_over is not None:
        when_over(end)
    with suppress(KeyboardInterrupt):
        server.run(sockets=[port])
