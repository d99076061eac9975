"""What a vLLM engine needs to know of an export: which layer is which block, and what each block sends. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import PLAN_FILE, POLICY_FILE, KVRetentionPolicy, PairManifest, Retention, Stage, StagePlan


@dataclass(frozen=True)
class ServedPair:
    """One stage of an export, as an engine serves it."""

    export: Path
    stage: Stage
    plan: StagePlan
    policy: KVRetentionPolicy
    manifest: PairManifest

    @classmethod
    def read(cls, export: Path, stage: Stage) -> ServedPair:
        """Read an export's JSON files and compare the stage's files with `pair.json`.

        Raises:
            UserError: it is not an export, its files are not those of `pair.json`, or vLLM cannot serve its plan.
        """
        plan = StagePlan.load(export / PLAN_FILE)
        policy = KVRetentionPolicy.load(export / POLICY_FILE, plan)
        manifest = PairManifest.load(export)
        manifest.check(export, (stage,))
        if plan.layout == "padded":
            raise UserError(
                f"{export} has `layout: padded`, which is for stock connectors. Give this one the compact export."
            )
        if plan.export_widths == "per_block":
            raise UserError(
                f"{export} has `export_widths: per_block`, which vLLM cannot load. Export `uniform` widths."
            )
        if plan.kv_only:
            raise UserError(
                f"In the plan of {export}, decode runs block(s) {list(plan.kv_only)} that prefill does not run. vLLM "
                "cannot compute their keys and values. Use `relation: nested` or `unified`, or serve the pair with "
                "`pdtrim serve`."
            )
        return cls(export, stage, plan, policy, manifest)

    def block(self, layer: int) -> int | None:
        """Original index of the engine's `layer`; None for a layer behind the model's own, which is a draft's."""
        blocks = self.plan.blocks(self.stage)
        return blocks[layer] if layer < len(blocks) else None

    def crosses(self, block: int) -> bool:
        """Whether decode runs the block, so that its keys and values cross."""
        return block in self.plan.decode

    def rule(self, block: int) -> Retention:
        """What the block sends."""
        return self.policy.rule(block)

    def handled(self, prompt_tokens: int) -> int:
        """Positions that the engine's peer gets or gives, for a prompt of this engine.

        The decode engine computes the last token of its own prompt. Under `boundary: prefill` that token is the first
        one of the response, which the second request appends to the prompt.
        """
        whole = self.stage == "prefill" and self.plan.boundary == "prefill"
        return prompt_tokens if whole else prompt_tokens - 1

    def block_bytes(self, block: int, positions: int, ranks: int) -> int:
        """Bytes that one tensor-parallel rank of `ranks` sends of a block."""
        heads, width, element = self.policy.kv.sizes
        return self.rule(block).bytes_sent(positions, heads // ranks, width, element)

    def check_engine(self, *, layers: int, heads: int, width: int, dtype: str, ranks: int) -> None:
        """Refuse an engine that does not hold this stage.

        Args:
            layers: layers of the engine's model, without a draft's.
            heads: key/value heads of all ranks.
            width: head dimension.
            dtype: element type of the engine's cache, such as `bfloat16`.
            ranks: tensor-parallel ranks.

        Raises:
            UserError: a number differs from the export's, or the heads cannot be divided among the ranks.
        """
        kv = self.policy.kv
        ours = (len(self.plan.blocks(self.stage)), kv.num_key_value_heads, kv.head_dim, kv.dtype)
        found = (layers, heads, width, dtype)
        names = ("layers", "key/value heads", "head dimension", "element type of the cache (`--dtype`)")
        wrong = [
            f"{name}: {theirs}, not {own}"
            for name, own, theirs in zip(names, ours, found, strict=True)
            if own != theirs
        ]
        if wrong:
            raise UserError(
                f"The engine does not hold the {self.stage} half of {self.export}: {'; '.join(wrong)}. Start it with "
                f"`python -m pdtrim_pl.serving.vllm {self.stage} --export {self.export}`."
            )
        if heads % ranks:
            raise UserError(
                f"`--tensor-parallel-size` is {ranks}, and the model has {heads} key/value heads: give a divisor."
            )
