"""Reads the files of an export; a damaged one gives one clear error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from pdtrim_pl.errors import UserError
from pdtrim_pl.models.model_files import LOADER_ERRORS

KV_ONLY_FILE = "kv_only.safetensors"


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        UserError: naming the file, if it is missing or damaged.
    """
    with blaming(path), safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


@contextlib.contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Turn the many errors of loaders on a damaged or foreign file into one UserError that names the file."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # says nothing of the file
    except LOADER_ERRORS as error:
        raise UserError(f"{path} cannot be used: {error}") from error
