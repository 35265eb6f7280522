"""What tests put into run stores, and how they look at it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from services.store import schema
from services.store.reader import Reader
from services.store.writer import StoreWriter


@contextmanager
def reading(url: str) -> Iterator[Reader]:
    engine = schema.open_engine(url, create=False, read_only=True)
    yield Reader(engine)
    engine.dispose()


def put_sample(
    writer: StoreWriter,
    iteration: int,
    row: int = 0,
    kind: str = "train",
    correct: bool = True,
    trajectory: bytes = b"bytes",
) -> None:
    writer.sample(
        iteration,
        kind=kind,
        group_id=1,
        row=row,
        problem_id="p",
        prompt="a",
        completion="b",
        correct=correct,
        rewards={"x": 1.0},
        trajectory=trajectory,
    )


def put_walk(writer: StoreWriter, last: int, first: int = 0) -> None:
    """A line with one spike each way, a NaN, and a series that has a value every tenth iteration."""
    for iteration in range(first, last + 1):
        value = {777: 1e6, 1333: -1e6, 1500: math.nan}.get(iteration, iteration / 1000)
        writer.metrics(iteration, {"line": value} | ({"eval": 1.0} if iteration % 10 == 0 else {}))
    assert writer.flush(120)
