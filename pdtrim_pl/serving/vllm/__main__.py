"""`python -m pdtrim_pl.serving.vllm prefill|decode --export DIR`: vLLM's OpenAI server with one half of a pair."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pdtrim_pl.errors import UserError
from pdtrim_pl.serving.vllm.launch import Half, start


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pdtrim_pl.serving.vllm", description=__doc__, allow_abbrev=False,
        epilog="Further options go to vLLM's server, such as --host, --port, --max-model-len, --tensor-parallel-size.",
    )  # fmt: skip
    parser.add_argument("stage", choices=["prefill", "decode"])
    parser.add_argument("--export", type=Path, required=True, help="directory of the exported pair")
    parser.add_argument("--kv", default=Half.kv, help="HOST:PORT on which decode receives (default: %(default)s)")
    parser.add_argument("--kv-room", type=int, default=Half.room, help="bytes that decode holds (%(default)s)")
    parser.add_argument(
        "--kv-timeout", type=float, default=Half.timeout, help="seconds that decode waits (%(default)s)"
    )
    parser.add_argument("--name", help="name of the model in the API (default: that of the directory)")
    own, others = parser.parse_known_args()
    try:
        start(Half(own.export, own.stage, own.kv, own.kv_room, own.kv_timeout, own.name), others)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
