"""The C library's allocator, told to keep what was freed.

A forward allocates and frees the same activations step after step. glibc hands blocks of that size back to the kernel
at once, and the next step has every page zeroed and mapped anew: 16 to 30 % of the CPU time of a small model's rollout
(docs/benchmarks.md).
"""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_KEPT_BYTES = 2**28
_LARGEST_THRESHOLD = 2**25  # what older versions of glibc accept

FIXED_THRESHOLD = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Environment of a process whose memory is measured. Left alone, glibc learns to keep large blocks, and hands them out
again unseen."""


def keep_freed_memory() -> None:
    """From now on this process keeps up to 256 MiB of freed memory for its next allocation. Other C libraries than
    glibc are left alone."""
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
        library.mallopt(_MMAP_THRESHOLD, _KEPT_BYTES) or library.mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD)


def give_back_freed_memory() -> None:
    """Take ``keep_freed_memory`` back, as ``FIXED_THRESHOLD`` has it: for a process whose memory is measured."""
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_TRIM_THRESHOLD, 0)
        library.mallopt(_MMAP_THRESHOLD, int(FIXED_THRESHOLD["MALLOC_MMAP_THRESHOLD_"]))
