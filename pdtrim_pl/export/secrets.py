"""Removes secrets from what a report shows: it has the configuration of the run, and exports are passed on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

REDACTED = "(redacted)"
_WORDS = frozenset({"token", "password", "passwd", "passphrase", "secret", "secrets", "apikey", "credential",
                    "credentials", "authorization", "auth", "cookie"})  # fmt: skip
_PAIRS = re.compile(r"(api|access|private|account|signing|encryption|license)[_-]?key", re.IGNORECASE)
_ENVIRONMENT = frozenset({"env", "environ", "environment", "env_vars", "environment_variables"})
_IN_TEXT = (
    (re.compile(r"(?<=://)[^/\s@]+(?=@)"), REDACTED),  # the user of a URL
    (re.compile(r"([?&](?:token|key|sig|signature|secret|password|[\w-]*api[_-]?key)=)[^&\s'\"]+", re.IGNORECASE),
     rf"\g<1>{REDACTED}"),
    (re.compile(r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[bap]-|AKIA)[A-Za-z0-9_-]{12,}"), REDACTED),
)  # fmt: skip


def redacted(value: Any, key: str = "") -> Any:
    """A note of a run without what looks like a secret, by the names of keys and the contents of strings.

    Args:
        value: plain JSON values. A string that is a YAML mapping is searched too; it is unchanged if it has no secret.
        key: the key of this value.
    """
    if isinstance(value, Mapping):
        hidden = key.lower() in _ENVIRONMENT
        return {name: REDACTED if hidden else redacted(each, str(name)) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(each, key) for each in value]
    if not isinstance(value, str):
        return value
    if _is_secret(key):
        return REDACTED
    settings = _mapping_of(value)
    if settings is not None:
        public = redacted(settings)
        return value if public == settings else yaml.safe_dump(public, sort_keys=False, allow_unicode=True)
    for pattern, instead in _IN_TEXT:
        value = pattern.sub(instead, value)
    return value


def _is_secret(key: str) -> bool:
    words = re.findall(r"[a-z]+|[A-Z][a-z]*", key)
    return bool(_PAIRS.search(key)) or not _WORDS.isdisjoint(word.lower() for word in (*words, key))


def _mapping_of(text: str) -> dict[str, Any] | None:
    if "\n" not in text:
        return None
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    return found if isinstance(found, dict) else None
