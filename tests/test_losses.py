"""Losses: known values, zero for equal models, chunked equal to dense in value and gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model
from torch.nn import functional as F

from pdtrim_pl.data.collate import Batch
from pdtrim_pl.losses import (
    JSD,
    KL,
    CrossEntropy,
    HiddenMatch,
    KVMatch,
    LossTerm,
    ReverseKL,
    TokenLoss,
    check_terms,
    token_weights,
    training_loss,
)
from pdtrim_pl.module import PDTrimModule
from pdtrim_pl.plan import Boundary, Codec, KVRetentionPolicy, Retention, StagePlan, Width
from pdtrim_pl.staged import StagedCausalLM

EVERY: tuple[LossTerm, ...] = (
    KL(temperature=2.0),
    ReverseKL(),
    JSD(),
    CrossEntropy(),
    HiddenMatch(),
    HiddenMatch(metric="cosine"),
    KVMatch(),
)


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 64, (3, 9), generator=generator)
    response = torch.randint(3, 64, (3, 7), generator=generator)
    prompt_mask, response_mask = torch.ones(3, 9, dtype=torch.bool), torch.ones(3, 7, dtype=torch.bool)
    prompt_mask[1, :4] = False
    response_mask[2, 3:] = False
    return Batch(prompt, prompt_mask, response, response_mask)


def module_with(losses: list[LossTerm], plan_change: bool = True, seed: int = 0) -> PDTrimModule:
    module = PDTrimModule("tiny", losses=losses)
    module.student = StagedCausalLM(tiny_model("llama", seed=seed))
    module.teacher = StagedCausalLM(tiny_model("llama"))
    module.teacher.requires_grad_(False)
    if plan_change:
        module.student.apply_plan(module.plan.drop("decode", 2).drop("prefill", 2).drop("decode", 1))
        rule = Retention("first_last", 1, 3)
        module.apply_policy(KVRetentionPolicy("prefill", module.student.kv_shape, {0: rule}))
    return module


@pytest.mark.parametrize("term", EVERY, ids=lambda term: type(term).__name__)
def test_every_loss_is_zero_for_identical_models_except_cross_entropy(term: LossTerm) -> None:
    module = module_with([term], plan_change=False)
    _, values = training_loss([term], module.distilled(batch()))
    value = values[term.name]
    if term.name == "ce":
        assert value > 1
    else:
        assert abs(value.item()) < 1e-5


@pytest.mark.parametrize("term", EVERY, ids=lambda term: type(term).__name__)
def test_every_loss_is_positive_for_a_trimmed_student_and_reaches_its_weights(term: LossTerm) -> None:
    module = module_with([term])
    value, _ = training_loss([term], module.distilled(batch()))
    value.backward()
    gradient = module.student.gates[0].block.get_submodule("self_attn.k_proj").weight.grad
    assert value > 0
    assert gradient is not None
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_chunked_losses_equal_dense_ones_in_value_and_gradient(chunk: int) -> None:
    terms: list[LossTerm] = [KL(temperature=1.5), ReverseKL(0.5), JSD(2.0), CrossEntropy(0.1)]
    gradients, values = [], []
    for size in (chunk, None):
        module = module_with(terms)
        distilled = module.distilled(batch())
        if size is None:
            ours = module.student.logits(distilled.student).float()
            theirs = module.teacher.logits(distilled.teacher).float()
            parts = [t.weight * (t.per_token(ours, theirs, distilled.targets) * distilled.weights).sum() for t in terms]
            loss = torch.stack(parts).sum()
        else:
            loss, _ = training_loss(terms, distilled, chunk_tokens=size)
        loss.backward()
        values.append(loss.detach())
        gradients.append({n: p.grad for n, p in module.student.named_parameters() if p.grad is not None})
    torch.testing.assert_close(values[0], values[1])
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4)


def test_kl_and_its_reverse_are_torchs_own() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(5, 11, generator=generator) for _ in range(2))
    targets = torch.zeros(5, dtype=torch.long)
    s, t = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    expected = F.kl_div(s, t, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(KL().per_token(student, teacher, targets), expected)
    torch.testing.assert_close(ReverseKL().per_token(teacher, student, targets), expected)
    both = JSD().per_token(student, teacher, targets)
    torch.testing.assert_close(both, JSD().per_token(teacher, student, targets))
    assert both.max() <= torch.log(torch.tensor(2.0))


def test_token_weights_give_every_row_the_same_say() -> None:
    mask = torch.tensor([[True, True, True, True], [True, False, False, False], [False, False, False, False]])
    assert token_weights(mask).tolist() == [0.125] * 4 + [0.5]


def test_a_batch_split_over_ranks_gives_the_mean_of_its_parts() -> None:
    terms: list[LossTerm] = [KL()]
    module, whole = module_with(terms), batch()
    full = training_loss(terms, module.distilled(whole))[0]
    parts = [Batch(*(tensor[row : row + 1] for tensor in whole)) for row in range(3)]
    split = torch.stack([training_loss(terms, module.distilled(part))[0] for part in parts]).mean()
    torch.testing.assert_close(full, split)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: KL(weight=0.0), "`weight` of the loss kl is 0.0"),
        (lambda: KL(temperature=0.0), "`temperature` of the loss kl is 0.0"),
        (lambda: check_terms([]), "`losses` is \\[\\]"),
        (lambda: check_terms([KL(), KL(2.0)]), "each at most once"),
    ],
)
def test_loss_settings_out_of_range_are_refused(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]


def test_the_plan_of_the_losses_test_really_trims() -> None:
    plan = module_with([KL()]).plan
    assert plan.prefill == (0, 1, 3)
    assert plan.decode == (0, 3)
    assert isinstance(plan, StagePlan)


def gradients_of(module: PDTrimModule, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    module.student.zero_grad()
    (3.0 * loss).backward()
    return {name: p.grad.clone() for name, p in module.student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen_head", [False, True])
def test_gradients_made_with_the_values_equal_those_of_a_recomputation(
    family: str, dtype: torch.dtype, frozen_head: bool
) -> None:
    terms: list[LossTerm] = [KL(temperature=2.0), CrossEntropy(0.1)]
    module = PDTrimModule("tiny", losses=terms)
    module.student = StagedCausalLM(tiny_model(family, seed=1)).to(dtype)
    module.teacher = StagedCausalLM(tiny_model(family)).to(dtype).requires_grad_(False)
    if frozen_head:
        module.student.freeze_embeddings()
    both = []
    for min_chunks in (0, 1):
        distilled = replace(module.distilled(batch()), min_chunks=min_chunks)
        loss, values = training_loss(terms, distilled, chunk_tokens=5)
        both.append((loss.detach(), values, gradients_of(module, loss)))
    (ours, our_values, our_gradients), (theirs, their_values, their_gradients) = both
    close = {"atol": 5e-2, "rtol": 5e-2} if dtype == torch.bfloat16 else {"atol": 1e-6, "rtol": 1e-4}
    torch.testing.assert_close(ours, theirs, **close)
    for name, value in our_values.items():
        torch.testing.assert_close(value, their_values[name], **close)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], **close)


def test_under_autocast_the_head_gets_its_gradient_even_if_it_ran_without_before() -> None:
    terms: list[LossTerm] = [KL()]
    found = []
    for min_chunks in (0, 1):
        module = module_with(terms)
        with torch.autocast("cpu", torch.bfloat16):
            distilled = replace(module.distilled(batch()), min_chunks=min_chunks)
            with torch.no_grad():
                module.student.logits(distilled.student)
            loss, _ = training_loss(terms, distilled, chunk_tokens=4)
        found.append(gradients_of(module, loss)["model.lm_head.weight"])
    assert found[0].abs().max() > 0
    torch.testing.assert_close(*found, atol=2e-2, rtol=5e-2)


def test_the_kl_of_a_chunk_and_its_gradient_are_those_of_its_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (4 * torch.randn(6, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.zeros(6, dtype=torch.long)
    for term in (KL(), KL(temperature=3.0)):
        ours, theirs = (
            term.with_gradient(student, teacher, targets),
            TokenLoss.with_gradient(term, student, teacher, targets),
        )
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("boundary", ["prefill", "decode"])
def test_one_pass_over_prompt_and_response_equals_the_two_of_the_contract(boundary: Boundary) -> None:
    model = StagedCausalLM(tiny_model("llama")).double()
    plan = StagePlan.full(model.plan.model, "unified", boundary).drop("both", 1)
    model.apply_plan(plan)
    mask = batch().response_mask
    whole, split = model(*batch().request, keep_cache=False), model(*batch().request)
    assert not whole.cache.blocks
    torch.testing.assert_close(whole.hidden[mask], split.hidden[mask])
    torch.testing.assert_close(whole.cache.lengths, batch().prompt_mask.sum(1) + batch().response_mask[:, 1:].sum(1))


def test_stages_that_differ_are_never_run_in_one_pass() -> None:
    whole = StagePlan.full(StagedCausalLM(tiny_model("llama", blocks=4)).plan.model, "free")
    assert whole.stages_are_alike
    narrow = Width(channels=tuple(range(8)))
    for plan in (
        whole.drop("decode", 1), whole.drop("prefill", 1), whole.narrow("decode", 1, narrow),
        replace(whole, untied={"decode": (1,)}), whole.merge("decode", (1, 2), 1),
    ):  # fmt: skip
        assert not plan.stages_are_alike
    assert whole.narrow("both", 1, narrow).drop("both", 2).stages_are_alike
    policy = KVRetentionPolicy("prefill", StagedCausalLM(tiny_model("llama")).kv_shape)
    assert policy.sends_everything
    assert not replace(policy, rules={0: Retention("first_last", 1, 3)}).sends_everything
    assert not replace(policy, rules={0: Retention(codec=Codec("int4", "int4"))}).sends_everything
