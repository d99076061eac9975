"""Keys of the journal: texts that contain everything an energy depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from pdtrim_pl.compat import attention_of
from pdtrim_pl.data.collate import Batch, fingerprint
from pdtrim_pl.evaluation.neighbours import Candidate
from pdtrim_pl.parallel import Parallel
from pdtrim_pl.plan import STAGES
from pdtrim_pl.staged import StagedCausalLM


def described(candidate: Candidate) -> str:
    """The part of a candidate that its energy depends on, as JSON."""
    plan, policy = candidate.plan, candidate.policy
    facts: dict[str, object] = {
        "boundary": plan.boundary,
        **{stage: list(plan.blocks(stage)) for stage in STAGES},
        "merged": {stage: {str(b): list(run) for b, run in plan.merged[stage].items()} for stage in STAGES},
        "untied": {stage: list(plan.untied[stage]) for stage in STAGES},
        "kv": {} if policy is None else {str(block): rule.to_json() for block, rule in policy.rules.items()},
    }
    if any(plan.widths.values()):
        widths = {stage: {str(b): width.to_json() for b, width in plan.widths[stage].items()} for stage in STAGES}
        facts["widths"] = hashlib.sha256(json.dumps(widths).encode()).hexdigest()  # they are long
    return json.dumps(facts, separators=(",", ":"))


def search_fingerprint(
    student: StagedCausalLM, teacher: StagedCausalLM, batches: Sequence[Batch], ranks: Parallel
) -> str:
    """Hash of what energies depend on besides plan and policy: weights, arithmetic and calibration set.

    This is a collective: every rank must call it.
    """
    sums = [_total(ranks.own_part(parameter)) for model in (student, teacher) for parameter in model.parameters()]
    offers: list[tuple[object, ...]] = [
        (block, *merge, sum(map(_total, weights.parameters())))
        for block, gate in student.gates.items()
        for merge, weights in gate.offers.items()
    ]
    offers += [
        (block, stage, str(width.to_json()), sum(map(_total, weights.parameters())))
        for block, gate in student.gates.items()
        for (stage, width), weights in gate.refit_offers.items()
    ]
    weights_by_rank = ranks.agree(sums) if ranks.whole else ranks.gather(sums)
    device = student.model.device.type
    arithmetic = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    sizes = [len(batch.response_mask) for batch in batches]
    attention = attention_of(student.model)
    offered, plan = ranks.agree(offers), teacher.plan.to_json()
    text = f"{arithmetic} {attention} {sizes} {weights_by_rank} {offered} {plan} {fingerprint(batches)}"
    return hashlib.sha256(text.encode()).hexdigest()


def _total(weights: Tensor) -> int:
    """Sum of the bit patterns. It does not depend on the number of threads. Summing in parts saves memory."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weights.element_size()]
    parts = weights.detach().flatten().view(bits).split(2**24)
    return sum(int(part.sum(dtype=torch.int64)) for part in parts)
