"""The KV connector that vLLM loads by module path; see `launch.transfer_config` for its settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import override
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)
from vllm.forward_context import ForwardContext, get_forward_context, is_forward_context_available

from pdtrim_pl.errors import UserError
from pdtrim_pl.serving.vllm.decode import DecodeScheduler, DecodeWorker, Loads
from pdtrim_pl.serving.vllm.engine import Engine, compact, layers_of, layout_of, windows_of
from pdtrim_pl.serving.vllm.greeting import PROTOCOL, Address, Hello
from pdtrim_pl.serving.vllm.inbox import Inbox
from pdtrim_pl.serving.vllm.pair import ServedPair
from pdtrim_pl.serving.vllm.prefill import PrefillScheduler, PrefillWorker, Saves
from pdtrim_pl.serving.vllm.stats import PairMetrics, PairStats
from pdtrim_pl.serving.vllm.transfer import Receiver, Sender

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request


class PairConnector(KVConnectorBase_V1):
    """Connects the two engines of an exported pair.

    vLLM makes one in the scheduler and one in every worker. The producer's engine serves the prefill half, the
    consumer's the decode half.

    Raises:
        UserError: the engine is not that half, or a setting cannot be served.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.config, transfer = vllm_config, vllm_config.kv_transfer_config
        assert transfer is not None
        if transfer.kv_role not in ("kv_producer", "kv_consumer"):
            raise UserError(f"`kv_role` is {transfer.kv_role}: an engine serves one half of a pair.")
        self.settings: dict[str, Any] = transfer.kv_connector_extra_config
        self.pair = ServedPair.read(Path(self.settings["export"]), "prefill" if transfer.is_kv_producer else "decode")
        self.engine = Engine.of(vllm_config)
        self.pair.check_engine(**vars(self.engine))
        if transfer.is_kv_consumer:
            _check_decode(vllm_config)
        address = Address.of(self.settings["address"])
        self.scheduler: PrefillScheduler | DecodeScheduler
        self.worker: PrefillWorker | DecodeWorker | None = None
        if role == KVConnectorRole.SCHEDULER and transfer.is_kv_producer:
            self.scheduler = PrefillScheduler(self.pair, address)
        elif role == KVConnectorRole.SCHEDULER:
            self.scheduler = DecodeScheduler(self.pair)
        elif transfer.is_kv_consumer:
            room, timeout = int(self.settings["room"]), float(self.settings["timeout"])
            self.inbox = Inbox(self.pair, self.engine.ranks, room, timeout)
            self.receiver = Receiver(address, self._hello(), self.inbox)
        self._failed: set[str] = set()

    def _hello(self) -> Hello:
        return Hello(PROTOCOL, self.engine.ranks, get_tensor_model_parallel_rank())

    @classmethod
    @override
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """A graph of the whole model would not call `save_kv_layer`, nor read the metadata of compacted layers."""
        return True

    # In the workers.

    @override
    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        config, pair = self.config, self.pair
        layers = {name: index for name, index in layers_of(kv_caches).items() if pair.block(index) is not None}
        first = next(iter(layers))
        layout, size = layout_of(config, first, kv_caches[first]), config.cache_config.block_size
        if pair.stage == "prefill":
            self.worker = PrefillWorker(pair, layers, layout, Sender(self._hello(), pair), size)
            return
        caches = {name: kv_caches[name] for name in layers}
        self.worker = DecodeWorker(pair, caches, layers, layout, self.inbox, size)
        trimmed = [name for names in self.worker.groups.values() for name in names]
        if windows := windows_of(config, trimmed):
            raise UserError(
                f"The policy drops positions of layers with a sliding window ({', '.join(windows)}), which counts "
                "entries and not positions. Choose a policy whose rules for these blocks have `keep: all`."
            )

    @override
    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        if not isinstance(self.worker, DecodeWorker):
            return
        assert isinstance(connector_metadata, Loads)
        self.worker.begin(connector_metadata)
        if self.worker.groups and is_forward_context_available():
            context = get_forward_context()
            if context.attn_metadata:
                compact(context, self.worker.groups, self.worker.cuts, self.worker.kernel_size, self.config)

    @override
    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Nothing: transfers arrive by themselves, and are written between forward passes."""

    @override
    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: a request takes part in a forward pass when all its layers are loaded."""

    @override
    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        if isinstance(self.worker, PrefillWorker):
            saves = self._get_connector_metadata()
            assert isinstance(saves, Saves)
            self.worker.save(layer_name, kv_layer, saves)

    @override
    def wait_for_save(self) -> None:
        if isinstance(self.worker, PrefillWorker):
            saves = self._get_connector_metadata()
            assert isinstance(saves, Saves)
            self.worker.end(saves)

    @override
    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        if not isinstance(self.worker, DecodeWorker):
            return KVConnectorTransferResults()
        over, failed = self.worker.finish()
        return KVConnectorTransferResults(finished_recving=over, failed_recving=failed)

    @override
    def get_kv_connector_stats(self) -> PairStats | None:
        if not isinstance(self.worker, DecodeWorker) or not self.worker.loaded_bytes:
            return None
        count, self.worker.loaded_bytes = self.worker.loaded_bytes, 0
        return PairStats({"kv_bytes": count})

    @override
    def shutdown(self) -> None:
        if self.role == KVConnectorRole.WORKER and self.pair.stage == "decode":
            self.receiver.close()

    # In the scheduler.

    @override
    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        if isinstance(self.scheduler, PrefillScheduler):
            return 0, False
        assert num_computed_tokens == 0, "prefix caching is off"
        positions = self.scheduler.positions(request)
        return positions, positions > 0

    @override
    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        if isinstance(self.scheduler, PrefillScheduler):
            self.scheduler.admit(request)
        else:
            self.scheduler.admit(request, list(blocks.get_block_ids()[0]), num_external_tokens)

    @override
    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self.scheduler.step(scheduler_output)

    @override
    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return False, self.scheduler.finished(request) if isinstance(self.scheduler, PrefillScheduler) else None

    # Metrics.

    @classmethod
    @override
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> PairStats:
        return PairStats(data or {})

    @classmethod
    @override
    def build_prom_metrics(
        cls, vllm_config: VllmConfig, metric_types: dict[Any, Any], labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PairMetrics:  # fmt: skip
        return PairMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def _check_decode(config: VllmConfig) -> None:
    """Refuse settings of the decode engine under which it would attend to other numbers than the pair's.

    Raises:
        UserError: such a setting is on.
    """
    if config.cache_config.enable_prefix_caching:
        raise UserError(
            "Prefix caching is on in the decode engine: what arrives of a prompt depends on all of it, so no other "
            "prompt can use it. Start the engine with `--no-enable-prefix-caching`."
        )
    transfer = config.kv_transfer_config
    if transfer is not None and transfer.kv_load_failure_policy == "recompute":
        raise UserError(
            "`kv_load_failure_policy` is recompute: the decode engine would encode the prompt with its own blocks. Use "
            "fail, and send a request that failed to the prefill engine again."
        )
