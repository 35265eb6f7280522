"""How the ranks of a learner group find each other.

torch's store, at which they meet, asks nobody who they are and by default listens on all interfaces. Here it listens on
one address: loopback when all ranks run on one node, the network address of rank 0's node otherwise. That network must
be a private one.
"""

import os
import socket
from collections.abc import Collection
from datetime import timedelta

import torch

from learner.runs.local_ray import LOOPBACK
from rewards.errors import ConfigError

_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def meeting_host(node_addresses: Collection[str]) -> str:
    """The address to meet at, from that of each rank's node in rank order."""
    first = next(iter(node_addresses))
    return LOOPBACK if set(node_addresses) == {first} else first


def open_meeting_place(host: str, world: int, port: int | None = None) -> socket.socket:
    """Listens on ``host`` alone; for rank 0.

    Args:
        port: at this one, or the next where it is taken; None: any free one, as always on loopback.

    Raises:
        ConfigError: it can listen at neither.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if port is None or host == LOOPBACK:
        return socket.create_server((host, 0), family=family, backlog=world)
    reasons = []
    for tried in (port, port + 1):
        try:
            return socket.create_server((host, tried), family=family, backlog=world)
        except OSError as error:
            reasons.append(f"{tried}: {error.strerror}")
    raise ConfigError(
        f"learner.meeting_port={port}: the ranks can't meet there, nor at the next port, on {host} "
        f"({'; '.join(reasons)}); name another, or leave it null"
    )


def meet(
    address: str,
    rank: int,
    world: int,
    *,
    backend: str,
    timeout_s: float,
    meeting_place: socket.socket | None,
    interface: str | None = None,
) -> None:
    """Join the group, which DeepSpeed then finds.

    Args:
        address: host:port of rank 0's meeting place.
        timeout_s: seconds for this and for each collective operation.
        meeting_place: what ``open_meeting_place`` gave on rank 0, taken over here; None on the others.
        interface: of the network between nodes; None leaves the environment's, or the backend's choice.
    """
    import deepspeed

    if torch.distributed.is_initialized():  # a rank that is started again
        if meeting_place is not None:
            meeting_place.close()
        return
    host, port = address.rsplit(":", 1)
    for name in _INTERFACES:
        if host == LOOPBACK:
            os.environ.setdefault(name, "lo")
        elif interface is not None:
            os.environ[name] = interface
    # DeepSpeed reads these too.
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world), MASTER_ADDR=host, MASTER_PORT=port)
    limit = timedelta(seconds=timeout_s)
    store = torch.distributed.TCPStore(
        host,
        int(port),
        world,
        is_master=meeting_place is not None,
        timeout=limit,
        wait_for_workers=False,
        master_listen_fd=None if meeting_place is None else meeting_place.detach(),
    )
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    deepspeed.init_distributed(dist_backend=backend, timeout=limit, verbose=False)
