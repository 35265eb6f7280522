"""Figures of a forward, a rank or an update, which add up."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Statistics:
    """Named figures that add up over micro-batches and ranks, whatever the order."""

    means: dict[str, tuple[float, float]] = field(default_factory=dict)
    """name -> (sum, count)"""
    rms: dict[str, tuple[float, float]] = field(default_factory=dict)
    """name -> (sum of squares, count)"""
    maxima: dict[str, float] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def merged(parts: Iterable["Statistics"]) -> "Statistics":
        """All parts taken together."""
        whole = Statistics()
        for part in parts:
            for ours, theirs in ((whole.means, part.means), (whole.rms, part.rms)):
                for name, (total, count) in theirs.items():
                    before = ours.get(name, (0.0, 0.0))
                    ours[name] = (before[0] + total, before[1] + count)
            for name, value in part.maxima.items():
                whole.maxima[name] = max(whole.maxima.get(name, value), value)
            for name, value in part.totals.items():
                whole.totals[name] = whole.totals.get(name, 0.0) + value
        return whole

    def values(self) -> dict[str, float]:
        """name -> figure; an average over nothing is left out."""
        averages = {name: total / count for name, (total, count) in self.means.items() if count}
        roots = {name: (squares / count) ** 0.5 for name, (squares, count) in self.rms.items() if count}
        return {**averages, **roots, **self.maxima, **self.totals}
