"""Two processes train what one trains with the teacher on disk, under every strategy, and with adapters under DDP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from distributed_run import data_of
from placed_run import KEPT, fit, module_of, runs
from process_group import run_ranks
from test_strategies import STRATEGIES
from tiny_models import TIED, saved_tiny_model

from pdtrim_pl.checkpoints.run_record import RunRecord
from pdtrim_pl.plan import ModelRef, StagePlan
from pdtrim_pl.teacher import CacheIndex, Making, identity_of, training_keys, write_cache


@pytest.fixture(scope="module")
def model(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks, a plan that drops some, and a cache of the training text."""
    folder = saved_tiny_model(tmp_path_factory.mktemp("model"), tiny_tokenizer_dir, **TIED)
    plan = StagePlan.full(ModelRef(str(folder), "llama", 4))
    plan.drop("decode", 2).drop("prefill", 2).drop("decode", 1).save(folder / "plan.json")
    pair, data = module_of(folder).pair, data_of(folder, 1)
    data.prepare_data()
    data.setup("fit")
    keys = training_keys(data)
    index = CacheIndex(identity_of(pair, data, 1.0, keys), Making(kept=KEPT), str(folder), len(keys))
    write_cache(folder / "cache", index, pair.teacher("prefill", 259), data.part("train"))
    return folder


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunRecord]:
    """The runs in one process."""
    folder = tmp_path_factory.mktemp("alone")
    return {part: fit("auto", 1, model, module, folder).record for part, module in runs("auto", model).items()}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_what_one_trains(
    strategy: str, model: Path, alone: dict[str, RunRecord], tmp_path: Path
) -> None:
    run_ranks("placed_run.py", strategy, "2", str(model), str(tmp_path), folder=tmp_path, timeout=300)
    for part in runs(strategy, model):
        found = RunRecord.from_json(json.loads((tmp_path / f"{part}.json").read_text(encoding="utf-8")))
        expected = alone[part]
        assert dict(found.losses) == pytest.approx(dict(expected.losses), rel=1e-3), part
        assert found.losses[-1][1] < found.losses[0][1]
        ours, theirs = found.validations[-1][1], expected.validations[-1][1]
        assert ours == pytest.approx(theirs, rel=1e-2), part
