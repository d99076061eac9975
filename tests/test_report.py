"""The report and the model card of an export."""

from __future__ import annotations

import re
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import plans

from pdtrim_pl.checkpoints.run_record import RunRecord
from pdtrim_pl.evaluation.quality import Quality
from pdtrim_pl.evaluation.summary import Summary
from pdtrim_pl.export.card import write_card
from pdtrim_pl.export.report import installed_versions, write_report
from pdtrim_pl.export.report_figures import FATES, fates
from pdtrim_pl.export.secrets import redacted
from pdtrim_pl.plan import STAGES, Codec, KVRetentionPolicy, KVShape, ModelRef, Retention, StagePlan

NASTY = '<script>alert("1")</script> & \'co'
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Collects what a test asks of a page, and fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.headings: list[str] = []
        self.missing = 0
        self.links: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(found)
        self.missing += found.get("class") == "missing"
        self.links += [str(found[name]) for name in ("href", "src") if name in found]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def a_plan(blocks: int = 6) -> StagePlan:
    plan = StagePlan.full(ModelRef(NASTY, "llama", blocks), "free")
    plan = plan.drop("prefill", 2, criterion=NASTY, score=0.5).drop("decode", 4, round=1)
    return plan.merge("decode", (0, 1), 0)


def a_policy(plan: StagePlan) -> KVRetentionPolicy:
    return KVRetentionPolicy("prefill", KVShape(2, 8), {plan.decode[-1]: Retention("first_last", 4, 0.2)})


def a_record(plan: StagePlan) -> RunRecord:
    return RunRecord(
        losses=[(step, 1 / step) for step in range(1, 30)],
        validations=[(10, {"kl": 0.5, "ppl": 8.0, "agreement": 0.5}), (20, {"kl": 0.3})],
        removals=[(9, plan.history[0]), (19, plan.history[1])],
        redundancy={stage: dict.fromkeys(range(plan.model.num_blocks), 0.9) for stage in STAGES},
        attention_mass=dict.fromkeys(plan.decode, 0.7),
        notes={"seed": 3, "why": NASTY, "data": {"fingerprint": NASTY}},
    )


def a_summary() -> Summary:
    quality = Quality(2.0, 2.0, 0.0, 1.0, 100)
    return Summary(6, 5, 4, quality, quality, quality, None, 1024, 4096, 1024, NASTY)


def write(path: Path, record: RunRecord, summary: Summary | None, plan: StagePlan | None = None) -> str:
    plan = plan or a_plan()
    write_report(path, plan=plan, policy=a_policy(plan), record=record, summary=summary, title=NASTY)
    return path.read_text(encoding="utf-8")


def test_a_full_report_is_self_contained_and_every_picture_has_words(tmp_path: Path) -> None:
    plan = a_plan()
    text = write(tmp_path / "report.html", a_record(plan), a_summary())
    page = Page(text)
    assert page.missing == 0
    assert len(page.images) == 4
    for image in page.images:
        assert len(image["alt"] or "") > 40
        data = (image["src"] or "").removeprefix("data:image/png;base64,")
        assert b64decode(data).startswith(b"\x89PNG")
    assert all(link.startswith("data:") for link in page.links)
    without_data = re.sub(r'src="data:[^"]*"', "", text)
    assert not re.search(r"https?:|url\(|@import|<script|<link", without_data)
    for heading in ("Summary", "Blocks per stage", "Training", "KV bytes per request", "Removals", "Versions"):
        assert heading in page.headings


def test_an_empty_run_gives_sentences_instead_of_empty_pictures(tmp_path: Path) -> None:
    plan = StagePlan.full(ModelRef("tiny", "llama", 3))
    page = Page(write(tmp_path / "report.html", RunRecord(), None, plan))
    assert len(page.images) == 2  # the map of blocks and the retention, which a plan and a policy always give
    assert page.missing == 6


def test_every_text_is_escaped(tmp_path: Path) -> None:
    text = write(tmp_path / "report.html", a_record(a_plan()), a_summary())
    assert "<script>" not in text
    assert text.count("&lt;script&gt;") >= 6  # title twice, model, export, criterion, notes


@pytest.mark.parametrize("only", ["losses", "validations", "removals"])
def test_a_record_with_one_part_alone_is_drawn(tmp_path: Path, only: str) -> None:
    whole = vars(a_record(a_plan()))
    write(tmp_path / "report.html", RunRecord(**{only: whole[only]}), None)


def test_validations_of_other_metrics_alone_are_not_drawn(tmp_path: Path) -> None:
    record = RunRecord(validations=[(1, {"other": 1.0})])
    assert "No training was recorded" in write(tmp_path / "report.html", record, None)


@settings(max_examples=50)
@given(plan=plans(5))
def test_the_map_agrees_with_the_plan(plan: StagePlan) -> None:
    for stage in STAGES:
        found = fates(plan, stage)
        assert len(found) == plan.model.num_blocks
        assert set(found) <= set(FATES)
        running = [block for block, fate in enumerate(found) if fate in ("kept", "merged: stands for its neighbours")]
        assert tuple(running) == plan.blocks(stage)
    assert tuple(b for b, fate in enumerate(fates(plan, "prefill")) if fate == "KV only") == plan.kv_only
    assert "KV only" not in fates(plan, "decode")


def test_a_policy_for_another_plan_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    plan = a_plan()
    policy = replace(a_policy(plan), rules={4: Retention("first_last", 1, 1)})
    with pytest.raises(ValueError, match="rules for block"):
        write_report(tmp_path / "report.html", plan=plan, policy=policy, record=RunRecord())
    with pytest.raises(ValueError, match="rules for block"):
        write_card(tmp_path / "README.md", plan=plan, policy=policy, summary=None, base_model="x")
    assert list(tmp_path.iterdir()) == []


def test_versions_name_python_and_the_packages_that_compute() -> None:
    assert {"python", "pdtrim_pl", "torch", "transformers"} <= set(installed_versions())


def card_of(path: Path, plan: StagePlan, summary: Summary | None, base_model: str = "org/model") -> str:
    write_card(path, plan=plan, policy=a_policy(plan), summary=summary, base_model=base_model, export="runs/x")
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["org/model", 'a: "strange" #name\n', NASTY])
def test_the_front_matter_of_a_card_is_yaml_whatever_the_model_is_called(tmp_path: Path, name: str) -> None:
    text = card_of(tmp_path / "README.md", a_plan(), None, name)
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == name
    assert front["library_name"] == "transformers"
    assert "pdtrim" in front["tags"]


def test_a_card_says_how_to_run_the_pair_and_what_was_measured(tmp_path: Path) -> None:
    text = card_of(tmp_path / "README.md", a_plan(), a_summary())
    assert "pdtrim generate --export runs/x --prompt" in text
    assert 'AutoModelForCausalLM.from_pretrained("runs/x/decode")' in text
    assert "response perplexity" in text
    assert "1 of 4 blocks are sent only the first 4 and the last 20% (rounded up)" in text
    assert "kv_only.safetensors" in text
    assert NASTY not in text  # where this machine put the export


def test_a_card_without_kv_only_blocks_does_not_speak_of_them(tmp_path: Path) -> None:
    text = card_of(tmp_path / "README.md", StagePlan.full(ModelRef("m", "llama", 3)), None)
    assert "kv_only" not in text
    assert "No quality or time was measured" in text


def test_the_contract_on_the_card_follows_the_boundary(tmp_path: Path) -> None:
    plan = replace(a_plan(), boundary="decode")
    policy = KVRetentionPolicy("decode", KVShape(2, 8))
    write_card(tmp_path / "README.md", plan=plan, policy=policy, summary=None, base_model="m")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "without its last token" in text
    assert "sent every prompt position" in text


def test_bits_and_their_price_stand_beside_the_bytes_they_save(tmp_path: Path) -> None:
    plan = a_plan()
    codec = Codec("int4", "int3", True, True)
    rules = {plan.decode[0]: Retention(codec=codec), plan.decode[-1]: Retention(codec=codec)}
    policy = KVRetentionPolicy("prefill", KVShape(2, 8), rules)
    summary = replace(a_summary(), recall=(0.97, 0.5, 0.91))
    write_card(tmp_path / "README.md", plan=plan, policy=policy, summary=summary, base_model="m")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"keys int4, values int3 of block(s) {plan.decode[0]}, {plan.decode[-1]}." in card
    assert "| recall, repeated prompt | 0.970 | 0.500 | 0.910 |" in card
    write_report(tmp_path / "r.html", plan=plan, policy=policy, record=a_record(plan), summary=summary)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "keys int4, values int3 of block(s)" in page
    assert "KL to the teacher 0.0000 nats, recall of a repeated prompt 0.910 (teacher 0.970)." in page


def test_a_policy_that_loses_recall_is_warned_of(tmp_path: Path) -> None:
    plan = a_plan()
    summary = replace(a_summary(), recall=(0.97, 0.5, 0.6), recall_everything_sent=0.9)
    warning = "Warning: the KV policy loses 33 % of the recall (0.600 of 0.900 with everything sent)"
    assert any(note.startswith(warning) for note in summary.notes())
    text = write(tmp_path / "report.html", a_record(plan), summary)
    assert f'<p class="warning">{warning}' in text
    kept = replace(summary, recall_everything_sent=0.61)
    assert kept.warning is None
    assert "Warning" not in write(tmp_path / "report.html", a_record(plan), kept)


SECRET = "s3cr3t-value"
HIDDEN = (
    f"token: {SECRET}", f"hf_token: {SECRET}", f"apiKey: {SECRET}", f"password: '{SECRET}'",
    f"aws_secret_access_key: {SECRET}",
    f"url: https://user:{SECRET}@host/x", f"url: s3://b/x?X=1&signature={SECRET}", f"env: {{HOME: {SECRET}}}",
    f"nested: [{{client_secret: {SECRET}}}]", f"Authorization: Bearer {SECRET}", "note: hf_s3cr3tvalueABCDEFGH",
)  # fmt: skip
SHOWN = ("max_new_tokens: 7", "tokenizer: some/model", "chunk_tokens: 128", "author: me", "keys: [a]", "every: 1")


@pytest.mark.parametrize("line", HIDDEN)
def test_what_looks_like_a_secret_is_not_in_the_report(line: str, tmp_path: Path) -> None:
    plan = StagePlan.full(ModelRef("m", "llama", 4))
    configuration = "# a header\nmodel: {model: m}\ntrainer:\n  logger:\n    " + line + "\n"
    notes = {"configuration": configuration, "precision": "32-true"}
    write_report(tmp_path / "r.html", plan=plan, policy=KVRetentionPolicy("prefill", KVShape(2, 8)),
                 record=RunRecord(notes=notes))  # fmt: skip
    page = (tmp_path / "r.html").read_text()
    assert "s3cr3t" not in page
    assert "(redacted)" in page
    assert "32-true" in page


@given(st.lists(st.sampled_from(SHOWN), unique=True))
def test_a_configuration_without_secrets_is_shown_as_it_is(lines: list[str]) -> None:
    text = "\n".join(["# a header", "model: {model: m}", *lines, ""])
    assert redacted({"configuration": text, "steps": 7}) == {"configuration": text, "steps": 7}


def test_a_note_that_is_no_yaml_is_searched_as_text() -> None:
    text = "first: [\n https://me:pw@host\n"
    assert redacted(text) == "first: [\n https://(redacted)@host\n"
