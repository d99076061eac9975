"""The engine: many requests at once over two processes, with checked transfers and workers that may die."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from heard import Heard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer

from pdtrim_pl.errors import UserError
from pdtrim_pl.export import export_pair, load_stage
from pdtrim_pl.harness.in_process import InProcessPair
from pdtrim_pl.models.pretrained import load_causal_lm
from pdtrim_pl.plan import Codec, KVRetentionPolicy, PairManifest, Retention, Stage, StagePlan
from pdtrim_pl.serving.engine import messages as say
from pdtrim_pl.serving.engine.batch import Row, RunningBatch
from pdtrim_pl.serving.engine.crew import Crew
from pdtrim_pl.serving.engine.engine import Engine
from pdtrim_pl.serving.engine.frames import HEADER, FramedLink, Header, LinkError, TransferRefused, check_host
from pdtrim_pl.serving.engine.prefill import PrefillWorker
from pdtrim_pl.serving.engine.requests import Ask, Done, Event, Overloaded, RequestStats, Running, Token
from pdtrim_pl.serving.engine.running import RunningRequests
from pdtrim_pl.serving.engine.watch import Watch
from pdtrim_pl.serving.exported import ExportedPair
from pdtrim_pl.serving.sampling import Sampling
from pdtrim_pl.staged import BlockKV, StagedCausalLM
from pdtrim_pl.staged.decoding import greedy
from pdtrim_pl.staged.description import kv_shape_of, reference_to

pytestmark = pytest.mark.usefixtures("forked_workers")
KEY, PAIR = b"k" * 32, bytes(range(32))
PROMPTS = [[5, 9, 33, 40, 7, 8, 100], [12, 13], [77, 78, 79, 80], list(range(3, 40)), [200, 7, 9, 9, 9]]


@pytest.fixture(scope="module", params=["prefill", "decode"])
def export(request: pytest.FixtureRequest, tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load_causal_lm(str(tiny_llama_dir))
    plan = StagePlan.full(reference_to(model, str(tiny_llama_dir)), "free", request.param)
    plan = plan.drop("prefill", 1).drop("decode", 2)
    rules = {0: Retention("first_last", 2, 0.25), 3: Retention(codec=Codec("int4", "int4"))}
    student = StagedCausalLM(model, plan, KVRetentionPolicy(plan.boundary, kv_shape_of(model), rules)).eval()
    folder = tmp_path_factory.mktemp("engine") / "pair"
    return export_pair(student, folder, tokenizer=AutoTokenizer.from_pretrained(tiny_llama_dir), dtype=torch.float32)


@pytest.fixture(scope="module")
def pair(export: Path) -> InProcessPair:
    return InProcessPair.load(export)


def alone(pair: InProcessPair, prompt: list[int], count: int, stop_ids: tuple[int, ...] = ()) -> list[int]:
    (tokens,) = pair.continuations([prompt], room=count, stop_ids=stop_ids)
    return tokens


@pytest.fixture(scope="module")
def engine(export: Path) -> Iterator[Engine]:
    with Engine(export, max_batch=3, max_waiting=20) as running:
        yield running
    assert not multiprocessing.active_children()


# The running batch, in this process


@settings(max_examples=12)
@given(st.data())
def test_rows_that_join_and_leave_decode_as_if_they_were_alone(pair: InProcessPair, data: st.DataObject) -> None:
    counts = [data.draw(st.integers(1, 9)) for _ in PROMPTS]
    batch, found = RunningBatch(pair.decode), {at: list[int]() for at in range(len(PROMPTS))}
    waiting = list(range(len(PROMPTS)))
    while waiting or batch.rows:
        joining = data.draw(st.integers(0 if batch.rows else 1, len(waiting))) if waiting else 0
        new = []
        for at in [waiting.pop(0) for _ in range(joining)]:
            loop = pair.stream(
                torch.tensor([PROMPTS[at]]), torch.ones(1, len(PROMPTS[at])).bool(), room=1, pick=greedy, stop_ids=()
            )  # fmt: skip
            handled = len(PROMPTS[at]) - (pair.prefill.plan.boundary == "decode")
            out = pair.prefill.prefill(torch.tensor([PROMPTS[at][:handled]]))
            row = Row(at, greedy, frozenset(), counts[at], PROMPTS[at][-1])
            if pair.prefill.plan.boundary == "prefill":
                row.take(int(next(loop)))
                found[at].append(row.fed)
            if not row.ended:
                new.append((row, out.cache.retained(pair.policy)))
        batch.join(new)
        if batch.rows:
            for row, token in batch.step():
                found[row.request].append(token)
    assert found == {at: alone(pair, PROMPTS[at], count) for at, count in enumerate(counts)}


def test_a_response_that_ends_before_prefill_has_reported_waits_for_its_figures(export: Path) -> None:
    requests = RunningRequests(ExportedPair.read(export), Watch())
    heard: list[Event] = []
    for number in (1, 2):
        running = Running(number, Ask(PROMPTS[1], 1), heard.append, state="prefill", reporting=True)
        requests.add(running)
        requests.tokens(say.Tokens([(number, 9)], [number], 0.25))
        assert heard == [Token(9)], "the end is still to come"
        if number == 1:
            requests.encoded(say.Encoded(1, 640, 8, 0.5, 0.125))
        else:
            requests.reported(running)  # prefill has died
        done = heard.pop()
        assert done == Done("length")
        assert isinstance(done, Done)
        expected = (2, 1, 640, 8, 0.5, 0.125, 0.25, 1)
        full = requests._pair.policy.full_bytes(requests._pair.plan, 2)
        stats = RequestStats(*expected[:3], full, *expected[3:]) if number == 1 else None
        assert done.stats == stats
        heard.clear()
    assert len(requests) == 0


def test_each_block_has_crossed_before_the_next_one_runs(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staged, manifest = load_stage(export, "prefill").eval(), PairManifest.load(export)
    plan, policy = staged.plan, staged.policy
    assert policy is not None
    handled = len(PROMPTS[0]) - (plan.boundary == "decode")
    ours, theirs = socket.socketpair()
    crossed = threading.Semaphore(0)

    def receive() -> None:
        link = FramedLink(theirs, KEY, bytes.fromhex(manifest.id), 2**20)
        link.next_request()
        assert [link.receive((1,), torch.int64).item() for _ in range(2)] == [1, handled]
        for block in plan.decode:
            link.receive((policy.block_bytes(block, handled),), torch.uint8)
            crossed.release()

    def one_by_one(ids: Tensor, valid: Tensor, *, on_kv: Callable[[int, BlockKV], None]) -> Any:
        def each(index: int, block: BlockKV) -> None:
            on_kv(index, block)
            assert crossed.acquire(timeout=20)

        return prefill(ids, valid, on_kv=each)

    prefill = staged.prefill
    monkeypatch.setattr(staged, "prefill", one_by_one)
    spec = say.WorkerSpec("prefill", export, "cpu", "127.0.0.1", KEY, 1)
    worker = PrefillWorker(spec, staged, manifest, Connection(os.dup(ours.fileno())))
    worker._link = FramedLink(ours, KEY, bytes.fromhex(manifest.id), 2**20)
    receiver = threading.Thread(target=receive)
    receiver.start()
    with torch.no_grad():
        report = worker._encode(say.Encode(1, PROMPTS[0], Sampling(), with_logits=False))
    receiver.join()
    assert report.kv_bytes == policy.sent_bytes(plan, len(PROMPTS[0]))
    frames = 1 + 2 + len(plan.decode) + 2  # the beginning, lengths, blocks, the first token
    assert report.header_bytes == HEADER * frames + 4 * 8
    ours.close()
    theirs.close()


# Over two processes


def test_requests_together_have_the_tokens_of_requests_alone(engine: Engine, pair: InProcessPair) -> None:
    heard = [Heard(engine, Ask(prompt, 4 + 3 * at)) for at, prompt in enumerate(PROMPTS)]
    assert [each.end().reason for each in heard] == ["length"] * len(PROMPTS)
    assert [each.tokens for each in heard] == [alone(pair, p, 4 + 3 * at) for at, p in enumerate(PROMPTS)]


def test_a_stop_token_ends_a_response_and_is_its_last_token(engine: Engine, pair: InProcessPair) -> None:
    whole = alone(pair, PROMPTS[0], 12)
    stop = whole[5]
    heard = Heard(engine, Ask(PROMPTS[0], 12, (stop,)))
    assert heard.end() == Done("stop")
    assert heard.tokens == alone(pair, PROMPTS[0], 12, (stop,))


def test_equal_seeds_give_equal_tokens_whoever_else_is_served(engine: Engine) -> None:
    ask = Ask(PROMPTS[2], 10, sampling=Sampling(0.9, seed=5, top_p=0.8))
    first = Heard(engine, ask)
    first.end()
    others = [Heard(engine, Ask(prompt, 15)) for prompt in PROMPTS[:2]]
    again = Heard(engine, ask)
    again.end()
    assert again.tokens == first.tokens
    assert [other.end().reason for other in others] == ["length", "length"]


def test_a_cancelled_request_ends_and_the_others_do_not_notice(engine: Engine, pair: InProcessPair) -> None:
    long = Heard(engine, Ask(PROMPTS[1], 200))
    other = Heard(engine, Ask(PROMPTS[2], 30))
    assert long.first.wait(30)
    engine.cancel(long.number)
    assert long.end() == Done("cancelled")
    assert other.end() == Done("length")
    assert other.tokens == alone(pair, PROMPTS[2], 30)
    engine.cancel(long.number)  # once more does nothing
    events = engine.events(Ask(PROMPTS[0], 200))
    assert isinstance(next(events), Token)
    events.close()  # cancels


def test_a_deadline_ends_a_request(engine: Engine) -> None:
    assert Heard(engine, Ask(PROMPTS[0], 240, deadline=0.05)).end().reason == "deadline"
    assert Heard(engine, Ask(PROMPTS[0], 3, deadline=60.0)).end() == Done("length")


def test_what_cannot_be_served_is_refused_before_it_is_queued(engine: Engine) -> None:
    for ask, message in (
        (Ask([], 3), "`prompt` is empty"),
        (Ask([1] * 600, 3), "the model's context is 512"),
        (Ask([9999], 3), "token 9999, outside the vocabulary"),
    ):
        with pytest.raises(UserError, match=message):
            engine.submit(ask, lambda event: None)
    with pytest.raises(UserError, match="which other machines can reach: set PDTRIM_SECRET"):
        Engine(engine.pair.path, host="0.0.0.0")
    check_host("0.0.0.0", "secret")
    check_host("::1", None)
    with pytest.raises(UserError, match="`max_batch` and `max_waiting`"):
        Engine(engine.pair.path, max_batch=0)


def test_a_full_queue_refuses_one_more(export: Path) -> None:
    with Engine(export, max_batch=1, max_waiting=1) as engine:
        heard = []
        refused: Overloaded | None = None
        while refused is None:
            try:
                heard.append(Heard(engine, Ask(PROMPTS[0], 200)))
            except Overloaded as error:
                refused = error
        assert str(refused) == "1 requests wait, as many as `max_waiting` allows: try again later."
        assert "pdtrim_refused_total 1" in engine.watch.metrics()
        for each in heard:
            engine.cancel(each.number)
        assert {each.end().reason for each in heard} == {"cancelled"}
        left = Heard(engine, Ask(PROMPTS[0], 240))
    assert left.end() == Done("cancelled", "The engine was closed.")
    with pytest.raises(RuntimeError, match="does not run"):
        engine.submit(Ask(PROMPTS[0], 1), lambda event: None)


def test_a_dead_prefill_worker_takes_no_response_with_it(engine: Engine, pair: InProcessPair) -> None:
    running = Heard(engine, Ask(PROMPTS[3], 150))
    assert running.first.wait(30)
    pid = engine._crew.pid("prefill")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    after = Heard(engine, Ask(PROMPTS[1], 6))
    assert running.end() == Done("length")
    assert running.tokens == alone(pair, PROMPTS[3], 150)
    ended = after.end()
    if ended.reason == "error":  # it was on its way to the dead worker
        assert "The prefill worker failed" in ended.message
        after = Heard(engine, Ask(PROMPTS[1], 6))
        ended = after.end()
    assert after.tokens == alone(pair, PROMPTS[1], 6)


def test_a_dead_decode_worker_is_told_to_its_requests_and_the_next_are_served(
    engine: Engine, pair: InProcessPair
) -> None:
    running = Heard(engine, Ask(PROMPTS[0], 200))
    assert running.first.wait(30)
    pid = engine._crew.pid("decode")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    ended = running.end()
    assert ended.reason == "error"
    assert "The decode worker failed: it died without a word (exit code -9)" in ended.message
    after = Heard(engine, Ask(PROMPTS[1], 6))
    assert after.end() == Done("length")
    assert after.tokens == alone(pair, PROMPTS[1], 6)


def test_a_worker_that_cannot_even_start_is_not_started_again(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Stage] = []
    start = Crew.start

    def killed(crew: Crew, stage: Stage) -> None:
        start(crew, stage)
        started.append(stage)
        pid = crew.pid("decode") if stage == "decode" else None
        if pid is not None:
            os.kill(pid, signal.SIGKILL)

    monkeypatch.setattr(Crew, "start", killed)
    with pytest.raises(RuntimeError, match="The decode worker failed: it died without a word"), Engine(export):
        pass
    assert started == ["prefill", "decode"]


def test_a_foreign_connection_is_refused_and_disturbs_nobody(engine: Engine, pair: InProcessPair) -> None:
    address = engine._address
    assert address is not None
    before = engine.watch._counts["lost"]
    for content in (b"GET / HTTP/1.1\r\n\r\n" * 10, os.urandom(500), b"PDTK"):
        with socket.create_connection(address) as connection:
            connection.sendall(content)
    heard = Heard(engine, Ask(PROMPTS[2], 5))
    assert heard.end() == Done("length")
    assert heard.tokens == alone(pair, PROMPTS[2], 5)
    limit = time.monotonic() + 20
    while engine.watch._counts["lost"] < before + 3 and time.monotonic() < limit:
        time.sleep(0.02)
    assert engine.watch._counts["lost"] == before + 3


def test_a_damaged_checkpoint_is_named(export: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "pair"
    shutil.copytree(export, broken)
    file = next((broken / "decode").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:8] + b"x" * (file.stat().st_size - 8))
    with pytest.raises(UserError, match=r"The decode worker refused: .*safetensors cannot be used"), Engine(broken):
        pass


def test_the_metrics_count_what_crossed(export: Path) -> None:
    with Engine(export) as engine:
        for prompt in PROMPTS[:2]:
            assert Heard(engine, Ask(prompt, 4)).end() == Done("length")
        text = engine.watch.metrics()
        plan, policy = engine.pair.plan, engine.pair.policy
    sent = sum(policy.sent_bytes(plan, len(prompt)) for prompt in PROMPTS[:2])
    assert f"\npdtrim_kv_bytes_total {sent}\n" in text
    assert "\npdtrim_tokens_total 8\n" in text
    assert "\npdtrim_ttft_seconds_count 2\n" in text
    assert '\npdtrim_tpot_seconds_bucket{le="+Inf"} 2\n' in text
    assert '\npdtrim_requests_total{reason="length"} 2\n' in text


def memory(pid: int | None) -> int:
    """Resident memory of a process, bytes."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


def test_a_bounded_soak_leaks_nothing(engine: Engine) -> None:
    generator = random.Random(0)

    def soak(requests: int) -> None:
        left = [
            Ask([generator.randrange(3, 250) for _ in range(generator.randrange(1, 60))], generator.randrange(1, 12))
            for _ in range(requests)
        ]
        heard: list[Heard] = []
        for ask in left:
            while True:
                try:
                    heard.append(Heard(engine, ask))
                    break
                except Overloaded:
                    time.sleep(0.005)
            if generator.random() < 0.1:
                engine.cancel(heard[-1].number)
        assert {each.end().reason for each in heard} <= {"length", "cancelled"}
        gc.collect()

    soak(120)
    pids = [engine._crew.pid("prefill"), engine._crew.pid("decode"), os.getpid()]
    before, threads = [memory(pid) for pid in pids], threading.active_count()
    files = [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids]
    soak(250)
    assert not engine._running
    assert threading.active_count() == threads
    assert [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids] == files
    for pid, old in zip(pids, before, strict=True):
        assert memory(pid) < old + 24 * 2**20


# Frames


@pytest.fixture
def ends() -> Iterator[tuple[FramedLink, FramedLink, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield FramedLink(ours, KEY, PAIR, 4096), FramedLink(theirs, KEY, PAIR, 4096), ours
    ours.close()
    theirs.close()


def test_a_tensor_crosses_as_it_is(ends: tuple[FramedLink, FramedLink, Any]) -> None:
    sender, receiver, _ = ends
    tensor = torch.arange(12, dtype=torch.int64).view(3, 4)
    sender.begin(7)
    assert sender.send(tensor) == 96
    assert sender.send(tensor[:0]) == 0
    assert receiver.next_request() == 7
    assert receiver.receive((3, 4), torch.int64).equal(tensor)
    assert receiver.receive((0, 4), torch.int64).shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sender, raw: sender.send(torch.zeros(9)), "has 36 bytes where 16 belong"),
        (lambda sender, raw: sender.send(torch.zeros(5000)), "has 20,000 bytes where 16 belong"),
        (lambda sender, raw: sender.begin(7), "has a begin where a data belongs"),
        (lambda sender, raw: (setattr(sender, "_request", 8), sender.send(torch.zeros(4))), "piece 1 of request 8"),
        (lambda sender, raw: (setattr(sender, "_place", 5), sender.send(torch.zeros(4))), "has piece 5"),
        (lambda sender, raw: (setattr(sender, "pair", bytes(32)), sender.send(torch.zeros(4))), "of pair 0000"),
        (lambda sender, raw: (setattr(sender, "key", b"no"), sender.send(torch.zeros(4))), "not signed with"),
        (lambda sender, raw: (raw.sendall(b"PDTK"), raw.shutdown(socket.SHUT_WR)), "cut short: 4 of 96 bytes"),
        (lambda sender, raw: raw.sendall(b"x" * HEADER), "is not of this program"),
    ],
)  # fmt: skip
def test_every_other_transfer_is_refused(
    ends: tuple[FramedLink, FramedLink, socket.socket], change: Callable[..., Any], message: str
) -> None:
    sender, receiver, raw = ends
    sender.begin(7)
    assert receiver.next_request() == 7
    change(sender, raw)
    with pytest.raises(TransferRefused, match=message):
        receiver.receive((4,), torch.float32)


def test_data_that_was_damaged_or_cut_short_is_refused(ends: tuple[FramedLink, FramedLink, socket.socket]) -> None:
    sender, receiver, raw = ends
    sender.begin(7)
    receiver.next_request()
    header = Header("data", 7, 1, 16, 123, PAIR).packed(KEY)
    raw.sendall(header + b"\0" * 16)
    with pytest.raises(TransferRefused, match="damaged or cut short: 16 of 16"):
        receiver.receive((4,), torch.float32)
    raw.sendall(header + b"\0" * 9)
    raw.close()
    with pytest.raises(TransferRefused, match="damaged or cut short: 9 of 16"):
        receiver.receive((4,), torch.float32)
    with pytest.raises(TransferRefused, match="more than a request of this pair has"):
        receiver.receive((2**40,), torch.float32)
    with pytest.raises(LinkError, match="closed the connection"):
        receiver.next_request()


def test_ten_thousand_fuzzed_headers_are_refused() -> None:
    generator = random.Random(0)
    good = Header("data", 7, 3, 4096, 5, PAIR).packed(KEY)
    assert Header.parse(good, KEY) == Header("data", 7, 3, 4096, 5, PAIR)
    refused = 0
    for number in range(10_000):
        raw = bytearray(good)
        kind = number % 4
        if kind == 0:
            raw[:] = generator.randbytes(generator.choice([0, 1, HEADER - 1, HEADER, HEADER + 1, 300]))
        elif kind == 1:
            raw[generator.randrange(HEADER)] ^= 1 << generator.randrange(8)
        elif kind == 2:
            del raw[generator.randrange(HEADER) :]
        else:
            start = generator.randrange(HEADER)
            raw[start : start + 8] = bytes(byte ^ 0x5A for byte in raw[start : start + 8])
        try:
            Header.parse(bytes(raw), KEY)
        except TransferRefused:
            refused += 1
    assert refused == 10_000
