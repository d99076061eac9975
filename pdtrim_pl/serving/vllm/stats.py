"""Bytes of keys and values that a decode engine has loaded, as a Prometheus counter beside vLLM's own."""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats


class PairStats(KVConnectorStats):
    """What happened since the last step."""

    def reset(self) -> None:
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> PairStats:
        return PairStats({"kv_bytes": self.data.get("kv_bytes", 0) + other.data.get("kv_bytes", 0)})

    def reduce(self) -> dict[str, int | float]:
        return dict(self.data)

    def is_empty(self) -> bool:
        return not self.data


class PairMetrics(KVConnectorPromMetrics):
    """The counter `pdtrim:kv_bytes`."""

    def __init__(
        self, vllm_config: Any, metric_types: dict[Any, Any], labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:  # fmt: skip
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter = metric_types[Counter](
            name="pdtrim:kv_bytes", documentation="Bytes of keys and values that arrived.", labelnames=labelnames
        )
        self._counters = {index: counter.labels(*values) for index, values in per_engine_labelvalues.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        self._counters[engine_idx].inc(transfer_stats_data.get("kv_bytes", 0))
