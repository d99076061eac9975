"""Settings of a comparison that belong together."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import cos, pi
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch.optim.lr_scheduler import LambdaLR

from pdtrim_pl.data.sources import TextSource
from pdtrim_pl.errors import UserError
from pdtrim_pl.losses import KL, LossTerm, check_terms
from pdtrim_pl.models.adapters import check_adapter
from pdtrim_pl.models.architectures import Architecture
from pdtrim_pl.models.loading import DType
from pdtrim_pl.search import Guards

RECALL = "recall"
"""Column of the share of tokens found again."""


@dataclass(frozen=True)
class Subject:
    """The model that every row trims."""

    name: str
    """Name, path or Hub id; `smollm2-135m` is embedded."""
    dtype: DType = "bfloat16"
    """Element type of the weights while searching and measuring; training always has float32 weights."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where everything runs; `auto` takes a GPU if there is one."""
    architecture: Architecture | None = None
    """Adapter of the model's family, where the package has none."""

    def __post_init__(self) -> None:
        check_adapter(self.architecture)

    @property
    def device(self) -> torch.device:
        """The device that `accelerator` means on this machine.

        Raises:
            UserError: a GPU is asked for and there is none.
        """
        if self.accelerator == "gpu" and not torch.cuda.is_available():
            raise UserError("`model.accelerator` is gpu, and torch sees none here. Use `cpu` or `auto`.")
        return torch.device("cpu" if self.accelerator == "cpu" or not torch.cuda.is_available() else "cuda")


@dataclass(frozen=True)
class Rows:
    """Which rows the table has."""

    counts: tuple[int, ...] = (3, 6, 9)
    """Blocks removed, rising; every method has a row for each."""
    only: tuple[str, ...] | None = None
    """Names of the methods to run, and with them what they start from; None runs all."""
    guards: Guards = Guards()
    """What no method may remove."""

    def __post_init__(self) -> None:
        if not self.counts or list(self.counts) != sorted(set(self.counts)) or self.counts[0] < 1:
            raise UserError(f"`rows.counts` is {list(self.counts)}: give rising numbers of blocks, at least 1.")


@dataclass(frozen=True)
class Measures:
    """What every row is judged by, besides the held-out part of `data`."""

    held_out: TextSource | None = None
    """Text to judge by instead of the `test` part of `data.source`; `data.parts.test` says how many examples of it."""
    choices: dict[str, Path] = field(default_factory=dict)
    """Multiple-choice sets by name: JSONL files of `{"context", "choices", "label"}`."""
    choice_rows: int = 200
    """First rows of each set that are scored."""
    choice_tokens: int = 1024
    """Longest context and choice; longer contexts keep their end. The model's own context is a limit too."""
    recall: int = 0
    """Held-out examples that are said again, prompt and response together as both prompt and response; the share of
    tokens found again tells whether a student still looks far back. 0 leaves it out."""
    prompt: int | None = None
    """Prompt tokens of the request that costs are counted for; the held-out mean by default."""
    response: int | None = None
    """Response tokens of that request."""

    def __post_init__(self) -> None:
        for name in ("choice_rows", "choice_tokens", "prompt", "response"):
            value: int | None = vars(self)[name]
            if value is not None and value < 1:
                raise UserError(f"`measures.{name}` is {value}: give at least 1.")
        if self.recall < 0:
            raise UserError(f"`measures.recall` is {self.recall}: give a number of examples, or 0.")
        if RECALL in self.choices:
            raise UserError(f"`measures.choices` names a set {RECALL}, which is a column already. Rename it.")


@dataclass(frozen=True)
class Output:
    """Where the results go."""

    folder: Path = Path("runs/compare")
    """Tables, pictures, `plans/`, and `rows/`, from which a second run takes what is there."""
    name: str = "comparison"
    """First part of the tables' file names."""


class Training:
    """How rows that train do so: the same tokens, optimizer and schedule for each.

    The learning rate rises over the first steps and falls to zero on a cosine.

    Args:
        tokens: prompt and response tokens a row may see; whole batches up to it.
        batch_size: examples in a batch.
        prompt: split training examples after so many tokens, whatever `data.lengths` says; fewer of them are then
            without a loss. None leaves them as they are.
        optimizer: from parameters to an optimizer.
        losses: weighted list of losses; forward KL by default.
        warmup: share of the steps in which the learning rate rises.
        precision: Lightning's; weights are float32.
        gradient_clip: largest norm of a gradient.
        freeze_embeddings: keep token embeddings and head as they are.
    """

    def __init__(
        self,
        tokens: int = 200_000,
        batch_size: int = 8,
        prompt: int | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        losses: list[LossTerm] | None = None,
        warmup: float = 0.05,
        precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "bf16-mixed",
        gradient_clip: float = 1.0,
        freeze_embeddings: bool = False,
    ) -> None:
        if tokens < 1 or batch_size < 1 or not 0 <= warmup < 1:
            raise UserError(
                "`training` needs `tokens` and `batch_size` of at least 1 and `warmup` in [0, 1), got "
                f"tokens={tokens}, batch_size={batch_size}, warmup={warmup}."
            )
        self.tokens = tokens
        if prompt is not None and prompt < 1:
            raise UserError(f"`training.prompt` is {prompt}: give at least 1 token, or null.")
        self.batch_size = batch_size
        self.prompt = prompt
        self.optimizer = optimizer
        self.losses: list[LossTerm] = list(losses or [KL()])
        check_terms(self.losses)
        self.warmup = warmup
        self.precision = precision
        self.gradient_clip = gradient_clip
        self.freeze_embeddings = freeze_embeddings

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int, rate: float = 1.0) -> LambdaLR:
        """Warmup and cosine over so many optimizer steps, up to `rate` times the optimizer's learning rate."""
        rising = round(self.warmup * steps)

        def factor(step: int) -> float:
            if step < rising:
                return rate * (step + 1) / (rising + 1)
            return rate * 0.5 * (1 + cos(pi * (step - rising) / max(steps - rising, 1)))

        return LambdaLR(optimizer, factor)
