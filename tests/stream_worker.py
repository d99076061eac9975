"""One of two gloo processes that read a stream, for `test_streaming.py`."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import torch.distributed as dist

from pdtrim_pl.data import Batch, Lengths, Parts, TextSource, pieces
from pdtrim_pl.data.datamodule import PromptResponseDataModule
from pdtrim_pl.data.settings import Streaming
from pdtrim_pl.data.stream_loader import StreamLoader

PIECE_BYTES = 120


class _Ranks:
    def __init__(self, rank: int) -> None:
        self.distributed_sampler_kwargs = {"num_replicas": 2, "rank": rank}


def both(rank: int, meeting_point: Path, tokenizer: str, path: str, folder: Path) -> None:
    """Stop and continue in the middle; what this process saw goes to `folder/told-RANK.json`."""
    pieces.PIECE_BYTES = PIECE_BYTES
    dist.init_process_group("gloo", init_method=meeting_point.as_uri(), rank=rank, world_size=2)

    def loader() -> tuple[PromptResponseDataModule, StreamLoader]:
        source = TextSource(path, streaming=Streaming(80, buffer=7))
        data = PromptResponseDataModule(tokenizer, source, Lengths(64, 4, 32), Parts(4, 4), batch_size=4)
        data.setup()
        data.trainer = _Ranks(rank)  # type: ignore[assignment]
        made = data.train_dataloader()
        assert isinstance(made, StreamLoader)
        return data, made

    (data, stopped), (later, resumed), (_, whole) = loader(), loader(), loader()
    before = _ids(list(islice(iter(stopped), 5)))
    state = data.state_dict()
    later.load_state_dict(state)
    resumed.load_state_dict(stopped.state_dict())
    told = {"state": state, "before": before, "after": _ids(list(resumed)), "whole": _ids(list(whole))}
    (folder / f"told-{rank}.json").write_text(json.dumps(told), encoding="utf-8")
    dist.destroy_process_group()


def _ids(batches: list[Batch]) -> list[list[int]]:
    return [row[mask].tolist() for batch in batches for row, mask in zip(batch[0], batch[1], strict=True)]
