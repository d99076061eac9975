"""One training step of distillation against the plain recipe: two models, full logits, `F.kl_div`.

    python benchmarks/distill.py [--tokens 256 2048] [--batch_size 2] [--steps 8] [--precision bf16-mixed] [--compile]
        [--json]

Both sides train the same model (SmolLM2-135M, or random Llama weights with --tiny) on the same tokens with AdamW, from
a teacher in the type of its checkpoint: ours in a Lightning trainer with its module, the plain one in a loop. As in the
configurations of this package, our AdamW is torch's fused one; that of the plain recipe is torch's default, or with
--plain_fused the fused one too. With --compile our blocks are compiled (`loading.compile`), those of the plain recipe
are not. Half of the tokens are prompt. Steps alternate in one process. The ratio is the median over steps of the plain
step's time to ours. Memory is the peak of the resident set beyond the one before the second step, each side in a
process of its own; on a GPU, the peak of allocated memory. `offline_ratio` is of our step with the teacher's
distributions on disk (top 64 and the mass of all others), in a run of its own. In the one object of --json it and
`tokens_per_second_ratio` are the least over the lengths, `memory_ratio` is that of the last length.

With --trl FOLDER (made by `pip install --no-deps --target FOLDER trl==1.16.0`) TRL's DistillationTrainer takes turns
with the plain recipe too, on the same tokens as given responses. `tokens_per_second_vs_trl` is our ratio over its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pdtrim_pl.data import Batch, Example
from pdtrim_pl.losses import KL
from pdtrim_pl.losses.stored import stored_terms
from pdtrim_pl.models.pretrained import load_causal_lm, load_tokenizer
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.serving.peaks import peak_since, start_of_peak
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.teacher import CacheIndex, Making, Writing, write_cache
from pdtrim_pl.teacher.identity import CacheIdentity
from pdtrim_pl.teacher.offline import OfflineTeacher
from pdtrim_pl.teacher.reader import StoredTeacher

MODEL, RATE = "smollm2-135m", 1e-5
TINY = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
                   num_key_value_heads=2, vocab_size=512, tie_word_embeddings=True)  # fmt: skip
MIB = 2**20


class Plain:
    """The plain recipe."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = device_of(options)
        self.student = model_of(options).to(self.device).train()
        self.teacher = teacher_of(options).to(self.device)
        fused = True if options.plain_fused else None
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=RATE, fused=fused)
        half = options.precision == "bf16-mixed"
        self.precision = torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext()

    def step(self, batch: Batch) -> float:
        ids = torch.cat([batch.prompt_ids, batch.response_ids], dim=1).to(self.device)
        first = batch.prompt_ids.shape[1] - 1
        with self.precision:
            with torch.no_grad():
                theirs = self.teacher(ids, use_cache=False).logits
            ours = self.student(ids, use_cache=False).logits
            logs = (F.log_softmax(logits[:, first:-1].float(), dim=-1) for logits in (ours, theirs))
            loss = F.kl_div(*logs, log_target=True, reduction="none").sum(-1).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


class Turns(Callback):
    """Times our steps. After each of them it runs and times a plain step on the same batch."""

    def __init__(self, plain: Plain | None) -> None:
        self.plain = plain
        self.seconds: list[tuple[float, float]] = []
        self.losses: list[tuple[float, float]] = []
        self.began = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        wait(pl_module.device)
        self.began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        ours = float(trainer.callback_metrics["train/loss"])
        between = time.perf_counter()
        theirs = self.plain.step(batch) if self.plain is not None else 0.0
        self.seconds.append((between - self.began, time.perf_counter() - between))
        self.losses.append((ours, theirs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 2048], help="prompt and response of an example")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="steps of each side; the first is not counted")
    parser.add_argument("--precision", choices=("bf16-mixed", "32-true"), default="bf16-mixed")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--chunk_tokens", type=int, default=256)
    parser.add_argument("--tiny", action="store_true", help="random weights of a tiny model")
    parser.add_argument("--plain_fused", action="store_true", help="the plain recipe uses the fused AdamW too")
    parser.add_argument("--compile", action="store_true", help="compile our blocks; the first two steps do not count")
    parser.add_argument("--trl", metavar="FOLDER", help="folder with TRL in it")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", choices=("ours", "plain", "trl"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trl:
        sys.path.insert(0, options.trl)
    if options.only:
        print(json.dumps(peak(options)))
        return 0
    rows = [row_of(options, tokens) for tokens in options.tokens]
    device = device_of(options)
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(), "precision": options.precision, "plain_fused": options.plain_fused,
        "compile": options.compile,
        "tokens_per_second_ratio": min(row["tokens_per_second_ratio"] for row in rows),
        "offline_ratio": min(row["offline_ratio"] for row in rows), "memory_ratio": rows[-1]["memory_ratio"],
        "tokens_per_second_vs_trl": min(row["tokens_per_second_vs_trl"] for row in rows) if options.trl else None,
        "memory_vs_trl": rows[-1]["memory_vs_trl"] if options.trl else None, "rows": rows,
    }  # fmt: skip
    if options.json:
        print(json.dumps(found))
    else:
        print(f"{found['device']}, {torch.get_num_threads()} thread(s), {options.precision}")
        for row in rows:
            print("  ".join(f"{key} {value:.3g}" for key, value in row.items()))
    return 0


def row_of(options: argparse.Namespace, tokens: int) -> dict[str, float]:
    """The figures for one length. Memory is measured when the models that were timed are gone."""
    found = timed(options, tokens)
    gc.collect()
    start_of_peak(device_of(options))  # gives back what the allocator has kept
    memory = {side: measured_alone(options, tokens, side) for side in ("ours", "plain")}
    found |= {
        "memory_mib": memory["ours"], "plain_memory_mib": memory["plain"],
        "memory_ratio": memory["ours"] / memory["plain"],
    }  # fmt: skip
    if options.trl:
        found["memory_vs_trl"] = memory["ours"] / measured_alone(options, tokens, "trl")
    return found


def timed(options: argparse.Namespace, tokens: int) -> dict[str, float]:
    """The figures of time for one length."""
    seed_everything(0, verbose=False)
    turns = Turns(Plain(options))
    train(options, tokens, turns)
    warmup = 2 if options.compile else 1
    counted = turns.seconds[warmup:]
    ratios = sorted(plain / ours for ours, plain in counted)
    offline = Turns(turns.plain)
    train(options, tokens, offline, offline=True)
    trained = options.batch_size * tokens
    found = {
        "tokens": tokens,
        "tokens_per_second": trained / median(ours for ours, _ in counted),
        "plain_tokens_per_second": trained / median(plain for _, plain in counted),
        "tokens_per_second_ratio": median(ratios),
        "least_ratio": ratios[0],
        "largest_ratio": ratios[-1],
        "offline_ratio": median(plain / ours for ours, plain in offline.seconds[warmup:]),
        "largest_loss_difference": max(abs(ours - theirs) for ours, theirs in turns.losses),
    }
    if options.trl:
        found["trl_ratio"] = median(plain / theirs for theirs, plain in trl_turns(options, tokens, turns.plain)[1:])
        found["tokens_per_second_vs_trl"] = found["tokens_per_second_ratio"] / found["trl_ratio"]
    return found


def trl_turns(options: argparse.Namespace, tokens: int, plain: Plain | None, *hooks: Any) -> list[tuple[float, float]]:
    """Seconds of every step of TRL and of the plain step after it.

    Args:
        options: those of the command.
        tokens: prompt and response of an example.
        plain: the plain recipe; None leaves its steps out.
        hooks: called with the number of a step before it.
    """
    import distill_trl

    given, found, began = list(batches(options, tokens)), list[tuple[float, float]](), [0.0]

    def before(step: int) -> None:
        for hook in hooks:
            hook(step)
        wait(device_of(options))
        began[0] = time.perf_counter()

    def after(step: int) -> None:
        wait(device_of(options))
        between = time.perf_counter()
        if plain is not None:
            plain.step(given[step])
        found.append((between - began[0], time.perf_counter() - between))

    distill_trl.train(
        model_of(options).train(), teacher_of(options), load_tokenizer(MODEL), given, RATE,
        options.precision == "bf16-mixed", before, after,
    )  # fmt: skip
    return found


class Offline(OfflineTeacher):
    """The stored teacher of this benchmark's batches."""

    def __init__(self, folder: Path) -> None:
        self.stored = StoredTeacher(folder)
        self.terms = stored_terms([KL()], "top_k")
        self._next = None


def train(options: argparse.Namespace, tokens: int, *callbacks: Callback, offline: bool = False) -> None:
    """Our side: the package's module in a trainer."""

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=RATE, fused=True)

    module = PDTrimModule(MODEL, optimizer=optimizer, chunk_tokens=options.chunk_tokens)
    module.student = StagedCausalLM(model_of(options)).train()
    module.teacher = StagedCausalLM(teacher_of(options))
    if options.compile:
        module.student.compile_blocks()
        module.teacher.compile_blocks()
    if offline:
        folder = tempfile.TemporaryDirectory()
        module.offline = Offline(stored(options, tokens, module.teacher, Path(folder.name)))
    trainer = Trainer(
        accelerator=options.accelerator, devices=1, precision=options.precision, max_steps=options.steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, DataLoader(list(batches(options, tokens)), batch_size=None))


def stored(options: argparse.Namespace, tokens: int, teacher: StagedCausalLM, folder: Path) -> Path:
    """Write the teacher's distributions over the batches."""
    examples = [Example(*pair) for batch in batches(options, tokens) for pair in zip(*batch[:4:2], strict=True)]
    words = teacher.model.config.vocab_size
    identity = CacheIdentity("", "", "", words, 1.0, tokens, tokens // 2, tokens // 2)
    index = CacheIndex(identity, Making("top_k", 64), MODEL, len(examples))
    write_cache(
        folder, index, teacher.to(device_of(options)), examples, Writing(options.batch_size, device=device_of(options))
    )
    return folder


def peak(options: argparse.Namespace) -> float:
    """Peak memory of one side beyond what it holds before its second step, in MiB."""
    device, (tokens,) = device_of(options), options.tokens
    seed_everything(0, verbose=False)
    if options.only == "plain":
        plain, steps = Plain(options), batches(options, tokens)
        plain.step(next(steps))  # allocates the moments of the optimizer
        before = start_of_peak(device)
        for batch in steps:
            plain.step(batch)
        return peak_since(device, before) / MIB
    if options.only == "trl":
        at_second = [0]

        def second(step: int) -> None:
            if step == 1:
                at_second[0] = start_of_peak(device)

        trl_turns(options, tokens, None, second)
        return peak_since(device, at_second[0]) / MIB
    meter = _Peak()
    train(options, tokens, meter)
    return meter.found


class _Peak(Callback):
    """Measures the peak from the second step on."""

    def __init__(self) -> None:
        self.before, self.found = 0, 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if batch_idx == 1:
            self.before = start_of_peak(pl_module.device)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found = peak_since(pl_module.device, self.before) / MIB


def measured_alone(options: argparse.Namespace, tokens: int, side: str) -> float:
    """Peak memory of one side, measured in a process of its own, in MiB."""
    command = [sys.executable, __file__, "--only", side, "--tokens", str(tokens), "--steps", "3"]
    command += ["--batch_size", str(options.batch_size), "--precision", options.precision]
    command += ["--accelerator", options.accelerator, "--chunk_tokens", str(options.chunk_tokens)]
    command += ["--tiny"] if options.tiny else []
    command += ["--plain_fused"] if options.plain_fused else []
    command += ["--compile"] if options.compile else []
    command += ["--trl", options.trl] if options.trl else []
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(json.loads(out.splitlines()[-1]))


def batches(options: argparse.Namespace, tokens: int) -> Iterator[Batch]:
    """Random tokens, the same for both sides."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(options.steps):
        ids = torch.randint(3, 500, (options.batch_size, tokens), generator=draw)
        prompt, response = ids.split([tokens // 2, tokens - tokens // 2], dim=1)
        yield Batch(prompt, torch.ones_like(prompt, dtype=bool), response, torch.ones_like(response, dtype=bool))


def model_of(options: argparse.Namespace) -> PreTrainedModel:
    if options.tiny:
        torch.manual_seed(0)
        return LlamaForCausalLM(TINY)
    return load_causal_lm(MODEL, dtype=torch.float32)


def teacher_of(options: argparse.Namespace) -> PreTrainedModel:
    """The frozen teacher in the type of its checkpoint; with --tiny in fp32."""
    model = model_of(options) if options.tiny else load_causal_lm(MODEL)
    return model.eval().requires_grad_(False)


def device_of(options: argparse.Namespace) -> torch.device:
    return torch.device("cuda" if options.accelerator == "gpu" else "cpu")


def wait(device: torch.device) -> None:
    """Wait until the device has done its work, so that a step's time is its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    raise SystemExit(main())
