"""`pdtrim answer`: its options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pdtrim_pl.cli.parsing import OneLineErrors


def run(args: Sequence[str]) -> int:
    """Answer a file of prompts."""
    parser = OneLineErrors(
        prog="pdtrim answer", description="Write a model's own responses to prompts, as a data set for distillation."
    )
    parser.add_argument("--model", type=str, required=True, help="the teacher: name, path or Hub id")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON rows with `prompt` or `messages`")
    parser.add_argument("--output", type=Path, required=True, help="file to write, or to continue")
    parser.add_argument("--chat", action="store_true", help="a `prompt` is a user's message")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top_k", type=int | None, default=None)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    parser.add_argument("--device", type=str | None, help="cuda if there is a GPU, else cpu")
    options = parser.parse_args(list(args))
    from pdtrim_pl.harness.answers import AnswerSettings, answer_file
    from pdtrim_pl.harness.device import present_device
    from pdtrim_pl.serving.sampling import Sampling

    settings = AnswerSettings(
        options.max_new_tokens, Sampling(options.temperature, options.top_k, options.seed, options.top_p),
        options.chat, options.batch_size,
    )  # fmt: skip
    count = answer_file(
        options.model,
        options.prompts,
        options.output,
        settings,
        dtype=options.dtype,
        device=present_device(options.device),
    )
    print(f"{options.output}: {count} rows")
    return 0
