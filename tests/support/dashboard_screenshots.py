"""Takes the screenshots of docs/, and the moving pictures of the README.

    python -m tests.support.dashboard_screenshots RUNS RUN OTHER [--out docs/screenshots]
    python -m tests.support.dashboard_screenshots RUNS RUN --picture NAME

RUNS is a folder of runs; RUN one that has samples, evaluations and preferably still trains; OTHER is compared with it.
The second form takes nothing but RUN's moving picture, by another name; it needs no browser.
"""

import argparse
from pathlib import Path
from typing import Any

from tests.support.browsers import Watched, chromium, watched
from tests.support.dashboards import Dashboard, dashboard

SETTLED_MS = 2500
"""For what comes after the content that is waited for: small curves, fonts, the other charts in view."""


def playback_route(service: Dashboard, run: str) -> str:
    """The newest right completion of a group with wrong ones too, halfway, with a wrong one beside it."""
    samples: list[dict[str, Any]] = service.api(f"runs/{run}/samples", kind="train", limit=200)["items"]
    for right in samples:
        group = [
            one for one in samples if (one["iteration"], one["group_id"]) == (right["iteration"], right["group_id"])
        ]
        wrong = next((one for one in group if not one["correct"]), None)
        if right["correct"] and wrong:
            steps = service.api(f"runs/{run}/samples/{right['id']}")["steps"]
            return f"/run/{run}/play/{right['id']}?step={(5 * steps) // 8}&beside={wrong['id']}"
    raise SystemExit(f"run {run} kept no group with right and wrong completions")


def base_and_trained(service: Dashboard, run: str) -> tuple[int, int]:
    """Samples of a held-out problem that the trained model solves and the base doesn't."""
    kept = {kind: service.api(f"runs/{run}/samples", kind=kind, limit=200)["items"] for kind in ("base", "trained")}
    for trained in kept["trained"]:
        for base in kept["base"]:
            if base["problem_id"] == trained["problem_id"] and trained["correct"] and not base["correct"]:
                return base["id"], trained["id"]
    raise SystemExit(f"run {run} kept no problem that only its trained model solves")


def take_picture(service: Dashboard, run: str, out: Path, name: str) -> None:
    """The moving picture of a held-out problem, base beside trained, in both themes."""
    base, trained = base_and_trained(service, run)
    for file, theme in ((f"{name}.svg", "light"), (f"{name}-dark.svg", "dark")):
        picture = service.get(f"/api/v1/runs/{run}/samples/{base}/animation", beside=trained, theme=theme)
        (out / file).write_text(picture.text)


def take(page: Watched, route: str, content: str, file: Path) -> None:
    page.open(route)
    page.shows(content)
    page.page.wait_for_timeout(SETTLED_MS)
    page.page.screenshot(path=str(file))
    print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Screenshots of the dashboard for the documentation")
    parser.add_argument("runs", type=Path)
    parser.add_argument("run")
    parser.add_argument("other", nargs="?")
    parser.add_argument("--picture", metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("docs/screenshots"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.picture is not None:
        with dashboard(asked.runs) as service:
            take_picture(service, asked.run, asked.out, asked.picture)
        return
    if asked.other is None:
        parser.error("give OTHER too, or --picture NAME")
    run = f"/run/{asked.run}"
    with chromium() as browser, dashboard(asked.runs) as service:
        play = playback_route(service, asked.run)
        base, trained = base_and_trained(service, asked.run)
        take_picture(service, asked.run, asked.out, "playback")
        shots = [
            ("runs", "/runs", f"tr[data-run='{asked.run}'] svg.spark"),
            ("run", run, "[data-chart=reward] .main-svg"),
            ("compare", f"/compare?run={asked.run}&run={asked.other}", "[data-chart='reward/mean'] .main-svg"),
            ("playback", play, ".play-cell"),
            ("base-against-trained", f"{run}/play/{base}?step=8&beside={trained}", ".play-cell"),
        ]
        with watched(browser, service.url, dark=True) as page:
            for name, route, content in shots:
                take(page, route, content, asked.out / f"{name}.png")
        with watched(browser, service.url, dark=True, phone=True) as page:
            take(page, run, "[data-chart=reward] .main-svg", asked.out / "run-phone.png")


if __name__ == "__main__":
    main()
