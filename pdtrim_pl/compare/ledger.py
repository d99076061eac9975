"""Finished rows on disk: a second run does not compute them again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from pdtrim_pl.compare.meter import Spent
from pdtrim_pl.compare.outcome import Outcome
from pdtrim_pl.plan import PLAN_FILE, POLICY_FILE
from pdtrim_pl.plan.json_files import read_json, write_whole

log = logging.getLogger(__name__)


def key_of(facts: Mapping[str, Any]) -> str:
    """A short hash of everything that a row depends on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


class Ledger:
    """Stores every finished row in a JSON file, and beside it the weights that other rows start from.

    Args:
        folder: folder of the results. Rows go to `rows/`, plans and policies to `plans/`.
    """

    def __init__(self, folder: Path) -> None:
        self.rows, self.plans = folder / "rows", folder / "plans"
        self.rows.mkdir(parents=True, exist_ok=True)

    def get(self, method: str, count: int, key: str, *, with_weights: bool) -> Outcome | None:
        """A finished row; None if there is none, or if it was made under other settings.

        Args:
            method: name of the method.
            count: number of removed blocks.
            key: hash of the settings, see `key_of`.
            with_weights: whether the weights of the row are needed. A trained row without weights then counts as
                missing.
        """
        file = self._file(method, count)
        if not file.is_file():
            return None
        data = read_json(file, "finished row")
        if data["key"] != key:
            log.info("%s at %d: the settings differ from those of %s; computed again.", method, count, file)
            return None
        if with_weights and data["trained"] and not self._weights_file(method, count).is_file():
            log.info("%s at %d: its weights were not kept and are needed now; computed again.", method, count)
            return None
        return Outcome.from_json(data["outcome"])

    def put(self, outcome: Outcome, key: str, weights: Mapping[str, Tensor], *, with_weights: bool) -> None:
        """Store a finished row. The JSON file is written last, so that it implies the others."""
        method, count = outcome.method, outcome.count
        folder = self.plans / f"{method}_{count}"
        folder.mkdir(parents=True, exist_ok=True)
        outcome.plan.save(folder / PLAN_FILE)
        outcome.policy.save(folder / POLICY_FILE, outcome.plan)
        file = self._weights_file(method, count)
        if weights and with_weights:
            unfinished = file.with_name(f"{file.name}.unfinished")
            save_file({name: weight.contiguous() for name, weight in weights.items()}, unfinished)
            unfinished.replace(file)
        else:
            file.unlink(missing_ok=True)
        data = {"key": key, "trained": bool(weights), "outcome": outcome.to_json()}
        write_whole(self._file(method, count), json.dumps(data, indent=2) + "\n")
        self._spent_file(method, count).unlink(missing_ok=True)
        self.journal(method, count).unlink(missing_ok=True)

    def dense_accuracy(self, key: str) -> dict[str, float] | None:
        """Accuracy of the unpruned model, if it was measured under these settings; else None."""
        file = self.rows / "dense.json"
        data: Any = read_json(file, "accuracy of the dense model") if file.is_file() else {"key": None}
        return data["accuracy"] if data["key"] == key else None

    def put_dense_accuracy(self, accuracy: Mapping[str, float], key: str) -> None:
        """Store the accuracy of the unpruned model."""
        write_whole(self.rows / "dense.json", json.dumps({"key": key, "accuracy": dict(accuracy)}, indent=2) + "\n")

    def weights(self, method: str, count: int) -> dict[str, Tensor]:
        """The stored weights of a finished row; empty if it has none."""
        file = self._weights_file(method, count)
        return load_file(file) if file.is_file() else {}

    def journal(self, method: str, count: int) -> Path:
        """File of the evaluations of a row's search. Rows do not share a file: each must show its full cost."""
        return self.rows / f"{method}_{count}.journal.jsonl"

    def spent_before(self, method: str, count: int, key: str) -> Spent:
        """The cost of a row in runs that were killed. The journal is deleted if they ran under other settings."""
        file = self._spent_file(method, count)
        if not file.is_file():
            self.journal(method, count).unlink(missing_ok=True)
            return Spent()
        data = read_json(file, "cost of a killed search")
        if data["key"] != key:  # evaluations from the journal would not count as cost of this row
            self.journal(method, count).unlink(missing_ok=True)
            return Spent()
        return Spent(**data["spent"])

    def note_spent(self, method: str, count: int, key: str, spent: Spent) -> None:
        """Store the cost of a row so far."""
        write_whole(self._spent_file(method, count), json.dumps({"key": key, "spent": vars(spent)}))

    def _file(self, method: str, count: int) -> Path:
        return self.rows / f"{method}_{count}.json"

    def _weights_file(self, method: str, count: int) -> Path:
        return self.rows / f"{method}_{count}.safetensors"

    def _spent_file(self, method: str, count: int) -> Path:
        return self.rows / f"{method}_{count}.spent.json"
