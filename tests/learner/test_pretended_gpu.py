"""``on_a_pretended_gpu*.py`` in a process of their own: torch settles at its first backward which devices there are,
and one that is registered stays."""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
CASES = sorted(map(str, FOLDER.glob("on_a_pretended_gpu*.py")))


def test_sampling_scoring_and_every_method_on_a_pretended_gpu() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *CASES]
    done = subprocess.run(command, cwd=FOLDER.parents[1], capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
