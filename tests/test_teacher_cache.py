"""The teacher on disk: training with it is training with the teacher, and a cache of anything else is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer, seed_everything
from safetensors.torch import load_file, save_file
from short_text import SHORT
from transformers import AutoModelForCausalLM

from callbacks import BlockDrop, ExportPair, KVRetention
from pdtrim_pl.cli import main as cli
from pdtrim_pl.criteria import CosineRedundancy
from pdtrim_pl.data import Collator, Lengths, Parts, PromptResponseDataModule
from pdtrim_pl.evaluation.quality import measure_quality
from pdtrim_pl.losses import KL, HiddenMatch, LossTerm, ReverseKL
from pdtrim_pl.losses.rows import Rows
from pdtrim_pl.models.fingerprint import model_fingerprint
from pdtrim_pl.models.loading import Loading
from pdtrim_pl.models.placement import TeacherPlace
from pdtrim_pl.models.pretrained import load_causal_lm
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.plan import Structure
from pdtrim_pl.selectors import NoSelector
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.teacher import (
    CacheIndex,
    Making,
    StoredTeacher,
    Writing,
    example_key,
    identity_of,
    training_keys,
    write_cache,
)
from pdtrim_pl.teacher.index import INDEX_FILE, shard_name

VOCABULARY = 259
WHOLE = Making(kept=VOCABULARY, shard_examples=4)
LENGTHS = Lengths(24, 8, 16)
PARTS = Parts(validation=4, calibration=4, max_train=10, repeated_training_prompts=0.3)


@pytest.fixture(scope="module")
def lively(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with weights so large that its distributions are far from flat."""
    folder = tmp_path_factory.mktemp("lively") / "model"
    shutil.copytree(tiny_llama_dir, folder)
    weights = {
        name: x * 8 if x.dim() == 2 else x for name, x in load_file(tiny_llama_dir / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def plan(lively: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan without block 2 in prefill, and without 1 and 2 in decode."""
    path = tmp_path_factory.mktemp("plan") / "stage_plan.json"
    full = StagedCausalLM(load_causal_lm(str(lively))).plan
    full.drop("decode", 2).drop("prefill", 2).drop("decode", 1).save(path)
    return path


def data_of(model: Path, **changed: Any) -> PromptResponseDataModule:
    settings: dict[str, Any] = {"source": SHORT, "lengths": LENGTHS, "parts": PARTS, "batch_size": 4}
    return PromptResponseDataModule(str(model), **{**settings, **changed})


def module_of(
    model: Path, plan: Path, losses: list[LossTerm] | None = None, cache: Path | None = None, **loading: Any
) -> PDTrimModule:
    return PDTrimModule(
        str(model), losses=losses, structure=Structure(plan=plan), loading=Loading(**loading), chunk_tokens=7,
        teacher=TeacherPlace() if cache is None else TeacherPlace("offline", cache),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
    )  # fmt: skip


def written(
    folder: Path, model: Path, making: Making = WHOLE, batch_size: int = 3,
    progress: Callable[[int, int], None] = lambda done, of: None, temperature: float = 1.0, **changed: Any
) -> Path:  # fmt: skip
    """Write the cache of `module_of` and `data_of`."""
    module, data = PDTrimModule(str(model)), data_of(model, **changed)
    data.prepare_data()
    data.setup("fit")
    keys = training_keys(data)
    index = CacheIndex(identity_of(module.pair, data, temperature, keys), making, str(model), len(keys))
    teacher = module.pair.teacher("prefill", VOCABULARY)
    write_cache(folder, index, teacher, data.part("train"), Writing(batch_size, 5), progress)
    return folder


def trained(module: PDTrimModule, data: PromptResponseDataModule, folder: Path, *callbacks: Callback) -> Trainer:
    seed_everything(0, verbose=False)
    trainer = Trainer(
        default_root_dir=folder, max_epochs=2, accelerator="cpu", devices=1, logger=False, callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return trainer


def test_training_offline_with_whole_rows_is_training_with_the_teacher(
    lively: Path, plan: Path, tmp_path: Path
) -> None:
    cache = written(tmp_path / "cache", lively)
    runs = [module_of(lively, plan), module_of(lively, plan, cache=cache)]
    for module in runs:
        trained(module, data_of(lively), tmp_path)
    online, offline = runs
    assert "teacher" not in offline._modules
    losses = [dict(module.record.losses) for module in runs]
    assert losses[0].keys() == losses[1].keys()
    for step, loss in losses[0].items():
        assert losses[1][step] == pytest.approx(loss, rel=1e-4)
    assert losses[0][1] > 1e-2, "there is something to learn"
    for (name, ours), theirs in zip(online.student.named_parameters(), offline.student.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-2, msg=name)
    (_, before), (_, after) = online.record.validations[-1], offline.record.validations[-1]
    assert after.keys() == {"ppl"}, "nothing is compared with a teacher"
    assert after["ppl"] == pytest.approx(before["ppl"], rel=1e-3)


def test_training_on_a_sample_brings_the_student_closer_to_the_teacher(
    lively: Path, plan: Path, tmp_path: Path
) -> None:
    cache = written(tmp_path / "cache", lively, Making("sampled", 32, exponent=0.9, shard_examples=4))
    offline = module_of(lively, plan, cache=cache)
    trained(offline, data_of(lively), tmp_path)
    untrained, batches = module_of(lively, plan), [Collator(0)(list(_train(lively)))]
    untrained.configure_model()
    before, after = (
        measure_quality(module.student.eval(), untrained.teacher, batches).kl for module in (untrained, offline)
    )
    assert after < 0.7 * before


def _train(model: Path) -> Any:
    data = data_of(model)
    data.prepare_data()
    data.setup("fit")
    return data.part("train")


def test_rows_of_a_batch_are_those_of_its_examples_in_any_order(lively: Path, tmp_path: Path) -> None:
    stored = StoredTeacher(written(tmp_path / "cache", lively, Making(kept=5, shard_examples=3)))
    part = _train(lively)
    batch = Collator(0)([part[index] for index in (7, 0, 5)])
    teacher = PDTrimModule(str(lively)).pair.teacher("prefill", VOCABULARY)
    with torch.no_grad():
        hidden = teacher(*batch.request, keep_cache=False).hidden[batch.response_mask]
        expected = Rows.top_k(teacher.logits(hidden), 5)
    found = Rows.unpacked(stored.rows(batch))
    assert torch.equal(found.ids, expected.ids.long())
    torch.testing.assert_close(found.values, expected.values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.extra, expected.extra, atol=1e-5, rtol=1e-5)
    assert len(found.extra) == int(batch.response_mask.sum()), "only response tokens are stored"


@pytest.mark.parametrize("making", [Making(kept=6, shard_examples=3), Making("sampled", 6, seed=3, shard_examples=3)])
def test_a_cache_that_was_stopped_goes_on_and_ends_as_one_that_was_not(
    making: Making, lively: Path, tmp_path: Path
) -> None:
    whole = written(tmp_path / "whole", lively, making)

    def stop(done: int, of: int) -> None:
        assert of == 4
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "parts", lively, making, progress=stop)
    with pytest.raises(ValueError, match=r"has 2 of 4 shards. Run `pdtrim cache-teacher` again"):
        StoredTeacher(tmp_path / "parts")
    first = (tmp_path / "parts" / shard_name(0)).stat().st_mtime_ns
    written(tmp_path / "parts", lively, making)
    assert (tmp_path / "parts" / shard_name(0)).stat().st_mtime_ns == first, "what is written is not written again"
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "parts").iterdir())
    for name in names:
        assert (whole / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_draws_do_not_depend_on_the_batch_or_the_shard(lively: Path, tmp_path: Path) -> None:
    found = [
        StoredTeacher(written(tmp_path / str(size), lively, Making("sampled", 6, shard_examples=shard), size))
        for size, shard in ((1, 3), (5, 4))
    ]
    part = _train(lively)
    one, other = (Rows.unpacked(stored.rows(Collator(0)(list(part)))) for stored in found)
    assert torch.equal(one.ids, other.ids)
    torch.testing.assert_close(one.values, other.values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lengths": Lengths(20, 8, 16)}, r"`data.lengths.max_length`: 24 in the cache, 20 here; the training text"),
        ({"lengths": Lengths(24, 9, 16)}, r"`data.lengths.min_prompt`: 8 in the cache, 9 here"),
        ({"seed": 1}, r"differ in the training text \(`data.source`, `data.parts`, `data.seed`\): \d+ of 10 examples"),
        ({"parts": replace(PARTS, repeated_training_prompts=0.0)}, r"training text .*: 3 of 10 examples are not"),
    ],
)
def test_a_cache_of_other_data_is_refused_by_what_differs(
    changed: dict[str, Any], message: str, lively: Path, plan: Path, tmp_path: Path
) -> None:
    cache = written(tmp_path / "cache", lively, Making(kept=3))
    with pytest.raises(ValueError, match=rf"(?s){message}.*`pdtrim cache-teacher`"):
        trained(module_of(lively, plan, cache=cache), data_of(lively, **changed), tmp_path)


def test_a_part_of_the_text_is_enough(lively: Path, plan: Path, tmp_path: Path) -> None:
    parts = replace(PARTS, repeated_training_prompts=0.0)
    cache = written(tmp_path / "cache", lively, Making(kept=3), parts=parts)
    offline = module_of(lively, plan, cache=cache)
    trained(offline, data_of(lively, parts=replace(parts, max_train=4)), tmp_path)
    assert len(offline.record.losses) == 2


def test_a_cache_of_another_model_type_or_temperature_is_refused_by_what_differs(
    lively: Path, plan: Path, tmp_path: Path
) -> None:
    cache = written(tmp_path / "cache", lively, Making(kept=3))
    other = tmp_path / "model"
    shutil.copytree(lively, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][-1] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"differ in the weights of the teacher .*: \w{12} in the cache, \w{12} here\."
    ):
        trained(module_of(other, plan, cache=cache), data_of(other), tmp_path)
    with pytest.raises(ValueError, match=r"`model.loading.teacher_dtype`\): float32 in the cache, bfloat16 here"):
        trained(module_of(lively, plan, cache=cache, teacher_dtype="bfloat16"), data_of(lively), tmp_path)
    with pytest.raises(ValueError, match=r"the `temperature` of the losses: 1.0 in the cache, 2.0 here"):
        trained(module_of(lively, plan, [KL(temperature=2.0)], cache), data_of(lively), tmp_path)


def test_the_name_of_a_model_does_not_count_and_each_weight_does(lively: Path, tmp_path: Path) -> None:
    shutil.copytree(lively, tmp_path / "copy")
    assert model_fingerprint(str(tmp_path / "copy")) == model_fingerprint(str(lively))
    AutoModelForCausalLM.from_pretrained(lively, dtype=torch.bfloat16).save_pretrained(tmp_path / "copy")
    assert model_fingerprint(str(tmp_path / "copy")) != model_fingerprint(str(lively))


@pytest.mark.parametrize(
    ("losses", "kind", "message"),
    [
        ([KL(), HiddenMatch()], "top_k", r"hidden reads the teacher's hidden states.*`teacher.placement: copy`"),
        ([ReverseKL()], "sampled", r"reverse_kl is no mean over the teacher's tokens"),
    ],
)
def test_losses_that_need_more_of_the_teacher_are_refused_before_the_first_step(
    losses: list[LossTerm], kind: Any, message: str, lively: Path, plan: Path, tmp_path: Path
) -> None:
    cache = written(tmp_path / "cache", lively, Making(kind, 3))
    with pytest.raises(ValueError, match=message):
        trained(module_of(lively, plan, losses, cache), data_of(lively), tmp_path)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (
            lambda: BlockDrop("decode", CosineRedundancy(), {0: 1}),
            r"run it: BlockDrop \(choose the blocks.*structure.plan.*placement: copy`",
        ),
        (lambda: KVRetention(NoSelector()), r"KVRetention \(choose it afterwards with `pdtrim policy`\)"),
        (lambda: ExportPair(Path("nowhere")), r"ExportPair \(set `measure: false` and measure with `pdtrim eval`\)"),
    ],
)
def test_callbacks_that_run_the_teacher_are_refused_with_the_way_out(
    callback: Callable[[], Callback], message: str, lively: Path, plan: Path, tmp_path: Path
) -> None:
    module = module_of(lively, plan, cache=tmp_path)
    with pytest.raises(ValueError, match=message):
        trained(module, data_of(lively), tmp_path, callback())


def test_a_damaged_cache_and_one_of_another_version_are_refused(lively: Path, tmp_path: Path) -> None:
    cache = written(tmp_path / "cache", lively, Making(kept=3, shard_examples=5))
    index = json.loads((cache / INDEX_FILE).read_text())
    with (cache / shard_name(1)).open("ab") as shard:
        shard.write(b"x")
    with pytest.raises(ValueError, match=r"damaged: shard-00001.safetensors has \d+ bytes, and its index says"):
        StoredTeacher(cache)
    (cache / INDEX_FILE).write_text(json.dumps({**index, "format": "pdtrim.teacher_cache/0"}))
    with pytest.raises(ValueError, match=r"`format` 'pdtrim.teacher_cache/0'.*reads 'pdtrim.teacher_cache/1'"):
        StoredTeacher(cache)
    with pytest.raises(ValueError, match=r"There is no index of a teacher's cache .*`pdtrim cache-teacher`"):
        StoredTeacher(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [(("offline",), r"needs `teacher.cache`"), (("copy", Path("x")), r"`teacher.placement: copy` reads none")],
)
def test_a_place_without_its_cache_or_a_cache_without_its_place_is_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherPlace(*settings)


def test_the_command_writes_what_fit_then_reads(
    lively: Path, plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    settings: dict[str, Any] = {
        "model": {
            "model": str(lively), "structure": {"plan": str(plan)},
            "losses": [{"class_path": "pdtrim_pl.losses.KL"}],
            "teacher": {"placement": "offline", "cache": str(cache)},
        },
        "data": {
            "tokenizer": "${model.model}", "source": {"path": SHORT.path}, "batch_size": 4,
            "lengths": {"max_length": 24, "min_prompt": 8, "max_prompt": 16}, "parts": vars(PARTS),
        },
        "trainer": {
            "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "default_root_dir": str(tmp_path),
            "callbacks": [{
                "class_path": "callbacks.ExportPair", "init_args": {"output": str(tmp_path / "pair"), "measure": False}
            }],
        },
    }  # fmt: skip
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    command = ["cache-teacher", "--config", str(config), "--output", str(cache), "--kept", "16"]
    assert cli.main([*command, "--shard_examples", "4"]) == 0
    assert capsys.readouterr().out == f"{cache}\n"
    assert StoredTeacher(cache).index.making == Making(kept=16, shard_examples=4)
    assert cli.main([*command, "--shard_examples", "5"]) == 1
    assert "differs in `shard_examples`: 4 in the cache, 5 here. Name another `--output`" in capsys.readouterr().err
    assert cli.main(["fit", "--config", str(config)]) == 0
    assert (tmp_path / "pair" / "decode" / "model.safetensors").exists()
    assert cli.main(["fit", "--config", str(config), "--data.lengths.max_length=20"]) == 1
    assert "`data.lengths.max_length`: 24 in the cache, 20 here" in capsys.readouterr().err


def test_a_key_tells_where_the_prompt_ends() -> None:
    ids = torch.arange(9)
    assert example_key(ids[:4], ids[4:]) != example_key(ids[:5], ids[5:])


def test_a_student_without_a_teacher_is_judged_alone_and_reads_no_cache(
    lively: Path, plan: Path, tmp_path: Path
) -> None:
    settings: Any = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    found = [
        Trainer(default_root_dir=tmp_path, **settings).validate(module, datamodule=data_of(lively))[0]
        for module in (module_of(lively, plan, cache=tmp_path / "nowhere"), module_of(lively, plan))
    ]
    assert found[0].keys() == {"val/ppl"}
    assert found[0]["val/ppl"] == pytest.approx(found[1]["val/ppl"], rel=1e-6)
