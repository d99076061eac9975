"""Two vLLM engines of one pair, the router in front of them, and what our own runtime generates from that pair."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from servers import COMMON, OURS, OWN, Served, free_port, make_pair, process, wait_until_healthy


@pytest.fixture(scope="module", params=["prefill", "decode"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("pair")
    expected = make_pair(folder, request.param)
    export, kv, urls = str(folder / "pair"), f"127.0.0.1:{free_port()}", {}
    with ExitStack() as held:
        for stage in ("decode", "prefill"):
            port = free_port()
            urls[stage] = f"http://127.0.0.1:{port}"
            command = [sys.executable, "-m", "pdtrim_pl.serving.vllm", stage, "--export", export]
            command += ["--kv", kv, "--port", str(port), *COMMON.split(), *OWN[stage].split()]
            held.enter_context(process(command, folder / f"{stage}.log"))
        port = free_port()
        urls["router"] = f"http://127.0.0.1:{port}"
        command = [OURS, "-m", "pdtrim_pl", "serve", "--engine", "vllm", "--export", export, "--name", "pair"]
        command += ["--prefill", urls["prefill"], "--decode", urls["decode"], "--port", str(port)]
        router = held.enter_context(process(command, folder / "router.log"))
        wait_until_healthy(urls["router"], router, folder)
        yield Served(request.param, expected, urls)
