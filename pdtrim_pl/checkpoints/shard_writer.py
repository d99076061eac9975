"""How one rank writes its part of a DeepSpeed checkpoint: on disk, listed, and with an error that all get to know."""

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
    """One rank's part in writing a directory of shards.

    No error leaves it in the middle of a save, where the other ranks wait for this one: what cannot be written is kept
    in `error`, nothing is written after it, and the ranks have to compare.

    Args:
        directory: the checkpoint under its temporary name, on a file system that all nodes share.
    """

    def __init__(self, directory: str | PathLike[str]) -> None:
        self.directory = Path(directory)
        self.files: dict[str, int] = {}
        """Bytes of every file that this rank has written, by its name in the directory. All are on disk."""
        self.error = ""
        """Why this rank could not write; empty as long as it could."""

    def save(self, engine: Any, checkpoint: Mapping[str, Any]) -> None:
        """Have a `DeepSpeedEngine` write its shards; every rank must call it."""
        client_state = {key: value for key, value in checkpoint.items() if key not in _NOT_CLIENT_STATE}
        with self._between(engine):
            engine.save_checkpoint(
                str(self.directory), tag=TAG, client_state=client_state, save_latest=False,
                exclude_frozen_parameters=True,
            )  # fmt: skip
        if engine.global_rank == 0:
            self.attempt(self._write_latest)

    def attempt(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Take a step that writes, unless one before it failed."""
        if self.error:
            return
        try:
            step(*args, **kwargs)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            self.error = f"{error}".partition("\n")[0] or repr(error)

    @contextmanager
    def _between(self, engine: Any) -> Generator[None, None, None]:
        """Stand between the engine and the disk."""
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
                delattr(owner, name)  # what its class has comes back

    def _write_shard(self, save: Callable[..., Any], state_dict: Mapping[str, Any], path: str) -> None:
        try:
            save(state_dict, path)
        except RuntimeError as error:  # torch tells neither which file nor why
            raise RuntimeError(f"{Path(path).name}: {error}") from error
        self._add(Path(path))

    def _write_latest(self) -> None:
        """Tell DeepSpeed where to look; its own way of doing so would keep the others waiting where it fails."""
        path = self.directory / "latest"
        path.write_text(TAG, encoding="utf-8")
        self._add(path)

    def _add(self, path: Path) -> None:
        sync(path)
        self.files[path.relative_to(self.directory).as_posix()] = path.stat().st_size
