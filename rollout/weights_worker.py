"""The helper of ``rollout.models.from_wheel``: ``python -m rollout.weights_worker KEPT``.

Reads from standard input a checkpoint that torch pickled, and writes the tensors whose names match KEPT, a regular
expression, to standard output, a file, as safetensors. Why it can't be read is one line on standard error, with status
1.

A pickle is a program. torch's ``weights_only`` refuses every name in it but those that tensors are made of. What slips
through all the same runs in a process that can do nothing but compute: one thread, no capability, limits on time and
memory, and of all system calls those for memory, clocks and the files that are open already
(``rewards.sandbox.system_calls.computing_filter``). It opens no file, reaches no network and starts nothing. Where the
kernel can't do that, nothing is read.
"""

import os

from rollout.process import prepare_process

if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    prepare_process()  # before torch is loaded

import io
import re
import resource
import sys
from pathlib import Path

import torch
from safetensors.torch import save

from rewards.parent import die_with_parent
from rewards.sandbox import isolation, system_calls

CPU_LIMIT_S = 120
MEMORY_MB = 1024
"""Above what the process has when it begins, and three times the checkpoint."""


def main() -> None:
    packed = sys.stdin.buffer.read()
    try:
        shut_in(MEMORY_MB + 3 * (len(packed) >> 20))
        converted = as_safetensors(packed, re.compile(sys.argv[1]))
        while converted:
            converted = converted[os.write(sys.stdout.fileno(), converted) :]
    except Exception as error:  # a foreign file may raise anything
        lines = str(error).splitlines() or [""]
        os.write(sys.stderr.fileno(), f"{type(error).__name__}: {lines[0]}\n".encode())
        os._exit(1)
    os._exit(0)  # the interpreter's own end would ask for more than is allowed


def as_safetensors(packed: bytes, kept: re.Pattern[str]) -> bytes:
    """The tensors of a pickled state dict whose names match whole, in the form of a safetensors file.

    Raises pickle.UnpicklingError for a pickle of anything else than tensors.
    """
    state = torch.load(io.BytesIO(packed), map_location="cpu", weights_only=True)
    return save({name: t.contiguous() for name, t in state.items() if kept.fullmatch(name)}, {"format": "pt"})


def shut_in(memory_mb: int) -> None:
    """From now on this process only computes. Raises OSError where the kernel can't see to that."""
    for zipped in (True, False):  # a rehearsal: what is imported late can't be any more
        rehearsed = io.BytesIO()
        torch.save({"a": torch.zeros(2)}, rehearsed, _use_new_zipfile_serialization=zipped)
        as_safetensors(rehearsed.getvalue(), re.compile("a"))
    if not system_calls.known_machine():
        raise OSError("the system call numbers of this machine are not known, so the file can't be read safely here")
    if (threads := len(os.listdir("/proc/self/task"))) != 1:
        raise OSError(f"this process has {threads} threads, and the system call filter holds for one")
    die_with_parent()
    isolation.forgo_privileges()
    held_mb = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() >> 20
    isolation.set_limits(
        cpu_seconds=CPU_LIMIT_S,
        memory_mb=held_mb + memory_mb,
        processes=1,
        file_mb=memory_mb,
        open_files=0,
    )
    isolation.drop_privileges(None, system_calls.computing_filter())


if __name__ == "__main__":
    main()
