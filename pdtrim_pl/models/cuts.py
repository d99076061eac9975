"""Where the MLP channels and query heads of a block are: the layers that compute them, and the layer that reads them.

To remove a channel or head, an export removes its rows from the first layers and its columns from the last one.

Shapes: I inputs of the last layer, U units (channels or heads), S = I / U columns of a unit, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pdtrim_pl.plan import Part


@dataclass(frozen=True)
class Cut:
    """The layers of the MLP or of the attention of a block, whose units (channels or heads) can leave one by one."""

    rows: tuple[str, ...]
    """Names of the linear layers that compute the units, [I, H]; a fused layer has several such parts in a row."""
    columns: str
    """Name of the linear layer that reads the units, [H, I]."""
    setting: str
    """Name of the setting in the model's configuration that gives the number of units, U."""


Cuts = Mapping[Part, Cut]
NO_CUTS: Cuts = MappingProxyType({})
_GATED_MLP = Cut(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "intermediate_size")
_QUERY_HEADS = Cut(("self_attn.q_proj",), "self_attn.o_proj", "num_attention_heads")
GATED_MLP: Cuts = MappingProxyType({"channels": _GATED_MLP})
"""For families with a norm over all queries together: without a head, this norm would change all others."""
GATED_MLP_AND_HEADS: Cuts = MappingProxyType({"channels": _GATED_MLP, "heads": _QUERY_HEADS})
PLAIN_MLP_AND_HEADS: Cuts = MappingProxyType(
    {"channels": Cut(("mlp.c_fc",), "mlp.c_proj", "intermediate_size"), "heads": _QUERY_HEADS}
)
FUSED_MLP: Cuts = MappingProxyType({"channels": Cut(("mlp.gate_up_proj",), "mlp.down_proj", "intermediate_size")})
NEOX_MLP: Cuts = MappingProxyType({"channels": Cut(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", "intermediate_size")})
