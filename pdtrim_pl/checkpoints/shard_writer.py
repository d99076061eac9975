"""Write one rank's part of a DeepSpeed checkpoint, list its files, and report an error to all ranks."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from pdtrim_pl.checkpoints.sharded import TAG, sync
from pdtrim_pl.compat import recovery_script_step

_NOT_CLIENT_STATE = ("state_dict", "optimizer_states")  # the engine saves these itself


class ShardWriter:
    """Writes one rank's part of a directory of shards.

    It raises no error during a save, since the other ranks would then wait for this rank forever. The first error is
    stored in `error`, and nothing is written after it. The ranks must compare their errors after the save.

    Args:
        directory: the checkpoint under its temporary name, on a file system that all nodes share.
    """

    def __init__(self, directory: str | PathLike[str]) -> None:
        self.directory = Path(directory)
        self.files: dict[str, int] = {}
        """File name in the directory -> size in bytes, for every file that this rank has written to disk."""
        self.error = ""
        """The first error of this rank; empty if there is none."""

    def save(self, engine: Any, checkpoint: Mapping[str, Any]) -> None:
        """Let a `DeepSpeedEngine` write its shards. Every rank must call it."""
        client_state = {key: value for key, value in checkpoint.items() if key not in _NOT_CLIENT_STATE}
        with self._between(engine):
            engine.save_checkpoint(
                str(self.directory), tag=TAG, client_state=client_state, save_latest=False,
                exclude_frozen_parameters=True,
            )  # fmt: skip
        if engine.global_rank == 0:
            self.attempt(self._write_latest)

    def attempt(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Run a step that writes files, unless an earlier step failed. An error goes into `error`."""
        if self.error:
            return
        try:
            step(*args, **kwargs)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            self.error = f"{error}".partition("\n")[0] or repr(error)

    @contextmanager
    def _between(self, engine: Any) -> Generator[None, None, None]:
        """Route everything that the engine writes through `attempt`."""
        disk = engine.checkpoint_engine
        owner, name = recovery_script_step(engine)
        steps = [
            (disk, "makedirs", disk.makedirs),
            (disk, "save", partial(self._write_shard, disk.save)),
            (owner, name, getattr(owner, name)),
        ]
        for owner, name, step in steps:
            setattr(owner, name, partial(self.attempt, step))
        try:
            yield
        finally:
            for owner, name, _ in steps:
                delattr(owner, name)  # the method of the class is visible again

    def _write_shard(self, save: Callable[..., Any], state_dict: Mapping[str, Any], path: str) -> None:
        try:
            save(state_dict, path)
        except RuntimeError as error:  # the message of torch does not name the file
            raise RuntimeError(f"{Path(path).name}: {error}") from error
        self._add(Path(path))

    def _write_latest(self) -> None:
        """Write the `latest` file of DeepSpeed. If DeepSpeed's own code fails here, the other ranks wait forever."""
        path = self.directory / "latest"
        path.write_text(TAG, encoding="utf-8")
        self._add(path)

    def _add(self, path: Path) -> None:
        sync(path)
        self.files[path.relative_to(self.directory).as_posix()] = path.stat().st_size
