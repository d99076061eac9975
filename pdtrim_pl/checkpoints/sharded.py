"""A DeepSpeed checkpoint: a directory of shards, with a note that is written last and says what they are of.

`NAME.ckpt/pdtrim.json` is that note; plan, policy and YAML lie beside the directory as beside a checkpoint file. While
it is written it is `NAME.ckpt.unfinished`, and the one whose name it takes is `NAME.ckpt.earlier` until it has it.
The note also lists the shards with their sizes, so that one of which a shard is short or gone is not taken for whole.
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
"""Lightning's name of the directory that DeepSpeed's files lie in."""
_READABLE = (NOTE_FORMAT, "pdtrim.sharded_checkpoint/2")  # the older one lists no files
_ENGINE_KEYS = frozenset(
    {"module", "optimizer", "lr_scheduler", "csr_tensor_module_names", "skipped_steps", "global_steps", "dp_world_size",
     "mp_world_size"}
)  # fmt: skip


@dataclass(frozen=True)
class ShardedCheckpoint:
    """What a directory of shards is of."""

    stage: int
    """ZeRO stage."""
    processes: int
    weights: str
    """SHA-256 of the names and shapes of the student's weights."""
    state: Mapping[str, Any] = field(default_factory=dict)
    """`CheckpointState` as JSON: what lies beside the directory is not replaced in the same instant."""
    files: Mapping[str, int] = field(default_factory=dict)
    """Bytes of every file without which it cannot be loaded, by its name in the directory. Checkpoints from before
    there was this list have none, and a torn one of them shows only when it is loaded."""

    @classmethod
    def of(
        cls, stage: int, processes: int, student: StagedCausalLM, state: Mapping[str, Any] | None = None,
        files: Mapping[str, int] | None = None,
    ) -> ShardedCheckpoint:  # fmt: skip
        """Describe a run as it is now."""
        shapes = sorted((name, list(_whole_shape(parameter))) for name, parameter in student.named_parameters())
        weights = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()
        return cls(stage, processes, weights, state or {}, files or {})

    def save(self, directory: str | PathLike[str]) -> None:
        """Write the note; call it once every shard is on disk. The directory may be renamed when it returns."""
        note = Path(directory) / NOTE_FILE
        note.write_text(json.dumps({"format": NOTE_FORMAT, **asdict(self)}, indent=2) + "\n", encoding="utf-8")
        sync(note)
        for folder in {note.parent, *((note.parent / name).parent for name in self.files)}:
            with suppress(OSError):  # some network file systems cannot for a directory
                sync(folder)

    @classmethod
    def load(cls, directory: str | PathLike[str]) -> ShardedCheckpoint:
        """Read the note.

        Raises:
            UserError: no such directory, or one that was never finished, or of another format, or a file that it
                lists is missing or not as long as it was.
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
        """Refuse to continue it in a run that differs.

        Raises:
            UserError: naming every difference.
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
    """A directory of shards as the checkpoint one process would have written, weights in fp32, without optimizer.

    Raises:
        UserError: unfinished, damaged, or not of this package.
    """
    return {**read_run_state(directory), "state_dict": read_weights(directory)}


def read_run_state(directory: str | PathLike[str]) -> dict[str, Any]:
    """What a directory of shards says besides weights and optimizer; errors as in `read_sharded`."""
    stage = ShardedCheckpoint.load(directory).stage
    saved = _load_safely(Path(model_state_file(os.path.join(directory, TAG), stage)))
    return {key: value for key, value in saved.items() if key not in _ENGINE_KEYS}


def read_weights(directory: str | PathLike[str]) -> dict[str, Tensor]:
    """The student's whole weights in fp32, by name; errors as in `check_harmless`."""
    check_harmless(directory)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    weights: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(
        directory, tag=TAG, exclude_frozen_parameters=True
    )
    return weights


def check_harmless(directory: str | PathLike[str]) -> None:
    """Refuse shards that would run code when they are loaded, for DeepSpeed loads them with all that pickle can do.

    Raises:
        UserError: a shard holds something else than tensors, plain values and what DeepSpeed itself writes.
    """
    for file in sorted(Path(directory).glob(f"{TAG}/*.pt")):
        _load_safely(file)


def _load_safely(file: Path) -> dict[str, Any]:
    """A shard, mapped: its tensors stay on disk."""
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
    """Name of a checkpoint while it is written."""
    return f"{os.fspath(path)}.unfinished"


def earlier(path: str | PathLike[str]) -> str:
    """Name of a checkpoint while another one takes its name."""
    return f"{os.fspath(path)}.earlier"


def put_in_place(path: str | PathLike[str]) -> None:
    """Give a finished directory its name; an earlier one of that name goes.

    Killed at any point, it leaves the finished one whole under one of its names.
    """
    remove(earlier(path))
    if os.path.isdir(path) or os.path.islink(path):  # also a link to nothing, which no directory could replace
        os.replace(path, earlier(path))
    os.replace(unfinished(path), path)
    remove(earlier(path))


def is_whole(directory: str | PathLike[str]) -> bool:
    """Whether it was finished, and nothing of it is short or gone."""
    try:
        ShardedCheckpoint.load(directory)
    except ValueError:
        return False
    return True


def remove(directory: str | PathLike[str]) -> None:
    """Delete a directory of shards if there is one, its note first: what a kill leaves is not taken for whole.

    Of a link to one only the link goes.
    """
    if os.path.islink(directory):
        os.unlink(directory)
        return
    (Path(directory) / NOTE_FILE).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def sync(path: str | PathLike[str]) -> None:
    """Return once a file's bytes, or a directory's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """A parameter's shape; one that ZeRO-3 has cut up keeps it in `ds_shape`."""
    shape: tuple[int, ...] = vars(parameter).get("ds_shape", parameter.shape)
    return tuple(shape)
