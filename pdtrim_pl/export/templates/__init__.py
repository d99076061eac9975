"""Templates of the two documents that people read in an export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from pdtrim_pl.evaluation.summary import human_bytes


def rendered(name: str, **values: Any) -> str:
    """A template of this folder with these values; in HTML every text is escaped."""
    environment = Environment(
        loader=PackageLoader("pdtrim_pl.export"), autoescape=select_autoescape(["html"]), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"human_bytes": human_bytes, "spread": _spread}
    return environment.get_template(name).render(values)


def _spread(figure: Mapping[str, float], unit: str = "") -> str:
    """A median with its quartiles: `1.25x (1.20 to 1.30)`."""
    return f"{figure['value']:.2f}{unit} ({figure['low']:.2f} to {figure['high']:.2f})"
