"""What a process tells of its use of the machine."""

import subprocess
import sys
from pathlib import Path

from rollout.usage import process_usage


def test_memory_is_what_the_kernel_counts() -> None:
    status = Path("/proc/self/status").read_text()
    resident = int(status.split("VmRSS:")[1].split()[0]) * 1024
    assert 0.5 * resident < process_usage()["memory_bytes"] < 2 * resident


GROWTH = """
from rollout.usage import process_usage
before = process_usage()["memory_bytes"]
block = b"x" * (64 << 20)
print(process_usage()["memory_bytes"] - before)
"""


def test_memory_grows_with_use() -> None:
    # In a process of its own: this one has memory to use again.
    told = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, timeout=120, check=True)
    assert int(told.stdout) > 32 << 20
