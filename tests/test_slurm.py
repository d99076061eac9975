"""Batch scripts, `pdtrim submit`, and runs on a real SLURM that are preempted, cancelled and continued."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from slurm_cluster import SlurmCluster, missing_programs, slurm_cluster, wait_until

from pdtrim_pl.checkpoints.state import CheckpointState
from pdtrim_pl.cli.main import main
from pdtrim_pl.plan import StagePlan
from pdtrim_pl.slurm import JobRequest, RunningJob, SlurmError, render
from pdtrim_pl.slurm.job import config_faults, seconds_of
from pdtrim_pl.slurm.render import Kind, shipped

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.name.startswith("compare_"))
KINDS = get_args(Kind)
TWO_TASKS = ["--gpus", "0", "--tasks", "2", "--cpus", "1", "--time", "30"]
TWO_NODES = ["--nodes", "2", "--tasks", "1"]


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    """One private SLURM for all tests; they are skipped where its packages are missing."""
    missing = missing_programs()
    if missing:
        reason = f"SLURM is not installed (packages slurm-wlm and munge): {', '.join(missing)} missing"
        if os.environ.get("PDTRIM_REQUIRE_SLURM") == "1":
            pytest.fail(f"{reason}, and PDTRIM_REQUIRE_SLURM is 1")
        pytest.skip(reason)
    # Not below pytest's own folder, which others may not enter: munged refuses that.
    with tempfile.TemporaryDirectory(prefix="pdtrim-slurm-") as folder, slurm_cluster(Path(folder)) as running:
        yield running


@pytest.fixture
def on_cluster(cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SlurmCluster:
    """The cluster, with this process set up like a shell that submits to it, in a folder of its own."""
    for name, value in {
        **cluster.variables,
        "PDTRIM": f"{sys.executable} -m pdtrim_pl", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return cluster


def write_config(folder: Path, model: Path) -> Path:
    """A run of three epochs of three steps on two processes, with a drop at the start of epochs 1 and 2."""
    drop = {
        "stage": "decode", "schedule": {1: 1, 2: 1}, "guards": {"protect_first": 0},
        "criterion": {"class_path": "slurm_pauses.PausedSearch"},
    }  # fmt: skip
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps({"text": f"{row}: " + chr(97 + row) * 30}) + "\n" for row in range(20)))
    settings: dict[str, Any] = {
        "seed_everything": 1,
        "model": {"model": str(model), "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}},
        "data": {
            "tokenizer": str(model), "source": {"path": str(source)},
            "lengths": {"max_length": 24, "min_prompt": 8, "max_prompt": 16},
            "parts": {"validation": 4, "calibration": 4, "max_train": 12}, "batch_size": 2, "num_workers": 1,
        },
        "trainer": {
            "accelerator": "cpu", "strategy": "ddp_find_unused_parameters_true", "max_epochs": 3, "logger": False,
            "num_sanity_val_steps": 0, "enable_progress_bar": False, "enable_model_summary": False,
            "callbacks": [
                {"class_path": "callbacks.BlockDrop", "init_args": drop},
                {"class_path": "slurm_pauses.Pauses"},
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"dirpath": "checkpoints", "save_last": True, "save_top_k": 0},
                },
            ],
        },
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def submit(capsys: pytest.CaptureFixture[str], config: Path, *extra: str) -> str:
    """`pdtrim submit` of two tasks; returns the id that it prints."""
    assert main(["submit", "--config", str(config), *TWO_TASKS, *extra]) == 0, capsys.readouterr().err
    found = re.match(r"Submitted batch job (\d+)\.", capsys.readouterr().out)
    assert found is not None
    return found[1]


def completed(cluster: SlurmCluster, job: str, folder: Path) -> dict[str, Any]:
    """The last checkpoint of a job that must end well."""
    log = folder / f"pdtrim-{job}.log"
    assert cluster.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT") == "COMPLETED", log.read_text()
    assert sorted(path.name for path in (folder / "checkpoints").glob("*.ckpt")) == ["last.ckpt"]
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def pid_at(folder: Path, moment: str, rank: int) -> int:
    """Wait until a rank pauses at a moment; returns its process id."""
    mark = folder / f"{moment}.{rank}"
    wait_until(mark.exists, f"rank {rank} at {moment}")
    return int(mark.read_text())


@pytest.mark.slow
def test_a_run_that_is_preempted_three_times_equals_the_one_that_is_not(
    on_cluster: SlurmCluster, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folders = {name: tmp_path / name for name in ("whole", "preempted", "marks")}
    for folder in folders.values():
        folder.mkdir()
    config = write_config(tmp_path, tiny_llama_dir)
    monkeypatch.chdir(folders["whole"])
    whole_job = submit(capsys, config)
    monkeypatch.chdir(folders["preempted"])
    monkeypatch.setenv("PDTRIM_TEST_PAUSES", f"{folders['marks']} 0=first_step 1=search 2=last_epoch")
    job = submit(capsys, config, *TWO_NODES)

    for rank in range(2):
        pid_at(folders["marks"], "first_step", rank)
    on_cluster.call("scancel", "--signal=USR1", job)
    on_cluster.start_again(job, restarts=1)
    os.kill(pid_at(folders["marks"], "search", rank=1), signal.SIGTERM)  # rank 0 learns of it from rank 1
    on_cluster.start_again(job, restarts=2)
    for rank in range(2):
        pid_at(folders["marks"], "last_epoch", rank)
    on_cluster.call("scancel", "--signal=TERM", job)
    on_cluster.start_again(job, restarts=3)

    whole = completed(on_cluster, whole_job, folders["whole"])
    preempted = completed(on_cluster, job, folders["preempted"])
    assert (on_cluster.restarts(whole_job), on_cluster.restarts(job)) == (0, 3)
    log = (folders["preempted"] / f"pdtrim-{job}.log").read_text()
    saved = re.findall(
        r"saved step (\d+) to \S+/checkpoints/last.ckpt\. Job \d+ is back in the queue, restart (\d)", log
    )
    assert saved == [("1", "1"), ("4", "2"), ("8", "3")]
    assert re.findall(r"Restart (\d) of job \d+, continuing from (\S+)/last.ckpt", log) == [
        (restart, str(folders["preempted"] / "checkpoints")) for restart in "123"
    ]
    expected, got = CheckpointState.of(whole), CheckpointState.of(preempted)
    assert got.plan == expected.plan
    assert len(got.plan.decode) == 2
    assert got.record.losses == expected.record.losses
    assert got.record.validations == expected.record.validations
    for name, weight in whole["state_dict"].items():
        assert torch.equal(weight, preempted["state_dict"][name]), name


@pytest.mark.slow
def test_a_run_in_short_turns_saves_before_its_time_ends_and_goes_on(
    on_cluster: SlurmCluster, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PDTRIM_TEST_PAUSES", f"{tmp_path} 0=first_step")
    job = on_cluster.call(
        "sbatch", "--parsable", "--gpus-per-node=0", "--ntasks-per-node=2", "--cpus-per-task=1", "--time=2",
        "--signal=USR1@60", ROOT / "jobs" / "fit_preemptible.sbatch", write_config(tmp_path, tiny_llama_dir),
    )  # fmt: skip
    wait_until(lambda: on_cluster.restarts(job) == 1, "a restart")
    on_cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=30")  # no second notice
    on_cluster.start_again(job, restarts=1)
    completed(on_cluster, job, tmp_path)
    log = (tmp_path / f"pdtrim-{job}.log").read_text()
    assert re.findall(r"Asked to leave: saved step (\d+) .* is back in the queue, restart (\d)", log) == [("1", "1")]


@pytest.mark.slow
def test_a_cancelled_run_is_saved_and_does_not_come_back(
    on_cluster: SlurmCluster, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("PDTRIM_TEST_PAUSES", f"{tmp_path} 0=first_step")
    job = submit(capsys, write_config(tmp_path, tiny_llama_dir))
    for rank in range(2):
        pid_at(tmp_path, "first_step", rank)
    on_cluster.call("scancel", job)
    assert on_cluster.wait_for(job, "CANCELLED", "PENDING", "FAILED") == "CANCELLED"
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()
    assert f"Not requeued: job {job} is COMPLETING" in (tmp_path / f"pdtrim-{job}.log").read_text()
    assert on_cluster.restarts(job) == 0


@pytest.mark.slow
def test_each_task_of_the_array_trains_under_its_own_plan(
    on_cluster: SlurmCluster, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    from pdtrim_pl.module import PDTrimModule

    module = PDTrimModule(str(tiny_llama_dir))
    module.configure_model()
    (tmp_path / "plans").mkdir()
    for block in (1, 2):
        module.plan.drop("decode", block).save(tmp_path / "plans" / f"without_{block}.json")
    config = write_config(tmp_path, tiny_llama_dir)
    job = on_cluster.call(
        "sbatch", "--parsable", "--array=1-2", "--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1",
        f"--chdir={tmp_path}", ROOT / "jobs" / "compare_array.sbatch", config, "plans",
        "--trainer.max_epochs=3", "--trainer.limit_train_batches=1", "--trainer.strategy=auto",
    )  # fmt: skip
    assert on_cluster.wait_for(f"{job}_1", "COMPLETED", "FAILED") == "COMPLETED", (
        tmp_path / f"pdtrim-compare-{job}_1.log"
    ).read_text()
    plan = StagePlan.load(tmp_path / "runs" / "compare" / "without_2" / "checkpoints" / "last.stage_plan.json")
    assert 2 not in plan.decode
    assert on_cluster.wait_for(f"{job}_2", "COMPLETED", "FAILED") == "FAILED"
    assert "has no plan: there are 2" in (tmp_path / f"pdtrim-compare-{job}_2.log").read_text()


@pytest.mark.slow
def test_a_wrong_partition_is_named_with_those_there_are(
    on_cluster: SlurmCluster, tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, tiny_llama_dir)
    assert main(["submit", "--config", str(config), *TWO_TASKS, "--partition", "gpu"]) == 1
    assert "`--partition` is 'gpu', and this cluster has: main." in capsys.readouterr().err


@pytest.mark.slow
def test_what_the_cluster_cannot_give_is_told_in_its_own_words(
    on_cluster: SlurmCluster, tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, tiny_llama_dir)
    assert main(["submit", "--config", str(config), "--gpus", "0", "--tasks", "64"]) == 1
    assert "`sbatch` failed:" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_scripts_are_what_the_renderer_writes(kind: Kind) -> None:
    assert (ROOT / "jobs" / f"{kind}.sbatch").read_text() == render(shipped(kind), kind)
    assert {path.stem for path in (ROOT / "jobs").glob("*.sbatch")} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_scripts_are_good_bash(kind: Kind) -> None:
    subprocess.run(["bash", "-n", ROOT / "jobs" / f"{kind}.sbatch"], check=True)


@pytest.mark.parametrize(
    ("entry", "added"),
    [
        ("- class_path: callbacks.Preemption", False),
        ("- {class_path: callbacks.Preemption}  # requeues", False),
        ("# - class_path: callbacks.Preemption", True),
        ("- class_path: callbacks.PlanLogger  # not callbacks.Preemption", True),
    ],
)
def test_a_script_adds_the_callback_unless_the_configuration_names_it(entry: str, added: bool, tmp_path: Path) -> None:
    config, srun = tmp_path / "run.yaml", tmp_path / "srun"
    config.write_text(f"trainer:\n  callbacks:\n    {entry}\n")
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    here = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "8"}
    done = subprocess.run(
        ["bash", ROOT / "jobs" / "fit.sbatch", config], env=here, capture_output=True, text=True, check=True
    )
    assert ("--trainer.callbacks+=callbacks.Preemption" in done.stdout) == added


@pytest.mark.parametrize("kind", KINDS)
def test_every_shipped_script_is_told_before_its_time_ends_and_has_the_nodes_memory(kind: Kind) -> None:
    script = (ROOT / "jobs" / f"{kind}.sbatch").read_text()
    assert "#SBATCH --signal=USR1@300\n" in script
    assert "#SBATCH --mem=0\n" in script


def test_memory_and_notice_are_options(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["submit", "--config", str(ROOT / "configs" / "llama3_8b_1gpu.yaml"), "--gpus", "1", "--dry_run"]
    assert main([*command, "--mem", "200G", "--notice", "0"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --mem=200G\n" in script
    assert "#SBATCH --signal" not in script


def test_a_dry_run_prints_the_script_without_slurm_and_without_torch(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_llama_dir)
    args = ["submit", "--config", str(config), "--nodes", "2", "--gpus", "0", "--tasks", "8", "--time", "4:00:00"]
    code = (
        "import sys; from pdtrim_pl.cli.main import main; status = main(sys.argv[1:]);"
        "sys.exit(status or 3 * any(name in sys.modules for name in ('torch', 'lightning', 'transformers')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *args, "--dry_run", "--", "--trainer.max_epochs=5"],
        cwd=ROOT, env={**os.environ, "PATH": "/nowhere"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=8\n" in done.stdout
    assert f"# sbatch SCRIPT {config} --trainer.max_epochs=5\n" in done.stdout
    body = render(JobRequest(), "fit").split("set -euo pipefail")[1]
    assert done.stdout.endswith(body), "the same script as in jobs/"


def test_all_faults_of_a_job_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("trainer: {accelerator: cpu, callbacks: []}")
    args = ["--nodes=0", "--gpus=2", "--tasks=4", "--time=soon", "--name=a b", "--notice=-1", "--mem=lots"]
    assert main(["submit", "--config", str(config), *args, "--dry_run"]) == 1
    error = capsys.readouterr().err
    for part in (
        "`--nodes` is 0", "`--notice` is -1", "`--tasks` is 4 and `--gpus` is 2", "`--time` is 'soon'",
        "`--name` is 'a b'", "`--mem` is 'lots'", "`trainer.accelerator` is cpu, and `--gpus` is 2",
        "no ModelCheckpoint with a `dirpath`",
    ):  # fmt: skip
        assert part in error


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read"), ("a: [", "is no YAML"), ("- 1", "no section `trainer`"), ("trainer: 3", "no section")],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    config = tmp_path / "run.yaml"
    if text is not None:
        config.write_text(text)
    (fault,) = config_faults(config, JobRequest())
    assert message in fault


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_configuration_can_be_submitted(path: Path) -> None:
    on_cpu = yaml.safe_load(path.read_text())["trainer"].get("accelerator") == "cpu"
    assert config_faults(path, JobRequest(gpus=0, tasks=1) if on_cpu else JobRequest()) == []


@given(st.integers(0, 30), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_time_limits_are_read_as_slurm_reads_them(days: int, hours: int, minutes: int, seconds: int) -> None:
    clock = f"{hours}:{minutes:02}:{seconds:02}"
    total = (hours * 60 + minutes) * 60 + seconds
    assert seconds_of(clock) == total
    assert seconds_of(f"{days}-{clock}") == days * 86400 + total
    assert seconds_of(f"{days}-{hours}") == days * 86400 + hours * 3600
    assert seconds_of(f"{minutes}:{seconds:02}") == minutes * 60 + seconds
    assert seconds_of(str(minutes)) == minutes * 60


def test_a_notice_longer_than_the_limit_is_refused() -> None:
    (fault,) = JobRequest(time="2:00", notice=120).faults()
    assert fault.startswith("`--notice` is 120 seconds, and the limit `--time` 2:00 is 120: give more time")
    assert JobRequest(time="2:00", notice=119).faults() == []


def test_without_slurm_the_missing_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SlurmError, match=r"`squeue` is not on this machine"):
        RunningJob("1", 0).state()


def test_a_process_knows_its_job_and_its_restarts() -> None:
    assert RunningJob.here({}) is None
    assert RunningJob.here({"SLURM_JOB_ID": "7"}) == RunningJob("7", 0)
    assert RunningJob.here({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "3"}) == RunningJob("7", 3)
