"""The manifest of a pair, `pair.json`: hashes of everything in an export that must fit together, and one id over all.

Imports no torch, so another engine can check an export and compare ids with this module alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan.json_files import check_format, read_json, write_whole
from pdtrim_pl.plan.kv_policy import POLICY_FILE, KVRetentionPolicy
from pdtrim_pl.plan.pair_files import KINDS, PAIR_PARTS, FileHash, Files, fault_of, part_name, paths_of
from pdtrim_pl.plan.planned_stages import PLAN_FILE
from pdtrim_pl.plan.stage_plan import StagePlan
from pdtrim_pl.plan.stages import STAGES, Stage

PAIR_FORMAT = "pdtrim.pair/1"
PAIR_FILE = "pair.json"
ROPE_SETTINGS = (
    "rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", "rotary_pct",
    "rotary_emb_base", "max_position_embeddings",
)  # fmt: skip
"""Settings of a `config.json` on which the rotation of keys depends. Families use different ones."""
SHARED_SETTINGS = ("num_key_value_heads", "vocab_size", *ROPE_SETTINGS)
"""Settings that both configs must agree on, or decode cannot read prefill's keys and values."""
LISTED_AT_MOST = 5


@dataclass(frozen=True)
class PairManifest:
    """Everything in an export that must fit together."""

    boundary: str
    kv: Mapping[str, Any]
    """Shape and element type of a position's keys, as in `kv_policy.json`."""
    rope: Mapping[str, Any]
    """Those of `ROPE_SETTINGS` that the checkpoints have."""
    codecs: Mapping[str, Sequence[int]]
    """Description of a codec -> blocks that use it, see `KVRetentionPolicy.codecs`."""
    files: Mapping[str, Files]
    """Part -> its files. Parts are `plan`, `policy`, and `weights`, `config`, `tokenizer` of each stage."""

    @property
    def id(self) -> str:
        """One hash over all: SHA-256 of the canonical JSON (sorted keys, no blanks, ASCII) without `id`."""
        canonical = json.dumps(self._content(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @classmethod
    def of(cls, export: Path) -> PairManifest:
        """Describe the files that an export has now. Reads all of its weights.

        Raises:
            UserError: it is not an export, or its two halves cannot be a pair.
        """
        plan = StagePlan.load(export / PLAN_FILE)
        policy = KVRetentionPolicy.load(export / POLICY_FILE, plan)
        rope = _shared_settings(export)
        paths = paths_of(export)
        for stage in STAGES:
            if not any(name.endswith(".safetensors") for name in paths[f"{stage}.weights"]):
                raise UserError(f"{export / stage} holds no weights (*.safetensors): it is not half of a pair.")
        hashes = {part: {name: FileHash.of(export / name) for name in names} for part, names in paths.items()}
        _check_tokenizers(export, hashes)
        return cls(plan.boundary, vars(policy.kv).copy(), rope, policy.codecs(plan), hashes)

    def with_policy(self, export: Path) -> PairManifest:
        """The manifest after another `kv_policy.json` was written into the export. Reads no weights."""
        plan = StagePlan.load(export / PLAN_FILE)
        policy = KVRetentionPolicy.load(export / POLICY_FILE, plan)
        files = {**self.files, "policy": {POLICY_FILE: FileHash.of(export / POLICY_FILE)}}
        return replace(self, kv=vars(policy.kv).copy(), codecs=policy.codecs(plan), files=files)

    def check(self, export: Path, stages: Sequence[Stage] = STAGES, *, verify: bool = False) -> None:
        """Refuse an export whose files are not those of this manifest.

        Sizes of all files are compared, and hashes of all but the weights.

        Args:
            export: the directory.
            stages: which checkpoints are looked at; a node may hold its own one alone.
            verify: compare the hashes of the weights too, which reads them whole.

        Raises:
            UserError: the message names every part and file that differs.
        """
        found: list[str] = []
        paths = paths_of(export)
        for part in ("plan", "policy", *(f"{stage}.{kind}" for stage in stages for kind in KINDS)):
            listed = self.files[part]
            for name in sorted({*listed, *paths[part]}):
                fault = fault_of(export / name, listed.get(name), verify)
                if fault:
                    found.append(f"{part_name(part)} ({name} {fault})")
        if found:
            more = f", and {len(found) - LISTED_AT_MOST} more files" if len(found) > LISTED_AT_MOST else ""
            raise UserError(
                f"{export} is not the pair that its {PAIR_FILE} describes. What differs: "
                f"{', '.join(found[:LISTED_AT_MOST])}{more}. Copy or export the pair again; if the change is wanted, "
                f"accept it with `pdtrim export --manifest {export}`."
            )

    def differences(self, other: PairManifest) -> list[str]:
        """Names of the parts and settings in which two manifests differ, with the files."""
        found = []
        for part in self.files:
            ours, theirs = self.files[part], other.files[part]
            names = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
            if names:
                found.append(f"{part_name(part)} ({', '.join(names[:LISTED_AT_MOST])})")
        settings = {"boundary": "the boundary", "kv": "the KV shape", "rope": "RoPE", "codecs": "the codecs"}
        ours, theirs = self._content(), other._content()
        return [*found, *(name for key, name in settings.items() if ours[key] != theirs[key])]

    def to_json(self) -> dict[str, Any]:
        """The manifest as the `pdtrim.pair/1` object."""
        content = self._content()
        return {"format": content.pop("format"), "id": self.id, **content}

    def _content(self) -> dict[str, Any]:
        files = {part: {name: asdict(each) for name, each in files.items()} for part, files in self.files.items()}
        return {
            "format": PAIR_FORMAT,
            "boundary": self.boundary,
            "kv": dict(self.kv),
            "rope": dict(self.rope),
            "codecs": {codec: list(blocks) for codec, blocks in self.codecs.items()},
            "files": files,
        }

    @classmethod
    def from_json(cls, data: Any) -> PairManifest:
        """Read a `pdtrim.pair/1` object.

        Raises:
            UserError: wrong format, a missing key, or an id that is not that of the rest.
        """
        check_format(data, PAIR_FORMAT, "manifest of a pair")
        try:
            files = {
                part: {name: FileHash(**each) for name, each in data["files"][part].items()} for part in PAIR_PARTS
            }
            manifest = cls(data["boundary"], data["kv"], data["rope"], data["codecs"], files)
            named, expected = data["id"], manifest.id
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"The manifest of a pair is malformed near {error}.") from error
        if named != expected:
            raise UserError(f"The manifest's `id` is {named}, and that of its contents is {expected}: it was edited.")
        return manifest

    def save(self, export: Path) -> None:
        """Write it into an export."""
        write_whole(export / PAIR_FILE, json.dumps(self.to_json(), indent=2) + "\n")

    @classmethod
    def load(cls, export: Path) -> PairManifest:
        """Read the manifest of an export.

        Raises:
            UserError: it is missing or malformed; the message gives the way out.
        """
        path, way = export / PAIR_FILE, f"Write one with `pdtrim export --manifest {export}`"
        if not path.is_file():
            raise UserError(f"There is no {PAIR_FILE} in {export}: an earlier version wrote this export. {way}.")
        try:
            return cls.from_json(read_json(path, "manifest of a pair"))
        except ValueError as error:
            raise UserError(f"{path}: {error} {way}, or copy the export again.") from error


def write_manifest(export: Path) -> Path:
    """Write `pair.json` for an export as it is now: its files are declared to be one pair. Reads all of its weights.

    Returns:
        The file that was written.

    Raises:
        UserError: see `PairManifest.of`.
    """
    PairManifest.of(export).save(export)
    return export / PAIR_FILE


def _shared_settings(export: Path) -> dict[str, Any]:
    """The RoPE settings of both checkpoints.

    Raises:
        UserError: the checkpoints differ in one of `SHARED_SETTINGS`.
    """
    ours, theirs = (read_json(export / stage / "config.json", "model configuration") for stage in STAGES)
    # A checkpoint with fewer query heads names its `head_dim`, which others of its family may leave out.
    named = {"head_dim"} if ours.get("head_dim") and theirs.get("head_dim") else set()
    for name in (*SHARED_SETTINGS, *named):
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"The halves of {export} are not one pair: `{name}` is {ours.get(name)} in prefill/config.json and "
                f"{theirs.get(name)} in decode/config.json. Export again."
            )
    return {name: ours[name] for name in ROPE_SETTINGS if name in ours}


def _check_tokenizers(export: Path, hashes: Mapping[str, Files]) -> None:
    ours, theirs = (
        {name.removeprefix(f"{stage}/"): each for name, each in hashes[f"{stage}.tokenizer"].items()}
        for stage in STAGES
    )
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name] != theirs[name]:
            raise UserError(
                f"The halves of {export} are not one pair: {name} is another file in prefill/ than in decode/. Copy "
                "the right tokenizer into both."
            )
