"""The state of a run in a checkpoint, the files beside it, and atomic writing of checkpoints.

The files beside `NAME.ckpt` are `NAME.stage_plan.json`, `NAME.kv_policy.json` (if there is a policy) and
`NAME.config.yaml`.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor
from typing_extensions import override

from pdtrim_pl.checkpoints.run_record import RunRecord, check_run_name
from pdtrim_pl.checkpoints.sharded import ShardedCheckpoint
from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import STAGES, KVRetentionPolicy, ModelRef, Stage, StagePlan
from pdtrim_pl.plan.json_files import check_format, write_whole
from pdtrim_pl.staged.lora import LoRA

CHECKPOINT_FORMAT = "pdtrim.checkpoint/1"
_UNREADABLE = (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile)


@dataclass(frozen=True)
class CheckpointState:
    """The part of a checkpoint that this package adds."""

    KEY: ClassVar[str] = "pdtrim"
    plan: StagePlan
    policy: KVRetentionPolicy | None
    record: RunRecord
    config: str
    """Resolved YAML of the run; empty outside the command line."""
    processes: int = 1
    """Number of processes that trained. Each has its own random generators and its own position in the data."""
    untied: Mapping[Stage, tuple[int, ...]] = field(default_factory=dict)
    """Per stage: blocks that have weights of their own in this checkpoint, including blocks that have left the plan."""
    added: tuple[tuple[Stage, int], ...] = ()
    """(stage, block) pairs of `untied` that were created after the optimizer. The optimizer holds their states last, in
    this order."""
    run: str = ""
    """Name of the run. It stays the same when the run is continued."""
    step: int = 0
    """Number of optimizer steps that the run has made."""
    lora: LoRA | None = None
    """Settings of the student's adapters; None if it has none."""

    def to_json(self) -> dict[str, Any]:
        """The state as JSON values, so that a checkpoint loads with `weights_only`."""
        policy = None if self.policy is None else self.policy.to_json(self.plan)
        record = self.record.to_json()
        return {
            "format": CHECKPOINT_FORMAT, "plan": self.plan.to_json(), "policy": policy, "record": record,
            "config": self.config, "processes": self.processes,
            "untied": {stage: list(blocks) for stage, blocks in self.untied.items()},
            "added": [list(entry) for entry in self.added], "run": self.run, "step": self.step,
            "lora": None if self.lora is None else dict(vars(self.lora)),
        }  # fmt: skip

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> CheckpointState:
        """Read the state from a loaded checkpoint.

        Raises:
            UserError: it is not a checkpoint of this package, or of another format version.
        """
        return cls.from_json(checkpoint.get(cls.KEY, {}))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CheckpointState:
        """Read what `to_json` wrote; errors as in `of`. Keys of mappings may be strings, as JSON makes them."""
        check_format(data, CHECKPOINT_FORMAT, "checkpoint")
        policy = None if data["policy"] is None else KVRetentionPolicy.from_json(data["policy"])
        plan, record = StagePlan.from_json(data["plan"]), RunRecord.from_json(data["record"])
        # Older checkpoints lack these keys: no weights were added, the run has no name, and its last loss tells the
        # step.
        added = tuple((stage, index) for stage, index in data.get("added", ()))
        untied, run = _untied(data["untied"]), data.get("run", "")
        check_run_name(run)
        step = data.get("step", record.losses[-1][0] if record.losses else 0)
        lora = LoRA(**data["lora"]) if data.get("lora") else None
        return cls(plan, policy, record, data["config"], data["processes"], untied, added, run, step, lora)

    @classmethod
    def at(cls, checkpoint: str | os.PathLike[str] | None) -> CheckpointState | None:
        """Read the state of a checkpoint on disk, without its weights; None if there is no checkpoint.

        The files beside the checkpoint are not read: if the run was killed during a save, they may be newer.

        Raises:
            UserError: the file cannot be read, or is not a checkpoint of this package.
        """
        if checkpoint is None or not Path(checkpoint).exists():
            return None
        if Path(checkpoint).is_dir():
            return cls.from_json(ShardedCheckpoint.load(checkpoint).state)
        return cls.of(mapped(checkpoint))

    def write_beside(self, checkpoint: str | os.PathLike[str]) -> None:
        """Write plan, policy and YAML beside a checkpoint."""
        self.plan.save(sidecar(checkpoint, "stage_plan.json"))
        write_whole(sidecar(checkpoint, "config.yaml"), self.config)
        policy = sidecar(checkpoint, "kv_policy.json")
        if self.policy is None:
            policy.unlink(missing_ok=True)
        else:
            self.policy.save(policy, self.plan)

    def check_adapters(self, lora: LoRA | None) -> None:
        """Refuse a checkpoint whose adapters are not those of this run.

        Raises:
            UserError: only one of them has adapters, or their settings differ.
        """
        if self.lora != lora:
            raise UserError(
                f"The checkpoint was trained with {self.lora or 'no adapters'}, and `trainable` gives "
                f"{lora or 'none'}. Set it as it was when the run was started."
            )

    def check_model(self, model: ModelRef) -> None:
        """Refuse a checkpoint of another model.

        Raises:
            UserError: model type or number of blocks differ.
        """
        saved = self.plan.model
        if (saved.model_type, saved.num_blocks) != (model.model_type, model.num_blocks):
            raise UserError(
                f"The checkpoint is of {saved.name_or_path!r} ({saved.model_type}, {saved.num_blocks} blocks), and "
                f"`model` is {model.name_or_path!r} ({model.model_type}, {model.num_blocks} blocks). Name the same one."
            )

    def check_processes(self, processes: int) -> None:
        """Refuse to continue a run with another number of processes.

        Raises:
            UserError: the numbers differ.
        """
        if self.processes != processes:
            raise UserError(
                f"The checkpoint is of a run of {self.processes} process(es), and this one has {processes}: the places "
                "in the data would not fit. Continue with the same `trainer.devices` and `trainer.num_nodes`."
            )


class PlanCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name, writes plan, policy and YAML beside it, and then renames it."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if "://" in os.fspath(path):  # remote file systems have no atomic rename
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        unfinished = f"{os.fspath(path)}.unfinished"
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            _write(checkpoint, unfinished)
            if CheckpointState.KEY in checkpoint:
                CheckpointState.of(checkpoint).write_beside(path)
            os.replace(unfinished, path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise unwritable(path, error) from error
        finally:
            Path(unfinished).unlink(missing_ok=True)

    @override
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        check_file(path)
        try:
            return super().load_checkpoint(path, *args, **kwargs)
        except _UNREADABLE as error:
            raise _unreadable(path, error) from error

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        super().remove_checkpoint(path)
        remove_beside(path)


def unwritable(path: str | os.PathLike[str], reason: object) -> OSError:
    """The error for a checkpoint that cannot be written."""
    return OSError(
        f"The checkpoint {path} cannot be written ({reason}); earlier ones are untouched. Free some space or name "
        "another `dirpath`, then continue with `--ckpt_path`."
    )


def sidecar(checkpoint: str | os.PathLike[str], name: str) -> Path:
    """Path of a file beside a checkpoint: `last.ckpt` -> `last.stage_plan.json`."""
    path = Path(checkpoint)
    return path.with_name(f"{path.name.removesuffix('.ckpt')}.{name}")


def remove_beside(checkpoint: str | os.PathLike[str]) -> None:
    """Delete plan, policy and YAML beside a checkpoint that was deleted."""
    for name in ("stage_plan.json", "kv_policy.json", "config.yaml"):
        sidecar(checkpoint, name).unlink(missing_ok=True)


def mapped(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a checkpoint file memory-mapped: tensors stay on disk until they are used.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        loaded: dict[str, Any] = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
    except _UNREADABLE as error:
        raise _unreadable(checkpoint, error) from error
    return loaded


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Check that a folder can be written to. A missing folder is created.

    Raises:
        UserError: the folder cannot be written to.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
    except OSError as error:
        raise UserError(
            f"Nothing can be written to {folder} ({error}). Name another folder (`dirpath` of ModelCheckpoint, "
            "`output` of ExportPair, `trainer.default_root_dir`), or free it."
        ) from error


def check_file(checkpoint: str | os.PathLike[str]) -> None:
    """Refuse a directory of shards in a run that needs a checkpoint file.

    Raises:
        UserError: the checkpoint is a directory.
    """
    if Path(checkpoint).is_dir():
        raise UserError(
            f"The checkpoint {checkpoint} is a directory of shards. They are continued with `strategy: {{class_path: "
            "pdtrim_pl.strategies.PDTrimDeepSpeedStrategy}` and the `stage` they were saved under; `pdtrim export` "
            "takes them as they are."
        )


def check_weights(saved: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint whose weights do not have exactly the names and shapes of this student's.

    Raises:
        UserError: tensors are missing, unknown or of another shape. The message names the first three of each kind.
    """
    faults = {
        "missing": [name for name in expected if name not in saved],
        "unknown": [name for name in saved if name not in expected],
        "of another shape": [n for n in expected if n in saved and saved[n].shape != expected[n].shape],
    }
    said = [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in faults.items() if names]
    if said:
        raise UserError(
            f"The checkpoint does not hold this student's weights: tensors {'; '.join(said)}. Name the `model` that "
            "the run was started with."
        )


def _write(checkpoint: dict[str, Any], path: str) -> None:
    """Write a checkpoint and flush it to disk, so that its bytes are there before the rename becomes visible."""
    with open(path, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())


def _untied(data: Mapping[Any, Sequence[int]]) -> dict[Stage, tuple[int, ...]]:
    return {stage: tuple(data.get(stage, ())) for stage in STAGES}


def _unreadable(path: str | os.PathLike[str], error: Exception) -> UserError:
    return UserError(
        f"The checkpoint {path} cannot be read ({error}). It is damaged, or no checkpoint: give `ckpt_path` the one "
        "before it."
    )
