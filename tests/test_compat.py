"""Each private name of a dependency does what `pdtrim_pl.compat` says; a release that changes one fails here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import save_file
from tiny_models import tiny_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from typing_extensions import override

from pdtrim_pl import compat
from pdtrim_pl.compat import LoopProgress

TESTS = Path(__file__).parent


class Tiny(LightningModule):
    """One weight; notes what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.due: list[bool] = []

    def training_step(self, batch: Tensor) -> Tensor:
        self.due.append(compat.optimizer_step_is_due(self.trainer))
        return (self.weight - batch).square().mean()

    def validation_step(self, batch: Tensor) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.ones(5, 1), batch_size=1)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return self.train_dataloader()


def fit(folder: Path, *callbacks: Callback, epochs: int = 1, accumulate: int = 1) -> Tiny:
    module = Tiny()
    Trainer(
        accelerator="cpu", max_epochs=epochs, accumulate_grad_batches=accumulate, default_root_dir=folder, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=list(callbacks),
    ).fit(module)  # fmt: skip
    return module


def test_an_optimizer_step_is_due_every_so_many_batches_and_at_the_last_one(tmp_path: Path) -> None:
    assert fit(tmp_path, accumulate=2).due == [False, True, False, True, True]


def test_no_batch_asks_all_ranks_for_sigterm_in_a_run_that_handles_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Tensor] = []
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src: told.append(tensor))
    loop: Any = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).fit_loop.epoch_loop
    assert "_broadcast_sigterm_tensor" in type(loop).advance.__code__.co_names
    loop._broadcast_sigterm_tensor()
    assert len(told) == 1
    compat.keep_sigterm_local(loop.trainer)
    loop._broadcast_sigterm_tensor()
    assert len(told) == 1


class Loops(Callback):
    """The `loops` of a checkpoint saved at the end of a batch, as our callbacks save."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, Any]] = {}

    @override
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "loops.ckpt")
        saved = torch.load(Path(trainer.default_root_dir) / "loops.ckpt", weights_only=False)
        self.at[trainer.global_step] = deepcopy(saved["loops"][LoopProgress.FIT])


def test_a_checkpoint_counts_batches_and_epochs_under_the_names_we_read(tmp_path: Path) -> None:
    loops = Loops()
    fit(tmp_path, loops, epochs=2)
    third, fifth, sixth = loops.at[3], loops.at[5], loops.at[6]
    # At the end of a batch its step is counted and its end is not.
    for loop, batch in ((third, 3), (fifth, 5)):
        total = loop[LoopProgress.BATCHES]["total"]
        assert total == {"ready": batch, "started": batch, "processed": batch, "completed": batch - 1}
        assert loop[LoopProgress.EPOCHS]["total"]["started"] == 1
    assert not third[LoopProgress.BATCHES]["is_last_batch"]
    assert fifth[LoopProgress.BATCHES]["is_last_batch"]
    assert third[LoopProgress.EPOCHS]["total"]["processed"] == 0
    # The last batch of an epoch counts the epoch as processed too early: that is what `resumable_loops` puts right.
    assert fifth[LoopProgress.EPOCHS]["total"] == {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    assert sixth[LoopProgress.EPOCHS]["total"] == {"ready": 2, "started": 2, "processed": 1, "completed": 1}
    assert third[LoopProgress.EPOCH_STATE][LoopProgress.STEPPED] == 2
    assert sixth[LoopProgress.BATCHES]["current"]["ready"] == 1
    assert sixth[LoopProgress.VALIDATION_BATCHES].keys() == {"total", "current", "is_last_batch"}
    assert sixth[LoopProgress.VALIDATION_BATCHES]["total"].keys() == {"ready", "started", "processed", "completed"}


def test_a_ddp_strategy_tells_its_settings() -> None:
    strategy = DDPStrategy(find_unused_parameters=True, static_graph=False)
    assert compat.ddp_settings(strategy) == {"find_unused_parameters": True, "static_graph": False}


def test_the_methods_of_the_cli_that_ours_overrides_are_called(tmp_path: Path) -> None:
    called: list[str] = []
    ran: list[str] = []

    class CLI(LightningCLI):
        def _parse_ckpt_path(self) -> None:
            assert not hasattr(self, "model")
            called.append("parse")

        def _run_subcommand(self, subcommand: str) -> None:
            ran.append(subcommand)
            super()._run_subcommand(subcommand)

        def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
            arguments = super()._prepare_subcommand_kwargs(subcommand)
            called.append(f"{subcommand} {sorted(set(arguments) & {'ckpt_path', 'model'})}")
            return arguments

        def instantiate_trainer(self, **arguments: Any) -> Trainer:
            called.append(str(self._get(self.config_init, "trainer")["max_epochs"]))
            return super().instantiate_trainer(**arguments)

    quiet = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"]
    options = [f"--trainer.{name}=false" for name in quiet]
    folder = f"--trainer.default_root_dir={tmp_path}"
    CLI(Tiny, args=["fit", "--trainer.max_epochs=1", "--trainer.accelerator=cpu", folder, *options],
        save_config_callback=None)  # fmt: skip
    assert called == ["parse", "1", "fit ['ckpt_path', 'model']"]
    assert ran == ["fit"]


def test_the_attention_implementation_is_looked_up_at_every_call() -> None:
    model = tiny_model("llama")
    ids = torch.arange(3, 9)[None]
    assert compat.attention_of(model) == "sdpa"
    assert not any(x is not None for x in model(ids, output_attentions=True, use_cache=False).attentions)
    model.set_attn_implementation("eager")
    assert compat.attention_of(model) == "eager"
    assert model(ids, output_attentions=True, use_cache=False).attentions[0].shape == (1, 4, 6, 6)


def test_a_models_file_is_found_in_its_directory(tiny_llama_dir: Path) -> None:
    folder, name = str(tiny_llama_dir), "model.safetensors"
    assert compat.has_model_file(folder, name)
    assert compat.model_file(folder, name) == str(tiny_llama_dir / name)
    assert not compat.has_model_file(folder, "model.safetensors.index.json")
    with pytest.raises(OSError, match=r"does not appear to have a file named nothing\.bin"):
        compat.model_file(folder, "nothing.bin")


def test_a_hub_models_file_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--me--mine" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--me--mine" / "refs").mkdir()
    (tmp_path / "models--me--mine" / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    assert compat.has_model_file("me/mine", "config.json")
    assert compat.model_file("me/mine", "config.json") == str(snapshot / "config.json")
    assert not compat.has_model_file("me/mine", "model.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_the_weights_of_a_file_are_described_without_their_values(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    weights = {"a.weight": torch.zeros(2, 3, dtype=torch.bfloat16), "b": torch.ones(4, dtype=torch.int8)}
    save_file(weights, file, {"format": "pt"}) if file.suffix == ".safetensors" else torch.save(weights, file)
    found = compat.tensors_of_file(str(file))
    assert {key: (tensor.shape, tensor.dtype, tensor.device.type) for key, tensor in found.items()} == {
        key: (tensor.shape, tensor.dtype, "meta") for key, tensor in weights.items()
    }


def test_a_datasets_fingerprint_follows_its_rows_and_its_steps(tmp_path: Path) -> None:
    file = tmp_path / "rows.txt"

    def rows() -> Dataset:
        return Dataset.from_text(str(file), cache_dir=str(tmp_path / "cache"))

    file.write_text("a\nb")
    first, again = rows(), rows()
    file.write_text("a\nlonger")
    prints = [compat.dataset_fingerprint(each) for each in (first, again, first.select([0]), rows())]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def a_parser() -> ArgumentParser:
    command = ArgumentParser(prog="run fit")
    command.add_argument("--epochs", type=int)
    parser = ArgumentParser(prog="run", exit_on_error=False)
    parser.add_argument("--seed", type=int)
    parser.add_subcommands().add_subcommand("fit", command)
    return parser


def test_a_parser_tells_its_options_and_those_of_its_subcommands() -> None:
    assert compat.options_of(a_parser()) == ["help", "seed", "epochs"]


def test_an_error_tells_the_subcommand_that_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[str] = []

    def error(self: ArgumentParser, message: str, ex: Exception | None = None) -> NoReturn:
        refused.append(compat.refusing_parser(self, ex).prog)
        raise SystemExit(2)

    monkeypatch.setattr(ArgumentParser, "error", error)
    for arguments in (["fit", "--wrong=1"], ["--wrong=1"]):
        with pytest.raises(SystemExit):
            a_parser().parse_args(arguments)
    assert refused == ["run [options] fit", "run"]


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_ddp_wrapper_without_hooks_sums_no_gradients() -> None:
    wrapper = DistributedDataParallel(nn.Linear(2, 1))
    sums: list[int] = []

    def hook(_, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations, and refuses postponed ones
        sums.append(1)
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    wrapper.register_comm_hook(None, hook)
    wrapper(torch.ones(1, 2)).sum().backward()
    assert sums == [1]
    compat.remove_gradient_hooks(wrapper)
    wrapper.module(torch.ones(1, 2)).sum().backward()
    assert sums == [1]


@pytest.mark.parametrize("change", ["double", "half", "cpu"])
def test_a_module_moves_its_tensors_through_apply(change: str) -> None:
    class Watched(nn.Linear):
        calls = 0

        def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
            Watched.calls += 1
            return super()._apply(fn, recurse)

    getattr(nn.Sequential(Watched(1, 1)), change)()
    assert Watched.calls == 1


@pytest.fixture(scope="module", params=[2, 3])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a DeepSpeed engine of one process says, at ZeRO stage 2 and 3."""
    folder = tmp_path_factory.mktemp("deepspeed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, str(TESTS / "compat_deepspeed_run.py"), str(request.param), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {"stage": request.param, **json.loads(done.stdout.splitlines()[-1])}


def test_deepspeed_keeps_fp32_copies_of_all_weights(engine: dict[str, Any]) -> None:
    weights = 6 * 4 + 4 + 4 * 2 + 2
    assert engine["elements of fp32_parts"] == weights
    assert engine.get("own_shard") == {2: None, 3: 6 * 4}[engine["stage"]]


def test_deepspeed_forgets_the_momenta_of_one_weight_and_of_no_other(engine: dict[str, Any]) -> None:
    before, after = engine["momenta"]["before"], engine["momenta"]["after"]
    assert before[0] > 0
    assert after == [0.0, before[1]]


def test_deepspeed_writes_checkpoints_through_the_methods_we_stand_between(engine: dict[str, Any]) -> None:
    assert engine["calls of the recovery step"] == 1
    assert len(engine["written by save"]) == 2
    assert engine["written by save"] == engine["on disk"]
    assert engine["client state"] == 7


def test_lightning_hands_out_whole_weights_under_zero_3_and_leaves_others(engine: dict[str, Any]) -> None:
    if engine["stage"] == 3:
        unchanged = engine["handed out"]
        assert unchanged == {"net.0.weight": False, "net.0.bias": True, "net.1.weight": True, "net.1.bias": True}


def test_a_compiled_module_is_known_and_its_copy_is_plain() -> None:
    module = nn.Linear(2, 2)
    assert not compat.is_compiled(module)
    module.compile(backend="eager")
    assert compat.is_compiled(module)
    assert not compat.is_compiled(deepcopy(module))


def test_a_hook_of_any_kind_is_seen_while_it_is_there() -> None:
    module = nn.Linear(2, 2)
    for register in (
        module.register_forward_hook, module.register_forward_pre_hook, module.register_full_backward_hook,
        module.register_full_backward_pre_hook,
    ):  # fmt: skip
        handle = register(lambda *_: None)
        assert compat.has_hooks(module)
        handle.remove()
        assert not compat.has_hooks(module)
