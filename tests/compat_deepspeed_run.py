"""What `pdtrim_pl.compat` relies on in DeepSpeed, on a real engine of one process: prints one JSON object.

python tests/compat_deepspeed_run.py STAGE DIRECTORY
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_optimizer_state
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn

from pdtrim_pl import compat

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main(stage: int, directory: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": False},
    }
    with deepspeed.zero.Init(enabled=stage == 3, config_dict_or_path=config):
        model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    told: dict[str, Any] = {}
    engine.backward(engine(torch.ones(1, 6)).square().sum())
    engine.step()

    first, second = engine.module[0].weight, engine.module[1].weight
    told["elements of fp32_parts"] = sum(part.numel() for part in compat.fp32_parts(engine, stage))
    if stage == 3:
        told["own_shard"] = compat.own_shard(first).numel()
        told["handed out"] = _handed_out(engine)
    before = [float(safe_get_full_optimizer_state(weight, "exp_avg").abs().sum()) for weight in (first, second)]
    compat.clear_optimizer_state(engine, stage, first)
    after = [float(safe_get_full_optimizer_state(weight, "exp_avg").abs().sum()) for weight in (first, second)]
    told["momenta"] = {"before": before, "after": after}

    written = _watch(engine.checkpoint_engine, "save")
    _watch(engine.checkpoint_engine, "makedirs")
    owner, name = compat.recovery_script_step(engine)
    scripts = _watch(owner, name)
    engine.save_checkpoint(str(directory), tag="t", client_state={"ours": 7}, save_latest=False)
    told["calls of the recovery step"] = len(scripts)
    told["written by save"] = sorted(Path(call["path"]).name for call in written)
    told["on disk"] = sorted(path.name for path in (directory / "t").iterdir())
    state = torch.load(compat.model_state_file(str(directory / "t"), stage), weights_only=False)
    told["client state"] = state["ours"]
    print(json.dumps(told))


def _handed_out(engine: Any) -> dict[str, bool]:
    """Whether a name that is given is written, and one that is not stays."""
    holder = LightningModule()
    holder.net = engine.module
    strategy = DeepSpeedStrategy(stage=3)
    strategy.connect(holder)
    parameters = dict(holder.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        old = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    compat.hand_out_weights(strategy, {"net.0.weight": old["net.0.weight"] + 1})
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: torch.equal(parameter, old[name]) for name, parameter in parameters.items()}


def _watch(owner: Any, name: str) -> list[dict[str, Any]]:
    """Put a recorder in the place of a method; the arguments of the calls that go through it, by name."""
    calls: list[dict[str, Any]] = []
    method: Callable[..., Any] = getattr(owner, name)
    signature = inspect.signature(method)

    def record(*args: Any, **kwargs: Any) -> Any:
        calls.append(signature.bind(*args, **kwargs).arguments)
        return method(*args, **kwargs)

    setattr(owner, name, record)
    return calls


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
