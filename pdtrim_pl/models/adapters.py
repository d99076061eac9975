"""Adapters of families that the package does not know: named by class path, in YAML and in an export's plan."""

from __future__ import annotations

from pkgutil import resolve_name

from pdtrim_pl.errors import UserError
from pdtrim_pl.models.architectures import ARCHITECTURES, Architecture


def class_path_of(architecture: Architecture, model_type: str) -> str | None:
    """What a plan says of an adapter, so that whoever loads an export finds it.

    Returns:
        None for the package's own adapter of that family, and for a class that no other process could import.
    """
    own = type(architecture)
    if own is type(ARCHITECTURES.get(model_type)) or own.__module__ == "__main__" or "<locals>" in own.__qualname__:
        return None
    return f"{own.__module__}.{own.__qualname__}"


def adapter_at(class_path: str) -> Architecture:
    """The adapter that a plan names.

    Raises:
        UserError: it cannot be imported, or is no adapter.
    """
    try:
        found = resolve_name(class_path)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"`model.architecture` of the stage plan is {class_path!r}, which cannot be imported ({error}). Install "
            "the package that holds it, or put its folder on PYTHONPATH."
        ) from error
    if not (isinstance(found, type) and issubclass(found, Architecture)):
        raise UserError(
            f"`model.architecture` of the stage plan is {class_path!r}, which is no subclass of "
            "pdtrim_pl.staged.Architecture. Name the class of the model's adapter."
        )
    return found()


def check_adapter(architecture: Architecture | None) -> None:
    """Refuse an adapter with settings of its own, which an export could not keep: it names the class alone.

    Raises:
        UserError: naming them.
    """
    if architecture is not None and vars(architecture):
        raise UserError(
            f"`architecture` is a {type(architecture).__qualname__} with settings of its own, "
            f"{', '.join(vars(architecture))}, and an export names the class alone. Make them class attributes, and a "
            "subclass for other values."
        )
