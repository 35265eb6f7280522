"""The REST API over real stores, and what it says to garbage."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from services.dashboard.app import create_app
from services.dashboard.settings import Settings
from tests.support.dashboards import Dashboard, Place, dashboard, is_problem, write_run, writer

HTML = "<img src=x onerror=alert(1)>"
SQL = "x'; DROP TABLE runs; --"


@pytest.fixture(scope="module")
def service(shared_place: Place) -> Iterator[Dashboard]:
    place = shared_place
    write_run(place, "one", iterations=6)
    changed = {"run": {"name": "two", "seed": 1}, "learner": {"lr": 1e-3}, "extra": 1}
    write_run(place, "two", iterations=3, config=changed)
    write_run(place, HTML, iterations=2)
    write_run(place, SQL, iterations=1)
    with writer(place, "countdown-1", task="countdown") as store:  # never ended, and silent by now
        store.metrics(1, {"reward/mean": float("nan"), "loss": float("inf"), "solve_rate": 0.5})
    place.execute("countdown-1", "UPDATE runs SET heartbeat = heartbeat - 3600 WHERE id = 'countdown-1'")
    with writer(place, "long") as store:
        for iteration in range(1, 601):
            store.metrics(iteration, {"loss": 100.0 if iteration == 377 else 0.5})
        store.status("stopped")
        assert store.flush(60)
    with dashboard(place) as service:
        yield service


# ---- runs


@pytest.mark.slow
def test_list_shows_runs_newest_first_with_their_figures(service: Dashboard, shared_place: Place) -> None:
    answer = service.api("runs")
    assert [run["id"] for run in answer["items"]] == ["long", "countdown-1", SQL, HTML, "two", "one"]
    assert answer["total"] == 6 and answer["folder"] == ("" if shared_place.store else str(shared_place.folder))
    one = answer["items"][-1]
    assert (one["status"], one["iteration"], one["task"], one["method"]) == ("finished", 6, "sudoku", "agrpo")
    assert one["reward"] == pytest.approx(0.06) and one["tokens_per_s"] == 1006 and one["workers"] == 2


def test_a_silent_run_is_lost_and_its_nan_is_said(service: Dashboard) -> None:
    (run,) = service.api("runs", task="countdown")["items"]
    assert run["status"] == "lost" and run["reward"] == "NaN"
    assert service.api("runs/countdown-1/metrics", name="loss")["series"]["loss"]["value"] == ["Infinity"]


def test_filters_sorting_and_pages_agree(service: Dashboard) -> None:
    assert [run["id"] for run in service.api("runs", q="TWO")["items"]] == ["two"]
    assert [run["id"] for run in service.api("runs", status=["finished", "lost"], sort="id")["items"]] == sorted(
        ["one", "two", "countdown-1", HTML, SQL]
    )
    assert service.api("runs", q=SQL)["total"] == 1 and service.api("runs", q="' OR 1=1 --")["total"] == 0
    best = [run["id"] for run in service.api("runs", sort="-reward")["items"]]
    assert best[0] == "one" and best[-1] == "countdown-1"  # what has no number comes last
    seen, cursor = [], None
    while True:
        page = service.api("runs", limit=2, sort="-reward", **({"cursor": cursor} if cursor else {}))
        seen += [run["id"] for run in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == best


def test_a_run_tells_its_newest_figures_and_its_end(service: Dashboard) -> None:
    run = service.api("runs/one")
    assert run["latest"]["reward/mean"] == {"iteration": 6, "value": pytest.approx(0.06)}
    assert run["summary"] == {"iterations": 6} and run["marker"]


def test_series_of_several_names(service: Dashboard) -> None:
    series = service.api("runs/one/metrics", name=["loss", "solve_rate", "none"])["series"]
    assert series["loss"]["iteration"] == [1, 2, 3, 4, 5, 6] and series["none"]["iteration"] == []
    assert series["solve_rate"]["value"] == pytest.approx([i / 200 for i in range(1, 7)])
    cut = service.api("runs/one/metrics", name="loss", first=2, last=4)["series"]["loss"]
    assert cut["iteration"] == [2, 3, 4]
    assert "ledger/ready" in service.api("runs/one/metric-names")["names"]


def test_a_long_series_is_thinned_and_keeps_its_extremes(service: Dashboard) -> None:
    loss = service.api("runs/long/metrics", name="loss", points=50)["series"]["loss"]
    assert 20 <= len(loss["iteration"]) <= 50 and max(loss["high"]) == 100.0
    assert sum(loss["count"]) == 600 and loss["iteration"] == sorted(loss["iteration"])


def test_events_workers_checkpoints_ledger_samples(service: Dashboard) -> None:
    newest = service.api("runs/one/events")["items"]
    assert [event["kind"] for event in newest] == ["log_ratio", "start"]
    first = service.api("runs/one/events", limit=1)
    rest = service.api("runs/one/events", limit=1, cursor=first["next_cursor"])
    assert [*first["items"], *rest["items"]] == newest and rest["next_cursor"] is None
    assert [event["kind"] for event in service.api("runs/one/events", order="oldest")["items"]] == [
        "start",
        "log_ratio",
    ]
    assert len(service.api("runs/one/events", level="warning")["items"]) == 1
    assert [worker["worker_id"] for worker in service.api("runs/one/workers")["items"]] == ["actor-0", "learner-0"]
    assert service.api("runs/one/checkpoints")["items"][0]["iteration"] == 6
    ledger = service.api("runs/one/ledger")
    assert (ledger["issued"], ledger["pending"], ledger["consumed"], ledger["balanced"]) == (28, 3, 24, True)
    assert ledger["recoveries"] == {"expired_leases": 2}
    page = service.api("runs/one/samples", correct=True, limit=2)
    assert [sample["iteration"] for sample in page["items"]] == [6, 4] and page["next_cursor"]
    last = service.api("runs/one/samples", correct=True, limit=2, cursor=page["next_cursor"])
    assert [sample["iteration"] for sample in last["items"]] == [2] and last["next_cursor"] is None
    assert "trajectory" not in page["items"][0]


def test_settings_and_their_difference(service: Dashboard) -> None:
    assert service.api("runs/two/config")["config"]["extra"] == 1
    found = service.api("runs/one/config-diff", other="two")
    assert found["differences"] == [
        {"key": "extra", "value": None, "other": 1, "only_in": "two"},
        {"key": "run.name", "value": "one", "other": "two", "only_in": None},
        {"key": "run.seed", "value": 0, "other": 1, "only_in": None},
    ]
    assert found["equal"] == 1
    assert service.api("runs/one/config-diff", other="one")["differences"] == []
    is_problem(service.get("/api/v1/runs/one/config-diff", other="none"), 404)


# ---- garbage


@pytest.mark.parametrize("name", [HTML, SQL])
def test_hostile_names_are_names(service: Dashboard, name: str) -> None:
    run = service.client.get(f"/api/v1/runs/{name.replace('/', '%2F')}")
    assert run.status_code == 200 and run.json()["id"] == name
    assert run.headers["content-type"] == "application/json"
    assert len(service.api("runs")["items"]) == 6  # nothing was dropped


@pytest.mark.parametrize(
    "path",
    [
        "/nope",
        "/api/v1",
        "/api/v1/runs/",
        "/api/v1/runs/none",
        "/api/v1/runs/none/metrics?name=loss",
        "/api/v1/runs/..",
        "/api/v1/runs/../one",
        "/api/v1/runs/%2e%2e%2fone/config",
        "/api/v1/runs/..%2f..%2fetc%2fpasswd",
        "/api/v1/runs/one%00/config",
        "/api/v1/runs/%ff%fe/config",
        "/api/v1/runs/one/nope",
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2f..%2f..%2fpyproject.toml",
        "/static//etc/passwd",
        "/static/%00",
        "/static/",
    ],
)
def test_paths_that_lead_nowhere_are_404(service: Dashboard, path: str) -> None:
    raw = raw_request(service, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    head, _, body = raw.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404"), head
    assert json.loads(body)["status"] == 404 and b"root:" not in body and b"[build-system]" not in body


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=501",
        "limit=-1",
        "limit=1e9",
        "limit=99999999999999999999999999",
        "limit=",
        "sort=nope",
        "sort=id;drop",
        "cursor=nope",
        "cursor=" + "x" * 300,
        "q=" + "x" * 200,
        "status=" + "&status=".join("x" * 21),
        "status=bogus",
        "foo=1",
        "format=xml",
    ],
)
def test_wrong_values_are_422(service: Dashboard, query: str) -> None:
    document = is_problem(service.client.get(f"/api/v1/runs?{query}"), 422)
    assert document["detail"]


@pytest.mark.parametrize(
    "path",
    [
        "metrics",
        "metrics?name=",
        "metrics?name=a&points=1",
        "metrics?name=a&points=2001",
        "metrics?name=a&first=-1",
        "metrics?name=a&first=5&last=4",
        "metrics?name=a&last=99999999999",
        "metrics?" + "&".join(f"name=m{i}" for i in range(51)),
        "events?cursor=x",
        "events?cursor=99999999999999999999",
        "events?level=fatal",
        "samples?cursor=garbage",
        "samples?correct=maybe",
        "config-diff",
        "workers?foo=1",
    ],
)
def test_wrong_values_of_a_run_are_422(service: Dashboard, path: str) -> None:
    is_problem(service.client.get(f"/api/v1/runs/one/{path}"), 422)


def test_other_methods_are_405_and_say_which_are_there(service: Dashboard) -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND"):
        answer = service.client.request(method, "/api/v1/runs")
        assert "GET" in answer.headers["allow"]
        is_problem(answer, 405)


def test_bodies_headers_and_bytes_out_of_bounds(service: Dashboard) -> None:
    is_problem(service.client.post("/api/v1/runs", content=b"x" * (2 << 20)), 413)
    chunks = (b"x" * 65536 for _ in range(32))  # no Content-Length
    assert service.client.post("/api/v1/runs", content=chunks).status_code in (405, 413)
    huge = raw_request(service, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n")
    assert huge.startswith(b"HTTP/1.1 4") or huge == b""
    assert raw_request(service, b"\xff\xfe\x00garbage\r\n\r\n").startswith(b"HTTP/1.1 400")
    odd = b"GET /api/v1/runs?q=%ff%fe&task=%00 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert raw_request(service, odd).startswith(b"HTTP/1.1 200")
    assert service.get("/healthz").status_code == 200  # and it is still there


def test_our_own_fault_is_a_500_without_its_insides(tmp_path: Path) -> None:
    app = create_app(Settings(tmp_path))

    @app.get("/fault")
    def fault() -> None:
        raise RuntimeError("the secret insides")

    app.router.routes.insert(0, app.router.routes.pop())
    with TestClient(app, base_url="http://localhost") as client:
        answer = client.get("/fault")
    assert answer.status_code == 500 and answer.headers["content-type"] == "application/problem+json"
    assert "RuntimeError" in answer.json()["detail"] and "insides" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"


def raw_request(service: Dashboard, data: bytes) -> bytes:
    """The bytes of the answer to these bytes."""
    import socket

    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as connection:
        answer = b""
        try:
            connection.sendall(data)
            while chunk := connection.recv(65536):
                answer += chunk
        except ConnectionError:  # it had enough before all was sent
            pass
        return answer


# ---- the description


def test_description_is_complete(service: Dashboard) -> None:
    document = service.get("/openapi.json").json()
    operations = [
        (method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if method != "parameters"
    ]
    ids = [operation["operationId"] for _, _, operation in operations]
    assert len(ids) == len(set(ids)) >= 15
    for method, path, operation in operations:
        where = f"{method} {path}"
        assert operation["summary"] and operation["description"] and operation["tags"], where
        told = operation["responses"].keys()
        assert {"400", "500"} <= told and told & {"200", "202", "204"}, where
        for status, response in operation["responses"].items():
            assert response["description"], where
            if int(status) >= 400:
                assert list(response["content"]) == ["application/problem+json"], f"{where} {status}"
        for parameter in operation.get("parameters", []):
            assert parameter["in"] == "path" or parameter.get("description"), f"{where} {parameter['name']}"
    assert "HTTPValidationError" not in json.dumps(document)
