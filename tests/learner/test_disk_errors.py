"""A remedy that is right: room where there is none, another folder where we may not write."""

from pathlib import Path

import pytest

from learner.runs.atomic import atomic_write_text, disk_errors
from learner.runs.lock import FileLock
from rewards.errors import UnmaskError


def test_a_folder_that_can_t_be_written_is_no_full_disk() -> None:
    for place in ("/proc/nowhere/x", "/dev/null/x"):
        with pytest.raises(UnmaskError, match=f"cannot write {place}: .*run.dir; .*UNMASK_CACHE") as told:
            atomic_write_text(place, "text")
        assert "make room" not in str(told.value)
    with pytest.raises(UnmaskError, match="UNMASK_CACHE"):
        FileLock(Path("/proc/nowhere/lock"))


def test_a_full_disk_is_one() -> None:
    told = pytest.raises(UnmaskError, match="No space left on device .*; make room")
    with told, disk_errors(Path("/dev/full")), open("/dev/full", "w") as file:
        file.write("x")
