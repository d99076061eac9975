"""One of two processes that train a sharded student beside a whole one, for `test_sharded_heads.py`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fsdp_worker import PROCESSES, _apart
from tiny_models import tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from pdtrim_pl.data import Batch
from pdtrim_pl.losses import KL, CrossEntropy, LossTerm, training_loss
from pdtrim_pl.losses.pair import run_pair
from pdtrim_pl.losses.rows import Rows
from pdtrim_pl.losses.stored import run_alone, stored_terms
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.strategies.fsdp import shard

CASES: tuple[tuple[str, bool, bool], ...] = (
    ("llama", True, False), ("llama", False, False), ("gemma2", True, False), ("granite", False, False),
    ("llama", True, True),
)  # fmt: skip
"""Family, whether embeddings and head share their weights, whether the teacher is stored."""
CHUNKS = (1000, 3)
"""Tokens in a chunk: all at once, and so few that the ranks have different numbers of chunks."""
LOSSES: tuple[LossTerm, ...] = (KL(), CrossEntropy(0.5))


def compare(rank: int, meeting_point: Path, told: Path) -> None:
    """Write the differences of every case; rank 0 tells."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting_point.as_uri(), rank=rank, world_size=PROCESSES)
    found = {" ".join(map(str, case)): [_differences(rank, *case, chunk) for chunk in CHUNKS] for case in CASES}
    if rank == 0:
        told.write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def _differences(rank: int, family: str, tied: bool, stored: bool, chunk: int) -> dict[str, float]:
    """Differences of gradients and loss between a sharded pair and a whole one, and the collectives of its forward."""
    pairs = []
    for _ in range(2):
        sizes: dict[str, Any] = {"blocks": 3, "tie_word_embeddings": tied}
        pair = [StagedCausalLM(tiny_model(family, seed=seed, **sizes)) for seed in (0, 1)]
        pair[0].train().apply_plan(pair[0].plan.drop("decode", 1))
        pair[1].eval().requires_grad_(False)
        pairs.append(pair)
    whole, sharded = pairs
    for model in sharded:
        shard(model, init_device_mesh("cpu", (PROCESSES,)))
    batches = [_batch(3, 9), _batch(2, 2)]
    expected = torch.stack([_loss(*whole, batch, chunk, stored, gather=False) for batch in batches]).mean()
    expected.backward()
    with Gathers() as gathers:
        loss = _loss(*sharded, batches[rank], chunk, stored, gather=True)
    gathered = gathers.count
    loss.backward()
    theirs = dict(sharded[0].named_parameters())
    apart = max(_apart(weight.grad, theirs[name].grad) for name, weight in whole[0].named_parameters())
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return {"gradient": apart, "loss": float((mean / PROCESSES - expected).abs()), "gathers": gathered}


class Gathers(TorchDispatchMode):
    """Counts all-gathers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name().startswith("c10d::") and "gather" in func.name()
        return func(*args, **(kwargs or {}))


def _batch(rows: int, response: int) -> Batch:
    generator = torch.Generator().manual_seed(rows)
    prompts, responses = (torch.randint(3, 60, (rows, width), generator=generator) for width in (5, response))
    return Batch(prompts, torch.ones_like(prompts).bool(), responses, torch.ones_like(responses).bool())


def _loss(
    student: StagedCausalLM, teacher: StagedCausalLM, batch: Batch, chunk: int, stored: bool, *, gather: bool
) -> torch.Tensor:
    if not stored:
        found = run_pair(student, teacher, batch, watch_blocks=False, keep_caches=False, gather_heads=gather)
        return training_loss(LOSSES, found, chunk_tokens=chunk)[0]
    tokens = int(batch.response_mask.sum())
    logits = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(tokens))
    rows = Rows.top_k(logits, 8).packed()
    found = run_alone(student, batch, rows, gather_heads=gather)
    return training_loss(stored_terms(LOSSES, "top_k"), replace(found), chunk_tokens=chunk)[0]
