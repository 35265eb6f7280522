"""The dashboard under load.

    python -m tests.support.dashboard_load FOLDER [--runs 100] [--rows 100000] [--streams 200]
    python -m tests.support.dashboard_load FOLDER --compare 12 [--rows 250000]

Fills FOLDER with long runs (unless it is there), starts a service, lets ``--streams`` clients follow a run that writes
an iteration every half second, and loads run pages meanwhile. Prints the times of a page's data and the service's
memory. With ``--compare`` it opens a comparison of so many runs in Chromium instead (25 metrics: 250,000 rows are
10,000 iterations), and prints when its table and its first curves are there. Run it on a quiet machine.
"""

import argparse
import asyncio
import contextlib
import os
import statistics
import time
from pathlib import Path

import httpx

from services.store.schema import sqlite_url
from services.store.writer import StoreWriter
from tests.support.browsers import chromium, watched
from tests.support.dashboards import Dashboard, dashboard
from tests.support.store_load import NAMES, fill_folder


async def measure(service: Dashboard, runs: int, streams: int, seconds: float) -> None:
    """Follow, load pages, print."""
    received = [0] * streams
    followers = [asyncio.create_task(follow(service.port, received, place)) for place in range(streams)]
    writing = asyncio.create_task(asyncio.to_thread(write, service.runs, seconds))
    pages: list[float] = []
    requests: dict[str, list[float]] = {}
    memory: list[float] = []
    limits = httpx.Limits(max_connections=6)  # as a browser has
    async with httpx.AsyncClient(
        base_url=f"{service.url}api/v1/", timeout=60, limits=limits, trust_env=False
    ) as client:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            run = f"load-{len(pages) % runs:03d}"
            begin = time.perf_counter()
            took = await asyncio.gather(*(timed(client, name, path) for name, path in page(run)))
            pages.append(time.perf_counter() - begin)
            for name, one in took:
                requests.setdefault(name, []).append(one)
            memory.append(resident_mib(service.process.pid))
            await asyncio.sleep(0.5)
    await writing
    await asyncio.sleep(2)
    for follower in followers:
        follower.cancel()
    print(f"{len(pages)} run pages, {streams} open streams, {runs} runs; load average {os.getloadavg()[0]:.1f}")
    print(f"data of a page: median {ms(statistics.median(pages))}, 95 % within {ms(quantile(pages))}")
    for name, times in requests.items():
        print(f"  {name:<14} median {ms(statistics.median(times))}, 95 % within {ms(quantile(times))}")
    print(f"events received by a stream: {min(received)} to {max(received)}")
    print(f"memory: {memory[0]:.0f} MiB at first, {max(memory):.0f} at most, {memory[-1]:.0f} at the end")


def compare(service: Dashboard, runs: int) -> None:
    """A comparison of so many runs: when it can be used, the service's CPU. Three times by its address, in a browser
    that knows nothing yet, and three times from the list, where they were ticked for two seconds."""
    names = [f"load-{number:03d}" for number in range(runs)]
    routes = {
        "by its address": ("/runs", "/compare?" + "&".join(f"run={name}" for name in names)),
        "from the list": ("/runs?" + "&".join(f"pick={name}" for name in names), None),
    }
    with chromium() as browser:
        for way, (before, route) in [each for each in routes.items() for _ in range(3)]:
            with watched(browser, service.url) as page:
                page.open(before)
                page.shows("tr[data-run]")
                page.page.wait_for_timeout(0 if route else 2000)
                begin, used = time.perf_counter(), cpu_s(service.process.pid)
                if route:
                    page.open(route)
                else:
                    page.page.click(".compare-chosen")
                page.shows(f".legend tbody tr:nth-child({runs})")
                table = time.perf_counter() - begin
                page.shows("[data-chart='reward/mean'] .main-svg")
                curves = time.perf_counter() - begin
                took = cpu_s(service.process.pid) - used
                print(f"comparison of {runs} {way}: table {ms(table)}, curves {ms(curves)}, service's CPU {ms(took)}")


def cpu_s(pid: int) -> float:
    """Of the process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def page(run: str) -> list[tuple[str, str]]:
    """What the overview of a run asks for, and the vitals above it."""
    names = "&".join(f"name={name}" for name in NAMES)
    trends = "&".join(f"name={name}" for name in NAMES[:5])
    return [
        ("run", f"runs/{run}"),
        ("metrics", f"runs/{run}/metrics?points=500&{names}"),
        ("names", f"runs/{run}/metric-names"),
        ("events", f"runs/{run}/events"),
        ("ledger", f"runs/{run}/ledger"),
        ("checkpoints", f"runs/{run}/checkpoints"),
        ("trends", f"runs/{run}/metrics?points=80&{trends}"),
        ("workers", f"runs/{run}/workers"),
        ("warnings", f"runs/{run}/events?level=warning&limit=100"),
        ("errors", f"runs/{run}/events?level=error&limit=100"),
        ("newest", f"runs/{run}/events?limit=8"),
        ("starts", f"runs/{run}/starts"),
    ]


async def timed(client: httpx.AsyncClient, name: str, path: str) -> tuple[str, float]:
    begin = time.perf_counter()
    answer = await client.get(path)
    assert answer.status_code == 200, answer.text
    return name, time.perf_counter() - begin


async def follow(port: int, received: list[int], place: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.closing(writer):
        writer.write(b"GET /api/v1/stream?run=load-000 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        while line := await reader.readline():
            received[place] += line.startswith(b"event: metrics")


def write(runs: Path, seconds: float) -> None:
    with StoreWriter(sqlite_url(runs / "load-000" / "store.sqlite"), "load-000", total_iterations=10**6) as store:
        for i in range(int(seconds * 2)):
            store.metrics(10_000 + i, dict.fromkeys(NAMES, float(i)))
            time.sleep(0.5)


def resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def quantile(values: list[float]) -> float:
    return sorted(values)[int(0.95 * (len(values) - 1))]


def ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--compare", type=int, default=0, metavar="RUNS")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    folder = options.folder.absolute()
    options.runs = options.compare or options.runs
    if not (folder / "load-000").exists():
        begin = time.monotonic()
        fill_folder(folder, options.runs, options.rows)
        print(f"filled {folder} with {options.runs} runs of {options.rows} rows in {time.monotonic() - begin:.0f} s")
    with dashboard(folder) as service:
        while len(service.api("runs", limit=500)["items"]) < options.runs:
            time.sleep(0.5)
        if options.compare:
            compare(service, options.compare)
            return
        asyncio.run(measure(service, options.runs, options.streams, options.seconds))


if __name__ == "__main__":
    main()
