"""Small files of rows, and what the data module makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pdtrim_pl.data import Lengths, TextSource
from pdtrim_pl.data.examples import TokenExamples
from pdtrim_pl.data.formatting import encode
from pdtrim_pl.data.sources import load_rows
from pdtrim_pl.models.pretrained import load_tokenizer


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def written(directory: Path, data: bytes, name: str = "data.jsonl") -> str:
    (directory / name).write_bytes(data)
    return str(directory / name)


def encoded(tokenizer: Path, path: str, **source: Any) -> TokenExamples:
    return encode(load_rows(TextSource(path, **source)), load_tokenizer(str(tokenizer)), Lengths(256, 1, 128), 0)


def texts(tokenizer: Path, examples: TokenExamples) -> list[tuple[str, ...]]:
    decoder = load_tokenizer(str(tokenizer))
    return [tuple(str(decoder.decode(ids)) for ids in examples[index]) for index in range(len(examples))]
