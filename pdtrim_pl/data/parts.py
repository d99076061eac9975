"""Cut the examples of a source into disjoint parts."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Subset

from pdtrim_pl.data.examples import Example, RepeatedPrompts, TokenExamples
from pdtrim_pl.data.mixture import Chosen
from pdtrim_pl.data.settings import Parts


def cut_parts(
    examples: TokenExamples, parts: Parts, seed: int, distinct: NDArray[np.int64] | None = None
) -> dict[str, Subset[Example]]:
    """Cut a seeded permutation of some examples into parts.

    Args:
        examples: the examples.
        parts: sizes of the parts.
        seed: seed of the permutation.
        distinct: indices of the examples to take; by default all, without duplicates.

    Returns:
        Disjoint parts by name: `validation`, `calibration`, `test` and `train`. A part that was not asked for is empty.

    Raises:
        UserError: there are too few examples for `parts`.
    """
    distinct = np.asarray(examples.distinct()) if distinct is None else distinct
    return cut(Chosen(examples, distinct), parts.sizes(len(distinct)), seed)


def cut(chosen: Chosen, sizes: Mapping[str, int], seed: int) -> dict[str, Subset[Example]]:
    """Cut a seeded permutation into parts of these sizes, by name. What is left belongs to none."""
    order = chosen.rows[np.random.default_rng(seed).permutation(len(chosen.rows))]
    pieces = np.split(order, np.cumsum(list(sizes.values())))
    return {name: Subset(chosen.examples, rows.tolist()) for name, rows in zip(sizes, pieces, strict=False)}


def repeating(part: Subset[Example], share: float, max_length: int, *, spread: bool = False) -> Subset[Example]:
    """The part, of which a share says its prompts again; see `RepeatedPrompts`. The part itself for a share of 0."""
    if not share or len(part) == 0:
        return part
    changed = RepeatedPrompts(part, share, max_length, spread=spread)
    return Subset(changed, range(len(changed)))
