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
from rollout.sampling.branches import Branches, Branching, branching
from rollout.sampling.positions import choice_entropy, choice_logp, log_confidence
from rollout.sampling.schedule import tokens_per_step
from rollout.sampling.truncation import Law, truncate, without_mask
from rollout.trajectory import BranchSpec, PositionRule, SamplerSpec

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
    position_logp: np.ndarray | None = None
    position_entropy: np.ndarray | None = None
    nfe: int = 0
    branches: Branches | None = None


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
    branches: BranchSpec | None = None,
    on_completion: Callable[[int, Completion], None] | None = None,
    on_step: Callable[[int, np.ndarray, np.ndarray], None] | None = None,
) -> list[Completion]:
    """Write one completion per request.

    Args:
        forward: (input_ids [R, L] int64, attention_mask [R, L] int64 or None, logit_rows [N] int64 flat indices) ->
            logits [N, V] of the candidate positions only, and of those that branches fill.
        max_rows: rows denoised together; waiting requests take the places of finished ones.
        branches: which states are branched too; draws are the same with and without.
        on_completion: called with (request index, completion) as soon as a completion is finished.
        on_step: called after each step with (request index, ids [C] int32, masked [C] bool), for whoever watches; ids
            are 0 where masked, and both go on changing.

    Raises:
        ConfigError: when the sampler's settings contradict each other.
    """
    if sampler.position_rule not in POSITION_RULES:
        raise ConfigError(f"position_rule {sampler.position_rule!r} is unknown; use one of {', '.join(POSITION_RULES)}")
    if sampler.threshold is not None and not 0 <= sampler.threshold <= 1:
        raise ConfigError(f"threshold {sampler.threshold} is not a probability; take one from 0 to 1")
    if not (sampler.position_temperature >= 0 and 0 < sampler.confidence_temperature < float("inf")):
        raise ConfigError(
            f"position_temperature {sampler.position_temperature} must be 0 or more, and confidence_temperature "
            f"{sampler.confidence_temperature} above 0 and finite"
        )
    loop = _Loop(forward, requests, sampler, tokens, device)
    waiting = iter(range(len(requests)))
    live: list[_Row] = []
    while True:
        while len(live) < max_rows and (index := next(waiting, None)) is not None:
            live.append(_Row(index, requests[index], sampler, loop.P))
            if branches is not None:
                key = requests[index].key
                live[-1].branching = branching(branches, sampler, key, mask=tokens.mask, eos=tokens.eos)
        if not live:
            return [completion for completion in loop.done if completion is not None]
        loop.step(live)
        if on_step:
            for row in live:
                on_step(row.index, row.out.ids, row.masked)
        for row in [row for row in live if row.finished(loop, tokens)]:
            live.remove(row)
            if row.branching is not None:
                row.out.branches = row.branching.finish(row.out)
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
        self.branching: Branching | None = None
        self.out = Completion(
            ids=np.zeros(C, np.int32),
            unmask_step=np.zeros(C, np.int16),
            unmask_rank=np.zeros(C, np.int16),
            drawn=np.zeros(C, bool),
            logp=np.zeros(C, np.float32),
            logp_raw=np.zeros(C, np.float32),
            entropy=np.zeros(C, np.float32),
            support=[np.zeros(0, np.int32)] * C if sampler.truncates else None,
            position_logp=np.zeros(sampler.steps, np.float32) if sampler.scores_positions else None,
            position_entropy=np.zeros(sampler.steps, np.float32) if sampler.scores_positions else None,
        )

    @property
    def revealed(self) -> int:
        return int(self.masked.size - self.masked.sum())

    def finished(self, loop: "_Loop", tokens: Tokens) -> bool:
        """True when nothing is left to reveal; fills the rest with EOS once the last block was EOS only."""
        C, block_length = loop.sampler.completion_length, loop.sampler.block_length
        if not self.masked.any():
            return True
        start = self.revealed  # first position of the next block, where one was just finished
        if start % block_length or not start:
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
        before_drawing = sampler.threshold is not None or sampler.position_rule == "decoupled_confidence"
        after_drawing = not before_drawing and sampler.position_rule in ("low_confidence", "entropy")
        self.choosing = "before drawing" if before_drawing else "after drawing" if after_drawing else "before forward"
        self.P = max((len(request.prompt_ids) for request in requests), default=0)
        self.done: list[Completion | None] = [None] * len(requests)

    def step(self, live: list[_Row]) -> None:
        """One denoising step of every live row, each at its own step count."""
        candidates = self._candidates(live)
        row_of_N = np.repeat(np.arange(len(live)), [len(c) for c in candidates])
        position_N = np.concatenate(candidates)
        states = [
            (r, row.branching, np.flatnonzero(row.masked))
            for r, row in enumerate(live)
            if row.branching is not None and row.branching.wants(row.step)
        ]
        asked_rows = [row_of_N, *(np.full(position_B.size, r) for r, _, position_B in states)]
        asked_at = [position_N, *(position_B for _, _, position_B in states)]
        logits_NV, *fill_logits = self._logits(live, asked_rows, asked_at)
        for (r, branches, position_B), logits_BV in zip(states, fill_logits, strict=True):
            branches.take(live[r].step, position_B, logits_BV)
        if self.choosing == "before drawing":
            picks = self._pick(live, candidates, logits_NV)
            candidates = [positions[pick] for positions, pick in zip(candidates, picks, strict=True)]
            offsets = np.searchsorted(row_of_N, np.arange(len(live)))
            at_N = np.concatenate([start + pick for start, pick in zip(offsets, picks, strict=True)])
            row_of_N, position_N = row_of_N[at_N], position_N[at_N]
            logits_NV = logits_NV[torch.from_numpy(at_N).to(self.device)]
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
        blocks = [row.revealed // block_length * block_length for row in live]
        masked = [b + np.flatnonzero(row.masked[b : b + block_length]) for row, b in zip(live, blocks, strict=True)]
        if self.choosing != "before forward":
            return masked
        if rule == "random":
            keys_R, steps_R = torch.tensor([row.key for row in live]), torch.tensor([row.step for row in live])
            streams_R1 = noise.streams(keys_R, steps_R, torch.full_like(keys_R, _POSITION_STREAM)).unsqueeze(1)
            bits_RC = noise.uniform_bits(streams_R1, torch.arange(self.sampler.completion_length)).numpy()
            masked = [m[np.argsort(bits_C[m], kind="stable")] for m, bits_C in zip(masked, bits_RC, strict=True)]
        return [m[: self.schedule[row.step]] for m, row in zip(masked, live, strict=True)]

    def _pick(self, live: list[_Row], candidates: list[np.ndarray], logits_NV: torch.Tensor) -> list[np.ndarray]:
        """Which candidates each row reveals, as indices into its candidates in the order of choice."""
        sampler = self.sampler
        temperature = sampler.confidence_temperature if sampler.threshold is None else 1.0
        confidence_N = log_confidence(without_mask(logits_NV, self.tokens.mask), temperature).double().cpu()
        counts = [len(positions) for positions in candidates]
        scores_RK = torch.full((len(live), max(counts)), -torch.inf, dtype=torch.float64)
        position_RK = torch.zeros(scores_RK.shape, dtype=torch.int64)
        real_RK = torch.arange(max(counts)) < torch.tensor(counts).unsqueeze(1)
        scores_RK[real_RK] = confidence_N
        position_RK[real_RK] = torch.from_numpy(np.concatenate(candidates))
        if sampler.threshold is not None:
            passing_R = (scores_RK.exp() > sampler.threshold).sum(1).clamp(min=1).tolist()
            order_RK = scores_RK.sort(dim=1, descending=True, stable=True).indices
            return [order_K[:n] for order_K, n in zip(order_RK.numpy(), passing_R, strict=True)]
        if not sampler.scores_positions:
            order_RK = scores_RK.sort(dim=1, descending=True, stable=True).indices
        else:
            scores_RK[real_RK] /= sampler.position_temperature
            keys_R, steps_R = torch.tensor([row.key for row in live]), torch.tensor([row.step for row in live])
            streams_R = noise.streams(keys_R, steps_R, torch.full_like(keys_R, _POSITION_STREAM))
            noisy_RK = scores_RK + noise.gumbel(streams_R, position_RK)
            order_RK = noisy_RK.sort(dim=1, descending=True, stable=True).indices
            self._record_choice(live, counts, scores_RK, order_RK)
        return [order_K[: self.schedule[row.step]] for order_K, row in zip(order_RK.numpy(), live, strict=True)]

    def _record_choice(
        self, live: list[_Row], counts: list[int], scores_RK: torch.Tensor, order_RK: torch.Tensor
    ) -> None:
        revealed = [self.schedule[row.step] for row in live]
        free = [r for r, (count, n) in enumerate(zip(counts, revealed, strict=True)) if n < count]
        for n in sorted({revealed[r] for r in free}):  # a step that reveals all that is left chooses nothing
            at = [r for r in free if revealed[r] == n]
            scores_SK, chosen_Sn = scores_RK[at], order_RK[at, :n]
            logp_S, entropy_S = choice_logp(scores_SK, chosen_Sn), choice_entropy(scores_SK, chosen_Sn)
            for r, logp, entropy in zip(at, logp_S.tolist(), entropy_S.tolist(), strict=True):
                out = live[r].out
                assert out.position_logp is not None and out.position_entropy is not None
                out.position_logp[live[r].step] = min(logp, 0.0)
                out.position_entropy[live[r].step] = max(entropy, 0.0)

    def _logits(
        self, live: list[_Row], rows: Sequence[np.ndarray], positions: Sequence[np.ndarray]
    ) -> Sequence[torch.Tensor]:
        """One forward: the logits [., V] of each part's completion positions in these rows."""
        L = self.P + self.sampler.completion_length
        logit_rows = torch.from_numpy(np.concatenate(rows) * L + self.P + np.concatenate(positions))
        input_ids_RL, attention_mask_RL = self._inputs(live)
        logits = self.forward(input_ids_RL, attention_mask_RL, logit_rows.to(self.device))
        return logits.split([part.size for part in positions])

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
        chosen = np.arange(len(positions))
        if self.choosing == "after drawing":
            # LLaDA's confidence: probability of the drawn token at temperature 1.
            by_confidence = self.sampler.position_rule == "low_confidence"
            score = drawn.logp_raw[part] if by_confidence else -drawn.entropy[part]
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
