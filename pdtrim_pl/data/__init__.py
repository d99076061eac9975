"""Read a source of text and make batches of prompts and responses.

Each name is imported when it is asked for: the data module needs Lightning and `datasets`, which take seconds to load,
and serving needs only the tokenizer's part of this room.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pdtrim_pl.data.collate import Batch, Collator, fingerprint
    from pdtrim_pl.data.datamodule import PromptResponseDataModule
    from pdtrim_pl.data.examples import Example, TokenExamples
    from pdtrim_pl.data.model_limits import check_context, check_vocabulary
    from pdtrim_pl.data.settings import Lengths, Parts
    from pdtrim_pl.data.sources import TextSource

__all__ = [
    "Batch",
    "Collator",
    "Example",
    "Lengths",
    "Parts",
    "PromptResponseDataModule",
    "TextSource",
    "TokenExamples",
    "check_context",
    "check_vocabulary",
    "fingerprint",
]
_FILES = {
    "collate": ("Batch", "Collator", "fingerprint"),
    "datamodule": ("PromptResponseDataModule",),
    "examples": ("Example", "TokenExamples"),
    "model_limits": ("check_context", "check_vocabulary"),
    "settings": ("Lengths", "Parts"),
    "sources": ("TextSource",),
}


def __getattr__(name: str) -> Any:
    for file, names in _FILES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{file}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
