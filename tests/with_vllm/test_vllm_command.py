"""`pdtrim serve --engine vllm`: one command starts both engines and the router, and ends with them."""

from __future__ import annotations

import json
import signal
import sys

import pytest
from servers import COMMON, OURS, free_port, make_pair, process, wait_until_healthy

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")


def test_one_command_serves_a_pair_and_ends_with_both_engines(tmp_path) -> None:
    each = make_pair(tmp_path, "prefill")[2]
    port, args = free_port(), COMMON.partition("--host 127.0.0.1 ")[2].split()
    command = [OURS, "-m", "pdtrim_pl", "serve", "--engine", "vllm", "--export", str(tmp_path / "pair")]
    command += ["--vllm_python", sys.executable, "--vllm_args", json.dumps(args), "--port", str(port)]
    with process(command, tmp_path / "serve.log") as server:
        wait_until_healthy(f"http://127.0.0.1:{port}", server, tmp_path)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as router:
            (model,) = router.models.list()
            found = router.completions.create(
                model=model.id, prompt=each["prompt"], max_tokens=len(each["tokens"]), temperature=0
            )
        assert found.choices[0].text == each["answer"]
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
