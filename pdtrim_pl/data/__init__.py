"""Read a source of text and make batches of prompts and responses."""

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
