"""What a process tells of its use of the machine."""

import os
from pathlib import Path

from rollout.usage import process_usage


def test_memory_is_what_the_kernel_counts() -> None:
    status = Path("/proc/self/status").read_text()
    resident = int(status.split("VmRSS:")[1].split()[0]) * 1024
    assert 0.5 * resident < process_usage()["memory_bytes"] < 2 * resident


def test_memory_grows_with_use() -> None:
    before = process_usage()["memory_bytes"]
    block = bytearray(os.urandom(1)) * (64 << 20)
    assert process_usage()["memory_bytes"] - before > 32 << 20
    del block
