"""The three texts of a comparison: calibration text, training text and held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import Subset

from pdtrim_pl.data import Batch, Collator, Example, Parts, PromptResponseDataModule, TextSource, fingerprint
from pdtrim_pl.errors import UserError


@dataclass(frozen=True)
class Texts:
    """Disjoint parts of text, the same for every row."""

    calibration: Sequence[Batch]
    held_out: Sequence[Batch]
    train: Subset[Example]
    collate: Collator
    seed: int

    def request(self) -> tuple[int, int]:
        """Mean number of prompt and of response tokens of the held-out examples, rounded."""
        rows = sum(len(batch.prompt_mask) for batch in self.held_out)
        prompt = sum(int(batch.prompt_mask.sum()) for batch in self.held_out)
        return round(prompt / rows), round(sum(int(batch.response_mask.sum()) for batch in self.held_out) / rows)

    def fingerprint(self) -> dict[str, str]:
        """Name of the part -> hash of its tokens."""
        train = [self.collate([self.train[i]]) for i in range(len(self.train))]
        parts = {"calibration": self.calibration, "held_out": self.held_out, "train": train}
        return {name: fingerprint(batches) for name, batches in parts.items()}

    def training_batches(
        self, tokens: int, batch_size: int, prompt: int | None = None, skip: int = 0
    ) -> tuple[list[Batch], int]:
        """Whole batches with at most `tokens` real tokens in total, and their number of tokens.

        The text is shuffled again in every epoch.

        Args:
            tokens: maximum number of tokens.
            batch_size: examples in a batch.
            prompt: number of prompt tokens of every example; None keeps the split of the data.
            skip: skip the first batches with so many tokens, because an earlier training has used them.

        Raises:
            UserError: the budget does not allow one batch.
        """
        batches: list[Batch] = []
        taken, skipped, epoch = 0, 0, 0
        while True:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.train))
            for start in range(0, len(order), batch_size):
                batch = self.collate([_split(self.train[int(i)], prompt) for i in order[start : start + batch_size]])
                size = int(batch.prompt_mask.sum() + batch.response_mask.sum())
                if skipped < skip:
                    skipped += size
                    continue
                if taken + size > tokens:
                    if not batches:
                        raise UserError(
                            f"`training.tokens` leaves {tokens} tokens for one training, less than one batch of {size}."
                            " Raise it, or lower `training.batch_size`."
                        )
                    return batches, taken
                batches.append(batch)
                taken += size
            epoch += 1


def _split(example: Example, prompt: int | None) -> Example:
    if prompt is None:
        return example
    tokens = torch.cat([example.prompt, example.response])
    at = min(prompt, len(tokens) - 1)
    return Example(tokens[:at], tokens[at:])


def read_texts(data: PromptResponseDataModule, held_out: TextSource | None) -> Texts:
    """Read the texts. `held_out` replaces the `test` part of the data, with at most as many examples.

    Raises:
        UserError: there is too little text, or no calibration or held-out part.
    """
    most = data.parts.test
    if held_out is None:
        data.setup()
        judged = data.part("test")
    else:
        if held_out == data.source:
            raise UserError(
                f"`measures.held_out` is `data.source` itself ({held_out}): rows would be judged on training text. "
                "Name another file, or leave it out and set `data.parts.test`."
            )
        if not isinstance(most, int) or most < 1:
            raise UserError(f"`data.parts.test` is {most}: with `measures.held_out` give a number of its examples.")
        other = _over(data, held_out, Parts(validation=0, calibration=0, test=0, max_train=most))
        data = _over(data, data.source, replace(data.parts, test=0))
        data.setup()
        other.setup()
        judged = other.part("train")  # the whole source: the other parts are empty
    collate = Collator(data.pad_id)
    return Texts(
        calibration=_batches(data.part("calibration"), collate, data.eval_batch_size),
        held_out=_batches(judged, collate, data.eval_batch_size),
        train=data.part("train"),
        collate=collate,
        seed=data.seed,
    )


def _batches(examples: Subset[Example], collate: Collator, size: int) -> list[Batch]:
    ends = range(0, len(examples), size)
    return [collate([examples[i] for i in range(start, min(start + size, len(examples)))]) for start in ends]


def _over(data: PromptResponseDataModule, source: TextSource, parts: Parts) -> PromptResponseDataModule:
    return PromptResponseDataModule(
        data.tokenizer_name, source, data.lengths, parts, data.batch_size, data.eval_batch_size, data.num_workers,
        data.seed,
    )  # fmt: skip
