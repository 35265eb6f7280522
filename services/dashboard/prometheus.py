"""Figures for Prometheus. Labels are bounded: only the newest runs have series of their own, and states that nobody
foresaw are called other.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from services.dashboard.connections import REASONS
from services.dashboard.index import Known, RunIndex
from services.dashboard.models import STATES
from services.store.actions import LIVE_STATUSES

MAX_RUNS = 50
STATUSES = ("running", "paused", "finished", "stopped", "failed", "lost", "unreadable")
WORKER_STATUSES = ("starting", "idle", "ready", "busy", "retired")
ROLES = ("rollout", "learner")

FIGURES = {
    "reward_mean": ("reward/mean", "Mean reward of the newest iteration"),
    "solve_rate": ("solve_rate", "Share of right completions in the newest iteration"),
    "tokens_per_second": ("machine/tokens_per_s", "Tokens drawn per second of the newest iteration"),
    "staleness_mean": ("staleness/mean", "Mean policy versions that the newest iteration's groups were behind"),
    "staleness_max": ("staleness/max", "Largest of these"),
    "iteration_seconds": ("time/iteration_s", "Duration of the newest iteration"),
    "update_seconds": ("time/update_s", "Duration of its update"),
    "rollout_wait_seconds": ("time/rollout_wait_s", "Time that it waited for groups"),
    "publish_seconds": ("time/publish_s", "Time that it took to publish the adapter"),
    "failed_reports": ("machine/failed_reports", "Reports to files and trackers that failed since the run's start"),
    "grader_failures": ("machine/grader_failures", "Verdicts that graders failed to give"),
}


def exposition(state: Any) -> bytes:
    """The text of a scrape; ``state`` is the application's. Raises StoreError when the runs can't be listed."""
    registry = CollectorRegistry()
    registry.register(_Runs(state.index))
    registry.register(_Service(state))
    ProcessCollector(namespace="unmask_dashboard", registry=registry)
    return generate_latest(registry)


class _Runs(Collector):
    def __init__(self, index: RunIndex) -> None:
        self._runs = index.runs()

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """One family at a time."""
        statuses = Counter(_one_of(STATUSES, known.summary.status) for known in self._runs.values())
        runs = GaugeMetricFamily("unmask_runs", "Runs by status", labels=["status"])
        for status in (*STATUSES, "other"):
            runs.add_metric([status], statuses[status])
        yield runs
        shown = _newest(self._runs.values())
        hidden = GaugeMetricFamily("unmask_runs_without_series", "Runs that are counted only, being older than others")
        hidden.add_metric([], len(self._runs) - len(shown))
        yield hidden
        for name, (metric, text) in FIGURES.items():
            family = GaugeMetricFamily(f"unmask_run_{name}", text, labels=["run"])
            for known in shown:
                if metric in known.latest:
                    family.add_metric([known.summary.id], known.latest[metric]["value"])
            yield family
        yield from _rows(shown)
        yield from _by_state(shown)
        yield _faults(shown)


def _rows(shown: list[Known]) -> Iterator[GaugeMetricFamily]:
    figures = {
        "iteration": "The newest finished iteration",
        "total_iterations": "Iterations that the run is to make",
        "lost_rows": "Rows that the run could not write to its store since its last start",
        "heartbeat": "When the run last wrote, Unix seconds",
        "errors": "Error events of the run",
        "warnings": "Warning events of the run",
    }
    for name, text in figures.items():
        family = GaugeMetricFamily(f"unmask_run_{name}", text, labels=["run"])
        for known in shown:
            value = getattr(known, name) if name in ("errors", "warnings") else getattr(known.summary, name)
            if value is not None:
                family.add_metric([known.summary.id], value)
        yield family


def _by_state(shown: list[Known]) -> Iterator[GaugeMetricFamily]:
    groups = GaugeMetricFamily("unmask_run_groups", "Prompt groups in the ledger, by state", labels=["run", "state"])
    workers = GaugeMetricFamily("unmask_run_workers", "Actors and ranks", labels=["run", "role", "status"])
    restarts = GaugeMetricFamily("unmask_run_worker_restarts", "Restarts of actors and ranks", labels=["run", "role"])
    for known in shown:
        run_id = known.summary.id
        for state in STATES:
            if (latest := known.latest.get(f"ledger/{state}")) and math.isfinite(latest["value"]):
                groups.add_metric([run_id, state], latest["value"])
        counts: Counter[tuple[str, str]] = Counter()
        restarted: Counter[str] = Counter()
        for worker in known.workers:
            role = _one_of(ROLES, worker["role"])
            counts[role, _one_of(WORKER_STATUSES, worker["status"])] += 1
            restarted[role] += worker["restarts"]
        for (role, status), count in sorted(counts.items()):
            workers.add_metric([run_id, role, status], count)
        for role, count in sorted(restarted.items()):
            restarts.add_metric([run_id, role], count)
    yield from (groups, workers, restarts)


def _faults(shown: list[Known]) -> CounterMetricFamily:
    """Of a run that is resumed all faults of its life count."""
    text = "Faults of the run that it recovered from or ended by, by what failed and how"
    family = CounterMetricFamily("unmask_run_faults", text, labels=["run", "part", "cause"])
    for known in shown:
        for (part, cause), count in sorted(known.faults.items()):
            family.add_metric([known.summary.id, part, cause], count)
    return family


class _Service(Collector):
    def __init__(self, state: Any) -> None:
        self._state = state

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """One family at a time."""
        streams = GaugeMetricFamily("unmask_dashboard_streams", "Event streams that are open")
        streams.add_metric([], self._state.hub.clients)
        yield streams
        dropped = CounterMetricFamily(
            "unmask_dashboard_dropped_connections", "Connections that were closed on their client", labels=["reason"]
        )
        for reason in REASONS:
            dropped.add_metric([reason], self._state.crowd.dropped[reason])
        yield dropped
        requests = CounterMetricFamily(
            "unmask_dashboard_requests", "Answers of the API", labels=["method", "route", "status"]
        )
        for (method, route, status), count in sorted(self._state.answers.items()):
            requests.add_metric([method, route, str(status)], count)
        yield requests


def _newest(runs: Iterable[Known]) -> list[Known]:
    """Running ones first, then by age."""
    ordered = sorted(
        runs, key=lambda known: (known.summary.status in LIVE_STATUSES, known.summary.created or 0), reverse=True
    )
    return ordered[:MAX_RUNS]


def _one_of(known: tuple[str, ...], name: str) -> str:
    return name if name in known else "other"
