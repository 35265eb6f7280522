"""Live updates: order, reconnects, slow clients, and that service and training leave each other alone."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from services.dashboard.changes import Key
from services.store.writer import StoreWriter
from tests.support.dashboards import (
    Dashboard,
    Place,
    clean_environment,
    dashboard,
    eventually,
    figures,
    is_problem,
    write_run,
    writer,
)
from tests.support.databases import Server


@pytest.fixture(scope="module")
def service(shared_place: Place) -> Iterator[Dashboard]:
    """Each test has runs of its own in it; ``quiet`` is one that never changes."""
    write_run(shared_place, "quiet")
    with dashboard(shared_place) as service:
        shown(service, "quiet")
        yield service


@contextlib.contextmanager
def following(service: Dashboard, place: Place, name: str) -> Iterator[StoreWriter]:
    """A run that is being written, and that the service knows already."""
    with writer(place, name) as store:
        shown(service, name)
        yield store


def shown(service: Dashboard, name: str) -> None:
    eventually(lambda: service.get(f"/api/v1/runs/{name}").status_code == 200)


class Received(NamedTuple):
    name: str
    id: str | None
    data: Any


@contextlib.contextmanager
def stream(service: Dashboard, **options: str) -> Iterator[Iterator[Received]]:
    """Events as they come; ``last_event_id`` is sent as the header."""
    headers = {"Last-Event-ID": options.pop("last_event_id")} if "last_event_id" in options else {}
    with service.client.stream("GET", "/api/v1/stream", params=options, headers=headers, timeout=30) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield parsed(answer)


def parsed(answer: httpx.Response) -> Iterator[Received]:
    fields: dict[str, str] = {}
    for line in answer.iter_lines():
        if line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value
        elif not line and "data" in fields:
            yield Received(fields.get("event", "message"), fields.get("id"), json.loads(fields["data"]))
            fields = {}


def take(events: Iterator[Received], name: str, count: int) -> list[Received]:
    """The next ``count`` events of this name."""
    found = []
    for event in events:
        if event.name == name:
            found.append(event)
            if len(found) == count:
                return found
    raise AssertionError(f"the stream ended after {len(found)} {name} events")


@pytest.mark.slow
def test_a_client_sees_how_things_stand_and_then_every_change(service: Dashboard, shared_place: Place) -> None:
    with following(service, shared_place, "seen") as store:
        store.metrics(1, figures(1))
        assert store.flush(10)
        with stream(service, run="seen") as events:
            first = next(events)
            assert first.name == "run" and first.data["status"] == "running" and first.data["iteration"] == 1
            store.metrics(2, {"loss": float("nan"), "reward/mean": 0.5})
            store.event("warning", "odd", "<b>something</b>\nin two lines")
            store.worker("actor-0", role="rollout", status="ready", policy_version=2)
            store.checkpoint(2, "/somewhere")
            found = {event.name: event for event in (next(events) for _ in range(4))}
            assert found["metrics"].data["iteration"] == 2
            assert found["metrics"].data["values"] == {"loss": "NaN", "reward/mean": 0.5}
            assert found["event"].data["text"] == "<b>something</b>\nin two lines"
            assert found["worker"].data["worker_id"] == "actor-0" and found["checkpoint"].data["iteration"] == 2
            store.status("stopped")
            assert take(events, "run", 2)[-1].data["status"] in ("running", "stopped")


def test_a_stream_cut_anywhere_goes_on_without_loss_or_repeats(service: Dashboard, shared_place: Place) -> None:
    """A client that reconnects after every third event, while the run writes rows of all kinds in odd batches."""
    with following(service, shared_place, "cut") as store:
        marker = service.api("runs/cut")["marker"]
        total = 40

        def write() -> None:
            for i in range(1, total + 1):
                store.metrics(i, {"loss": i})
                store.event("info", "step", f"step {i}")
                if i % 7 == 0:
                    time.sleep(0.3)

        thread = threading.Thread(target=write)
        thread.start()
        seen: list[Received] = []
        last = marker
        while len([event for event in seen if event.name in ("metrics", "event")]) < 2 * total:
            with stream(service, run="cut", last_event_id=last) as events:
                for event, _ in zip(events, range(3), strict=False):
                    assert event.id is not None
                    last = event.id
                    seen.append(event)
        thread.join()
        assert [event.data["iteration"] for event in seen if event.name == "metrics"] == list(range(1, total + 1))
        assert [event.data["text"] for event in seen if event.name == "event"] == [
            f"step {i}" for i in range(1, total + 1)
        ]
        # The control: without the id the same events come again, or are not told at all.
        with stream(service, run="cut", since=marker) as events:
            assert take(events, "metrics", 1)[0].data["iteration"] == 1
        with stream(service, run="cut") as events:
            assert next(events).name == "run"


@pytest.mark.slow
def test_a_restarted_service_goes_on_where_the_client_was(place: Place) -> None:
    with writer(place, "one") as store:
        store.metrics(1, {"loss": 1.0})
        assert store.flush(10)
        with dashboard(place) as service:
            shown(service, "one")
            marker = service.api("runs/one")["marker"]
            service.process.kill()
        store.metrics(2, {"loss": 1.0})
        assert store.flush(10)
        with dashboard(place) as service:
            shown(service, "one")
            with stream(service, run="one", last_event_id=marker) as events:
                assert take(events, "metrics", 1)[0].data["iteration"] == 2


def test_a_resumed_run_takes_back_what_it_repeats(service: Dashboard, shared_place: Place) -> None:
    with following(service, shared_place, "resumed") as store:
        for i in range(1, 6):
            store.metrics(i, {"loss": i})
        assert store.flush(10)
    marker = service.api("runs/resumed")["marker"]
    with stream(service, run="resumed", since=marker) as events, writer(shared_place, "resumed") as store:
        store.truncate_after(3)
        store.metrics(4, {"loss": -4})
        assert take(events, "truncated", 1)[0].data == {"after": 3}
        assert take(events, "metrics", 1)[0].data["values"] == {"loss": -4}


def test_a_run_made_anew_under_the_same_name_resets_its_clients(service: Dashboard, shared_place: Place) -> None:
    write_run(shared_place, "again")
    shown(service, "again")
    marker = service.api("runs/again")["marker"]
    shared_place.remove("again")
    write_run(shared_place, "again", iterations=2)
    eventually(lambda: service.get("/api/v1/runs/again").json().get("iteration") == 2)
    with stream(service, run="again", last_event_id=marker) as events:
        assert next(events).name == "reset"


def test_all_runs_are_followed_by_one_stream(service: Dashboard, shared_place: Place) -> None:
    write_run(shared_place, "old")
    eventually(lambda: "old" in [run["id"] for run in service.api("runs")["items"]])
    with stream(service) as events:
        first = [next(events).data["id"] for _ in service.api("runs")["items"]]
        assert {"old", "quiet"} <= set(first) and "new" not in first
        with writer(shared_place, "new") as store:
            store.metrics(3, {"reward/mean": 0.25})
            while (run := take(events, "run", 1)[0].data)["id"] != "new" or run["iteration"] != 3:
                pass
            assert run["reward"] == 0.25
        shared_place.remove("old")
        assert take(events, "removed", 1)[0].data == {"id": "old"}


@pytest.mark.slow
def test_a_store_that_goes_for_a_while_is_said_and_nothing_is_lost(tmp_path: Path, postgresql: Server) -> None:
    """PostgreSQL: its tables are locked, then its connections cut, as a restart does. Files: test_dashboard_health."""
    with postgresql.database() as url:
        place, database = Place(tmp_path, url), url.rsplit("/", 1)[1]
        with (
            dashboard(place) as service,
            following(service, place, "one") as store,
            stream(service, run="one") as events,
        ):
            assert next(events).name == "run"
            with postgresql.connect(database) as other, other.transaction():
                other.execute("LOCK TABLE runs IN ACCESS EXCLUSIVE MODE")
                store.metrics(1, {"loss": 1.0})
                assert "lock timeout" in take(events, "unreadable", 1)[0].data["reason"]
                assert "lock timeout" in is_problem(service.get("/api/v1/runs/one"), 503)["detail"]
            assert take(events, "metrics", 1)[0].data["iteration"] == 1
            postgresql.disconnect(database)
            store.metrics(2, {"loss": 2.0})
            assert take(events, "metrics", 1)[0].data["values"] == {"loss": 2.0}
            assert service.get("/api/v1/runs/one").status_code == 200


@pytest.mark.parametrize(
    "last", ["garbage", "1-2-3", "zz-1", "ab-999999999999999999999", "ab-1.9.x", "\xff\xfe", "x" * 2000]
)
def test_a_wrong_id_is_refused(service: Dashboard, last: str) -> None:
    headers = {"Last-Event-ID": last.encode("latin-1")}
    is_problem(service.client.get("/api/v1/stream", params={"run": "quiet"}, headers=headers), 422)


def test_an_id_of_the_future_or_of_another_run_starts_anew(service: Dashboard) -> None:
    epoch, _, _ = service.api("runs/quiet")["marker"].partition("-")
    for last in (f"{epoch}-99999", "abcdef-3"):
        with stream(service, run="quiet", last_event_id=last) as events:
            assert [next(events).name for _ in range(2)] == ["reset", "run"]


def test_an_unknown_run_is_404_and_no_stream(service: Dashboard) -> None:
    is_problem(service.get("/api/v1/stream", run="none"), 404)


@pytest.mark.parametrize("key", [Key("ab", 3), Key("ab", 3, 3, "worker/1 %\u00e9.~-"), Key("0", 0)])
def test_ids_name_their_place(key: Key) -> None:
    assert Key.parse(str(key)) == key


def test_places_are_ordered() -> None:
    places = [Key("a", 1), Key("a", 2, 0), Key("a", 2, 1, "5"), Key("a", 2, 2, "1"), Key("a", 2), Key("a", 3, 1)]
    assert sorted(reversed(places)) == places


# ---- slow clients, dying processes


@pytest.mark.slow
def test_a_client_that_reads_nothing_costs_no_memory_and_stops_nobody(place: Place) -> None:
    with dashboard(place) as service, following(service, place, "one") as store:
        sleepers = []
        for _ in range(20):
            sleeper = socket.create_connection(("127.0.0.1", service.port))
            sleeper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sleeper.sendall(b"GET /api/v1/stream?run=one HTTP/1.1\r\nHost: localhost\r\n\r\n")
            sleepers.append(sleeper)
        before = resident_bytes(service.process.pid)
        texts = [f"{i} " + "x" * 2_000 for i in range(3000)]  # 6 MB, three times what the ring holds
        last, seen = service.api("runs/one")["marker"], []
        for text in texts:
            store.event("info", "large", text)
        while len(seen) < len(texts):  # the stream may drop us too; it then goes on where we were
            with stream(service, run="one", last_event_id=last) as events:
                for event in events:
                    last = event.id or last
                    seen += [event.data["text"]] if event.name == "event" else []
                    if len(seen) == len(texts):
                        break
        assert seen == texts
        assert resident_bytes(service.process.pid) - before < 60 << 20
        for sleeper in sleepers:
            sleeper.close()


@pytest.mark.slow
def test_neither_kills_the_other(place: Place) -> None:
    """kill -9 of the service during a run, then of the run during streaming."""
    code = (
        "import sys, time\n"
        "from services.store.writer import StoreWriter\n"
        "store = StoreWriter(sys.argv[1], 'one', total_iterations=10**6)\n"
        "i = 0\n"
        "while True:\n"
        "    i += 1; store.metrics(i, {'loss': 1.0 / i}); time.sleep(0.02); print(i, store.lost_rows, flush=True)\n"
    )
    (place.folder / "one").mkdir()
    command = [sys.executable, "-c", code, place.url("one")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=clean_environment()) as run:
        assert run.stdout is not None

        def told() -> tuple[int, int]:
            line = run.stdout.readline().split()  # type: ignore[union-attr]
            return int(line[0]), int(line[1])

        told()
        with dashboard(place) as service:
            shown(service, "one")
            with stream(service, run="one") as events:
                take(events, "metrics", 3)
                os.kill(service.process.pid, signal.SIGKILL)
        service.process.wait(timeout=10)
        before = told()[0]
        for _ in range(100):
            iteration, lost = told()
        assert iteration >= before + 99 and lost == 0
        with dashboard(place) as service:
            shown(service, "one")
            with stream(service, run="one") as events:
                take(events, "metrics", 3)
                run.kill()
                run.wait(timeout=10)
                assert service.get("/healthz").status_code == 200
            newest = service.api("runs/one")["iteration"]
            assert service.api("runs/one/metrics", name="loss")["series"]["loss"]["iteration"][-1] == newest
            assert newest >= iteration - 100


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
