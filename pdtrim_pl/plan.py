"""The stage plan: which blocks each inference stage runs. The only truth about structure.

Imports no torch, so command-line tools and other engines read a plan in milliseconds.
Blocks are always named by their index in the original model, from 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

Stage = Literal["prefill", "decode"]
Target = Literal["prefill", "decode", "both"]
Relation = Literal["nested", "unified", "prefill_only", "free"]
Boundary = Literal["prefill", "decode"]
Action = Literal["drop", "merge"]

STAGES: tuple[Stage, ...] = get_args(Stage)
PLAN_FORMAT = "pdtrim.stage_plan/1"
PLAN_FILE = "stage_plan.json"
ONLY_TARGET: Mapping[Relation, Target] = MappingProxyType({"unified": "both", "prefill_only": "prefill"})
"""The relations under which blocks can leave one target alone."""
_EMPTY: Mapping[Any, Any] = MappingProxyType({})


@dataclass(frozen=True)
class ModelRef:
    """The original model a plan speaks of."""

    name_or_path: str
    """Hub id, path or embedded name it was loaded from."""
    model_type: str
    """transformers' `config.model_type`."""
    num_blocks: int
    """Number of decoder blocks of the original model."""
    architecture: str | None = None
    """Class path of the adapter of its family, where it is not the package's own."""


@dataclass(frozen=True)
class Removal:
    """One entry of a plan's history: a block that left one stage, and why."""

    round: int
    """Round of removal, from 0."""
    stage: Stage
    action: Action
    block: int
    """Original index of the block that left."""
    criterion: str
    """Name of the criterion that chose it."""
    score: float | None
    """The criterion's score, lower is less harm; None where nothing was scored."""


@dataclass(frozen=True)
class StagePlan:
    """P and D of the method: the blocks the prefill and the decode stage run, each in original order.

    Raises:
        ValueError: naming every fault at once, if the plan is not one the contract can run.
    """

    model: ModelRef
    prefill: tuple[int, ...]
    decode: tuple[int, ...]
    relation: Relation = "nested"
    boundary: Boundary = "prefill"
    merged: Mapping[Stage, Mapping[int, tuple[int, ...]]] = field(default_factory=lambda: _EMPTY)
    """Per stage: the block that stands for a run of original blocks, and that run."""
    untied: Mapping[Stage, tuple[int, ...]] = field(default_factory=lambda: _EMPTY)
    """Per stage: blocks that hold weights of their own there instead of the shared ones."""
    history: tuple[Removal, ...] = ()

    def __post_init__(self) -> None:
        faults = list(self._faults())
        if faults:
            raise ValueError("This stage plan cannot be run: " + "; ".join(faults) + ".")
        merged = {stage: MappingProxyType(dict(self.merged.get(stage, {}))) for stage in STAGES}
        untied = {stage: tuple(self.untied.get(stage, ())) for stage in STAGES}
        object.__setattr__(self, "merged", MappingProxyType(merged))
        object.__setattr__(self, "untied", MappingProxyType(untied))

    def __reduce__(self) -> tuple[Any, ...]:
        # Read-only mappings cannot be pickled; without this no model that holds a plan could be copied or spawned.
        merged = {stage: dict(runs) for stage, runs in self.merged.items()}
        shared = (self.model, self.prefill, self.decode, self.relation, self.boundary)
        return StagePlan, (*shared, merged, dict(self.untied), self.history)

    @classmethod
    def full(cls, model: ModelRef, relation: Relation = "nested", boundary: Boundary = "prefill") -> StagePlan:
        """The plan of the unpruned model: both stages run every block."""
        every = tuple(range(model.num_blocks))
        return cls(model, every, every, relation, boundary)

    def blocks(self, stage: Stage) -> tuple[int, ...]:
        """Original indices of the blocks `stage` runs, in order."""
        return self.prefill if stage == "prefill" else self.decode

    def removed(self, stage: Stage) -> tuple[int, ...]:
        """Original indices of the blocks that left `stage`, in order."""
        kept = set(self.blocks(stage))
        return tuple(block for block in range(self.model.num_blocks) if block not in kept)

    @property
    def kv_only(self) -> tuple[int, ...]:
        """Blocks of D that prefill does not run but projects keys and values for."""
        kept = set(self.prefill)
        return tuple(block for block in self.decode if block not in kept)

    def candidates(self, target: Target, protect_first: int = 1, protect_last: int = 1) -> tuple[int, ...]:
        """Blocks that may still be dropped from `target` without breaking the relation or a guard.

        Under `nested` a prefill drop takes a block that decode has already lost while one is left, so that the
        number of decode blocks stays what its own schedule says; when none is left, a block leaves both stages.
        """
        free = self.drop_candidates(target, protect_first, protect_last)
        if self.relation == "nested" and target == "prefill":
            free = tuple(block for block in free if block not in self.decode) or free
        return free

    def drop_candidates(self, target: Target, protect_first: int = 1, protect_last: int = 1) -> tuple[int, ...]:
        """Every block that `drop` accepts for `target` and the guards allow."""
        self._check_target(target)
        last = self.model.num_blocks - protect_last
        free = (block for block in range(protect_first, last) if block in self._stage_set(target))
        return tuple(block for block in free if self._leaves_every_stage_a_block(target, block))

    def drop(
        self, target: Target, block: int, *, round: int = 0, criterion: str = "manual", score: float | None = None
    ) -> StagePlan:
        """A new plan without `block` in the stage(s) that `target` and the relation name.

        Under `nested` and `unified`, what prefill drops, decode drops too.

        Raises:
            ValueError: unknown stage, a block that is not there, or a stage left without blocks.
        """
        self._check_target(target)
        if block not in self._stage_set(target):
            raise ValueError(
                f"Cannot drop block {block} from `{target}`: it is not there. Blocks left: {self._stage_set(target)}."
            )
        kept = {stage: self.blocks(stage) for stage in STAGES}
        entries: list[Removal] = []
        for stage in self.stages_losing(target, block):
            if kept[stage] == (block,):
                raise ValueError(
                    f"Dropping block {block} would leave the `{stage}` stage without blocks. Lower the number of "
                    "blocks in the `schedule` of its drop callback."
                )
            kept[stage] = tuple(other for other in kept[stage] if other != block)
            entries.append(Removal(round, stage, "drop", block, criterion, score))
        return replace(
            self,
            prefill=kept["prefill"],
            decode=kept["decode"],
            merged={s: {k: v for k, v in self.merged[s].items() if k in kept[s]} for s in STAGES},
            untied={s: tuple(b for b in self.untied[s] if b in kept[s]) for s in STAGES},
            history=self.history + tuple(entries),
        )

    def merge(
        self, target: Target, run: Iterable[int], into: int, *, untied: bool = True, round: int = 0,
        criterion: str = "manual", score: float | None = None,
    ) -> StagePlan:  # fmt: skip
        """A new plan in which block `into` stands for the neighbouring blocks `run`.

        The merge is made in the stages that a drop of the absorbed blocks would take them out of, so under `nested` a
        prefill merge of blocks that decode still runs is made in both.

        Args:
            target: the stage(s) whose blocks are merged.
            run: original indices of neighbours in those stages, `into` among them.
            into: the block that stays, at its own index.
            untied: give the merged block weights of its own in each of those stages.
            round: of the history.
            criterion: of the history.
            score: of the history.

        Raises:
            ValueError: blocks that are not neighbours in each of those stages.
        """
        members = tuple(sorted(set(run)))
        absorbed = [block for block in members if block != into]
        stages = {stage for block in absorbed or members for stage in self.stages_losing(target, block)}
        for stage in STAGES:
            blocks = self.blocks(stage)
            places = [blocks.index(block) for block in members if block in blocks]
            neighbours = places == list(range(places[0], places[0] + len(members))) if places else False
            if stage in stages and (not neighbours or into not in members or not absorbed):
                raise ValueError(
                    f"Cannot merge {list(members)} into {into} in `{stage}`: give at least two neighbours of that "
                    f"stage, {into} among them. Blocks left: {list(blocks)}."
                )
        plan = self
        for block in absorbed:
            plan = plan.drop(target, block, round=round, criterion=criterion, score=score)
        entries = tuple(replace(entry, action="merge") for entry in plan.history[len(self.history) :])
        runs = {s: tuple(sorted({b for m in members for b in self.merged[s].get(m, (m,))})) for s in stages}
        return replace(
            plan,
            merged={s: {**plan.merged[s], **({into: runs[s]} if s in stages else {})} for s in STAGES},
            untied={s: tuple(sorted({*plan.untied[s], *([into] if untied and s in stages else [])})) for s in STAGES},
            history=self.history + entries,
        )

    def to_json(self) -> dict[str, Any]:
        """The plan as the `pdtrim.stage_plan/1` object. Optional keys are written only where they say something."""
        out: dict[str, Any] = {
            "format": PLAN_FORMAT,
            "model": {name: value for name, value in vars(self.model).items() if value is not None},
            "relation": self.relation,
            "boundary": self.boundary,
            "prefill": {"blocks": list(self.prefill), "kv_only": list(self.kv_only)},
            "decode": {"blocks": list(self.decode)},
            "merged": {stage: {str(k): list(v) for k, v in self.merged[stage].items()} for stage in STAGES},
            "history": [vars(entry).copy() for entry in self.history],
        }
        if any(self.untied.values()):
            out["untied"] = {stage: list(self.untied[stage]) for stage in STAGES}
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StagePlan:
        """Read a `pdtrim.stage_plan/1` object.

        Raises:
            ValueError: wrong format or version, missing keys, or a plan that cannot be run.
        """
        check_format(data, PLAN_FORMAT, "stage plan")
        try:
            plan = cls(
                model=ModelRef(**data["model"]),
                prefill=tuple(data["prefill"]["blocks"]),
                decode=tuple(data["decode"]["blocks"]),
                relation=data["relation"],
                boundary=data["boundary"],
                merged={s: {_block(k): tuple(v) for k, v in data["merged"].get(s, {}).items()} for s in STAGES},
                untied={s: tuple(data.get("untied", {}).get(s, ())) for s in STAGES},
                history=tuple(Removal(**entry) for entry in data.get("history", ())),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"The stage plan is malformed near {error}. Write it with `StagePlan.save`.") from error
        if list(plan.kv_only) != list(data["prefill"].get("kv_only", plan.kv_only)):
            raise ValueError(
                f"`prefill.kv_only` is {data['prefill']['kv_only']}, but the decode blocks that prefill does not run "
                f"are {list(plan.kv_only)}. Remove the key or mend the blocks."
            )
        return plan

    def save(self, path: Path) -> None:
        """Write the plan as indented JSON."""
        write_whole(path, json.dumps(self.to_json(), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> StagePlan:
        """Read a plan file; a ValueError names the file."""
        data = read_json(path, "stage plan")
        try:
            return cls.from_json(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def _stage_set(self, target: Target) -> tuple[int, ...]:
        if target == "both":
            return tuple(block for block in self.prefill if block in self.decode)
        return self.blocks(target)

    def stages_losing(self, target: Target, block: int) -> tuple[Stage, ...]:
        """The stages that a drop of `block` from `target` takes it out of."""
        if target == "both" or self.relation == "unified":
            return STAGES
        if self.relation == "nested" and target == "prefill" and block in self.decode:
            return STAGES
        return (target,)

    def _leaves_every_stage_a_block(self, target: Target, block: int) -> bool:
        return all(self.blocks(stage) != (block,) for stage in self.stages_losing(target, block))

    def _check_target(self, target: Target) -> None:
        if target not in get_args(Target):
            raise ValueError(f"Unknown `stage` {target!r}: choose one of {', '.join(get_args(Target))}.")
        if target != ONLY_TARGET.get(self.relation, target):
            why = {
                "unified": "which drops from both: use `both`",
                "prefill_only": "whose decode stage keeps every block: use `prefill`, or another relation",
            }[self.relation]
            raise ValueError(f"`stage: {target}` does not fit `relation: {self.relation}`, {why}.")

    def _faults(self) -> Iterable[str]:
        if self.relation not in get_args(Relation):
            yield f"`relation` is {self.relation!r}, not one of {', '.join(get_args(Relation))}"
        if self.boundary not in get_args(Boundary):
            yield f"`boundary` is {self.boundary!r}, not one of {', '.join(get_args(Boundary))}"
        for stage in STAGES:
            yield from self._stage_faults(stage)
        prefill, decode = set(self.prefill), set(self.decode)
        if self.relation == "nested" and not decode <= prefill:
            yield f"`relation: nested` wants D inside P, but prefill lacks {sorted(decode - prefill)}"
        if self.relation == "unified" and decode != prefill:
            yield f"`relation: unified` wants equal stages, but they differ in {sorted(decode ^ prefill)}"
        if self.relation == "prefill_only" and len(decode) != self.model.num_blocks:
            yield "`relation: prefill_only` wants every block in decode"
        for name, mapping in (("merged", self.merged), ("untied", self.untied)):
            unknown = sorted(set(mapping) - set(STAGES))
            if unknown:
                yield f"`{name}` names the unknown stage(s) {unknown}"

    def _stage_faults(self, stage: Stage) -> Iterable[str]:
        blocks = self.blocks(stage)
        if not blocks:
            yield f"`{stage}` has no blocks"
        if not all(type(block) is int for block in blocks):
            yield f"`{stage}.blocks` must be whole numbers, got {list(blocks)}"
            return
        if list(blocks) != sorted(set(blocks)):
            yield f"`{stage}.blocks` must be rising and without repeats, got {list(blocks)}"
        outside = [block for block in blocks if not 0 <= block < self.model.num_blocks]
        if outside:
            yield f"`{stage}.blocks` names {outside}, outside 0..{self.model.num_blocks - 1}"
        stray = [block for block in self.untied.get(stage, ()) if block not in blocks]
        if stray:
            yield f"`untied.{stage}` names {stray}, which that stage does not run"
        taken: set[int] = set()
        for block, run in self.merged.get(stage, {}).items():
            others = set(run) - {block}
            if block not in blocks or block not in run or len(run) < 2:
                yield f"`merged.{stage}.{block}` must be a block of that stage and one of at least two it stands for"
            if others & set(blocks):
                yield f"`merged.{stage}.{block}` stands for {sorted(others & set(blocks))}, which the stage still runs"
            if taken & set(run):
                yield f"`merged.{stage}` overlaps at {sorted(taken & set(run))}"
            taken |= set(run)


def _block(key: str) -> int:
    if not key.isdecimal():
        raise ValueError(f"`merged` has the key {key!r}, which is no block number.")
    return int(key)


def check_format(data: Mapping[str, Any], expected: str, what: str) -> None:
    """Refuse JSON that is not of the format and version this package writes.

    Raises:
        ValueError: with the format found and the one expected.
    """
    found = data.get("format") if isinstance(data, Mapping) else None
    if found != expected:
        raise ValueError(
            f"This {what} has `format` {found!r}, and this version of pdtrim_pl reads {expected!r}. "
            "Write it again with the version that is installed, or install the version that wrote it."
        )


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that a kill leaves the old one or the new one, never a part."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def read_json(path: Path, what: str) -> Any:
    """Parse a JSON file.

    Raises:
        ValueError: naming the file, if it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"There is no {what} at {path}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"The {what} {path} is not valid JSON: {error}.") from error
