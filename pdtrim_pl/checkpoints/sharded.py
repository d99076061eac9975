"""A DeepSpeed checkpoint: a directory of shards, and a note that describes them.

The note is `NAME.ckpt/pdtrim.json`. It is written last and lists all shards with their sizes, so that an incomplete
directory is recognised. Plan, policy and YAML are files beside the directory, as for a checkpoint file. During a save
the directory is called `NAME.ckpt.unfinished`. An existing checkpoint of the same name is called `NAME.ckpt.earlier`
while it is being replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pdtrim_pl.compat import model_state_file
from pdtrim_pl.errors import UserError
from pdtrim_pl.staged import StagedCausalLM

NOTE_FILE = "pdtrim.json"
NOTE_FORMAT = "pdtrim.sharded_checkpoint/3"
TAG = "checkpoint"
"""Lightning's name for the subdirectory of DeepSpeed's files."""
_READABLE = (NOTE_FORMAT, "pdtrim.sharded_checkpoint/2")  # version 2 has no list of files
_ENGINE_KEYS = frozenset(
    {"module", "optimizer", "lr_scheduler", "csr_tensor_module_names", "skipped_steps", "global_steps", "dp_world_size",
     "mp_world_size"}
)  # fmt: skip


@dataclass(frozen=True)
class ShardedCheckpoint:
    """The note of a directory of shards."""

    stage: int
    """ZeRO stage."""
    processes: int
    """Number of processes that wrote the shards."""
    weights: str
    """SHA-256 of the names and shapes of the student's weights."""
    state: Mapping[str, Any] = field(default_factory=dict)
    """`CheckpointState` as JSON. The files beside the directory may be of another save than the directory."""
    files: Mapping[str, int] = field(default_factory=dict)
    """File name in the directory -> size in bytes, for every file that loading needs. Older checkpoints have no such
    list; if one of them is incomplete, loading fails."""

    @classmethod
    def of(
        cls, stage: int, processes: int, student: StagedCausalLM, state: Mapping[str, Any] | None = None,
        files: Mapping[str, int] | None = None,
    ) -> ShardedCheckpoint:  # fmt: skip
        """The note for the present state of a run."""
        shapes = sorted((name, list(_whole_shape(parameter))) for name, parameter in student.named_parameters())
        weights = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()
        return cls(stage, processes, weights, state or {}, files or {})

    def save(self, directory: str | PathLike[str]) -> None:
        """Write the note. Call this when every shard is on disk. Afterwards the directory may be renamed."""
        note = Path(directory) / NOTE_FILE
        note.write_text(json.dumps({"format": NOTE_FORMAT, **asdict(self)}, indent=2) + "\n", encoding="utf-8")
        sync(note)
        for folder in {note.parent, *((note.parent / name).parent for name in self.files)}:
            with suppress(OSError):  # some network file systems cannot sync a directory
                sync(folder)

    @classmethod
    def load(cls, directory: str | PathLike[str]) -> ShardedCheckpoint:
        """Read the note.

        Raises:
            UserError: there is no such directory, it is incomplete or of another format, or a listed file is missing or
                of another size.
        """
        path = Path(directory)
        if not path.is_dir():
            raise UserError(
                f"`ckpt_path` {path} is no directory of shards. DeepSpeed continues only what DeepSpeed saved; start "
                "a run from a plan alone with `structure.plan`."
            )
        try:
            note = json.loads((path / NOTE_FILE).read_text(encoding="utf-8"))
            found = note.pop("format")
            if found not in _READABLE:
                raise UserError(f"its `format` is {found!r}, and this version reads {NOTE_FORMAT!r}")
            saved = cls(**note)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"The checkpoint {path} cannot be read ({error}). It is unfinished, or not of this package: give "
                "`ckpt_path` the one before it."
            ) from error
        saved._check_files(path)
        return saved

    def _check_files(self, path: Path) -> None:
        sizes = {name: _size(path / name) for name in self.files}
        faults = [
            f"shard {name} is missing" if sizes[name] is None else f"shard {name} has {sizes[name]} of {size} bytes"
            for name, size in self.files.items()
            if sizes[name] != size
        ]
        if faults:
            more = f", and {len(faults) - 3} more are like that" if len(faults) > 3 else ""
            raise UserError(
                f"The checkpoint {path} is torn: {', '.join(faults[:3])}{more}. Give `ckpt_path` the one before it."
            )

    def check(self, run: ShardedCheckpoint, path: str | PathLike[str]) -> None:
        """Refuse to continue this checkpoint in a run that differs in processes, ZeRO stage or weights.

        Raises:
            UserError: the run differs. The message names every difference.
        """
        faults = []
        if self.processes != run.processes:
            faults.append(f"was saved by {self.processes} process(es), and this run has {run.processes}")
        if self.stage != run.stage:
            faults.append(f"was saved under ZeRO stage {self.stage}, and this run has `stage: {run.stage}`")
        if self.weights != run.weights:
            faults.append("holds weights of other names or shapes than those of `model`")
        if faults:
            raise UserError(
                f"The checkpoint {path} {'; it '.join(faults)}. Shards fit only the run they were cut for: set "
                "`devices`, `num_nodes`, `stage` and `model` back. `pdtrim export` takes the checkpoint as it is."
            )


def read_sharded(directory: str | PathLike[str]) -> dict[str, Any]:
    """Read a directory of shards in the form of a checkpoint of one process: weights in fp32, without optimizer states.

    Raises:
        UserError: the directory is incomplete, damaged, or not of this package.
    """
    return {**read_run_state(directory), "state_dict": read_weights(directory)}


def read_run_state(directory: str | PathLike[str]) -> dict[str, Any]:
    """The content of a directory of shards without weights and optimizer states; errors as in `read_sharded`."""
    stage = ShardedCheckpoint.load(directory).stage
    saved = _load_safely(Path(model_state_file(os.path.join(directory, TAG), stage)))
    return {key: value for key, value in saved.items() if key not in _ENGINE_KEYS}


def read_weights(directory: str | PathLike[str]) -> dict[str, Tensor]:
    """The whole weights of the student in fp32, by name; errors as in `check_harmless`."""
    check_harmless(directory)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    weights: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(
        directory, tag=TAG, exclude_frozen_parameters=True
    )
    return weights


def check_harmless(directory: str | PathLike[str]) -> None:
    """Refuse shards that could run code when they are loaded: DeepSpeed loads them with unrestricted pickle.

    Raises:
        UserError: a shard holds anything but tensors, plain values and classes that DeepSpeed itself writes.
    """
    for file in sorted(Path(directory).glob(f"{TAG}/*.pt")):
        _load_safely(file)


def _load_safely(file: Path) -> dict[str, Any]:
    """Load a shard memory-mapped, so that its tensors stay on disk."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    written_by_deepspeed: list[Any] = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    try:
        with torch.serialization.safe_globals(written_by_deepspeed):
            saved: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"The shard {file} is not loaded: it holds more than tensors and what DeepSpeed writes, and could run code "
            f"({str(error).splitlines()[0]}). Continue from a checkpoint of your own."
        ) from error
    except (RuntimeError, EOFError) as error:
        raise UserError(
            f"The shard {file} cannot be read ({str(error).splitlines()[0]}). Give `ckpt_path` the checkpoint before "
            "it."
        ) from error
    return saved


def unfinished(path: str | PathLike[str]) -> str:
    """Name of a checkpoint while it is being written."""
    return f"{os.fspath(path)}.unfinished"


def earlier(path: str | PathLike[str]) -> str:
    """Name of a checkpoint while it is being replaced."""
    return f"{os.fspath(path)}.earlier"


def put_in_place(path: str | PathLike[str]) -> None:
    """Give a complete directory its final name, and delete the earlier checkpoint of this name.

    If the process is killed at any point, the new checkpoint is complete under its temporary or its final name.
    """
    remove(earlier(path))
    if os.path.isdir(path) or os.path.islink(path):  # a dangling link too: a directory cannot replace it
        os.replace(path, earlier(path))
    os.replace(unfinished(path), path)
    remove(earlier(path))


def is_whole(directory: str | PathLike[str]) -> bool:
    """Whether the note was written, and every listed file has its size."""
    try:
        ShardedCheckpoint.load(directory)
    except ValueError:
        return False
    return True


def remove(directory: str | PathLike[str]) -> None:
    """Delete a directory of shards, if it exists. The note goes first: a partly deleted directory is then incomplete.

    If the path is a link, only the link is deleted.
    """
    if os.path.islink(directory):
        os.unlink(directory)
        return
    (Path(directory) / NOTE_FILE).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def sync(path: str | PathLike[str]) -> None:
    """Flush a file, or the names in a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The whole shape of a parameter. A parameter that ZeRO-3 has sharded stores it in `ds_shape`."""
    shape: tuple[int, ...] = vars(parameter).get("ds_shape", parameter.shape)
    return tuple(shape)
