"""A real HTTP server in a thread of its own, for tests."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def listening(application: Any, log_level: str = "error") -> Iterator[int]:
    """The port of an application that is served."""
    import uvicorn

    config = uvicorn.Config(application, log_level=log_level, lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as port:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [port]})
        thread.start()
        try:
            until(lambda: server.started)
            yield int(port.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()


def until(found: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "it did not become true in time"
        time.sleep(0.01)
