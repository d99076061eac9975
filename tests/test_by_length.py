"""Batches of like lengths: every example once, less padding, the same on every rank, and a run that resumes."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_data import Recorder, ids_of, make_module, pairs, recorded, write_rows
from torch.utils.data import Subset
from torch.utils.data.distributed import DistributedSampler

from pdtrim_pl.data import Example, TokenExamples
from pdtrim_pl.data.by_length import ByLengthSampler
from pdtrim_pl.data.examples import RepeatedPrompts, lengths_of


def part_of(lengths: list[tuple[int, int]]) -> Subset[Example]:
    """Examples of these lengths of prompt and response, in reverse."""
    whole = TokenExamples.from_pairs([([1] * prompt, [2] * response) for prompt, response in lengths])
    return Subset(whole, range(len(lengths) - 1, -1, -1))


def drawn(count: int) -> list[tuple[int, int]]:
    generator = np.random.default_rng(0)
    return [(int(p), int(r)) for p, r in generator.integers(1, 200, (count, 2))]


def batches_of(sampler: DistributedSampler[Example], size: int) -> list[list[int]]:
    indices = list(sampler)
    return [indices[start : start + size] for start in range(0, len(indices), size)]


@given(
    count=st.integers(1, 700), ranks=st.integers(1, 4), size=st.integers(1, 5), seed=st.integers(0, 5),
    epoch=st.integers(0, 2),
)  # fmt: skip
def test_every_example_comes_once_and_all_ranks_get_equally_many(
    count: int, ranks: int, size: int, seed: int, epoch: int
) -> None:
    part = part_of(drawn(count))
    shares, plain = [], []
    for rank in range(ranks):
        sampler = ByLengthSampler(part, size, ranks, rank, seed)
        sampler.set_epoch(epoch)
        shares.append(list(sampler))
        plain.append(len(list(DistributedSampler(part, ranks, rank))))
        assert len(sampler) == len(shares[-1])
    assert [len(share) for share in shares] == plain
    seen = Counter(itertools.chain(*shares))
    assert set(seen) == set(range(count))
    assert sum(seen.values()) - count == -count % ranks, "an example comes again only to give every rank as many"


def padded(part: Subset[Example], batches: list[list[int]]) -> float:
    """Share of the tokens of these batches that are padding."""
    lengths = lengths_of(part)
    filled = sum(lengths[batch].sum() for batch in batches)
    return float(1 - filled / sum(len(batch) * lengths[batch].max(axis=0).sum() for batch in batches))


def test_a_batch_has_prompts_and_responses_of_like_lengths_on_every_rank() -> None:
    part = part_of(drawn(2048))
    shuffled = padded(part, batches_of(DistributedSampler(part, 1, 0), 8))
    for ranks in (1, 4):
        sorted_ones = [batches_of(ByLengthSampler(part, 8, ranks, rank, 0), 8) for rank in range(ranks)]
        assert padded(part, list(itertools.chain(*sorted_ones))) < 0.35 * shuffled
        steps = [list(itertools.chain(*step)) for step in zip(*sorted_ones, strict=True)]
        assert padded(part, steps) < 0.4 * shuffled, "ranks take like lengths in a step"


def test_windows_of_one_length_are_grouped_by_where_they_are_split() -> None:
    part = part_of([(prompt, 256 - prompt) for prompt, _ in drawn(2048)])
    found = padded(part, batches_of(ByLengthSampler(part, 8, 1, 0, 0), 8))
    assert found < 0.1 * padded(part, batches_of(DistributedSampler(part, 1, 0), 8))


def test_a_few_long_rows_do_not_pad_the_others() -> None:
    """Lengths of real prompts and responses are heavy-tailed; shuffled, two tokens of three are padding."""
    lengths = np.random.default_rng(0).lognormal((4, 5), 1, (4096, 2)).astype(int) + 1
    part = part_of([(int(prompt), int(response)) for prompt, response in lengths])
    shuffled = padded(part, batches_of(DistributedSampler(part, 1, 0), 8))
    found = padded(part, batches_of(ByLengthSampler(part, 8, 1, 0, 0), 8))
    assert found < 0.25 * shuffled


def test_each_epoch_and_each_seed_has_an_order_of_its_own_and_lengths_do_not_rise() -> None:
    part = part_of(drawn(400))
    orders = []
    for seed, epoch in [(0, 0), (0, 0), (0, 1), (1, 0)]:
        sampler = ByLengthSampler(part, 4, 1, 0, seed)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[1]
    assert orders[0] != orders[2] != orders[3] != orders[0]
    prompts = [lengths_of(part)[batch, 0].mean() for batch in batches_of(ByLengthSampler(part, 4, 1, 0, 0), 4)]
    assert abs(np.corrcoef(prompts, range(len(prompts)))[0, 1]) < 0.3


def test_a_batch_that_is_not_full_comes_last() -> None:
    part = part_of(drawn(4 * 2 * 70 + 3))
    sizes = [[len(batch) for batch in batches_of(ByLengthSampler(part, 4, 2, rank, 0), 4)] for rank in range(2)]
    assert sizes == [[4] * 70 + [2]] * 2


def test_lengths_are_those_of_the_examples_without_reading_them() -> None:
    part = part_of(drawn(50))
    repeated = RepeatedPrompts(part, 0.3, 250, spread=True)
    for data in (part, repeated, Subset(repeated, [3, 0, 40])):
        assert lengths_of(data).tolist() == [[len(p), len(r)] for p, r in (data[i] for i in range(len(data)))]


@pytest.mark.parametrize(("checkpoint", "batches"), [("step=3", 3), ("step=8", 8), ("end-epoch=0", 6)])
def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(
    checkpoint: str, batches: int, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    path = write_rows(tmp_path, [{**row, "prompt": row["prompt"] * (1 + i % 5)} for i, row in enumerate(pairs(30))])

    def run(resume: str | None, **settings: Any) -> Recorder:
        return recorded(make_module(tiny_tokenizer_dir, path, **settings), tmp_path, 2, resume)

    whole = run(None, batches="by_length").seen
    assert run(checkpoint, batches="by_length").seen == whole[batches * 4 :]
    shuffled = run(None).seen
    assert shuffled != whole
    assert sorted(shuffled) == sorted(whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_continues_in_the_middle_of_an_epoch(workers: int, tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path, pairs(30))
    module = make_module(tiny_tokenizer_dir, path, num_workers=workers, batches="by_length")
    module.setup()
    whole = ids_of(list(module.train_dataloader()))
    stopped, resumed = module.train_dataloader(), module.train_dataloader()
    before = ids_of(list(itertools.islice(iter(stopped), 2)))
    torch.manual_seed(5)  # the order depends on no global generator
    resumed.load_state_dict(stopped.state_dict())
    assert before + ids_of(list(resumed)) == whole


def test_an_unknown_kind_of_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="`batches`='sorted' must be `shuffled` or `by_length`"):
        make_module(Path("unused"), "unused", batches="sorted")
