"""The result of a method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from torch import Tensor

from pdtrim_pl.plan import KVRetentionPolicy, StagePlan


@dataclass(frozen=True)
class Found:
    """The result of a method: a plan, a policy and changed weights."""

    plan: StagePlan
    policy: KVRetentionPolicy | None = None
    """What prefill sends; None sends everything."""
    weights: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))
    """Name in the student -> weight, for weights that differ from the original model."""
    trained_tokens: int = 0
    """Number of tokens that these weights were trained on."""

    def under(self, plan: StagePlan) -> Found:
        """The same weights under another plan."""
        return replace(self, plan=plan, policy=None if self.policy is None else self.policy.restricted_to(plan))
