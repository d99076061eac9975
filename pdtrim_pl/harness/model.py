"""The model `pdtrim` of lm-evaluation-harness. Importing this module registers it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from pdtrim_pl.errors import UserError
from pdtrim_pl.harness.device import present_device
from pdtrim_pl.harness.in_process import MODES, InProcessPair, Mode, load_mode
from pdtrim_pl.models.context import usable_context
from pdtrim_pl.models.loading import TORCH_DTYPES
from pdtrim_pl.models.pretrained import load_tokenizer
from pdtrim_pl.serving.exported import ExportedPair
from pdtrim_pl.serving.generate import stop_ids_of
from pdtrim_pl.serving.sampling import Sampling

PASSED_ON = frozenset(
    {"max_length", "add_bos_token", "prefix_token_id", "chat_template_args", "enable_thinking", "think_end_token"}
)
"""Settings of the harness's `hf` model that mean the same here."""
BATCHES = frozenset({"batch_size", "max_batch_size"})
"""Settings of how requests run together."""
NEUTRAL = {"top_p": 1.0, "num_beams": 1, "repetition_penalty": 1.0}
"""Settings of generation that change nothing at these values, and that the pair does not know at others."""
Encoded = tuple[tuple[str, str] | None, list[int], list[int]]
"""Context and continuation as text, and their token ids."""


class InProcessLM(HFLM):
    """A model under the contract of one request: contexts are prompts, continuations are responses.

    It tokenises, batches and stops as the harness's own `hf` model does.

    Args:
        answering: both halves of a pair; or a whole model, which then is the harness's `hf` model.
        tokenizer: the tokenizer of both halves.
        stop_ids: tokens that end a response.
        batch_size: a number, or `auto`.
        max_batch_size: where `auto` starts.
        settings: those of `PASSED_ON`, see the `hf` model.

    Raises:
        UserError: an unknown setting.
    """

    def __init__(
        self, answering: InProcessPair | PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int], *, batch_size: int | str = 1, max_batch_size: int = 64, **settings: Any,
    ) -> None:  # fmt: skip
        _check_settings(settings)
        self.answering = answering
        self.pair = answering if isinstance(answering, InProcessPair) else None
        shown = answering.decode.model if isinstance(answering, InProcessPair) else answering
        settings.setdefault("max_length", usable_context(shown.config.to_dict()))
        super().__init__(shown, tokenizer=tokenizer, batch_size=batch_size, max_batch_size=max_batch_size, **settings)
        self.stop_ids = tuple(stop_ids)

    @override
    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Logits [B, T, V]. The harness calls this to try a batch size; for the pair, half of a row is its prompt."""
        if self.pair is None:
            logits: Tensor = super()._model_call(inps, *args, **kwargs)
            return logits
        prompt = max(inps.shape[1] // 2, 1)
        rows = inps.tolist()
        responses = [row[prompt:] or row for row in rows]
        return torch.stack(list(self.pair.response_logits([row[:prompt] for row in rows], responses)))

    @override
    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self.pair is None:
            whole: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return whole
        automatic = self.batch_size == "auto" and not override_bs
        if automatic:
            self.batch_sizes: dict[int, int] = {}
        alike: dict[tuple[Any, ...], list[int]] = {}  # choices of one token after one context need one pass together
        for index, request in enumerate(requests):
            alike.setdefault(_inputs(request), []).append(index)
        first = [requests[indices[0]] for indices in alike.values()]
        order = Collator(first, sort_fn=lambda each: (-len(each[1]) - len(each[2]), tuple(each[1] + each[2])))
        size = 0 if automatic else override_bs if self.batch_size == "auto" else self.batch_size
        scores: dict[int, tuple[float, bool]] = {}
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests")
        for chunk in order.get_batched(n=size, batch_fn=self._batch_scheduler if automatic else None):
            for request, logits in zip(chunk, self._logits(chunk), strict=True):
                for index in alike[_inputs(request)]:
                    text, _, continuation = requests[index]
                    scores[index] = _score(logits, continuation)
                    if text is not None:
                        self.cache_hook.add_partial("loglikelihood", text, scores[index])
                    bar.update()
        bar.close()
        return [scores[index] for index in range(len(requests))]

    def _logits(self, chunk: Sequence[Encoded]) -> Iterator[Tensor]:
        """Logits of each continuation, fp32 [R, V]. Contexts that are too long lose their beginning."""
        assert self.pair is not None
        responses, longest = [continuation for _, _, continuation in chunk], self.max_length
        assert all(0 < len(response) <= longest for response in responses)  # as the `hf` model asks
        prompts = [context[-(longest + 1 - len(response)) :] for _, context, response in chunk]
        return self.pair.response_logits(prompts, responses)

    @override
    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation: Any) -> Tensor:
        """Prompts and responses, [B, P + R]; after its end a row has padding."""
        if self.pair is None:
            ids: Tensor = super()._model_generate(context, max_length, stop, **generation)
            return ids
        mask, prompt = generation.pop("attention_mask"), context.shape[1]
        pick = _sampling(generation).picker()
        loop = self.pair.stream(context, mask.bool(), room=max_length - prompt, pick=pick, stop_ids=self.stop_ids)
        done = stop_sequences_criteria(self.tokenizer, stop, prompt, len(context))
        tokens = context
        for token in loop:
            tokens = torch.cat([tokens, token[:, None]], dim=1)
            if bool(done(tokens, None).all()):
                break
        ends = torch.isin(tokens[:, prompt:], torch.tensor(self.stop_ids, device=tokens.device)).int()
        after_end = ends.cumsum(dim=1) - ends > 0
        return torch.cat([context, tokens[:, prompt:].masked_fill(after_end, self.tokenizer.pad_token_id)], dim=1)


@register_model("pdtrim")
class PairLM(InProcessLM):
    """An exported pair for the harness.

    Args:
        export: directory of the pair.
        mode: `disaggregated`: contexts through prefill, the policy on the cache, continuations through decode.
            `unified`: the decode checkpoint alone. `dense`: the unpruned model.
        model: name, path or Hub id of the unpruned model, if it is not where the stage plan says; for `dense`.
        device: default `cuda` if there is a GPU, else `cpu`.
        dtype: `float32`, `bfloat16` or `float16`; by default that of the checkpoint.
        settings: see `InProcessLM`.

    Raises:
        UserError: an unknown setting, or an export that cannot be loaded.
    """

    def __init__(
        self, export: str, mode: Mode = "disaggregated", model: str | None = None, device: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        if mode not in MODES:
            raise UserError(f"`mode` is {mode!r}: choose one of {', '.join(MODES)}.")
        _check_settings({name: value for name, value in settings.items() if name not in BATCHES})
        exported = ExportedPair.read(Path(export))
        kind = None if dtype is None else TORCH_DTYPES[dtype]
        answering = load_mode(exported, mode, model=model, device=present_device(device), dtype=kind)
        tokenizer = load_tokenizer(str(exported.path / "prefill"))
        super().__init__(answering, tokenizer, stop_ids_of(exported.path, tokenizer), **settings)


def _check_settings(settings: Mapping[str, Any]) -> None:
    if unknown := sorted(settings.keys() - PASSED_ON):
        known = ", ".join(sorted(PASSED_ON))
        raise UserError(f"The model `pdtrim` has no setting {', '.join(unknown)}. Beside its own it has {known}.")


def _inputs(request: Encoded) -> tuple[Any, ...]:
    """What the logits of a continuation depend on. The last token is no input."""
    _, context, continuation = request
    return tuple(context), tuple(continuation[:-1])


def _score(logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Log-likelihood of a continuation under its logits [R, V], and whether it is the greedy one."""
    ids = torch.tensor(continuation, device=logits.device)
    likelihood = logits.log_softmax(dim=-1).gather(1, ids[:, None]).sum()
    return float(likelihood), bool((logits.argmax(dim=-1) == ids).all())


def _sampling(generation: dict[str, Any]) -> Sampling:
    """How tokens are chosen. The seed comes from torch, which the harness seeds."""
    known = {"do_sample", "temperature", "top_k"}
    unknown = [name for name, value in generation.items() if name not in known and value != NEUTRAL.get(name)]
    if unknown:
        raise UserError(f"The pair cannot generate with `generation_kwargs` {', '.join(unknown)}: leave them out.")
    if not generation.get("do_sample"):
        return Sampling()
    seed = int(torch.randint(2**31, ()))
    return Sampling(float(generation.get("temperature") or 1.0), generation.get("top_k"), seed)
