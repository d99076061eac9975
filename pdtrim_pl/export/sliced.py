"""What a stage keeps of its blocks' channels and heads, cut out of their weights and written into the configuration.

All blocks of an exported stage are as wide as the widest of them, so that stock classes and every engine load it.
Narrower ones are filled up with zeros, which change nothing.

Shapes: I inputs of a last layer, H hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedConfig

from pdtrim_pl.errors import UserError
from pdtrim_pl.models.cuts import Cut, Cuts
from pdtrim_pl.plan import ModelRef, Part, Stage, StagePlan

FILL = -1
"""Stands for a unit of zeros among the kept ones."""


def sliced(tensors: Mapping[str, Tensor], cuts: Cuts, plan: StagePlan, stage: Stage, block: int) -> dict[str, Tensor]:
    """The tensors of a block without what `stage` has lost of it.

    Args:
        tensors: by their names in the block.
        cuts: of its family.
        plan: says what is kept, and how wide the stage is.
        stage: which.
        block: its original index.
    """
    found = dict(tensors)
    for part, cut in cuts.items():
        units, kept = plan.model.sizes[part], plan.width(stage, block).kept(part)
        if units is not None and kept is not None:
            wide = plan.widest(stage)[part]
            _cut_out(found, cut, torch.tensor(_filled_up(kept, wide, part, plan.model)), units)
    return found


def narrowed_config(
    config: PreTrainedConfig, cuts: Cuts, widths: Mapping[Part, int], head_dim: int
) -> PreTrainedConfig:
    """A copy of `config` with other numbers of channels and query heads; itself where there are none.

    Args:
        config: of the whole model, or of a stage's blocks.
        cuts: of its family.
        widths: how many every block has.
        head_dim: of the model; written out, for other numbers of heads would imply another one.

    Raises:
        UserError: numbers that the model's configuration class refuses.
    """
    if not widths:
        return config
    narrow = copy.deepcopy(config)
    for part, wide in widths.items():
        setattr(narrow, cuts[part].setting, wide)
    if "heads" in widths:
        narrow.head_dim = head_dim
    try:
        type(config).from_dict(narrow.to_dict())
    except (ValueError, StrictDataclassError) as error:
        raise UserError(
            f"No checkpoint can have {' and '.join(f'{wide} {part}' for part, wide in widths.items())} in every block: "
            f"{type(config).__name__} refuses it ({error}). Keep another number of heads."
        ) from error
    return narrow


def _filled_up(kept: tuple[int, ...], wide: int, part: Part, model: ModelRef) -> list[int]:
    """Kept units in order and so many fillers behind them, for heads behind those of every KV head."""
    groups = (model.kv_heads or len(kept)) if part == "heads" else 1
    own, each = len(kept) // groups, wide // groups
    return [
        unit for group in range(groups) for unit in (*kept[group * own : (group + 1) * own], *[FILL] * (each - own))
    ]


def _cut_out(tensors: dict[str, Tensor], cut: Cut, units: Tensor, count: int) -> None:
    """Keep the columns and rows of some of `count` units, in host memory: a GPU may have no room for copies."""
    last = f"{cut.columns}.weight"
    inputs = tensors[last].shape[1]
    size = inputs // count
    kept = torch.where(units[:, None] == FILL, FILL, units[:, None] * size + torch.arange(size)).flatten()
    for name in cut.rows:
        for leaf in ("weight", "bias"):
            if (rows := tensors.get(f"{name}.{leaf}")) is not None:
                parts = [_taken(part, kept) for part in rows.cpu().split(inputs)]
                tensors[f"{name}.{leaf}"] = torch.cat(parts)
    tensors[last] = _taken(tensors[last].cpu().T, kept).T.contiguous()


def _taken(rows: Tensor, kept: Tensor) -> Tensor:
    """Some rows of a matrix or vector, zeros for those that fill up."""
    taken = rows[kept.clamp(min=0)]
    taken[kept == FILL] = 0
    return taken
