"""The denoising loop: semi-autoregressive blocks, rows that enter and leave, one forward for all rows that are live.

Shapes: R live rows, L = P_max + C sequence positions (prompts padded on the left), N candidate positions of a step,
V vocabulary, C completion positions.

What is computed together is a function of the requests alone: rows enter in request order, a finished row's place goes
to the next request, and nothing looks at a clock.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch

from rewards.errors import ConfigError
from rollout.sampling import noise
from rollout.sampling.schedule import tokens_per_step
from rollout.sampling.truncation import Law, truncate, without_mask
from rollout.trajectory import PositionRule, SamplerSpec

POSITION_RULES: tuple[str, ...] = get_args(PositionRule)
_POSITION_STREAM = -1  # the step's stream for choosing positions; completion positions are >= 0


@dataclass(frozen=True)
class Request:
    """One completion to write. ``key`` names its noise (63 bits)."""

    prompt_ids: Sequence[int]
    key: int


@dataclass
class Completion:
    """What was written for one request; arrays as in ``TrajectoryGroup``, without the leading G."""

    ids: np.ndarray
    unmask_step: np.ndarray
    unmask_rank: np.ndarray
    drawn: np.ndarray
    logp: np.ndarray
    logp_raw: np.ndarray
    entropy: np.ndarray
    support: list[np.ndarray] | None
    """per position: kept token ids, ascending, int32"""
    nfe: int = 0


@dataclass(frozen=True)
class Tokens:
    """Special tokens that the loop must know."""

    mask: int
    eos: tuple[int, ...]
    """the first one fills finished completions"""
    pad: int


def denoise(
    forward: Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor], torch.Tensor],
    requests: Sequence[Request],
    sampler: SamplerSpec,
    tokens: Tokens,
    *,
    max_rows: int,
    device: torch.device,
    on_completion: Callable[[int, Completion], None] | None = None,
) -> list[Completion]:
    """Write one completion per request.

    Args:
        forward: (input_ids [R, L] int64, attention_mask [R, L] int64 or None, logit_rows [N] int64 flat indices) ->
            logits [N, V] of the candidate positions only.
        max_rows: rows denoised together; waiting requests take the places of finished ones.
        on_completion: called with (request index, completion) as soon as a completion is finished.

    Raises:
        ConfigError: when the sampler's settings contradict each other.
    """
    if sampler.position_rule not in POSITION_RULES:
        raise ConfigError(f"position_rule {sampler.position_rule!r} is unknown; use one of {', '.join(POSITION_RULES)}")
    loop = _Loop(forward, requests, sampler, tokens, device)
    waiting = iter(range(len(requests)))
    live: list[_Row] = []
    while True:
        while len(live) < max_rows and (index := next(waiting, None)) is not None:
            live.append(_Row(index, requests[index], sampler, loop.P))
        if not live:
            return [completion for completion in loop.done if completion is not None]
        loop.step(live)
        for row in [row for row in live if row.finished(loop, tokens)]:
            live.remove(row)
            loop.done[row.index] = row.out
            if on_completion:
                on_completion(row.index, row.out)


class _Row:
    """A completion in the making."""

    def __init__(self, index: int, request: Request, sampler: SamplerSpec, P: int) -> None:
        C = sampler.completion_length
        self.index = index
        self.key = request.key
        self.pads = P - len(request.prompt_ids)
        self.prompt_ids = request.prompt_ids
        self.step = 0
        self.masked = np.ones(C, dtype=bool)
        self.out = Completion(
            ids=np.zeros(C, np.int32),
            unmask_step=np.zeros(C, np.int16),
            unmask_rank=np.zeros(C, np.int16),
            drawn=np.zeros(C, bool),
            logp=np.zeros(C, np.float32),
            logp_raw=np.zeros(C, np.float32),
            entropy=np.zeros(C, np.float32),
            support=[np.zeros(0, np.int32)] * C if sampler.truncates else None,
        )

    def finished(self, loop: "_Loop", tokens: Tokens) -> bool:
        """True when nothing is left to reveal; fills the rest with EOS once the last block was EOS only."""
        C, block_length = loop.sampler.completion_length, loop.sampler.block_length
        if not self.masked.any():
            return True
        start = self.step // loop.steps_per_block * block_length  # first position of the next block
        if self.step % loop.steps_per_block or not start:
            return False
        if not np.isin(self.out.ids[start - block_length : start], tokens.eos).all():
            return False
        # A filler is not an action: it carries the step at which the row left and is marked as not drawn.
        self.out.ids[start:] = tokens.eos[0]
        self.out.unmask_step[start:] = self.step
        self.out.unmask_rank[start:] = np.arange(C - start)
        return True


class _Loop:
    def __init__(
        self,
        forward: Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor], torch.Tensor],
        requests: Sequence[Request],
        sampler: SamplerSpec,
        tokens: Tokens,
        device: torch.device,
    ) -> None:
        self.forward, self.sampler, self.tokens, self.device = forward, sampler, tokens, device
        self.schedule = tokens_per_step(sampler.completion_length, sampler.block_length, sampler.steps)
        self.steps_per_block = sampler.steps // (sampler.completion_length // sampler.block_length)
        self.P = max((len(request.prompt_ids) for request in requests), default=0)
        self.done: list[Completion | None] = [None] * len(requests)

    def step(self, live: list[_Row]) -> None:
        """One denoising step of every live row, each at its own step count."""
        candidates = self._candidates(live)
        row_of_N = np.repeat(np.arange(len(live)), [len(c) for c in candidates])
        position_N = np.concatenate(candidates)
        L = self.P + self.sampler.completion_length
        logit_rows_N = torch.from_numpy(row_of_N * L + self.P + position_N).to(self.device)
        input_ids_RL, attention_mask_RL = self._inputs(live)
        logits_NV = self.forward(input_ids_RL, attention_mask_RL, logit_rows_N)
        drawn = self._draw(live, row_of_N, position_N, logits_NV)
        offset = 0
        for row, positions in zip(live, candidates, strict=True):
            part = slice(offset, offset + len(positions))
            offset += len(positions)
            self._reveal(row, positions, drawn, part)
            row.step += 1
            row.out.nfe += 1

    def _candidates(self, live: list[_Row]) -> list[np.ndarray]:
        """Positions per row that the LM head must see: those to be revealed, or all masked ones of the block when the
        rule needs their laws to choose."""
        block_length, rule = self.sampler.block_length, self.sampler.position_rule
        blocks = [row.step // self.steps_per_block * block_length for row in live]
        masked = [b + np.flatnonzero(row.masked[b : b + block_length]) for row, b in zip(live, blocks, strict=True)]
        if rule in ("low_confidence", "entropy"):
            return masked
        if rule == "random":
            keys_R, steps_R = torch.tensor([row.key for row in live]), torch.tensor([row.step for row in live])
            streams_R1 = noise.streams(keys_R, steps_R, torch.full_like(keys_R, _POSITION_STREAM)).unsqueeze(1)
            bits_RC = noise.uniform_bits(streams_R1, torch.arange(self.sampler.completion_length)).numpy()
            masked = [m[np.argsort(bits_C[m], kind="stable")] for m, bits_C in zip(masked, bits_RC, strict=True)]
        return [m[: self.schedule[row.step]] for m, row in zip(masked, live, strict=True)]

    def _inputs(self, live: list[_Row]) -> tuple[torch.Tensor, torch.Tensor | None]:
        C = self.sampler.completion_length
        ids_RL = np.full((len(live), self.P + C), self.tokens.pad, dtype=np.int64)
        for i, row in enumerate(live):
            ids_RL[i, row.pads : self.P] = row.prompt_ids
            ids_RL[i, self.P :] = np.where(row.masked, self.tokens.mask, row.out.ids)
        pads_R = np.array([row.pads for row in live])
        mask_RL = None
        if pads_R.any():
            real = np.arange(self.P + C)[None, :] >= pads_R[:, None]
            mask_RL = torch.from_numpy(real.astype(np.int64)).to(self.device)
        return torch.from_numpy(ids_RL).to(self.device), mask_RL

    def _draw(
        self, live: list[_Row], row_of_N: np.ndarray, position_N: np.ndarray, logits_NV: torch.Tensor
    ) -> "_Drawn":
        temperature = self.sampler.temperature
        raw_NV = without_mask(logits_NV, self.tokens.mask)
        raw_total_N = raw_NV.logsumexp(-1)
        if temperature == 0:
            law = Law(raw_NV - raw_total_N.unsqueeze(1), None)
            column_N = law.logp_NK.argmax(-1)
        else:
            law = truncate(raw_NV / temperature, top_k=self.sampler.top_k, top_p=self.sampler.top_p)
            keys_N = torch.tensor([live[r].key for r in row_of_N], device=self.device)
            steps_N = torch.tensor([live[r].step for r in row_of_N], device=self.device)
            streams_N = noise.streams(keys_N, steps_N, torch.from_numpy(position_N).to(self.device))
            among = law.ids_NK if law.ids_NK is not None else law.logp_NK.shape[1]
            column_N = (law.logp_NK + noise.gumbel(streams_N, among)).argmax(-1)
        at_N1 = column_N.unsqueeze(1)
        token_N = column_N if law.ids_NK is None else law.ids_NK.gather(1, at_N1).squeeze(1)
        return _Drawn(
            token=token_N.cpu().numpy(),
            logp=law.logp_NK.gather(1, at_N1).squeeze(1).cpu().numpy(),
            logp_raw=(raw_NV.gather(1, token_N.unsqueeze(1)).squeeze(1) - raw_total_N).cpu().numpy(),
            entropy=law.entropy().cpu().numpy(),
            law=law,
        )

    def _reveal(self, row: _Row, positions: np.ndarray, drawn: "_Drawn", part: slice) -> None:
        score = {
            "low_confidence": drawn.logp_raw[part],  # LLaDA's: probability of the drawn token at temperature 1
            "entropy": -drawn.entropy[part],
        }.get(self.sampler.position_rule, np.zeros(len(positions), np.float32))
        chosen = np.argsort(-score, kind="stable")[: self.schedule[row.step]]
        at = positions[chosen]
        out, source = row.out, part.start + chosen
        out.ids[at] = drawn.token[source]
        out.unmask_step[at] = row.step
        out.unmask_rank[at] = np.arange(len(at))
        out.drawn[at] = True
        out.logp[at] = np.minimum(drawn.logp[source], 0.0)
        out.logp_raw[at] = np.minimum(drawn.logp_raw[source], 0.0)
        out.entropy[at] = drawn.entropy[source]
        row.masked[at] = False
        if out.support is not None:
            for position, i in zip(at, source, strict=True):
                out.support[position] = drawn.kept(int(i))


@dataclass(frozen=True)
class _Drawn:
    token: np.ndarray
    logp: np.ndarray
    logp_raw: np.ndarray
    entropy: np.ndarray
    law: Law

    def kept(self, i: int) -> np.ndarray:
        columns = (self.law.logp_NK[i] > -torch.inf).nonzero().squeeze(1)
        ids = columns if self.law.ids_NK is None else self.law.ids_NK[i][columns]
        return np.sort(ids.cpu().numpy().astype(np.int32))
