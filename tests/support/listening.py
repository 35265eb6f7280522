"""What processes listen on."""

from collections.abc import Iterable

import psutil

Listener = tuple[str, int]
"""Address and port."""


def listeners(pids: Iterable[int]) -> set[Listener]:
    """Every TCP socket that these processes listen on; IPv4 ones as such. Processes that have gone have none."""
    found = set()
    for pid in pids:
        try:
            connections = psutil.Process(pid).net_connections("tcp")
        except psutil.Error:
            continue
        found |= {(c.laddr.ip.removeprefix("::ffff:"), c.laddr.port) for c in connections if c.status == "LISTEN"}
    return found
