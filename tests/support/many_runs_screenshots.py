"""Takes the screenshots of docs/ that show many runs; these are made up (``many_runs``).

python -m tests.support.many_runs_screenshots [--out docs/screenshots]
"""

import argparse
import tempfile
from pathlib import Path

from tests.support import many_runs
from tests.support.browsers import chromium, watched
from tests.support.dashboard_screenshots import take

LISTED, COMPARED = 200, 48
WIDE = {"width": 1440, "height": 900}


def main() -> None:
    parser = argparse.ArgumentParser(description="Screenshots of many runs for the documentation")
    parser.add_argument("--out", type=Path, default=Path("docs/screenshots"))
    out = parser.parse_args().out
    with (
        tempfile.TemporaryDirectory() as folder,
        chromium() as browser,
        many_runs.served(Path(folder) / "runs", LISTED) as service,
    ):
        with watched(browser, service.url) as page:
            page.page.set_viewport_size(WIDE)
            route = many_runs.comparison_of(COMPARED)
            take(page, route, "[data-chart='reward/mean'] .main-svg", out / "compare-many.png")
        with watched(browser, service.url, dark=True, phone=True) as page:
            take(page, "/runs?group=1", "tr[data-group]", out / "runs-phone.png")


if __name__ == "__main__":
    main()
