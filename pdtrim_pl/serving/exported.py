"""Reads the JSON files of an exported pair without torch, so that a wrong directory is refused at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pdtrim_pl.errors import UserError
from pdtrim_pl.models.context import usable_context
from pdtrim_pl.plan import PLAN_FILE, POLICY_FILE, STAGES, KVRetentionPolicy, PairManifest, StagePlan
from pdtrim_pl.plan.json_files import read_json


@dataclass(frozen=True)
class ExportedPair:
    """An exported pair's structure and limits."""

    path: Path
    plan: StagePlan
    policy: KVRetentionPolicy
    context: int
    """Largest number of tokens of prompt and response together."""
    vocabulary: int
    """Number of token ids."""

    @classmethod
    def read(cls, path: Path, *, verify: bool = False) -> ExportedPair:
        """Read an export's JSON files, and compare all files with `pair.json`.

        Args:
            path: the directory.
            verify: see `PairManifest.check`.

        Raises:
            UserError: the directory is not an export, or its files contradict each other or `pair.json`.
        """
        wanted = [PLAN_FILE, POLICY_FILE, *(f"{stage}/config.json" for stage in STAGES)]
        missing = [name for name in wanted if not (path / name).is_file()]
        if missing:
            raise UserError(
                f"`export` is {path}, which is not an exported pair: it has no {', '.join(missing)}. Give the "
                "directory that `pdtrim export` or the last step of `pdtrim fit` wrote."
            )
        plan = StagePlan.load(path / PLAN_FILE)
        policy = KVRetentionPolicy.load(path / POLICY_FILE, plan)
        PairManifest.load(path).check(path, verify=verify)
        config = read_json(path / "decode" / "config.json", "model configuration")
        return cls(path, plan, policy, usable_context(config), config["vocab_size"])

    def check_prompt(self, tokens: int, new_tokens: int, setting: str = "max_new_tokens") -> None:
        """Refuse a request that the model's context cannot hold.

        Raises:
            UserError: the request is too long or empty; the message says what would fit.
        """
        if tokens < 1:
            raise UserError("`prompt` is empty: give at least one token.")
        if tokens > self.context:
            raise UserError(
                f"`prompt` has {tokens} tokens, and the model's context is {self.context}. Shorten the prompt."
            )
        if new_tokens < 1:
            raise UserError(f"`{setting}` is {new_tokens}: give at least 1.")
        if tokens + new_tokens > self.context:
            raise UserError(
                f"`prompt` has {tokens} tokens and `{setting}` asks for {new_tokens} more, but the model's context is "
                f"{self.context}. Shorten the prompt, or lower `{setting}` to at most {self.context - tokens}."
            )

    def check_ids(self, prompt_ids: Sequence[int], new_tokens: int, response_ids: Sequence[int] = ()) -> None:
        """Refuse a request that the model's context cannot hold, or that has tokens which the model does not know.

        Raises:
            UserError: see `check_prompt`; or a token is outside the vocabulary.
        """
        self.check_prompt(len(prompt_ids), new_tokens)
        for name, ids in (("prompt", prompt_ids), ("response", response_ids)):
            if outside := [token for token in ids if not 0 <= token < self.vocabulary]:
                raise UserError(f"`{name}` has token {outside[0]}, outside the vocabulary 0..{self.vocabulary - 1}.")
