"""Two vLLM engines of one pair, the router in front of them, and what our own runtime generates from that pair."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from servers import Served, served_by_engines


@pytest.fixture(scope="module", params=["prefill", "decode"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served_by_engines(tmp_path_factory.mktemp("pair"), request.param) as running:
        yield running
