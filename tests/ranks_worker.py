"""One of two gloo processes that choose, fit, fail and wait together, for `test_ranks.py`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy
from test_criteria import batches
from tiny_models import tiny_model
from torch import Tensor

from callbacks import ExportPair, LossGuard
from pdtrim_pl.criteria import ScoringContext, Taylor
from pdtrim_pl.evaluation.evaluator import Evaluator
from pdtrim_pl.merging import Merging, local_fits
from pdtrim_pl.merging.trial import Trial
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.parallel import Parallel, on_first_rank
from pdtrim_pl.search import Guards, distillation_set
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.strategies import parallel_of

PROCESSES = 2
BLOCKS = 6
SETTINGS = Merging(min_cosine=-1, steps=3, pairs_at_once=1)
DATA = [*batches(0), *batches(1), batches(2)[0]]
GAVE_UP = timedelta(seconds=3)
"""When a collective gives up in which ranks wait for the first one."""
WORK = 6.0
"""Seconds of work of the first rank, more than that."""

Told = dict[str, Any]


def both(rank: int, meeting_point: Path, folder: Path) -> None:
    """Run every case; what this process saw goes to `folder/told-RANK.json`."""
    torch.set_num_threads(1)
    logging.getLogger("pdtrim_pl").setLevel(logging.ERROR)
    os.environ["LOCAL_RANK"] = str(rank)
    strategy = _started(rank, meeting_point, timedelta(seconds=60))
    told: Told = {"shared": scores(parallel_of(strategy)), "in step": scores(in_step(parallel_of(strategy)))}
    for name, case in FAILING.items():
        told[name] = failure(lambda case=case: case(strategy, folder))  # type: ignore[misc]
    dist.destroy_process_group()
    strategy = _started(rank, meeting_point.with_name("again"), GAVE_UP)
    told["waited"] = waiting(strategy)
    told["first fails"] = failure(lambda: on_first_rank(parallel_of(strategy), _refuse, every=0.1))
    dist.destroy_process_group()
    (folder / f"told-{rank}.json").write_text(json.dumps(told), encoding="utf-8")


def _started(rank: int, meeting_point: Path, timeout: timedelta) -> DDPStrategy:
    dist.init_process_group(
        "gloo", init_method=meeting_point.as_uri(), rank=rank, world_size=PROCESSES, timeout=timeout
    )
    devices = [torch.device("cpu")] * PROCESSES
    strategy = DDPStrategy(CPUAccelerator(), parallel_devices=devices, cluster_environment=LightningEnvironment())
    strategy.set_world_ranks()
    return strategy


def in_step(ranks: Parallel) -> Parallel:
    """As if weights were sharded."""
    ranks.whole = False
    return ranks


def models() -> tuple[StagedCausalLM, StagedCausalLM]:
    student = StagedCausalLM(tiny_model("llama", blocks=BLOCKS))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return student.eval(), StagedCausalLM(tiny_model("llama", blocks=BLOCKS)).eval()


def scores(ranks: Parallel) -> Told:
    """What a search asks of every batch and every pair of neighbours, and what this rank did for it."""
    student, teacher = models()
    largest, fitted, passes = [0], [0], [0]

    plain = ranks.gather

    def gather(value: Any) -> list[Any]:
        largest[0] = max(largest[0], len(pickle.dumps(value)))
        return plain(value)

    ranks.gather = gather  # type: ignore[method-assign]

    of = Trial.of

    def counting(*args: Any) -> Trial:
        fitted[0] += 1
        return of(*args)

    student.model.base_model.register_forward_pre_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    context = ScoringContext(student, teacher, DATA, ranks=ranks)
    redundancy = context.redundancy
    once, passes[0] = passes[0], 0
    taylor = Taylor().score(context, student.plan, "both", range(BLOCKS))
    twice = passes[0]
    local_fits.Trial.of = counting  # type: ignore[assignment,method-assign]
    try:
        moves = distillation_set(context, student.plan, "both", SETTINGS, Guards(0, 0))
    finally:
        local_fits.Trial.of = of  # type: ignore[method-assign]
    offers = [
        [index, str(merge), digest(list(weights.state_dict().values()))]
        for index, gate in student.gates.items()
        for merge, weights in gate.offers.items()
    ]
    return {
        "redundancy": {stage: list(values.values()) for stage, values in redundancy.items()},
        "taylor": list(taylor.values()), "moves": [str(move) for move in moves], "offers": offers,
        "fitted": fitted[0], "passes": [once, twice], "largest object": largest[0],
        "one block": len(pickle.dumps(student.gates[0].block)),
    }  # fmt: skip


def digest(tensors: Sequence[Tensor]) -> str:
    return hashlib.sha256(b"".join(x.detach().float().numpy().tobytes() for x in tensors)).hexdigest()


def failure(case: Callable[[], object]) -> str:
    """How a case ended on this rank, with the time it took."""
    try:
        case()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing failed"


def _refuse(*_: Any, **__: Any) -> Any:
    raise OSError("no room here")


def evaluation(strategy: DDPStrategy, folder: Path) -> None:
    """Rank 1 fails in its second batch."""
    student, teacher = models()
    evaluator = Evaluator(student, teacher, DATA, ranks=parallel_of(strategy))
    if strategy.global_rank == 1:
        evaluator._sums = lambda candidate, index: (0.0, 0.0) if index == 0 else _refuse()  # type: ignore[method-assign,assignment,return-value]
    evaluator.energy(student.plan.drop("decode", 2))


def teacher_pass(strategy: DDPStrategy, folder: Path) -> None:
    """Rank 1 fails before the first evaluation."""
    student, teacher = models()
    if strategy.global_rank == 1:
        teacher.prefill = _refuse  # type: ignore[method-assign]
    Evaluator(student, teacher, DATA, ranks=parallel_of(strategy))


def journal(strategy: DDPStrategy, folder: Path) -> None:
    """Rank 0, which writes for all, cannot."""
    student, teacher = models()
    (folder / "file").touch()
    path = folder / "file" / "journal.jsonl"
    Evaluator(student, teacher, DATA, ranks=parallel_of(strategy), journal=path).energy(student.plan.drop("decode", 2))


def local_fit(strategy: DDPStrategy, folder: Path) -> None:
    """Rank 1 fails in the second group of its fits, while rank 0 goes on with its own."""
    student, teacher = models()
    of, seen = Trial.of, [0]

    def failing(*args: Any) -> Trial:
        seen[0] += 1
        return _refuse() if strategy.global_rank == 1 and seen[0] > 2 else of(*args)

    local_fits.Trial.of = failing  # type: ignore[assignment,method-assign]
    try:
        distillation_set(
            ScoringContext(student, teacher, DATA, ranks=parallel_of(strategy)), student.plan, "both", SETTINGS,
            Guards(0, 0),
        )  # fmt: skip
    finally:
        local_fits.Trial.of = of  # type: ignore[method-assign]


def redundancy(strategy: DDPStrategy, folder: Path) -> None:
    """Rank 1 fails in a batch."""
    student, teacher = models()
    if strategy.global_rank == 1:
        student.prefill = _refuse  # type: ignore[method-assign]
    assert ScoringContext(student, teacher, DATA, ranks=parallel_of(strategy)).redundancy


def loss_guard(strategy: DDPStrategy, folder: Path) -> None:
    """Rank 1 alone has a loss that is not finite, and cannot save its batch."""
    (folder / "file").touch()
    guard = LossGuard(output=folder / "file" / "batches")
    trainer: Any = SimpleNamespace(
        strategy=strategy,
        global_step=7,
        current_epoch=1,
        global_rank=strategy.global_rank,
        default_root_dir=folder,
        fast_dev_run=0,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(_should_accumulate=lambda: False)),
    )
    module, optimizer = PDTrimModule("any"), torch.optim.SGD([torch.zeros(1)])
    guard.on_fit_start(trainer, module)
    guard.on_train_batch_start(trainer, module, DATA[0], 0)
    guard.on_before_backward(trainer, module, torch.tensor(float("nan") if strategy.global_rank else 1.0))
    guard.on_before_optimizer_step(trainer, module, optimizer)


def export(strategy: DDPStrategy, folder: Path) -> None:
    """Rank 0, which exports for all, cannot; the others wait in no collective."""
    exporter, module = ExportPair(folder / "export", measure=False), PDTrimModule("any")
    module.student, _ = models()
    exporter._write = _refuse  # type: ignore[method-assign]
    trainer: Any = SimpleNamespace(strategy=strategy, interrupted=False, callbacks=[], fast_dev_run=0)
    exporter.on_train_end(trainer, module)


FAILING: dict[str, Callable[[DDPStrategy, Path], None]] = {
    "evaluation": evaluation, "teacher pass": teacher_pass, "journal": journal, "local fit": local_fit,
    "redundancy": redundancy, "loss guard": loss_guard, "export": export,
}  # fmt: skip


def waiting(strategy: DDPStrategy) -> float:
    """Seconds that this rank stayed, longer than a collective would have waited."""
    start = time.monotonic()
    on_first_rank(parallel_of(strategy), lambda: time.sleep(WORK), every=0.1)
    dist.barrier()
    return time.monotonic() - start
