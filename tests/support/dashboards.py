"""A dashboard as a user starts it, a process of its own, and run stores for it to show."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa

from services.store import schema
from services.store.writer import StoreWriter

START_LIMIT_S = 60.0
ANSWER_LIMIT_S = 30.0


@dataclass(frozen=True)
class Place:
    """Where runs lie: in a folder of run directories, each with a store of its own, or in one store by URL. The folder
    keeps the dashboard's own files either way."""

    folder: Path
    store: str | None = None

    def url(self, name: str) -> str:
        """Of the store that has the run, or is to have it."""
        return self.store or schema.sqlite_url(self.folder / name / "store.sqlite")

    def execute(self, name: str, statement: str) -> None:
        """Do this to the store of a run."""
        engine = schema.open_engine(self.url(name), create=False)
        with engine.begin() as connection:
            connection.execute(sa.text(statement))
        engine.dispose()

    def remove(self, name: str) -> None:
        """Delete a run."""
        if self.store is None:
            shutil.rmtree(self.folder / name)
        else:
            self.execute(name, f"DELETE FROM runs WHERE id = '{name}'")


class Dashboard:
    """A service that is up. ``client`` speaks to it."""

    def __init__(self, process: subprocess.Popen[str], url: str, runs: Path, log: Path) -> None:
        self.process, self.url, self.runs, self._log = process, url, runs, log
        self.client = httpx.Client(base_url=url, timeout=ANSWER_LIMIT_S, trust_env=False)

    @property
    def port(self) -> int:
        return httpx.URL(self.url).port or 80

    @property
    def token(self) -> str:
        return (self.runs / ".dashboard-token").read_text().strip()

    def log(self) -> str:
        """What it wrote to standard error so far."""
        return self._log.read_text(errors="replace")

    def get(self, path: str, **query: Any) -> httpx.Response:
        return self.client.get(path, params=query)

    def api(self, path: str, **query: Any) -> Any:
        """The JSON answer of /api/v1/PATH, which must be there."""
        answer = self.get(f"/api/v1/{path}", **query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def owner_api(self, path: str) -> Any:
        """As ``api``, with the token."""
        answer = self.client.get(f"/api/v1/{path}", headers={"Authorization": f"Bearer {self.token}"})
        assert answer.status_code == 200, answer.text
        return answer.json()


@contextlib.contextmanager
def dashboard(place: Path | Place, *options: str, **environment: str) -> Iterator[Dashboard]:
    """A service for these runs (a path: a folder of run directories) on a free port, until the end of the block."""
    if isinstance(place, Place) and place.store is not None:
        options = ("--store", place.store, *options)
    runs = _place(place).folder
    log = runs.parent / f"{runs.name}-dashboard-{time.monotonic_ns()}.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.dashboard", "--runs", str(runs), "--port", "0", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=clean_environment() | environment,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("dashboard: "), log.read_text()
        service = Dashboard(process, line.split()[1], runs, log)
        with service.client:
            yield service
    finally:
        process.kill()
        process.wait(timeout=30)
        assert process.stdout is not None
        process.stdout.close()


def refused(*options: str, **environment: str) -> tuple[int, str]:
    """Exit status and standard error of a service that must not start."""
    answer = subprocess.run(
        [sys.executable, "-m", "services.dashboard", *options],
        capture_output=True,
        text=True,
        timeout=START_LIMIT_S,
        env=clean_environment() | environment,
    )
    return answer.returncode, answer.stderr


def clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("UNMASK_")}


@contextlib.contextmanager
def writer(runs: Path | Place, name: str, **about: Any) -> Iterator[StoreWriter]:
    """The store of the run ``name``, being written."""
    place = _place(runs)
    if place.store is None:
        (place.folder / name).mkdir(parents=True, exist_ok=True)
    about = {"task": "sudoku", "objective": "agrpo", "total_iterations": 100} | about
    with StoreWriter(place.url(name), name, **about) as store:
        yield store


def write_run(runs: Path | Place, name: str, *, iterations: int = 5, config: dict[str, Any] | None = None) -> None:
    """A run that has finished, with something of everything."""
    with writer(runs, name, config=config or {"run": {"name": name, "seed": 0}, "learner": {"lr": 1e-3}}) as store:
        store.event("info", "start", f"run {name} starts")
        for iteration in range(1, iterations + 1):
            store.metrics(iteration, figures(iteration))
            store.sample(
                iteration,
                kind="train",
                group_id=iteration,
                row=0,
                problem_id=f"p{iteration}",
                prompt="Puzzle: 0321003004002100",
                completion="<answer>4321123434122143</answer>",
                correct=iteration % 2 == 0,
                rewards={"format": 0.5, "exact": float(iteration % 2 == 0)},
                trajectory=b"",
            )
        store.worker("actor-0", role="rollout", status="ready", node="here", pid=17, policy_version=iterations)
        store.worker("learner-0", role="learner", status="ready", node="here", pid=18, policy_version=iterations)
        store.checkpoint(iterations, f"/somewhere/iteration-{iterations:06d}", {"adapter_digest": "abc"})
        store.event("warning", "log_ratio", "learner and rollout disagree", {"by": 0.1})
        store.status("finished", {"iterations": iterations})
        assert store.flush(20)


def figures(iteration: int) -> dict[str, float]:
    """Metrics of an iteration; four groups each."""
    return {
        "loss": 1.0 / iteration,
        "reward/mean": iteration / 100,
        "solve_rate": iteration / 200,
        "machine/tokens_per_s": 1000.0 + iteration,
        "staleness/mean": 0.5,
        "staleness/max": 1.0,
        "time/update_s": 0.25,
        "time/iteration_s": 1.0,
        "ledger/issued": 4.0 * iteration + 4,
        "ledger/pending": 3.0,
        "ledger/leased": 1.0,
        "ledger/ready": 0.0,
        "ledger/consumed": 4.0 * iteration,
        "ledger/dropped": 0.0,
        "machine/ledger_expired_leases": 2.0,
    }


def is_problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document = answer.json()
    assert document["status"] == status and document["title"] and document["detail"] and document["type"]
    return document


def eventually(condition: Any, limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"it did not come true within {limit_s:g} s"
        time.sleep(0.1)


def _place(runs: Path | Place) -> Place:
    return runs if isinstance(runs, Place) else Place(runs)
