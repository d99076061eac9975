"""Settings of the data module: lengths of examples, sizes of the data parts, and how a large source is read."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from pdtrim_pl.errors import UserError

Turns = Literal["last", "all"]


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens, special tokens included."""

    max_length: int = 256
    """Maximum length of prompt and response together. Raw text is cut into windows of exactly this length."""
    min_prompt: int = 32
    """Shortest prompt that is drawn for raw text."""
    max_prompt: int = 192
    """Longest prompt. Longer prompts of pairs and chats are cut; they keep their end."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_prompt <= self.max_prompt:
            raise UserError(
                f"`lengths.min_prompt`={self.min_prompt} must be at least 1 and at most "
                f"`lengths.max_prompt`={self.max_prompt}."
            )
        if self.max_prompt >= self.max_length:
            raise UserError(
                f"`lengths.max_prompt`={self.max_prompt} leaves no token for the response within "
                f"`lengths.max_length`={self.max_length}; lower the first or raise the second."
            )


@dataclass(frozen=True)
class Parts:
    """Sizes of the disjoint parts of the source. Training gets the examples that the other parts leave.

    An integer is a number of examples. A float in [0, 1) is a share of all examples, rounded down; a share above 0 gets
    at least one example.
    """

    validation: int | float = 0.1
    calibration: int | float = 0.1
    test: int | float = 0.0
    max_train: int | None = None
    """Maximum number of training examples; None for no limit."""
    max_validation: int | None = None
    max_calibration: int | None = None
    repeated_prompts: float = 0.0
    """Share of the calibration examples whose response is replaced by their own prompt. Most tokens of ordinary text
    depend on the few tokens before them. Only repeated prompts show the search whether a plan can still recall."""
    repeated_training_prompts: float = 0.0
    """The same share of the training examples, so that a student learns again to recall."""

    def __post_init__(self) -> None:
        for name in _HELD_OUT:
            value: int | float = self.__dict__[name]
            if value < 0 or (isinstance(value, float) and value >= 1):
                raise UserError(
                    f"`parts.{name}`={value} must be a count of examples (an integer) or a share (a float in [0, 1))."
                )
        for name, of in (("repeated_prompts", "calibration"), ("repeated_training_prompts", "training")):
            share: float = self.__dict__[name]
            if not 0 <= share <= 1:
                raise UserError(f"`parts.{name}`={share} must be a share of the {of} examples, 0 to 1.")
        for field in fields(self):
            if field.name.startswith("max_") and (limit := self.__dict__[field.name]) is not None and limit < 1:
                raise UserError(f"`parts.{field.name}`={limit} must be at least 1, or null for no limit.")

    def sizes(self, total: int) -> Mapping[str, int]:
        """Number of examples of each part, out of `total`, with limits applied.

        Returns:
            Part -> number of examples, in the order of the cut: `validation`, `calibration`, `test`, `train`.

        Raises:
            UserError: there are too few examples.
        """
        sizes = self.held_out(total)
        sizes["train"] = total - sum(sizes.values())
        if sizes["train"] < 1:
            wanted = ", ".join(f"`parts.{name}`={self.__dict__[name]}" for name in _HELD_OUT)
            raise UserError(
                f"The source gives {total} distinct examples; {wanted} leave none for training. "
                "Lower them, shorten `lengths.max_length`, or give more text."
            )
        sizes["train"] = min(sizes["train"], self.max_train or sizes["train"])
        return sizes

    def held_out(self, total: int) -> dict[str, int]:
        """Number of examples of `validation`, `calibration` and `test`, out of `total`, with limits applied."""
        asked = {name: self.__dict__[name] for name in _HELD_OUT}
        sizes = {
            name: max(1, int(value * total)) if isinstance(value, float) and value > 0 else int(value)
            for name, value in asked.items()
        }
        for name, limit in (("validation", self.max_validation), ("calibration", self.max_calibration)):
            sizes[name] = min(sizes[name], limit or sizes[name])
        return sizes


_HELD_OUT = ("validation", "calibration", "test")
"""Parts that are not for training, in the order of the cut."""


@dataclass(frozen=True)
class Streaming:
    """How a source is read that is larger than memory."""

    examples: int
    """Training examples in an epoch, over all ranks. An epoch begins in the source where the one before it ended."""
    buffer: int = 4096
    """Number of examples, of one rank, that are shuffled together."""

    def __post_init__(self) -> None:
        for name in ("examples", "buffer"):
            if self.__dict__[name] < 1:
                raise UserError(f"`source.streaming.{name}`={self.__dict__[name]} must be at least 1.")


def check_streaming(parts: Parts, *, by_length: bool, mixed: bool, workers: int) -> None:
    """Refuse settings that need to know all examples before the first step.

    Args:
        parts: sizes of the data parts.
        by_length: whether batches are to have examples of like lengths.
        mixed: whether a source of `mixed_in` is to be streamed.
        workers: number of processes that tokenise the sources beforehand.

    Raises:
        UserError: there are such settings. The message names all of them.
    """
    faults = [
        said
        for wrong, said in (
            (by_length, "`batches: by_length` sorts all examples: use `shuffled`"),
            (mixed, "`mixed_in` is streamed as `source` is: set `streaming` of `source` alone"),
            (workers > 1, "`tokenize_workers` tokenises a whole source beforehand: set `num_workers`"),
            (parts.max_train is not None, "`parts.max_train` cuts a part that is known: set `streaming.examples`"),
        )
        if wrong
    ]
    if faults:
        raise UserError(f"`source.streaming` cannot go with these settings. {'; '.join(faults)}.")
