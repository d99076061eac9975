"""The parts of the vLLM connector that need no vLLM: compaction, cache layouts, transfers and what they refuse."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Client
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_model

from pdtrim_pl.errors import UserError
from pdtrim_pl.export.pair import export_pair
from pdtrim_pl.plan import Codec, KVRetentionPolicy, Layout, Retention, StagePlan
from pdtrim_pl.serving.vllm.compaction import cut_lengths, cut_slots, kept_positions, slots_of
from pdtrim_pl.serving.vllm.greeting import PROTOCOL, Address, Hello, greet, secret_for
from pdtrim_pl.serving.vllm.inbox import Inbox
from pdtrim_pl.serving.vllm.launch import Half, command, transfer_config
from pdtrim_pl.serving.vllm.layout import EntryLayout, LearntLayout
from pdtrim_pl.serving.vllm.pair import ServedPair
from pdtrim_pl.serving.vllm.transfer import BLOCK, HEADER, MAGIC, OPEN, Receiver, Sender
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.description import kv_shape_of, reference_to

HELLO = Hello(PROTOCOL, 1, 0)
SIZE = 4


def exported(folder: Path, prefill: tuple[int, ...] = (0, 1, 3), layout: Layout = "compact") -> Path:
    model = tiny_model("llama")
    relation = "nested" if set(prefill) >= {0, 3} else "free"
    plan = StagePlan(reference_to(model, "tiny"), prefill=prefill, decode=(0, 3), relation=relation)
    rules = {0: Retention("first_last", 2, 3), 3: Retention(codec=Codec("int8", "int8"))}
    staged = StagedCausalLM(model, plan, KVRetentionPolicy("prefill", kv_shape_of(model), rules))
    return export_pair(staged, folder / "pair", tokenizer=None, layout=layout)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("vllm"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(found: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not found():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_connectors_parts_import_neither_training_nor_models() -> None:
    heavy = ("lightning", "deepspeed", "transformers", "datasets")
    rooms = [f"pdtrim_pl.{room}" for room in ("staged", "models", "data", "export", "evaluation", "harness", "cli")]
    code = (
        "import sys, pdtrim_pl.serving.vllm.launch, pdtrim_pl.serving.vllm.transfer, pdtrim_pl.serving.vllm.layout, "
        "pdtrim_pl.serving.vllm.compaction, pdtrim_pl.wire.packing, pdtrim_pl.wire.codecs; "
        f"sys.exit([name for name in {(*heavy, *rooms)} if name in sys.modules] or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_layer_is_paired_by_its_original_block(export: Path) -> None:
    prefill, decode = (ServedPair.read(export, stage) for stage in ("prefill", "decode"))
    assert [prefill.block(layer) for layer in range(4)] == [0, 1, 3, None]
    assert [decode.block(layer) for layer in range(3)] == [0, 3, None]
    assert [block for block in range(4) if prefill.crosses(block)] == [0, 3]
    assert (prefill.handled(10), decode.handled(11)) == (10, 10)


def test_a_plan_with_kv_only_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"decode runs block\(s\) \[3\] that prefill does not run"):
        ServedPair.read(exported(tmp_path, prefill=(0, 1)), "prefill")


def test_a_padded_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`layout: padded`, which is for stock connectors"):
        ServedPair.read(exported(tmp_path, layout="padded"), "prefill")


def test_an_engine_of_another_size_is_refused_with_what_differs(export: Path) -> None:
    pair = ServedPair.read(export, "decode")
    heads, width, _ = pair.policy.kv.sizes
    right = {"layers": 2, "heads": heads, "width": width, "dtype": pair.policy.kv.dtype, "ranks": 1}
    pair.check_engine(**right)
    with pytest.raises(UserError, match="layers: 3, not 2"):
        pair.check_engine(**{**right, "layers": 3})
    with pytest.raises(UserError, match="give a divisor"):
        pair.check_engine(**{**right, "ranks": heads + 1})


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 6)), min_size=1, max_size=4), st.integers(0, 3))
def test_compacted_layers_hold_kept_entries_and_later_tokens_in_a_row(
    requests: list[tuple[int, int]], padding: int
) -> None:
    rule, new = Retention("first_last", 2, 3), 2
    ends = [prompt + generated + new for prompt, generated in requests]
    tables = torch.randperm(10 * len(requests)).view(len(requests), 10)
    cuts = torch.tensor([prompt - rule.kept(prompt) for prompt, _ in requests])
    starts = torch.arange(len(requests) + 1) * new
    tokens = new * len(requests)
    slots = torch.cat([torch.zeros(tokens, dtype=torch.int64), torch.full((padding,), -1)])
    found = cut_slots(slots, starts, torch.tensor(ends), tables, cuts, SIZE, tokens)
    assert found[tokens:].tolist() == [-1] * padding
    lengths = cut_lengths(torch.tensor([*ends, 0]), torch.cat([cuts, cuts[:1]]))
    assert lengths[-1] == 0
    for row, (prompt, generated) in enumerate(requests):
        held = rule.kept(prompt) + generated
        assert lengths[row] == held + new
        expected = slots_of(torch.arange(held, held + new), tables[row], SIZE)
        assert found[row * new : (row + 1) * new].tolist() == expected.tolist()


def test_kept_positions_are_the_rules() -> None:
    assert kept_positions(Retention("first_last", 2, 3), 9).tolist() == [0, 1, 6, 7, 8]
    assert kept_positions(Retention("first_last", 2, 3), 4).tolist() == [0, 1, 2, 3]
    assert kept_positions(Retention(), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layout_is_learnt_from_the_engines_own_write(dtype: torch.dtype) -> None:
    """The layout of the CPU backend on x86: keys are transposed inside a block."""

    def fill(keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        count, heads, size, width = cache.shape
        halves = cache.view(count, heads, 2 * size, width // 2)
        halves[:, :, :size].view(count, heads, width // 2, size)[slots // size, :, :, slots % size] = keys
        halves[:, :, size:][slots // size, :, slots % size] = values

    layout = LearntLayout.learn(8, 16, dtype, fill)
    cache, expected = (torch.zeros(3, 2, 8, 32, dtype=dtype) for _ in range(2))
    slots = torch.tensor([3, 17, 8, 0])
    keys, values = torch.randn(2, 4, 2, 16).to(dtype)
    fill(keys, values, expected, slots)
    layout.write(cache, slots, keys, values)
    assert torch.equal(cache, expected)
    assert all(torch.equal(*both) for both in zip(layout.read(cache, slots), (keys, values), strict=True))


def test_a_cache_that_loses_elements_is_refused() -> None:
    with pytest.raises(UserError, match="does not hold every element"):
        LearntLayout.learn(8, 16, torch.float32, lambda keys, values, cache, slots: None)


def test_the_gpu_layout_has_keys_and_values_of_an_entry_side_by_side() -> None:
    heads_first = torch.zeros(3, 8, 2, 32).transpose(1, 2)  # the view [N, K, S, 2 D] of a cache with slots first
    slots, (keys, values) = torch.tensor([3, 17, 8]), torch.randn(2, 3, 2, 16)
    EntryLayout().write(heads_first, slots, keys, values)
    split = heads_first.transpose(1, 2).split(16, dim=-1)  # as FlashAttention's backend reads it
    assert all(torch.equal(part[slots // 8, slots % 8], x) for part, x in zip(split, (keys, values), strict=True))
    assert torch.equal(EntryLayout().read(heads_first, slots)[1], values)


def test_blocks_cross_a_socket_and_the_bytes_are_the_policys(export: Path) -> None:
    pair, port = ServedPair.read(export, "decode"), free_port()
    inbox = Inbox(pair, 1, 10**6, 5.0)
    receiver = Receiver(Address("127.0.0.1", port), HELLO, inbox)
    sender, transfer = Sender(HELLO, ServedPair.read(export, "prefill")), b"t" * 16
    sent = {block: bytes([block]) * pair.block_bytes(block, 9, 1) for block in (0, 3)}
    target = Address("127.0.0.1", port)
    sender.open(target, transfer, 9)
    for block, data in sent.items():
        assert inbox.claim(transfer) is None
        sender.send(target, transfer, block, len(data), lambda data=data: data)
    wait_for(lambda: inbox.claim(transfer))
    arrived = inbox.claim(transfer)
    assert arrived is not None
    assert (arrived.positions, arrived.blocks) == (9, sent)
    assert sender.sent == pair.policy.sent_bytes(pair.plan, 9)
    inbox.drop(transfer)
    assert inbox.claim(transfer) is None
    receiver.close()


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (HEADER.pack(b"GET ", b"t" * 16, OPEN, 0, 1), "not of this protocol"),
        (HEADER.pack(MAGIC, b"t" * 16, 7, 0, 1), "not of this protocol"),
        (HEADER.pack(MAGIC, b"t" * 16, BLOCK, 0, 1), "is not expected"),
        (HEADER.pack(MAGIC, b"t" * 16, OPEN, 0, 2**40), "does not fit"),
        (b"short", "has 5 bytes"),
    ],
)
def test_a_foreign_header_is_refused(export: Path, header: bytes, reason: str) -> None:
    pair, port = ServedPair.read(export, "decode"), free_port()
    inbox = Inbox(pair, 1, 10**6, 5.0)
    receiver = Receiver(Address("127.0.0.1", port), HELLO, inbox)
    with Client(("127.0.0.1", port)) as connection:
        greet(connection, HELLO, pair, first=True)  # type: ignore[arg-type]
        connection.send_bytes(header)
        wait_for(lambda: inbox.refusal)
    assert inbox.refusal is not None
    assert reason in inbox.refusal[1]
    receiver.close()


def test_an_engine_of_another_pair_is_refused_with_what_differs(export: Path, tmp_path: Path) -> None:
    port = free_port()
    inbox = Inbox(ServedPair.read(export, "decode"), 1, 10**6, 5.0)
    receiver = Receiver(Address("127.0.0.1", port), HELLO, inbox)
    other = ServedPair.read(exported(tmp_path, prefill=(0, 2, 3)), "prefill")
    with (
        Client(("127.0.0.1", port)) as connection,
        pytest.raises(UserError, match=r"different pairs.*prefill"),
    ):
        greet(connection, HELLO, other, first=True)  # type: ignore[arg-type]
    wait_for(lambda: inbox.refusal)
    receiver.close()


def test_an_open_address_needs_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PDTRIM_SECRET", raising=False)
    assert secret_for("127.0.0.1") is None
    with pytest.raises(UserError, match="PDTRIM_SECRET"):
        secret_for("0.0.0.0")
    monkeypatch.setenv("PDTRIM_SECRET", "word")
    assert secret_for("0.0.0.0") == b"word"


def test_the_launcher_gives_vllm_the_half_and_the_connector(export: Path) -> None:
    words = command(Half(export, "decode"), ["--port", "8200"])
    assert words[words.index("--model") + 1] == str(export / "decode")
    assert "--no-enable-prefix-caching" in words
    assert words[-2:] == ["--port", "8200"]
    assert transfer_config(Half(export, "prefill"))["kv_role"] == "kv_producer"
