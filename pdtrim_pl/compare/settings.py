"""Settings of a comparison, in groups."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch.optim.lr_scheduler import LambdaLR

from pdtrim_pl.data.sources import TextSource
from pdtrim_pl.errors import UserError
from pdtrim_pl.harness.tasks import TaskSettings
from pdtrim_pl.losses import KL, LossTerm, check_terms
from pdtrim_pl.models.adapters import check_adapter
from pdtrim_pl.models.architectures import Architecture
from pdtrim_pl.models.loading import DType
from pdtrim_pl.search import Guards
from pdtrim_pl.strategies.schedule import Schedule

RECALL = "recall"
"""Column of recall in the accuracy table."""


@dataclass(frozen=True)
class Subject:
    """The model that every row trims."""

    name: str
    """Name, path or Hub id; `smollm2-135m` is embedded."""
    dtype: DType = "bfloat16"
    """Element type of the weights in search and measurement. Training always uses float32 weights."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """The device; `auto` takes a GPU if there is one."""
    architecture: Architecture | None = None
    """Adapter of the model's family, if the package has none."""

    def __post_init__(self) -> None:
        check_adapter(self.architecture)

    @property
    def device(self) -> torch.device:
        """The device that `accelerator` selects on this machine.

        Raises:
            UserError: a GPU is asked for, but there is none.
        """
        if self.accelerator == "gpu" and not torch.cuda.is_available():
            raise UserError("`model.accelerator` is gpu, and torch sees none here. Use `cpu` or `auto`.")
        return torch.device("cpu" if self.accelerator == "cpu" or not torch.cuda.is_available() else "cuda")


@dataclass(frozen=True)
class Rows:
    """The rows of the table."""

    counts: tuple[int, ...] = (3, 6, 9)
    """Numbers of removed blocks, ascending. Every method has one row for each."""
    only: tuple[str, ...] | None = None
    """Names of the methods to run. Methods that they start from run too. None runs all methods."""
    guards: Guards = Guards()
    """Limits on the removals of every method."""

    def __post_init__(self) -> None:
        if not self.counts or list(self.counts) != sorted(set(self.counts)) or self.counts[0] < 1:
            raise UserError(f"`rows.counts` is {list(self.counts)}: give rising numbers of blocks, at least 1.")


@dataclass(frozen=True)
class Measures:
    """What is measured for every row."""

    held_out: TextSource | None = None
    """Source of the held-out text, instead of the `test` part of `data.source`. `data.parts.test` is then the number of
    its examples."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness (the extra `eval`), each a column of the accuracy table."""
    include_path: Path | None = None
    """Folder with further task files, such as `configs/tasks`."""
    limit: int = 200
    """Number of documents of each task that are used, from the start."""
    batch_size: int = 8
    """Requests of a task that run together."""
    recall: int = 0
    """Number of held-out examples on which recall is measured: the whole example is both prompt and response. With 0,
    recall is not measured."""
    prompt: int | None = None
    """Prompt tokens of the request for which costs are counted; by default the mean of the held-out examples."""
    response: int | None = None
    """Response tokens of this request; by default the mean of the held-out examples."""

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "prompt", "response"):
            value: int | None = vars(self)[name]
            if value is not None and value < 1:
                raise UserError(f"`measures.{name}` is {value}: give at least 1.")
        if self.recall < 0:
            raise UserError(f"`measures.recall` is {self.recall}: give a number of examples, or 0.")
        if RECALL in self.tasks:
            raise UserError(f"`measures.tasks` names a task {RECALL}, which is a column already. Rename it.")

    @property
    def of_tasks(self) -> TaskSettings:
        """The settings of the tasks."""
        return TaskSettings(self.tasks, self.include_path, limit=self.limit, batch_size=str(self.batch_size))


@dataclass(frozen=True)
class Output:
    """Where the results are written."""

    folder: Path = Path("runs/compare")
    """Folder of tables, plots, `plans/` and `rows/`. A second run reuses the finished rows in `rows/`."""
    name: str = "comparison"
    """First part of the file names of tables and plots."""


class Training:
    """Settings of the training: the same tokens, optimizer and schedule for every row that trains.

    The learning rate rises linearly at first, and then falls to zero along a cosine.

    Args:
        tokens: maximum number of prompt and response tokens for a row; only whole batches are used.
        batch_size: examples in a batch.
        prompt: number of prompt tokens of a training example, instead of the split by `data.lengths`. A short prompt
            leaves more tokens with a loss. None keeps the split.
        optimizer: makes an optimizer from parameters.
        losses: weighted list of losses; forward KL by default.
        warmup: share of the steps in which the learning rate rises.
        precision: precision of the trainer; weights are float32.
        gradient_clip: maximum norm of the gradient.
        freeze_embeddings: do not train token embeddings and head.

    Raises:
        UserError: a number is out of range.
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
        """Warm-up and cosine decay over `steps` optimizer steps; the peak is `rate` times the optimizer's rate."""
        return Schedule(self.warmup).over(steps, optimizer, rate)
