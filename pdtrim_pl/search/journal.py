"""An append-only file of evaluated states, so that a killed search repeats no evaluation."""

from __future__ import annotations

import json
from pathlib import Path

State = tuple[int, ...]
"""Blocks that one round takes out of its target, rising."""


class Journal:
    """What is known of states, one JSON line each: `search`, `removed`, and `energy` or `at_least`.

    A line that a kill cut short is ignored, and so are lines of other searches.

    Args:
        path: the file; None keeps everything in memory.
        search: what the energies depend on besides the state: weights, data, stage, round. Equal searches share lines.
        writes: whether this process appends; of several ranks only one should.
    """

    def __init__(self, path: Path | None, search: str, *, writes: bool = True) -> None:
        self.path, self.search, self.writes = path, search, writes
        self.energies: dict[State, float] = {}
        self.bounds: dict[State, float] = {}
        if path is not None and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                self._read(line)

    def energy(self, removed: State) -> float | None:
        """The energy of a state that was evaluated to its end."""
        return self.energies.get(removed)

    def at_least(self, removed: State) -> float:
        """A lower bound of a state's energy, from an evaluation that was given up; -inf where there was none."""
        return self.bounds.get(removed, float("-inf"))

    def add(self, removed: State, energy: float | None, limit: float) -> None:
        """Keep one evaluation; on disk before this returns.

        Args:
            removed: the state.
            energy: its energy, or None where the evaluation was given up.
            limit: the limit that it was then certain to reach.
        """
        if energy is None:
            self.bounds[removed] = max(limit, self.at_least(removed))
            fact = {"at_least": limit}
        else:
            self.energies[removed] = energy
            fact = {"energy": energy}
        if self.path is not None and self.writes:
            self._append(json.dumps({"search": self.search, "removed": removed, **fact}))

    def _append(self, line: str) -> None:
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":  # a kill cut the last line short: do not append to it
                    line = "\n" + line
            file.write(line.encode() + b"\n")

    def _read(self, line: str) -> None:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            return
        if entry["search"] != self.search:
            return
        state = tuple(entry["removed"])
        if "energy" in entry:
            self.energies[state] = entry["energy"]
        else:
            self.bounds[state] = max(entry["at_least"], self.at_least(state))
