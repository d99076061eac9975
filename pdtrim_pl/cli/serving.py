"""`pdtrim generate` and `pdtrim serve`: their options."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import Namespace

from pdtrim_pl.cli.failures import output_is_closed
from pdtrim_pl.cli.parsing import OneLineErrors
from pdtrim_pl.errors import UserError


def generate(args: Sequence[str]) -> int:
    """Stream the text of one prompt, or answer a file of prompts."""
    parser = OneLineErrors(prog="pdtrim generate", description="Stream text from an exported prefill/decode pair.")
    parser.add_argument("--export", type=Path, required=True, help="directory written by fit or `pdtrim export`")
    parser.add_argument("--prompt", type=str | None, help="raw text, unless --chat")
    parser.add_argument("--prompts", type=Path | None, help="JSON rows with `prompt` or `messages`, answered together")
    parser.add_argument("--output", type=Path | None, help="file for the answers to --prompts, a line of JSON each")
    parser.add_argument("--max_batch", type=int, default=8, help="requests of --prompts that decode together")
    parser.add_argument("--deadline", type=float | None, help="seconds for a request of --prompts")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the chat template")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top_k", type=int | None, default=None)
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="sample among the likeliest that reach this probability"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", type=list[str], default=[], help="texts that end the response: '[\"###\"]'")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu or cuda")
    parser.add_argument("--verify", action="store_true", help="compare the weights' hashes with pair.json first")
    options = parser.parse_args(list(args))
    if (options.prompt is None) == (options.prompts is None):
        raise UserError("Give either `--prompt` or `--prompts`.")
    try:
        if options.prompt is None:
            _generate_file(options)
        else:
            from pdtrim_pl.serving.generate import generate_text

            rest = {name: value for name, value in options.as_dict().items()
                    if name not in ("prompts", "output", "max_batch", "deadline")}  # fmt: skip
            generate_text(**rest, out=sys.stdout, err=sys.stderr)
    except BrokenPipeError:  # the reader of our output has left, as in `| head`
        if not output_is_closed():
            raise
    except RuntimeError as error:  # a worker died; the message says which and of what
        print(f"pdtrim: error: {error}", file=sys.stderr)
        return 1
    return 0


def _generate_file(options: Namespace) -> None:
    from pdtrim_pl.serving.engine.file import FileSettings, generate_file
    from pdtrim_pl.serving.exported import ExportedPair
    from pdtrim_pl.serving.sampling import Sampling

    if options.verify:
        ExportedPair.read(options.export, verify=True)
    settings = FileSettings(
        options.max_new_tokens, Sampling(options.temperature, options.top_k, options.seed, options.top_p),
        options.stop, options.chat, options.deadline, options.max_batch,
    )  # fmt: skip
    if options.output is None:
        generate_file(options.export, options.prompts, settings, device=options.device, out=sys.stdout)
        return
    with options.output.open("w", encoding="utf-8") as out:
        generate_file(options.export, options.prompts, settings, device=options.device, out=out)


def serve(args: Sequence[str]) -> int:
    """Serve until the process is told to end."""
    parser = OneLineErrors(prog="pdtrim serve", description="An exported pair behind OpenAI's HTTP interface.")
    parser.add_argument("--export", type=Path, required=True, help="directory written by fit or `pdtrim export`")
    parser.add_argument("--host", type=str, default="127.0.0.1", help="beyond this machine only with PDTRIM_SECRET")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--name", type=str | None, help="of the model, as callers see it")
    parser.add_argument("--max_batch", type=int, default=8, help="requests that run together")
    parser.add_argument("--max_waiting", type=int, default=64, help="requests in the queue; one more gets status 503")
    parser.add_argument("--deadline", type=float | None, help="seconds for a request")
    parser.add_argument("--engine", type=Literal["builtin", "vllm"], default="builtin")
    parser.add_argument("--device", type=str | None, help="builtin: auto, cpu or cuda (default: auto)")
    parser.add_argument("--vllm_python", type=str | None, help="vllm: python of vLLM's environment (default: this one)")
    parser.add_argument(
        "--vllm_args", type=list[str], default=[], help="vllm: of both servers: '[\"--enforce-eager\"]'"
    )
    parser.add_argument("--prefill", type=str | None, help="vllm: URL of a prefill engine that runs already")
    parser.add_argument("--decode", type=str | None, help="vllm: URL of a decode engine that runs already")
    options = parser.parse_args(list(args))
    _check_engine(options)
    from pdtrim_pl.serving.web import serve as web

    front = web.Front(
        options.host, options.port, options.name, options.max_batch, options.max_waiting, options.deadline
    )  # fmt: skip
    try:
        if options.engine == "builtin":
            web.serve(options.export, front, device=options.device or "auto")
        elif options.prefill is not None:
            web.serve_running_vllm(options.export, front, options.prefill, options.decode)
        else:
            web.serve_vllm(options.export, front, options.vllm_python or sys.executable, options.vllm_args)
    except RuntimeError as error:
        print(f"pdtrim: error: {error}", file=sys.stderr)
        return 1
    return 0


def _check_engine(options: Namespace) -> None:
    """Refuse options that the chosen engine does not have.

    Raises:
        UserError: there is such an option, or one without the other.
    """
    own = {"builtin": ["device"], "vllm": ["vllm_python", "vllm_args", "prefill", "decode"]}
    for engine, names in own.items():
        given = [name for name in names if options[name]]
        if engine != options.engine and given:
            raise UserError(f"`{given[0]}` is a setting of `--engine {engine}`, and the engine is {options.engine}.")
    if (options.prefill is None) != (options.decode is None):
        raise UserError("Give both `--prefill` and `--decode`, the URLs of two engines that run; or neither.")
    if options.prefill is not None and (options.vllm_python or options.vllm_args):
        raise UserError("`vllm_python` and `vllm_args` start engines, and `prefill` and `decode` name running ones.")
