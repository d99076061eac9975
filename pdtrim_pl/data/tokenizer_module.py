"""The part of the data module that knows its tokenizer, and whether it fits a model."""

from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from transformers.configuration_utils import PretrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from pdtrim_pl.data.model_limits import check_context, check_vocabulary
from pdtrim_pl.data.settings import Lengths
from pdtrim_pl.models.context import usable_context
from pdtrim_pl.models.pretrained import load_config, load_tokenizer, resolve_model


class TokenizerModule(LightningDataModule):
    """A data module with a tokenizer.

    Args:
        tokenizer: name of the model whose tokenizer is used.
        lengths: lengths of prompts and examples, in tokens.
    """

    def __init__(self, tokenizer: str, lengths: Lengths) -> None:
        super().__init__()
        self.tokenizer_name = tokenizer
        self.lengths = lengths

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use."""
        return load_tokenizer(self.tokenizer_name)

    @property
    def pad_id(self) -> int:
        """Token id at padded positions: the pad token, else the end-of-sequence token, else 0.

        A token that the model's embedding does not contain is not used: a pad token may have been added only to the
        tokenizer.
        """
        size = self.vocab_size
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None and (size is None or token < size):
                return token
        return 0

    def check_fits(self, config: PretrainedConfig) -> None:
        """Refuse a model that is too small for the tokenizer or for the lengths of the examples.

        Args:
            config: configuration of the model that is trimmed.

        Raises:
            UserError: a token has no embedding in the model, or examples exceed its context.
        """
        check_vocabulary(max(self.tokenizer.get_vocab().values()) + 1, config.vocab_size)
        check_context(self.lengths.max_length, usable_context(config.to_dict()))

    @cached_property
    def _model_config(self) -> dict[str, Any] | None:
        """Text configuration of the model named in `tokenizer`; None for a directory that holds only a tokenizer."""
        directory = Path(resolve_model(self.tokenizer_name))
        if directory.is_dir() and not (directory / "config.json").is_file():
            return None
        return load_config(self.tokenizer_name).get_text_config().to_dict()

    @property
    def vocab_size(self) -> int | None:
        """Number of rows of that model's embedding; None if it is not known."""
        return None if self._model_config is None else self._model_config.get("vocab_size")

    def _check_model(self) -> None:
        """Refuse lengths and a tokenizer that do not fit the model named in `tokenizer`.

        Raises:
            UserError: examples exceed its context, or a token has no embedding.
        """
        config = self._model_config or {}
        if "max_position_embeddings" in config:  # `tokenizer` may name a model of another kind, which is not trimmed
            check_context(self.lengths.max_length, usable_context(config))
        if "vocab_size" in config:
            own = set(self.tokenizer.get_vocab().values()) - self.tokenizer.added_tokens_decoder.keys()
            check_vocabulary(max(own, default=-1) + 1, config["vocab_size"])
