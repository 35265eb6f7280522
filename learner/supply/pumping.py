"""Keeping the actors busy while the ranks learn."""

import concurrent.futures
from collections.abc import Callable
from typing import TypeVar

Answer = TypeVar("Answer")

PUMP_S = 0.02
"""Seconds between two pumps: how long an actor that has delivered may wait for its next lease."""


def pump_until(work: concurrent.futures.Future[Answer], pump: Callable[[], None]) -> Answer:
    """The answer of ``work``, which another thread does; its end is noticed at once, and until then ``pump`` is called
    every ``PUMP_S`` seconds. Raises what the work raised."""
    while not concurrent.futures.wait([work], timeout=PUMP_S).done:
        pump()
    return work.result(timeout=0)
