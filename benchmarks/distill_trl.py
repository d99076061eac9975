"""TRL's DistillationTrainer on given responses, for `benchmarks/distill.py --trl`. It has no command of its own.

TRL lets the student generate the responses. Here they are given, so that every side trains on the same tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from pdtrim_pl.data import Batch


class GivenResponses(DistillationTrainer):  # type: ignore[misc]
    """Takes the responses of the batches instead of generated ones."""

    batches: Sequence[Batch] = ()

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Tensor]:
        batch = self.batches[self.state.global_step].on(self.accelerator.device)
        return {
            "prompt_ids": batch.prompt_ids, "prompt_mask": batch.prompt_mask.long(),
            "completion_ids": batch.response_ids, "completion_mask": batch.response_mask.long(),
            "num_items_in_batch": batch.response_mask.sum(),
        }  # fmt: skip


class Hooks(TrainerCallback):
    """Calls a function before and another one after every step."""

    def __init__(self, before: Callable[[int], None], after: Callable[[int], None]) -> None:
        self.before, self.after = before, after

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after(state.global_step - 1)


def train(
    student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batches: Sequence[Batch],
    rate: float, half: bool, before: Callable[[int], None], after: Callable[[int], None],
) -> None:  # fmt: skip
    """Train on every batch once, by the forward KL, without gradient checkpointing.

    Args:
        student: in fp32.
        teacher: the frozen teacher.
        tokenizer: of both.
        batches: the batches; each is one optimizer step.
        rate: learning rate.
        half: bf16 autocast.
        before: called with the number of a step before it.
        after: called with the number of a step after it.
    """
    rows = len(batches[0].prompt_ids)
    with tempfile.TemporaryDirectory() as folder:
        settings = DistillationConfig(
            folder, per_device_train_batch_size=rows, max_steps=len(batches), learning_rate=rate, beta=0.0, bf16=half,
            gradient_checkpointing=False, lr_scheduler_type="constant", max_grad_norm=0.0, report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = GivenResponses(
            student, teacher, settings, Dataset.from_dict({"prompt": ["x"] * rows * len(batches)}),
            processing_class=tokenizer, callbacks=[Hooks(before, after)],
        )  # fmt: skip
        trainer.batches = batches
        trainer.train()
