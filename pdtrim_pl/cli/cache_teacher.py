"""`pdtrim cache-teacher`: writes the teacher's distributions over the training text of a run."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import torch

from pdtrim_pl.cli.parsed import ParsedRun
from pdtrim_pl.losses.stored import stored_terms, temperature_of
from pdtrim_pl.models.loading import warn_of_slow_bf16
from pdtrim_pl.teacher import CacheIndex, Making, Writing, identity_of, training_keys, write_cache

log = logging.getLogger(__name__)


def run(args: Sequence[str]) -> int:
    """Write the cache, print its folder.

    Raises:
        UserError: a setting is invalid, or the folder holds another cache.
    """
    options, rest = _parser().parse_known_args(list(args))
    with redirect_stdout(sys.stderr):  # libraries write to standard output
        _write(options, rest)
    print(options.output.resolve())
    return 0


def _write(options: argparse.Namespace, rest: list[str]) -> None:
    making = Making(options.kind, options.kept, options.exponent, options.seed, options.shard_examples)
    parsed = ParsedRun(["fit", *rest])
    module, data = parsed.model, parsed.datamodule
    stored_terms(module.losses, making.kind)
    module.check_models()
    data.prepare_data()
    data.setup("fit")
    keys = training_keys(data)
    identity = identity_of(module.pair, data, temperature_of(module.losses), keys)
    index = CacheIndex(identity, making, module.pair.teacher_name, len(keys))
    device = torch.device(options.device)
    teacher = module.pair.teacher(module.structure.boundary, module.pair.vocabularies[0], device).to(device)
    warn_of_slow_bf16(device, teacher.model.dtype)
    size = options.batch_size or data.eval_batch_size
    writing = Writing(size, module.chunk_tokens, data.pad_id, device)
    write_cache(options.output, index, teacher, data.part("train"), writing, _told)


def _told(done: int, of: int) -> None:
    log.info("Shard %d of %d is written.", done, of)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pdtrim cache-teacher",
        description="Write the teacher's distributions over a run's training text. `teacher: {placement: offline, "
        "cache: DIR}` in the run's YAML then trains without a teacher. Started again, it goes on where it was stopped.",
        epilog="All other options are those of `pdtrim fit`, such as --config run.yaml.",
    )
    made, written = Making(), Writing()
    parser.add_argument("--output", type=Path, required=True, help="folder of the cache")
    parser.add_argument(
        "--kind", choices=["top_k", "sampled"], default=made.kind,
        help="the most likely tokens and the exact mass of all others, or an unbiased sample",
    )  # fmt: skip
    parser.add_argument("--kept", type=int, default=made.kept, help="tokens kept of every distribution, or draws")
    parser.add_argument("--exponent", type=float, default=made.exponent, help="draws are from p^exponent")
    parser.add_argument("--seed", type=int, default=made.seed, help="seed of the draws")
    parser.add_argument("--shard_examples", type=int, default=made.shard_examples, help="examples in a file")
    parser.add_argument(
        "--batch_size", type=int, default=0, help="examples in a batch; `data.eval_batch_size` by default"
    )
    parser.add_argument("--device", default=str(written.device), help="cpu or cuda")
    return parser
