"""A Hugging Face causal language model with a gate around every block, and the plan and the policy that it obeys."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pdtrim_pl.compat import attention_of
from pdtrim_pl.errors import UserError
from pdtrim_pl.models.adapters import class_path_of
from pdtrim_pl.models.architectures import Architecture, architecture_of
from pdtrim_pl.models.loading import Attention
from pdtrim_pl.plan import STAGES, KVRetentionPolicy, KVShape, Stage, StagePlan
from pdtrim_pl.staged.copies import with_layer
from pdtrim_pl.staged.description import kv_shape_of, reference_to
from pdtrim_pl.staged.fitted_run import FittedRun
from pdtrim_pl.staged.gate import Gate
from pdtrim_pl.staged.lora import LoRA, new_adapters
from pdtrim_pl.staged.narrowed import check_widths
from pdtrim_pl.staged.refit import Refit
from pdtrim_pl.staged.trainable import Trainable, freeze_outside, trained_in

WriteWeight = Callable[[nn.Parameter, Tensor], None]
"""A function that writes a value into a parameter."""


class GatedCausalLM(nn.Module):
    """One model for both stages. The plan says which blocks each stage runs, the policy what prefill sends to decode.

    Blocks are never deleted here: the gate around a block runs it, skips it or projects only its keys and values.

    Args:
        model: a decoder-only Hugging Face model. Its blocks are replaced by gates, in place.
        plan: what each stage runs. The full plan by default.
        policy: what prefill sends to decode. Everything by default.
        originals: original indices of the blocks of `model`, if it holds only some of the original ones.
        architecture: adapter of the model's family, if the package has none.

    Raises:
        UserError: there is no adapter for the family, or the attention implementation cannot take the masks needed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: StagePlan | None = None,
        policy: KVRetentionPolicy | None = None,
        *,
        originals: Sequence[int] | None = None,
        architecture: Architecture | None = None,
    ) -> None:
        super().__init__()
        self.architecture = architecture or architecture_of(model.config)
        blocks = self.architecture.blocks(model)
        self.originals = tuple(originals if originals is not None else range(len(blocks)))
        assert len(self.originals) == len(blocks)
        _check_attention(model, self.architecture)
        for position, (index, block) in enumerate(zip(self.originals, blocks, strict=True)):
            blocks[position] = Gate(block, index, self.architecture.window(model.config, position), self.architecture)
        self.model = model
        self.gradient_checkpointing = False
        self.whole_head: Callable[[], AbstractContextManager[Any]] = nullcontext
        """Inside the `with` block, the head's weights are whole, for use without gradients. A strategy that shards
        weights replaces this function."""
        self.trainable: Trainable | LoRA = "all"
        self.compared_tokens: int | None = None
        """Number of token ids, from 0, on which this model is compared with another; None for all. Models with the same
        tokenizer may have embeddings padded to different sizes."""
        self.plan = StagePlan.full(reference_to(model)) if originals is None or plan is None else plan
        self.policy: KVRetentionPolicy | None = None
        self.apply_plan(plan or self.plan)
        self.apply_policy(policy)

    @property
    def gates(self) -> dict[int, Gate]:
        """Original block index -> its gate."""
        gates = self.architecture.blocks(self.model)
        return {index: gate for index, gate in zip(self.originals, gates, strict=True) if isinstance(gate, Gate)}

    @property
    def lora(self) -> LoRA | None:
        """Settings of the adapters; None if there are none."""
        return self.trainable if isinstance(self.trainable, LoRA) else None

    @property
    def untied(self) -> dict[Stage, tuple[int, ...]]:
        """Per stage: blocks that have weights of their own, including blocks that have left the plan since."""
        return {stage: tuple(i for i, gate in self.gates.items() if stage in gate.untied) for stage in STAGES}

    @property
    def head_weights(self) -> tuple[nn.Parameter, ...]:
        """The parameters of the head, which may be those of the embeddings too."""
        head = self.model.get_output_embeddings()
        return () if head is None else tuple(head.parameters())

    @property
    def kv_shape(self) -> KVShape:
        """Shape of one block's KV per position, in the model's own element type."""
        return kv_shape_of(self.model)

    def apply_plan(self, plan: StagePlan, write: WriteWeight | None = None, refits: Iterable[Refit] = ()) -> None:
        """Run under `plan` from now on. Creates its untied weights, and removes policy rules for blocks outside its D.

        Fitted weights that were offered for the merges of `plan` are written into the model. All offers end.

        Args:
            plan: what each stage runs.
            write: writes fitted weights into parameters. An engine that keeps copies of parameters needs its own
                function; by default the parameter is overwritten.
            refits: layers that get new weights with the plan.

        Raises:
            UserError: the plan is for a model of another type or with another number or size of blocks, or it would
                merge into shared weights that are also used without the merge.
        """
        if plan.model.model_type != self.model.config.model_type:
            raise UserError(
                f"The stage plan is for a model of type {plan.model.model_type!r} ({plan.model.name_or_path}), and "
                f"`model` is of type {self.model.config.model_type!r}. Use the plan of this model."
            )
        whole = self.originals == tuple(range(len(self.originals)))
        known = self.plan.model.num_blocks
        if plan.model.num_blocks != known or (whole and known < len(self.originals)):
            raise UserError(
                f"The stage plan is for a model of {plan.model.num_blocks} blocks, and `model` has "
                f"{len(self.originals)}. Use the plan of this model, or name the plan's model in `model`."
            )
        for gate in self.gates.values():
            gate.check_offers(plan)
            check_widths(gate.block, gate.index, self.architecture, plan)
        adapter = class_path_of(self.architecture, plan.model.model_type)
        self.plan = plan = replace(plan, model=replace(plan.model, architecture=adapter))
        for gate in self.gates.values():
            gate.apply_plan(plan, write or _overwrite)
        for refit in refits:
            layer = self.gates[refit.block].weights(refit.stages[0], plan).get_submodule(refit.layer)
            (write or _overwrite)(layer.get_parameter("weight"), refit.weight)
        if self.policy is not None:
            self.apply_policy(self.policy.restricted_to(plan))

    def apply_policy(self, policy: KVRetentionPolicy | None) -> None:
        """Send what `policy` keeps from now on; None sends everything.

        Raises:
            UserError: the policy is for another plan, or its KV has another shape than this model's.
        """
        if policy is not None:
            policy.check(self.plan)
            ours, theirs = self.kv_shape, policy.kv
            if (ours.num_key_value_heads, ours.head_dim) != (theirs.num_key_value_heads, theirs.head_dim):
                raise UserError(
                    f"`kv` of the policy is {theirs.num_key_value_heads} heads of {theirs.head_dim}, and `model` has "
                    f"{ours.num_key_value_heads} of {ours.head_dim}. Use the policy of this model."
                )
        self.policy = policy

    def offer(self, fitted: Iterable[FittedRun]) -> None:
        """Let plans with these merges run with the fitted weights.

        Offers end when a plan is applied or `withdraw` is called. They are not parameters of this model: they are not
        saved and not trained. They do move between devices with it.
        """
        gates = self.gates
        for run in fitted:
            assert run.move.into is not None
            for index, block in run.blocks.items():
                weights = block.to(self.model.device).eval().requires_grad_(False)
                for stage, merged in run.stands_for.items():
                    gates[index].offers[stage, run.move.into, merged] = weights

    def offer_refits(self, plan: StagePlan, refits: Iterable[Refit]) -> None:
        """Let plans with the widths of `plan` run with refitted layers.

        These offers end like those of `offer`, but applying a plan does not write them into the model: pass the refits
        to `apply_plan` for that.
        """
        for refit in refits:
            gate = self.gates[refit.block]
            block = with_layer(gate.weights(refit.stages[0], self.plan), refit.layer, refit.weight)
            for stage in refit.stages:
                gate.refit_offers[stage, plan.width(stage, refit.block)] = block

    def withdraw(self) -> None:
        """End all offers."""
        for gate in self.gates.values():
            gate.offers.clear()
            gate.refit_offers.clear()

    def train_only(self, trainable: Trainable | LoRA) -> None:
        """Train only a part of the weights from now on; `lora` creates adapters, in fp32."""
        self.trainable = LoRA() if trainable == "lora" else trainable
        if isinstance(self.trainable, LoRA):
            for gate in self.gates.values():
                gate.adapters.update(new_adapters(gate.block, self.trainable))
        self.freeze_unused()

    def freeze_unused(self) -> None:
        """Enable gradients only for the weights that train: see `train_only`, and only where a stage uses the block."""
        for gate in self.gates.values():
            trained = {id(parameter) for parameter in trained_in(gate, self.plan, self.trainable)}
            for parameter in gate.parameters():
                parameter.requires_grad_(id(parameter) in trained)
        freeze_outside(self.model, list(self.gates.values()), self.trainable)

    def freeze_embeddings(self) -> None:
        """Disable gradients of the token embeddings and of the head."""
        for module in (self.model.get_input_embeddings(), self.model.get_output_embeddings()):
            module.requires_grad_(False)

    def compile_blocks(self) -> None:
        """Compile every block when it runs first; see `staged/compiled.py`."""
        for gate in self.gates.values():
            gate.compile_weights()

    def rebuild_rope(self) -> None:
        """Rebuild the RoPE tables in fp32. Some loaders build them in the element type of the weights."""
        base = self.model.base_model
        for name, child in list(base.named_children()):
            table = next(child.buffers(recurse=False), None)
            if table is not None and next(child.parameters(), None) is None:
                setattr(base, name, type(child)(base.config).to(table.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GatedCausalLM:
        """Move and cast weights, but never cast buffers: RoPE frequencies in bf16 are wrong at far positions."""
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in list(self.named_buffers()):
            if buffer.dtype != exact[name].dtype:
                owner, _, leaf = name.rpartition(".")
                setattr(self.get_submodule(owner), leaf, exact[name].to(buffer.device))
        return self


def _overwrite(parameter: nn.Parameter, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


def _check_attention(model: PreTrainedModel, architecture: Architecture) -> None:
    chosen = attention_of(model)
    if chosen not in get_args(Attention):
        raise UserError(
            f"`attn_implementation` is {chosen!r}, which cannot take the masks of a KV policy (cached entries at "
            "chosen positions). Load the model with `attn_implementation: sdpa` or `eager`."
        )
    if chosen not in ("eager", "flex_attention") and not architecture.supports_sdpa(model.config):
        raise UserError(
            f"`attn_implementation: {chosen}` cannot compute {model.config.model_type} with soft-capped attention "
            "scores. Load the model with `attn_implementation: eager`, or with `flex_attention` on a GPU."
        )
