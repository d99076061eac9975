"""Figures of a pair beside those of the dense model, with standard errors.

A figure is a function of a ratio of two sums over documents: accuracy is right answers over questions, perplexity the
exponential of minus log-likelihood over words. The delta method then gives every standard error by one formula. Both
models answer the same documents, so the error of a difference comes from differences by document: it is far smaller
than two independent errors together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pdtrim_pl.errors import UserError
from pdtrim_pl.export.measurements import FIGURE_COLUMNS, figure_row

Form = Literal["mean", "perplexity", "bits"]
"""What is made of the ratio: itself, exp(-ratio), or -ratio / ln 2."""
Kind = Literal["generation", "likelihood", "measure", "choice", "text"]
KINDS: tuple[Kind, ...] = ("generation", "likelihood", "measure", "choice", "text")
"""Kinds of figures in the order in which a table shows them: what a pair says comes first."""


@dataclass(frozen=True)
class Documents:
    """A figure by document."""

    values: Mapping[str, tuple[float, float]]
    """Name of a document -> what it adds to the numerator and to the denominator of the ratio."""
    form: Form = "mean"

    @property
    def value(self) -> float:
        """The figure over all documents."""
        return self._of(self._ratio)

    def influences(self) -> dict[str, float]:
        """How much each document moves the figure; the mean is 0. Their standard error is that of the figure."""
        ratio, mean = self._ratio, sum(below for _, below in self.values.values()) / len(self.values)
        slope = {"mean": 1.0, "perplexity": -self._of(ratio), "bits": -1 / math.log(2)}[self.form]
        return {name: slope * (above - ratio * below) / mean for name, (above, below) in self.values.items()}

    @property
    def _ratio(self) -> float:
        above, below = (sum(column) for column in zip(*self.values.values(), strict=True))
        return above / below

    def _of(self, ratio: float) -> float:
        if self.form == "mean":
            return ratio
        return math.exp(-ratio) if self.form == "perplexity" else -ratio / math.log(2)


@dataclass(frozen=True)
class Scored:
    """A figure of one model."""

    task: str
    metric: str
    kind: Kind
    higher_is_better: bool
    value: float
    stderr: float | None
    """None if it is not known."""
    documents: Documents | None = None
    """None for a figure that is no ratio over documents, such as F1."""

    @classmethod
    def of(cls, task: str, metric: str, kind: Kind, documents: Documents, *, higher_is_better: bool = True) -> Scored:
        """A figure from its documents."""
        stderr = standard_error(documents.influences())
        return cls(task, metric, kind, higher_is_better, documents.value, stderr, documents)


@dataclass(frozen=True)
class Figure:
    """A figure of a pair beside that of the dense model on the same documents."""

    task: str
    metric: str
    kind: Kind
    higher_is_better: bool
    documents: int | None
    value: float
    stderr: float | None
    dense: float
    dense_stderr: float | None
    difference: float
    """Pair minus dense."""
    difference_stderr: float | None
    """Standard error of the difference over the same documents."""
    kept: float | None
    """Share of dense kept: pair over dense, or dense over pair where lower is better. None if one of them is 0."""
    kept_stderr: float | None

    def to_json(self) -> dict[str, Any]:
        """The figure as JSON values."""
        return asdict(self)


def standard_error(influences: Mapping[str, float]) -> float | None:
    """Standard error of a mean of independent values; None for a single one."""
    count = len(influences)
    return math.sqrt(sum(each**2 for each in influences.values()) / (count * (count - 1))) if count > 1 else None


def compared(pair: Scored, dense: Scored) -> Figure:
    """One figure of both models.

    Raises:
        UserError: they answered different documents.
    """
    difference_stderr = kept_stderr = None
    better, worse = (pair.value, dense.value) if pair.higher_is_better else (dense.value, pair.value)
    kept = better / worse if better > 0 and worse > 0 else None
    if pair.documents is not None and dense.documents is not None:
        if pair.documents.values.keys() != dense.documents.values.keys():
            raise UserError(f"The two models answered different documents of {pair.task}: evaluate both anew.")
        own, other = pair.documents.influences(), dense.documents.influences()
        difference_stderr = standard_error({name: own[name] - other[name] for name in own})
        if kept is not None:
            shares = {name: own[name] / pair.value - other[name] / dense.value for name in own}
            error = standard_error(shares)
            kept_stderr = None if error is None else kept * error
    return Figure(
        pair.task, pair.metric, pair.kind, pair.higher_is_better,
        None if pair.documents is None else len(pair.documents.values), pair.value, pair.stderr, dense.value,
        dense.stderr, pair.value - dense.value, difference_stderr, kept, kept_stderr,
    )  # fmt: skip


def table(figures: Sequence[Figure]) -> str:
    """The figures in Markdown, generation first."""
    ordered = sorted(figures, key=lambda figure: KINDS.index(figure.kind))
    rows = [list(FIGURE_COLUMNS), *(figure_row(figure.to_json()) for figure in ordered)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, [f"{'-' * (width - 1)}{'-' if at < 2 else ':'}" for at, width in enumerate(widths)])
    return "\n".join(f"| {' | '.join(_aligned(row, widths))} |" for row in rows)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Two columns of words to the left, numbers to the right."""
    return [cell.ljust(w) if at < 2 else cell.rjust(w) for at, (cell, w) in enumerate(zip(row, widths, strict=True))]
