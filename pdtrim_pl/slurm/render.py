"""Renders a job as a batch script. The scripts in `jobs/` are its output; a test compares them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pdtrim_pl.slurm.job import JobRequest

Kind = Literal["fit", "fit_multinode", "fit_preemptible", "compare_array"]

HEADERS: dict[Kind, str] = {
    "fit": """\
# A run on one node. Before its time ends it saves, goes back into the queue and continues, until it is done; after a
# crash the same command continues it:
#
#   sbatch jobs/fit.sbatch configs/llama3_8b_deepspeed.yaml [overrides, such as --trainer.max_epochs 3]
""",
    "fit_multinode": """\
# A run on several nodes. Before its time ends it saves, goes back into the queue and continues, until it is done; after
# a crash the same command continues it:
#
#   sbatch --nodes=4 jobs/fit_multinode.sbatch configs/llama3_8b_deepspeed.yaml [overrides]
""",
    "fit_preemptible": """\
# A run in short turns, which wait less in the queue. `--signal` gives notice before the time limit; it must cover one
# step, one validation and one save. Otherwise as fit.sbatch:
#
#   sbatch jobs/fit_preemptible.sbatch configs/llama3_8b_deepspeed.yaml [overrides]
""",
    "compare_array": """\
# One plan per task of the array: trains under every *.json of a folder, in the order of their names. Each task works in
# its own folder below runs/compare/: paths that the YAML writes to must be relative, and paths that it reads absolute.
#
#   sbatch --array=0-3 jobs/compare_array.sbatch configs/mine.yaml plans/ [overrides]
""",
}

CONFIG = """\
set -euo pipefail

config=${1:?usage: sbatch SCRIPT CONFIG [overrides]}
shift
"""

PLANS = """\
set -euo pipefail

config=$(realpath "${1:?usage: sbatch --array=0-N SCRIPT CONFIG PLANS [overrides]}")
plans=("$(realpath "${2:?the folder of the plans is missing}")"/*.json)
shift 2
if ((SLURM_ARRAY_TASK_ID >= ${#plans[@]})); then
    echo "Task $SLURM_ARRAY_TASK_ID of the array has no plan: there are ${#plans[@]}, counted from 0." >&2
    exit 2
fi
plan=${plans[$SLURM_ARRAY_TASK_ID]}
folder=runs/compare/$(basename "$plan" .json)
mkdir -p "$folder"
cd "$folder"
"""

RUN = """\
read -ra pdtrim <<<"${PDTRIM:-pdtrim}" # where it is not on the PATH: PDTRIM=/path/to/.venv/bin/pdtrim sbatch ...

# Blocks the two signals of a notice until the run asks for them at the end of a batch. While Python starts they would
# kill it.
guard=(env --block-signal=USR1 --block-signal=TERM)
if ! "${guard[@]}" true 2>/dev/null; then
    echo "GNU env before 8.31 cannot block signals: a notice within the first seconds ends the job." >&2
    guard=()
fi
trap : USR1 TERM # this shell stays for as long as srun does

callbacks=()
grep -qE '^[^#]*callbacks\\.Preemption' "$config" || callbacks=(--trainer.callbacks+=callbacks.Preemption)

export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
srun --kill-on-bad-exit=1 "${guard[@]}" "${pdtrim[@]}" fit --config "$config" --ckpt_path last \\
    --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" \\
    "${callbacks[@]}" @PLAN@"$@"
"""


def render(job: JobRequest, kind: Kind = "fit", header: str | None = None) -> str:
    """The batch script of a job. It takes the configuration and overrides as arguments, so one script serves any run.

    Args:
        job: what to ask for.
        kind: which of the shipped scripts to follow.
        header: comment at the top; None means the shipped one.
    """
    body = PLANS if kind == "compare_array" else CONFIG
    run = RUN.replace("@PLAN@", '--model.structure.plan "$plan" ' if kind == "compare_array" else "")
    comment = HEADERS[kind] if header is None else header
    return f"#!/usr/bin/env bash\n{comment}{_directives(job)}{body}\n{run}"


def shipped(kind: Kind) -> JobRequest:
    """The job of a script in `jobs/`."""
    jobs: dict[Kind, JobRequest] = {
        "fit": JobRequest(),
        "fit_multinode": JobRequest(nodes=2),
        "fit_preemptible": JobRequest(time="4:00:00"),
        "compare_array": JobRequest(name="pdtrim-compare", array="0-3"),
    }
    return jobs[kind]


def log_name(job: JobRequest) -> str:
    """Pattern of the log file's name, as SLURM fills it in."""
    return f"{job.name}-%j.log" if job.array is None else f"{job.name}-%A_%a.log"


def _directives(job: JobRequest) -> str:
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.tasks_per_node}",
        *([f"--gpus-per-node={job.gpus}"] if job.gpus else []),
        f"--cpus-per-task={job.cpus}",
        f"--mem={job.mem}",
        f"--time={job.time}",
        *_optional(job),
        "--requeue",
        "--open-mode=append",
        f"--output={log_name(job)}",
    ]
    return "".join(f"#SBATCH {option}\n" for option in options)


def _optional(job: JobRequest) -> Sequence[str]:
    options = {
        "partition": job.partition,
        "account": job.account,
        "array": job.array,
        "signal": f"USR1@{job.notice}" if job.notice else None,
    }
    return [f"--{name}={value}" for name, value in options.items() if value is not None]
