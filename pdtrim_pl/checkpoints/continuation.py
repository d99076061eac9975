"""Choose the checkpoint that a run continues from, and clean up what a killed save has left beside it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedConfig

from pdtrim_pl.checkpoints.sharded import ShardedCheckpoint, earlier, is_whole, put_in_place, remove, unfinished
from pdtrim_pl.checkpoints.state import CheckpointState, check_file, check_weights, mapped
from pdtrim_pl.errors import UserError
from pdtrim_pl.models.architectures import Architecture
from pdtrim_pl.models.pretrained import usable_config
from pdtrim_pl.parallel import Parallel
from pdtrim_pl.plan import ModelRef
from pdtrim_pl.staged import StagedCausalLM

log = logging.getLogger(__name__)

SETTINGS = ("seed_everything", "model", "data")
"""Sections of a configuration that identify a run. The `trainer` section may change when a run is continued."""


class Continuation:
    """The properties of a run that a checkpoint must match for the run to continue from it.

    Args:
        model: name, path or Hub id of the model that is trimmed.
        processes: number of processes that train.
        zero_stage: ZeRO stage of DeepSpeed, whose checkpoints are directories of shards; None for checkpoint files.
        architecture: adapter of the model's family, if the package has none.
        config: resolved YAML of the run; empty if it is unknown.
    """

    def __init__(
        self, model: str, processes: int, zero_stage: int | None = None, *, architecture: Architecture | None = None,
        config: str = "",
    ) -> None:  # fmt: skip
        self.model, self.processes, self.zero_stage = model, processes, zero_stage
        self.architecture, self.config = architecture, config

    def check(self, path: Path) -> None:
        """Refuse a checkpoint that is damaged or does not match the run.

        Raises:
            UserError: the run cannot continue from it. The message gives the reason.
        """
        if self.zero_stage is None:
            check_file(path)
            self._check_file(path)
        else:
            self._check_shards(path, self.zero_stage)

    def _check_file(self, path: Path) -> None:
        checkpoint = mapped(path)
        student = self._student(CheckpointState.of(checkpoint))
        saved = {name: value for name, value in checkpoint["state_dict"].items() if name.startswith("student.")}
        check_weights(saved, {f"student.{name}": value for name, value in student.state_dict().items()})

    def _check_shards(self, path: Path, stage: int) -> None:
        saved = ShardedCheckpoint.load(path)
        student = self._student(CheckpointState.from_json(saved.state))
        saved.check(ShardedCheckpoint.of(stage, self.processes, student), path)

    def _student(self, state: CheckpointState) -> StagedCausalLM:
        """The student that a checkpoint belongs to, on the meta device (without memory for weights)."""
        state.check_model(ModelRef(self.model, self._config.model_type, self._config.num_hidden_layers))
        state.check_processes(self.processes)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self._config, attn_implementation="eager")
            student = StagedCausalLM(model, architecture=self.architecture)
            for stage, blocks in state.untied.items():
                for block in blocks:
                    student.gates[block].untie(stage)
            if state.lora is not None:
                student.train_only(state.lora)
        return student

    @cached_property
    def _config(self) -> PreTrainedConfig:
        return usable_config(self.model, self.architecture)


@dataclass(frozen=True, eq=False)
class _Found:
    """A readable checkpoint."""

    path: Path
    time: int
    """Modification time in nanoseconds."""
    state: CheckpointState

    def supersedes(self, other: _Found) -> bool:
        """Whether the run was later restarted from before `other`, and this checkpoint belongs to the new branch.

        Both checkpoints are of the same run, this one is newer, and their losses differ at some step.
        """
        theirs = dict(other.state.record.losses)
        differ = any(theirs.get(step, loss) != loss for step, loss in self.state.record.losses)
        return self.state.run == other.state.run and self.time > other.time and differ


def latest_valid_checkpoint(*folders: str | os.PathLike[str], run: Continuation | None = None) -> Path | None:
    """The checkpoint with the most optimizer steps that a run can continue from; the newest one of these.

    Checkpoints that are damaged or do not match the run are skipped with a warning. If a run was restarted from an
    earlier checkpoint, the checkpoints of its abandoned branch come last. If the folders hold checkpoints of several
    runs, only those with this run's settings (`SETTINGS`) are used.

    A complete directory of shards is used even if the process was killed before it was renamed; see `settle`.

    Args:
        *folders: folders of the run's `ModelCheckpoint`s. They may be missing.
        run: the run that continues; by default every readable checkpoint matches.

    Returns:
        Path of the checkpoint; None if there is no checkpoint.

    Raises:
        UserError: there are checkpoints, but all are damaged or do not match the run.
    """
    faults: list[str] = []

    def pass_over(path: Path, reason: object) -> None:
        log.warning("Checkpoint %s is passed over: %s", path, reason)
        faults.append(f"{path.name}: {reason}")

    found = []
    for path in sorted(path for folder in folders for path in _candidates(Path(folder))):
        try:
            state = CheckpointState.at(path)
        except ValueError as error:
            pass_over(path, error)
        else:
            if state is not None:
                found.append(_Found(path, path.stat().st_mtime_ns, state))
    foreign = _of_other_runs(found, run)
    stale = [one for one in found if any(other.supersedes(one) for other in found)]
    for one in sorted(found, key=lambda one: (one not in stale, one.state.step, one.time, one.path.name), reverse=True):
        try:
            if one in foreign:
                raise UserError(f"It is of another run: its settings differ in {_difference(one.state, run)}.")
            if run is not None:
                run.check(one.path)
        except ValueError as error:
            pass_over(one.path, error)
        else:
            return one.path
    if faults:
        where = ", ".join(map(str, folders))
        raise UserError(
            f"No checkpoint in {where} can be continued from. {' '.join(faults)} Move them away to start anew."
        )
    return None


def check_same_checkpoint(ranks: Parallel, path: str | os.PathLike[str] | None) -> None:
    """Refuse a run whose processes found different checkpoints for `last`. Each process searches on its own.

    Raises:
        UserError: the checkpoints differ. Raised on every rank; the message lists them.
    """
    found: dict[str, list[int]] = {}
    for rank, other in enumerate(ranks.gather(None if path is None else os.fspath(path))):
        found.setdefault(other or "the beginning", []).append(rank)
    if len(found) > 1:
        said = "; ".join(f"rank {', '.join(map(str, who))} from {where}" for where, who in found.items())
        raise UserError(
            f"The processes would continue from different checkpoints: {said}. The nodes do not see the same files "
            "(yet): start again in a minute, or name one with `--ckpt_path`, in a folder that all nodes share."
        )


def settle(folder: str | os.PathLike[str]) -> None:
    """Clean up a folder of checkpoints after killed saves.

    A complete directory of shards gets its final name. A previous checkpoint whose replacement is incomplete gets its
    name back. Everything else that is unfinished is deleted. Only one process may call this, while no other process
    reads or writes there.
    """
    for left in sorted(Path(folder).glob("*.unfinished")):
        path = left.with_name(left.name.removesuffix(".unfinished"))
        if left.is_file():
            left.unlink()
        elif is_whole(left):
            put_in_place(path)
            _write_beside(path)
        else:
            remove(left)
    for left in sorted(Path(folder).glob("*.ckpt.earlier")):
        path = left.with_name(left.name.removesuffix(".earlier"))
        if path.is_file() or is_whole(path) or not is_whole(left):
            remove(left)
        else:
            remove(path)
            os.replace(left, path)
            _write_beside(path)


def _candidates(folder: Path) -> Iterator[Path]:
    yield from (path for path in folder.glob("*.ckpt") if path.exists())  # leaves out dangling links
    yield from (path for name in (unfinished, earlier) for path in folder.glob(name("*.ckpt")) if is_whole(path))


def _write_beside(path: Path) -> None:
    state = CheckpointState.at(path)
    assert state is not None
    state.write_beside(path)


def _of_other_runs(found: Sequence[_Found], run: Continuation | None) -> list[_Found]:
    """If the checkpoints are of several runs: those of runs that never had this run's settings. Else none.

    Raises:
        UserError: no run has this run's settings.
    """
    runs = {one.state.run for one in found}
    if run is None or len(runs) < 2:
        return []
    own = {one.state.run for one in found if not _difference(one.state, run)}
    if not own:
        said = "; ".join(f"{one.path} (step {one.state.step}, other {_difference(one.state, run)})" for one in found)
        raise UserError(
            f"There are checkpoints of {len(runs)} runs, and none has the settings of this one: {said}. Name the one "
            "to continue with `--ckpt_path`, or move the others away."
        )
    return [one for one in found if one.state.run not in own]


def _difference(state: CheckpointState, run: Continuation | None) -> str:
    """Names of the sections that differ; empty if none differs, or if one configuration is unknown."""
    if run is None or not run.config or not state.config:
        return ""
    ours, theirs = _sections(run.config), _sections(state.config)
    return ", ".join(f"`{name}`" for name in SETTINGS if ours[name] != theirs[name])


def _sections(config: str) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(config)
    except yaml.YAMLError:
        settings = None
    return {name: settings.get(name) if isinstance(settings, dict) else None for name in SETTINGS}
