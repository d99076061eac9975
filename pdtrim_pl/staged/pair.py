"""The two models of a run as its settings name them: the student under its first plan, the teacher in full."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from pdtrim_pl.errors import UserError
from pdtrim_pl.models.architectures import Architecture
from pdtrim_pl.models.loading import DType, Loading, dtype_of
from pdtrim_pl.models.pretrained import check_model, load_causal_lm, model_type_of
from pdtrim_pl.plan import Boundary, KVRetentionPolicy, StagePlan, Structure
from pdtrim_pl.staged.description import reference_to
from pdtrim_pl.staged.model import StagedCausalLM


@dataclass(frozen=True)
class ModelPair:
    """Which models a run loads, and how."""

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
        """Refuse models that cannot be trimmed or are not whole, before a weight is read.

        Raises:
            UserError: see `load_causal_lm`.
        """
        check_model(self.name, self.architecture)
        if self.teacher_name != self.name:
            check_model(self.teacher_name, self._adapter_of_teacher())

    def student(self) -> tuple[PreTrainedModel, StagePlan, KVRetentionPolicy | None]:
        """The model to trim, and the plan and the policy that it starts under; a policy of None sends everything."""
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

    def teacher(self, boundary: Boundary, vocabulary: int) -> StagedCausalLM:
        """The teacher: frozen, in eval mode, with every block in both stages.

        Args:
            boundary: of the student's plan.
            vocabulary: of the student.

        Raises:
            UserError: a teacher of another vocabulary.
        """
        adapter = self._adapter_of_teacher()
        model = self._load(self.teacher_name, self.loading.teacher_dtype, adapter)
        _check_same_vocabulary(vocabulary, model.config.vocab_size)
        plan = StagePlan.full(reference_to(model, self.teacher_name), boundary=boundary)
        return StagedCausalLM(model, plan, architecture=adapter).eval().requires_grad_(False)

    def _load(self, name: str, dtype: DType, adapter: Architecture | None) -> PreTrainedModel:
        attention = self.loading.attn_implementation
        return load_causal_lm(name, dtype=dtype_of(dtype), attn_implementation=attention, architecture=adapter)

    def _adapter_of_teacher(self) -> Architecture | None:
        """That of the model, unless the package knows the teacher as one of another family."""
        if self.architecture is None or model_type_of(self.teacher_name) == model_type_of(self.name):
            return self.architecture
        return None


def _check_same_vocabulary(student: int, teacher: int) -> None:
    if student != teacher:
        raise UserError(
            f"`loading.teacher` has a vocabulary of {teacher} tokens and `model` one of {student}: their distributions "
            "cannot be compared. Use a teacher of the same family, or leave `loading.teacher` out."
        )
