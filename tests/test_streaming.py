"""A source that is read on the fly: what is held out, what each rank sees, and a run that continues anywhere."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from process_group import run_workers
from row_files import lines, written
from stream_worker import PIECE_BYTES, both
from test_callbacks import module_for, trainer_for
from test_data import Recorder, decoded, ids_of, pairs, recorded

from callbacks import BlockDrop
from pdtrim_pl.criteria import CosineRedundancy
from pdtrim_pl.data import Lengths, Parts, PromptResponseDataModule, TextSource, pieces
from pdtrim_pl.data.mixture import MixedIn
from pdtrim_pl.data.settings import Streaming
from pdtrim_pl.data.stream_loader import Bookmark, Share, StreamLoader
from pdtrim_pl.merging import Merging
from pdtrim_pl.search import Guards

ROWS = 120
PAIRS = ("question", "b ")
"""How prompts begin that are not windows of a text."""
FEW = Parts(validation=4, calibration=3, test=2)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", PIECE_BYTES)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return written(tmp_path, lines(*pairs(ROWS)))


def streamed(tokenizer: Path, path: str, **settings: Any) -> PromptResponseDataModule:
    streaming = Streaming(settings.pop("examples", 24), settings.pop("buffer", 10))
    source = TextSource(path, streaming=streaming, **settings.pop("source", {}))
    settings = {"lengths": Lengths(64, 4, 32), "batch_size": 4, "parts": FEW} | settings
    return PromptResponseDataModule(str(tokenizer), source, **settings)


def loader_of(module: PromptResponseDataModule) -> StreamLoader:
    module.setup()
    loader = module.train_dataloader()
    assert isinstance(loader, StreamLoader)
    return loader


def prompts(module: PromptResponseDataModule, name: str) -> list[str]:
    return [str(module.tokenizer.decode(example.prompt)) for example in module.part(name)]


def training(module: PromptResponseDataModule) -> list[list[int]]:
    """All prompts for training, in the order of the source."""
    return ids_of(list(module.fitting_dataloader()))


def test_parts_come_from_the_head_and_training_never_sees_them(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    rows = pairs(ROWS)
    path = written(tmp_path, lines(*rows, *rows[:12]))  # the head again at the end
    module = streamed(tiny_tokenizer_dir, path, examples=400, parts=FEW)
    loader = loader_of(module)
    held_out = [text for name in ("validation", "calibration", "test") for text in prompts(module, name)]
    assert [len(module.part(name)) for name in ("validation", "calibration", "test")] == [4, 3, 2]
    assert len(set(held_out)) == 9
    head = ROWS - len({tuple(ids) for ids in training(module)})
    assert 9 <= head <= 12
    assert set(held_out) <= {row["prompt"] for row in rows[:head]}
    seen = {str(module.tokenizer.decode(ids)) for ids in ids_of(list(loader))}
    assert seen == {row["prompt"] for row in rows[head:]}, "three passes saw everything behind the head, and no more"


def test_an_epoch_goes_on_where_the_last_one_ended(tiny_tokenizer_dir: Path, path: str) -> None:
    module = streamed(tiny_tokenizer_dir, path, examples=36, parts=Parts(0, 0))
    loader = loader_of(module)
    assert len(loader) == 9
    epochs = [ids_of(list(loader)) for _ in range(4)]
    assert len({tuple(ids) for epoch in epochs[:3] for ids in epoch}) == 108, "no example again within a pass of 120"
    longer = loader_of(streamed(tiny_tokenizer_dir, path, examples=144, parts=Parts(0, 0)))
    assert ids_of(list(longer)) == list(itertools.chain(*epochs))
    assert sorted(ids_of(list(longer))) != ids_of(list(longer))


@pytest.mark.parametrize("buffer", [1, 10, 150])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_continues_in_the_middle_of_an_epoch(
    workers: int, buffer: int, tiny_tokenizer_dir: Path, path: str
) -> None:
    modules = [
        streamed(tiny_tokenizer_dir, path, num_workers=number, buffer=buffer)
        for number in (workers, workers, 2 - workers)
    ]
    whole, stopped, resumed = (loader_of(module) for module in modules)
    expected = [ids_of(list(whole)) for _ in range(3)]
    before = [ids_of(list(stopped)), ids_of(list(itertools.islice(iter(stopped), 2)))]
    modules[2].load_state_dict(json.loads(json.dumps(modules[1].state_dict())))
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.state_dict() == stopped.state_dict() == {"batches_given": 2}
    torch.manual_seed(5)  # the order depends on no global generator
    assert [before[0], before[1] + ids_of(list(resumed))] == expected[:2]
    assert resumed.state_dict() == {"batches_given": 0}
    assert ids_of(list(resumed)) == expected[2]


def test_seeds_give_different_orders(tiny_tokenizer_dir: Path, path: str) -> None:
    found = [ids_of(list(loader_of(streamed(tiny_tokenizer_dir, path, seed=seed)))) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


class Ranks:
    def __init__(self, rank: int, ranks: int) -> None:
        self.distributed_sampler_kwargs = {"num_replicas": ranks, "rank": rank}


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_every_pass_and_give_equally_many_batches(ranks: int, tiny_tokenizer_dir: Path, path: str) -> None:
    shares = []
    for rank in range(ranks):
        module = streamed(tiny_tokenizer_dir, path, examples=ranks * 24, buffer=5)
        module.trainer = Ranks(rank, ranks)  # type: ignore[assignment]
        shares.append({tuple(ids) for ids in ids_of(list(loader_of(module)))})
        assert len(shares[-1]) == 24
    assert len(set[tuple[int, ...]]().union(*shares)) == 24 * ranks, "no example on two ranks"


def test_local_fits_read_training_text_in_the_order_of_the_source(tiny_tokenizer_dir: Path, path: str) -> None:
    module = streamed(tiny_tokenizer_dir, path)
    module.setup()
    batches = list(module.fitting_dataloader())
    texts = [decoded(tiny_tokenizer_dir, torch.tensor(ids)) for ids in ids_of(batches)]
    assert texts == [f"question {number}" for number in range(ROWS - len(texts), ROWS)]
    assert len(texts) > ROWS - 20
    assert [len(batch.prompt_ids) for batch in batches[:-1]] == [4] * (len(batches) - 1)
    assert ids_of(list(itertools.islice(module.fitting_dataloader(), 2))) == ids_of(batches[:2])


def test_repeated_prompts_and_weights_work_in_a_stream(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "a"}
    chats = [{"messages": [{"role": "user", "content": f"{n}"}, {**answer, "weight": 1 + n % 2}]} for n in range(ROWS)]
    parts = Parts(2, 2, repeated_training_prompts=0.25)
    path = written(tmp_path, lines(*chats))
    loader = loader_of(streamed(tiny_tokenizer_dir, path, parts=parts, examples=100, buffer=110))
    batches = list(loader)
    again = [
        torch.equal(prompt[seen], response[said][: seen.sum()])
        for batch in batches
        for prompt, seen, response, said in zip(*batch[:4], strict=True)
    ]
    assert 0.2 <= sum(again) / len(again) <= 0.3
    weights = torch.cat([batch.response_weights[:, 0] for batch in batches])
    assert weights.max() == pytest.approx(2 * float(weights.min()))
    assert weights.mean() == pytest.approx(1, abs=0.05)


@pytest.fixture
def mixed(path: str, tmp_path: Path) -> list[MixedIn]:
    """Two sources more, one of which shares its head with the first source."""
    other = written(tmp_path, lines(*pairs(12), *[{"prompt": f"b {n}", "response": "b"} for n in range(50)]), "b.jsonl")
    text = written(tmp_path, "".join(f"{number} squared is {number**2}.\n" for number in range(300)).encode(), "c.txt")
    return [MixedIn(TextSource(other), 0.25), MixedIn(TextSource(text), 0.25)]


def test_a_stream_of_several_sources_has_their_shares(
    mixed: list[MixedIn], tiny_tokenizer_dir: Path, path: str
) -> None:
    lengths = Lengths(max_length=24, min_prompt=8, max_prompt=16)
    module = streamed(
        tiny_tokenizer_dir, path, mixed_in=mixed, examples=80, buffer=8, parts=Parts(8, 8), lengths=lengths
    )
    loader = loader_of(module)
    held_out = [text for name in ("validation", "calibration") for text in prompts(module, name)]
    assert len(set(held_out)) == 16
    assert sorted(text.startswith(PAIRS) for text in held_out) == [False] * 4 + [True] * 12
    seen = [str(module.tokenizer.decode(ids)) for ids in ids_of(list(loader))]
    assert len(seen) == 80
    for first in range(0, 80, 8):
        buffer = seen[first : first + 8]
        assert sum(text.startswith("question") for text in buffer) >= 4
        assert sum(not text.startswith(PAIRS) for text in buffer) == 2
    assert not set(seen) & set(held_out)
    fitted = [decoded(tiny_tokenizer_dir, torch.tensor(ids)) for ids in training(module)][:64]
    assert sum(not text.startswith(PAIRS) for text in fitted) == 16


def test_a_stream_of_several_sources_continues_anywhere(
    mixed: list[MixedIn], tiny_tokenizer_dir: Path, path: str
) -> None:
    def module() -> PromptResponseDataModule:
        lengths = Lengths(max_length=24, min_prompt=8, max_prompt=16)
        return streamed(tiny_tokenizer_dir, path, mixed_in=mixed, examples=40, buffer=12, lengths=lengths)

    whole = loader_of(module())
    expected = [ids_of(list(whole)) for _ in range(2)]
    for stop in (1, 3, 7, 10):
        first, second = module(), module()
        stopped, resumed = loader_of(first), loader_of(second)
        before = ids_of(list(itertools.islice(iter(stopped), stop)))
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        resumed.load_state_dict(stopped.state_dict())
        after = ids_of(list(resumed))
        assert before + after + (ids_of(list(resumed)) if stop < 10 else []) == [*expected[0], *expected[1]]


def test_a_buffer_too_small_for_a_share_is_refused(mixed: list[MixedIn], tiny_tokenizer_dir: Path, path: str) -> None:
    with pytest.raises(ValueError, match=r"`source.streaming.buffer`=1 is too small for the shares of `mixed_in`"):
        loader_of(streamed(tiny_tokenizer_dir, path, mixed_in=mixed, buffer=1))


def test_a_checkpoint_of_other_sources_is_refused(mixed: list[MixedIn], tiny_tokenizer_dir: Path, path: str) -> None:
    state = streamed(tiny_tokenizer_dir, path).state_dict()
    with pytest.raises(ValueError, match=r"of 1 streamed source\(s\), and `source` with `mixed_in` are 3\. Continue"):
        streamed(tiny_tokenizer_dir, path, mixed_in=mixed).load_state_dict(state)


@pytest.mark.parametrize(("checkpoint", "batches"), [("step=3", 3), ("step=6", 6), ("step=8", 8), ("end-epoch=0", 6)])
def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(
    checkpoint: str, batches: int, tiny_tokenizer_dir: Path, path: str, tmp_path: Path
) -> None:
    def run(resume: str | None) -> Recorder:
        return recorded(streamed(tiny_tokenizer_dir, path), tmp_path, 2, resume)

    whole = run(None).seen
    assert len(whole) == 48
    assert run(checkpoint).seen == whole[batches * 4 :]


def test_a_run_drops_merges_and_trains_from_a_stream(tiny_llama_dir: Path, tmp_path: Path) -> None:
    text = written(tmp_path, "".join(f"{number} squared is {number**2}.\n" for number in range(400)).encode(), "a.txt")

    def run(folder: Path, **more: Any) -> dict[str, torch.Tensor]:
        lengths = Lengths(max_length=24, min_prompt=8, max_prompt=16)
        data = streamed(tiny_llama_dir, text, examples=16, parts=Parts(4, 4), lengths=lengths)
        drops = BlockDrop("decode", CosineRedundancy(), {0: 1, 1: 1}, Guards(0, 1), merging=Merging(steps=2))
        module = module_for(tiny_llama_dir)
        torch.manual_seed(0)
        trainer_for(folder, [drops], max_epochs=2).fit(module, datamodule=data, **more)
        assert len(module.plan.decode) == len(module.plan.prefill) - 2
        return module.state_dict()

    whole = run(tmp_path / "whole")
    again = run(tmp_path / "again", ckpt_path=tmp_path / "whole" / "checkpoints" / "epoch=0.ckpt")
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


@pytest.mark.slow
def test_two_processes_continue_where_each_of_them_was(tiny_tokenizer_dir: Path, path: str, tmp_path: Path) -> None:
    run_workers(both, str(tiny_tokenizer_dir), path, tmp_path, folder=tmp_path, timeout=120)
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in range(2)]
    assert told[0]["state"] == told[1]["state"]
    assert len(told[0]["state"]["positions"]) == 2
    for rank in told:
        assert rank["before"] + rank["after"] == rank["whole"]
        assert rank["before"] != []
    assert not {tuple(ids) for ids in told[0]["whole"]} & {tuple(ids) for ids in told[1]["whole"]}


def test_settings_that_need_the_whole_text_are_refused_together(tiny_tokenizer_dir: Path, path: str) -> None:
    parts = Parts(max_train=9)
    mixed = [MixedIn(TextSource(path, streaming=Streaming(9)), 0.5)]
    said = (
        r"`batches: by_length` .*; `mixed_in` is streamed .*; `tokenize_workers` tokenises .*; `parts.max_train` cuts"
    )
    with pytest.raises(ValueError, match=said):
        streamed(tiny_tokenizer_dir, path, parts=parts, mixed_in=mixed, tokenize_workers=2, batches="by_length")
    with pytest.raises(ValueError, match=r"`mixed_in` is streamed as `source` is: set `streaming` of `source` alone"):
        PromptResponseDataModule(str(tiny_tokenizer_dir), TextSource(path), mixed_in=mixed)
    module = streamed(tiny_tokenizer_dir, path)
    module.setup()
    with pytest.raises(ValueError, match=r"reads training text on the fly, and this needs all of it .* Leave"):
        module.part("train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": Parts(validation=500, calibration=0)}, r"500 examples: its first (\d+) of \1 pieces have 120"),
        ({"examples": 3}, r"`source.streaming.examples`=3 is less than one step of 4 examples"),
        ({"source": {"prompt_column": "q", "response_column": "a"}}, r"has no column `q`"),
    ],
)
def test_a_stream_that_cannot_be_is_refused(
    settings: dict[str, Any], message: str, tiny_tokenizer_dir: Path, path: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loader_of(streamed(tiny_tokenizer_dir, path, **settings))


def test_too_little_text_is_refused(tiny_tokenizer_dir: Path, path: str, tmp_path: Path) -> None:
    module = streamed(tiny_tokenizer_dir, path, examples=4000)
    module.trainer = Ranks(0, 100)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"\d+ pieces of text for training, and 100 ranks need one each"):
        loader_of(module)
    short = written(tmp_path, lines(*[{"text": "short"}] * 30), "short.jsonl")
    loader = loader_of(streamed(tiny_tokenizer_dir, short, parts=Parts(0, 0), lengths=Lengths(400, 1, 200)))
    with pytest.raises(ValueError, match=r"no piece of the text has an example for training"):
        next(iter(loader))
    with pytest.raises(ValueError, match=r"`source.streaming.buffer`=0 must be at least 1"):
        Streaming(8, 0)


def test_a_token_without_an_embedding_is_refused(tiny_llama_dir: Path, path: str) -> None:
    module = streamed(tiny_llama_dir, path, parts=Parts(0, 0))
    module.setup()
    (source,) = module._streamed
    source.vocab_size = 100
    loader = StreamLoader([source], Streaming(8), Share(batch_size=4), Bookmark(1), 0, lambda part: part)
    with pytest.raises(ValueError, match=r"the model's vocabulary has 100"):
        next(iter(loader))


def test_streaming_is_read_from_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False, parser_mode="omegaconf")
    parser.add_class_arguments(PromptResponseDataModule, "data")
    yaml = "{data: {tokenizer: x, source: {path: a.jsonl, streaming: {examples: 1000}}}}"
    assert parser.instantiate(parser.parse_string(yaml)).data.source.streaming == Streaming(1000, 4096)
