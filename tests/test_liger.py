"""Where Liger's kernels cannot run they are refused. What they compute is tested in `with_liger`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers.models.llama.modeling_llama as llama
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from pdtrim_pl.errors import UserError
from pdtrim_pl.models import liger
from pdtrim_pl.models.liger import check_liger, use_liger
from pdtrim_pl.models.loading import Loading

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_without_the_package_or_a_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"needs liger-kernel, which is not installed: `pip install 'pdtrim_pl\[liger\]'"
    ):
        check_liger(GPU)
    monkeypatch.setattr(liger, "find_spec", lambda name: object())
    check_liger(GPU)
    with pytest.raises(UserError, match=r"`loading.liger` needs a GPU, and the models are to compute on cpu"):
        check_liger(CPU)
    with pytest.raises(UserError, match=r"`loading.compile` and `loading.liger` both replace what blocks run"):
        Loading(compile=True, liger=True)


class OtherNorm(nn.Module):
    """Stands for one of Liger's classes."""


def test_models_that_are_loaded_later_are_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def patched(model: PreTrainedModel, settings: dict[str, bool]) -> None:
        asked.append(settings)
        llama.LlamaRMSNorm = OtherNorm  # type: ignore[misc, assignment]
        model.model.norm.forward = lambda hidden: hidden

    monkeypatch.setattr(liger, "apply_liger_kernel", patched)
    stock, model = llama.LlamaRMSNorm, tiny_model("llama", blocks=2)
    use_liger(model)
    assert llama.LlamaRMSNorm is stock
    hidden: Tensor = torch.randn(2, 3)
    assert model.model.norm(hidden) is hidden
    assert asked == [{"cross_entropy": False, "fused_linear_cross_entropy": False, "rope": False}]


def test_a_family_without_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "apply_liger_kernel", lambda model, settings: None)
    with pytest.raises(UserError, match=r"Liger has no kernels for models of type 'llama'"):
        use_liger(tiny_model("llama", blocks=2))


@pytest.mark.parametrize(("family", "activation"), [("llama", "relu"), ("gemma2", "gelu"), ("gpt_neox", "gelu")])
def test_mlps_that_liger_would_compute_otherwise_are_refused(family: str, activation: str) -> None:
    name = "hidden_activation" if family == "gemma2" else "hidden_act"
    with pytest.raises(UserError, match=rf"MLPs of `model` have the activation '{activation}', and Liger would"):
        use_liger(tiny_model(family, blocks=2, **{name: activation}))
