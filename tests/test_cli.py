"""The command line: every shipped YAML builds, commands work on a tiny model, bad input ends in one clear line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from short_text import SHORT
from tiny_models import tiny_model

from callbacks import BlockDrop, RepeatedDrop
from callbacks.removal_rounds import RemovalRounds
from pdtrim_pl.checkpoints.state import sidecar
from pdtrim_pl.cli.lightning_cli import PDTrimCLI
from pdtrim_pl.cli.main import main
from pdtrim_pl.export import load_plan_and_policy
from pdtrim_pl.plan import ModelRef, StagePlan
from pdtrim_pl.serving.engine.worker import told

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.name.startswith("compare_"))
ONE_DEVICE = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.strategy=auto",
    "--trainer.precision=32-true",
]


@pytest.fixture
def config(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A complete configuration for the tiny model, with every kind of callback."""
    settings: dict[str, Any] = {
        "seed_everything": 1,
        "model": {"model": str(tiny_llama_dir), "losses": [{"class_path": "pdtrim_pl.losses.KL"}]},
        "data": {
            "tokenizer": "${model.model}",
            "source": {"path": SHORT.path},
            "lengths": {"max_length": 24, "min_prompt": 8, "max_prompt": 16},
            "parts": {"validation": 4, "calibration": 4, "test": 3, "max_train": 8},
            "batch_size": 4,
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "num_sanity_val_steps": 0,
            "default_root_dir": str(tmp_path),
            "logger": False,
            "callbacks": [
                {
                    "class_path": "callbacks.BlockDrop",
                    "init_args": {
                        "stage": "decode",
                        "criterion": {"class_path": "pdtrim_pl.criteria.GreedyKL", "init_args": {"pool": 2}},
                        "schedule": {"blocks": 1, "every": 1, "until": 2},
                        "guards": {"protect_first": 0},
                    },
                },
                {
                    "class_path": "callbacks.BlockDrop",
                    "init_args": {
                        "stage": "prefill",
                        "criterion": {"class_path": "pdtrim_pl.criteria.CosineRedundancy"},
                        "schedule": {1: 1},
                    },
                },
                {
                    "class_path": "callbacks.KVRetention",
                    "init_args": {"selector": {"class_path": "pdtrim_pl.selectors.MassSelector"}},
                },
                {"class_path": "callbacks.PlanLogger"},
                {"class_path": "callbacks.PlanProgressBar"},
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"dirpath": str(tmp_path / "ckpt"), "save_last": True},
                },
            ],
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_configuration_builds(path: Path) -> None:
    cli = PDTrimCLI(["--config", str(path), *ONE_DEVICE], run=False)
    assert cli.datamodule.tokenizer_name == cli.model.model_name, "the tokenizer is interpolated from the model"
    assert any(isinstance(callback, RemovalRounds) for callback in cli.trainer.callbacks)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_configuration_tells_its_launch_command(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"--config configs/{path.name}" in line for line in header)


def test_a_saved_configuration_builds_the_same_schedule_again(config: Path, tmp_path: Path) -> None:
    cli = PDTrimCLI(["--config", str(config)], run=False)
    saved = tmp_path / "saved.yaml"
    saved.write_text(cli.parser.dump(cli.config, skip_none=False))
    again = PDTrimCLI(["--config", str(saved)], run=False)
    for before, after in zip(cli.trainer.callbacks, again.trainer.callbacks, strict=True):
        if isinstance(before, BlockDrop):
            assert isinstance(after, BlockDrop)
            assert before.schedule == after.schedule
            assert before.guards == after.guards
    assert RepeatedDrop(1, 1, 2).by_epoch() in [c.schedule for c in again.trainer.callbacks if isinstance(c, BlockDrop)]


def test_fit_validate_test_predict_and_export_work_one_after_the_other(config: Path, tmp_path: Path) -> None:
    assert main(["fit", "--config", str(config)]) == 0
    last = tmp_path / "ckpt" / "last.ckpt"
    plan = StagePlan.load(sidecar(last, "stage_plan.json"))
    assert (len(plan.prefill), len(plan.decode)) == (3, 2)
    assert "callbacks.BlockDrop" in sidecar(last, "config.yaml").read_text(), "the resolved YAML lies beside it"

    for command in ("validate", "test"):
        assert main([command, "--config", str(config), "--ckpt_path", str(last)]) == 0
    written = tmp_path / "predictions.jsonl"
    writer = {"class_path": "callbacks.PredictionWriter", "init_args": {"output": str(written)}}
    predict = ["predict", "--config", str(config), "--ckpt_path", str(last), f"--trainer.callbacks={[writer]}"]
    assert main(predict) == 0
    assert len(written.read_text().splitlines()) == 3

    assert main(["export", "--ckpt_path", str(last), "--output", str(tmp_path / "pair"), "--dtype", "float32"]) == 0
    exported, policy = load_plan_and_policy(tmp_path / "pair")
    assert exported == plan
    assert policy.kv.dtype == "float32"
    padded = tmp_path / "padded"
    assert main(["export", "--ckpt_path", str(last), "--output", str(padded), "--layout", "padded"]) == 0
    exported = load_plan_and_policy(padded)[0]
    assert exported == replace(plan, layout="padded")
    assert f"both checkpoints have {len(plan.prefill)} layers" in (padded / "README.md").read_text()


def test_a_model_whose_folder_has_moved_is_named_anew(
    config: Path, tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, now, last = tmp_path / "before", tmp_path / "now", tmp_path / "ckpt" / "last.ckpt"
    shutil.copytree(tiny_llama_dir, before)
    assert main(["fit", "--config", str(config), "--model.model", str(before)]) == 0
    before.rename(now)
    export = ["export", "--ckpt_path", str(last), "--output", str(tmp_path / "pair")]
    assert main(export) == 1
    error = capsys.readouterr().err
    assert f"is of model `{before}`, which cannot be loaded: where it has moved, say where to with `--model`" in error

    assert main([*export, "--model", str(now)]) == 0
    assert load_plan_and_policy(tmp_path / "pair")[0].model.name_or_path == str(now)
    capsys.readouterr()
    tiny_model("llama", blocks=6).save_pretrained(tmp_path / "other")
    assert main([*export, "--overwrite", "--model", str(tmp_path / "other")]) == 1
    assert "(llama, 4 blocks), and `model` is" in capsys.readouterr().err

    moved = ["--config", str(config), "--model.model", str(now), "--ckpt_path", str(last)]
    assert main(["validate", *moved]) == 0
    assert main(["fit", *moved, "--trainer.max_epochs", "3"]) == 0
    assert StagePlan.load(sidecar(last, "stage_plan.json")).model.name_or_path == str(now)


def test_the_processes_compare_what_each_found_for_last(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[Path | None] = []
    monkeypatch.setattr("pdtrim_pl.module.check_same_checkpoint", lambda ranks, path: compared.append(path))
    for _ in range(2):
        assert main(["fit", "--config", str(config), "--ckpt_path", "last"]) == 0
    before, found = compared
    assert before is None
    assert found is not None
    assert found.parent == tmp_path / "ckpt"


def test_an_override_on_the_command_line_wins(config: Path) -> None:
    cli = PDTrimCLI(["--config", str(config), "--trainer.max_epochs", "7", "--data.batch_size=2"], run=False)
    assert cli.trainer.max_epochs == 7
    assert cli.datamodule.batch_size == 2


def test_print_config_shows_the_whole_configuration(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["fit", "--config", str(config), "--print_config"])
    assert done.value.code in (0, None)
    assert yaml.safe_load(capsys.readouterr().out)["data"]["lengths"]["max_length"] == 24


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--model.boundary=prefill"], "model.boundary"),
        (["--model.structure.relation=loose"], "model.structure.relation"),
        (["--trainer.epochs=3"], "trainer.epochs"),
        (["--data.batch_size=many"], "data.batch_size"),
    ],
)
def test_unknown_and_mistyped_keys_are_refused(
    config: Path, extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["fit", "--config", str(config), *extra])
    assert done.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trim"]) == 2
    assert "unknown command 'trim'" in capsys.readouterr().err


def test_what_a_user_got_wrong_ends_in_one_line_without_a_traceback(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", str(config), "--model.model", str(tmp_path / "nowhere")]) == 1
    error = capsys.readouterr().err
    assert "pdtrim: error: There is no model" in error
    assert "Traceback" not in error


def test_exporting_a_checkpoint_that_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--ckpt_path", str(tmp_path / "no.ckpt"), "--output", str(tmp_path / "pair")]) == 1
    assert "There is no checkpoint at `ckpt_path`" in capsys.readouterr().err


def test_help_comes_without_heavy_imports() -> None:
    code = (
        "import sys; from pdtrim_pl.cli.main import main; main(['--help']); main(['--version']);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'lightning', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "usage: pdtrim COMMAND" in done.stdout


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pdtrim_pl", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("pdtrim_pl ")


# Errors


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The only line that a command with a wrong key prints before it leaves with status 2."""
    with pytest.raises(SystemExit) as done:
        main(list(args))
    assert done.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("--trainer.maxepochs=3", "trainer.max_epochs"),
        ("--model.structure.relaton=free", "model.structure.relation"),
        ("--modle.model=x", "model.model"),
        ("--model.optimizer.init_args.lrr=3", "lr"),
    ],
)
def test_a_wrong_key_on_the_command_line_is_one_line_with_the_nearest_one(
    wrong: str, right: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, "fit", "--config", str(config), wrong)
    assert line.startswith("pdtrim: error: ")
    assert f"Did you mean `{right}`? (`pdtrim fit --help` shows all options.)" in line


WRONG_YAML: dict[str, tuple[list[str | int], Any, str]] = {
    "section": (["modle"], {"model": "x"}, "model.model"),
    "dataclass": (["data", "lengths", "max_len"], 2, "data.lengths.max_length"),
    "class": (["trainer", "callbacks", 0, "init_args", "shedule"], 2, "schedule"),
    "class in a class": (["trainer", "callbacks", 0, "init_args", "criterion", "init_args", "pol"], 2, "pool"),
    "dataclass in a class": (["trainer", "callbacks", 0, "init_args", "guards", "protect_frst"], 2, "protect_first"),
    "alternatives": (["trainer", "callbacks", 0, "init_args", "schedule", "untl"], 2, "until"),
    "class path": (
        ["trainer", "callbacks", 1, "init_args", "criterion", "class_path"],
        "pdtrim_pl.criteria.CosinRedundancy",
        "CosineRedundancy",
    ),
}


@pytest.mark.parametrize("kind", WRONG_YAML)
def test_a_wrong_key_in_yaml_is_one_line_with_the_nearest_one(
    kind: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys, value, right = WRONG_YAML[kind]
    settings: Any = yaml.safe_load(config.read_text())
    place = settings
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    config.write_text(yaml.safe_dump(settings))
    assert f"Did you mean `{right}`?" in refused(capsys, "fit", "--config", str(config))


def test_other_commands_name_the_nearest_option_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean `prompt`?" in refused(capsys, "generate", "--export", "x", "--promt", "y")
    assert "Did you mean `output`?" in refused(capsys, "export", "--ckpt_path", "x", "--outptu", "y")
    assert "It is called `data.parts.repeated_prompts` now." in refused(capsys, "fit", "--data.parts.said_again=0.5")
    assert "Did you mean" not in refused(capsys, "export", "--ckpt_path", "x", "--quux", "y"), "nothing is near"
    compare = ["compare", "--config", str(ROOT / "configs" / "compare_smollm2.yaml"), "--model.nmae=x"]
    assert "Did you mean `model.name`?" in refused(capsys, *compare)


def test_an_interpolation_of_nothing_names_the_nearest_key(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(config.read_text().replace("${model.model}", "${model.modle}"))
    assert main(["fit", "--config", str(config)]) == 1
    assert "Interpolation key 'model.modle' not found. Did you mean `model.model`?" in capsys.readouterr().err


def test_a_setting_that_a_class_refuses_is_told_without_the_alternatives_of_its_type(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(config.read_text().replace("1: 1", "0: -1"))
    assert main(["fit", "--config", str(config)]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert said == ["pdtrim: error: `schedule` of the prefill drops is {0: -1}: give epochs >= 0 and counts >= 1."]


def failing(monkeypatch: pytest.MonkeyPatch, fail: Callable[[], object]) -> None:
    def run(command: str, args: list[str]) -> int:
        fail()
        return 0

    monkeypatch.setattr("pdtrim_pl.cli.main._run", run)


def test_a_value_error_of_a_library_shows_where_it_comes_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(
        monkeypatch, lambda: torch.distributions.Normal(torch.tensor([0.0]), torch.tensor([-1.0]), validate_args=True)
    )
    assert main(["fit"]) == 1
    error = capsys.readouterr().err.splitlines()
    assert error[0] == "Traceback (most recent call last):"
    assert any("torch/distributions" in line for line in error)
    assert any(line.startswith("pdtrim: error: ValueError: Expected parameter scale") for line in error)


def test_a_value_error_that_an_expression_of_ours_runs_into_shows_where_it_comes_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, lambda: StagePlan.full(ModelRef("x", "llama", "many")))  # type: ignore[arg-type]
    monkeypatch.setattr("pdtrim_pl.plan.planned_stages.range", int, raising=False)  # as a slip in our own code would be
    assert main(["fit"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback (most recent call last):")
    assert "pdtrim_pl/plan/planned_stages.py" in error
    assert "pdtrim: error: ValueError: invalid literal for int()" in error


def test_a_value_error_that_we_raise_is_the_users(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, lambda: RepeatedDrop(0, 1, 1))
    assert main(["fit"]) == 1
    assert capsys.readouterr().err.startswith("pdtrim: error: `schedule` needs `blocks`")
    monkeypatch.setenv("PDTRIM_DEBUG", "1")
    assert main(["fit"]) == 1
    assert capsys.readouterr().err.startswith("Traceback")


def host_memory() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def device_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")


@pytest.mark.parametrize(
    ("fail", "said"), [(device_memory, "CUDA out of memory"), (host_memory, "DefaultCPUAllocator")]
)
def test_memory_that_runs_out_comes_with_what_to_lower(
    fail: Callable[[], object], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, fail)
    assert main(["fit"]) == 1
    line, hint = capsys.readouterr().err.splitlines()
    assert line.startswith("pdtrim: error: Memory ran out (")
    assert said in line
    assert "Lower `data.batch_size`, `data.lengths.max_length` or `model.chunk_tokens`" in line
    assert "`pdtrim fit --dry_run` counts" in line
    assert hint == "(PDTRIM_DEBUG=1 shows the traceback.)"


def test_a_worker_whose_memory_runs_out_says_what_to_do() -> None:
    message = told(torch.OutOfMemoryError("CUDA out of memory. Tried ...\nmore"))
    assert message == "memory ran out (CUDA out of memory. Tried ...). Give a shorter prompt, or another `device`."


def interrupted() -> None:
    raise KeyboardInterrupt


def interrupted_in_lightning() -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


@pytest.mark.parametrize("fail", [interrupted, interrupted_in_lightning])
def test_ctrl_c_ends_a_command_with_its_own_status(
    fail: Callable[[], object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, fail)
    assert main(["fit"]) == 130
    assert capsys.readouterr().err == "pdtrim: interrupted.\n"
