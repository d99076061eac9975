"""Compare several methods on the same model, text and budget."""

from pdtrim_pl.compare.bench import Bench
from pdtrim_pl.compare.comparison import Comparison
from pdtrim_pl.compare.found import Found
from pdtrim_pl.compare.method import Method
from pdtrim_pl.compare.outcome import COLUMNS, Outcome

__all__ = ["COLUMNS", "Bench", "Comparison", "Found", "Method", "Outcome"]
