"""Bounds how many questions are in flight, over all processes that share a folder: each holds the lock of one of a
number of files while it asks. The kernel frees the lock of a process that dies."""

import asyncio
import contextlib
import fcntl
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

_LOOK_S = 0.02


@contextlib.asynccontextmanager
async def place(folder: Path, count: int) -> AsyncIterator[None]:
    """Holds one of ``count`` places of a folder that is there; waits for a free one as long as its caller lets it."""
    while (held := _free(folder, count)) is None:
        await asyncio.sleep(_LOOK_S * (0.5 + random.random()))
    try:
        yield
    finally:
        os.close(held)


def _free(folder: Path, count: int) -> int | None:
    """The locked file of a place that nobody held; None when all are held."""
    for number in random.sample(range(count), count):
        descriptor = os.open(folder / str(number), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
        else:
            return descriptor
    return None
