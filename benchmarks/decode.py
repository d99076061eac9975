"""Time of one decode step of the full plan, compared with Hugging Face's own `generate` on the same weights.

    OMP_NUM_THREADS=1 python benchmarks/decode.py [--json]

Both sides run the same random prompts without padding, decode greedily, and have no stop token. They take turns step by
step, since the machine may be shared: after every token of `generate`, the decode loop makes one token. A ratio is our
time divided by theirs, as the median over such pairs of steps. Prefill is not counted. `ratio_b1` and `ratio_b8` are
the worst ratios of a batch size over all prompt lengths. `cpu_ratio` uses the CPU time of this process, which other
processes do not affect.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from pdtrim_pl.evaluation.step_times import compare_steps
from pdtrim_pl.models.pretrained import load_causal_lm
from pdtrim_pl.staged import StagedCausalLM


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    ours, theirs = models(options)
    report: dict[str, Any] = {}
    for batch in options.batch_sizes:
        cells = {f"b{batch}_p{prompt}": measured(ours, theirs, batch, prompt, options) for prompt in options.prompts}
        report |= cells
        report[f"ratio_b{batch}"] = max(cell["ratio"] for cell in cells.values())
    report |= {
        "steps": options.steps,
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    print(json.dumps(report) if options.json else "\n".join(f"{key}: {value}" for key, value in report.items()))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="embedded name, directory or Hub id")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompts", type=int, nargs="+", default=[256, 1024], help="tokens of every prompt")
    parser.add_argument("--steps", type=int, default=64, help="timed steps of each side")
    parser.add_argument("--warmup", type=int, default=4, help="steps of each side before them")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser.parse_args(argv)


def models(options: argparse.Namespace) -> tuple[StagedCausalLM, PreTrainedModel]:
    """Our model and the Hugging Face model. Each has its own weights, since a gated model cannot run by itself."""
    ours, theirs = (load_causal_lm(options.model, dtype=getattr(torch, options.dtype)).eval() for _ in range(2))
    return StagedCausalLM(ours), theirs


def measured(
    ours: StagedCausalLM, theirs: PreTrainedModel, batch: int, prompt: int, options: argparse.Namespace
) -> dict[str, float]:
    """Medians over the steps of one batch size and prompt length."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, theirs.config.vocab_size, (batch, prompt), generator=draw)
    steps = compare_steps(ours, theirs, ids, steps=options.steps, warmup=options.warmup)
    found = {
        "ratio": round(median(step.ours.wall / step.theirs.wall for step in steps), 3),
        "cpu_ratio": round(median(step.ours.cpu / step.theirs.cpu for step in steps), 3),
        "ms": round(1000 * median(step.ours.wall for step in steps), 2),
        "hf_ms": round(1000 * median(step.theirs.wall for step in steps), 2),
    }
    if not options.json:
        print(f"batch {batch}, prompt {prompt}: {found}", flush=True)
    return found


if __name__ == "__main__":
    main()
