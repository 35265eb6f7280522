"""All benchmarks that need no GPU, one after the other, each in a process of its own; then one table.

python -m learner.bench [--small] [--out FOLDER] [--only NAME ...] [--write docs/benchmarks.md]
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from learner.bench import report
from learner.runs.stopping import exit_status
from rewards.command import Parser
from rollout.process import prepare_process

WITHOUT_GPU = tuple(name for name in report.NAMES if name not in ("gpu", "first_minutes"))
LIMIT_S = 1800.0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 when a benchmark failed; a bar that is missed is a result, not a failure."""
    return exit_status(partial(_command, argv))


def _command(argv: Sequence[str] | None) -> int:
    parser = Parser("python -m learner.bench", description="All benchmarks that need no GPU, then one table.")
    parser.add_argument("--small", action="store_true", help="tiny sizes: shows that it works, measures nothing")
    parser.add_argument("--out", type=Path, default=report.DEFAULT_FOLDER, help="folder of the JSON results")
    parser.add_argument("--only", nargs="*", choices=WITHOUT_GPU, default=WITHOUT_GPU, help="not all of them")
    parser.add_argument("--write", type=Path, help="put all stored results between the marks of this document")
    arguments = parser.parse_args(argv)
    failed = []
    for name in arguments.only:
        begin = time.monotonic()
        command = [sys.executable, "-m", f"learner.bench.{name}", "--out", str(arguments.out)]
        command += ["--small"] if arguments.small else []
        status = subprocess.run(command, stdout=subprocess.DEVNULL, timeout=LIMIT_S).returncode
        print(f"{name}: status {status}, {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
        failed += [name] if status else []
    text = "\n".join(report.render(result) for result in report.load(arguments.out))
    print(text)
    if arguments.write is not None:
        report.write_into(arguments.write, text)
    return 1 if failed else 0


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
