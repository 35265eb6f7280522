"""What changed in a run, or in the list of runs, as frames of an event stream in a fixed order.

A run's order is that of its store: revision by revision, and within one metrics, then events, workers and so on. A
frame's id names its place in it, so a stream that was cut anywhere goes on exactly there.
"""

import json
import re
import secrets
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote, unquote

from pydantic import BaseModel
from sse_starlette.event import ServerSentEvent

from services.dashboard.about import NOTHING, About, about, best_held_out
from services.dashboard.ahead import Ahead, ahead
from services.dashboard.annotations import Annotations
from services.dashboard.index import RunIndex, shown_status, summarise
from services.dashboard.models import Checkpoint, Event, Worker, number
from services.store.catalog import Catalog
from services.store.reader import Changes, Reader

MAX_ROWS = 1000
"""Rows of a kind in one batch, roughly."""
_WHOLE = 9
_ID = re.compile(r"([0-9a-f]{1,20})-(\d{1,18})(?:\.([0-8])\.([\w.~%-]{0,800}))?", flags=re.ASCII)


class Gone(Exception):
    """There is no such run any more."""


class Key(NamedTuple):
    """A place among the changes: after all of a revision, or in the middle of it. Places of one epoch are ordered."""

    epoch: str
    revision: int
    rank: int = _WHOLE
    name: str = ""

    def __str__(self) -> str:
        place = "" if self.rank == _WHOLE else f".{self.rank}.{quote(self.name, safe='')}"
        return f"{self.epoch}-{self.revision}{place}"

    @classmethod
    def parse(cls, text: str) -> "Key":
        """The place that an id names. Raises ValueError when it is none."""
        found = _ID.fullmatch(text)
        if found is None:
            raise ValueError("not an id of this stream")
        epoch, revision, rank, name = found.groups()
        return cls(epoch, int(revision)) if rank is None else cls(epoch, int(revision), int(rank), unquote(name))


@dataclass(frozen=True)
class Frame:
    """One event, at its place."""

    name: str
    data: str
    key: Key

    def event(self) -> ServerSentEvent:
        """As it goes over the wire."""
        return ServerSentEvent(event=self.name, data=self.data, id=str(self.key))


class Batch(NamedTuple):
    """Changes up to and with ``end``; ``reset``: the order before is void."""

    frames: list[Frame]
    end: Key
    reset: bool = False


class Source(Protocol):
    """Where a feed's frames come from. Called in threads; every method may raise Gone and StoreError."""

    def position(self) -> Key:
        """The newest change."""

    def state(self, at: Key) -> list[Frame]:
        """How things stand, for a client that follows from ``at`` on."""

    def poll(self, since: Key) -> Batch:
        """Changes after ``since``, for the one poller."""

    def catch_up(self, since: Key) -> Batch:
        """Changes after ``since``, for a client that was away; not always all of them."""


class OneRun:
    """The changes of a run."""

    def __init__(self, catalog: Catalog, annotations: Annotations, run_id: str) -> None:
        self._catalog, self._annotations, self._run_id = catalog, annotations, run_id
        self._told: tuple[Any, str] = (None, "")  # the run's row and its summary, as of the last poll
        self._about: tuple[Any, About] = (None, NOTHING)  # of which start, and what

    def position(self) -> Key:
        """The newest change."""
        place = Key.parse(self._reader().marker(self._run_id))
        self._poll_run(self._changes(self._reader(), place))  # clients are told how it stands: only changes are news
        return place

    def state(self, at: Key) -> list[Frame]:
        """The run as it is now."""
        reader = self._reader()
        row = reader.run(self._run_id)
        if row is None:
            raise Gone
        return [Frame("run", self._summary(reader, row, ahead(self._catalog, row)), at)]

    def poll(self, since: Key) -> Batch:
        """As ``catch_up``, and the run itself when it has changed, its heartbeat included."""
        reader = self._reader()
        changes = self._changes(reader, since)
        batch = _batch(changes, since)
        if self._poll_run(changes):
            batch.frames.append(Frame("run", self._told[1], batch.end))
        return batch

    def _poll_run(self, changes: Changes) -> bool:
        """Whether the run itself has changed."""
        assert changes.run is not None
        unstored = ahead(self._catalog, changes.run)
        said = self._annotations.all().get(self._run_id)
        now = (changes.run, unstored, shown_status(changes.run, unstored), said)
        if now == self._told[0]:
            return False
        self._told = now, self._summary(self._reader(), changes.run, unstored)
        return True

    def catch_up(self, since: Key) -> Batch:
        """Changes after ``since``, all of them or the first ones."""
        return _batch(self._changes(self._reader(), since), since)

    def _reader(self) -> Reader:
        try:
            return self._catalog.reader(self._run_id)
        except KeyError:
            raise Gone from None

    def _changes(self, reader: Reader, since: Key) -> Changes:
        seen = since.revision if since.rank == _WHOLE else since.revision - 1
        changes = reader.changes_since(self._run_id, f"{since.epoch}-{seen}", limit=MAX_ROWS)
        if changes.run is None:
            raise Gone
        return changes

    def _summary(self, reader: Reader, row: dict[str, Any], unstored: Ahead | None) -> str:
        latest, workers = reader.latest_metrics(self._run_id), reader.workers(self._run_id)
        began, found = (row["created"], row["starts"]), self._about[1]
        if self._about[0] != began:
            found = about(reader, reader.run(self._run_id))
            self._about = began, found
        beside = found.fields() | best_held_out(reader, row)
        beside |= self._annotations.all().get(self._run_id, {})
        return summarise(row, latest, workers, unstored, beside).model_dump_json()


class AllRuns:
    """The list of runs. What changed while a client was away isn't known: it is told how things stand."""

    def __init__(self, index: RunIndex) -> None:
        self._index = index
        self._epoch, self._revision = secrets.token_hex(8), 0
        self._told: dict[str, str] = {}

    def position(self) -> Key:
        """The newest change."""
        self._told = self._now()
        return Key(self._epoch, self._revision)

    def state(self, at: Key) -> list[Frame]:
        """All runs."""
        return [Frame("run", data, at) for data in self._now().values()]

    def poll(self, since: Key) -> Batch:
        """Runs that changed, came or went."""
        now = self._now()
        frames = []
        for run_id, data in now.items():
            if self._told.get(run_id) != data:
                frames.append(Frame("run", data, self._next()))
        for run_id in self._told.keys() - now.keys():
            frames.append(Frame("removed", json.dumps({"id": run_id}), self._next()))
        self._told = now
        return Batch(frames, Key(self._epoch, self._revision))

    def catch_up(self, since: Key) -> Batch:
        """Only that what was known is void; ``state`` comes next."""
        end = Key(self._epoch, self._revision)
        return Batch([Frame("reset", "{}", end)], end)

    def _next(self) -> Key:
        self._revision += 1
        return Key(self._epoch, self._revision)

    def _now(self) -> dict[str, str]:
        return {run_id: known.summary.model_dump_json() for run_id, known in self._index.runs().items()}


def _batch(changes: Changes, since: Key) -> Batch:
    """The frames after ``since`` in their order, without the run."""
    end = Key.parse(changes.marker)
    if changes.reset:
        return Batch([Frame("reset", "{}", end)], end, reset=True)
    found = _rows(changes, end.epoch)
    if changes.truncated_after is not None:
        # Its own revision isn't known, but rows that it would have taken are not in the answer: it may come first.
        place = Key(end.epoch, since.revision + 1, 0)
        found.append(Frame("truncated", json.dumps({"after": changes.truncated_after}), place))
    found = sorted((frame for frame in found if frame.key > since), key=lambda frame: frame.key)
    return Batch(found, end)


def _rows(changes: Changes, epoch: str) -> list[Frame]:
    values: dict[tuple[int, int], dict[str, Any]] = defaultdict(dict)
    times: dict[tuple[int, int], float] = {}
    for row in changes.metrics:
        place = (row["revision"], row["iteration"])
        values[place][row["name"]] = number(row["value"])
        times[place] = row["time"]
    frames = [
        Frame(
            "metrics",
            json.dumps({"iteration": iteration, "time": times[revision, iteration], "values": found}),
            Key(epoch, revision, 1, f"{iteration:020d}"),
        )
        for (revision, iteration), found in values.items()
    ]

    def add(name: str, rank: int, row: dict[str, Any], key: str, model: type[BaseModel] | None) -> None:
        body = {field: number(value) for field, value in row.items() if field not in ("revision", "run_id")}
        data = json.dumps(body) if model is None else model(**row).model_dump_json()
        frames.append(Frame(name, data, Key(epoch, row["revision"], rank, key)))

    for row in changes.events:
        add("event", 2, row, f"{row['id']:020d}", Event)
    for row in changes.workers:
        add("worker", 3, row, row["worker_id"], Worker)
    for row in changes.checkpoints:
        add("checkpoint", 4, row, f"{row['iteration']:020d}", Checkpoint)
    for row in changes.samples:
        add("sample", 5, row, f"{row['id']:020d}", None)
    return frames
