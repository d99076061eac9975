"""From text to batches: lengths, split points, parts, padding, and loaders that continue where they stopped."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.utils.data import Subset

from pdtrim_pl.data import (
    Batch,
    Collator,
    Example,
    Lengths,
    Parts,
    PromptResponseDataModule,
    TextSource,
    TokenExamples,
    check_context,
    check_vocabulary,
    formatting,
)
from pdtrim_pl.data.datamodule import cut_parts
from pdtrim_pl.data.examples import RepeatedPrompts
from pdtrim_pl.data.formatting import encode, leading_ids
from pdtrim_pl.data.mixture import MixedIn
from pdtrim_pl.data.sources import load_rows
from pdtrim_pl.models.pretrained import load_tokenizer

SHORT = Lengths(max_length=24, min_prompt=4, max_prompt=16)


def write_rows(directory: Path, rows: list[dict[str, Any]]) -> str:
    path = directory / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"question {index}", "response": f"answer {index}"} for index in range(count)]


def make_module(tokenizer: Path, path: str, **settings: Any) -> PromptResponseDataModule:
    settings = {"lengths": SHORT, "batch_size": 4} | settings
    return PromptResponseDataModule(str(tokenizer), TextSource(path=path), **settings)


def encoded(tokenizer_dir: Path, path: str, lengths: Lengths = SHORT, seed: int = 0) -> TokenExamples:
    return encode(load_rows(TextSource(path=path)), load_tokenizer(str(tokenizer_dir)), lengths, seed)


def decoded(tokenizer_dir: Path, ids: Tensor) -> str:
    text = load_tokenizer(str(tokenizer_dir)).decode(ids)
    assert isinstance(text, str)
    return text


def ids_of(batches: list[Batch]) -> list[list[int]]:
    return [
        row[mask].tolist() for batch in batches for row, mask in zip(batch.prompt_ids, batch.prompt_mask, strict=True)
    ]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"min_prompt": 0}, "`lengths.min_prompt`=0"),
        ({"min_prompt": 9, "max_prompt": 8}, "at most `lengths.max_prompt`=8"),
        ({"max_length": 192}, "leaves no token for the response within `lengths.max_length`=192"),
    ],
)
def test_impossible_lengths_are_refused(settings: dict[str, int], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Lengths(**settings)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"validation": -1}, "`parts.validation`=-1"),
        ({"test": 1.0}, "`parts.test`=1.0"),
        ({"max_train": 0}, "`parts.max_train`=0"),
    ],
)
def test_impossible_parts_are_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Parts(**settings)


def test_parts_that_leave_nothing_for_training_are_refused() -> None:
    with pytest.raises(ValueError, match=r"10 distinct examples; `parts.validation`=9, .* leave none"):
        Parts(validation=9).sizes(10)


def test_a_share_of_few_examples_still_gives_one() -> None:
    assert Parts().sizes(5) == {"validation": 1, "calibration": 1, "test": 0, "train": 3}


def test_windows_hold_the_whole_text_once_with_eos_between_documents(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path, [{"text": "a" * 30}, {"text": ""}, {"text": "b" * 30}])
    examples = encoded(tiny_tokenizer_dir, path)
    stream = torch.cat([torch.cat(examples[index]) for index in range(len(examples))])
    assert len(examples) == 2
    assert decoded(tiny_tokenizer_dir, stream) == "a" * 30 + "<eos>" + "b" * 17


def test_a_file_is_tokenised_once_and_then_taken_from_the_cache(
    tiny_tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path, [{"text": "cache me " * 20}])
    first = encoded(tiny_tokenizer_dir, path)

    def _text_ids(*_: Any, **__: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(formatting, "_text_ids", _text_ids)
    again = encoded(tiny_tokenizer_dir, path, seed=1)
    assert torch.equal(torch.cat(first[0]), torch.cat(again[0]))
    write_rows(tmp_path, [{"text": "another text " * 20}])
    with pytest.raises(AssertionError, match="tokenised again"):
        encoded(tiny_tokenizer_dir, path)


def test_split_points_reach_both_ends_and_depend_on_the_seed(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path, [{"text": "x" * 6000}])
    first, again, other = (encoded(tiny_tokenizer_dir, path, seed=seed) for seed in (0, 0, 1))
    lengths = [len(first[index].prompt) for index in range(len(first))]
    assert min(lengths) == SHORT.min_prompt
    assert max(lengths) == SHORT.max_prompt
    assert lengths == [len(again[index].prompt) for index in range(len(again))]
    assert lengths != [len(other[index].prompt) for index in range(len(other))]
    assert all(len(first[index].prompt) + len(first[index].response) == 24 for index in range(len(first)))


def test_text_shorter_than_a_window_is_refused(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path, [{"text": "short"}])
    with pytest.raises(ValueError, match=r"data\.jsonl has 6 tokens, less than one window of `lengths.max_length`=24"):
        encoded(tiny_tokenizer_dir, path)


def test_a_tokenizer_with_a_leading_token_starts_every_window_with_it(tiny_llama_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_llama_dir))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    assert leading_ids(tokenizer) == [1]
    examples = encode(load_rows(TextSource(path=write_rows(tmp_path, [{"text": "x" * 100}]))), tokenizer, SHORT, 0)
    assert len(examples) == 101 // 23
    assert all(examples[index].prompt[0] == 1 for index in range(len(examples)))
    assert all(torch.cat(examples[index]).shape == (24,) for index in range(len(examples)))


def test_a_long_prompt_keeps_its_end_and_a_long_response_its_start(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    path = write_rows(
        tmp_path, [{"prompt": "0123456789" * 3, "response": "abcdefghij"}, {"prompt": "hi", "response": "yo"}]
    )
    examples = encoded(tiny_tokenizer_dir, path)
    assert [decoded(tiny_tokenizer_dir, ids) for ids in examples[0]] == ["4567890123456789", "abcdefgh"]
    assert [decoded(tiny_tokenizer_dir, ids) for ids in examples[1]] == ["hi", "yo<eos>"]


def test_a_chat_is_split_before_the_last_assistant_message(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    turns = ["user:hi", "assistant:yo", "user:why", "assistant:so", "user:thanks"]
    chat = [dict(zip(("role", "content"), turn.split(":"), strict=True)) for turn in turns]
    path = write_rows(tmp_path, [{"messages": chat}])
    prompt, response = encoded(tiny_tokenizer_dir, path, Lengths(256, 1, 192))[0]
    expected = "<bos>user\nhi<eos>\n<bos>assistant\nyo<eos>\n<bos>user\nwhy<eos>\n<bos>assistant\n"
    assert decoded(tiny_tokenizer_dir, prompt) == expected
    assert decoded(tiny_tokenizer_dir, response) == "so<eos>"


def test_a_long_chat_keeps_its_system_message_and_its_end(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    turns = ["system:obey", "user:" + "0123456789" * 9, "assistant:so"]
    chat = [dict(zip(("role", "content"), turn.split(":"), strict=True)) for turn in turns]
    path = write_rows(tmp_path, [{"messages": chat}, {"messages": chat[1:]}])
    first, second = encoded(tiny_tokenizer_dir, path, Lengths(64, 1, 40))
    assert len(first.prompt) == len(second.prompt) == 40
    ending = "456789<eos>\n<bos>assistant\n"
    system = "<bos>system\nobey<eos>\n"
    assert decoded(tiny_tokenizer_dir, first.prompt).startswith(system)
    assert decoded(tiny_tokenizer_dir, first.prompt).endswith(ending)
    assert decoded(tiny_tokenizer_dir, second.prompt).endswith("0123" + ending)
    assert torch.equal(first.response, second.response)
    (first, _) = encoded(tiny_tokenizer_dir, path, Lengths(64, 1, 12))
    assert decoded(tiny_tokenizer_dir, first.prompt) == "\n<bos>assistant\n", "no room for the system message"


def test_a_mixture_has_the_shares_that_were_asked_for_and_no_example_twice(
    tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    paths = []
    for name, count in (("a", 40), ("b", 9), ("c", 30)):
        (tmp_path / name).mkdir()
        rows = [{"prompt": f"{name} {index}", "response": f"answer {index}"} for index in range(count)]
        paths.append(write_rows(tmp_path / name, rows))
    mixed = [MixedIn(TextSource(paths[1]), 0.25), MixedIn(TextSource(paths[2]), 0.25)]
    parts = Parts(validation=4, calibration=4)
    modules = [make_module(tiny_tokenizer_dir, paths[0], mixed_in=mixed, parts=parts, seed=1) for _ in range(2)]
    found = []
    for module in modules:
        module.setup("fit")
        examples = [example for name in ("train", "validation", "calibration") for example in module.part(name)]
        found.append([decoded(tiny_tokenizer_dir, example.prompt) for example in examples])
    assert found[0] == found[1]
    assert len(set(found[0])) == 36
    assert sorted(text[0] for text in found[0]) == [*"a" * 18, *"b" * 9, *"c" * 9]


def test_a_mixture_that_is_not_possible_is_refused(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`mixed_in` has the share 1\.0: give a number between 0 and 1"):
        MixedIn(TextSource("a.txt"), 1.0)
    half = MixedIn(TextSource(write_rows(tmp_path, pairs(3))), 0.5)
    with pytest.raises(ValueError, match="The shares of `mixed_in` add up to 1, and `source` needs some"):
        make_module(tiny_tokenizer_dir, "a.txt", mixed_in=[half, half])
    rare = make_module(tiny_tokenizer_dir, half.source.path, mixed_in=[MixedIn(half.source, 0.05)])
    with pytest.raises(ValueError, match="the sources have 3, 3 examples, too few for one of each at these shares"):
        rare.setup("fit")


def test_every_assistant_message_can_be_an_example(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    turns = [
        "assistant:welcome",
        "user:hi",
        "assistant:yo",
        "user:why",
        "assistant:",
        "user:?",
        "assistant:so",
        "user:ok",
    ]
    chat = [dict(zip(("role", "content"), turn.split(":"), strict=True)) for turn in turns]
    path = write_rows(tmp_path, [{"messages": chat}, {"messages": chat[1:3]}])
    tokenizer, lengths = load_tokenizer(str(tiny_tokenizer_dir)), Lengths(256, 1, 192)
    every = encode(load_rows(TextSource(path, turns="all")), tokenizer, lengths, 0)
    assert [decoded(tiny_tokenizer_dir, example.response) for example in every] == ["yo<eos>", "so<eos>", "yo<eos>"]
    alone = write_rows(tmp_path / "..", [{"messages": chat[: end + 1]} for end in (2, 6)] + [{"messages": chat[1:3]}])
    for found, expected in zip(every, encoded(tiny_tokenizer_dir, alone, lengths), strict=True):
        assert torch.equal(found.prompt, expected.prompt)


def test_a_bad_chat_is_named_where_every_message_is_an_example(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write_rows(tmp_path, [{"messages": good * 3}, {"messages": good}, {"messages": [{"role": "user"}]}])
    tokenizer = load_tokenizer(str(tiny_tokenizer_dir))
    with pytest.raises(ValueError, match="line 3: column `messages` must hold messages"):
        encode(load_rows(TextSource(path, turns="all")), tokenizer, SHORT, 0)
    with pytest.warns(UserWarning, match=r"data.jsonl, line 3: column `messages` must hold"):
        kept = encode(load_rows(TextSource(path, turns="all", on_bad_row="skip")), tokenizer, SHORT, 0)
    assert len(kept) == 4
    with pytest.raises(ValueError, match=r"`source\.turns`='some' must be `last` or `all`"):
        TextSource(path, turns="some")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "", "response": "b"}, "line 2: column `prompt` is empty"),
        ({"prompt": "a", "response": "  "}, "line 2: column `response` is empty"),
        ({"prompt": "a"}, "line 2: column `response` holds nothing, not a str"),
        ({"prompt": "a", "response": 5}, "line 2: column `response` holds a int, not a str"),
    ],
)
def test_an_empty_field_is_named(row: dict[str, Any], message: str, tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path, [{"prompt": "a", "response": "b"}, row])
    with pytest.raises(ValueError, match=rf"data\.jsonl, {message}"):
        encoded(tiny_tokenizer_dir, path)


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([], "is empty"),
        ([{"role": "assistant", "content": "a"}], "has no assistant message after"),
        ([{"role": "user", "content": "a"}], "has no assistant message after"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}],
            "has an empty last",
        ),
    ],
)
def test_an_unusable_chat_is_named(chat: list[Any], message: str, tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write_rows(tmp_path, [{"messages": good}, {"messages": chat}])
    with pytest.raises(ValueError, match=rf"line 2: column `messages` {message}"):
        encoded(tiny_tokenizer_dir, path)


def test_prompts_are_padded_on_the_left_and_responses_on_the_right() -> None:
    rows = [Example(torch.tensor([5, 6]), torch.tensor([7])), Example(torch.tensor([8]), torch.tensor([9, 3, 4]))]
    batch = Collator(pad_id=1)(rows)
    assert batch.prompt_ids.tolist() == [[5, 6], [1, 8]]
    assert batch.prompt_mask.tolist() == [[True, True], [False, True]]
    assert batch.response_ids.tolist() == [[7, 1, 1], [9, 3, 4]]
    assert batch.response_mask.tolist() == [[True, False, False], [True, True, True]]


@given(
    tokens=st.lists(st.integers(0, 20), min_size=10, max_size=60),
    shares=st.tuples(*[st.one_of(st.integers(0, 3), st.floats(0, 0.3))] * 3),
    seed=st.integers(0, 99),
)
def test_parts_are_disjoint_and_without_duplicates(tokens: list[int], shares: tuple[float, ...], seed: int) -> None:
    examples = TokenExamples.from_pairs([([token], [token, token]) for token in tokens])
    try:
        parts = cut_parts(examples, Parts(*shares), seed)
    except ValueError as error:
        assert "leave none for training" in str(error)  # noqa: PT017
        return
    seen = [int(example.prompt) for part in parts.values() for example in part]
    assert sorted(seen) == sorted(set(tokens))


def test_limits_cut_the_parts() -> None:
    examples = TokenExamples.from_pairs([([token], [token]) for token in range(20)])
    limits = Parts(validation=0.3, calibration=5, max_train=6, max_validation=2, max_calibration=3)
    sizes = {name: len(part) for name, part in cut_parts(examples, limits, seed=0).items()}
    assert sizes == {"validation": 2, "calibration": 3, "test": 0, "train": 6}


def test_two_setups_give_the_same_batches(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path, pairs(30))
    first, second, other = (make_module(tiny_tokenizer_dir, path, seed=seed) for seed in (0, 0, 1))
    for module in (first, second, other):
        module.prepare_data()
        module.setup("fit")
    for name in ("train_dataloader", "val_dataloader", "calibration_dataloader"):
        loaders = [getattr(module, name)() for module in (first, second, other)]
        batches = [ids_of(list(loader)) for loader in loaders]
        assert batches[0] == batches[1]
        assert batches[0] != batches[2]


def test_a_part_that_was_not_asked_for_is_named(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    module = make_module(tiny_tokenizer_dir, write_rows(tmp_path, pairs(20)))
    module.setup()
    with pytest.raises(ValueError, match=r"The data has no test part; set `parts.test`"):
        module.test_dataloader()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_continues_in_the_middle_of_an_epoch(workers: int, tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    module = make_module(tiny_tokenizer_dir, write_rows(tmp_path, pairs(30)), num_workers=workers)
    module.setup()
    whole = ids_of(list(module.train_dataloader()))
    stopped, resumed = module.train_dataloader(), module.train_dataloader()
    given_before = ids_of(list(itertools.islice(iter(stopped), 2)))
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.state_dict() == stopped.state_dict()
    assert given_before + ids_of(list(resumed)) == whole
    assert resumed.state_dict() == {"batches_given": 0}
    assert ids_of(list(resumed)) == whole


class Recorder(LightningModule):
    """Records the prompts it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[int]]] = []

    def training_step(self, batch: Batch, _: int) -> Tensor:
        self.seen += [(self.current_epoch, ids) for ids in ids_of([batch])]
        return self.weight * 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def recorded(data: PromptResponseDataModule, folder: Path, epochs: int, resume: str | None) -> Recorder:
    """A run that saves a checkpoint at every step and epoch, or continues from the one of this name."""
    savers: list[Callback] = [
        ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1),
        ModelCheckpoint(folder, filename="end-{epoch}", save_on_train_epoch_end=True, save_top_k=-1),
    ]
    trainer = Trainer(
        accelerator="cpu", default_root_dir=folder, max_epochs=epochs, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=savers,
    )  # fmt: skip
    recorder = Recorder()
    trainer.fit(recorder, datamodule=data, ckpt_path=None if resume is None else str(folder / f"{resume}.ckpt"))
    return recorder


@pytest.mark.parametrize(
    ("checkpoint", "batches"),
    [("step=3", 3), ("step=6", 6), ("step=8", 8), ("step=12", 12), ("end-epoch=0", 6), ("end-epoch=1", 12)],
)
def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(
    checkpoint: str, batches: int, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    path = write_rows(tmp_path, pairs(30))  # 24 for training: 6 batches an epoch

    def run(resume: str | None) -> Recorder:
        return recorded(make_module(tiny_tokenizer_dir, path), tmp_path, 3, resume)

    whole = run(None).seen
    assert len(whole) == 3 * 24
    epochs = [[ids for epoch, ids in whole if epoch == number] for number in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]
    assert run(checkpoint).seen == whole[batches * 4 :]


def test_each_rank_gets_its_own_share_of_the_training_part(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    class TwoRanks:
        def __init__(self, rank: int) -> None:
            self.distributed_sampler_kwargs = {"num_replicas": 2, "rank": rank}

    module = make_module(tiny_tokenizer_dir, write_rows(tmp_path, pairs(30)))
    module.setup()
    whole = ids_of(list(module.train_dataloader()))
    shares = []
    for rank in range(2):
        module.trainer = TwoRanks(rank)  # type: ignore[assignment]
        shares.append(ids_of(list(module.train_dataloader())))
    assert sorted(shares[0] + shares[1]) == sorted(whole)


def test_examples_longer_than_the_context_are_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    lengths = Lengths(max_length=1024)
    module = make_module(tiny_llama_dir, write_rows(tmp_path, pairs(30)), lengths=lengths)
    with pytest.raises(ValueError, match=r"`lengths.max_length`=1024 is longer than the .* 512"):
        module.setup()


def test_the_checks_accept_what_fits_and_name_what_does_not() -> None:
    check_context(512, 512)
    check_vocabulary(259, 259)
    with pytest.raises(ValueError, match="ids up to 259, the model's vocabulary has 259; set `tokenizer`"):
        check_vocabulary(260, 259)


@pytest.mark.parametrize("name", ["batch_size", "eval_batch_size", "num_workers", "seed"])
def test_impossible_loader_settings_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}`=-1"):
        PromptResponseDataModule("unused", **{name: -1})


def test_the_settings_are_read_from_yaml_and_unknown_keys_refused() -> None:
    parser = ArgumentParser(exit_on_error=False, parser_mode="omegaconf")
    parser.add_class_arguments(PromptResponseDataModule, "data")
    yaml = "{data: {tokenizer: x, source: {path: a.jsonl}, lengths: {max_length: 512}, parts: {validation: 8}}}"
    settings = parser.instantiate(parser.parse_string(yaml)).data
    assert settings.source == TextSource(path="a.jsonl")
    assert settings.lengths == Lengths(max_length=512)
    assert settings.parts == Parts(validation=8)
    with pytest.raises(Exception, match="paht"):
        parser.parse_string("{data: {tokenizer: x, source: {paht: a}}}")


def test_the_embedded_text_makes_training_batches(tiny_llama_dir: Path) -> None:
    module = PromptResponseDataModule(str(tiny_llama_dir), parts=Parts(max_train=16), batch_size=8)
    module.setup()
    batch = next(iter(module.train_dataloader()))
    lengths = batch.prompt_mask.sum(1) + batch.response_mask.sum(1)
    assert lengths.tolist() == [256] * 8
    assert np.isin(batch.prompt_ids.numpy(), range(259)).all()


def test_the_process_that_prepared_the_examples_reads_the_source_no_more(
    tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"{number} squared is {number**2}.\n" for number in range(100)))
    settings = {"lengths": Lengths(24, 8, 16), "parts": Parts(validation=2, calibration=2, max_train=4)}
    prepared, other = (
        PromptResponseDataModule(str(tiny_tokenizer_dir), TextSource(str(file)), **settings) for _ in range(2)
    )
    prepared.prepare_data()
    other.setup()
    file.unlink()
    prepared.setup()
    for name in ("train", "validation", "calibration"):
        for ours, theirs in zip(prepared.part(name), other.part(name), strict=True):
            assert torch.equal(ours.prompt, theirs.prompt)
            assert torch.equal(ours.response, theirs.response)


@given(
    share=st.floats(0.01, 1.0),
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6),
)
def test_a_share_of_examples_says_its_prompt_again(share: float, lengths: list[tuple[int, int]]) -> None:
    pairs = [(range(3, 3 + prompt), range(50, 50 + response)) for prompt, response in lengths]
    part = Subset(TokenExamples.from_pairs(pairs), range(len(pairs)))
    again = RepeatedPrompts(part, share, max_length=12)
    changed = max(1, round(share * len(pairs)))
    assert len(again) == len(part)
    for index, (prompt, response) in enumerate(pairs):
        told = prompt[: 12 - len(prompt)] if index < changed else response
        assert again[index].prompt.tolist() == list(prompt)
        assert again[index].response.tolist() == list(told) != []


def test_only_the_calibration_part_says_its_prompts_again(tiny_tokenizer_dir: Path) -> None:
    def module(share: float) -> PromptResponseDataModule:
        parts = Parts(validation=2, calibration=4, max_train=4, repeated_prompts=share)
        data = PromptResponseDataModule(str(tiny_tokenizer_dir), lengths=Lengths(24, 12, 12), parts=parts)
        data.setup()
        return data

    before, after = module(0.0), module(0.5)
    for name, changed in (("train", 0), ("validation", 0), ("calibration", 2)):
        same = [torch.equal(a.response, b.response) for a, b in zip(before.part(name), after.part(name), strict=True)]
        assert same == [index >= changed for index in range(len(same))]
    batch = next(iter(after.calibration_dataloader()))
    assert torch.equal(batch.prompt_ids[:2], batch.response_ids[:2])


@pytest.mark.parametrize(("count", "share", "changed"), [(8, 0.25, [0, 4]), (7, 0.5, [0, 1, 3, 5]), (3, 0.01, [0])])
def test_training_prompts_are_repeated_at_equal_distances(
    tiny_tokenizer_dir: Path, count: int, share: float, changed: list[int]
) -> None:
    parts = Parts(validation=2, calibration=2, max_train=count, repeated_training_prompts=share)
    data = PromptResponseDataModule(str(tiny_tokenizer_dir), lengths=Lengths(24, 12, 12), parts=parts)
    data.setup()
    again = [torch.equal(example.prompt, example.response) for example in data.part("train")]
    assert [index for index, same in enumerate(again) if same] == changed
    assert not any(torch.equal(example.prompt, example.response) for example in data.part("calibration"))


def test_a_share_said_again_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`parts.repeated_training_prompts`=-0.1 must be a share of the training"):
        Parts(repeated_training_prompts=-0.1)
    with pytest.raises(ValueError, match=r"`parts.repeated_prompts`=1.5 must be a share of the calibration examples"):
        Parts(repeated_prompts=1.5)


def test_an_example_of_two_sources_counts_once_and_the_shares_hold(
    tiny_tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    rows = [{"prompt": f"b {index}", "response": "b"} for index in range(30)]
    mixed = [MixedIn(TextSource(write_rows(tmp_path / "other", [*pairs(20), *rows])), 0.5)]
    sought: list[int] = []
    distinct = TokenExamples.distinct
    monkeypatch.setattr(TokenExamples, "distinct", lambda self: sought.append(len(self)) or distinct(self))
    module = make_module(tiny_tokenizer_dir, write_rows(tmp_path, pairs(20)), mixed_in=mixed, parts=Parts(2, 2))
    module.prepare_data()
    module.setup()
    assert sought == [70], "one search over everything"
    examples = [example for name in ("train", "validation", "calibration") for example in module.part(name)]
    found = [decoded(tiny_tokenizer_dir, example.prompt) for example in examples]
    assert len(set(found)) == len(found)
    assert sorted(text[0] for text in found) == [*"b" * 20, *"q" * 20]
