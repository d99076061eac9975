"""Adapters of users for other model families. YAML and the plan of an export name them by class path."""

from __future__ import annotations

from pkgutil import resolve_name

from pdtrim_pl.errors import UserError
from pdtrim_pl.models.architectures import ARCHITECTURES, Architecture


def class_path_of(architecture: Architecture, model_type: str) -> str | None:
    """Class path of an adapter for the stage plan. A process that loads an export imports the adapter by it.

    Returns:
        None for the package's own adapter of that family, and for a class that no other process can import.
    """
    own = type(architecture)
    if own is type(ARCHITECTURES.get(model_type)) or own.__module__ == "__main__" or "<locals>" in own.__qualname__:
        return None
    return f"{own.__module__}.{own.__qualname__}"


def adapter_at(class_path: str) -> Architecture:
    """Import and create the adapter that a plan names.

    Raises:
        UserError: the class cannot be imported, or is not a subclass of `Architecture`.
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
    """Refuse an adapter with instance attributes: an export records only the class, so they would be lost.

    Raises:
        UserError: the adapter has instance attributes. The message names them.
    """
    if architecture is not None and vars(architecture):
        raise UserError(
            f"`architecture` is a {type(architecture).__qualname__} with settings of its own, "
            f"{', '.join(vars(architecture))}, and an export records only the class. Make them class attributes, and "
            "write a subclass for other values."
        )
