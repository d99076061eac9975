"""Errors of a command line and its YAML in one line, with the nearest key that exists."""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace
from omegaconf.errors import OmegaConfBaseException
from typing_extensions import override

from pdtrim_pl.compat import options_of, refusing_parser
from pdtrim_pl.errors import UserError

_LONGEST = 300
"""Most characters of an error, which may quote a whole configuration."""
_GENERAL = re.compile(
    r"(Does not validate against any|Subtypes: |Errors:$|- Not a valid subclass of|Subclass types expect|"
    r"- a (class path|dict) |- Expected a <class 'NoneType'>|Given value)"
)
"""Lines that jsonargparse prints for every alternative of a type."""
RENAMED = {
    "said_again": "repeated_prompts", "look_back": "recall", "behind": "trailing_blocks", "tried": "screening_steps",
    "retention": "wire.trimmed",
}  # fmt: skip
"""Keys of earlier versions -> what they are called now."""
_CLASS = re.compile(r"class_path[ =]'([\w.]+)'")


class OneLineErrors(ArgumentParser):
    """A parser that prints an error in one line; jsonargparse prints the usage of every option first."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # jsonargparse only tries whether it parses
            super().error(message, ex)
        parser = refusing_parser(self, ex)
        prog = parser.prog.replace(" [options]", "")
        self.exit(2, f"pdtrim: error: {told(message, options_of(parser))} (`{prog} --help` shows all options.)\n")

    @override
    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        try:
            return super().parse_args(*args, **kwargs)
        except OmegaConfBaseException as error:
            line = str(error).splitlines()[0]
            raise UserError(
                f"The configuration cannot be resolved: {line}.{_nearest(line, options_of(self))}"
            ) from error


def told(message: str, known: Sequence[str] = ()) -> str:
    """The message of jsonargparse in one line, with the nearest key that exists.

    Args:
        message: what jsonargparse says, in many lines.
        known: keys of the parser.
    """
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    kept = [line.removeprefix("- ") for line in lines if not _GENERAL.match(line)]
    if all(line.startswith("Parser key") for line in kept):  # and what is said of every alternative: keep the first
        kept = [line.removeprefix("- ") for line in lines if not re.match(r"Subtypes|Errors|Does not", line)][:2]
    text = " ".join(kept)
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}..."
    return f"{text.rstrip('.')}.{_nearest(message, known)}"


def _nearest(message: str, known: Sequence[str]) -> str:
    """` Did you mean ...?` if an existing name is close to the wrong one, else nothing."""
    wrong, candidates = _wrong_name(message, known)
    prefix, _, name = wrong.rpartition(".")
    if (now := RENAMED.get(name)) is not None:
        now = "screening_share" if name == "tried" and "screening_share" in candidates else now
        return f" It is called `{prefix}.{now}` now." if prefix else f" It is called `{now}` now."
    close = get_close_matches(wrong, candidates, n=1, cutoff=0.6)
    return f" Did you mean `{close[0]}`?" if close else ""


def _wrong_name(message: str, known: Sequence[str]) -> tuple[str, Iterable[str]]:
    """The name that does not exist, and the names that exist in its place."""
    if match := re.search(r"unrecognized arguments: .*?--([\w.]+)", message):
        return match[1], known
    if match := re.search(r"(?:Subcommand '\w+' does not accept option|Interpolation key) '([\w.]+)'", message):
        return match[1], known
    if match := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        return match[2], [name for name in dir(importlib.import_module(match[1])) if not name.startswith("_")]
    if match := re.search(r"Group '(\w+)' does not accept option '(\w+)'", message):
        owner = _class_before(message, match.start())
        kinds = [] if owner is None else [typing.get_type_hints(owner.__init__).get(match[1])]
        return match[2], [name for kind in kinds for name in _parameters(kind)]
    if match := re.search(r"Option '(\w+)' is not accepted", message):
        return match[1], _parameters(_class_before(message, match.start()) or _class_before(message, len(message)))
    return "", ()


def _class_before(message: str, end: int) -> Any:
    """The class named last before position `end` of a message; jsonargparse has imported it."""
    paths = _CLASS.findall(message[:end])
    if not paths:
        return None
    module, _, name = paths[-1].rpartition(".")
    return vars(importlib.import_module(module)).get(name)


def _parameters(kind: Any) -> list[str]:
    return [name for name in inspect.signature(kind).parameters if name != "self"] if inspect.isclass(kind) else []
