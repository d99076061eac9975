"""Where the inside of a block can be cut: which rows of which layers make what one column of its last layer reads.

Shapes: I inputs of the last layer, U units (channels or heads), S = I / U columns of a unit, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pdtrim_pl.plan import Part


@dataclass(frozen=True)
class Cut:
    """One inside of a block, its MLP or its attention, whose units can leave one by one."""

    rows: tuple[str, ...]
    """Linear layers of a block whose outputs belong to the units: [I, H], or several such parts one after another."""
    columns: str
    """Linear layer that reads the units: [H, I]."""
    setting: str
    """Name of the number of units in the model's configuration."""


Cuts = Mapping[Part, Cut]
NO_CUTS: Cuts = MappingProxyType({})
_GATED_MLP = Cut(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "intermediate_size")
_QUERY_HEADS = Cut(("self_attn.q_proj",), "self_attn.o_proj", "num_attention_heads")
GATED_MLP: Cuts = MappingProxyType({"channels": _GATED_MLP})
"""For families with a norm over all queries, under which no head can leave."""
GATED_MLP_AND_HEADS: Cuts = MappingProxyType({"channels": _GATED_MLP, "heads": _QUERY_HEADS})
PLAIN_MLP_AND_HEADS: Cuts = MappingProxyType(
    {"channels": Cut(("mlp.c_fc",), "mlp.c_proj", "intermediate_size"), "heads": _QUERY_HEADS}
)
FUSED_MLP: Cuts = MappingProxyType({"channels": Cut(("mlp.gate_up_proj",), "mlp.down_proj", "intermediate_size")})
NEOX_MLP: Cuts = MappingProxyType({"channels": Cut(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", "intermediate_size")})
