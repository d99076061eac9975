"""`pdtrim serve`: an exported pair behind OpenAI's HTTP interface."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pdtrim_pl.errors import UserError
from pdtrim_pl.serving.devices import devices_of
from pdtrim_pl.serving.engine.engine import Engine
from pdtrim_pl.serving.engine.frames import check_host
from pdtrim_pl.serving.generate import load_export_tokenizer, stop_ids_of
from pdtrim_pl.serving.hosts import shared_secret


@contextmanager
def needs_server() -> Iterator[None]:
    """Say how to install the server if an import of it fails.

    Raises:
        UserError: it is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn"):
            raise
        raise UserError(
            "`pdtrim serve` needs Starlette and uvicorn, which are not installed: `pip install 'pdtrim_pl[serve]'`."
        ) from error


def serve(
    export: Path, *, host: str = "127.0.0.1", port: int = 8000, name: str | None = None, device: str = "auto",
    max_batch: int = 8, max_waiting: int = 64, deadline: float | None = None,
) -> None:  # fmt: skip
    """Serve until the process is told to end.

    Args:
        export: directory of the pair.
        host: address to listen on. Others than those of this machine need a `shared_secret`, which callers send as
            their API key.
        port: port to listen on.
        name: of the model, as callers see it; by default that of the unpruned model.
        device: see `devices_of`.
        max_batch: most requests that decode runs at once.
        max_waiting: most requests in the queue; one more gets status 503.
        deadline: seconds for a request; none by default.

    Raises:
        UserError: a setting cannot be served, or the server is not installed.
        RuntimeError: a worker fails again and again.
    """
    with needs_server():
        import uvicorn

        from pdtrim_pl.serving.web.app import Served, application
    secret = shared_secret()
    check_host(host, secret)
    tokenizer = load_export_tokenizer(export)
    with Engine(
        export, devices=devices_of(device), max_batch=max_batch, max_waiting=max_waiting, secret=secret
    ) as engine:  # fmt: skip
        served = Served(
            engine, tokenizer, name or engine.pair.plan.model.name_or_path, stop_ids_of(export, tokenizer), deadline,
            secret,
        )  # fmt: skip
        uvicorn.run(application(served), host=host, port=port, timeout_graceful_shutdown=10)
