"""The command line: `pdtrim COMMAND`, see `USAGE`. Heavy imports happen when a command needs them."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from pdtrim_pl import __version__
from pdtrim_pl.cli.failures import (
    INTERRUPTED,
    OUTPUT_CLOSED,
    expected_errors,
    flush_output,
    open_streams,
    output_is_closed,
    tell,
)
from pdtrim_pl.cli.versions import check_versions

USAGE = """\
usage: pdtrim COMMAND [options]

commands:
  fit        drop blocks per stage between distillation epochs, choose what KV to send, export the pair
  validate   response perplexity, KL and top-1 agreement on the validation part
  test       the same on the test part
  predict    generate responses for the prompts of the test (else validation) part
  export     write the prefill/decode pair of a checkpoint
  policy     choose how the KV of an exported pair crosses, for a number of bytes; no training
  bench      times and bytes of an exported pair, compared with its dense model
  report     show in an export's report what `eval --save` and `bench --save` measured
  generate   stream text from an exported pair: a prefill and a decode process
  serve      an exported pair behind OpenAI's HTTP interface, on the engine of this package or on two of vLLM
  eval       tasks of lm-evaluation-harness and measures of generation on an exported pair, beside its dense model
  answer     a model's own responses to prompts, as a data set for distillation
  compare    several methods on one model, text and training budget: tables and pictures (`--quick` for a small one)
  cache-teacher  write the teacher's distributions over a run's training text, which then trains without a teacher
  submit     run fit as a SLURM job, which saves before its time ends and continues until it is done

`pdtrim fit --dry_run --config X` counts memory and refuses a run that a GPU cannot hold (`--device_memory GiB`), or the
first node (`--host_memory GiB`).
`pdtrim COMMAND --help` shows a command's options. Complete configurations are in configs/.
"""
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
COMMANDS = (
    *TRAINER_COMMANDS, "export", "policy", "bench", "report", "generate", "serve", "eval", "answer", "compare",
    "cache-teacher", "submit",
)  # fmt: skip


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns the process's exit status."""
    open_streams()
    try:
        status = _main(list(sys.argv[1:] if args is None else args))
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError as error:
        return _unread() if output_is_closed() else tell(error)
    except SystemExit as leaving:
        if isinstance(leaving.__context__, KeyboardInterrupt):  # Lightning has ended the run properly
            return _interrupted()
        if flush_output():
            raise
        return _unread()
    return status if flush_output() else _unread()


def _main(args: list[str]) -> int:
    command = args[0] if args else "--help"
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        print(f"pdtrim_pl {__version__}")
        return 0
    if command not in COMMANDS:
        print(f"pdtrim: error: unknown command {command!r}.\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    _log_to_stderr()
    try:
        check_versions()
        return _run(command, args)
    except BrokenPipeError:
        raise  # `main` looks whose pipe it was
    except expected_errors() as error:
        return tell(error)


def _interrupted() -> int:
    print("pdtrim: interrupted.", file=sys.stderr)
    return INTERRUPTED


def _unread() -> int:
    print("pdtrim: error: standard output was closed before all was written.", file=sys.stderr)
    return OUTPUT_CLOSED


def _run(command: str, args: list[str]) -> int:
    if command in ("generate", "serve"):
        from pdtrim_pl.cli import serving

        return serving.generate(args[1:]) if command == "generate" else serving.serve(args[1:])
    if command == "export":
        return _export(args[1:])
    if command == "policy":
        return _policy(args[1:])
    if command == "bench":
        return _bench(args[1:])
    if command == "report":
        return _report(args[1:])
    if command == "eval":
        from pdtrim_pl.cli.evaluate import run as evaluate

        return evaluate(args[1:])
    if command == "answer":
        from pdtrim_pl.cli.answer import run as answer

        return answer(args[1:])
    if command == "compare":
        from pdtrim_pl.cli.compare import run as compare

        return compare(args[1:])
    if command == "cache-teacher":
        from pdtrim_pl.cli.cache_teacher import run as cache_teacher

        return cache_teacher(args[1:])
    if command == "submit":
        from pdtrim_pl.slurm.submit import run

        return run(args[1:])
    if command == "fit" and "--dry_run" in args:
        from pdtrim_pl.cli.dry_run import run as dry_run

        return dry_run(args)
    from pdtrim_pl.cli.lightning_cli import run_cli

    return run_cli(args)


def _export(args: list[str]) -> int:
    from pdtrim_pl.cli.parsing import OneLineErrors

    manifest = any(each.partition("=")[0] == "--manifest" for each in args)
    parser = OneLineErrors(prog="pdtrim export", description="Write the prefill/decode pair of a checkpoint.")
    parser.add_argument("--ckpt_path", type=Path, required=not manifest, help="checkpoint of a `pdtrim fit` run")
    parser.add_argument("--output", type=Path, required=not manifest, help="directory to make")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export at --output")
    parser.add_argument(
        "--layout", choices=["compact", "padded"], default="compact",
        help="padded: equally many layers in both halves, for engines that pair them by position",
    )  # fmt: skip
    parser.add_argument(
        "--widths", choices=["uniform", "per_block"], default="uniform",
        help="per_block: each block has its own width, where transformers builds the model so",
    )  # fmt: skip
    parser.add_argument("--model", type=str | None, help="where the model is now, if not where the checkpoint says")
    parser.add_argument("--manifest", type=Path | None, help="only write pair.json anew, into this export")
    options = parser.parse_args(args)
    export = options.pop("manifest")
    if export is not None:
        from pdtrim_pl.plan import write_manifest

        print(write_manifest(export))
        return 0
    from pdtrim_pl.export.from_checkpoint import export_checkpoint

    print(export_checkpoint(**options.as_dict()))
    return 0


def _policy(args: list[str]) -> int:
    from pdtrim_pl.cli.parsing import OneLineErrors

    parser = OneLineErrors(prog="pdtrim policy", description="Choose how the KV of an exported pair crosses the wire.")
    parser.add_argument("--export", type=Path, required=True, help="directory written by fit or `pdtrim export`")
    parser.add_argument("--reduction", type=float, default=4.95, help="full bytes over sent bytes")
    parser.add_argument("--source", type=str, default="pydoc", help="text to measure on: a file, a glob, a Hub id")
    parser.add_argument("--examples", type=int, default=8, help="requests to measure on")
    parser.add_argument("--max_length", type=int, default=256, help="tokens of a request")
    parser.add_argument("--min_recall", type=float, default=0.97, help="share of the recall with everything sent")
    parser.add_argument("--exchanges", action="store_true", help="exchange bits between blocks; about twice the work")
    parser.add_argument("--prompt_tokens", type=int, default=1024, help="prompt length at which bytes are counted")
    parser.add_argument("--device", type=str, default="cpu")
    parser.add_argument("--output", type=Path | None, help="file to write; that of the export by default")
    options = parser.parse_args(args)
    from pdtrim_pl.export.choose_policy import choose_policy

    print(choose_policy(**options.as_dict()))
    return 0


def _bench(args: list[str]) -> int:
    from pdtrim_pl.cli.parsing import OneLineErrors

    parser = OneLineErrors(prog="pdtrim bench", description="Time an exported pair beside its dense model, in turns.")
    parser.add_argument("--export", type=Path, required=True, help="directory written by fit or `pdtrim export`")
    parser.add_argument("--model", type=str | None, help="the dense model, if it is not where the plan says")
    parser.add_argument("--device", type=str, default="cpu", help="cpu or cuda")
    parser.add_argument("--prompts", type=list[int], default=[256, 1024], help="tokens of a prompt")
    parser.add_argument("--batch_sizes", type=list[int], default=[1, 8])
    parser.add_argument("--new_tokens", type=int, default=32, help="tokens of a response")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--links", type=list[float], default=[1.0, 10.0, 100.0], help="Gbit/s between the nodes")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--save", action="store_true", help="keep the figures in the export and show them in its report"
    )
    options = parser.parse_args(args)
    from pdtrim_pl.serving.bench import Load, bench, lines

    load = Load(options.prompts, options.batch_sizes, options.new_tokens, options.repeats, options.links)
    with redirect_stdout(sys.stderr):  # libraries write to standard output when they are imported
        found = bench(options.export, model=options.model, device=options.device, load=load)
        if options.save:
            from pdtrim_pl.export.measurements import BENCH_FILE, save_measurement

            save_measurement(options.export, BENCH_FILE, found)
    print(json.dumps(found) if options.json else lines(found))
    return 0


def _report(args: list[str]) -> int:
    from pdtrim_pl.cli.parsing import OneLineErrors

    parser = OneLineErrors(prog="pdtrim report", description="Show in an export's report what was measured on it.")
    parser.add_argument("--export", type=Path, required=True, help="directory written by fit or `pdtrim export`")
    options = parser.parse_args(args)
    from pdtrim_pl.export.measurements import refresh_report

    print(refresh_report(options.export))
    return 0


def _is_first_process() -> bool:
    """True in one of the processes that Lightning, torchrun or srun start: that one logs how the run goes."""
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID"))


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for name in ("pdtrim_pl", "callbacks"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO if _is_first_process() else logging.WARNING)
        logger.propagate = False
