"""The methods of the shipped comparison. Each is one small class."""

from pdtrim_pl.compare.methods.distilled import Distilled
from pdtrim_pl.compare.methods.drop import Drop
from pdtrim_pl.compare.methods.drop_and_recover import DropAndRecover
from pdtrim_pl.compare.methods.joint import Joint, Mixed
from pdtrim_pl.compare.methods.narrow import Narrow
from pdtrim_pl.compare.methods.quadratic import Quadratic
from pdtrim_pl.compare.methods.searched import Annealed
from pdtrim_pl.compare.methods.streamline import ReplaceSpan

__all__ = ["Annealed", "Distilled", "Drop", "DropAndRecover", "Joint", "Mixed", "Narrow", "Quadratic", "ReplaceSpan"]
