"""What an engine gives the denoising loop: a head, which looks at rows and draws at the positions that it is asked.

The loop (``rollout.sampling.denoise``) knows neither model nor logits. Every head draws by the functions here, so the
same tokens come from the same noise, wherever the logits are.

Shapes: R rows, L columns (prompt and completion, padded on the left), C completion positions, N asked positions, B
positions of a fill, Z fills of the same positions, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import torch

from rollout.copies import in_one_copy
from rollout.sampling import noise
from rollout.sampling.positions import log_confidence
from rollout.sampling.truncation import Law, truncate, without_mask
from rollout.trajectory import SamplerSpec

Forward = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor], torch.Tensor]
"""(input_ids [R, L] int64, attention_mask [R, L] bool or None, logit_rows [N] int64 flat indices) -> [N, V] logits."""


@dataclass(frozen=True)
class Rows:
    """Completions in the making, each before its next step."""

    ids_RL: np.ndarray
    """int64; pads, prompt, and mask tokens where nothing is revealed"""
    pads_R: np.ndarray
    """int64, pads at the begin of each row"""
    column_RC: np.ndarray
    """int64, where each completion position stands in its row"""
    keys_R: np.ndarray
    """int64, what names each row's noise"""
    steps_R: np.ndarray
    """int64, steps taken before"""


@dataclass(frozen=True)
class Asked:
    """Completion positions of rows, a row's together and in the order of the rows; int64."""

    row_N: np.ndarray
    position_N: np.ndarray


@dataclass(frozen=True)
class Fill:
    """Masked positions of one row that are filled at once, beside what the loop reveals."""

    row: int
    position_B: np.ndarray
    keys: tuple[int, ...]
    """of the noise, one for each fill; none: one greedy fill"""


@dataclass(frozen=True)
class Filled:
    ids_ZB: np.ndarray
    """int32"""
    logp_ZB: np.ndarray | None
    """float32; None of a greedy fill"""


@dataclass(frozen=True)
class Drawn:
    """Tokens and what the law that they come from says of them, [N] each."""

    token: np.ndarray
    logp: np.ndarray
    logp_raw: np.ndarray
    entropy: np.ndarray
    kept: Callable[[int], np.ndarray]
    """token ids that a position's law keeps, ascending, int32"""


class Look(Protocol):
    """What a head saw of one step."""

    fills: Sequence[Filled]

    def confidence(self) -> torch.Tensor:
        """[N] float64 on the CPU: log of each asked position's largest probability, at the temperature by which the
        sampler chooses positions."""

    def draw(self, at_N: np.ndarray | None = None) -> Drawn:
        """Tokens of all asked positions, or of those at these indices, in their order."""


class Head(Protocol):
    """An engine's model as the loop sees it."""

    def look(self, rows: Rows, asked: Asked, fills: Sequence[Fill], sampler: SamplerSpec) -> Look:
        """One step of all rows: one pass of the model, whatever is asked."""


class LogitsHead:
    """A head whose logits come to this process, where they are drawn from.

    Args:
        logits: logits [N, V] of these positions of these rows, as they are: shifted ones are the function's affair.
        mask: the mask token's id, which is never drawn.
    """

    def __init__(self, logits: Callable[[Rows, Asked], torch.Tensor], mask: int) -> None:
        self._logits, self._mask = logits, mask

    def look(self, rows: Rows, asked: Asked, fills: Sequence[Fill], sampler: SamplerSpec) -> Look:
        row_N = np.concatenate([asked.row_N, *(np.full(f.position_B.size, f.row) for f in fills)])
        position_N = np.concatenate([asked.position_N, *(f.position_B for f in fills)])
        parts = [asked.position_N.size, *(f.position_B.size for f in fills)]
        logits_NV, *of_fills = self._logits(rows, Asked(row_N, position_N)).split(parts)
        filled = fill_all(of_fills, fills, [int(rows.steps_R[f.row]) for f in fills], sampler, self._mask)
        return _LocalLook(logits_NV, rows, asked, sampler, self._mask, filled)


def padded(forward: Forward, device: torch.device) -> Callable[[Rows, Asked], torch.Tensor]:
    """Logits by one forward of all rows, as they are padded."""

    def logits(rows: Rows, asked: Asked) -> torch.Tensor:
        L = rows.ids_RL.shape[1]
        row_N = asked.row_N * L + rows.column_RC[asked.row_N, asked.position_N]
        ids_RL, pads_R, logit_rows = in_one_copy(device, rows.ids_RL, rows.pads_R, row_N)
        mask_RL = torch.arange(L, device=device) >= pads_R.unsqueeze(1) if rows.pads_R.any() else None
        return forward(ids_RL, mask_RL, logit_rows)

    return logits


def chooses_before_drawing(sampler: SamplerSpec) -> bool:
    """Whether positions are chosen by ``Look.confidence``."""
    return sampler.threshold is not None or sampler.position_rule == "decoupled_confidence"


def confidence(logits_NV: torch.Tensor, sampler: SamplerSpec, mask: int) -> torch.Tensor:
    """[N] float64 on the CPU, as ``Look.confidence`` says."""
    temperature = sampler.confidence_temperature if sampler.threshold is None else 1.0
    return log_confidence(without_mask(logits_NV, mask), temperature).double().cpu()


def draw(
    logits_NV: torch.Tensor,
    keys_N: np.ndarray,
    steps_N: np.ndarray,
    position_N: np.ndarray,
    sampler: SamplerSpec,
    mask: int,
) -> tuple[Drawn, Law]:
    """A token for each position, by the noise of its row's key, step and position, and the law that it is from; at
    temperature 0 the likeliest."""
    device = logits_NV.device
    raw_NV = without_mask(logits_NV, mask)
    raw_total_N = raw_NV.logsumexp(-1)
    if sampler.temperature == 0:
        law = Law(raw_NV - raw_total_N.unsqueeze(1), None)
        column_N = law.logp_NK.argmax(-1)
    else:
        law = truncate(raw_NV / sampler.temperature, top_k=sampler.top_k, top_p=sampler.top_p)
        streams_N = noise.streams(*in_one_copy(device, keys_N, steps_N, position_N))
        column_N = _noisiest(law, streams_N)
    at_N1 = column_N.unsqueeze(1)
    token_N = _token(law, at_N1)
    logp_N = law.logp_NK.gather(1, at_N1).squeeze(1)
    logp_raw_N = raw_NV.gather(1, token_N.unsqueeze(1)).squeeze(1) - raw_total_N
    # One copy back, for the same reason; float64 holds ids and float32 alike.
    columns = (token_N, logp_N, logp_raw_N, law.entropy())
    told = torch.stack([column.double() for column in columns]).cpu().numpy()
    drawn = Drawn(
        token=told[0].astype(np.int64),
        logp=told[1].astype(np.float32),
        logp_raw=told[2].astype(np.float32),
        entropy=told[3].astype(np.float32),
        kept=_kept_of(law),
    )
    return drawn, law


def fill_all(
    of_fills: Sequence[torch.Tensor], fills: Sequence[Fill], steps: Sequence[int], sampler: SamplerSpec, mask: int
) -> list[Filled]:
    """All fills that are asked for in a step, sent and told in one copy each. A row's at a time, since what is drawn
    needs copies of its logits.

    Args:
        of_fills: [B, V] logits of each fill's positions, which may be written into.
        steps: that the row of each fill has taken before.
    """
    if not fills:
        return []
    drawn = [f.position_B for f in fills if f.keys]
    sent = iter(in_one_copy(of_fills[0].device, *drawn) if drawn else ())
    made = [
        _drawn_fill(logits_BV, f.keys, next(sent), step, sampler, mask) if f.keys else _greedy_fill(logits_BV, mask)
        for logits_BV, f, step in zip(of_fills, fills, steps, strict=True)
    ]
    told = iter(torch.cat([each.flatten() for each in made]).cpu().split([each.numel() for each in made]))
    return [_as_told(next(told).view(each.shape).numpy()) for each in made]


def _greedy_fill(logits_BV: torch.Tensor, mask: int) -> torch.Tensor:
    """[1, 1, B] float64, the likeliest ids."""
    logits_BV[:, mask] = -torch.inf
    return logits_BV.argmax(-1).double()[None, None]


def _drawn_fill(
    logits_BV: torch.Tensor, keys: Sequence[int], position_B: torch.Tensor, step: int, sampler: SamplerSpec, mask: int
) -> torch.Tensor:
    """[2, Z, B] float64: ids, and their log-probs."""
    law = truncate(without_mask(logits_BV, mask) / sampler.temperature, top_k=sampler.top_k, top_p=sampler.top_p)
    ids, logp = [], []
    for key in keys:
        streams_B = noise.streams(torch.full_like(position_B, key), torch.full_like(position_B, step), position_B)
        column_B1 = _noisiest(law, streams_B).unsqueeze(1)
        ids.append(_token(law, column_B1).double())
        logp.append(law.logp_NK.gather(1, column_B1).squeeze(1).double())
    return torch.stack([torch.stack(ids), torch.stack(logp)])


def _as_told(told: np.ndarray) -> Filled:
    logp_ZB = None if len(told) == 1 else np.minimum(told[1].astype(np.float32), 0.0)
    return Filled(told[0].astype(np.int32), logp_ZB)


class _LocalLook:
    def __init__(
        self,
        logits_NV: torch.Tensor,
        rows: Rows,
        asked: Asked,
        sampler: SamplerSpec,
        mask: int,
        fills: Sequence[Filled],
    ) -> None:
        self._logits_NV, self._rows, self._asked = logits_NV, rows, asked
        self._sampler, self._mask = sampler, mask
        self.fills = fills

    def confidence(self) -> torch.Tensor:
        return confidence(self._logits_NV, self._sampler, self._mask)

    def draw(self, at_N: np.ndarray | None = None) -> Drawn:
        logits_NV, row_N, position_N = self._logits_NV, self._asked.row_N, self._asked.position_N
        if at_N is not None:
            logits_NV = logits_NV[torch.from_numpy(at_N).to(logits_NV.device)]
            row_N, position_N = row_N[at_N], position_N[at_N]
        keys_N, steps_N = self._rows.keys_R[row_N], self._rows.steps_R[row_N]
        return draw(logits_NV, keys_N, steps_N, position_N, self._sampler, self._mask)[0]


def _noisiest(law: Law, streams_N: torch.Tensor) -> torch.Tensor:
    """[N] columns of the law that Gumbel noise makes the largest: a draw from it."""
    among = law.ids_NK if law.ids_NK is not None else law.logp_NK.shape[1]
    return (law.logp_NK + noise.gumbel(streams_N, among)).argmax(-1)


def _token(law: Law, column_N1: torch.Tensor) -> torch.Tensor:
    return (column_N1 if law.ids_NK is None else law.ids_NK.gather(1, column_N1)).squeeze(1)


def _kept_of(law: Law) -> Callable[[int], np.ndarray]:
    """``Drawn.kept``; all positions' ids are copied at once, when the first are asked for."""

    @cache
    def ids_NK() -> np.ndarray:
        K = law.logp_NK.shape[1]
        ids = torch.arange(K, device=law.logp_NK.device) if law.ids_NK is None else law.ids_NK
        return torch.where(law.logp_NK > -torch.inf, ids, -1).to(torch.int32).cpu().numpy()

    def kept(i: int) -> np.ndarray:
        ids_K = ids_NK()[i]
        return np.sort(ids_K[ids_K >= 0])

    return kept
