"""How fast a week of metrics opens: `python -m tests.support.dashboard_week [--days 7] [--repeats 5]`.

Writes a run of so many days with 30 metrics every 10 s into a SQLite file and into a PostgreSQL server of this
machine's (left out where there is none), starts a dashboard on each, and prints the median times of the API's answers
beside that of the plain query that they replace, which fetches the raw rows; and CPU times, of the asking process and
the dashboard's, which other work on the machine doesn't stretch. The ways take turns.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from services.store import schema
from tests.support.dashboards import Dashboard, Place, dashboard, eventually
from tests.support.databases import Server, binaries
from tests.support.store_load import NAMES, fill_run

METRICS = (*NAMES, *(f"reward/component_{number}" for number in range(30 - len(NAMES))))
SECONDS = 10


def measure(place: Place, days: float, repeats: int) -> None:
    rows = int(days * 86400 / SECONDS) * len(METRICS)
    fill_run(place.url("week"), "week", rows, names=METRICS, seconds=SECONDS)
    with dashboard(place) as service:
        eventually(lambda: service.get("/api/v1/runs/week").status_code == 200)
        ways: dict[str, Callable[[], int]] = {
            "API, 30 curves of at most 500 points": lambda: points(service, METRICS),
            "API, 8 of them": lambda: points(service, METRICS[:8]),
            "plain query over the raw rows of 30 curves": lambda: raw_rows(place),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        cpu: dict[str, list[float]] = {name: [] for name in ways}
        counts: dict[str, int] = {}
        for _ in range(repeats):
            for name, ask in ways.items():
                begin, used = time.perf_counter(), cpu_s(service)
                counts[name] = ask()
                times[name].append(time.perf_counter() - begin)
                cpu[name].append(cpu_s(service) - used)
    plain = statistics.median(times[name])
    for name in ways:
        took, used = statistics.median(times[name]), statistics.median(cpu[name])
        share = f"1/{plain / took:.0f} of the plain query" if took < plain else ""
        print(f"  {name:<44}{1000 * took:8.0f} ms, CPU {1000 * used:6.0f} ms {counts[name]:>10,} points  {share}")


def points(service: Dashboard, names: tuple[str, ...]) -> int:
    series: dict[str, Any] = service.api("runs/week/metrics", name=names, points=500)["series"]
    return sum(len(one["iteration"]) for one in series.values())


def cpu_s(service: Dashboard) -> float:
    """Of this process and the service's, so far."""
    user, system = Path(f"/proc/{service.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return time.process_time() + (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def raw_rows(place: Place) -> int:
    table = schema.metrics
    query = sa.select(table.c.name, table.c.iteration, table.c.value)
    query = query.where(table.c.run_id == "week", table.c.name.in_(METRICS)).order_by(table.c.name, table.c.iteration)
    engine = schema.open_engine(place.url("week"), create=False, read_only=True)
    with contextlib.closing(engine.connect()) as connection:
        count = len(connection.execute(query).all())
    engine.dispose()
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=float, default=7.0)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="unmask-week-") as folder:
        (Path(folder) / "week").mkdir()
        print("SQLite:")
        measure(Place(Path(folder)), options.days, options.repeats)
        if binaries() is None:
            print("PostgreSQL: none on this machine")
            return
        server = Server()
        with server.database() as url:
            print("PostgreSQL:")
            measure(Place(Path(folder), url), options.days, options.repeats)
        server.remove()


if __name__ == "__main__":
    main()
