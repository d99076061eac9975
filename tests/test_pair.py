"""The manifest of a pair: what belongs together has one id, and anything else is refused by name."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny_model
from transformers import AutoTokenizer

from pdtrim_pl.cli.main import main
from pdtrim_pl.export import export_pair, load_stage, validate_file
from pdtrim_pl.export.schemas import validate
from pdtrim_pl.models.architectures import architecture_of
from pdtrim_pl.plan import (
    PAIR_FILE,
    PAIR_FORMAT,
    STAGES,
    Codec,
    KVRetentionPolicy,
    PairManifest,
    Retention,
    Stage,
    StagePlan,
    Width,
    write_manifest,
)
from pdtrim_pl.serving.engine import messages as say
from pdtrim_pl.serving.engine.engine import Engine
from pdtrim_pl.serving.engine.frames import FramedLink
from pdtrim_pl.serving.engine.worker import agree_on_pair
from pdtrim_pl.serving.exported import ExportedPair
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.description import kv_shape_of, reference_to

pytestmark = pytest.mark.usefixtures("forked_workers")
MODEL = "decode/model.safetensors"
Change = Callable[[Path], object]


def student(seed: int = 0, *, kv_only: bool = True) -> StagedCausalLM:
    """A tiny student without block 2 in decode and, with `kv_only`, without block 1 in prefill."""
    model = tiny_model("llama", vocab_size=259, seed=seed)
    plan = StagePlan.full(reference_to(model, "tiny"), "free").drop("decode", 2)
    plan = plan.drop("prefill", 1) if kv_only else plan
    policy = KVRetentionPolicy("prefill", kv_shape_of(model), {0: Retention(codec=Codec("int4", "int4"))})
    return StagedCausalLM(model, plan, policy)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    return export_pair(student(), tmp_path_factory.mktemp("sound") / "pair", tokenizer=tokenizer)


@pytest.fixture
def export(sound: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def id_of(export: Path) -> str:
    return str(json.loads((export / PAIR_FILE).read_text())["id"])


def test_every_export_names_what_belongs_together(sound: Path) -> None:
    written = validate_file(sound / PAIR_FILE)
    files = {name: found for part in written["files"].values() for name, found in part.items()}
    assert {"stage_plan.json", "kv_policy.json", MODEL, "prefill/kv_only.safetensors"} <= files.keys()
    for stage in STAGES:
        kinds = {kind: written["files"][f"{stage}.{kind}"].keys() for kind in ("config", "tokenizer")}
        assert kinds["config"] == {f"{stage}/config.json", f"{stage}/generation_config.json"}
        assert {f"{stage}/tokenizer.json", f"{stage}/tokenizer_config.json"} <= kinds["tokenizer"]
    for name, found in files.items():
        content = (sound / name).read_bytes()
        assert found == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert written["boundary"] == "prefill"
    assert written["kv"] == {"num_key_value_heads": 2, "head_dim": 8, "dtype": "float32"}
    assert list(written["codecs"].values()) == [[0]]
    assert written["rope"]["max_position_embeddings"] == 128


@pytest.mark.parametrize(
    ("corrupt", "fault"),
    [
        (lambda pair: pair.update(id="0"), r"\$\.id: '0' does not match"),
        (lambda pair: pair["files"].pop("decode.tokenizer"), "'decode.tokenizer' is a required property"),
        (lambda pair: pair["files"].update(plan={}), r"files\.plan: .* non-empty|files\.plan: \{\} should be"),
        (lambda pair: pair["files"]["policy"]["kv_policy.json"].update(bytes=-1), "-1 is less than the minimum"),
        (lambda pair: pair["codecs"].update(int4=[-1]), "-1 is less than the minimum"),
        (lambda pair: pair.update(more=1), "'more' was unexpected"),
    ],
)
def test_a_damaged_manifest_is_not_valid(corrupt: Callable[[dict[str, Any]], object], fault: str, sound: Path) -> None:
    data = json.loads((sound / PAIR_FILE).read_text())
    validate(data, PAIR_FORMAT)
    corrupt(data)
    with pytest.raises(ValueError, match=fault):
        validate(data, PAIR_FORMAT)


def test_the_id_is_the_hash_of_the_canonical_json_of_the_rest(sound: Path) -> None:
    written = json.loads((sound / PAIR_FILE).read_text())
    named = written.pop("id")
    canonical = json.dumps(written, sort_keys=True, separators=(",", ":"))
    assert named == hashlib.sha256(canonical.encode()).hexdigest()
    assert PairManifest.load(sound).id == named


def test_equal_students_have_equal_ids_and_others_have_others(sound: Path, tmp_path: Path) -> None:
    # safetensors writes the two entries of the metadata of KV-only blocks in any order, so there are none here.
    students = [student(seed, kv_only=False) for seed in (0, 0, 1)]
    ids = [id_of(export_pair(each, tmp_path / str(i), tokenizer=None)) for i, each in enumerate(students)]
    assert ids[0] == ids[1]
    assert len({*ids, id_of(sound)}) == 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("prefill", "decode"), [((0, 2), (1, 3)), ((1, 3), (0,))])
def test_halves_with_different_kinds_of_blocks_are_a_pair(
    family: str, prefill: tuple[int, ...], decode: tuple[int, ...], tmp_path: Path
) -> None:
    model = tiny_model(family)
    plan = replace(StagePlan.full(reference_to(model, "tiny"), "free"), prefill=prefill, decode=decode)
    export = export_pair(StagedCausalLM(model, plan), tmp_path / "pair", tokenizer=None)
    validate_file(export / PAIR_FILE, PAIR_FORMAT)
    assert ExportedPair.read(export, verify=True).plan == plan


@pytest.mark.parametrize("family", FAMILIES)
def test_halves_of_unlike_width_are_a_pair(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    heads = (1, 2) if "heads" in architecture_of(model.config).cuts else None
    plan = StagePlan.full(reference_to(model, "tiny"))
    for block in plan.decode:
        plan = plan.narrow("decode", block, Width((0, 3, 6, 9), heads))
    export = export_pair(StagedCausalLM(model, plan), tmp_path / "pair", tokenizer=None)
    assert ExportedPair.read(export, verify=True).plan == plan


def rewritten(name: str) -> Change:
    """The same JSON in other bytes."""
    return lambda export: (export / name).write_text(json.dumps(json.loads((export / name).read_text())))


def other_rule(export: Path) -> None:
    plan = StagePlan.load(export / "stage_plan.json")
    policy = KVRetentionPolicy.load(export / "kv_policy.json", plan)
    replace(policy, rules={0: Retention("first_last", 1, 1)}).save(export / "kv_policy.json", plan)


CHANGES = [
    (other_rule, r"the policy \(kv_policy\.json has ", True),
    (rewritten("stage_plan.json"), r"the plan \(stage_plan\.json has [\d,]+ bytes instead of [\d,]+\)", True),
    (rewritten("decode/config.json"), r"the decode config \(decode/config\.json has ", True),
    (rewritten("decode/tokenizer.json"), r"the decode tokenizer \(decode/tokenizer\.json has ", False),
    (lambda export: (export / "decode/generation_config.json").unlink(), r"generation_config\.json is missing\)", True),
    (lambda export: (export / MODEL).write_bytes(b""), r"decode weights \(decode/model\.safetensors has 0 bytes", True),
    (lambda export: (export / MODEL).unlink(), r"the decode weights \(decode/model\.safetensors is missing\)", False),
    (lambda export: (export / "decode/vocab.json").write_text("{}"), r"tokenizer \(decode/vocab\.json is new\)", True),
]
"""A change, what is said of it, and whether the files could be a pair nevertheless."""


@pytest.mark.parametrize(("change", "what", "accepted"), CHANGES)
def test_a_changed_file_is_named_and_accepted_if_a_manifest_is_written(
    change: Change, what: str, accepted: bool, export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(export)
    way = rf".*accept it with `pdtrim export --manifest {export}`"
    for read in (lambda: load_stage(export, "decode"), lambda: Engine(export)):
        with pytest.raises(ValueError, match=rf"is not the pair that its pair\.json describes\. .*{what}{way}"):
            read()
    if accepted:
        before = id_of(export)
        assert main(["export", "--manifest", str(export)]) == 0
        assert capsys.readouterr().out == f"{export / PAIR_FILE}\n"
        assert id_of(export) != before
        ExportedPair.read(export, verify=True)
    else:
        assert main(["export", "--manifest", str(export)]) == 1


def test_files_that_change_nothing_are_not_part_of_a_pair(export: Path) -> None:
    (export / "decode" / "README.md").write_text("A model.")
    (export / "decode" / ".cache").mkdir()
    (export / "decode" / ".cache" / "download.json").write_text("{}")
    (export / "report.html").write_text("")
    ExportedPair.read(export, verify=True)


def test_a_node_needs_only_its_own_half(export: Path) -> None:
    shutil.rmtree(export / "prefill")
    assert load_stage(export, "decode", verify=True).originals == (0, 1, 3)


def touch_one_weight(export: Path) -> None:
    """The same shapes and sizes, another number."""
    tensors = load_file(export / MODEL)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, export / MODEL, metadata={"format": "pt"})


def test_other_weights_of_the_same_size_are_found_when_asked(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = (export / MODEL).stat().st_size
    touch_one_weight(export)
    assert (export / MODEL).stat().st_size == size
    load_stage(export, "decode")
    with pytest.raises(ValueError, match=r"the decode weights \(decode/model\.safetensors has another hash\)"):
        load_stage(export, "decode", verify=True)
    load_stage(export, "prefill", verify=True)
    assert main(["generate", "--export", str(export), "--prompt", "Hi", "--verify"]) == 1
    assert "decode/model.safetensors has another hash" in capsys.readouterr().err


def test_an_export_of_an_earlier_version_gets_a_manifest(
    sound: Path, export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (export / PAIR_FILE).unlink()
    for read in (lambda: load_stage(export, "decode"), lambda: ExportedPair.read(export)):
        with pytest.raises(
            ValueError, match=rf"no pair\.json in {export}: .*Write one with `pdtrim export --manifest {export}`"
        ):
            read()
    assert main(["export", f"--manifest={export}"]) == 0
    assert capsys.readouterr().out == f"{export / PAIR_FILE}\n"
    assert (export / PAIR_FILE).read_text() == (sound / PAIR_FILE).read_text()
    assert load_stage(export, "decode").originals == (0, 1, 3)


def test_exporting_without_a_manifest_to_write_still_needs_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--output", "x"])
    assert "ckpt_path" in capsys.readouterr().err


def edited(name: str, **change: Any) -> Change:
    return lambda export: (export / name).write_text(
        json.dumps({**json.loads((export / name).read_text()), **change}), encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (edited("decode/config.json", vocab_size=300), "`vocab_size` is 259 in prefill/config.json and 300 in decode"),
        (edited("decode/config.json", rope_parameters={"rope_theta": 5.0}), "`rope_parameters` is"),
        (rewritten("decode/tokenizer.json"), r"tokenizer\.json is another file in prefill/ than in decode/"),
        (lambda export: (export / MODEL).unlink(), r"decode holds no weights"),
        (lambda export: (export / "kv_policy.json").unlink(), r"no KV policy at"),
        (shutil.rmtree, r"no stage plan at"),
    ],
)
def test_what_cannot_be_a_pair_gets_no_manifest(change: Change, fault: str, export: Path) -> None:
    change(export)
    with pytest.raises(ValueError, match=fault):
        write_manifest(export)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (edited(PAIR_FILE, id="0" * 64), r"`id` is 0000.*it was edited"),
        (edited(PAIR_FILE, boundary="decode"), "it was edited"),
        (edited(PAIR_FILE, format="pdtrim.pair/2"), r"'pdtrim\.pair/2'.*'pdtrim\.pair/1'"),
        (edited(PAIR_FILE, files={}), "malformed near 'plan'"),
        (edited(PAIR_FILE, kv=3), "malformed near"),
        (lambda export: (export / PAIR_FILE).write_text("["), "not valid JSON"),
        (lambda export: (export / PAIR_FILE).write_text("[]"), "`format` None"),
    ],
)
def test_a_damaged_manifest_is_refused_with_the_way_out(change: Change, fault: str, export: Path) -> None:
    change(export)
    with pytest.raises(ValueError, match=rf"pair\.json.*{fault}.*pdtrim export --manifest"):
        PairManifest.load(export)


# The workers


@pytest.fixture
def links(sound: Path) -> Iterator[dict[str, FramedLink]]:
    """Both ends of a connection."""
    ends = socket.socketpair()
    yield {
        stage: FramedLink(end, b"k" * 32, bytes.fromhex(PairManifest.load(sound).id), 2**20)
        for stage, end in zip(STAGES, ends, strict=True)
    }
    for end in ends:
        end.close()


def agree(links: dict[str, FramedLink], prefill: PairManifest, decode: PairManifest) -> list[str]:
    """What each side says, in the order of the stages; nothing if it agrees."""

    def said(stage: Stage, manifest: PairManifest) -> str:
        try:
            agree_on_pair(links[stage], manifest, first=stage == "prefill")
        except ValueError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as threads:
        ends = [threads.submit(said, stage, own) for stage, own in zip(STAGES, (prefill, decode), strict=True)]
        return [end.result(timeout=30) for end in ends]


def test_workers_of_one_pair_agree(links: dict[str, FramedLink], sound: Path) -> None:
    assert agree(links, PairManifest.load(sound), PairManifest.load(sound)) == ["", ""]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (other_rule, "the policy (kv_policy.json), the codecs"),
        (rewritten("stage_plan.json"), "the plan (stage_plan.json)"),
        (touch_one_weight, "the decode weights (decode/model.safetensors)"),
    ],
)
def test_workers_of_different_pairs_refuse_each_other_and_name_what_differs(
    change: Change, what: str, links: dict[str, FramedLink], sound: Path, export: Path
) -> None:
    change(export)
    write_manifest(export)
    ids = [id_of(sound)[:12], id_of(export)[:12]]
    said = agree(links, PairManifest.load(sound), PairManifest.load(export))
    for message, here, there in zip(said, ids, reversed(ids), strict=True):
        assert f"different pairs, {here} here and {there} on the other side. What differs: {what}. Start" in message
    assert agree(links, PairManifest.load(sound), PairManifest.load(sound)) == ["", ""], "the link is still in step"


def test_an_export_that_changes_while_the_workers_start_is_refused(
    sound: Path, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decode worker is started from another pair than the prefill worker."""
    other_rule(export)
    write_manifest(export)
    of_stage = {"prefill": sound, "decode": export}

    def spec(stage: Stage, _: Path, *rest: Any) -> say.WorkerSpec:
        return say.WorkerSpec(stage, of_stage[stage], *rest)

    monkeypatch.setattr("pdtrim_pl.serving.engine.engine.say", SimpleNamespace(**{**vars(say), "WorkerSpec": spec}))
    refused = r"worker refused: The workers hold different pairs, .*the policy"
    with pytest.raises(ValueError, match=refused), Engine(sound):
        pass
