"""Exports untrained pairs, and writes what our own runtime generates from them.

    python tests/with_vllm/make_pair.py DIR BOUNDARY [--random]

With `--random` the pair is of a small model with random weights, whose two key/value heads two ranks can share. Else it
is of the embedded model, which has three.

It runs in the project's own environment; the tests run in vLLM's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import PreTrainedModel

from pdtrim_pl.export.pair import export_pair
from pdtrim_pl.models.pretrained import load_causal_lm, load_tokenizer
from pdtrim_pl.plan import Codec, KVRetentionPolicy, Retention, StagePlan, Width
from pdtrim_pl.plan.stages import Boundary, Stage
from pdtrim_pl.serving.engine.engine import Engine
from pdtrim_pl.serving.engine.requests import Ask, Done, Token
from pdtrim_pl.serving.generate import decoded, stop_ids_of
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.description import kv_shape_of, reference_to

MODEL = "smollm2-135m"
NEW_TOKENS = 24
INT4 = Codec("int4", "int4", True, True, exact=1)


@dataclass(frozen=True)
class Trimming:
    """What a pair lost, and what crosses."""

    dropped: Mapping[Stage, tuple[int, ...]]
    rules: Mapping[int, Retention]
    widths: Mapping[Stage, Width]
    """What every block keeps of each stage."""


EMBEDDED = Trimming(
    {"prefill": (20,), "decode": (11, 14, 20, 22)},
    {
        **{block: Retention("first_last", 4, 24) for block in (12, 13, 17)},
        **{block: Retention("first_last", 2, 0.3, INT4) for block in (18, 19)},
        **{block: Retention(codec=Codec("int8", "int8")) for block in (5, 6, 7)},
        8: Retention(codec=Codec("fp8", "none")),
    },
    {
        "prefill": Width(channels=tuple(c for c in range(1536) if c % 12)),
        "decode": Width(channels=tuple(c for c in range(1536) if c % 6), heads=(0, 1, 3, 5, 7, 8)),
    },
)
RANDOM = Trimming(
    {"prefill": (6,), "decode": (2, 6)},
    {
        1: Retention(codec=Codec("int8", "int8")),
        3: Retention("first_last", 4, 24),
        4: Retention("first_last", 2, 0.3, INT4),
        5: Retention(codec=Codec("fp8", "none")),
    },
    {"prefill": Width(channels=tuple(range(64, 512))), "decode": Width(channels=tuple(range(320)), heads=(1, 2))},
)
TEXT = (
    "The lighthouse keeper wrote in his log every evening. The sea was calm today, and two ships passed to the north. "
    "In the morning the fog had been so thick that he could not see the rocks below the tower. He lit the lamp early, "
    "and thought of his daughter, who lived in the city and sent him letters once a month. Her last letter had told "
    "him of a new house with a garden, where she grew beans, onions and a small apple tree. "
)


def prompts() -> list[str]:
    """Eight prompts between one and some hundred tokens."""
    return [
        "Once", "The capital of France is", TEXT, TEXT * 2 + "So the keeper", TEXT[:90], TEXT[30:300],
        TEXT * 3 + "The apple tree", "def fibonacci(n):\n",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("boundary", choices=["prefill", "decode"])
    parser.add_argument("--random", action="store_true")
    args = parser.parse_args()
    model = random_model() if args.random else load_causal_lm(MODEL, dtype=torch.float32)
    made = make(args.folder, args.boundary, model, RANDOM if args.random else EMBEDDED)
    (args.folder / "expected.json").write_text(json.dumps(made))


def random_model() -> PreTrainedModel:
    """Eight blocks with two key/value heads of 64 dimensions, in the vocabulary of the embedded model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(load_tokenizer(MODEL)), hidden_size=256, intermediate_size=512, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, initializer_range=0.1,
        tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def make(folder: Path, boundary: Boundary, model: PreTrainedModel, trimming: Trimming) -> list[dict]:
    """Write the export and return prompts with what is expected of them."""
    tokenizer = load_tokenizer(MODEL)
    reference = reference_to(model, MODEL)
    kept = {
        stage: tuple(b for b in range(reference.num_blocks) if b not in gone)
        for stage, gone in trimming.dropped.items()
    }
    plan = StagePlan(reference, prefill=kept["prefill"], decode=kept["decode"], boundary=boundary)
    for stage, width in trimming.widths.items():
        for block in plan.blocks(stage):
            plan = plan.narrow(stage, block, width)
    policy = KVRetentionPolicy(boundary, kv_shape_of(model), trimming.rules)
    export = export_pair(StagedCausalLM(model, plan, policy), folder / "pair", tokenizer=tokenizer)
    stop_ids, found = stop_ids_of(export, tokenizer), []
    with Engine(export) as engine:
        for text in prompts():
            ids = tokenizer(text)["input_ids"]
            *events, done = engine.events(Ask(ids, NEW_TOKENS))
            tokens = [event.id for event in events if isinstance(event, Token)]
            assert isinstance(done, Done)
            assert done.stats is not None
            stops = [at for at, token in enumerate(tokens) if token in stop_ids]
            answer = tokens[: stops[0] + 1] if stops else tokens
            found.append({
                "prompt": text, "prompt_ids": ids, "tokens": tokens,
                "answer": decoded(tokenizer, answer), "answer_tokens": len(answer),
                "kv_bytes": policy.sent_bytes(plan, len(ids)), "sent_bytes": done.stats.kv_bytes,
            })  # fmt: skip
    return found


if __name__ == "__main__":
    main()
