"""An append-only file of evaluations: a search that was killed does not repeat them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from math import inf, isfinite
from pathlib import Path
from typing import NamedTuple

from pdtrim_pl.parallel import Parallel


class Sums(NamedTuple):
    """Sums over the response tokens of one batch, for one plan, in nats."""

    kl: float
    nll: float


class Journal:
    """Evaluations of plans. The file has one JSON line per plan and batch: `search`, `plan`, `batch`, `kl`, `nll`.

    Incomplete lines and lines of other searches are ignored. A sum that is not finite is written as null.

    Args:
        path: the file; None keeps everything in memory.
        search: fingerprint of weights and data. Searches with the same fingerprint share their lines.
        ranks: the processes that share the journal. Rank 0 reads and writes the file for all.
    """

    def __init__(self, path: Path | None = None, search: str = "", ranks: Parallel = Parallel()) -> None:
        self.path, self.search = path, search
        self.ranks, self.writes = ranks, path is not None and ranks.rank == 0
        self._known: dict[str, dict[int, Sums]] = defaultdict(dict)
        if path is not None:
            # Rank 0 reads for all: when another rank read the file, rank 0 might have added lines already.
            found, *_ = ranks.together(lambda: self._read(path) if self.writes else [])
            for plan, batch, kl, nll in found:
                self._known[plan][batch] = Sums(kl, nll)

    def known(self, plan: str) -> Mapping[int, Sums]:
        """Batch number -> sums, for the batches on which a plan was evaluated."""
        return self._known[plan]

    def add(self, plan: str, evaluations: Mapping[int, Sums]) -> None:
        """Store the sums of a plan on some batches. They are on disk when this returns. Every rank must call it.

        Raises:
            OSError: rank 0 cannot write. This is raised on rank 0; the other ranks raise `AnotherRankFailed`.
        """
        self._known[plan].update(evaluations)
        if self.path is not None:
            self.ranks.together(lambda: self._append(plan, evaluations) if self.writes else None)

    def _append(self, plan: str, evaluations: Mapping[int, Sums]) -> None:
        assert self.path is not None
        lines = []
        for batch, sums in evaluations.items():
            values = {name: value if isfinite(value) else None for name, value in sums._asdict().items()}
            lines.append(json.dumps({"search": self.search, "plan": plan, "batch": batch, **values}) + "\n")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":  # the last line is incomplete: start a new one
                    lines.insert(0, "\n")
            file.write("".join(lines).encode())

    def _read(self, path: Path) -> list[tuple[str, int, float, float]]:
        found = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if entry["search"] == self.search:
                kl, nll = (inf if entry[name] is None else entry[name] for name in ("kl", "nll"))
                found.append((entry["plan"], entry["batch"], kl, nll))
        return found
