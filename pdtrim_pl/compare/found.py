"""What a method made of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from torch import Tensor

from pdtrim_pl.plan import KVRetentionPolicy, StagePlan


@dataclass(frozen=True)
class Found:
    """What a method made of the model."""

    plan: StagePlan
    policy: KVRetentionPolicy | None = None
    """None sends everything."""
    weights: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))
    """Weights that are no longer the model's own, by their name in the student."""
    trained_tokens: int = 0
    """Tokens that any training of these weights has seen."""

    def under(self, plan: StagePlan) -> Found:
        """The same weights under another plan."""
        return replace(self, plan=plan, policy=None if self.policy is None else self.policy.restricted_to(plan))
