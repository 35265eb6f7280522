"""Compare methods: ``python -m learner.compare plan=NAME [key.sub=value ...] [options]``.

docs/comparison.md has the protocol.
"""

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from learner.comparison.cells import found_cells
from learner.comparison.outline import outline_text
from learner.comparison.settings import (
    ComparisonConfig,
    grid_points,
    help_text,
    load_comparison,
    method_arguments,
    run_config,
)
from learner.runs.stopping import exit_status
from learner.settings.command import SettingsParser
from learner.settings.run import required_resources
from rollout.process import prepare_process

USAGE = "%(prog)s [plan=NAME] [key.sub=value ...] [options]"
DESCRIPTION = """Train methods under one protocol, each with the same budget of forward passes, and report their solve
rates with intervals. The same command goes on where it was stopped, and takes more methods or seeds.

Exit status: 0, 1 when a run failed (the others are reported), 2 for wrong settings, 128 + signal when asked to stop."""

MEMORY_OF_A_RUN = 3 << 30
"""Bytes that the processes of a small run have resident, with room to spare."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status, see ``DESCRIPTION``."""
    return exit_status(partial(_command, argv))


def _command(argv: Sequence[str] | None) -> int:
    parser = SettingsParser("python -m learner.compare", DESCRIPTION, help_text, usage=USAGE)
    parser.add_argument("--methods", metavar="NAME,NAME", help="compare these of the plan's methods only")
    parser.add_argument("--parallel", type=int, metavar="N", help="runs side by side; as many as there is room for")
    parser.add_argument("--plan", action="store_true", help="print what would run and about how long it takes, and end")
    options = parser.read(argv)
    if options.parallel is not None and options.parallel < 1:
        parser.error(f"--parallel {options.parallel} must be at least 1")
    only = [name for part in (options.methods or "").split(",") if (name := part.strip())]
    config = load_comparison(options.settings, only=only)
    parallel = options.parallel or room_for(config)
    if options.plan:
        found = found_cells(config, Path(config.out).expanduser().absolute())
        found = {name: findings for name, findings in found.items() if not findings.failed}  # they are tried again
        print(outline_text(config, found, parallel=parallel))
        return 0
    from learner.comparison.drive import compare  # torch and Ray take seconds to import

    return compare(config, parallel=parallel)


def room_for(config: ComparisonConfig) -> int:
    """Runs that may go side by side on this machine: one where they use GPUs, otherwise as many as its cores and its
    free memory allow. A synchronous run has either its actors or its ranks at work."""
    first = next(iter(config.methods))
    run = run_config(method_arguments(config, first, grid_points(config, first)[0]))
    if required_resources(run)[1]:
        return 1
    busy = max(run.rollout.wanted_actors, run.learner.ranks) * run.resources.threads_per_process
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min((os.cpu_count() or 1) // busy, free // MEMORY_OF_A_RUN))


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
