"""The contract of one request: prefill, boundary, transfer, decode. Training, search and serving all run this code."""

from pdtrim_pl.models.adapters import adapter_at, check_adapter
from pdtrim_pl.models.architectures import ARCHITECTURES, Architecture, architecture_of
from pdtrim_pl.staged.cache import BlockKV, KVCache, Slots
from pdtrim_pl.staged.gate import Gate
from pdtrim_pl.staged.model import StagedCausalLM, StagedOutput
from pdtrim_pl.staged.request import Request

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "BlockKV",
    "Gate",
    "KVCache",
    "Request",
    "Slots",
    "StagedCausalLM",
    "StagedOutput",
    "adapter_at",
    "architecture_of",
    "check_adapter",
]
