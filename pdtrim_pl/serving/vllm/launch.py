"""Starts vLLM's OpenAI server with one half of a pair."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdtrim_pl.plan import Stage
from pdtrim_pl.serving.vllm.greeting import Address, secret_for
from pdtrim_pl.serving.vllm.pair import ServedPair

SERVER = "vllm.entrypoints.openai.api_server"


@dataclass(frozen=True)
class Half:
    """Settings of one engine."""

    export: Path
    stage: Stage
    kv: str = "127.0.0.1:14579"
    """HOST:PORT on which the decode engine receives keys and values; further tensor-parallel ranks use the ports behind
    it. The prefill engine sends there if a request names no other address."""
    room: int = 4 * 2**30
    """Bytes of arrived keys and values that the decode engine holds at most."""
    timeout: float = 60.0
    """Seconds that a request waits for them."""
    name: str | None = None
    """Name of the model in the API; by default that of the export's directory."""


def transfer_config(half: Half) -> dict[str, Any]:
    """The value of vLLM's `--kv-transfer-config`."""
    return {
        "kv_connector": "PairConnector",
        "kv_connector_module_path": "pdtrim_pl.serving.vllm.connector",
        "kv_role": "kv_producer" if half.stage == "prefill" else "kv_consumer",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {
            "export": str(half.export.resolve()), "address": half.kv, "room": half.room, "timeout": half.timeout,
        },
    }  # fmt: skip


def command(half: Half, others: Sequence[str]) -> list[str]:
    """The command that starts the engine.

    Args:
        half: which half, and where its keys and values go.
        others: further options of vLLM's server, such as `--port 8100`.

    Raises:
        UserError: the export cannot be served so.
    """
    pair = ServedPair.read(half.export, half.stage)
    secret_for(Address.of(half.kv).host)
    decode = ["--no-enable-prefix-caching"] if half.stage == "decode" else []
    return [
        sys.executable, "-m", SERVER, "--model", str((half.export / half.stage).resolve()), "--served-model-name",
        half.name or half.export.resolve().name, "--dtype", pair.policy.kv.dtype, *decode, "--kv-transfer-config",
        json.dumps(transfer_config(half)), *others,
    ]  # fmt: skip


def start(half: Half, others: Sequence[str]) -> None:
    """Become the engine: this process is replaced by vLLM's server."""
    words = command(half, others)
    os.execv(words[0], words)
