"""Writes what `pdtrim predict` generates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from typing_extensions import override

from pdtrim_pl.checkpoints.fast_dev_run import trial_batches
from pdtrim_pl.data.collate import Batch


class PredictionWriter(BasePredictionWriter):
    """Writes one JSON line per prompt, `{"prompt", "response", "generated"}` as text, to one file per rank.

    In a trial (`trainer.fast_dev_run`) it writes nothing, so that an earlier file stays.

    Args:
        output: the file to write; an earlier one is replaced. Ranks above 0 add their number to its name.
    """

    def __init__(self, output: Path = Path("predictions.jsonl")) -> None:
        super().__init__(write_interval="batch")
        self.output = output

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trial_batches(trainer) is not None:
            return
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._file(trainer).write_text("", encoding="utf-8")

    @override
    def write_on_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, prediction: Tensor, batch_indices: Any, batch: Batch,
        batch_idx: int, dataloader_idx: int,
    ) -> None:  # fmt: skip
        if trial_batches(trainer) is not None:
            return
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        with self._file(trainer).open("a", encoding="utf-8") as file:
            for row, generated in enumerate(prediction):
                ids = {
                    "prompt": batch.prompt_ids[row][batch.prompt_mask[row]],
                    "response": batch.response_ids[row][batch.response_mask[row]],
                    "generated": generated[: int(batch.response_mask[row].sum())],
                }
                texts = {name: tokenizer.decode(tokens, skip_special_tokens=True) for name, tokens in ids.items()}
                file.write(json.dumps(texts, ensure_ascii=False) + "\n")

    def _file(self, trainer: Trainer) -> Path:
        rank = trainer.global_rank
        return self.output if rank == 0 else self.output.with_suffix(f".rank{rank}{self.output.suffix}")
