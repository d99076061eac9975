"""`pdtrim submit`: renders the script of a job, checks it, submits it, and prints how to follow it."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pdtrim_pl.errors import UserError
from pdtrim_pl.slurm.commands import SlurmError, call
from pdtrim_pl.slurm.job import JobRequest, config_faults
from pdtrim_pl.slurm.render import log_name, render

FOLLOW = """\
Submitted batch job {id}. {end}
  squeue -j {id} -o '%i %T %r %M'        state, reason, time used
  tail -F {log}        its log, over all restarts
  scancel --signal=USR1 {id}        save, go back into the queue, continue later
  scancel {id}        end it; what was saved stays
"""
BY_ITSELF = "It goes back into the queue before its time ends; after a crash the same command continues the run."
BY_HAND = "The same command continues the run if it ends before it is done."


def run(args: Sequence[str]) -> int:
    """Run the command. Arguments after `--` go to `pdtrim fit` as overrides.

    Raises:
        UserError: the job or its configuration has faults; the message lists all of them.
        SlurmError: SLURM is missing or refuses the job.
    """
    own, overrides = _split(args)
    options = _parser().parse_args(own)
    config, dry_run = options.config, options.dry_run
    job = JobRequest(**{name: value for name, value in vars(options).items() if name not in ("config", "dry_run")})
    faults = [*job.faults(), *config_faults(config, job)]
    if faults:
        raise UserError("The job cannot be submitted:\n" + "\n".join(f"- {fault}" for fault in faults))
    arguments = [str(config), *overrides]
    header = _comment("pdtrim", "submit", *args) + _comment("sbatch", "SCRIPT", *arguments)
    script = render(job, header=header)
    if dry_run:
        print(script, end="")
        return 0
    _check_partition(job.partition)
    id = _submit(script, arguments)
    log = Path.cwd() / log_name(job).replace("%j", id)
    print(FOLLOW.format(id=id, log=log, end=BY_ITSELF if job.notice else BY_HAND), end="")
    return 0


def _comment(*words: str) -> str:
    return f"# {' '.join(shlex.join(words).split())}\n"  # one line, whatever is in the words


def _split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Own options, and overrides for the run."""
    args = list(args)
    at = args.index("--") if "--" in args else len(args)
    return args[:at], args[at + 1 :]


def _parser() -> argparse.ArgumentParser:
    default = JobRequest()
    parser = argparse.ArgumentParser(
        prog="pdtrim submit",
        description="Submit a run to SLURM. It continues from its last checkpoint if there is one.",
        epilog="Arguments after -- go to `pdtrim fit`: pdtrim submit --config X --gpus 4 -- --trainer.max_epochs 3",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, help="configuration of the run")
    parser.add_argument("--nodes", type=int, default=default.nodes, help="nodes (%(default)s)")
    parser.add_argument("--gpus", type=int, default=default.gpus, help="GPUs per node, 0 for none (%(default)s)")
    parser.add_argument("--time", default=default.time, help="time limit (%(default)s)")
    parser.add_argument("--name", default=default.name, help="name of the job (%(default)s)")
    parser.add_argument("--partition", help="partition; the cluster's default one if left out")
    parser.add_argument("--account", help="account to charge")
    parser.add_argument("--tasks", type=int, help="processes per node; as many as GPUs if left out")
    parser.add_argument("--cpus", type=int, default=default.cpus, help="CPU cores per process (%(default)s)")
    parser.add_argument("--mem", default=default.mem, help="memory per node, 0 for all of it (%(default)s)")
    parser.add_argument(
        "--notice", type=int, default=default.notice,
        help="seconds before the time limit at which the run saves, requeues itself and exits; 0 for never "
        "(%(default)s)",
    )  # fmt: skip
    parser.add_argument("--dry_run", action="store_true", help="print the script and stop; needs no SLURM")
    return parser


def _check_partition(partition: str | None) -> None:
    known = call(["sinfo", "--noheader", "--format=%R"]).split()
    if partition is not None and not set(partition.split(",")) <= set(known):
        raise SlurmError(f"`--partition` is {partition!r}, and this cluster has: {', '.join(sorted(set(known)))}.")


def _submit(script: str, arguments: Sequence[str]) -> str:
    """Let SLURM test the script, then submit it. Returns the job's id."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pdtrim.sbatch"
        path.write_text(script, encoding="utf-8")
        environment = _command_for_the_job()
        call(["sbatch", "--test-only", str(path), *arguments], environment)
        return call(["sbatch", "--parsable", str(path), *arguments], environment).strip().split(";")[0]


def _command_for_the_job() -> dict[str, str]:
    """The variable with which the job runs the `pdtrim` of this environment, even if it is not on the PATH."""
    script = Path(sys.executable).with_name("pdtrim")
    if "PDTRIM" in os.environ:
        return {}
    return {"PDTRIM": str(script) if script.is_file() else f"{sys.executable} -m pdtrim_pl"}
