"""What a teacher's own responses are worth as training text: one trimmed student, distilled on each text in turn.

    python benchmarks/answers.py --prompts ROWS.jsonl --folder WORK --chat --drop decode:10,12 [--plan stage_plan.json]
        [--text TEXT.raw] [--tokens 200000] [--rate 2e-4] [--held_out 64] [--temperature 0.8] [--json]

ROWS.jsonl holds `prompt` and `response`; with --chat a prompt is a user's message. Some of its rows, by a seed, are
held out; the others train. The texts:

    given    the prompts with the responses of the file
    own      the same prompts with the teacher's responses, as `pdtrim answer` writes them
    text     windows of raw text, with --text

Every student has the same plan, losses (forward KL), rate and number of prompt and response tokens (whole batches; a
short text is read again). All are judged on the held-out prompts, as is the student without training:

    agreement       share of the tokens of the teacher's greedy continuation that the student's own one has at the same
                    place, up to --new_tokens or the teacher's end
    until_differing mean share of that continuation before the first other token
    kl_own, kl_given  KL to the teacher over its continuations, and over the responses of the file, in nats
    top1_own        share of the tokens of its continuations at which both models have the same most likely token

The answers stay in the folder WORK; a second call with the same settings finds them there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from plans import without
from torch.utils.data import Subset

from pdtrim_pl.compare.settings import Subject, Training
from pdtrim_pl.compare.texts import Texts
from pdtrim_pl.compare.training import distil
from pdtrim_pl.data import Batch, Collator, Example, Lengths, TextSource, TokenExamples
from pdtrim_pl.data.files import read_lines
from pdtrim_pl.data.formatting import encode
from pdtrim_pl.data.sources import load_rows
from pdtrim_pl.evaluation.quality import measure_quality
from pdtrim_pl.harness.answers import AnswerSettings, answer_file
from pdtrim_pl.harness.in_process import InProcessPair
from pdtrim_pl.models.pretrained import load_causal_lm, load_tokenizer
from pdtrim_pl.plan import StagePlan
from pdtrim_pl.serving.sampling import Sampling
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.decoding import stop_ids_of

TOGETHER = 8
"""Held-out prompts that run together."""


def main() -> int:
    options = parsed()
    tokenizer = load_tokenizer(options.model)
    teacher = StagedCausalLM(load_causal_lm(options.model, dtype=torch.float32)).eval().requires_grad_(False)
    options.folder.mkdir(parents=True, exist_ok=True)
    given, asked = cut_rows(options)
    lengths = Lengths(options.max_length, 32, options.max_length * 3 // 4)

    def examples(path: Path) -> TokenExamples:
        return encode(load_rows(TextSource(str(path))), tokenizer, lengths, options.seed)

    texts = {"given": examples(given), "own": examples(answered(options, given))}
    if options.text:
        texts["text"] = examples(options.text)
    judge = Judge(options, teacher, examples(asked), stop_ids_of(teacher.model, tokenizer))
    untrained = student_of(options)
    rows = {"untrained": judge(untrained)}
    for name, text in texts.items():
        student = student_of(options)
        found = trained(options, student, teacher, text)
        rows[name] = {**judge(student), **found}
        print(f"{name}: {rows[name]}", file=sys.stderr)
    found = {
        "model": options.model, "plan": {"prefill": untrained.plan.prefill, "decode": untrained.plan.decode},
        "prompts": options.prompts.name, "held_out": options.held_out, "new_tokens": options.new_tokens,
        "temperature": options.temperature, "rate": options.rate, "threads": torch.get_num_threads(), "rows": rows,
    }  # fmt: skip
    if options.json:
        print(json.dumps(found))
    else:
        for name, row in rows.items():
            print(f"{name:>9}  " + "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON rows with `prompt` and `response`")
    parser.add_argument("--chat", action="store_true", help="a prompt is a user's message, for chat models")
    parser.add_argument("--folder", type=Path, required=True, help="where the answers are kept")
    parser.add_argument("--text", type=Path, help="raw text to train another student on")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--plan", type=Path, help="plan of the student; only drops, no merges or widths")
    parser.add_argument("--drop", action="append", default=[], help="stage:block,block; may be given several times")
    parser.add_argument("--tokens", type=int, default=200_000, help="prompt and response tokens of a training")
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=256, help="tokens of an example")
    parser.add_argument("--answers", type=int, default=1000, help="most prompts that train")
    parser.add_argument("--answer_tokens", type=int, default=128, help="most tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the answers; 0 is greedy")
    parser.add_argument("--held_out", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=64, help="tokens of a held-out continuation")
    parser.add_argument("--precision", choices=("bf16-mixed", "32-true"), default="32-true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def cut_rows(options: argparse.Namespace) -> tuple[Path, Path]:
    """Files of the rows that train and of those that are held out, cut by the seed."""
    rows = [line.row for line in read_lines(options.prompts)]
    rows = [rows[index] for index in np.random.default_rng(options.seed).permutation(len(rows))]
    paths = options.folder / "given.jsonl", options.folder / "held_out.jsonl"
    train = rows[options.held_out : options.held_out + options.answers]
    for path, part in zip(paths, (train, rows[: options.held_out]), strict=True):
        kept = [said(row, options.chat) for row in part]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return paths


def said(row: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    """A row of the prompts as a row of a source."""
    if not chat:
        return {"prompt": row["prompt"], "response": row["response"]}
    turns = (("user", row["prompt"]), ("assistant", row["response"]))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def answered(options: argparse.Namespace, prompts: Path) -> Path:
    """The file of the teacher's own responses, which an earlier call may have begun."""
    output = options.folder / "own.jsonl"
    sampling = Sampling(temperature=options.temperature, seed=options.seed)
    settings = AnswerSettings(options.answer_tokens, sampling, batch_size=options.batch_size)
    answer_file(options.model, prompts, output, settings, dtype="float32")
    spoken = options.folder / "own_spoken.jsonl"  # a response without a token cannot train
    rows = [line.row for line in read_lines(output)]
    texts = [row["messages"][-1]["content"] if options.chat else row["response"] for row in rows]
    kept = [row for row, text in zip(rows, texts, strict=True) if text.strip()]
    spoken.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return spoken


def student_of(options: argparse.Namespace) -> StagedCausalLM:
    """The student before training."""
    student = StagedCausalLM(load_causal_lm(options.model, dtype=torch.float32)).eval()
    plan = student.plan
    if options.plan is not None:
        plan = replace(StagePlan.load(options.plan), model=plan.model)
        if any(plan.merged.values()) or any(plan.untied.values()):
            raise SystemExit(
                "--plan has blocks with weights of their own, and no checkpoint is read: give a plan of drops"
            )
    student.apply_plan(without(plan, options.drop))
    return student


def trained(
    options: argparse.Namespace, student: StagedCausalLM, teacher: StagedCausalLM, text: TokenExamples
) -> dict[str, float]:
    """Train a student in place; what it was trained on."""
    part = Subset(text, text.distinct())
    batches, tokens = Texts((), (), part, Collator(0), options.seed).training_batches(
        options.tokens, options.batch_size
    )

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=options.rate, fused=True)

    training = Training(options.tokens, options.batch_size, optimizer=optimizer, precision=options.precision)
    began = time.monotonic()
    distil(student, teacher, batches, training, Subject(options.model, "float32", "cpu"), options.folder)
    student.eval()
    spoken = sum(int(batch.response_mask.sum()) for batch in batches)
    return {
        "tokens": tokens, "response_tokens": spoken, "steps": len(batches), "examples": len(part),
        "seconds": time.monotonic() - began,
    }  # fmt: skip


class Judge:
    """Measures students on the held-out prompts."""

    def __init__(
        self, options: argparse.Namespace, teacher: StagedCausalLM, asked: TokenExamples, stops: Sequence[int]
    ) -> None:
        self.teacher, self.stops, self.room = teacher, stops, options.new_tokens
        self.asked = sorted(asked, key=lambda example: len(example.prompt))  # type: ignore[arg-type]
        self.wanted = self.continuations(teacher)
        own = [Example(one.prompt, torch.tensor(said)) for one, said in zip(self.asked, self.wanted, strict=True)]
        self.own, self.given = list(batched(own)), list(batched(self.asked))

    def __call__(self, student: StagedCausalLM) -> dict[str, float]:
        found = list(zip(self.continuations(student), self.wanted, strict=True))
        same = [[a == b for a, b in zip(ours, theirs, strict=False)] for ours, theirs in found]
        before = [(*row, False).index(False) for row in same]
        own = measure_quality(student, self.teacher, self.own)
        return {
            "agreement": sum(map(sum, same)) / sum(len(theirs) for _, theirs in found),
            "until_differing": mean(count / len(theirs) for count, (_, theirs) in zip(before, found, strict=True)),
            "kl_own": own.kl, "top1_own": own.agreement,
            "kl_given": measure_quality(student, self.teacher, self.given).kl,
        }  # fmt: skip

    def continuations(self, model: StagedCausalLM) -> list[list[int]]:
        """Greedy continuations of the held-out prompts, each with its stop token if it has one."""
        pair = InProcessPair.of(model)
        prompts = [example.prompt.tolist() for example in self.asked]
        return [
            row
            for start in range(0, len(prompts), TOGETHER)
            for row in pair.continuations(prompts[start : start + TOGETHER], room=self.room, stop_ids=self.stops)
        ]


def batched(examples: Sequence[Example]) -> Iterator[Batch]:
    for start in range(0, len(examples), TOGETHER):
        yield Collator(0)(examples[start : start + TOGETHER])


if __name__ == "__main__":
    raise SystemExit(main())
