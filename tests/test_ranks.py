"""Two processes choose and fit what one does, each with a share of the work; where one fails, both leave."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from process_group import run_workers
from ranks_worker import BLOCKS, DATA, FAILING, GAVE_UP, PROCESSES, WORK, both, scores

from pdtrim_pl.errors import AnotherRankFailed
from pdtrim_pl.merging import share_of
from pdtrim_pl.parallel import Parallel, on_first_rank

TIMEOUT = 240


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("ranks")
    run_workers(both, folder, folder=folder, timeout=TIMEOUT, processes=PROCESSES)
    return [json.loads((folder / f"told-{rank}.json").read_text(encoding="utf-8")) for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The same in one process."""
    return json.loads(json.dumps(scores(Parallel())))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["shared", "in step"])
def test_two_ranks_choose_and_fit_what_one_does(way: str, told: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for rank in told:
        for what in ("redundancy", "taylor", "moves", "offers"):
            assert rank[way][what] == alone[what], what
    assert len(alone["offers"]) == 2 * (BLOCKS - 1), "every pair, in both stages"


@pytest.mark.slow
def test_each_rank_does_its_share(told: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    starts, passes = 2 * (BLOCKS - 1), 2 * len(DATA)
    assert (alone["fitted"], alone["passes"]) == (starts, [passes, passes])
    assert [rank["shared"]["fitted"] for rank in told] == [6, 6], "of five pairs three each, one of them twice"
    assert [rank["shared"]["passes"] for rank in told] == [[6, 6], [4, 4]]
    assert [rank["in step"]["fitted"] for rank in told] == [starts] * 2
    assert [rank["in step"]["passes"] for rank in told] == [[6, 6]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("way", ["shared", "in step"])
def test_no_weights_are_pickled(way: str, told: list[dict[str, Any]]) -> None:
    for rank in told:
        assert rank[way]["largest object"] < 6000 < rank[way]["one block"]


ENDS = {
    "evaluation": (1, r"OSError: no room here"),
    "teacher pass": (1, r"OSError: no room here"),
    "journal": (0, r"(NotADirectory|FileExists)Error: .*file"),
    "local fit": (1, r"OSError: no room here"),
    "redundancy": (1, r"OSError: no room here"),
    "export": (0, r"OSError: no room here"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ENDS)
def test_where_one_rank_fails_both_leave_with_its_reason(case: str, told: list[dict[str, Any]]) -> None:
    failing, reason = ENDS[case]
    assert re.match(reason, told[failing][case])
    other = told[1 - failing][case]
    assert re.match(rf"AnotherRankFailed: Rank {failing} failed, so every rank leaves. There: {reason}", other)


@pytest.mark.slow
def test_a_rank_that_cannot_save_its_bad_batch_stops_with_the_others(told: list[dict[str, Any]]) -> None:
    said = r"UserError: The training loss of a rank is not finite \(here {}\) at step 7, epoch 1. .* the batch {}"
    assert re.match(said.format("1.0", "is in "), told[0]["loss guard"])
    assert re.match(said.format("nan", r"could not be saved \(\[Errno"), told[1]["loss guard"])
    assert set(ENDS) | {"loss guard"} == set(FAILING)


@pytest.mark.slow
def test_ranks_wait_for_the_first_one_longer_than_a_collective_would(told: list[dict[str, Any]]) -> None:
    assert GAVE_UP.total_seconds() < WORK
    for rank in told:
        assert rank["waited"] >= WORK
    assert told[0]["first fails"] == "OSError: no room here"
    assert told[1]["first fails"] == (
        "AnotherRankFailed: Rank 0 failed, so every rank leaves. There: OSError: no room here"
    )


def test_one_process_alone_works_and_raises_its_own_error() -> None:
    done: list[int] = []
    on_first_rank(Parallel(), lambda: done.append(1))
    assert done == [1]
    with pytest.raises(ZeroDivisionError):
        Parallel().together(lambda: 1 // 0)


def test_an_error_that_every_rank_knows_is_told_no_second_time() -> None:
    asked: list[Any] = []

    def gather(value: Any) -> list[Any]:
        asked.append(value)
        return [value, (None, "ValueError: there")]

    ranks = Parallel()
    ranks.size, ranks.gather = 2, gather  # type: ignore[method-assign]
    with pytest.raises(AnotherRankFailed, match=r"Rank 1 failed.*ValueError: there"):
        ranks.together(lambda: ranks.together(lambda: None))
    assert len(asked) == 1


@pytest.mark.parametrize(("size", "shares"), [(1, [[0, 1, 2]]), (2, [[0, 2], [1, 2]]), (5, [[0], [1], [2], [2], [2]])])
def test_every_rank_fits_equally_many_runs(size: int, shares: list[list[int]]) -> None:
    ranks = [Parallel() for _ in range(size)]
    for number, rank in enumerate(ranks):
        rank.rank, rank.size = number, size
    assert [share_of(rank, [0, 1, 2]) for rank in ranks] == shares
    ranks[-1].whole = False
    assert share_of(ranks[-1], [0, 1, 2]) == [0, 1, 2]
