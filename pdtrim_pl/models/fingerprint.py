"""Hashes of a model's files and of a tokenizer, without loading the model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from pdtrim_pl.compat import model_file
from pdtrim_pl.models.model_files import weight_files
from pdtrim_pl.models.pretrained import located

SPOT = 2**12
"""Bytes that are read at the start, in the middle and at the end of a weight."""


def model_fingerprint(name_or_path: str) -> str:
    """SHA-256 of a model's `config.json` and weights; the folder's name does not count.

    Of every weight in a safetensors file, name, type, shape and three spots of bytes are read: a model of 140 GB takes
    seconds. Files of other formats are read whole.

    Args:
        name_or_path: see `resolve_model`.
    """
    path, revision = located(name_or_path)
    digest = hashlib.sha256()
    settings = json.loads(Path(model_file(path, "config.json", revision)).read_text(encoding="utf-8"))
    named = {key: value for key, value in settings.items() if key not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(named, sort_keys=True).encode())
    for file in weight_files(path, revision):
        digest.update(_spots(Path(file)) if file.endswith(".safetensors") else _whole(Path(file)))
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of a tokenizer's tokens and their ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _spots(file: Path) -> bytes:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        header = stream.read(int.from_bytes(stream.read(8), "little"))
        first = stream.tell()
        weights = {name: facts for name, facts in json.loads(header).items() if name != "__metadata__"}
        digest.update(json.dumps(weights, sort_keys=True).encode())
        for facts in weights.values():
            start, end = facts["data_offsets"]
            for spot in (start, (start + end - SPOT) // 2, end - SPOT):
                stream.seek(first + max(start, spot))
                digest.update(stream.read(min(SPOT, end - start)))
    return digest.digest()


def _whole(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
