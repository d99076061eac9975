"""Cut lost channels and heads out of the weights of a block, and write the new width into the configuration.

All blocks of an exported stage are as wide as its widest block, so stock classes and every engine can load it. The
weights of narrower blocks are filled up with zeros, which do not change the output. With `export_widths: per_block`
each block has its own width, where the model's classes build that.

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
"""Stands for a unit of zeros in a list of kept units."""


def sliced(tensors: Mapping[str, Tensor], cuts: Cuts, plan: StagePlan, stage: Stage, block: int) -> dict[str, Tensor]:
    """The tensors of a block without the channels and heads that it has lost in a stage.

    Args:
        tensors: tensors of the whole block, by their names in the block.
        cuts: where its channels and heads are, from the adapter of its family.
        plan: gives the width of the block and of the stage.
        stage: the stage to export.
        block: original index of the block.
    """
    out, widths = dict(tensors), plan.exported_widths(stage)[block]
    for part, cut in cuts.items():
        units, kept = plan.model.sizes[part], plan.width(stage, block).kept(part)
        if units is not None and kept is not None:
            wide = widths[part]
            _cut_out(out, cut, torch.tensor(_filled_up(kept, wide, part, plan.model)), units)
    return out


def emptied(tensors: Mapping[str, Tensor], cuts: Cuts, plan: StagePlan, stage: Stage) -> dict[str, Tensor]:
    """The tensors of a block that a stage holds and does not run: of the stage's width, and all zeros.

    Such a block adds nothing to its input.
    """
    out = dict(tensors)
    for part, wide in plan.widest(stage).items():
        units = plan.model.sizes[part]
        assert units is not None
        _cut_out(out, cuts[part], torch.tensor(_filled_up((), wide, part, plan.model)), units)
    return {name: torch.zeros_like(x, device="cpu") for name, x in out.items()}


def narrowed_config(
    config: PreTrainedConfig, cuts: Cuts, widths: Mapping[Part, int], head_dim: int
) -> PreTrainedConfig:
    """A copy of `config` with other numbers of channels and query heads; `config` itself if `widths` is empty.

    Args:
        config: configuration of the whole model, or of the blocks of a stage.
        cuts: names of the settings, from the adapter of the model's family.
        widths: the new number of channels or query heads of every block.
        head_dim: head dimension of the model. It is written out, because classes derive it from the number of heads.

    Raises:
        UserError: the configuration class of the model refuses a number.
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
    """Kept units in order, filled up to `wide` units. Fillers of heads stand behind the heads of each KV head."""
    groups = (model.kv_heads or len(kept)) if part == "heads" else 1
    own, each = len(kept) // groups, wide // groups
    return [
        unit for group in range(groups) for unit in (*kept[group * own : (group + 1) * own], *[FILL] * (each - own))
    ]


def _cut_out(tensors: dict[str, Tensor], cut: Cut, units: Tensor, count: int) -> None:
    """Keep only the rows and columns of `units`, out of `count`. In host memory: a GPU may have no room for copies."""
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
    """Rows of a matrix or vector in the order of `kept`; zeros for `FILL`."""
    taken = rows[kept.clamp(min=0)]
    taken[kept == FILL] = 0
    return taken
