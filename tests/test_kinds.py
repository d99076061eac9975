"""Every strategy with every kind of weights that may train: it works, or it is refused with the way out."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from distributed_run import strategy_of
from kinds_run import KINDS, fit
from process_group import run_ranks
from tiny_models import TIED, saved_tiny_model, tiny_model

from pdtrim_pl.cli.dry_run import run as dry_run
from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import ModelRef, StagePlan
from pdtrim_pl.strategies import check_trainable

DDP = "ddp_find_unused_parameters_true"
SHARDED = "`trainable` freezes weights, and this `trainer.strategy` shards.* Use `trainable: all`, or `strategy: ddp_"
GROWING = "`trainable: merged` lets weights train that were frozen.* Use `trainable: all`, or one device"
TABLE: dict[str, dict[str, str]] = {
    "auto": {},
    "ddp": {"merged": GROWING},
    DDP: {"merged": GROWING},
    "zero1": dict.fromkeys(KINDS.keys() - {"all"}, SHARDED),
    "zero2": dict.fromkeys(KINDS.keys() - {"all"}, SHARDED),
    "zero3": dict.fromkeys(KINDS.keys() - {"all"}, SHARDED),
    "fsdp": dict.fromkeys(KINDS.keys() - {"all"}, SHARDED),
}
"""Strategy -> kinds that it refuses, and how. All others work."""


@pytest.fixture(scope="module")
def model(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks, tied embeddings, and a plan in which block 1 stands for two."""
    folder = saved_tiny_model(tmp_path_factory.mktemp("model"), tiny_tokenizer_dir, **TIED)
    plan = StagePlan.full(ModelRef(str(folder), "llama", 4))
    plan.merge("both", (1, 2), 1, untied=False).save(folder / "plan.json")
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TABLE)
def test_a_combination_is_accepted_or_refused_with_the_way_out(name: str, kind: str) -> None:
    message = TABLE[name].get(kind)
    if message is None:
        check_trainable(strategy_of(name), KINDS[kind])
        return
    with pytest.raises(UserError, match=message):
        check_trainable(strategy_of(name), KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        (DDP, DDP),
        ("zero2", {"class_path": "pdtrim_pl.strategies.PDTrimDeepSpeedStrategy", "init_args": {"stage": 2}}),
        ("fsdp", {"class_path": "pdtrim_pl.strategies.PDTrimFSDPStrategy"}),
    ],
    ids=["ddp", "zero2", "fsdp"],
)
def test_the_dry_run_says_the_same(name: str, strategy: object, kind: str, model: Path, tmp_path: Path) -> None:
    trainable = {"lora": {"rank": 4}, "lora, one a stage": {"rank": 4, "tied": False}}.get(kind, kind)
    settings = {
        "model": {"model": str(model), "trainable": trainable}, "data": {"tokenizer": "${model.model}"},
        "trainer": {"strategy": strategy, "devices": 2, "accelerator": "gpu", "precision": "bf16-mixed"},
    }  # fmt: skip
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    arguments, message, out = ["fit", "--config", str(config)], TABLE[name].get(kind), io.StringIO()
    if message is None:
        assert dry_run(arguments, out) == 0
        assert ("weights train" in out.getvalue()) == (kind != "all")
        return
    with pytest.raises(UserError, match=message):
        dry_run(arguments, out)


@pytest.mark.parametrize("kind", KINDS)
def test_one_device_trains_what_is_named_and_nothing_else(kind: str, model: Path, tmp_path: Path) -> None:
    module = fit("auto", 1, model, tmp_path, kind)
    before = tiny_model("llama", vocab_size=259, tie_word_embeddings=True, initializer_range=0.1).state_dict()
    moved = {
        name: not torch.equal(weight, before[name.removeprefix("model.").replace(".block.", ".")])
        for name, weight in module.student.named_parameters()
        if ".adapters." not in name
    }
    gone = re.compile(r"layers\.2\.")
    named = {"all": r".", "merged": r"layers\.1\.", "norms": r"norm"}.get(kind, r"^$")
    assert moved == {name: bool(re.search(named, name)) and not gone.search(name) for name in moved}
    adapters = [weight for name, weight in module.student.named_parameters() if ".lora_B." in name]
    assert bool(adapters) == ("lora" in kind)
    assert any(weight.any() for weight in adapters) == bool(adapters)


@pytest.mark.slow
def test_two_processes_under_ddp_train_what_one_trains(model: Path, tmp_path: Path) -> None:
    kinds = [kind for kind in KINDS if kind not in TABLE[DDP]]
    run_ranks("kinds_run.py", DDP, "2", str(model), str(tmp_path), *kinds, folder=tmp_path, timeout=300)
    for kind in kinds:
        alone = fit("auto", 1, model, tmp_path, kind)
        told = json.loads((tmp_path / f"{kind}.json").read_text(encoding="utf-8"))
        assert [loss for _, loss in told] == pytest.approx([loss for _, loss in alone.record.losses], abs=1e-5), kind
