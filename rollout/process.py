"""What a process of ours sets for itself before it loads torch. Importing our packages sets nothing."""

import gc
import logging
import os
import sys
from typing import Any


def prepare_process() -> None:
    """Call it where a command begins, before torch, transformers or Ray are loaded. The user's OpenMP settings stay."""
    # Importing torch, transformers and Ray makes half a million objects that stay, and Python's collector looks for
    # garbage among them after every 700: a seventh of the CPU time that a process of ours takes to start.
    gc.set_threshold(20_000)
    # How long OpenMP's threads spin at a barrier before they sleep. libgomp's default costs a step of the base's
    # training on two busy cores several times its work (1.2 s against 0.2 s), no spinning at all costs it half its
    # speed on two free ones (0.13 s against 0.085 s); a thousand turns do neither. Read once, when torch loads libgomp.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Where bitsandbytes is installed, PEFT imports it and it advertises kernels from the hub: a fifth of the CPU time
    # that an actor takes to start. Only a quantized base wants it, so for the others it isn't there
    # (``rollout.models.quantization.require_bitsandbytes`` takes that back). Who imported it before keeps it.
    sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]  # Python's way to say: no such module
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def for_ray_workers() -> dict[str, Any]:
    """The ``runtime_env`` of ``ray.init`` that has each worker process of the job prepared, before it loads an actor.

    The function goes there by value: a worker runs it before it knows where the driver found its packages.
    """
    import ray.cloudpickle  # late: commands import this module before they are prepared

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return {"worker_process_setup_hook": prepare_process}
