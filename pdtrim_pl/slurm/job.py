"""What a job asks for, and the faults in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pdtrim_pl.errors import UserError

TIME = re.compile(r"^(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d\d))?(?::(?P<third>\d\d))?$")


@dataclass(frozen=True)
class JobRequest:
    """One job: nodes, and processes on each of them, one per GPU."""

    nodes: int = 1
    gpus: int = 8
    """GPUs per node; 0 asks for none."""
    time: str = "24:00:00"
    """Time limit as SLURM writes it: `minutes`, `hours:minutes:seconds`, `days-hours:minutes:seconds`."""
    name: str = "pdtrim"
    partition: str | None = None
    account: str | None = None
    tasks: int | None = None
    """Processes per node; as many as GPUs by default."""
    cpus: int = 8
    """CPU cores per process."""
    mem: str = "0"
    """Memory per node as SLURM writes it, such as `120G`; 0 asks for all of the node's memory."""
    notice: int = 300
    """Seconds before the time limit at which the run saves, requeues itself and exits; 0 lets the limit end the run."""
    array: str | None = None
    """Tasks of a job array, such as `0-3`."""

    @property
    def tasks_per_node(self) -> int:
        """Processes per node."""
        return self.gpus if self.tasks is None else self.tasks

    def faults(self) -> list[str]:
        """What SLURM or Lightning would refuse, one line each."""
        return list(self._faults())

    def _faults(self) -> Iterator[str]:
        for option, value, least in (
            ("nodes", self.nodes, 1), ("gpus", self.gpus, 0), ("cpus", self.cpus, 1), ("notice", self.notice, 0),
        ):  # fmt: skip
            if value < least:
                yield f"`--{option}` is {value}: give at least {least}."
        if self.tasks_per_node < 1:
            yield f"`--tasks` is {self.tasks_per_node}: give at least 1 process per node; no GPUs are asked for."
        elif self.gpus and self.tasks_per_node != self.gpus:
            yield f"`--tasks` is {self.tasks_per_node} and `--gpus` is {self.gpus}: a run has one process per GPU."
        if not re.fullmatch(r"\d+[KMGT]?", self.mem):
            yield f"`--mem` is {self.mem!r}: write a number with K, M, G or T, such as 120G; 0 for all of the node's."
        for option, text in (("name", self.name), ("partition", self.partition), ("account", self.account)):
            if text is not None and not re.fullmatch(r"[\w.,+@/-]+", text):
                yield f"`--{option}` is {text!r}: letters, digits and . , + @ / _ - only."
        try:
            limit = seconds_of(self.time)
        except ValueError as error:
            yield str(error)
        else:
            if self.notice >= limit:
                yield (
                    f"`--notice` is {self.notice} seconds, and the limit `--time` {self.time} is {limit}: give more "
                    "time or a smaller notice (0 for none, and the limit ends the run)."
                )


def seconds_of(time: str) -> int:
    """Seconds of a time limit as SLURM reads it: `90` and `90:00` are 90 minutes, `1-12` is a day and a half.

    Raises:
        UserError: the text is not a time limit.
    """
    match = TIME.match(time)
    if match is None:
        raise UserError(f"`--time` is {time!r}: write minutes, hours:minutes:seconds or days-hours:minutes:seconds.")
    first, second, third = (int(match[part] or 0) for part in ("first", "second", "third"))
    if match["days"] is not None:
        return ((int(match["days"]) * 24 + first) * 60 + second) * 60 + third
    if match["third"] is not None:
        return (first * 60 + second) * 60 + third
    return first * 60 + second


def config_faults(config: Path, job: JobRequest) -> list[str]:
    """What in a run's YAML does not fit the job, one line each. Imports no torch."""
    try:
        settings: Any = yaml.safe_load(config.read_text(encoding="utf-8"))
    except OSError as error:
        return [f"`--config` {config} cannot be read: {error.strerror}."]
    except yaml.YAMLError as error:
        return [f"`--config` {config} is no YAML: {' '.join(str(error).split())}"]
    trainer = settings.get("trainer") if isinstance(settings, dict) else None
    if not isinstance(trainer, dict):
        return [f"`--config` {config} has no section `trainer`: is it the configuration of a run?"]
    return list(_trainer_faults(trainer, job))


def _trainer_faults(trainer: dict[str, Any], job: JobRequest) -> Iterator[str]:
    accelerator = trainer.get("accelerator", "auto")
    if accelerator == "cpu" and job.gpus:
        yield f"`trainer.accelerator` is cpu, and `--gpus` is {job.gpus}: give `--gpus 0 --tasks {job.gpus}`."
    if accelerator in ("gpu", "cuda") and not job.gpus:
        yield f"`trainer.accelerator` is {accelerator}, and `--gpus` is 0: ask for the GPUs of one node."
    if not any(_continues(callback) for callback in trainer.get("callbacks") or []):
        yield (
            "`trainer.callbacks` has no ModelCheckpoint with a `dirpath`: a job that starts again would not find its "
            "last checkpoint. Add one, with `save_last: true`."
        )


def _continues(callback: Any) -> bool:
    if not isinstance(callback, dict) or not str(callback.get("class_path", "")).endswith("ModelCheckpoint"):
        return False
    return bool((callback.get("init_args") or {}).get("dirpath"))
