"""Runs prefill and decode in two processes on one host, each with its own exported checkpoint.

Shapes: B batch, P prompt tokens, R response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from pdtrim_pl.errors import UserError
from pdtrim_pl.plan import STAGES, Stage
from pdtrim_pl.serving import messages as say
from pdtrim_pl.serving.exported import ExportedPair
from pdtrim_pl.serving.requests import Padded, RequestStats
from pdtrim_pl.serving.sampling import Sampling
from pdtrim_pl.serving.workers import WorkerPair


class DisaggregatedRuntime:
    """Serves an exported pair from a prefill worker and a decode worker. It is a context manager.

    The workers are spawned: in a script, use it below `if __name__ == "__main__":`.

    Args:
        export: directory with `prefill/`, `decode/`, `stage_plan.json` and `kv_policy.json`.
        devices: of the prefill and of the decode worker. By default one GPU each if there are two, one GPU for both if
            there is one, else the CPU.
        attn_implementation: `sdpa` or `eager`; None means what the model needs.
        start_timeout: seconds for the workers to load and to connect.

    Raises:
        UserError: the directory is not an export, or (on entering) a worker cannot load its checkpoint.
        RuntimeError: a worker failed or died, on entering or in any request. No process is left behind.
    """

    def __init__(
        self,
        export: Path,
        *,
        devices: tuple[str, str] | None = None,
        attn_implementation: say.Attention | None = None,
        start_timeout: float = 600.0,
    ) -> None:
        self.pair = ExportedPair.read(Path(export))
        self.devices = devices or devices_of("auto")
        self.attn_implementation = attn_implementation
        self.start_timeout = start_timeout
        self.stats: RequestStats | None = None
        """Figures of the last request that ended."""
        self._workers: WorkerPair | None = None
        self._busy = False

    def __enter__(self) -> Self:
        self._workers = WorkerPair(self.pair.path, self.devices, self.attn_implementation)
        try:
            waiting = set(STAGES)
            for stage, _ in self._workers.reports(self.start_timeout):
                waiting.discard(stage)
                if not waiting:
                    return self
        except BaseException:
            self._workers.kill()
            raise
        raise AssertionError("reports end only when both workers are ready")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._workers is not None
        self._workers.kill()
        self._workers = None

    def stream(
        self, prompt_ids: list[int] | Tensor, *, max_new_tokens: int, stop_ids: Collection[int] = (),
        temperature: float = 0.0, top_k: int | None = None, seed: int = 0, top_p: float = 1.0,
    ) -> Generator[int, None, None]:  # fmt: skip
        """Generate from one prompt. Yields each token id when it is generated, the stop token too.

        Closing the iterator ends the request.

        Args:
            prompt_ids: token ids, [P].
            max_new_tokens: most tokens to yield.
            stop_ids: tokens that end the response.
            temperature: 0 for greedy; above 0 tokens are sampled.
            top_k: sample among this many most likely tokens; None for all.
            seed: of the sampling; equal seeds give equal tokens.
            top_p: sample among the most likely tokens that together reach this probability.
        """
        prompts = self._prompts(torch.as_tensor(prompt_ids)[None], None)
        for ids in self._generate(prompts, max_new_tokens, stop_ids, Sampling(temperature, top_k, seed, top_p)):
            yield ids[0]

    def generate(
        self, prompt_ids: Tensor, prompt_mask: Tensor | None = None, *, max_new_tokens: int,
        stop_ids: Collection[int] = (), temperature: float = 0.0, top_k: int | None = None, seed: int = 0,
    ) -> Tensor:  # fmt: skip
        """Generate a batch of responses, [B, up to max_new_tokens].

        Args:
            prompt_ids: token ids, [B, P], padded on the left.
            prompt_mask: True on real tokens, [B, P]; all real by default.
            max_new_tokens: most tokens of a row.
            stop_ids: tokens that end a row; the row then repeats its stop token until all rows are done.
            temperature: see `stream`.
            top_k: see `stream`.
            seed: see `stream`.
        """
        prompts = self._prompts(prompt_ids, prompt_mask)
        steps = self._generate(prompts, max_new_tokens, stop_ids, Sampling(temperature, top_k, seed))
        return torch.tensor(list(steps)).T

    def forced_logits(
        self, prompt_ids: Tensor, response_ids: Tensor, prompt_mask: Tensor | None = None,
        response_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits [B, R, V], fp32, that predict each token of given responses. For checks and evaluation of a pair.

        Args:
            prompt_ids: [B, P], padded on the left.
            response_ids: [B, R], padded on the right.
            prompt_mask: True on real tokens, [B, P].
            response_mask: True on real tokens, [B, R].
        """
        prompts = self._prompts(prompt_ids, prompt_mask)
        responses = Padded.of(response_ids, response_mask, "response", self.pair)
        self.pair.check_prompt(max(prompts.lengths), response_ids.shape[1], "response_ids")
        encode = say.Encode(prompts.ids, prompts.mask, Sampling(), self.pair.plan.boundary == "prefill")
        request = say.Force(responses.ids, responses.mask)
        (report,) = self._request(prompts, encode, request, sum(responses.lengths))
        assert isinstance(report, say.Logits)
        return torch.from_numpy(report.values)

    def _prompts(self, ids: Tensor, mask: Tensor | None) -> Padded:
        return Padded.of(ids, mask, "prompt", self.pair)

    def _generate(
        self, prompts: Padded, max_new_tokens: int, stop_ids: Collection[int], sampling: Sampling
    ) -> Iterator[list[int]]:
        self.pair.check_prompt(max(prompts.lengths), max_new_tokens)
        encode = say.Encode(prompts.ids, prompts.mask, sampling, with_logits=False)
        request = say.Continue(max_new_tokens, tuple(stop_ids), sampling)
        for report in self._request(prompts, encode, request):
            assert isinstance(report, say.Tokens)
            yield report.ids

    def _request(
        self, prompts: Padded, encode: say.Encode, request: say.Continue | say.Force, forced_tokens: int = 0
    ) -> Iterator[say.Report]:
        """Send one request to both workers. Yields what decode reports, and sets `stats` at the end."""
        workers = self._workers
        if workers is None or not workers.alive:
            raise RuntimeError(
                "The workers are not running: use the runtime in a `with` block, a new one after an error."
            )
        if self._busy:
            raise RuntimeError("The workers serve one request at a time: finish or close the earlier `stream` first.")
        self._busy = True
        done: dict[Stage, say.Encoded | say.Decoded] = {}
        produced = 0
        try:
            workers.tell("prefill", encode)
            workers.tell("decode", request)
            for report in _until_done(workers, done):
                produced += len(report.ids) if isinstance(report, say.Tokens) else forced_tokens
                yield report
        except GeneratorExit:  # the caller reads no more: end the request, because the next one needs idle workers
            if workers.alive:
                workers.tell("decode", say.Cancel())
                list(_until_done(workers, done))
                self._count(prompts, produced, done)
            raise
        else:
            self._count(prompts, produced, done)
        finally:
            self._busy = False

    def _count(self, prompts: Padded, new_tokens: int, done: dict[Stage, say.Encoded | say.Decoded]) -> None:
        encoded, decoded = done["prefill"], done["decode"]
        assert isinstance(encoded, say.Encoded)
        assert isinstance(decoded, say.Decoded)
        self.stats = RequestStats.of(self.pair, prompts, new_tokens, encoded, decoded)


def devices_of(device: str) -> tuple[str, str]:
    """Devices of the prefill and the decode worker for one setting.

    Args:
        device: `auto` (GPUs if there are any), `cuda` (one GPU each if there are two), or one device for both.

    Raises:
        UserError: this machine has no such device.
    """
    gpus = torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"`device` is {device!r}: give auto, cpu, cuda or cuda:0.") from error
    if kind.type not in ("cpu", "cuda") or (kind.type == "cuda" and (kind.index or 0) >= gpus):
        raise UserError(
            f"`device` is {device!r}, and this machine has {gpus} GPUs for torch: give auto, cpu or another."
        )
    if device == "cuda":
        return "cuda:0", f"cuda:{min(gpus, 2) - 1}"
    return device, device


def _until_done(workers: WorkerPair, done: dict[Stage, say.Encoded | say.Decoded]) -> Iterator[say.Report]:
    """What decode reports until both workers are done; their last reports go to `done`."""
    for stage, report in workers.reports():
        if not isinstance(report, say.Encoded | say.Decoded):
            yield report
            continue
        done[stage] = report
        if len(done) == len(STAGES):
            return
