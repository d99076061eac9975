"""What a checkpoint says besides weights, the files beside it, and how it is written.

Beside `NAME.ckpt` lie `NAME.stage_plan.json`, `NAME.kv_policy.json` (where there is a policy) and `NAME.config.yaml`.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor
from typing_extensions import override

from pdtrim_pl.plan import ModelRef, StagePlan, check_format
from pdtrim_pl.policy import KVRetentionPolicy
from pdtrim_pl.record import RunRecord

CHECKPOINT_FORMAT = "pdtrim.checkpoint/1"


@dataclass(frozen=True)
class CheckpointState:
    """The part of a checkpoint that this package owns."""

    KEY: ClassVar[str] = "pdtrim"
    plan: StagePlan
    policy: KVRetentionPolicy | None
    record: RunRecord
    config: str
    """The run's resolved YAML; empty outside the command line."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, so that a checkpoint loads with `weights_only`."""
        policy = None if self.policy is None else self.policy.to_json(self.plan)
        record = self.record.to_json()
        return {
            "format": CHECKPOINT_FORMAT, "plan": self.plan.to_json(), "policy": policy, "record": record,
            "config": self.config,
        }  # fmt: skip

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> CheckpointState:
        """Read it from a loaded checkpoint.

        Raises:
            ValueError: not a checkpoint of this package, or of another format version.
        """
        data = checkpoint.get(cls.KEY, {})
        check_format(data, CHECKPOINT_FORMAT, "checkpoint")
        policy = None if data["policy"] is None else KVRetentionPolicy.from_json(data["policy"])
        return cls(StagePlan.from_json(data["plan"]), policy, RunRecord.from_json(data["record"]), data["config"])

    @classmethod
    def beside(cls, checkpoint: str | os.PathLike[str] | None) -> CheckpointState | None:
        """Plan and policy from the files beside a checkpoint; None where there are none."""
        if checkpoint is None or not sidecar(checkpoint, "stage_plan.json").is_file():
            return None
        plan = StagePlan.load(sidecar(checkpoint, "stage_plan.json"))
        file = sidecar(checkpoint, "kv_policy.json")
        return cls(plan, KVRetentionPolicy.load(file, plan) if file.is_file() else None, RunRecord(), "")

    def write_beside(self, checkpoint: str | os.PathLike[str]) -> None:
        """Write the files beside a checkpoint."""
        self.plan.save(sidecar(checkpoint, "stage_plan.json"))
        sidecar(checkpoint, "config.yaml").write_text(self.config, encoding="utf-8")
        policy = sidecar(checkpoint, "kv_policy.json")
        if self.policy is None:
            policy.unlink(missing_ok=True)
        else:
            self.policy.save(policy, self.plan)

    def check_model(self, model: ModelRef) -> None:
        """Refuse a checkpoint of another model.

        Raises:
            ValueError: with both models.
        """
        saved = self.plan.model
        if (saved.model_type, saved.num_blocks) != (model.model_type, model.num_blocks):
            raise ValueError(
                f"The checkpoint is of {saved.name_or_path!r} ({saved.model_type}, {saved.num_blocks} blocks), and "
                f"`model` is {model.name_or_path!r} ({model.model_type}, {model.num_blocks} blocks). Name the same one."
            )


class PlanCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name and renames it, with plan, policy and YAML beside it."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if "://" in os.fspath(path):  # a remote file system has neither rename nor a place for the small files
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        unfinished = f"{os.fspath(path)}.unfinished"
        try:
            super().save_checkpoint(checkpoint, unfinished, storage_options)
            if CheckpointState.KEY in checkpoint:
                CheckpointState.of(checkpoint).write_beside(path)
            os.replace(unfinished, path)
        finally:
            Path(unfinished).unlink(missing_ok=True)

    @override
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return super().load_checkpoint(path, *args, **kwargs)
        except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"The checkpoint {path} cannot be read ({error}). It is damaged, or no checkpoint: give `ckpt_path` "
                "the one before it."
            ) from error

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        super().remove_checkpoint(path)
        for name in ("stage_plan.json", "kv_policy.json", "config.yaml"):
            sidecar(path, name).unlink(missing_ok=True)


def sidecar(checkpoint: str | os.PathLike[str], name: str) -> Path:
    """Path of a small file beside a checkpoint: `last.ckpt` -> `last.stage_plan.json`."""
    path = Path(checkpoint)
    return path.with_name(f"{path.name.removesuffix('.ckpt')}.{name}")


def check_weights(saved: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint whose student weights are not exactly those of the student here.

    Raises:
        ValueError: naming missing, unknown and misshapen tensors (the first few of each).
    """
    faults = {
        "missing": [name for name in expected if name not in saved],
        "unknown": [name for name in saved if name not in expected],
        "of another shape": [n for n in expected if n in saved and saved[n].shape != expected[n].shape],
    }
    said = [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in faults.items() if names]
    if said:
        raise ValueError(
            f"The checkpoint does not hold this student's weights: tensors {'; '.join(said)}. Name the `model` that "
            "the run was started with."
        )
