"""The data module: it reads a source of text and makes loaders of prompt and response batches."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Subset
from torch.utils.data.distributed import DistributedSampler
from transformers.configuration_utils import PretrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from typing_extensions import override

from pdtrim_pl.data.by_length import ByLengthSampler
from pdtrim_pl.data.collate import Batch, Collator
from pdtrim_pl.data.examples import Example, RepeatedPrompts, TokenExamples, weights_of
from pdtrim_pl.data.formatting import encode
from pdtrim_pl.data.loader import ResumableLoader
from pdtrim_pl.data.mixture import Chosen, MixedIn, check_shares, mixture
from pdtrim_pl.data.model_limits import check_context, check_ids, check_vocabulary
from pdtrim_pl.data.settings import Lengths, Parts
from pdtrim_pl.data.sources import TextSource, load_rows
from pdtrim_pl.errors import UserError
from pdtrim_pl.models.context import usable_context
from pdtrim_pl.models.pretrained import load_config, load_tokenizer, resolve_model

Batches = Literal["shuffled", "by_length"]


def cut_parts(
    examples: TokenExamples, parts: Parts, seed: int, distinct: NDArray[np.int64] | None = None
) -> dict[str, Subset[Example]]:
    """Cut a seeded permutation of some examples into parts.

    Args:
        examples: the examples.
        parts: sizes of the parts.
        seed: seed of the permutation.
        distinct: indices of the examples to take; by default all, without duplicates.

    Returns:
        Disjoint parts by name: `validation`, `calibration`, `test` and `train`. A part that was not asked for is empty.

    Raises:
        UserError: there are too few examples for `parts`.
    """
    distinct = np.asarray(examples.distinct()) if distinct is None else distinct
    sizes = parts.sizes(len(distinct))
    order = distinct[np.random.default_rng(seed).permutation(len(distinct))]
    cuts = np.cumsum(list(sizes.values()))
    return {name: Subset(examples, chosen.tolist()) for name, chosen in zip(sizes, np.split(order, cuts), strict=False)}


class PromptResponseDataModule(LightningDataModule):
    """Examples of a prompt and its response, in disjoint parts for training, validation, calibration and test.

    Of examples with the same tokens only the first is kept. A seeded permutation of the rest is cut into parts, so the
    parts are the same on every rank and in every run with the same settings.
    """

    def __init__(
        self,
        tokenizer: str,
        source: TextSource = TextSource(),
        lengths: Lengths = Lengths(),
        parts: Parts = Parts(),
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        mixed_in: list[MixedIn] | None = None,
        batches: Batches = "shuffled",
        tokenize_workers: int = 1,
    ) -> None:
        """Store the settings. Nothing is read before `prepare_data`.

        Args:
            tokenizer: name of the model whose tokenizer is used: `smollm2-135m`, a directory or a Hub id.
            source: the source of the text.
            lengths: lengths of prompts and examples, in tokens.
            parts: number of examples in each part.
            batch_size: training examples in a batch, per device.
            eval_batch_size: the same for all other loaders; `batch_size` by default.
            num_workers: number of processes that load batches; 0 loads in the main process.
            seed: seed of split points, parts and training order.
            mixed_in: more sources, each with its share of the examples; `source` has the rest.
            batches: `shuffled`, or `by_length`: training batches of examples of like lengths, with little padding.
            tokenize_workers: number of processes that tokenise the sources, once; the result is then cached on disk.

        Raises:
            UserError: a batch size or `tokenize_workers` is below 1, `num_workers` or `seed` is below 0, or `batches`
                is unknown.
        """
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", batch_size if eval_batch_size is None else eval_batch_size, 1),
            ("num_workers", num_workers, 0),
            ("tokenize_workers", tokenize_workers, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise UserError(f"`{name}`={value} must be at least {least}.")
        if batches not in get_args(Batches):
            raise UserError(f"`batches`={batches!r} must be `shuffled` or `by_length`.")
        self.tokenizer_name = tokenizer
        self.source = source
        self.mixed_in = list(mixed_in or [])
        check_shares(self.mixed_in)
        self.lengths = lengths
        self.parts = parts
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.batches = batches
        self.tokenize_workers = tokenize_workers
        self.on_batch: Callable[[Batch], None] = _nothing
        """Called with every batch of the trainer while it is still in host memory."""
        self._examples: Chosen | None = None
        self._parts: dict[str, Subset[Example]] = {}

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
        size = self._vocab_size
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None and (size is None or token < size):
                return token
        return 0

    @override
    def prepare_data(self) -> None:
        """Convert the model and fill the cache of tokenised text, in one process of every node, which keeps them."""
        self._check_model()
        self._examples = self._encode()

    @override
    def setup(self, stage: str | None = None) -> None:
        """Build all parts on the first call, for every `stage`.

        Raises:
            UserError: the source cannot be read, has too few examples for `parts`, or does not fit the model.
        """
        if self._parts:
            return
        self._check_model()
        examples, distinct = self._encode() if self._examples is None else self._examples
        if self._vocab_size is not None:
            token = self.tokenizer.convert_ids_to_tokens(examples.largest_id)
            check_ids(examples.largest_id, str(token), self._vocab_size)
        self._parts = cut_parts(examples, self.parts, self.seed, distinct)
        shares = {"calibration": self.parts.repeated_prompts, "train": self.parts.repeated_training_prompts}
        for name, share in shares.items():
            if share and len(self._parts[name]):
                # Local fits read the first training examples: they must be repeated as rarely as all others.
                spread = name == "train"
                changed = RepeatedPrompts(self._parts[name], share, self.lengths.max_length, spread=spread)
                self._parts[name] = Subset(changed, range(len(changed)))

    def part(self, name: str) -> Subset[Example]:
        """The examples of a part: `train`, `validation`, `calibration` or `test`.

        Raises:
            UserError: the part has no examples.
        """
        assert self._parts, "setup() comes first"
        subset = self._parts[name]
        if len(subset) == 0:
            raise UserError(f"The data has no {name} part; set `parts.{name}` to a count or a share above 0.")
        return subset

    @override
    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        self.on_batch(batch)
        return batch

    @override
    def train_dataloader(self) -> ResumableLoader:
        """The training part, shuffled in every epoch and split among the ranks. A run can resume within an epoch."""
        given = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        ranks = given or {"num_replicas": 1, "rank": 0}
        part = self.part("train")
        # Lightning does not replace a DistributedSampler, and calls its `set_epoch` even on one device.
        sampler: DistributedSampler[Example] = (
            ByLengthSampler(part, self.batch_size, **ranks, seed=self.seed)
            if self.batches == "by_length"
            else DistributedSampler(part, **ranks, shuffle=True, seed=self.seed)
        )
        return ResumableLoader(
            part,
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=Collator(self.pad_id, float(weights_of(part).mean())),
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # the global generator is reserved for training steps
        )

    @override
    def val_dataloader(self) -> DataLoader[Example] | list[DataLoader[Example]]:
        """The validation part in a fixed order; an empty list if `parts.validation` is 0."""
        return self._fixed("validation") if len(self._parts["validation"]) else []

    @override
    def test_dataloader(self) -> DataLoader[Example]:
        """The test part in a fixed order."""
        return self._fixed("test")

    @override
    def predict_dataloader(self) -> DataLoader[Example]:
        """The test part if there is one, else the validation part, in a fixed order."""
        return self._fixed("test" if len(self._parts["test"]) else "validation")

    def calibration_dataloader(self) -> DataLoader[Example]:
        """The whole calibration part in a fixed order, the same on every rank. Batches have `eval_batch_size` rows."""
        return self._fixed("calibration")

    def fitting_dataloader(self) -> DataLoader[Example]:
        """The whole training part in a fixed order, the same on every rank, for local fits of blocks."""
        return self._fixed("train")

    def check_fits(self, config: PretrainedConfig) -> None:
        """Refuse a model that is too small for the tokenizer or for the lengths of the examples.

        Args:
            config: configuration of the model that is trimmed.

        Raises:
            UserError: a token has no embedding in the model, or examples exceed its context.
        """
        check_vocabulary(max(self.tokenizer.get_vocab().values()) + 1, config.vocab_size)
        check_context(self.lengths.max_length, usable_context(config.to_dict()))

    def _fixed(self, name: str) -> DataLoader[Example]:
        return DataLoader(
            self.part(name),
            batch_size=self.eval_batch_size,
            collate_fn=Collator(self.pad_id),
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # evaluation must not change the random state of training
        )

    def _encode(self) -> Chosen:
        sources = [self.source, *(each.source for each in self.mixed_in)]
        settings = self.tokenizer, self.lengths, self.seed, self.tokenize_workers
        examples = [encode(load_rows(source), *settings) for source in sources]
        if not self.mixed_in:
            return Chosen(examples[0], np.asarray(examples[0].distinct()))
        shares = [each.share for each in self.mixed_in]
        return mixture(examples, [1 - sum(shares), *shares], self.seed)

    @cached_property
    def _model_config(self) -> dict[str, Any] | None:
        """Text configuration of the model named in `tokenizer`; None for a directory that holds only a tokenizer."""
        directory = Path(resolve_model(self.tokenizer_name))
        if directory.is_dir() and not (directory / "config.json").is_file():
            return None
        return load_config(self.tokenizer_name).get_text_config().to_dict()

    @property
    def _vocab_size(self) -> int | None:
        return None if self._model_config is None else self._model_config.get("vocab_size")

    def _check_model(self) -> None:
        config = self._model_config or {}
        if "max_position_embeddings" in config:  # `tokenizer` may name a model of another kind, which is not trimmed
            check_context(self.lengths.max_length, usable_context(config))
        if "vocab_size" in config:
            own = set(self.tokenizer.get_vocab().values()) - self.tokenizer.added_tokens_decoder.keys()
            check_vocabulary(max(own, default=-1) + 1, config["vocab_size"])


def _nothing(batch: Batch) -> None:
    """What is done with a batch by default."""
