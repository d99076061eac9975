"""Quality and cost of narrower blocks: removes channels and query heads from the embedded model, without training.

    python benchmarks/width.py TUNE.raw TEST.raw --leave both:channels:410 [--leave decode:heads:3 ...]
        [--drop prefill:24,25] [--criterion ActivationTimesWeight] [--no-repair] [--relation nested]
        [--boundary prefill] [--examples 160] [--test 96] [--json]

Blocks of --drop leave first. Channels and heads are chosen, and layers refitted, on the first file. The second file
gives the figures. KL is to the dense model, in nats, for prompts and responses of 64 tokens. Recall: a text of 128
tokens is repeated after 320 other tokens; it is the share of the repeated tokens that the model ranks first. Costs are
shares of the dense model's costs, for a prompt and a response of 64 tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import get_args

import torch
from plans import without

from pdtrim_pl import criteria
from pdtrim_pl.criteria import ScoringContext, WidthCriterion
from pdtrim_pl.data import Collator, Example
from pdtrim_pl.data.collate import Batch
from pdtrim_pl.evaluation.quality import measure_quality
from pdtrim_pl.evaluation.recall import measure_recall, repetition
from pdtrim_pl.models.pretrained import load_causal_lm, load_tokenizer
from pdtrim_pl.plan import Boundary, Relation, StagePlan
from pdtrim_pl.search import Narrowing, narrow, refit_kv_only
from pdtrim_pl.sizing.cost import CostModel
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.description import reference_to

MODEL = "smollm2-135m"
SIZE, PROMPT, TOGETHER = 128, 64, 8
BETWEEN, REPEATS = 320, 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tune", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--leave", action="append", default=[], help="stage:part:count; may be given several times")
    parser.add_argument("--drop", action="append", default=[], help="stage:block,block; may be given several times")
    parser.add_argument("--criterion", default="ActivationTimesWeight")
    parser.add_argument("--no-repair", action="store_true")
    parser.add_argument("--relation", choices=get_args(Relation), default="nested")
    parser.add_argument("--boundary", choices=get_args(Boundary), default="prefill")
    parser.add_argument("--examples", type=int, default=160, help="texts of 128 tokens to choose and refit on")
    parser.add_argument("--test", dest="tested", type=int, default=96, help="texts of 128 tokens for the figures")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    teacher, student = (StagedCausalLM(load_causal_lm(MODEL, dtype=torch.float32)).eval() for _ in range(2))
    plan = StagePlan.full(reference_to(student.model, MODEL), options.relation, options.boundary)
    student.apply_plan(without(plan, options.drop))
    text, test = (tokens_of(path) for path in (options.tune, options.test))
    context = ScoringContext(student, teacher, requests(text, options.examples))
    criterion: WidthCriterion = getattr(criteria, options.criterion)()
    began = time.monotonic()
    for turn, line in enumerate(options.leave):
        target, part, count = line.split(":")
        narrowing = Narrowing(target, part, int(count), criterion, not options.no_repair, round=turn)
        result = narrow(context, student.plan, narrowing, context.batches)
        student.apply_plan(result.plan, refits=result.refits)
    if not options.no_repair:
        result = refit_kv_only(context, context.batches)
        student.apply_plan(result.plan, refits=result.refits)
    seconds = time.monotonic() - began
    costs = CostModel.of(student, PROMPT, SIZE - PROMPT).shares(student.plan)
    row = {
        "drop": options.drop, "leave": options.leave, "criterion": criterion.name, "repair": not options.no_repair,
        "prefill_flops": costs.prefill_flops, "decode_bytes": costs.decode_bytes,
        "kl": measure_quality(student, teacher, requests(test, options.tested)).kl,
        "recall": measure_recall(student, repeated(test)), "seconds": seconds, "threads": torch.get_num_threads(),
    }  # fmt: skip
    print(json.dumps(row) if options.json else "  ".join(f"{key} {value}" for key, value in row.items()))
    return 0


def requests(tokens: torch.Tensor, count: int) -> list[Batch]:
    rows = [Example(row[:PROMPT], row[PROMPT:]) for row in tokens[: count * SIZE].view(count, SIZE)]
    return [Collator(0)(rows[first : first + TOGETHER]) for first in range(0, count, TOGETHER)]


def repeated(tokens: torch.Tensor) -> list[Batch]:
    """Requests whose response repeats a text at the start of the prompt."""
    return [
        Collator(0)([repetition(tokens[start : start + SIZE], tokens[start + 700 : start + 700 + BETWEEN])])
        for start in range(0, 2000 * REPEATS, 2000)
    ]


def tokens_of(path: Path) -> torch.Tensor:
    return torch.tensor(load_tokenizer(MODEL)(path.read_text(encoding="utf-8"))["input_ids"])


if __name__ == "__main__":
    raise SystemExit(main())
