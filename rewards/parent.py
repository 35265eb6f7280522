"""A process that ends with the one that started it, however that ended."""

import ctypes
import os
import signal
import sys

_LIBC = ctypes.CDLL(None, use_errno=True)  # found now: after a fork, in a process with threads, it may be too late
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """The kernel kills this process when its parent ends (prctl(2), PR_SET_PDEATHSIG); only Linux can. It survives an
    exec, and children don't inherit it. Raises OSError when it is refused."""
    if sys.platform == "linux" and _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl: {os.strerror(number)}")
