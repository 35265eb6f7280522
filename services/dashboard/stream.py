"""Live updates: one poller for each run that somebody follows, whatever the number of those who do.

A poller appends frames to a ring that all clients of the run share; a client is a position in it, so a slow one costs
no memory. One that falls off the ring is told so and dropped: it comes back with ``Last-Event-ID`` and is brought up to
date from the store.
"""

import asyncio
import contextlib
import json
import logging
from collections import Counter, deque
from collections.abc import AsyncIterator

from sse_starlette.event import ServerSentEvent

from rewards.errors import StoreError
from services.dashboard.changes import Frame, Gone, Key, Source
from services.dashboard.connections import share

POLL_S = 0.5
RING_FRAMES = 2000
RING_BYTES = 2 << 20
MAX_CLIENTS = 1000
"""Or half of the files that the process may open, where that is less."""
_LOOK_S = 10.0

log = logging.getLogger("services.dashboard")


class Hub:
    """The feeds of one service, by run; None is the feed of all runs. All methods run on the event loop."""

    def __init__(self, files: int) -> None:
        """files: how many the process may open; each client is one."""
        self._most = min(MAX_CLIENTS, files // 2)
        self._feeds: dict[str | None, Feed] = {}
        self._of_peer: Counter[str] = Counter()
        self.clients = 0

    def full(self, peer: str) -> bool:
        """Whether no more clients are taken from this address."""
        return self.clients >= self._most or self._of_peer[peer] >= share(self._most)

    @contextlib.asynccontextmanager
    async def joined(self, topic: str | None, source: Source, peer: str) -> "AsyncIterator[Feed]":
        """The topic's feed, which is polled while somebody is in such a block."""
        feed = self._feeds.get(topic)
        if feed is None or feed.over:
            feed = self._feeds[topic] = Feed(source)
        self.clients += 1
        self._of_peer[peer] += 1
        feed.clients += 1
        try:
            yield feed
        finally:
            self.clients -= 1
            self._of_peer[peer] -= 1
            self._of_peer += Counter()  # forgets who has none
            feed.clients -= 1
            if not feed.clients:
                feed.close()
                if self._feeds.get(topic) is feed:
                    del self._feeds[topic]


class Feed:
    """The changes of one topic, for at least one client. The ring holds every change after ``_begin``, in order."""

    def __init__(self, source: Source) -> None:
        self.clients = 0
        self.over = False
        self._source = source
        self._ring: deque[Frame] = deque()
        self._bytes = 0
        self._dropped = 0  # frames that have left the ring
        self._begin: Key | None = None  # None until the store was read for the first time
        self._end: Key | None = None
        self._trouble: str | None = None
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._poll())

    async def follow(self, since: Key | None) -> AsyncIterator[ServerSentEvent]:
        """What changed after ``since``, then what changes; without ``since``, how things stand and then what changes.

        Ends when the topic is gone, or when the client is too slow for the ring.
        """
        told: str | None = None
        while self._begin is None and not self.over:
            if self._trouble != told:
                told = self._trouble
                yield _state(told)
            await self._change()
        if self.over:
            return
        since = since or self._end  # without any run there is no frame that would say where we are
        try:
            async for frame in self._up_to_the_ring(since):
                since = frame.key
                yield frame.event()
        except Gone:
            return
        except StoreError as error:  # the client comes back with the id that it has
            yield _state(str(error))
            return
        assert since is not None
        place = self._dropped + sum(frame.key <= since for frame in self._ring)
        while True:
            while place < self._dropped + len(self._ring):
                if place < self._dropped:
                    reason = "more happened than was taken from the stream; reconnect with Last-Event-ID"
                    yield ServerSentEvent(event="dropped", data=json.dumps({"reason": reason}))
                    return
                frame = self._ring[place - self._dropped]
                place += 1
                yield frame.event()
            if self.over:
                return
            if self._trouble != told:
                told = self._trouble
                yield _state(told)
            await self._change()

    def close(self) -> None:
        """End the poller: nobody follows any more."""
        self.over = True
        self._task.cancel()

    async def _up_to_the_ring(self, since: Key | None) -> AsyncIterator[Frame]:
        """What the store has after ``since``, and how things stand: the ring has all that comes after these frames."""
        assert self._begin is not None and self._end is not None
        ahead = since is not None and since > self._end  # of a poller that is about to get there, or of any service
        since = since or self._end
        while not self.over:
            if since.epoch != self._end.epoch or since < self._begin or ahead:
                batch = await asyncio.to_thread(self._source.catch_up, since)
                for frame in batch.frames:
                    yield frame
                since, ahead = batch.end, False
                if not batch.frames:
                    await asyncio.sleep(POLL_S)
            else:
                for frame in await asyncio.to_thread(self._source.state, since):
                    yield frame
                if since >= self._begin:
                    return

    async def _change(self) -> None:
        """The next change, or time to look whether somebody still polls."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), _LOOK_S)
        self.over |= self._task.done()

    async def _poll(self) -> None:
        while not self.over:
            try:
                if self._end is None:
                    self._begin = self._end = await asyncio.to_thread(self._source.position)
                    self._tell()
                else:
                    batch = await asyncio.to_thread(self._source.poll, self._end)
                    self._end = batch.end
                    self._append(batch.frames)
                    if batch.reset:  # clients are told, end, and come back to a new feed
                        self._finish()
                self._set_trouble(None)
            except Gone:
                self._finish()
            except StoreError as error:
                self._set_trouble(str(error))
            except Exception as error:
                reason = f"{type(error).__name__} in the dashboard; its log has the rest"
                if reason != self._trouble:
                    log.exception("the poller of an event stream")
                self._set_trouble(reason)
            await asyncio.sleep(POLL_S)

    def _append(self, frames: list[Frame]) -> None:
        for frame in frames:
            self._ring.append(frame)
            self._bytes += len(frame.data)
        while len(self._ring) > RING_FRAMES or self._bytes > RING_BYTES:
            oldest = self._ring.popleft()
            self._bytes -= len(oldest.data)
            self._dropped += 1
            self._begin = oldest.key
        if frames:
            self._tell()

    def _set_trouble(self, reason: str | None) -> None:
        if reason != self._trouble:
            self._trouble = reason
            self._tell()

    def _finish(self) -> None:
        self.over = True
        self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def _state(trouble: str | None) -> ServerSentEvent:
    name = "readable" if trouble is None else "unreadable"
    return ServerSentEvent(event=name, data=json.dumps({"reason": trouble}))
