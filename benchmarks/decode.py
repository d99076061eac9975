"""Time of one decode step of the full plan, against Hugging Face's own `generate` on the same weights.

    OMP_NUM_THREADS=1 python benchmarks/decode.py [--json]

Both sides take the same random prompts without padding, choose greedily, and stop at no token. A step is the time
between two tokens, prefill not counted; a run of a side is the median of its steps. The sides take turns, and the one
that begins changes from pair to pair, for machines are shared: a ratio is ours over theirs, the median over pairs.
`ratio_b1` and `ratio_b8` are each the worst over the prompts of that batch size.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from pdtrim_pl.models.pretrained import load_causal_lm
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.decoding import stream

Side = Callable[[Tensor], list[float]]
"""Generates from a prompt [B, P]; says when each token was there, in seconds."""


class Clock(StoppingCriteria):
    """Stops nothing; `generate` asks it once a token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    ours, theirs = models(options)
    sides = (partial(staged_times, ours, options.new), partial(own_times, theirs, options.new))
    report: dict[str, Any] = {}
    for batch in options.batch_sizes:
        ratios = []
        for prompt in options.prompts:
            pairs = paired(sides, random_prompt(theirs.config.vocab_size, batch, prompt), options.pairs)
            found = {"ratio": median(a / b for a, b in pairs)}
            found |= {
                name: 1000 * median(side) for name, side in zip(("ms", "hf_ms"), zip(*pairs, strict=True), strict=True)
            }
            ratios.append(found["ratio"])
            report[f"b{batch}_p{prompt}"] = {name: round(value, 3) for name, value in found.items()}
            if not options.json:
                print(f"batch {batch}, prompt {prompt}: {report[f'b{batch}_p{prompt}']}", flush=True)
        report[f"ratio_b{batch}"] = round(max(ratios), 3)
    report |= {
        "new_tokens": options.new,
        "pairs": options.pairs,
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
    parser.add_argument("--new", type=int, default=24, help="tokens of every response, the first of them prefill's")
    parser.add_argument("--pairs", type=int, default=7, help="timed runs of each side; one more warms up")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser.parse_args(argv)


def models(options: argparse.Namespace) -> tuple[StagedCausalLM, PreTrainedModel]:
    """Ours and theirs, each with weights of its own: a model whose blocks have gates runs in no other way."""
    ours, theirs = (load_causal_lm(options.model, dtype=getattr(torch, options.dtype)).eval() for _ in range(2))
    assert theirs.generation_config is not None
    theirs.generation_config.eos_token_id = None
    return StagedCausalLM(ours), theirs


def random_prompt(vocabulary: int, batch: int, tokens: int) -> Tensor:
    return torch.randint(3, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(0))


def paired(sides: tuple[Side, Side], prompt: Tensor, pairs: int) -> list[tuple[float, float]]:
    """Seconds of one step of either side, pair by pair."""
    found: list[tuple[float, float]] = []
    for pair in range(pairs + 1):
        order = (0, 1) if pair % 2 else (1, 0)
        seconds = {side: median(b - a for a, b in pairwise(sides[side](prompt))) for side in order}
        if pair:
            found.append((seconds[0], seconds[1]))
    return found


def staged_times(model: StagedCausalLM, new: int, prompt: Tensor) -> list[float]:
    return [time.perf_counter() for _ in stream(model, prompt, max_new_tokens=new)]


def own_times(model: PreTrainedModel, new: int, prompt: Tensor) -> list[float]:
    clock = Clock()
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
    )  # fmt: skip
    return clock.times


if __name__ == "__main__":
    main()
