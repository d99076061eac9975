"""Templates of the two documents that people read in an export."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from pdtrim_pl.evaluation.summary import human_bytes


def rendered(name: str, **values: Any) -> str:
    """A template of this folder with these values; in HTML every text is escaped."""
    environment = Environment(
        loader=PackageLoader("pdtrim_pl.export"), autoescape=select_autoescape(["html"]), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["human_bytes"] = human_bytes
    return environment.get_template(name).render(values)
