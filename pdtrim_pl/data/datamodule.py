"""The data module: it reads a source of text and makes loaders of prompt and response batches."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from pdtrim_pl.data.by_length import ByLengthSampler
from pdtrim_pl.data.collate import Batch, Collator
from pdtrim_pl.data.examples import Example, weights_of
from pdtrim_pl.data.formatting import encode
from pdtrim_pl.data.loader import ResumableLoader
from pdtrim_pl.data.mixture import Chosen, MixedIn, check_shares, mixture
from pdtrim_pl.data.model_limits import check_ids
from pdtrim_pl.data.parts import cut, cut_parts, repeating
from pdtrim_pl.data.pieces import PiecedSource
from pdtrim_pl.data.settings import Lengths, Parts, check_streaming
from pdtrim_pl.data.sources import TextSource, load_rows
from pdtrim_pl.data.stream_loader import Bookmark, FirstBatches, Share, StreamLoader
from pdtrim_pl.data.streamed import StreamedExamples, hold_out
from pdtrim_pl.data.tokenizer_module import TokenizerModule
from pdtrim_pl.errors import UserError

Batches = Literal["shuffled", "by_length"]


class PromptResponseDataModule(TokenizerModule):
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
            UserError: a batch size or `tokenize_workers` is below 1, `num_workers` or `seed` is below 0, `batches` is
                unknown, or a setting needs a source that is not streamed.
        """
        super().__init__(tokenizer, lengths)
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
        self.source = source
        self.mixed_in = list(mixed_in or [])
        check_shares(self.mixed_in)
        mixed = any(each.source.streaming for each in self.mixed_in)
        if source.streaming or mixed:
            check_streaming(parts, by_length=batches == "by_length", mixed=mixed, workers=tokenize_workers)
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
        self._streamed: list[StreamedExamples] = []
        self._bookmark = Bookmark(1 + len(self.mixed_in))

    @override
    def prepare_data(self) -> None:
        """Convert the model and fill the cache of tokenised text, in one process of every node, which keeps them."""
        self._check_model()
        if self.source.streaming is None:
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
        parts = self._cut() if self.source.streaming is None else self._cut_head(self.source.streaming.examples)
        share, most = self.parts.repeated_prompts, self.lengths.max_length
        self._parts = {**parts, "calibration": repeating(parts["calibration"], share, most)}

    def _cut(self) -> dict[str, Subset[Example]]:
        examples, distinct = self._encode() if self._examples is None else self._examples
        if self.vocab_size is not None:
            token = self.tokenizer.convert_ids_to_tokens(examples.largest_id)
            check_ids(examples.largest_id, str(token), self.vocab_size)
        parts = cut_parts(examples, self.parts, self.seed, distinct)
        return {**parts, "train": self._for_training(parts["train"])}

    def _cut_head(self, examples: int) -> dict[str, Subset[Example]]:
        settings = self.tokenizer, self.lengths, self.seed, self.vocab_size
        self._streamed = [StreamedExamples(PiecedSource(source), *settings, share) for source, share in self._shares()]
        sizes = self.parts.held_out(examples)
        return cut(hold_out(self._streamed, sum(sizes.values())), sizes, self.seed)

    def _for_training(self, part: Subset[Example]) -> Subset[Example]:
        # Local fits read the first training examples: they must be repeated as rarely as all others.
        return repeating(part, self.parts.repeated_training_prompts, self.lengths.max_length, spread=True)

    def part(self, name: str) -> Subset[Example]:
        """The examples of a part: `train`, `validation`, `calibration` or `test`.

        Raises:
            UserError: the part has no examples, or it is the training part of a streamed source.
        """
        assert self._parts, "setup() comes first"
        if name not in self._parts:
            raise UserError(
                "`source.streaming` reads training text on the fly, and this needs all of it (a stored teacher finds "
                "examples by their tokens, a comparison counts them). Leave `source.streaming` out."
            )
        subset = self._parts[name]
        if len(subset) == 0:
            raise UserError(f"The data has no {name} part; set `parts.{name}` to a count or a share above 0.")
        return subset

    @override
    def state_dict(self) -> dict[str, Any]:
        """Where every rank is in a streamed source; nothing of another. Collective."""
        return {} if self.source.streaming is None else self._bookmark.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._bookmark.load_state_dict(state_dict, self._ranks["rank"])

    @property
    def _ranks(self) -> dict[str, Any]:
        given = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return given or {"num_replicas": 1, "rank": 0}

    @override
    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        self.on_batch(batch)
        return batch

    @override
    def train_dataloader(self) -> ResumableLoader | StreamLoader:
        """The training part, shuffled in every epoch and split among the ranks. A run can resume within an epoch."""
        ranks = self._ranks
        if self.source.streaming is not None:
            share = Share(ranks["rank"], ranks["num_replicas"], self.batch_size, self.seed, self.num_workers)
            streaming, mark = self.source.streaming, self._bookmark
            return StreamLoader(self._streamed, streaming, share, mark, self.pad_id, self._for_training)
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

    def fitting_dataloader(self) -> Iterable[Batch]:
        """The whole training part in a fixed order, the same on every rank, for local fits of blocks."""
        if self.source.streaming is None:
            return self._fixed("train")
        return FirstBatches(self._streamed, self.eval_batch_size, self.pad_id, self._for_training)

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
        sources, shares = zip(*self._shares(), strict=True)
        settings = self.tokenizer, self.lengths, self.seed, self.tokenize_workers
        examples = [encode(load_rows(source), *settings) for source in sources]
        if not self.mixed_in:
            return Chosen(examples[0], np.asarray(examples[0].distinct()))
        return mixture(examples, shares, self.seed)

    def _shares(self) -> list[tuple[TextSource, float]]:
        """Every source with its share of the examples."""
        rest = 1 - sum(each.share for each in self.mixed_in)
        return [(self.source, rest), *((each.source, each.share) for each in self.mixed_in)]


def _nothing(batch: Batch) -> None:
    """What is done with a batch by default."""
