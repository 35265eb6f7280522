"""A folder of hundreds of runs as a search over settings leaves it: each setting on three seeds, some of them still
running, failed or named by hand. Figures and folders are small; what is read of them is what a real run leaves.

    python -m tests.support.many_runs FOLDER [--runs 200]
"""

import argparse
import contextlib
import copy
import json
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from services.store.starts import BEGUN
from tests.support import realistic_runs
from tests.support.dashboards import Dashboard, dashboard, eventually

SEEDS = 3
LRS = (3e-4, 1e-3, 3e-3, 1e-2)
STEPS = (2, 4, 8)
METHODS = ("agrpo", "wd1", "espo")
ITERATIONS = 30
STATUSES = ("finished", "finished", "finished", "stopped", "failed", "running")


def settings_of(number: int) -> dict[str, Any]:
    """The learning rate, views and method of the number-th run, and its seed; settings come back after ``SEEDS``."""
    setting = number // SEEDS
    return {
        "learner.lr": LRS[setting % len(LRS)],
        "objective.k": STEPS[setting // len(LRS) % len(STEPS)],
        "objective.type": METHODS[setting // (len(LRS) * len(STEPS)) % len(METHODS)],
        "rollout.group_size": 4 + 4 * (setting // (len(LRS) * len(STEPS) * len(METHODS))),
        "run.seed": number % SEEDS,
    }


def name_of(number: int) -> str:
    return f"20261128-12{number // 60:02d}{number % 60:02d}-sudoku-search-over-rates-and-views-{number:04x}"


def fill(folder: Path, runs: int = 200) -> None:
    """One store is written by a run's own writer, and copied and changed for the others: hundreds of writers would take
    minutes."""
    template = folder / ".template"
    with realistic_runs.open_store(folder, template.name) as store:
        realistic_runs.fill(store, ITERATIONS)
        assert store.flush(30)
    for number in range(runs):
        _copy(template, folder / name_of(number), number)
    shutil.rmtree(template)


@contextlib.contextmanager
def served(folder: Path, runs: int) -> Iterator[Dashboard]:
    """A dashboard that lists so many runs, which are made in the new folder."""
    folder.mkdir()
    fill(folder, runs)
    with dashboard(folder) as found:
        found.client.timeout = httpx.Timeout(300)  # the first answer waits for all stores to be read
        eventually(lambda: found.get("/api/v1/runs").is_success and found.api("runs", limit=1)["total"] == runs, 300)
        yield found


def comparison_of(runs: int) -> str:
    """The page that compares the first of them."""
    return "/compare?" + "&".join(f"run={name_of(number)}" for number in range(runs))


def _copy(template: Path, place: Path, number: int) -> None:
    place.mkdir()
    config = copy.deepcopy(realistic_runs.CONFIG)
    told = settings_of(number)
    for key, value in told.items():
        section, name = key.split(".")
        config[section][name] = value
    recipe = {"run": {"iterations": 200}, "learner": {"lr": 1e-3}}
    command = " ".join(["python -m learner.main recipe=sudoku", *(f"{key}={value}" for key, value in told.items())])
    about = json.dumps({"recipe": "sudoku", "recipe_settings": recipe})
    shutil.copy(template / "store.sqlite", place / "store.sqlite")
    status, began = STATUSES[number % len(STATUSES)], time.time() - 86400 + 60 * number
    with sqlite3.connect(place / "store.sqlite") as store:
        store.execute("PRAGMA foreign_keys = OFF")
        store.execute("PRAGMA synchronous = OFF")
        for (table,) in store.execute(
            "SELECT name FROM sqlite_master WHERE sql LIKE '%run_id%' AND type = 'table'"
        ).fetchall():
            store.execute(f"UPDATE {table} SET run_id = ?", (place.name,))
        lift = 0.1 * (number // SEEDS % 5) - 0.02 * (number % SEEDS)
        store.execute(
            "INSERT INTO events (run_id, time, level, kind, text, data, revision) VALUES (?, 0, 'info', ?, ?, ?, 0)",
            (place.name, BEGUN, command, about),
        )
        for table in ("metrics", "latest_metrics"):
            store.execute(f"UPDATE {table} SET value = value * 0.5 + ? WHERE name LIKE 'eval/%'", (lift,))
        store.execute(
            "UPDATE runs SET id = ?, objective = ?, status = ?, created = ?, ended = ?, heartbeat = ?, config = ?",
            (
                place.name,
                told["objective.type"],
                status,
                began,
                began + 600,
                time.time() if status == "running" else began + 600,
                json.dumps(config),
            ),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Hundreds of small runs, for the list and its search")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=200)
    asked = parser.parse_args()
    fill(asked.folder, asked.runs)


if __name__ == "__main__":
    main()
