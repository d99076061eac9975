"""lm-evaluation-harness on a pair: for a pair that lost nothing, the figures of the harness's own model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from pdtrim_pl.cli.main import main
from pdtrim_pl.errors import UserError
from pdtrim_pl.export import export_pair
from pdtrim_pl.harness.in_process import InProcessPair
from pdtrim_pl.harness.local_data import rows_of_file
from pdtrim_pl.models.pretrained import load_causal_lm
from pdtrim_pl.plan import Boundary, Codec, KVRetentionPolicy, Retention, StagePlan
from pdtrim_pl.staged import StagedCausalLM
from pdtrim_pl.staged.decoding import generate, greedy
from pdtrim_pl.staged.description import kv_shape_of, reference_to

BOUNDARIES: tuple[Boundary, ...] = ("prefill", "decode")
PROMPTS = [[5, 9, 33, 40, 7, 8, 100], [12], [77, 78, 79, 80]]
RESPONSES = [[20, 30], [40, 50, 60, 70, 80], [3]]
PAIRS = [
    ("The sky", " is blue"),
    ("The sky", " is green and wide"),
    ("The sky", " is blub"),
    ("The sky is", " blue"),
    ("", "Once upon a time"),
    ("A question with a longer context. " * 9, "yes"),
    ("x " * 300, "a context that does not fit"),
]
ROLLING = ["A short text.", "A text that is longer than the context. " * 16]


def staged(folder: Path, boundary: Boundary, *, trimmed: bool) -> StagedCausalLM:
    """The tiny Llama: whole and sending everything, or without blocks, with positions left out and few bits."""
    model = load_causal_lm(str(folder))
    plan = StagePlan.full(reference_to(model, str(folder)), "free", boundary)
    rules = {}
    if trimmed:
        plan = plan.drop("prefill", 1).drop("decode", 2)
        rules = {0: Retention("first_last", 2, 0.25), 3: Retention(codec=Codec("int4", "int4"))}
    return StagedCausalLM(model, plan, KVRetentionPolicy(plan.boundary, kv_shape_of(model), rules)).eval()


def exported(folder: Path, target: Path, boundary: Boundary, *, trimmed: bool) -> tuple[Path, StagedCausalLM]:
    student = staged(folder, boundary, trimmed=trimmed)
    return export_pair(student, target, tokenizer=AutoTokenizer.from_pretrained(folder), dtype=torch.float32), student


# Without the harness


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("trimmed", [False, True])
def test_a_pair_in_one_process_computes_what_the_student_does(
    boundary: Boundary, trimmed: bool, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    export, student = exported(tiny_llama_dir, tmp_path / "pair", boundary, trimmed=trimmed)
    pair = InProcessPair.load(export)
    for prompt, response, found in zip(PROMPTS, RESPONSES, pair.response_logits(PROMPTS, RESPONSES), strict=True):
        with torch.no_grad():
            expected = student.logits(student(torch.tensor([prompt]), torch.tensor([response])).hidden)[0]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0.0)
    ids = torch.tensor([[0, 0, 5, 9], [12, 13, 14, 15]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    loop = pair.stream(ids, mask, room=9, pick=greedy, stop_ids=())
    assert torch.stack(list(loop), dim=1).equal(generate(student, ids, mask, max_new_tokens=9))


def test_without_the_harness_one_sentence_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", "--export", str(tmp_path), "--tasks", "piqa"]) == 1
    assert "`pip install 'pdtrim_pl[eval]'`" in capsys.readouterr().err


def test_the_data_of_a_task_file_comes_from_the_folder_that_a_variable_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PDTRIM_DATA", raising=False)
    with pytest.raises(UserError, match=r"rows\.jsonl from a folder of yours: set the variable PDTRIM_DATA"):
        rows_of_file(file="rows.jsonl")
    monkeypatch.setenv("PDTRIM_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"no .*rows\.jsonl: PDTRIM_DATA is "):
        rows_of_file(file="rows.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"context": "a"}\n{"context": "b"}\n')
    assert rows_of_file(file="rows.jsonl", version=1.0)["test"]["context"] == ["a", "b"]


# With it


@pytest.fixture(scope="module")
def harness() -> Any:
    return pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness (the extra `eval`)")


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]  # type: ignore[arg-type]


def answers(model: Any) -> tuple[list[Any], list[float], list[str]]:
    """Everything that a task can ask of a model."""
    greedily = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    contexts = [(context, greedily) for context, _ in PAIRS[:4]] + [("x " * 300, greedily)]
    return (
        model.loglikelihood(requests("loglikelihood", PAIRS)),
        model.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in ROLLING])),
        model.generate_until(requests("generate_until", contexts)),
    )


def assert_same_answers(found: Any, expected: Any) -> None:
    (pairs, rolling, texts), (own_pairs, own_rolling, own_texts) = found, expected
    assert [likelihood for likelihood, _ in pairs] == pytest.approx([each for each, _ in own_pairs], abs=1e-4)
    assert [greedy for _, greedy in pairs] == [greedy for _, greedy in own_pairs]
    assert rolling == pytest.approx(own_rolling, abs=1e-3, rel=1e-6)
    assert texts == own_texts


@pytest.fixture(scope="module")
def reference(harness: Any, tiny_llama_dir: Path) -> Any:
    """The answers of the harness's own model."""
    from lm_eval.models.huggingface import HFLM

    # With its cache of logits it scores " blue" after "The sky is" at the first places of " is blue" after "The sky".
    return answers(HFLM(str(tiny_llama_dir), device="cpu", dtype="float32", logits_cache=False))


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_a_pair_that_lost_nothing_answers_as_the_harness_own_model(
    boundary: Boundary, batch_size: int | str, reference: Any, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    from pdtrim_pl.harness.model import PairLM

    export, _ = exported(tiny_llama_dir, tmp_path / "pair", boundary, trimmed=False)
    assert_same_answers(answers(PairLM(str(export), batch_size=batch_size, max_batch_size=4)), reference)


def test_the_other_modes_are_the_decode_checkpoint_and_the_unpruned_model(
    reference: Any, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    from lm_eval.models.huggingface import HFLM

    from pdtrim_pl.harness.model import PairLM

    export, _ = exported(tiny_llama_dir, tmp_path / "pair", "prefill", trimmed=True)
    for mode, folder in (("dense", tiny_llama_dir), ("unified", export / "decode")):
        found = answers(PairLM(str(export), mode))
        assert_same_answers(found, answers(HFLM(str(folder), device="cpu", dtype="float32")))
    assert found[0] != reference[0]


def test_a_trimmed_pair_is_scored_under_its_contract(harness: Any, tiny_llama_dir: Path, tmp_path: Path) -> None:
    from pdtrim_pl.harness.model import PairLM

    export, student = exported(tiny_llama_dir, tmp_path / "pair", "prefill", trimmed=True)
    model = PairLM(str(export), batch_size=4)
    found = model.loglikelihood(requests("loglikelihood", PAIRS[:4]))
    for (context, continuation), (likelihood, _) in zip(PAIRS[:4], found, strict=True):
        prompt = model.tok_encode(context) if context else [model.prefix_token_id]
        response = model.tok_encode(continuation)
        with torch.no_grad():
            logits = student.logits(student(torch.tensor([prompt]), torch.tensor([response])).hidden)[0]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()
        assert likelihood == pytest.approx(float(expected), abs=1e-4)


def test_unknown_settings_are_refused(harness: Any, tiny_llama_dir: Path, tmp_path: Path) -> None:
    from pdtrim_pl.harness.model import PairLM

    with pytest.raises(UserError, match="`mode` is 'both': choose one of disaggregated, unified, dense"):
        PairLM(str(tmp_path), "both")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has no setting peft"):
        PairLM(str(tmp_path), peft="x")
    export, _ = exported(tiny_llama_dir, tmp_path / "pair", "prefill", trimmed=False)
    model = PairLM(str(export))
    sampled = {"until": [], "max_gen_toks": 3, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    with pytest.raises(UserError, match="cannot generate with `generation_kwargs` top_p"):
        model.generate_until(requests("generate_until", [("a", sampled)]))
    texts = model.generate_until(requests("generate_until", [("a", {**sampled, "top_p": 1.0, "top_k": 5})]))
    assert len(texts) == 1


TASK = """
task: which_colour
custom_dataset: !function pdtrim_pl.harness.local_data.rows_of_file
dataset_kwargs:
  file: colours.jsonl
output_type: multiple_choice
test_split: test
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list:
  - metric: acc
"""


def test_tasks_run_from_the_command_line(
    harness: Any, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    export, _ = exported(tiny_llama_dir, tmp_path / "pair", "prefill", trimmed=False)
    tasks, data = tmp_path / "tasks", tmp_path / "data"
    tasks.mkdir()
    (data / "lambada").mkdir(parents=True)
    (tasks / "which_colour.yaml").write_text(TASK)
    rows = [{"context": f"Thing {i} is", "choices": ["red", "blue", "green"], "label": i % 3} for i in range(12)]
    (data / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [{"context": f"He said the word {i},", "target": "again"} for i in range(5)]
    (data / "lambada" / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in words))
    monkeypatch.setenv("PDTRIM_DATA", str(data))
    asked = ["eval", "--export", str(export), "--device", "cpu"]
    shown: dict[str, Any] = {}
    for mode in ("disaggregated", "dense"):
        output = tmp_path / f"{mode}.json"
        own = ["--include_path", str(tasks), "--mode", mode, "--batch_size", "4", "--output", str(output)]
        assert main([*asked, "--tasks", "which_colour", *own]) == 0
        assert "which_colour" in capsys.readouterr().out
        shown[mode] = json.loads(output.read_text())["results"]["which_colour"]
    assert shown["disaggregated"] == shown["dense"]
    shipped = str(Path(__file__).parents[1] / "configs" / "tasks")
    assert main([*asked, "--tasks", "lambada_local", "--include_path", shipped, "--limit", "3"]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert main([*asked, "--tasks", "no_such_task"]) == 1
    assert "`tasks` names no known task: no_such_task" in capsys.readouterr().err


def test_the_command_of_the_harness_knows_the_model(harness: Any, tiny_llama_dir: Path, tmp_path: Path) -> None:
    export, _ = exported(tiny_llama_dir, tmp_path / "pair", "prefill", trimmed=False)
    (tmp_path / "which_colour.yaml").write_text(TASK)
    (tmp_path / "colours.jsonl").write_text('{"context": "It is", "choices": ["red", "blue"], "label": 1}\n')
    command = [
        sys.executable, "-m", "pdtrim_pl.harness", "--model", "pdtrim", "--model_args",
        f"export={export},mode=disaggregated", "--tasks", "which_colour", "--include_path", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "PDTRIM_DATA": str(tmp_path)}
    )
    assert "which_colour" in done.stdout
