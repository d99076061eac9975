"""Two vLLM engines of one pair, over HTTP, and what our own runtime generates from that pair."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

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

    def metric(self, name: str) -> float:
        """A counter of the decode engine."""
        lines = urlopen(f"{self.urls['decode']}/metrics").read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session", params=["prefill", "decode"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("pair")
    environment = {**os.environ, **SERVER}
    make = [OURS, str(ROOT / "tests" / "with_vllm" / "make_pair.py"), str(folder), request.param]
    subprocess.run(make, env=environment, check=True, timeout=300)
    kv, urls, engines = f"127.0.0.1:{free_port()}", {}, []
    try:
        for stage in ("decode", "prefill"):
            port = free_port()
            urls[stage] = f"http://127.0.0.1:{port}"
            command = [sys.executable, "-m", "pdtrim_pl.serving.vllm", stage, "--export", str(folder / "pair")]
            command += ["--kv", kv, "--port", str(port), *COMMON.split(), *OWN[stage].split()]
            with (folder / f"{stage}.log").open("wb") as log:
                engines.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        for url in urls.values():
            wait_until_healthy(url, engines)
        yield Served(request.param, json.loads((folder / "expected.json").read_text()), urls)
    finally:
        for engine in engines:
            engine.terminate()
        for engine in engines:
            engine.wait(60)


def wait_until_healthy(url: str, engines: list[subprocess.Popen], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert all(engine.poll() is None for engine in engines), "an engine died; see its log"
        try:
            urlopen(f"{url}/health", timeout=5).close()
        except (URLError, OSError):
            time.sleep(1)
        else:
            return
    raise AssertionError(f"{url} did not start within {seconds} s")
