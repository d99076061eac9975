"""An append-only file of evaluations, so that a killed search repeats none."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pdtrim_pl.evaluation.ranks import Ranks


@dataclass(frozen=True)
class Partial:
    """Sums over the response tokens of the first `batches` batches, nats. Each further batch can only add to them."""

    kl: float = 0.0
    nll: float = 0.0
    batches: int = 0


class Journal:
    """What is known of plans: one JSON line an evaluation, `search`, `plan`, `kl`, `nll`, `batches`.

    A line that a kill cut short is ignored, and so are lines of other searches.

    Args:
        path: the file; None keeps everything in memory.
        search: what the sums depend on besides the plan: weights and data. Equal searches share lines.
        ranks: the processes that share the journal: the first one reads and writes for all.
    """

    def __init__(self, path: Path | None = None, search: str = "", ranks: Ranks = Ranks()) -> None:
        self.path, self.search = path, search
        self.writes = path is not None and ranks.rank == 0
        self._known: dict[str, Partial] = {}
        if path is not None:
            found = self._read(path) if self.writes else {}
            # From one rank to all: the others may look only when it has already written more.
            self._known = dict(ranks.agree(found))

    def known(self, plan: str) -> Partial:
        """How far a plan was evaluated."""
        return self._known.get(plan, Partial())

    def add(self, plan: str, partial: Partial) -> None:
        """Keep an evaluation; on disk before this returns."""
        self._known[plan] = partial
        if self.writes:
            self._append(json.dumps({"search": self.search, "plan": plan, **asdict(partial)}))

    def _append(self, line: str) -> None:
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":  # a kill cut the last line short: do not append to it
                    line = "\n" + line
            file.write(line.encode() + b"\n")

    def _read(self, path: Path) -> dict[str, Partial]:
        known: dict[str, Partial] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if entry["search"] == self.search:
                known[entry["plan"]] = Partial(**{field.name: entry[field.name] for field in fields(Partial)})
        return known
