"""Load the two models of a run: the student with the plan that it starts under, and the unpruned teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from pdtrim_pl.errors import UserError
from pdtrim_pl.models.architectures import Architecture
from pdtrim_pl.models.loading import DType, Loading, dtype_of
from pdtrim_pl.models.pretrained import check_model, load_causal_lm, load_tokenizer, model_type_of, usable_config
from pdtrim_pl.plan import Boundary, KVRetentionPolicy, StagePlan, Structure
from pdtrim_pl.staged.description import reference_to
from pdtrim_pl.staged.model import StagedCausalLM


@dataclass(frozen=True)
class ModelPair:
    """Settings of the models that a run loads."""

    name: str
    """Name, path or Hub id of the model to trim."""
    structure: Structure
    loading: Loading
    architecture: Architecture | None = None
    """Adapter of the model's family, where the package has none."""

    @property
    def teacher_name(self) -> str:
        """Name, path or Hub id of the teacher."""
        return self.loading.teacher or self.name

    def check(self) -> None:
        """Refuse models that cannot be trimmed or whose files are incomplete, before any weight is read.

        Raises:
            UserError: see `load_causal_lm`.
        """
        check_model(self.name, self.architecture)
        if self.teacher_name != self.name:
            check_model(self.teacher_name, self.adapter_of_teacher())

    def student(self) -> tuple[PreTrainedModel, StagePlan, KVRetentionPolicy | None]:
        """Load the model to trim, and the plan and the policy that it starts under. None as policy sends everything.

        Raises:
            UserError: see `load_causal_lm`, `StagePlan.load` and `KVRetentionPolicy.load`.
        """
        model = self._load(self.name, self.loading.dtype, self.architecture)
        reference = reference_to(model, self.name)
        if self.structure.plan is None:
            plan = StagePlan.full(reference, self.structure.relation, self.structure.boundary)
        else:
            plan = StagePlan.load(self.structure.plan)
        policy = KVRetentionPolicy.load(self.structure.policy, plan) if self.structure.policy else None
        if plan.model.model_type == reference.model_type and plan.model.num_blocks == reference.num_blocks:
            plan = replace(plan, model=reference)  # a plan file may name its model by another path
        return model, plan, policy

    def teacher(self, boundary: Boundary, vocabulary: int, device: torch.device | None = None) -> StagedCausalLM:
        """Load the teacher: frozen, in eval mode, with every block in both stages.

        Args:
            boundary: boundary of the student's plan.
            vocabulary: number of rows of the student's embedding.
            device: where it is to compute; None is the CPU. With `teacher_bits` it is loaded there, else on the CPU.

        Raises:
            UserError: the teacher has another vocabulary, or see `load_causal_lm`.
        """
        adapter = self.adapter_of_teacher()
        eight_bits_on = None if self.loading.teacher_bits is None else device or torch.device("cpu")
        model = self._load(self.teacher_name, self.loading.teacher_dtype, adapter, eight_bits_on)
        plan = StagePlan.full(reference_to(model, self.teacher_name), boundary=boundary)
        teacher = StagedCausalLM(model, plan, architecture=adapter).eval().requires_grad_(False)
        teacher.compared_tokens = self._compared_tokens(vocabulary, model.config.vocab_size)
        return teacher

    def compared_tokens(self) -> int | None:
        """Number of token ids, from 0, on which both models are compared; None for all of them. Loads no weights.

        Raises:
            UserError: the teacher has another vocabulary.
        """
        ours, theirs = self.vocabularies
        return self._compared_tokens(ours, theirs)

    @property
    def vocabularies(self) -> tuple[int, int]:
        """Number of rows of the student's embedding and of the teacher's, from their configurations."""
        student = usable_config(self.name, self.architecture)
        return student.vocab_size, usable_config(self.teacher_name, self.adapter_of_teacher()).vocab_size

    def _compared_tokens(self, student: int, teacher: int) -> int | None:
        """Number of token ids, from 0, on which both models are compared; None for all of them.

        Args:
            student: number of rows of the student's embedding; the last ones may be padding.
            teacher: number of rows of the teacher's embedding.

        Raises:
            UserError: the two tokenizers give one id to different tokens.
        """
        if self.teacher_name == self.name:
            return None
        ours, theirs = _vocabulary_of(self.name), _vocabulary_of(self.teacher_name)
        if ours is None or theirs is None:
            if student == teacher:
                return None
            raise self._vocabulary_error(student, teacher, "one of them has no tokenizer to compare them by")
        for token in sorted(ours.keys() & theirs.keys(), key=ours.__getitem__):
            if ours[token] != theirs[token]:
                why = f"the token {token!r} has the id {theirs[token]} in the teacher and {ours[token]} in `model`"
                raise self._vocabulary_error(student, teacher, why)
        names, added = {index: token for token, index in theirs.items()}, self._added_tokens()
        for token, index in ours.items():
            if index in names and names[index] != token and not {token, names[index]} <= added:
                why = f"the id {index} is the token {names[index]!r} in the teacher and {token!r} in `model`"
                raise self._vocabulary_error(student, teacher, why)
        known = max(ours.values()) + 1
        if known > teacher:
            raise self._vocabulary_error(student, teacher, f"the tokenizer of `model` has ids up to {known - 1}")
        return None if student == teacher else known

    def _added_tokens(self) -> set[str]:
        """Tokens that were added to one of the tokenizers: the two may give one id to different added tokens."""
        return {token for name in (self.name, self.teacher_name) for token in load_tokenizer(name).get_added_vocab()}

    def _vocabulary_error(self, student: int, teacher: int, why: str) -> UserError:
        return UserError(
            f"`loading.teacher` has a vocabulary of {teacher} tokens and `model` one of {student}: {why}, so their "
            "distributions cannot be compared. Use a teacher of the same family, or leave `loading.teacher` out."
        )

    def _load(
        self, name: str, dtype: DType, adapter: Architecture | None, eight_bits_on: torch.device | None = None
    ) -> PreTrainedModel:
        return load_causal_lm(
            name, dtype=dtype_of(dtype), attn_implementation=self.loading.attn_implementation, architecture=adapter,
            eight_bits_on=eight_bits_on,
        )  # fmt: skip

    def adapter_of_teacher(self) -> Architecture | None:
        """The model's adapter, if the teacher is of the same family; else None (the package's own adapter)."""
        if self.architecture is None or model_type_of(self.teacher_name) == model_type_of(self.name):
            return self.architecture
        return None


def _vocabulary_of(name: str) -> Mapping[str, int] | None:
    """Token -> id of a model's tokenizer; None if the model has no tokenizer."""
    try:
        vocabulary: Mapping[str, int] = load_tokenizer(name).get_vocab()
    except UserError:
        return None
    return vocabulary
