"""A pair in two engines of two tensor-parallel ranks each. Every rank of prefill sends its heads to one of decode."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from asking import generated_at_once
from servers import Served, served_by_engines

pytest.importorskip("vllm")

RANKS = 2


@pytest.fixture(scope="module", params=["prefill", "decode"])
def served_by_ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served_by_engines(tmp_path_factory.mktemp("ranks"), request.param, ["--random"], RANKS) as running:
        yield running


def test_ranks_generate_what_our_runtime_does_and_send_the_policys_bytes_together(served_by_ranks) -> None:
    before = served_by_ranks.metric("pdtrim:kv_bytes_total")
    assert generated_at_once(served_by_ranks) == [each["tokens"] for each in served_by_ranks.expected]
    sent = served_by_ranks.metric("pdtrim:kv_bytes_total") - before
    assert sent == sum(each["kv_bytes"] for each in served_by_ranks.expected)
