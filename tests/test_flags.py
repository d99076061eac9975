"""What ranks answer alike at an optimizer step is asked once, in one all-reduce."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_loss_guard import fit
from torch import Tensor

from callbacks import LossGuard
from pdtrim_pl.strategies.flags import StepFlags


class Ranks:
    """A strategy of two ranks. The other one gives the answers it was made with."""

    root_device = torch.device("cpu")

    def __init__(self, others: list[int]) -> None:
        self.others, self.reduced = torch.tensor(others), 0

    def reduce(self, numbers: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "max"
        self.reduced += 1
        return torch.maximum(numbers, self.others.to(numbers.dtype))


def test_a_question_that_one_rank_answers_with_yes_is_answered_so_on_every_rank() -> None:
    ranks: Any = Ranks([0, 1, 0])
    flags = StepFlags()
    for name, mine in (("first", torch.tensor(True)), ("second", False), ("third", torch.tensor(False))):
        flags.ask(name, lambda mine=mine: mine)  # type: ignore[misc]
    assert flags.answers(ranks, 0) == {"first": True, "second": True, "third": False}
    assert flags.answers(ranks, 0) == {"first": True, "second": True, "third": False}
    assert ranks.reduced == 1, "once a step"
    flags.answers(ranks, 1)
    assert ranks.reduced == 2


def test_a_process_alone_whose_questions_are_on_the_host_reduces_nothing() -> None:
    ranks: Any = Ranks([0])
    flags = StepFlags()
    flags.ask("first", lambda: True)
    assert flags.answers(ranks, 0) == {"first": True}
    assert ranks.reduced == 0


@pytest.mark.parametrize("at", [2, 3])
def test_the_batch_that_is_saved_is_the_bad_one_of_its_step(at: int, tiny_llama_dir: Path, tmp_path: Path) -> None:
    (whole, left) = (tmp_path / name for name in ("whole", "left"))
    for folder, count in ((whole, 1), (left, 2)):
        folder.mkdir()
        step = at // count
        accumulated = {"accumulate_grad_batches": count}
        with pytest.raises(ValueError, match=f"not finite.*at step {step}"):
            fit(folder, tiny_llama_dir, LossGuard(), (at,), **accumulated)
    one, other = (torch.load(next((f / "bad_batches").glob("*")), weights_only=True) for f in (whole, left))
    assert all(torch.equal(part, other["batch"][name]) for name, part in one["batch"].items())
