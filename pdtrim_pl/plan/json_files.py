"""Write small JSON files atomically, and read them with errors that name the file. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdtrim_pl.errors import UserError


def check_format(data: Mapping[str, Any], expected: str, what: str, earlier: str | None = None) -> None:
    """Refuse JSON of another format or version than `expected`.

    Args:
        data: the parsed JSON.
        expected: format and version, such as `pdtrim.stage_plan/2`.
        what: what the file holds, for the message.
        earlier: an earlier version that is accepted too.

    Raises:
        UserError: the format differs. The message gives the format found and the one expected.
    """
    found = data.get("format") if isinstance(data, Mapping) else None
    if found != expected and (earlier is None or found != earlier):
        raise UserError(
            f"This {what} has `format` {found!r}, and this version of pdtrim_pl reads {expected!r}. "
            "Write it again with the version that is installed, or install the version that wrote it."
        )


def write_whole(path: Path, text: str) -> None:
    """Write a small file atomically: a killed process leaves the old file or the new file, never a part of one."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def read_json(path: Path, what: str) -> Any:
    """Parse a JSON file.

    Raises:
        UserError: the file is missing or is not JSON. The message names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"There is no {what} at {path}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"The {what} {path} is not valid JSON: {error}.") from error
