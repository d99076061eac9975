"""Processes of a test's own, and none of them is left behind.

They are forked from one process that has imported what most of them need: an import costs seconds, a fork nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GRACE_SECONDS = 20.0
"""How long the others may run on when one process has failed: they may want to say what they saw."""
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "deepspeed",
        "functorch.compile",
        "torch.utils.cpp_extension",
        "pdtrim_pl.cli.lightning_cli",
        "pdtrim_pl.serving.engine.process",
        "callbacks",
        "transformers.models.llama.modeling_llama",
    ]
)


def start(function: Callable[..., None], *args: Any, **variables: str) -> ForkServerProcess:
    """Start `function(*args)` in a process and a group of its own, in this environment and these `variables`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **variables}
    process = SERVER.Process(target=_call, args=(environment, function, args))
    process.start()
    return process


def end(processes: Sequence[ForkServerProcess], timeout: float) -> list[int | None]:
    """Wait for all, or until one has failed; whoever still runs after a time of grace is killed. Their exit codes."""
    limit = time.monotonic() + timeout
    try:
        while running := [process for process in processes if process.exitcode is None]:
            if any(process.exitcode for process in processes):
                limit = min(limit, time.monotonic() + GRACE_SECONDS)
            if not wait([process.sentinel for process in running], max(limit - time.monotonic(), 0.0)):
                break
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.exitcode is None and process.pid is not None:
                os.killpg(process.pid, signal.SIGKILL)
            process.join()


def run_workers(function: Callable[..., None], *args: Any, folder: Path, timeout: float, processes: int = 2) -> None:
    """Run `function(rank, folder / "store", *args)` in so many processes, which meet at the store."""
    workers = [start(function, rank, folder / "store", *args) for rank in range(processes)]
    assert end(workers, timeout) == [0] * processes


def run_ranks(name: str, *args: str, folder: Path, timeout: float, processes: int = 2) -> None:
    """Run `tests/NAME` in so many processes as torchrun would; their output goes to `folder/log`."""
    log = folder / "log"
    log.touch()
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "NODE_RANK": "0"}
    ranks = {"WORLD_SIZE": str(processes), **shared} if processes > 1 else {}
    started = [
        start(_run_script, name, args, log, **ranks, **({"LOCAL_RANK": str(rank)} if ranks else {}))
        for rank in range(processes)
    ]
    assert end(started, timeout) == [0] * processes, log.read_text()[-5000:]


def run_script(name: str, *args: str, folder: Path, timeout: float) -> None:
    """Run `tests/NAME` in a new interpreter, where Lightning starts the other processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / name), *args]
    with (folder / "log").open("w") as log:
        run = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            status = run.wait(timeout)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)  # the second process too
    assert status == 0, (folder / "log").read_text()[-5000:]


def _call(environment: dict[str, str], function: Callable[..., None], args: Sequence[Any]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    function(*args)


def _run_script(name: str, args: Sequence[str], log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    script = str(ROOT / "tests" / name)
    sys.argv = [script, *args]
    sys.path.insert(0, str(ROOT / "tests"))
    runpy.run_path(script, run_name="__main__")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
