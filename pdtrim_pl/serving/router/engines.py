"""Both vLLM engines of a pair as child processes of this one, on this machine."""

from __future__ import annotations

import logging
import os
import secrets
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn, Self

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import STAGES, Stage
from pdtrim_pl.serving.hosts import SECRET_VARIABLE, shared_secret
from pdtrim_pl.serving.router.upstream import KEY_VARIABLE, PAUSE, Upstream
from pdtrim_pl.serving.vllm.pair import ServedPair

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
STDERR = 2
GRACE = 20.0
"""Seconds in which an engine must end when it is told to."""


class VllmEngines:
    """Two engines that end with this object, on free ports of this machine. It is a context manager.

    Their output goes to standard error. They share a key and a secret that no other process is told.

    Args:
        export: directory of the pair.
        python: of the environment with vLLM and this package.
        args: further options of vLLM's server, for both engines.
        max_batch: most requests that an engine runs at once.

    Raises:
        UserError: vLLM cannot serve the pair, or there is no such python.
    """

    def __init__(self, export: Path, python: str, args: Sequence[str] = (), max_batch: int = 8) -> None:
        ServedPair.read(export, "prefill")  # refuses what vLLM cannot serve before anything starts
        ports = free_ports(3)
        self._key = secrets.token_hex()
        prefill, decode = (
            Upstream(stage, f"http://{LOOPBACK}:{port}", self._key) for stage, port in zip(STAGES, ports, strict=False)
        )
        self.upstreams = prefill, decode
        self._commands = {
            stage: [
                python, "-m", "pdtrim_pl.serving.vllm", stage, "--export", str(export), "--kv",
                f"{LOOPBACK}:{ports[-1]}", "--host", LOOPBACK, "--port", str(port), "--max-num-seqs",
                str(max_batch), *args,
            ]
            for stage, port in zip(STAGES, ports, strict=False)
        }  # fmt: skip
        self._processes: dict[Stage, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        secret = shared_secret() or secrets.token_hex()
        environment = {**os.environ, KEY_VARIABLE: self._key, SECRET_VARIABLE: secret}
        self._before = signal.signal(signal.SIGTERM, _leave)
        try:
            for stage, command in self._commands.items():
                log.info("%s", shlex.join(command))
                # A session of its own: Ctrl-C reaches this process, which ends the engines after the last answer.
                self._processes[stage] = subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=STDERR,
                    start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            self._stop()
            raise UserError(f"`vllm_python` cannot be run: {error}.") from error
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def check(self) -> None:
        """Look whether both engines run.

        Raises:
            UserError: one has ended.
        """
        for stage, process in self._processes.items():
            if (code := process.poll()) is not None:
                raise UserError(
                    f"The {stage} engine ended with status {code}; its own output above tells why. Its command: "
                    f"{shlex.join(self._commands[stage])}"
                )

    def when_one_ends(self, tell: Callable[[], None]) -> None:
        """Call `tell` in a thread of its own as soon as an engine has ended."""

        def watch() -> None:
            while all(process.poll() is None for process in self._processes.values()):
                time.sleep(PAUSE)
            tell()

        threading.Thread(target=watch, name="vllm engines", daemon=True).start()

    def _stop(self) -> None:
        try:
            for process in self._processes.values():
                process.terminate()
            for process in self._processes.values():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
        finally:
            for process in self._processes.values():
                with suppress(ProcessLookupError):  # nothing of it is left
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            signal.signal(signal.SIGTERM, self._before)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    probes = [socket.create_server((LOOPBACK, 0)) for _ in range(count)]
    try:
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """End this process as an exception does, so that the engines end with it."""
    raise SystemExit(128 + number)
