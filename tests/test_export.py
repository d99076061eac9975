"""Export and load: the pair computes what the student computes, and nothing is lost on the way."""

import contextlib
import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from strategies import plans, policies
from tiny_models import FAMILIES, tiny_model
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from pdtrim_pl.export import (
    export_pair,
    load_plan_and_policy,
    load_stage,
    stage_config,
    stage_tensors,
    verify,
    verify_pair,
    write_checkpoint,
)
from pdtrim_pl.export.checkpoints import cast
from pdtrim_pl.export.upcast import compute_in_float32
from pdtrim_pl.models.pretrained import load_causal_lm, load_tokenizer
from pdtrim_pl.plan import (
    STAGES,
    Boundary,
    Codec,
    KVRetentionPolicy,
    Retention,
    Stage,
    StagePlan,
    Width,
    write_manifest,
)
from pdtrim_pl.staged import KVCache, StagedCausalLM
from pdtrim_pl.staged.description import kv_shape_of, reference_to

BLOCKS = 4
MODEL, KV_ONLY = "prefill/model.safetensors", "prefill/kv_only.safetensors"
Damage = Callable[[Path], object]


def student_of(
    family: str, plan: StagePlan | None = None, policy: KVRetentionPolicy | None = None, **overrides: Any
) -> StagedCausalLM:
    """A tiny student whose untied weights differ from the shared ones."""
    staged = StagedCausalLM(tiny_model(family, blocks=BLOCKS, **overrides), plan, policy).eval()
    generator = torch.Generator().manual_seed(1)
    for gate in staged.gates.values():
        for weights in gate.untied.values():
            for parameter in weights.parameters():
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return staged


def plan_of(
    family: str, prefill: tuple[int, ...], decode: tuple[int, ...], boundary: Boundary = "prefill", **fields: Any
) -> StagePlan:
    full = StagePlan.full(reference_to(tiny_model(family, blocks=BLOCKS), "tiny"), "free", boundary)
    return replace(full, prefill=prefill, decode=decode, **fields)


def request() -> tuple[Tensor, Tensor, Tensor]:
    """Prompt ids [2, 11], their mask with left padding, and response ids [2, 5]."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 64, (2, 16), generator=generator)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, :4] = False
    return ids[:, :11], mask, ids[:, 11:]


@torch.no_grad()
def student_logits(staged: StagedCausalLM) -> Tensor:
    prompt, mask, response = request()
    return staged.logits(staged(prompt, response, mask).hidden)


@torch.no_grad()
def worker_logits(export: Path) -> Tensor:
    """Prefill on one worker, the policy, decode on the other; token by token as a decode node works."""
    prompt, mask, response = request()
    prefill, decode = load_stage(export, "prefill"), load_stage(export, "decode")
    late = prefill.plan.boundary == "decode"
    handled = prompt.shape[1] - late
    encoded = prefill.prefill(prompt[:, :handled], mask[:, :handled])
    cache = encoded.cache.retained(prefill.policy)
    rows = [] if late else [prefill.logits(encoded.hidden[:, -1:])]
    fed = torch.cat([prompt[:, -1:], response[:, :-1]], dim=1) if late else response[:, :-1]
    for token in fed.split(1, dim=1):
        out = decode.decode(token, cache)
        rows.append(decode.logits(out.hidden))
        cache = out.cache
    return torch.cat(rows, dim=1)


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


# The pair and the student


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_two_workers_compute_the_students_logits(family: str, tmp_path: Path, data: st.DataObject) -> None:
    model = tiny_model(family, blocks=BLOCKS)
    plan = data.draw(plans(BLOCKS, model=reference_to(model, "tiny")))
    policy = data.draw(st.none() | policies(plan, kv=kv_shape_of(model)))
    student = student_of(family, plan, policy)
    export = export_pair(student, tmp_path / "export", tokenizer=None, overwrite=True)
    assert load_plan_and_policy(export)[0] == plan
    torch.testing.assert_close(worker_logits(export), student_logits(student), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("boundary", ["prefill", "decode"])
def test_kv_only_blocks_between_at_the_start_and_at_the_end_are_put_back(
    family: str, boundary: Boundary, tmp_path: Path
) -> None:
    # Prefill runs blocks of one attention type only, so the KV-only ones need a RoPE table it does not have itself.
    plan = plan_of(family, (0, 2), (1, 2, 3), boundary, untied={"prefill": (2,), "decode": (2, 3)})
    model = tiny_model(family, blocks=BLOCKS)
    policy = KVRetentionPolicy(boundary, kv_shape_of(model), {1: Retention("first_last", 1, 0.3)})
    student = student_of(family, plan, policy)
    export = export_pair(student, tmp_path / "export", tokenizer=None)
    torch.testing.assert_close(worker_logits(export), student_logits(student), atol=1e-4, rtol=0)
    worker = load_stage(export, "prefill")
    assert worker.originals == (0, 1, 2, 3)
    held = {name for name, _ in worker.gates[1].block.named_parameters()}
    assert {name.rpartition(".")[0] for name in held} == set(worker.architecture.kv_modules)
    assert not any(p.is_meta for p in worker.parameters())


def test_an_export_names_no_code_that_it_does_not_hold(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """What BAAI-DCAI/M3D#6 reports: `auto_map` points at files that stayed with the original model."""
    folder = tmp_path / "with code"
    shutil.copytree(tiny_llama_dir, folder)
    code = {"auto_map": {"AutoConfig": "configuration_own.Own", "AutoTokenizer": ["tokenization_own.Own", None]}}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        file = folder / name
        settings = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**settings, **code, "custom_pipelines": {"own": {"impl": "own.Own"}}}))
    model, tokenizer = load_causal_lm(str(folder)), load_tokenizer(str(folder))
    tokenizer.init_kwargs.update(code)
    export = export_pair(StagedCausalLM(model), tmp_path / "pair", tokenizer=tokenizer)
    written = {path.relative_to(export): path.read_text(encoding="utf-8") for path in export.rglob("*.json")}
    assert {Path(stage, name) for stage in STAGES for name in ("config.json", "tokenizer_config.json")} <= set(written)
    assert [str(path) for path, text in written.items() if "auto_map" in text or "custom_pipelines" in text] == []
    again = load_tokenizer(str(export / "decode"))
    assert again("Grüße")["input_ids"] == tokenizer("Grüße")["input_ids"]


def test_a_worker_reads_only_its_own_stage(tmp_path: Path) -> None:
    export = export_pair(student_of("llama"), tmp_path / "export", tokenizer=None)
    shutil.rmtree(export / "prefill")
    assert load_stage(export, "decode").originals == (0, 1, 2, 3)


def test_each_stage_gets_its_own_untied_weights(tmp_path: Path) -> None:
    student = student_of("llama", plan_of("llama", (0, 1, 3), (0, 3), untied={"decode": (3,)}))
    export = export_pair(student, tmp_path / "export", tokenizer=None)
    prefill, decode = load_stage(export, "prefill"), load_stage(export, "decode")
    name = "self_attn.q_proj.weight"
    assert torch.equal(prefill.gates[3].block.state_dict()[name], student.gates[3].block.state_dict()[name])
    assert torch.equal(decode.gates[3].block.state_dict()[name], student.gates[3].untied["decode"].state_dict()[name])
    assert not any(decode.plan.untied.values())
    assert not decode.gates[3].untied


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_written_once(tied: bool, tmp_path: Path) -> None:
    student = student_of("llama", tie_word_embeddings=tied)
    export = export_pair(student, tmp_path / "export", tokenizer=None)
    written = load_file(export / "decode" / "model.safetensors")
    assert ("lm_head.weight" in written) is not tied
    loaded = load_stage(export, "decode").model
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) is tied


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_a_bf16_export_computes_what_the_rounded_student_computes(family: str, tmp_path: Path) -> None:
    plan = plan_of(family, (0, 2), (0, 1, 3), untied={"decode": (0,)})
    student = student_of(family, plan)
    export = export_pair(student, tmp_path / "export", tokenizer=None, dtype=torch.bfloat16)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    worker = load_stage(export, "prefill")
    assert {p.dtype for p in worker.parameters()} == {torch.bfloat16}
    assert load_plan_and_policy(export)[1].kv.dtype == "bfloat16"
    rounded = student_of(family, plan)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    assert verify_pair(export, student, dtype=torch.bfloat16) == 0
    torch.testing.assert_close(worker_logits(export), student_logits(rounded), atol=5e-2, rtol=5e-2)
    assert {p.dtype for p in load_stage(export, "decode", dtype=torch.float32).parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_pair_in_sixteen_bits_is_compared_in_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    """Sliced matrices add up in another order. In 16 bits that is percents of a logit, in fp32 it is not."""
    model = tiny_model("llama", blocks=BLOCKS, intermediate_size=1024)
    width = Width(channels=tuple(range(0, 1024, 3)))
    widths = dict.fromkeys(STAGES, dict.fromkeys(range(BLOCKS), width))
    student = StagedCausalLM(model, replace(StagePlan.full(reference_to(model, "tiny")), widths=widths)).eval()
    export = export_pair(student, tmp_path / "export", tokenizer=None, dtype=dtype)
    assert verify_pair(export, student, dtype=dtype) < 1e-5


def test_weights_of_sixteen_bits_are_as_before_after_they_were_used_in_fp32(tmp_path: Path) -> None:
    export = export_pair(student_of("gemma3_text"), tmp_path / "export", tokenizer=None, dtype=torch.bfloat16)
    worker = compute_in_float32(load_stage(export, "decode"))
    before = {name: tensor.clone() for name, tensor in worker.state_dict().items()}
    prompt, mask, response = request()
    with torch.no_grad():
        assert worker.logits(worker(prompt, response, mask).hidden).dtype == torch.float32
    for name, tensor in worker.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


def test_weights_on_a_gpu_are_cast_in_host_memory() -> None:
    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default:
                copies.append((args[0].device.type, out.device.type, args[0].dtype == out.dtype))
            return out

    copies: list[tuple[str, str, bool]] = []
    with FakeTensorMode(), Casts():  # there is no GPU, but its tensors know where they would be
        tensors = cast(
            {"weight": torch.empty(3, device="cuda"), "ids": torch.empty(3, device="cuda").long()}, torch.bfloat16
        )
    assert {name: (x.device.type, x.dtype) for name, x in tensors.items()} == {
        "weight": ("cpu", torch.bfloat16), "ids": ("cpu", torch.int64),
    }  # fmt: skip
    assert ("cuda", "cpu", True) in copies
    assert ("cpu", "cpu", False) in copies
    made_here = [copy for copy in copies if copy[:2] == ("cuda", "cuda")]
    assert len(made_here) == 1, "the ids of this test"


def test_an_export_changes_nothing_in_the_student(tmp_path: Path) -> None:
    student = student_of("gemma3_text", plan_of("gemma3_text", (0, 2), (0, 1), untied={"decode": (0,)})).train()
    before = {name: (id(p), p.clone()) for name, p in student.named_parameters()}
    config, plan, modules = copy.deepcopy(student.model.config), student.plan, list(student.modules())
    export_pair(student, tmp_path / "export", tokenizer=None, dtype=torch.bfloat16)
    after = dict(student.named_parameters())
    assert after.keys() == before.keys()
    for name, (identity, value) in before.items():
        assert id(after[name]) == identity
        assert torch.equal(after[name], value)
    assert student.model.config.to_dict() == config.to_dict()
    assert student.plan is plan
    assert [id(m) for m in student.modules()] == [id(m) for m in modules]
    assert all(m.training for m in student.modules())


def test_a_loaded_stage_cannot_be_exported_as_a_student(tmp_path: Path) -> None:
    export = export_pair(student_of("llama", plan_of("llama", (0, 1), (1, 3))), tmp_path / "export", tokenizer=None)
    with pytest.raises(ValueError, match=r"holds only blocks \[1, 3\], and its plan runs \[0\] too"):
        export_pair(load_stage(export, "decode"), tmp_path / "second", tokenizer=None)


# Stock classes

STOCK = """
import sys
sys.modules["pdtrim_pl"] = None  # any import of it fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for directory in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert AutoTokenizer.from_pretrained(directory)("a").input_ids
    assert type(model).__module__.startswith("transformers.models.")
    with torch.no_grad():
        torch.save(model(torch.arange(3, 20)[None]).logits, directory + "/logits.pt")
"""


def test_stock_transformers_loads_the_decode_stage_in_a_process_without_this_package(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    cases = [("llama", "nested"), ("gemma2", "unified"), ("gemma3_text", "nested"), ("qwen2", "unified")]
    students: dict[str, StagedCausalLM] = {}
    for family, relation in cases:
        decode = (0, 3)
        plan = plan_of(family, (0, 1, 3) if relation == "nested" else decode, decode, relation=relation)
        student = student_of(family, plan)
        export = export_pair(student, tmp_path / family, tokenizer=tokenizer)
        assert (export / "decode" / "generation_config.json").exists()
        students[str(export / "decode")] = student
    command = [sys.executable, "-I", "-c", STOCK, *students]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    ids = torch.arange(3, 20)[None]
    for directory, student in students.items():
        both = replace(student.plan, prefill=student.plan.decode, relation="unified")
        with torch.no_grad():
            expected = student.logits(student.prefill(ids, plan=both).hidden)
        torch.testing.assert_close(torch.load(Path(directory) / "logits.pt"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stage", STAGES)
def test_per_block_settings_are_sliced_by_name(stage: Stage, tmp_path: Path) -> None:
    student = student_of("gemma2", plan_of("gemma2", (0, 2, 3), (1, 3)))
    write_checkpoint(student, stage, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    kinds = {"prefill": ["sliding", "sliding", "full"], "decode": ["full", "full"]}[stage]
    assert config["layer_types"] == [f"{kind}_attention" for kind in kinds]
    assert config["num_hidden_layers"] == len(kinds)


def test_a_list_that_has_the_number_of_blocks_by_chance_is_left_alone() -> None:
    config = tiny_model("llama", blocks=BLOCKS, eos_token_id=[2, 3, 4, 5]).config
    assert stage_config(config, [0, 2]).eos_token_id == [2, 3, 4, 5]
    assert config.num_hidden_layers == BLOCKS


def test_stage_tensors_have_the_stock_names() -> None:
    student = student_of("gpt_neox", plan_of("gpt_neox", (0, 1), (1, 3)))
    assert stage_tensors(student, "decode").keys() == tiny_model("gpt_neox", blocks=2).state_dict().keys()


# The target


def test_an_existing_target_is_refused_without_overwrite(tmp_path: Path) -> None:
    target = tmp_path / "export"
    export_pair(student_of("llama"), target, tokenizer=None)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=r"target .*export exists\..*`overwrite: true` \(`--overwrite`\)"):
        export_pair(student_of("llama", seed=1), target, tokenizer=None)
    assert files_of(tmp_path) == before


def leave_a_file(directory: Path) -> None:
    (directory / "old.txt").write_text("old")


def test_overwrite_replaces_an_earlier_export_whole(tmp_path: Path) -> None:
    target = tmp_path / "export"
    export_pair(student_of("llama"), target, tokenizer=None, extras=leave_a_file)
    student = student_of("llama", plan_of("llama", (0, 1), (1,)), seed=1)
    export_pair(student, target, tokenizer=None, overwrite=True)
    assert not (target / "old.txt").exists()
    assert load_plan_and_policy(target)[0] == student.plan
    assert list(tmp_path.iterdir()) == [target]


def test_overwrite_never_deletes_what_is_not_an_export(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    student_of("llama").plan.save(home / "stage_plan.json")  # a run keeps plans too
    with pytest.raises(ValueError, match="is not an export"):
        export_pair(student_of("llama"), home, tokenizer=None, overwrite=True)
    (tmp_path / "file").write_text("a file")
    with pytest.raises(ValueError, match="is not an export"):
        export_pair(student_of("llama"), tmp_path / "file", tokenizer=None, overwrite=True)
    assert (home / "thesis.txt").read_text() == "years of work"


def fail(directory: Path) -> None:
    assert (directory / "decode" / "config.json").exists()
    raise OSError("no space left on device")


def spoil(directory: Path) -> None:
    path = directory / "decode" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] += 1
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("extras", "kind", "fault"),
    [(fail, OSError, "no space left"), (spoil, ValueError, r"decode does not hold the student's tensor model\.norm")],
)
def test_a_failed_export_leaves_the_earlier_one_and_no_traces(
    extras: Callable[[Path], None], kind: type[Exception], fault: str, tmp_path: Path
) -> None:
    target = tmp_path / "export"
    export_pair(student_of("llama"), target, tokenizer=None)
    before = files_of(tmp_path)
    with pytest.raises(kind, match=fault):
        export_pair(student_of("llama", seed=1), target, tokenizer=None, overwrite=True, extras=extras)
    with pytest.raises(kind, match=fault):
        export_pair(student_of("llama", seed=1), tmp_path / "new", tokenizer=None, extras=extras)
    assert files_of(tmp_path) == before
    assert list(tmp_path.iterdir()) == [target]


def noisy_keys(monkeypatch: pytest.MonkeyPatch, size: float) -> list[KVCache]:
    """Let the keys that the pair's prefill computes differ a little from the student's; returns both caches."""
    original, seen = verify._prefilled, list[KVCache]()

    def prefilled(model: StagedCausalLM, probe: verify.Probe) -> tuple[Tensor, KVCache]:
        first, cache = original(model, probe)
        if not seen:  # the pair comes first
            generator = torch.Generator().manual_seed(0)
            blocks = {
                index: replace(
                    kv, keys=kv.keys + size * kv.keys.abs().max() * torch.randn(kv.keys.shape, generator=generator)
                )
                for index, kv in cache.blocks.items()
            }
            cache = replace(cache, blocks=blocks)
        seen.append(cache)
        return first, cache

    monkeypatch.setattr(verify, "_prefilled", prefilled)
    return seen


def test_a_codec_does_not_magnify_what_the_order_of_additions_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = student_of("llama")
    for gate in student.gates.values():  # sharp attention: a step of the codec matters
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj"):
            gate.block.get_submodule(name).get_parameter("weight").data *= 30
    rule = Retention(codec=Codec("int2", "int2"))
    student.apply_policy(KVRetentionPolicy("prefill", student.kv_shape, dict.fromkeys(range(BLOCKS), rule)))
    export = export_pair(student, tmp_path / "export", tokenizer=None)
    caches = noisy_keys(monkeypatch, 2e-5)
    verify_pair(export, student)
    vocabulary = student.model.config.vocab_size
    probe, first = verify.Probe.of(vocabulary, 512), torch.zeros(2, 1, vocabulary)
    with torch.no_grad():
        pair, own = (verify._decoded(student, probe, first, cache.retained(student.policy)) for cache in caches)
    allowed = verify.TOLERANCE * max(1.0, float(own.abs().max()))
    assert float((pair - own).abs().max()) > allowed, "so it would be refused if each decoded its own cache"


def test_keys_that_differ_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = student_of("llama")
    export = export_pair(student, tmp_path / "export", tokenizer=None)
    noisy_keys(monkeypatch, 1e-2)
    with pytest.raises(ValueError, match="does not compute the student's keys of block 0: they differ by"):
        verify_pair(export, student)


def test_logits_that_differ_are_refused(tmp_path: Path) -> None:
    student = student_of("llama", plan_of("llama", (0, 1, 2, 3), (0, 3)))
    export = export_pair(student, tmp_path / "export", tokenizer=None)
    settings = json.loads((export / "decode" / "config.json").read_text())
    (export / "decode" / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.5}))
    write_manifest(export)
    with pytest.raises(ValueError, match="does not compute the student's logits: they differ by"):
        verify_pair(export, student)
    student.apply_plan(StagePlan.full(student.plan.model))
    with pytest.raises(ValueError, match=r"stage_plan\.json is not the student's plan"):
        verify_pair(export, student)


# Damaged and foreign files


@pytest.fixture(scope="module")
def sound_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with KV-only blocks."""
    student = student_of("qwen2", plan_of("qwen2", (0, 2), (0, 1, 3)))
    return export_pair(student, tmp_path_factory.mktemp("sound") / "export", tokenizer=None)


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(export: Path) -> None:
        data = json.loads((export / name).read_text())
        change(data)
        (export / name).write_text(json.dumps(data))

    return damage


def truncate(name: str) -> Damage:
    return lambda export: (export / name).write_bytes((export / name).read_bytes()[:-100])


def lose(name: str, *tensors: str) -> Damage:
    def damage(export: Path) -> None:
        with safe_open(export / name, framework="pt") as file:
            metadata = file.metadata()
        left = {key: x for key, x in load_file(export / name).items() if key not in tensors}
        save_file(left, export / name, metadata=metadata)

    return damage


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda export: (export / "stage_plan.json").unlink(), r"no stage plan at .*stage_plan\.json"),
        (edit("stage_plan.json", lambda d: d.update(format="pdtrim.stage_plan/3")), r"stage_plan\.json .*plan/3"),
        (edit("stage_plan.json", lambda d: d["decode"].update(blocks=[9])), r"stage_plan\.json .*outside 0\.\.3"),
        (edit("stage_plan.json", lambda d: d["prefill"].update(kv_only=[])), r"stage_plan\.json .*`prefill.kv_only`"),
        (edit("stage_plan.json", lambda d: d["model"].update(model_type="llama")), r"config\.json .*'qwen2'.*'llama'"),
        (edit("kv_policy.json", lambda d: d.update(boundary="decode")), r"kv_policy\.json .*boundary"),
        (edit("kv_policy.json", lambda d: d["blocks"].pop()), r"kv_policy\.json .*not the blocks of stage_plan\.json"),
        (edit("kv_policy.json", lambda d: d["blocks"][0].update(prefill=1)), r"kv_policy\.json .*not the blocks of"),
        (lambda export: shutil.rmtree(export / "prefill"), r"prefill/config\.json cannot be used"),
        (lambda export: (export / "prefill/config.json").write_text("{"), r"prefill/config\.json cannot be used"),
        (edit("prefill/config.json", lambda d: d.update(model_type="t5")), r"prefill/config\.json .*'t5'"),
        (
            edit("prefill/config.json", lambda d: d.update(num_hidden_layers=3, layer_types=None)),
            r"prefill/config\.json .*has 3 blocks, and stage_plan\.json gives the `prefill` stage 2",
        ),
        (edit("prefill/config.json", lambda d: d.update(intermediate_size=40)), "prefill cannot be used"),
        (edit("prefill/config.json", lambda d: d.update(hidden_size="two")), r"prefill/config\.json .*hidden_size"),
        (edit("prefill/config.json", lambda d: d.update(dtype="int3")), r"prefill cannot be used: .*int3"),
        (truncate(MODEL), r"prefill/model\.safetensors cannot be used"),
        (lambda export: (export / MODEL).unlink(), "prefill cannot be used: .*model.safetensors"),
        (lose(MODEL, "model.layers.1.mlp.up_proj.weight"), r"missing_keys.*layers\.1\.mlp\.up_proj\.weight"),
        (lambda export: (export / KV_ONLY).unlink(), r"kv_only\.safetensors cannot be used"),
        (truncate(KV_ONLY), r"kv_only\.safetensors cannot be used"),
        (lose(KV_ONLY, "blocks.3.self_attn.k_proj.bias"), r"kv_only\.safetensors .*block 3 has tensors"),
        (
            lambda export: save_file(load_file(export / KV_ONLY), export / KV_ONLY),
            r"kv_only\.safetensors .*`format` is None",
        ),
        (lambda export: shutil.copy(export / MODEL, export / KV_ONLY), r"kv_only\.safetensors .*`format` is 'pt'"),
    ],
)
def test_a_damaged_export_is_refused_with_the_files_name(
    damage: Damage, fault: str, sound_export: Path, tmp_path: Path
) -> None:
    export = tmp_path / "export"
    shutil.copytree(sound_export, export)
    damage(export)
    with contextlib.suppress(ValueError):  # the damage is accepted as a change, so that loading goes on
        write_manifest(export)
    with pytest.raises(ValueError, match=fault):
        load_stage(export, "prefill")


def test_an_unknown_stage_is_refused(sound_export: Path) -> None:
    with pytest.raises(ValueError, match="Unknown `stage` 'encode': choose one of prefill, decode"):
        load_stage(sound_export, "encode")  # type: ignore[arg-type]


def test_eager_attention_is_chosen_where_the_model_needs_it(tmp_path: Path) -> None:
    for family, attention in (("gemma2", "eager"), ("llama", "sdpa")):
        export = export_pair(student_of(family), tmp_path / family, tokenizer=None)
        assert load_stage(export, "decode").model.config._attn_implementation == attention
    assert load_stage(export, "decode", attn_implementation="eager").model.config._attn_implementation == "eager"


def test_every_file_can_be_read_by_whoever_can_read_the_config(tmp_path: Path) -> None:
    student = student_of("llama", plan_of("llama", (0, 1), (0, 2)))
    export = export_pair(student, tmp_path / "export", tokenizer=None)
    assert len({path.stat().st_mode for path in export.rglob("*") if path.is_file()}) == 1


def test_generation_settings_travel_with_both_checkpoints(tmp_path: Path) -> None:
    student = student_of("llama")
    student.model.generation_config.max_new_tokens = 17
    export = export_pair(student, tmp_path / "export", tokenizer=None)
    for stage in STAGES:
        assert AutoModelForCausalLM.from_pretrained(export / stage).generation_config.max_new_tokens == 17
