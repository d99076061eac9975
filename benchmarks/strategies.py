"""Memory and speed of distillation under each strategy, with random Llama weights and random tokens.

    python benchmarks/strategies.py                         # one GPU, a 1.2B Llama, bf16
    python benchmarks/strategies.py --devices 8 --strategies zero2 zero3 fsdp
    python benchmarks/strategies.py --tiny --accelerator cpu --devices 2 --strategies ddp fsdp   # does it run at all?

Every strategy runs in its own processes: one epoch with the full model, one drop from each stage, and one more epoch.
The output has a line of JSON for each strategy: prompt and response tokens per second over all devices (from the median
step of the last epoch without its first two steps), peak memory of the first device, and losses. ZeRO trains in
bf16-true with fp32 copies of the weights, the others train in bf16-mixed. So the losses agree only roughly.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import lightning
import torch
import transformers
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from callbacks import BlockDrop
from pdtrim_pl.checkpoints.state import PlanCheckpointIO
from pdtrim_pl.criteria import Random
from pdtrim_pl.data import Batch
from pdtrim_pl.models.loading import Loading
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.strategies import PDTrimDeepSpeedStrategy, PDTrimFSDPStrategy

LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True}  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True}  # fmt: skip
ENGINES = ("zero1", "zero2", "zero3")


class RandomTokens(LightningDataModule):
    """Random requests, the same in every run."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        half, vocabulary = options.tokens // 2, (TINY if options.tiny else LARGE)["vocab_size"]
        shape = (options.steps * options.devices, options.batch_size, options.tokens)
        ids = torch.randint(vocabulary, shape, generator=draw)
        mask = torch.ones(options.batch_size, half, dtype=torch.bool)
        self.batches = [Batch(batch[:, :half], mask, batch[:, half:], mask) for batch in ids]
        self.devices = options.devices

    def train_dataloader(self) -> DataLoader[Any]:
        rank = self.trainer.global_rank if self.trainer else 0
        return DataLoader(self.batches[rank :: self.devices], batch_size=None)  # type: ignore[arg-type]

    def calibration_dataloader(self) -> list[Batch]:
        return self.batches[:1]


class Meter(Callback):
    """Records the time and the loss of every step."""

    def __init__(self) -> None:
        self.seconds: list[tuple[int, float]] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        _synchronise()
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        _synchronise()
        self.seconds.append((trainer.current_epoch, time.perf_counter() - self.started))
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


def main() -> None:
    options = arguments()
    if options.one:
        run_one(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**(TINY if options.tiny else LARGE))).bfloat16().save_pretrained(model)
        for name in options.strategies:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", name, "--model", str(model)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            print(lines[-1] if lines else json.dumps({"strategy": name, "failed": done.stderr[-1500:]}), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=["single", "zero2", "zero3", "fsdp"])
    parser.add_argument("--accelerator", default="gpu")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=4, help="requests a device")
    parser.add_argument("--tokens", type=int, default=1024, help="prompt and response together, half each")
    parser.add_argument("--steps", type=int, default=10, help="steps an epoch")
    parser.add_argument("--tiny", action="store_true", help="a model of four small blocks")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_one(options: argparse.Namespace) -> None:
    seed_everything(0, verbose=False)
    meter, engine = Meter(), options.one in ENGINES
    module = PDTrimModule(options.model, loading=Loading(dtype="float32", teacher_dtype="bfloat16"))
    trainer = Trainer(
        accelerator=options.accelerator, devices=options.devices, strategy=strategy(options.one),
        precision="bf16-true" if engine else "bf16-mixed", max_epochs=2,
        callbacks=[BlockDrop("decode", Random(), {1: 1}), BlockDrop("prefill", Random(), {1: 1}), meter],
        plugins=[] if engine else [PlanCheckpointIO()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(module, datamodule=RandomTokens(options))
    if trainer.is_global_zero:
        print(json.dumps(report(options, module, meter)), flush=True)


def strategy(name: str) -> Any:
    if name in ENGINES:
        return PDTrimDeepSpeedStrategy(int(name[-1]))
    return {"single": "auto", "ddp": "ddp_find_unused_parameters_true", "fsdp": PDTrimFSDPStrategy()}[name]


def report(options: argparse.Namespace, module: PDTrimModule, meter: Meter) -> dict[str, Any]:
    cuda = torch.cuda.is_available() and options.accelerator != "cpu"
    step = median([seconds for epoch, seconds in meter.seconds if epoch == 1][2:])
    tokens = options.batch_size * options.tokens * options.devices
    return {
        "strategy": options.one,
        "devices": options.devices,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "parameters": sum(weight.numel() for weight in LlamaForCausalLM.from_pretrained(options.model).parameters()),
        "tokens_per_second": round(tokens / step),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "blocks": [len(module.plan.prefill), len(module.plan.decode)],
        "first_loss": round(meter.losses[0], 4),
        "last_loss": round(meter.losses[-1], 4),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"lightning {lightning.__version__}",
    }


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
