"""What a request asks of vLLM's worker, and what the worker answers, as plain values.

A request's side goes through msgpack (``PoolingParams.extra_kwargs``). An answer is one float64 tensor, which holds
token ids and float32 numbers exactly; vLLM passes nothing but tensors back.

Shapes: N asked positions of a row, M of them and of its fills, B positions of a fill, Z fills.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch

from rollout.sampling.head import Drawn, Fill, Filled, chooses_before_drawing
from rollout.trajectory import SamplerSpec

KEY = "unmask"
"""Of ``extra_kwargs``."""


@dataclass(frozen=True)
class RowAsked:
    """One row's part of a step."""

    sampler: SamplerSpec
    key: int
    """names the row's noise"""
    step: int
    position_N: np.ndarray
    """int64"""
    token_M: np.ndarray
    """int64, the tokens of the sequence whose logits predict the asked positions, then those of each fill"""
    fills: tuple[Fill, ...] = ()

    def plain(self) -> dict[str, Any]:
        """Values that msgpack knows."""
        return {
            "sampler": list(astuple(self.sampler)),
            "key": self.key,
            "step": self.step,
            "positions": _bytes(self.position_N),
            "tokens": _bytes(self.token_M),
            "fills": [[_bytes(fill.position_B), list(fill.keys)] for fill in self.fills],
        }

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "RowAsked":
        fills = tuple(Fill(0, _ints(at), tuple(keys)) for at, keys in plain["fills"])
        return cls(
            sampler=SamplerSpec(*plain["sampler"]),
            key=plain["key"],
            step=plain["step"],
            position_N=_ints(plain["positions"]),
            token_M=_ints(plain["tokens"]),
            fills=fills,
        )


@dataclass(frozen=True)
class RowAnswer:
    """What the worker drew for a ``RowAsked``."""

    adapter: int
    """vLLM's number of the adapter that the row was computed with; 0: none"""
    drawn: Drawn
    confidence_N: np.ndarray | None
    """float64, where the sampler chooses positions before it draws"""
    fills: tuple[Filled, ...]
    support: tuple[np.ndarray, np.ndarray] | None = None
    """where the sampler truncates: how many tokens the law of each position keeps, [N], and their ids, ascending,
    position after position"""

    def pack(self, asked: RowAsked) -> torch.Tensor:
        """[.] float64."""
        drawn = self.drawn
        parts = [[self.adapter], drawn.token, drawn.logp, drawn.logp_raw, drawn.entropy]
        if self.confidence_N is not None:
            parts.append(self.confidence_N)
        if self.support is not None:
            parts += self.support
        for filled in self.fills:
            parts.append(filled.ids_ZB.ravel())
            if filled.logp_ZB is not None:
                parts.append(filled.logp_ZB.ravel())
        return torch.from_numpy(np.concatenate([np.asarray(part, np.float64) for part in parts]))

    @classmethod
    def unpack(cls, packed: torch.Tensor, asked: RowAsked) -> "RowAnswer":
        read = _Reader(packed.numpy())
        N = asked.position_N.size
        adapter = int(read.take(1)[0])
        token, logp, logp_raw, entropy = read.take(N), read.take(N), read.take(N), read.take(N)
        confidence_N = read.take(N) if chooses_before_drawing(asked.sampler) else None
        support, kept = None, [np.zeros(0, np.int32)] * N
        if asked.sampler.truncates:
            count_N = read.take(N).astype(np.int64)
            support = count_N, read.take(int(count_N.sum())).astype(np.int32)
            kept = np.split(support[1], np.cumsum(count_N)[:-1])
        fills = tuple(read.fill(fill) for fill in asked.fills)
        read.end()
        drawn = Drawn(
            token=token.astype(np.int64),
            logp=logp.astype(np.float32),
            logp_raw=logp_raw.astype(np.float32),
            entropy=entropy.astype(np.float32),
            kept=kept.__getitem__,
        )
        return cls(adapter, drawn, confidence_N, fills, support)


def joined(rows: Sequence[Drawn]) -> Drawn:
    """The rows' positions one after the other."""
    kept = [(row, i) for row in rows for i in range(row.token.size)]
    return Drawn(
        token=np.concatenate([row.token for row in rows]),
        logp=np.concatenate([row.logp for row in rows]),
        logp_raw=np.concatenate([row.logp_raw for row in rows]),
        entropy=np.concatenate([row.entropy for row in rows]),
        kept=lambda at: kept[at][0].kept(kept[at][1]),
    )


def part(drawn: Drawn, at_N: np.ndarray) -> Drawn:
    """These positions, in this order."""
    return Drawn(
        token=drawn.token[at_N],
        logp=drawn.logp[at_N],
        logp_raw=drawn.logp_raw[at_N],
        entropy=drawn.entropy[at_N],
        kept=lambda at: drawn.kept(int(at_N[at])),
    )


def _bytes(ints: np.ndarray) -> bytes:
    """Quick to copy, which vLLM does a few times."""
    return ints.astype("<i4").tobytes()


def _ints(packed: bytes) -> np.ndarray:
    return np.frombuffer(packed, "<i4").astype(np.int64)


class _Reader:
    def __init__(self, values: np.ndarray) -> None:
        self._values, self._at = values, 0

    def take(self, count: int) -> np.ndarray:
        self._at += count
        return self._values[self._at - count : self._at]

    def fill(self, asked: Fill) -> Filled:
        Z, B = max(1, len(asked.keys)), asked.position_B.size
        ids_ZB = self.take(Z * B).astype(np.int32).reshape(Z, B)
        return Filled(ids_ZB, self.take(Z * B).astype(np.float32).reshape(Z, B) if asked.keys else None)

    def end(self) -> None:
        assert self._at == self._values.size, "an answer of another length than was asked for"
