"""Names of models: the embedded one, paths, and Hub ids, also with a git revision (`org/model@revision`)."""

from __future__ import annotations

import re
from pathlib import Path

from pdtrim_pl.errors import UserError

EMBEDDED_MODEL = "smollm2-135m"
DEFAULT_REVISION = "main"
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def with_revision(name: str, revision: str | None, setting: str) -> str:
    """The name of a Hub model at a revision.

    Args:
        name: name of a model.
        revision: a branch, a tag or a commit; None leaves the name as it is.
        setting: the setting that gave the revision, for messages.

    Raises:
        UserError: the model is not from the Hub, or its name has a revision already.
    """
    if revision is None:
        return name
    if name == EMBEDDED_MODEL or Path(name).exists() or not _HUB_ID.fullmatch(split_revision(name)[0]):
        raise UserError(
            f"`{setting}`={revision!r} is a revision of a model of the Hub, and `{name}` is on this machine: leave "
            f"`{setting}` out."
        )
    if split_revision(name)[1] is not None:
        raise UserError(f"`{setting}`={revision!r}, and `{name}` names a revision too: give one of them.")
    return f"{name}@{revision}"


def split_revision(name: str) -> tuple[str, str | None]:
    """Hub id and revision of `org/model@revision`. Any other name, such as a path, has no revision."""
    model, _, revision = name.partition("@")
    if not revision or Path(name).exists() or not _HUB_ID.fullmatch(model):
        return name, None
    return model, revision
