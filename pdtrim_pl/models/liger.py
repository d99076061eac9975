"""Norms and MLPs of blocks by Liger's Triton kernels (arXiv 2410.10989), which keep less for the backward pass."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType

import torch
from transformers import PreTrainedModel
from transformers.integrations import apply_liger_kernel

from pdtrim_pl.errors import UserError

_SILU, _GELU = ("silu", "swish"), ("gelu_pytorch_tanh",)
"""Activations that Liger's MLPs compute. They do not look at the model's own."""


def check_liger(device: torch.device) -> None:
    """Refuse Liger's kernels where they cannot run.

    Args:
        device: where the models are to compute.

    Raises:
        UserError: it is no GPU, or the package is missing.
    """
    if find_spec("liger_kernel") is None:
        raise UserError(
            "`loading.liger` needs liger-kernel, which is not installed: `pip install 'pdtrim_pl[liger]'`, or leave it "
            "out."
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(
            f"`loading.liger` needs a GPU, and the models are to compute on {device}: its kernels are written in "
            "Triton. Leave it out."
        )


def use_liger(model: PreTrainedModel) -> None:
    """Let the norms and MLPs of a model run by Liger's kernels, in place. Names of weights do not change.

    Only this model changes: Liger also replaces classes of transformers, by which models are built that are loaded
    later, and these stay as they were. Rotary embeddings and losses stay too.

    Raises:
        UserError: Liger has no kernels for the model's family, or none for its activation function.
    """
    facts = model.config.to_dict()
    activation = facts.get("hidden_activation") or facts.get("hidden_act")
    if activation not in (_GELU if "gemma" in model.config.model_type else _SILU):
        raise UserError(
            f"`loading.liger`: the MLPs of `model` have the activation {activation!r}, and Liger would compute another "
            "one. Leave it out."
        )
    family = sys.modules[type(model).__module__]
    with _unchanged(family):
        apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False, "rope": False})
    if not any("forward" in vars(module) for module in model.modules()):
        raise UserError(
            f"`loading.liger`: Liger has no kernels for models of type {model.config.model_type!r}. Leave it out."
        )


@contextmanager
def _unchanged(module: ModuleType) -> Iterator[None]:
    """Give the names of a module their values back at the end of the `with` block."""
    before = dict(vars(module))
    try:
        yield
    finally:
        vars(module).update(before)
