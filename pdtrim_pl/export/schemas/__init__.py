"""JSON Schemas (2020-12) of the files that other engines read, and a check of files against them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import FIRST_PLAN_FORMAT, FIRST_POLICY_FORMAT, PAIR_FORMAT, PLAN_FORMAT, POLICY_FORMAT
from pdtrim_pl.plan.json_files import check_format, read_json

SCHEMAS: Mapping[str, str] = MappingProxyType(
    {
        PLAN_FORMAT: "stage_plan.schema.json",
        FIRST_PLAN_FORMAT: "stage_plan.1.schema.json",
        POLICY_FORMAT: "kv_policy.schema.json",
        FIRST_POLICY_FORMAT: "kv_policy.1.schema.json",
        PAIR_FORMAT: "pair.schema.json",
    }
)
"""Format and version -> file of this package."""
TITLES: Mapping[str, str] = MappingProxyType(
    {
        PLAN_FORMAT: "stage plan",
        FIRST_PLAN_FORMAT: "stage plan",
        POLICY_FORMAT: "KV policy",
        FIRST_POLICY_FORMAT: "KV policy",
        PAIR_FORMAT: "manifest of a pair",
    }
)


def schema_of(format: str) -> dict[str, Any]:
    """The JSON Schema of one of the `SCHEMAS`."""
    schema: dict[str, Any] = json.loads(files(__package__).joinpath(SCHEMAS[format]).read_text(encoding="utf-8"))
    return schema


def validate(data: Any, format: str) -> None:
    """Check a parsed file against the schema of `format`.

    Raises:
        UserError: another format or version, or the most relevant fault with its place.
    """
    check_format(data, format, "file")
    fault = best_match(Draft202012Validator(schema_of(format)).iter_errors(data))
    if fault is not None:
        raise UserError(f"at {fault.json_path}: {fault.message}")


def validate_file(path: Path, format: str | None = None, earlier: str | None = None) -> Any:
    """Check a `stage_plan.json`, `kv_policy.json` or `pair.json` against its schema, and return what it holds.

    Args:
        path: the file.
        format: the format and version it must have; None takes the one it names itself.
        earlier: an earlier version that is taken too.

    Raises:
        UserError: the file does not fit; the message names the file and the fault.
    """
    data = read_json(path, "stage plan or KV policy" if format is None else TITLES[format])
    named = data.get("format") if isinstance(data, dict) else None
    if format is None:
        format = str(named) if named in SCHEMAS else " or ".join(SCHEMAS)
    elif earlier is not None and named == earlier:
        format = earlier
    try:
        validate(data, format)
    except ValueError as error:
        raise UserError(f"{path} cannot be used: {error}") from error
    return data
