"""Servers that the tests start, and the pair that they serve."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

ROOT = Path(__file__).parents[2]
OURS = os.environ.get("PDTRIM_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
"""Python of the project's own environment, which exports the pair."""
SERVER = {
    "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip
COMMON = "--host 127.0.0.1 --enforce-eager --max-model-len 640 --max-num-seqs 8 --block-size 32"
OWN = {"prefill": "--max-num-batched-tokens 48", "decode": "--num-gpu-blocks-override 24"}
"""Prompts are prefilled in chunks, and the decode engine's cache is too small for all requests: some are preempted."""


@dataclass(frozen=True)
class Served:
    """Two engines that run."""

    boundary: str
    expected: list[dict]
    urls: dict[str, str]
    """`prefill`, `decode` and `router` -> where it listens."""

    def metric(self, name: str, of: str = "decode") -> float:
        """A counter of the decode engine, or of another."""
        lines = urlopen(f"{self.urls[of]}/metrics").read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def free_port(count: int = 1) -> int:
    """A port that is free, with those behind it: `count` in all."""
    while True:
        with ExitStack() as held:
            probes = [held.enter_context(socket.socket()) for _ in range(count)]
            probes[0].bind(("127.0.0.1", 0))
            first = int(probes[0].getsockname()[1])
            try:
                for offset, probe in enumerate(probes[1:], start=1):
                    probe.bind(("127.0.0.1", first + offset))
            except OSError:
                continue
            return first


def make_pair(folder: Path, boundary: str, *options: str) -> list[dict]:
    """Write the export `pair`; returns prompts with what is expected of them."""
    make = [OURS, str(ROOT / "tests" / "with_vllm" / "make_pair.py"), str(folder), boundary, *options]
    subprocess.run(make, env={**os.environ, **SERVER}, check=True, timeout=300)
    return list(json.loads((folder / "expected.json").read_text()))


@contextmanager
def served_by_engines(
    folder: Path, boundary: str, make: Sequence[str] = (), ranks: int = 1, own: Mapping[str, str] = OWN
) -> Iterator[Served]:
    """A new pair in two engines, with a router in front of them.

    Args:
        folder: for the pair and the logs.
        boundary: of the pair.
        make: further options of `make_pair.py`.
        ranks: tensor-parallel ranks of each engine.
        own: options of vLLM's server for each engine.
    """
    expected = make_pair(folder, boundary, *make)
    export, kv, urls = str(folder / "pair"), f"127.0.0.1:{free_port(ranks)}", {}
    with ExitStack() as held:
        for stage in ("decode", "prefill"):
            port = free_port()
            urls[stage] = f"http://127.0.0.1:{port}"
            command = [sys.executable, "-m", "pdtrim_pl.serving.vllm", stage, "--export", export]
            command += ["--kv", kv, "--port", str(port), *COMMON.split(), *own[stage].split()]
            command += ["--tensor-parallel-size", str(ranks)]
            held.enter_context(process(command, folder / f"{stage}.log"))
        port = free_port()
        urls["router"] = f"http://127.0.0.1:{port}"
        command = [OURS, "-m", "pdtrim_pl", "serve", "--engine", "vllm", "--export", export, "--name", "pair"]
        command += ["--prefill", urls["prefill"], "--decode", urls["decode"], "--port", str(port)]
        router = held.enter_context(process(command, folder / "router.log"))
        wait_until_healthy(urls["router"], router, folder)
        yield Served(boundary, expected, urls)


@contextmanager
def process(command: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """A server that ends with the block."""
    with log.open("wb") as out:
        started = subprocess.Popen(command, env={**os.environ, **SERVER}, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield started
    finally:
        started.terminate()
        started.wait(60)


def wait_until_healthy(url: str, server: subprocess.Popen, logs: Path, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.poll() is None, f"it died; see the logs in {logs}"
        try:
            urlopen(f"{url}/health", timeout=5).close()
        except (URLError, OSError):
            time.sleep(1)
        else:
            return
    raise AssertionError(f"{url} did not start within {seconds} s; see the logs in {logs}")
