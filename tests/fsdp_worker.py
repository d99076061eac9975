"""One of two processes that compare a sharded student with a whole one, step by step, for `test_fsdp.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_models import tiny_model
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from pdtrim_pl.criteria import ScoringContext, Taylor
from pdtrim_pl.data import Batch
from pdtrim_pl.export.whole import whole_copy
from pdtrim_pl.plan import Boundary, StagePlan
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.decoding import generate
from pdtrim_pl.strategies.fsdp import shard

PROCESSES = 2
STEPS = 3
PROMPT = 6
CASES: tuple[tuple[str, Boundary, bool], ...] = (
    ("llama", "prefill", False),
    ("llama", "decode", True),
    ("phi3", "decode", False),
    ("qwen3", "prefill", True),
    ("gemma2", "decode", False),
    ("gpt_neox", "prefill", False),
)
"""Family, boundary, gradient checkpointing."""


def compare(rank: int, meeting_point: Path, told: Path) -> None:
    """Write the largest differences of every case; rank 0 tells."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting_point.as_uri(), rank=rank, world_size=PROCESSES)
    found = {" ".join(map(str, case)): list(_differences(rank, *case)) for case in CASES}
    found["bf16"] = [_small_step()]
    found["generated"] = [{"32-true": _generated("32-true"), "bf16-mixed": _generated("bf16-mixed")}]
    if rank == 0:
        told.write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def _differences(rank: int, family: str, boundary: Boundary, recompute: bool) -> Iterator[dict[str, float]]:
    whole, sharded = _student(family, boundary, recompute), _student(family, boundary, recompute)
    shard(sharded, init_device_mesh("cpu", (PROCESSES,)))
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in (whole, sharded)]
    ids = torch.randint(3, 60, (4, 13), generator=torch.Generator().manual_seed(1))
    for _ in range(STEPS):
        loss = _loss(whole, ids)
        loss.backward()
        _loss(sharded, ids.chunk(PROCESSES)[rank]).backward()
        worst = max(_apart(*gradients) for gradients in _gradients(whole, sharded))
        taylor = [_taylor(model, ids) for model in (whole, sharded)]  # passes without a step must leave nothing behind
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            copy = whole_copy(sharded, lambda parameters: nullcontext(), keep=rank == 0)
            losses = [float(_loss(model, ids)) for model in (whole, sharded, *([copy] if copy is not None else []))]
        yield {
            "gradient": worst,
            "taylor": max(abs(taylor[0][block] - taylor[1][block]) / abs(taylor[0][block]) for block in taylor[0]),
            "loss": max(losses) - min(losses),
            "step": float(loss.detach()) - losses[0],
        }


def _small_step() -> dict[str, float]:
    """One step of Adam at 1e-5 under mixed precision: the share of weights that it moves, and widths in bytes."""
    sharded = _student("llama", "prefill", False)
    shard(sharded, init_device_mesh("cpu", (PROCESSES,)), "bf16-mixed")
    before = [own.detach().clone() for own in _trained(sharded)]
    optimizer = torch.optim.Adam(sharded.parameters(), lr=1e-5)
    ids = torch.randint(3, 60, (4, 13), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        logits = sharded.logits(sharded(ids[:, :PROMPT], ids[:, PROMPT:]).hidden)
        F.cross_entropy(logits.float().flatten(0, 1), ids[:, PROMPT:].flatten()).backward()
    optimizer.step()
    pairs = [(old, new.detach()) for old, new in zip(before, _trained(sharded), strict=True)]
    count = sum(old.numel() for old, _ in pairs)
    rounded = sum(int((old.bfloat16() != new.bfloat16()).sum()) for old, new in pairs)
    moved = sum(int((old != new).sum()) for old, new in pairs)
    return {
        "moved": moved / count, "moved in bf16": rounded / count, "logits": logits.element_size(),
        "shards": max(old.element_size() for old, _ in pairs),
    }  # fmt: skip


def _generated(precision: str) -> float:
    """Share of tokens that a sharded student generates as a whole one does; the teacher-forced pass judges in bf16."""
    sharded = _student("llama", "decode", False).eval()
    prompt = torch.randint(3, 60, (4, PROMPT), generator=torch.Generator().manual_seed(1))
    whole = generate(_student("llama", "decode", False).eval(), prompt, max_new_tokens=7)
    shard(sharded, init_device_mesh("cpu", (PROCESSES,)), precision)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
        found = generate(sharded, prompt, max_new_tokens=7)
        if precision != "32-true":
            with torch.no_grad():
                whole = sharded.logits(sharded(prompt, found).hidden).argmax(dim=-1)
    return float((found == whole).float().mean())


def _trained(sharded: StagedCausalLM) -> list[Tensor]:
    """This process's part of the projections of blocks that both stages run, all of which get a gradient."""
    names = ("q_proj", "v_proj", "o_proj", "down_proj")
    weights = [w for name, w in sharded.gates[0].block.named_parameters() if any(part in name for part in names)]
    assert all(isinstance(weight, DTensor) for weight in weights)
    return [weight.to_local() for weight in weights if isinstance(weight, DTensor)]


def _student(family: str, boundary: Boundary, recompute: bool) -> StagedCausalLM:
    """Six blocks: 1 is KV-only, and so is the last; 2 leaves decode, 3 leaves both, 4 has its own weights in decode."""
    staged = StagedCausalLM(tiny_model(family, blocks=6, tie_word_embeddings=family == "llama")).train()
    plan: StagePlan = replace(staged.plan, relation="free", boundary=boundary, untied={"decode": (4,)})
    staged.apply_plan(plan.drop("prefill", 1).drop("prefill", 5).drop("decode", 2).drop("both", 3))
    staged.freeze_unused()
    staged.gradient_checkpointing = recompute
    return staged


def _loss(staged: StagedCausalLM, ids: Tensor) -> Tensor:
    """In two chunks, as in training."""
    hidden = staged(ids[:, :PROMPT], ids[:, PROMPT:]).hidden.flatten(0, 1)
    targets = ids[:, PROMPT:].flatten()
    losses = [
        F.cross_entropy(staged.logits(part), target, reduction="sum")
        for part, target in zip(hidden.chunk(2), targets.chunk(2), strict=True)
    ]
    return torch.stack(losses).sum() / len(targets)


def _gradients(whole: StagedCausalLM, sharded: StagedCausalLM) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    theirs = dict(sharded.named_parameters())
    for name, parameter in whole.named_parameters():
        assert isinstance(theirs[name], DTensor), "cut up again after backward"
        yield parameter.grad, theirs[name].grad


def _apart(ours: Tensor | None, theirs: Tensor | None) -> float:
    """Largest difference as a share of the largest gradient; none counts as zeros."""
    if theirs is not None:
        assert isinstance(theirs, DTensor)
        theirs = theirs.full_tensor()
    if ours is None or theirs is None:
        left = ours if theirs is None else theirs
        return 0.0 if left is None else float(left.abs().max())
    return float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-6))


def _taylor(staged: StagedCausalLM, ids: Tensor) -> dict[int, float]:
    prompt, response = ids[:, :PROMPT], ids[:, PROMPT:]
    batch = Batch(prompt, torch.ones_like(prompt, dtype=torch.bool), response, torch.ones_like(response).bool())
    context = ScoringContext(staged, staged, [batch], torch.device("cpu"))
    return Taylor().score(context, staged.plan, "both", (0, 4))
