"""The denoising loop: semi-autoregressive blocks, rows that enter and leave, one look of the head at all live rows.

Shapes: R live rows, L columns of the longest text (prompt and completion; texts are padded on the left), N candidate
positions of a step, C completion positions, P prompt tokens.

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
from rollout.sampling.head import Asked, Drawn, Fill, Head, Look, Rows, chooses_before_drawing
from rollout.sampling.positions import choice_entropy, choice_logp
from rollout.sampling.schedule import tokens_per_step
from rollout.spans import prompt_places
from rollout.trajectory import BranchSpec, PositionRule, SamplerSpec

POSITION_RULES: tuple[str, ...] = get_args(PositionRule)
_POSITION_STREAM = -1  # the step's stream for choosing positions; completion positions are >= 0


@dataclass(frozen=True)
class Request:
    """One completion to write. ``key`` names its noise (63 bits)."""

    prompt_ids: Sequence[int]
    key: int
    threshold: float | None = None
    """Its own, in the place of the sampler's."""
    place_C: np.ndarray | None = None
    """Where in its text each position stands (``rollout.spans.places``); None: behind the prompt."""

    def length(self, completion_length: int) -> int:
        """Tokens of its text, prompt and completion."""
        written = completion_length if self.place_C is None else int((self.place_C >= 0).sum())
        return len(self.prompt_ids) + written


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
    head: Head,
    requests: Sequence[Request],
    sampler: SamplerSpec,
    tokens: Tokens,
    *,
    max_rows: int,
    branches: BranchSpec | None = None,
    on_completion: Callable[[int, Completion], None] | None = None,
    on_step: Callable[[int, np.ndarray, np.ndarray], None] | None = None,
) -> list[Completion]:
    """Write one completion per request.

    Args:
        head: is asked for the candidate positions only, and for those that branches fill.
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
    assert not isinstance(sampler.threshold, tuple), "which threshold a completion has is drawn before"
    if sampler.threshold is not None and not 0 <= sampler.threshold <= 1:
        raise ConfigError(f"threshold {sampler.threshold} is not a probability; take one from 0 to 1")
    if not (sampler.position_temperature >= 0 and 0 < sampler.confidence_temperature < float("inf")):
        raise ConfigError(
            f"position_temperature {sampler.position_temperature} must be 0 or more, and confidence_temperature "
            f"{sampler.confidence_temperature} above 0 and finite"
        )
    loop = _Loop(head, requests, sampler, tokens)
    waiting = iter(range(len(requests)))
    live: list[_Row] = []
    while True:
        while len(live) < max_rows and (index := next(waiting, None)) is not None:
            live.append(_Row(index, requests[index], sampler, tokens, loop.L))
            if branches is not None:
                key = requests[index].key
                live[-1].branching = branching(branches, sampler, key, eos=tokens.eos)
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

    def __init__(self, index: int, request: Request, sampler: SamplerSpec, tokens: Tokens, L: int) -> None:
        C, P = sampler.completion_length, len(request.prompt_ids)
        self.index = index
        self.key = request.key
        self.pads = L - request.length(C)
        self.ends_early = request.place_C is None
        place_C = P + np.arange(C) if request.place_C is None else request.place_C
        self.column_C = self.pads + place_C
        self.masked = place_C >= 0
        self.ids_L = np.full(L, tokens.pad, dtype=np.int64)
        self.ids_L[self.pads + prompt_places(request.place_C, P)] = request.prompt_ids
        self.ids_L[self.column_C[self.masked]] = tokens.mask
        self.threshold = sampler.threshold if request.threshold is None else request.threshold
        self.step = 0
        self.branching: Branching | None = None
        self.out = Completion(
            ids=np.where(self.masked, 0, tokens.pad).astype(np.int32),
            unmask_step=np.where(self.masked, 0, -1).astype(np.int16),
            unmask_rank=np.zeros(C, np.int16),
            drawn=np.zeros(C, bool),
            logp=np.zeros(C, np.float32),
            logp_raw=np.zeros(C, np.float32),
            entropy=np.zeros(C, np.float32),
            support=[np.zeros(0, np.int32)] * C if sampler.truncates else None,
            position_logp=np.zeros(sampler.steps, np.float32) if sampler.scores_positions else None,
            position_entropy=np.zeros(sampler.steps, np.float32) if sampler.scores_positions else None,
        )

    def finished(self, loop: "_Loop", tokens: Tokens) -> bool:
        """True when nothing is left to reveal; fills the rest with EOS once the last block was EOS only."""
        C, block_length = loop.sampler.completion_length, loop.sampler.block_length
        if not self.masked.any():
            return True
        if not self.ends_early:  # an EOS in a gap ends neither the gap nor what follows it
            return False
        start = C - int(self.masked.sum())  # first position of the next block, where one was just finished
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
    def __init__(self, head: Head, requests: Sequence[Request], sampler: SamplerSpec, tokens: Tokens) -> None:
        self.head, self.sampler, self.tokens = head, sampler, tokens
        self.schedule = tokens_per_step(sampler.completion_length, sampler.block_length, sampler.steps)
        before_drawing = chooses_before_drawing(sampler)
        after_drawing = not before_drawing and sampler.position_rule in ("low_confidence", "entropy")
        self.choosing = "before drawing" if before_drawing else "after drawing" if after_drawing else "before forward"
        self.L = max((request.length(sampler.completion_length) for request in requests), default=0)
        self.done: list[Completion | None] = [None] * len(requests)

    def step(self, live: list[_Row]) -> None:
        """One denoising step of every live row, each at its own step count."""
        candidates = self._candidates(live)
        row_of_N = np.repeat(np.arange(len(live)), [len(c) for c in candidates])
        position_N = np.concatenate(candidates)
        branched = [
            (row.branching, Fill(r, np.flatnonzero(row.masked), row.branching.keys))
            for r, row in enumerate(live)
            if row.branching is not None and row.branching.wants(row.step)
        ]
        look = self.head.look(
            self._rows(live), Asked(row_of_N, position_N), [fill for _, fill in branched], self.sampler
        )
        for (branches, fill), filled in zip(branched, look.fills, strict=True):
            branches.take(live[fill.row].step, filled)
        at_N = None
        if self.choosing == "before drawing":
            picks = self._pick(live, candidates, look)
            candidates = [positions[pick] for positions, pick in zip(candidates, picks, strict=True)]
            offsets = np.searchsorted(row_of_N, np.arange(len(live)))
            at_N = np.concatenate([start + pick for start, pick in zip(offsets, picks, strict=True)])
        drawn = look.draw(at_N)
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
        blocks = [int(row.masked.argmax()) // block_length * block_length for row in live]
        masked = [b + np.flatnonzero(row.masked[b : b + block_length]) for row, b in zip(live, blocks, strict=True)]
        if self.choosing != "before forward":
            return masked
        if rule == "random":
            keys_R, steps_R = torch.tensor([row.key for row in live]), torch.tensor([row.step for row in live])
            streams_R1 = noise.streams(keys_R, steps_R, torch.full_like(keys_R, _POSITION_STREAM)).unsqueeze(1)
            bits_RC = noise.uniform_bits(streams_R1, torch.arange(self.sampler.completion_length)).numpy()
            masked = [m[np.argsort(bits_C[m], kind="stable")] for m, bits_C in zip(masked, bits_RC, strict=True)]
        return [m[: self.schedule[row.step]] for m, row in zip(masked, live, strict=True)]

    def _pick(self, live: list[_Row], candidates: list[np.ndarray], look: Look) -> list[np.ndarray]:
        """Which candidates each row reveals, as indices into its candidates in the order of choice."""
        sampler = self.sampler
        counts = [len(positions) for positions in candidates]
        scores_RK = torch.full((len(live), max(counts)), -torch.inf, dtype=torch.float64)
        position_RK = torch.zeros(scores_RK.shape, dtype=torch.int64)
        real_RK = torch.arange(max(counts)) < torch.tensor(counts).unsqueeze(1)
        scores_RK[real_RK] = look.confidence()
        position_RK[real_RK] = torch.from_numpy(np.concatenate(candidates))
        if sampler.threshold is not None:
            threshold_R1 = torch.tensor([[row.threshold] for row in live], dtype=torch.float64)
            passing_R = (scores_RK.exp() > threshold_R1).sum(1).clamp(min=1).tolist()
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
        return [order_K[:n] for order_K, n in zip(order_RK.numpy(), self._revealed(live, counts), strict=True)]

    def _revealed(self, live: list[_Row], counts: list[int]) -> list[int]:
        """Positions that the step reveals of each row; a block in a gap may have fewer left than its share."""
        return [min(self.schedule[row.step], count) for row, count in zip(live, counts, strict=True)]

    def _record_choice(
        self, live: list[_Row], counts: list[int], scores_RK: torch.Tensor, order_RK: torch.Tensor
    ) -> None:
        revealed = self._revealed(live, counts)
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

    def _rows(self, live: list[_Row]) -> Rows:
        ids_RL = np.stack([row.ids_L for row in live])
        pads_R, keys_R, steps_R = np.array([(row.pads, row.key, row.step) for row in live], dtype=np.int64).T
        return Rows(ids_RL, pads_R, np.stack([row.column_C for row in live]), keys_R, steps_R)

    def _reveal(self, row: _Row, positions: np.ndarray, drawn: Drawn, part: slice) -> None:
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
        row.ids_L[row.column_C[at]] = out.ids[at]
        if out.support is not None:
            for position, i in zip(at, source, strict=True):
                out.support[position] = drawn.kept(int(i))
