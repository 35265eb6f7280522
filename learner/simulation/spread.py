"""Times that differ around a mean. Imports neither torch nor Ray: actors without a model use it too."""

import math

from rollout.seeds import numpy_generator


class Spread:
    """Times of a mean with a deviation, always positive: lognormal, from a stream of its own.

    Args:
        spread: standard deviation, as a share of the mean.
        name: of the stream, see ``rollout.seeds``.
    """

    def __init__(self, mean: float, spread: float, *name: int | str) -> None:
        variance = math.log1p(spread**2)
        self._scale, self._sigma = mean * math.exp(-variance / 2), math.sqrt(variance)
        self._generator = numpy_generator(*name)

    def draw(self) -> float:
        return self._scale * math.exp(self._sigma * float(self._generator.standard_normal()))
