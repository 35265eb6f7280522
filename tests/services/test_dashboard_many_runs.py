"""A folder of 200 runs: how they are found, grouped, annotated and exported; the API's side."""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from services.dashboard.annotations import Annotations
from services.dashboard.settings import Settings
from tests.support import many_runs
from tests.support.dashboards import Dashboard, is_problem

RUNS = 200


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    with many_runs.served(tmp_path_factory.mktemp("many") / "runs", RUNS) as found:
        yield found


def names(service: Dashboard, **query: Any) -> list[str]:
    return [run["id"] for run in service.api("runs", limit=500, **query)["items"]]


def annotate(service: Dashboard, name: str, **told: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {service.token}"}
    return service.client.patch(f"/api/v1/runs/{name}/annotation", json=told, headers=headers)


@pytest.mark.slow
def test_runs_are_found_by_setting(service: Dashboard) -> None:
    wanted = {many_runs.name_of(n) for n in range(RUNS) if many_runs.settings_of(n)["learner.lr"] == 0.003}
    assert set(names(service, q="lr=0.003")) == set(names(service, q="learner.lr=3e-3 sudoku")) == wanted
    seeds = {many_runs.name_of(n) for n in range(RUNS) if n % many_runs.SEEDS == 2}
    assert set(names(service, q="seed=2")) == seeds, "of run.seed, not of the base's own seed"
    assert set(names(service, q="seed=2 lr=0.003")) == wanted & seeds
    assert names(service, q="lr=0.0031") == names(service, q="lr=") == names(service, q="=0.003") == []


def test_a_run_tells_its_seed_group_recipe_and_best(service: Dashboard) -> None:
    runs = {run["id"]: run for run in service.api("runs", limit=500)["items"]}
    first = runs[many_runs.name_of(0)]
    assert first["recipe"] == "sudoku" and first["seed"] == 0
    assert first["differs"] == {
        "learner.lr": 0.0003,
        "rollout.group_size": 4,
        "run.seed": 0,
        "objective.k": 2,
        "objective.type": "agrpo",
    }, "what the recipe says as well is left out"
    groups: dict[str, set[int]] = {}
    for number in range(RUNS):
        groups.setdefault(runs[many_runs.name_of(number)]["group"], set()).add(number // many_runs.SEEDS)
    assert all(len(settings) == 1 for settings in groups.values()) and len(groups) == -(-RUNS // many_runs.SEEDS)
    series = service.api(f"runs/{first['id']}/metrics", name="eval/m/solve_rate")["series"]["eval/m/solve_rate"]
    best = max(zip(series["value"], series["iteration"], strict=True))
    assert (first["held_out_best"], first["held_out_best_iteration"]) == best
    assert first["held_out"] == series["value"][-1]
    detail = service.api(f"runs/{first['id']}")
    assert {name: detail[name] for name in first if name != "heartbeat"} == {
        name: value for name, value in first.items() if name != "heartbeat"
    }
    ordered = [run["held_out_best"] for run in service.api("runs", limit=500, sort="-held_out_best")["items"]]
    assert ordered == sorted(ordered, reverse=True)


def test_what_is_written_about_a_run_needs_the_token_and_stays(service: Dashboard) -> None:
    name = many_runs.name_of(7)
    store = service.runs / name / "store.sqlite"
    written = store.stat().st_mtime_ns
    refused = service.client.patch(f"/api/v1/runs/{name}/annotation", json={"note": "mine"})
    is_problem(refused, 401)
    assert str(service.runs / ".dashboard-token") in refused.json()["detail"]
    assert annotate(service, name, tags=["paper", "best"], note="keep <b>this</b>").status_code == 200
    assert annotate(service, name, archived=True).json() == {
        "run_id": name,
        "tags": ["paper", "best"],
        "note": "keep <b>this</b>",
        "archived": True,
        "acknowledged": 0,
    }, "what is not in a request stays"
    for body in ({"tags": ["two words"]}, {"tags": ["x"] * 21}, {"nothing": 1}, {"note": None}):
        is_problem(annotate(service, name, **body), 422)
    is_problem(annotate(service, "none", note="x"), 404)
    assert name not in names(service), "at once: whoever writes reads what was written"
    answer = service.api("runs", limit=500, archived=True, q="paper")
    assert [(run["id"], run["archived"], run["note"]) for run in answer["items"]] == [(name, True, "keep <b>this</b>")]
    assert service.api("runs", q="paper")["total"] == 0 and service.api("runs", q="paper")["archived"] == 1
    assert service.api(f"runs/{name}")["tags"] == ["paper", "best"]
    assert store.stat().st_mtime_ns == written, "the run's store is left alone"
    assert Annotations(Settings(service.runs)).all()[name]["archived"] is True, "and another dashboard reads it"
    assert annotate(service, name, archived=False, tags=[], note="").status_code == 200
    assert name in names(service)


def test_tables_come_as_csv(service: Dashboard) -> None:
    name = many_runs.name_of(0)
    answer = service.get("/api/v1/runs", format="csv", limit=500, sort="id")
    assert answer.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert len(rows) == RUNS and rows[0]["id"] == name and rows[0]["differs.learner.lr"] == "0.0003"
    path = f"/api/v1/runs/{name}/metrics"
    asked = {"name": ["loss", "eval/m/solve_rate"]}
    told = service.client.get(path, params=asked, headers={"Accept": "text/csv"})
    assert told.text == service.client.get(path, params={**asked, "format": "csv"}).text
    assert told.headers["content-disposition"] == f'attachment; filename="{name}_metrics.csv"'
    series = service.client.get(path, params=asked).json()["series"]
    points = list(csv.DictReader(io.StringIO(told.text)))
    assert [float(row["value"]) for row in points if row["metric"] == "loss"] == series["loss"]["value"]
    for part in ("events", "samples", "workers", "checkpoints"):
        whole = service.api(f"runs/{name}/{part}")["items"]
        table = list(csv.DictReader(io.StringIO(service.get(f"/api/v1/runs/{name}/{part}", format="csv").text)))
        assert len(table) == len(whole), part
    settings = list(csv.DictReader(io.StringIO(service.get(f"/api/v1/runs/{name}/config", format="csv").text)))
    assert {"key": "learner.lr", "value": "0.0003"} in settings
    assert json.loads(service.client.get(path, params=asked, headers={"Accept": "*/*"}).text), "JSON unless asked"
    is_problem(service.get("/api/v1/runs/none/events", format="csv"), 404)


def test_token_icon_page_of_the_api_and_settings(service: Dashboard) -> None:
    for token, status in ((service.token, 204), ("x" * 40, 401)):
        answer = service.client.get("/api/v1/token", headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == status
    is_problem(service.get("/api/v1/token"), 401)
    assert service.get("/favicon.ico").headers["content-type"] == "image/svg+xml"
    assert service.get("/docs").headers["location"] == "./#/api"
    settings = {each["key"]: each for each in service.api("settings", recipe="smoke")["items"]}
    assert settings["learner.lr"]["about"] and settings["learner.lr"]["type"] == "number"
    assert "wd1" in settings["objective.type"]["choices"]
    tuning = {each["key"]: each for each in service.api("settings", recipe="sft_d1_s1k")["items"]}
    assert tuning["sft.epochs"]["about"] and tuning["sft.epochs"]["value"] == 20 and "objective.type" not in tuning
    is_problem(service.get("/api/v1/settings", recipe="nope"), 404)
