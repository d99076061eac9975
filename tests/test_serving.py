"""The two-process runtime: what crosses the wire, that it computes what one process computes, and how it fails."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch
from heard import Heard, together
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import plans, policies
from text_pieces import text_pieces
from tiny_models import tiny_model
from torch import Tensor
from transformers import AutoTokenizer

from pdtrim_pl.data.prompts import joined_stop_ids
from pdtrim_pl.export.pair import export_pair
from pdtrim_pl.plan import (
    KEEP_ALL,
    Boundary,
    Codec,
    KVRetentionPolicy,
    KVShape,
    ModelRef,
    Retention,
    Stage,
    StagePlan,
    handled_positions,
    write_manifest,
)
from pdtrim_pl.serving.devices import devices_of
from pdtrim_pl.serving.engine.engine import Engine
from pdtrim_pl.serving.engine.frames import FramedLink
from pdtrim_pl.serving.engine.handover import Handover, HandoverSender, Traffic, receive_handover, wire_dtype
from pdtrim_pl.serving.engine.requests import Ask, Done, Token
from pdtrim_pl.serving.generate import encode_prompt, generate_text, stop_ids_of
from pdtrim_pl.serving.sampling import Sampling
from pdtrim_pl.serving.text import CONTEXT, WINDOW, TextStream
from pdtrim_pl.staged import BlockKV, KVCache, Slots, StagedCausalLM
from pdtrim_pl.staged.decoding import generate
from pdtrim_pl.staged.description import reference_to

pytestmark = pytest.mark.usefixtures("forked_workers")
CPU = torch.device("cpu")
ON_CPU = ("cpu", "cpu")
TOLERANCE = 1e-4
FREE = {"prefill": (0, 2, 3), "decode": (0, 1, 3), "relation": "free", "untied": {"decode": (3,)}}
NESTED = {"prefill": (0, 1, 3), "decode": (0, 3), "relation": "nested", "untied": {"prefill": (0,)}}
ALL_DECODE = {"prefill": (1, 3), "decode": (0, 1, 2, 3), "relation": "prefill_only"}
RULES = {0: Retention("first_last", 2, 0.2), 3: Retention("first_last", 1, 30)}


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """Whatever a test does to a runtime, no worker outlives it."""
    yield
    assert not multiprocessing.active_children()


@pytest.fixture(scope="module")
def wire() -> Iterator[Callable[[Handover, StagePlan, KVRetentionPolicy], tuple]]:
    """A real connection between two threads: sends a handover and returns what arrived and both sides' counts."""
    ours, theirs = socket.socketpair()
    prefill, decode = (FramedLink(end, b"k" * 32, bytes(32), 2**20) for end in (ours, theirs))
    with ThreadPoolExecutor(1) as thread:

        def across(handover: Handover, plan: StagePlan, policy: KVRetentionPolicy) -> tuple:
            prefill.begin(1)
            sending = thread.submit(sent, prefill, handover, plan, policy)
            decode.next_request()
            arrived, received = receive_handover(decode, plan, policy, CPU)
            return arrived, sending.result(), received

        yield across
    ours.close()
    theirs.close()


def sent(link: FramedLink, handover: Handover, plan: StagePlan, policy: KVRetentionPolicy) -> Traffic:
    """What the prefill worker does with a prompt's whole cache."""
    with HandoverSender(link, plan, policy) as sender:
        sender.begin(handover.cache.lengths)
        for index in plan.decode:
            sender.send_block(index, handover.cache.blocks[index])
        return sender.end(handover.tokens, handover.logits)


def random_cache(plan: StagePlan, kv: KVShape, lengths: list[int], dtype: torch.dtype) -> KVCache:
    """A prompt's cache as prefill makes it, padded on the left."""
    generator = torch.Generator().manual_seed(sum(lengths))
    lengths_tensor, wide = torch.tensor(lengths), max(*lengths, 1)
    valid = torch.arange(wide)[None] >= wide - lengths_tensor[:, None]
    slots = Slots((valid.cumsum(dim=1) - 1).clamp(min=0), valid)
    shape = (len(lengths), kv.num_key_value_heads, wide, kv.head_dim)

    def block() -> BlockKV:
        keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        return BlockKV(keys, values, slots)

    return KVCache({index: block() for index in plan.decode}, lengths_tensor)


def entries(block: BlockKV, row: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, keys and values of one row's real entries, in order."""
    valid = block.slots.valid[row]
    return block.slots.positions[row][valid], block.keys[row][:, valid], block.values[row][:, valid]


@settings(max_examples=40)
@given(
    data=st.data(),
    plan=plans(4),
    prompts=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    with_logits=st.booleans(),
)
def test_the_wire_carries_exactly_what_the_policy_keeps_and_counts(
    wire: Callable, data: st.DataObject, plan: StagePlan, prompts: list[int], dtype: str, with_logits: bool
) -> None:
    policy = data.draw(policies(plan, kv=KVShape(2, 8, dtype), codecs=True))
    full = random_cache(plan, policy.kv, [handled_positions(p, plan.boundary) for p in prompts], wire_dtype(policy))
    kept = full.retained(policy)
    tokens = torch.arange(len(prompts)) + 5
    logits = torch.randn(len(prompts), 7) if with_logits else None
    arrived, sent, received = wire(Handover(full, tokens, logits), plan, policy)
    assert sent.kv_bytes == received.kv_bytes == sum(policy.sent_bytes(plan, p) for p in prompts)
    assert sent.header_bytes == received.header_bytes == 16 + 16 * len(prompts) + 28 * len(prompts) * with_logits
    assert arrived.tokens.equal(tokens)
    assert arrived.cache.lengths.equal(kept.lengths)
    assert arrived.logits is None if logits is None else arrived.logits.equal(logits)
    for index in plan.decode:
        for row in range(len(prompts)):
            for found, expected in zip(
                entries(arrived.cache.blocks[index], row), entries(kept.blocks[index], row), strict=True
            ):
                assert found.equal(expected)


class Wire:
    """A link that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[Tensor] = []

    def send(self, tensor: Tensor) -> int:
        self.sent.append(tensor)
        return tensor.nbytes


def test_behind_a_block_that_cannot_be_sent_nothing_is_sent() -> None:
    plan = StagePlan.full(ModelRef("tiny", "llama", 4))
    policy = KVRetentionPolicy("prefill", KVShape(2, 8, "float32"), {1: KEEP_ALL.written_as(Codec("int8", "int8"))})
    cache, link = random_cache(plan, policy.kv, [5], torch.float32), Wire()
    cache.blocks[1].keys[:] = torch.inf
    with pytest.raises(FloatingPointError, match="not finite"):
        sent(link, Handover(cache, torch.tensor([3])), plan, policy)  # type: ignore[arg-type]
    assert [len(tensor) for tensor in link.sent] == [1, 1, policy.block_bytes(0, 5)]


def padded(lengths: list[int], *, seed: int, left: bool) -> tuple[Tensor, Tensor]:
    """Random token ids and their mask."""
    generator = torch.Generator().manual_seed(seed)
    wide, sizes = max(lengths), torch.tensor(lengths)[:, None]
    ids = torch.randint(3, 64, (len(lengths), wide), generator=generator)
    return ids, torch.arange(wide)[None] >= wide - sizes if left else torch.arange(wide)[None] < sizes


def student(
    family: str, boundary: Boundary, plan: dict[str, Any], rules: dict[int, Retention], **config: int
) -> StagedCausalLM:
    """A tiny student whose untied weights differ from the shared ones."""
    model = tiny_model(family, **config)
    staged = StagedCausalLM(model, StagePlan(reference_to(model, family), boundary=boundary, **plan))
    staged.apply_policy(KVRetentionPolicy(boundary, staged.kv_shape, rules))
    torch.manual_seed(5)
    with torch.no_grad():
        for gate in staged.gates.values():
            for parameter in gate.untied.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return staged


@pytest.mark.parametrize(
    ("family", "boundary", "plan"),
    [
        ("phi3", "prefill", FREE),
        ("gemma3_text", "decode", FREE),
        ("gpt_neox", "decode", ALL_DECODE),
    ],
)
def test_two_processes_compute_what_one_does(
    tmp_path: Path, family: str, boundary: Boundary, plan: dict[str, Any]
) -> None:
    staged = student(family, boundary, plan, RULES)
    export = export_pair(staged, tmp_path / "export", tokenizer=None)
    with torch.no_grad(), Engine(export, devices=ON_CPU, start_timeout=120) as engine:
        for seed, (prompts, responses) in enumerate([([9, 1, 5], [4, 6, 1]), ([1], [3]), ([12, 12], [1, 1])]):
            prompt_ids, prompt_mask = padded(prompts, seed=seed, left=True)
            response_ids, response_mask = padded(responses, seed=seed + 9, left=False)
            rows = [ids[mask].tolist() for ids, mask in zip(prompt_ids, prompt_mask, strict=True)]
            known = [ids[mask].tolist() for ids, mask in zip(response_ids, response_mask, strict=True)]
            scored = together(engine, [Ask.scoring(*both) for both in zip(rows, known, strict=True)])
            expected = staged.logits(staged(prompt_ids, response_ids, prompt_mask, response_mask).hidden)
            for at, (heard, _) in enumerate(scored):
                torch.testing.assert_close(heard.logits, expected[at][response_mask[at]], atol=TOLERANCE, rtol=0.0)
            assert_counts(scored, staged, prompts, responses)

            once = generate(staged, prompt_ids, prompt_mask, max_new_tokens=8)
            found = together(engine, [Ask(row, 8) for row in rows])
            assert [heard.tokens for heard, _ in found] == once.tolist()
            stops = (int(once[0, 2]),)
            expected_ids = generate(staged, prompt_ids, prompt_mask, max_new_tokens=8, stop_ids=stops)
            found = together(engine, [Ask(row, 8, stops) for row in rows])
            assert [heard.tokens for heard, _ in found] == [up_to(stops, row) for row in expected_ids.tolist()]
            assert_counts(found, staged, prompts, [len(heard.tokens) for heard, _ in found])

            sampling = Sampling(1.5, 20, seed=4)
            for row, (heard, _) in zip(
                rows, together(engine, [Ask(row, 8, (), sampling) for row in rows]), strict=True
            ):
                drawn = generate(staged, torch.tensor([row]), max_new_tokens=8, pick=sampling.picker())
                assert heard.tokens == drawn[0].tolist()

            whole = generate(staged, torch.tensor(rows[:1]), max_new_tokens=30)[0].tolist()
            stream, another = engine.events(Ask(rows[0], 30)), engine.events(Ask(rows[0], 1))
            assert [next(stream), next(stream)] == [Token(token) for token in whole[:2]]
            assert list(another) == [Token(whole[0]), Done("length")]
            stream.close()
            assert list(engine.events(Ask(rows[0], 30))) == [*map(Token, whole), Done("length")]


def up_to(stops: tuple[int, ...], row: list[int]) -> list[int]:
    """A row without the stop tokens that it repeats."""
    return row[: next((at for at, token in enumerate(row) if token in stops), len(row)) + 1]


def assert_counts(
    answers: list[tuple[Heard, Done]], staged: StagedCausalLM, prompts: list[int], new: list[int]
) -> None:  # fmt: skip
    """The bytes counted on the wire are those that the policy announces."""
    policy, first = staged.policy, staged.plan.boundary == "prefill"
    assert policy is not None
    for (_, done), prompt, count in zip(answers, prompts, new, strict=True):
        stats = done.stats
        assert stats is not None
        assert (stats.prompt_tokens, stats.new_tokens) == (prompt, count)
        assert stats.kv_bytes == policy.sent_bytes(staged.plan, prompt)
        assert stats.full_bytes == policy.full_bytes(staged.plan, prompt)
        assert stats.decode_steps == count - first, "prefill chooses the first token"


@pytest.fixture(scope="module")
def text_pair(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> tuple[Path, StagedCausalLM]:
    """An export with a tokenizer, and its student. Its generation config ends at tokens 2 and 7."""
    staged = student("llama", "prefill", NESTED, RULES, vocab_size=259, seed=3)
    staged.model.generation_config.eos_token_id = [2, 7]
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    return export_pair(staged, tmp_path_factory.mktemp("text") / "export", tokenizer=tokenizer), staged


def test_generate_prints_the_text_alone_and_figures_apart(
    text_pair: tuple[Path, StagedCausalLM], capfd: pytest.CaptureFixture[str]
) -> None:
    export, staged = text_pair
    tokenizer: Any = AutoTokenizer.from_pretrained(export / "decode")
    prompt_ids = tokenizer("Grüße", return_tensors="pt").input_ids
    ids = generate(staged, prompt_ids, max_new_tokens=40, stop_ids=(2, 7))[0].tolist()
    out, err = io.StringIO(), io.StringIO()
    generate_text(export, "Grüße", max_new_tokens=40, device="cpu", out=out, err=err)
    assert out.getvalue() == tokenizer.decode(ids, skip_special_tokens=True) + "\n"
    assert f"prompt   {prompt_ids.shape[1]} tokens\nnew      {len(ids)} tokens\nKV sent  " in err.getvalue()
    assert capfd.readouterr().out == ""


def test_a_stop_string_ends_the_text_and_the_figures_count_what_came(text_pair: tuple[Path, StagedCausalLM]) -> None:
    whole, err = io.StringIO(), io.StringIO()
    generate_text(text_pair[0], "Hi", max_new_tokens=40, device="cpu", out=whole, err=err)
    text = whole.getvalue()[:-1]
    stop = text[len(text) // 2]
    assert text.index(stop) > 0
    out, err = io.StringIO(), io.StringIO()
    generate_text(text_pair[0], "Hi", max_new_tokens=40, stop=[stop], device="cpu", out=out, err=err)
    assert out.getvalue() == text[: text.index(stop)] + "\n"
    counted = re.search(
        r"prompt   2 tokens\nnew      (\d+) tokens\nKV sent  .*\nprefill  .*\ndecode   .* ms", err.getvalue()
    )
    assert counted is not None
    assert 1 < int(counted[1]) <= 40


def test_a_chat_prompt_is_one_user_turn_and_the_generation_config_says_where_to_stop(
    text_pair: tuple[Path, StagedCausalLM],
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(text_pair[0] / "prefill")
    ids = encode_prompt(tokenizer, "Hi", chat=True)
    assert tokenizer.decode(ids) == "<bos>user\nHi<eos>\n<bos>assistant\n"
    assert encode_prompt(tokenizer, "Hi", chat=False) == tokenizer("Hi")["input_ids"]
    assert stop_ids_of(text_pair[0], tokenizer) == (2, 7)
    assert stop_ids_of(text_pair[0] / "elsewhere", tokenizer) == (tokenizer.eos_token_id,)


@pytest.mark.parametrize(
    ("told", "file", "expected"),
    [
        (0, "generation_config.json", (0, 2)),
        ([7, 0], "generation_config.json", (0, 2, 7)),
        (None, "generation_config.json", (2,)),
        (5, "config.json", (2, 5)),
    ],
)
def test_what_the_tokenizer_alone_knows_to_be_an_end_ends_a_response_too(
    told: Any, file: str, expected: tuple[int, ...], text_pair: tuple[Path, StagedCausalLM], tmp_path: Path
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(text_pair[0] / "prefill")
    (tmp_path / "decode").mkdir()
    (tmp_path / "decode" / file).write_text(json.dumps({"eos_token_id": told}))
    assert stop_ids_of(tmp_path, tokenizer) == expected
    staged = text_pair[1]
    assert joined_stop_ids([7, 2], staged.model.generation_config.eos_token_id) == (2, 7)


def test_a_response_whose_end_only_the_tokenizer_knows_is_one_token_long(
    text_pair: tuple[Path, StagedCausalLM], tmp_path: Path
) -> None:
    export = tmp_path / "export"
    shutil.copytree(text_pair[0], export)
    for stage in ("prefill", "decode"):  # all logits are equal, so the model always says token 0
        weights = load_file(export / stage / "model.safetensors")
        weights["lm_head.weight"] = torch.zeros_like(weights["lm_head.weight"])
        save_file(weights, export / stage / "model.safetensors", metadata={"format": "pt"})
    (export / "decode" / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    tokenizer: Any = AutoTokenizer.from_pretrained(export / "prefill")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    for stage in ("prefill", "decode"):
        tokenizer.save_pretrained(export / stage)
    write_manifest(export)
    out, err = io.StringIO(), io.StringIO()
    generate_text(export, "Hi", max_new_tokens=12, device="cpu", out=out, err=err)
    assert "new      1 tokens" in err.getvalue()


def test_generate_refuses_what_it_cannot_serve(text_pair: tuple[Path, StagedCausalLM], tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(text_pair[0], bare)
    (bare / "prefill" / "tokenizer_config.json").unlink()
    write_manifest(bare)
    plain = tmp_path / "plain"
    shutil.copytree(text_pair[0], plain)
    (plain / "prefill" / "chat_template.jinja").unlink()
    write_manifest(plain)

    def refused(match: str, export: Path = text_pair[0], prompt: str = "Hi", **settings: Any) -> None:
        out = io.StringIO()
        with pytest.raises(ValueError, match=match):
            generate_text(export, prompt, out=out, err=out, **settings)
        assert out.getvalue() == ""

    refused("`prompt` is empty", prompt="")
    refused("`prompt` has 129 tokens, and the model's context is 128", prompt="x" * 129)
    refused("lower `max_new_tokens` to at most 126", max_new_tokens=127)
    refused("`max_new_tokens` is 0", max_new_tokens=0)
    refused("`export` is .*not an exported pair: it has no stage_plan.json", export=tmp_path)
    refused("`export` has no tokenizer", export=bare)
    refused("leave out `--chat`", export=plain, chat=True)
    refused("`temperature` is -1", temperature=-1.0, max_new_tokens=9)
    refused("`device` is 'abacus'", device="abacus", max_new_tokens=9)


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_worker_that_dies_ends_the_request_with_one_error(
    text_pair: tuple[Path, StagedCausalLM], stage: Stage
) -> None:
    with Engine(text_pair[0], devices=ON_CPU, start_timeout=120) as engine:
        assert Heard(engine, Ask([5, 6, 7], 2)).end() == Done("length")
        process = engine._crew.pid(stage)
        assert process is not None
        os.kill(process, signal.SIGSTOP)  # so that the other worker waits for it when it dies
        heard = Heard(engine, Ask([5, 6, 7], 6))
        Timer(0.5, os.kill, (process, signal.SIGKILL)).start()
        done = heard.end()
        assert f"The {stage} worker failed: it died without a word (exit code -9)" in done.message
        with pytest.raises(RuntimeError, match="Exit code -9 often means that memory ran out"):
            done.raise_fault()
    assert not multiprocessing.active_children()
    with pytest.raises(RuntimeError, match="use it in a `with` block"):
        next(engine.events(Ask([5], 1)))


def test_a_damaged_checkpoint_is_named_when_the_workers_start(
    text_pair: tuple[Path, StagedCausalLM], tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(text_pair[0], damaged)
    weights = damaged / "decode" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    write_manifest(damaged)
    with (
        pytest.raises(ValueError, match=r"The decode worker refused: .*model\.safetensors cannot be used"),
        Engine(damaged, devices=ON_CPU, start_timeout=120),
    ):
        pass


def test_workers_that_take_too_long_to_start_are_ended(text_pair: tuple[Path, StagedCausalLM]) -> None:
    with (
        pytest.raises(RuntimeError, match=r"did not start within 0\.01 s .* Raise `start_timeout`"),
        Engine(text_pair[0], devices=ON_CPU, start_timeout=0.01),
    ):
        pass


def utf8(ids: list[int]) -> str:
    """A tokenizer whose ids are bytes."""
    return bytes(ids).decode("utf-8", errors="replace")


@given(st.text() | st.binary())
def test_streamed_pieces_join_to_the_whole_text(source: str | bytes) -> None:
    ids = list(source.encode() if isinstance(source, str) else source)
    assert "".join(text_pieces(ids, utf8)) == utf8(ids)


@given(st.text().filter(lambda text: "\ufffd" not in text))
def test_no_piece_holds_part_of_a_character(text: str) -> None:
    assert all("\ufffd" not in piece for piece in text_pieces(text.encode(), utf8))


@given(st.text(max_size=200), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_the_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    text = text.replace("\ufffd", "")
    ends = [at for each in stop if (at := text.find(each)) >= 0]
    expected = text[: min(ends)] if ends else text
    if any("\ufffd" in each for each in stop):
        return
    assert "".join(text_pieces(text.encode(), utf8, stop)) == expected


def test_a_long_response_costs_no_more_for_each_token_than_a_short_one() -> None:
    decoded = 0

    def counting(ids: list[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return utf8(ids)

    text = "Grüße aus dem Süden. " * 200
    assert "".join(text_pieces(text.encode(), counting)) == text
    assert decoded <= len(text.encode()) * (WINDOW + CONTEXT)


def test_nothing_is_read_after_a_stop_string_and_none_may_be_empty() -> None:
    ids = iter(b"one two three")
    assert "".join(text_pieces(ids, utf8, ["two"])) == "one "
    assert bytes(ids) == b" three"
    with pytest.raises(ValueError, match="`stop` has an empty text"):
        TextStream(utf8, [""])


def test_draws_of_top_p_are_of_the_likeliest_tokens_that_reach_it() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    pick = Sampling(1.0, top_p=0.75, seed=1).picker()
    drawn = torch.cat([pick(logits) for _ in range(4000)])
    expected = torch.tensor([0.5, 0.3, 0.0, 0.0]) / 0.8
    torch.testing.assert_close(drawn.bincount(minlength=4) / len(drawn), expected, atol=0.03, rtol=0.0)
    assert bool((torch.cat([Sampling(1.0, top_p=1e-9).picker()(logits) for _ in range(9)]) == 0).all())
    with pytest.raises(ValueError, match="`top_p` is 0"):
        Sampling(top_p=0.0)


def test_draws_follow_the_softmax_of_the_top_k_and_their_seed() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).log_softmax(dim=-1)
    pick = Sampling(temperature=0.5, top_k=3, seed=1).picker()
    drawn = torch.cat([pick(logits) for _ in range(4000)])
    expected = torch.cat([(logits[0, :3] / 0.5).softmax(dim=-1), torch.zeros(1)])
    torch.testing.assert_close(drawn.bincount(minlength=4) / len(drawn), expected, atol=0.03, rtol=0.0)
    late = Sampling(temperature=0.5, top_k=3, seed=1).picker(start=3990)
    assert torch.cat([late(logits) for _ in range(10)]).equal(drawn[3990:])


@given(st.integers(0, 2**40))
def test_the_top_1_is_greedy(seed: int) -> None:
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(seed))
    assert Sampling(3.0, 1, seed).picker()(logits).equal(Sampling().picker()(logits))


@given(st.floats(0, 1e-8, exclude_min=True), st.integers(0, 2**40))
@example(1e-40, 0)
@example(5e-324, 0)
@example(1e-38, 1)
def test_a_tiny_temperature_is_greedy(temperature: float, seed: int) -> None:
    logits = 10 * torch.randn(2, 9, generator=torch.Generator().manual_seed(seed))
    for top_k in (None, 3):
        assert Sampling(temperature, top_k, seed).picker()(logits).equal(Sampling().picker()(logits))


def test_sampling_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="`temperature` is nan"):
        Sampling(temperature=float("nan"))
    with pytest.raises(ValueError, match="`top_k` is 0"):
        Sampling(top_k=0)
    with pytest.raises(ValueError, match="`seed` is -1"):
        Sampling(seed=-1)


def test_devices_follow_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, setting, expected in [
        (0, "auto", ON_CPU),
        (1, "auto", ("cuda:0", "cuda:0")),
        (4, "cuda", ("cuda:0", "cuda:1")),
        (4, "cuda:3", ("cuda:3", "cuda:3")),
        (4, "cpu", ON_CPU),
    ]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert devices_of(setting) == expected
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="`device` is 'cuda', and this machine has 0 GPUs"):
        devices_of("cuda")
