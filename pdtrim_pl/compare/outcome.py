"""One row of a comparison: what was found, what it cost to find, and how good it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from pdtrim_pl.compare.meter import Spent
from pdtrim_pl.compare.settings import RECALL
from pdtrim_pl.plan import STAGES, KVRetentionPolicy, StagePlan

COLUMNS = (
    "method", "relation", "prefill_removed", "decode_removed", "trained_tokens", "nll", "dense_nll", "kl", "agreement",
    "prefill_flops", "decode_bytes", "wire_bytes", "search_seconds", "block_token_evaluations",
)  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """A row's quality on held-out text, and its costs as shares of the dense model."""

    nll: float
    dense_nll: float
    kl: float
    agreement: float
    prefill_flops: float
    decode_bytes: float
    wire_bytes: float


@dataclass(frozen=True)
class Outcome:
    """A finished row."""

    method: str
    count: int
    plan: StagePlan
    policy: KVRetentionPolicy
    trained_tokens: int
    spent: Spent
    """By the method and by what it started from."""
    judged: Judged
    accuracy: Mapping[str, float]
    """Share of right answers, by multiple-choice set, and of tokens found again under `RECALL`."""

    def row(self) -> dict[str, Any]:
        """The row's values under `COLUMNS`, in their order."""
        facts = {
            "method": self.method,
            "relation": self.plan.relation,
            "prefill_removed": len(self.plan.removed("prefill")),
            "decode_removed": len(self.plan.removed("decode")),
            "trained_tokens": self.trained_tokens,
            **asdict(self.judged),
            "search_seconds": self.spent.seconds,
            "block_token_evaluations": self.spent.block_tokens,
        }
        return {column: facts[column] for column in COLUMNS}

    def accuracy_row(self) -> dict[str, Any]:
        """The row of the accuracy table: a column a set, their mean, and the tokens found again."""
        return accuracy_row(self.method, self.plan, self.accuracy)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "method": self.method,
            "count": self.count,
            "plan": self.plan.to_json(),
            "policy": self.policy.to_json(self.plan),
            "trained_tokens": self.trained_tokens,
            "spent": asdict(self.spent),
            "judged": asdict(self.judged),
            "accuracy": dict(self.accuracy),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        """Read what `to_json` gave."""
        return cls(
            data["method"],
            data["count"],
            StagePlan.from_json(data["plan"]),
            KVRetentionPolicy.from_json(data["policy"]),
            data["trained_tokens"],
            Spent(**data["spent"]),
            Judged(**data["judged"]),
            data["accuracy"],
        )


def accuracy_row(method: str, plan: StagePlan, accuracy: Mapping[str, float]) -> dict[str, Any]:
    """A row of the accuracy table."""
    removed = {f"{stage}_removed": len(plan.removed(stage)) for stage in STAGES}
    sets = {name: share for name, share in accuracy.items() if name != RECALL}
    mean = {"mean": fmean(sets.values())} if sets else {}
    recall = {RECALL: accuracy[RECALL]} if RECALL in accuracy else {}
    return {"method": method, **removed, **sets, **mean, **recall}
