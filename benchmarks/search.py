"""Work that the evaluator saves in a greedy search, compared with a full evaluation of every candidate.

    python benchmarks/search.py [--json]

Both sides drop blocks from decode, then from prefill, by least KL to the teacher on the same calibration set. Both keep
the teacher's probabilities. The naive side runs every candidate through both stages on all batches. Work is counted as
(token, block) passes. Times are compared as a ratio, since the machine may be shared. A repeat runs both sides one
after the other; medians over repeats are reported.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import dataclass
from statistics import median

import torch
import transformers

from pdtrim_pl.data import Lengths, Parts, PromptResponseDataModule, TextSource
from pdtrim_pl.data.collate import Batch
from pdtrim_pl.evaluation.evaluator import Evaluator, SearchMemory
from pdtrim_pl.models.pretrained import load_causal_lm
from pdtrim_pl.plan import StagePlan, Target
from pdtrim_pl.staged import StagedCausalLM

ORDER: tuple[Target, ...] = ("decode", "prefill")


@dataclass(frozen=True)
class Result:
    plan: StagePlan
    block_tokens: int
    seconds: float


def main() -> None:
    options = arguments()
    batches = calibration(options)
    student = StagedCausalLM(load_causal_lm(options.model, dtype=torch.bfloat16)).eval()
    sides = {"naive": naive, "fast": fast}
    runs: dict[str, list[Result]] = {name: [] for name in sides}
    for repeat in range(options.repeats):
        for name, side in sides.items():
            runs[name].append(timed(side, student, batches, options.drops))
            done = runs[name][-1]
            if not options.json:
                print(f"{repeat + 1}, {name}: {done.block_tokens} block-tokens, {done.seconds:.1f} s", flush=True)
    report = summary(runs, options, batches)
    print(json.dumps(report) if options.json else "\n".join(f"{key}: {value}" for key, value in report.items()))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="embedded name, directory or Hub id")
    parser.add_argument("--text", default="pydoc", help="source of the calibration text, as `data.source.path`")
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=192, help="tokens of every prompt")
    parser.add_argument("--response", type=int, default=64, help="tokens of every response")
    parser.add_argument("--drops", type=int, default=1, help="blocks dropped from each stage")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser.parse_args()


def calibration(options: argparse.Namespace) -> list[Batch]:
    data = PromptResponseDataModule(
        options.model,
        TextSource(options.text),
        Lengths(options.prompt + options.response, options.prompt, options.prompt),
        Parts(validation=0, calibration=options.examples),
        eval_batch_size=options.batch_size,
    )
    data.prepare_data()
    data.setup()
    return list(data.calibration_dataloader())


def timed(side, student: StagedCausalLM, batches: list[Batch], drops: int) -> Result:  # type: ignore[no-untyped-def]
    plan, started = StagePlan.full(student.plan.model, "free"), time.perf_counter()
    memory = SearchMemory(base=0) if side is naive else SearchMemory()
    evaluator = Evaluator(student, student, batches, memory=memory)
    for target in ORDER:
        for _ in range(drops):
            plan = side(evaluator, plan, target)
    return Result(plan, evaluator.block_tokens, time.perf_counter() - started)


def naive(evaluator: Evaluator, plan: StagePlan, target: Target) -> StagePlan:
    """Evaluate every candidate with all blocks on all batches."""
    blocks = plan.drop_candidates(target)
    trials = [plan.drop(target, block) for block in blocks]
    energies = [evaluator.energy(trial) for trial in trials]
    return trials[energies.index(min(energies))]


def fast(evaluator: Evaluator, plan: StagePlan, target: Target) -> StagePlan:
    """Choose the best candidate in the way of criteria and searches."""
    evaluator.rebase(plan)
    trials = [evaluator.candidate(plan.drop(target, block)) for block in plan.drop_candidates(target)]
    return trials[evaluator.best(trials)[0]].plan


def summary(runs: dict[str, list[Result]], options: argparse.Namespace, batches: list[Batch]) -> dict[str, object]:
    pairs = list(zip(runs["naive"], runs["fast"], strict=True))
    return {
        "evaluations_ratio": round(median(slow.block_tokens / quick.block_tokens for slow, quick in pairs), 3),
        "wall_ratio": round(median(slow.seconds / quick.seconds for slow, quick in pairs), 3),
        "same_result": all((a.plan.prefill, a.plan.decode) == (b.plan.prefill, b.plan.decode) for a, b in pairs),
        "naive_block_tokens": runs["naive"][0].block_tokens,
        "fast_block_tokens": runs["fast"][0].block_tokens,
        "naive_seconds": round(median(run.seconds for run in runs["naive"]), 2),
        "fast_seconds": round(median(run.seconds for run in runs["fast"]), 2),
        "prefill_removed": list(runs["fast"][0].plan.removed("prefill")),
        "decode_removed": list(runs["fast"][0].plan.removed("decode")),
        "repeats": options.repeats,
        "tokens": sum(int(batch.prompt_mask.sum() + batch.response_mask.sum()) for batch in batches),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }


if __name__ == "__main__":
    main()
