"""One row of a comparison: the plan and policy found, the cost of the search, and the quality."""

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
    """Quality of a row on held-out text (NLL and KL in nats), and its costs as shares of the dense model's."""

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
    """Search cost of the method and of the method that it started from."""
    judged: Judged
    accuracy: Mapping[str, float]
    """Task -> share of right answers; `RECALL` -> recall."""

    def row(self) -> dict[str, Any]:
        """The values of the row, in the order of `COLUMNS`."""
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
        """The row of the accuracy table: one column for each task, their mean, and recall."""
        return accuracy_row(self.method, self.plan, self.accuracy)

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values."""
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
        """Read what `to_json` wrote."""
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
