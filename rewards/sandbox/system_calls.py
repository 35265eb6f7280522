"""Which system calls the sandboxed processes may make, and the kernel's filter (seccomp) that refuses all others.

What is allowed is what the standard library makes, the reference solutions of MBPP and HumanEval among it, for work
inside the process, in its /tmp and over unix sockets. Everything else is refused with EPERM, above all what reaches
around the other walls: new programs (execve), mounts and their names, namespaces, other users' ids, tracing and other
processes' memory, handles on processes (pidfd), keys, bpf, perf, io_uring, memory files, locks on files and watching
them (all programs share the host's files that they read, and could talk, or hold a host's process up, through those),
the kernel's log, scheduling, shared memory and queues outside the address space, copies that don't pass through it
(splice). Numbers that are newer than this table look absent, as on the older kernel that every caller allows for.

Numbers are those on x86_64 and on aarch64; None where the machine has no such call.
"""

import errno
import platform
import struct
import sys
from collections.abc import Iterable, Mapping
from functools import cache

Number = tuple[int | None, int | None]
Code = list[tuple[int, int, int, int]]
"""Instructions of a filter: what, the instructions to skip when true and when false, a value."""

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""The column in the tables, and what the kernel's audit calls the machine."""

# fmt: off
_FILES: dict[str, Number] = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "preadv": (295, 69), "pwritev": (296, 70), "preadv2": (327, 286), "pwritev2": (328, 287),
    "open": (2, None), "openat": (257, 56), "creat": (85, None), "close": (3, 57), "close_range": (436, 436),
    "lseek": (8, 62), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79),
    "statx": (332, 291), "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "dup": (32, 23),
    "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59), "truncate": (76, 45),
    "ftruncate": (77, 46), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None),
    "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "link": (86, None),
    "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36), "readlink": (89, None),
    "readlinkat": (267, 78), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "umask": (95, 166), "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "getdents64": (217, 61),
}
_MEMORY_AND_THREADS: dict[str, Number] = {
    "brk": (12, 214), "mmap": (9, 222), "munmap": (11, 215), "mremap": (25, 216), "mprotect": (10, 226),
    "madvise": (28, 233), "futex": (202, 98), "set_robust_list": (273, 99), "rseq": (334, 293),
    "set_tid_address": (218, 96), "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "getcpu": (309, 168),
}
_TIME_AND_WAITING: dict[str, Number] = {
    "time": (201, None), "gettimeofday": (96, 169), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "times": (100, 153), "getrusage": (98, 165), "getitimer": (36, 102), "setitimer": (38, 103), "alarm": (37, None),
    "pause": (34, None), "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "restart_syscall": (219, 128),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "epoll_create": (213, None),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22),
    "epoll_pwait2": (441, 441),
}
_PROCESSES: dict[str, Number] = {
    "exit": (60, 93), "exit_group": (231, 94), "wait4": (61, 260), "waitid": (247, 95), "getpid": (39, 172),
    "getppid": (110, 173), "gettid": (186, 178), "getpgrp": (111, None), "getpgid": (121, 155), "setpgid": (109, 154),
    "getsid": (124, 156), "setsid": (112, 157), "getuid": (102, 174), "geteuid": (107, 175), "getresuid": (118, 148),
    "getgid": (104, 176), "getegid": (108, 177), "getresgid": (120, 150), "getgroups": (115, 158), "capget": (125, 90),
    "uname": (63, 160), "getrlimit": (97, 163), "setrlimit": (160, 164), "getpriority": (140, 141),
    "getrandom": (318, 278),
}
_SIGNALS: dict[str, Number] = {
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132),
}
_UNIX_SOCKETS: dict[str, Number] = {
    "bind": (49, 200), "listen": (50, 201), "accept": (43, 202), "accept4": (288, 242), "connect": (42, 203),
    "sendto": (44, 206), "recvfrom": (45, 207), "sendmsg": (46, 211), "recvmsg": (47, 212), "getsockname": (51, 204),
    "getpeername": (52, 205), "getsockopt": (55, 209), "shutdown": (48, 210),
}
ALLOWED = _FILES | _MEMORY_AND_THREADS | _TIME_AND_WAITING | _PROCESSES | _SIGNALS | _UNIX_SOCKETS
"""Whatever their arguments."""

# Only a program starts processes and threads. clone: without new namespaces and handles (CLONE_PIDFD).
_FORKS: dict[str, Number] = {"fork": (57, None), "vfork": (58, None)}
_CLONE: Number = (56, 220)
_CLONE_REFUSED = 0x7E020000 | 0x1000

# Only with one of these values of an argument: (call, which argument, values).
_WITH_ONE_OF: dict[str, tuple[Number, int, tuple[int, ...]]] = {
    "socket": ((41, 198), 0, (1,)),  # unix; vsock, for one, belongs to no network namespace
    "socketpair": ((53, 199), 0, (1,)),
    "prlimit64": ((302, 261), 0, (0,)),  # its own limits, not another process'
    # Copies of descriptors and their flags; no locks, leases, notices of changes or owners.
    "fcntl": ((72, 25), 1, (0, 1, 2, 3, 4, 1030, 1032)),
    # Whether it is a terminal and how wide, bytes to read, blocking, close-on-exec.
    "ioctl": ((16, 29), 1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),
    # The name of a thread; whether a filter, a capability and no_new_privs are there.
    "prctl": ((157, 167), 0, (15, 16, 21, 23, 39)),
    # Addresses to use again, the sizes of buffers; no socket filters.
    "setsockopt": ((54, 208), 2, (2, 7, 8)),
}
# The CPU time of a child is known when it is waited for; one whose end is ignored is never waited for.
_SIGACTION: Number = (13, 134)
_SIGCHLD = 17

# Answered without being made, by the error that makes callers do without.
_ANSWERED: dict[int, dict[str, Number]] = {
    # Takes its flags from memory, where a filter can't see them: callers fall back to clone.
    errno.ENOSYS: {"clone3": (435, 435), "openat2": (437, 437), "futex_waitv": (449, 449),
                   "map_shadow_stack": (453, 453), "futex_wake": (454, 454), "futex_wait": (455, 455),
                   "futex_requeue": (456, 456), "mseal": (462, 462)},
    errno.ENOTSUP: {"listxattr": (194, 11), "llistxattr": (195, 12), "flistxattr": (196, 13), "getxattr": (191, 8),
                    "lgetxattr": (192, 9), "fgetxattr": (193, 10)},
    # No error: nothing of a program's outlives it, and no disk of the host's is to be flushed for it.
    0: {"fsync": (74, 82), "fdatasync": (75, 83), "msync": (26, 227)},
}
_NEWEST = 469
# fmt: on

_LOAD, _EQUAL, _AT_LEAST, _HAS_BITS, _SKIP, _GIVE = 0x20, 0x15, 0x35, 0x45, 0x05, 0x06
ALLOW: Code = [(_GIVE, 0, 0, 0x7FFF0000)]
_KILL: Code = [(_GIVE, 0, 0, 0x80000000)]


def answer(error: int) -> Code:
    return [(_GIVE, 0, 0, 0x00050000 | error)]


REFUSE = answer(errno.EPERM)


def known_machine() -> bool:
    """Whether the system call numbers of this machine are known."""
    return platform.machine() in MACHINES and sys.maxsize > 1 << 32


@cache
def judges_filter() -> bytes:
    """For tests and what they import: they compute and ask, and start nothing."""
    column, _ = MACHINES[platform.machine()]
    return assemble(_rules(column), REFUSE, beyond=(_NEWEST, answer(errno.ENOSYS)))


@cache
def programs_filter() -> bytes:
    """For the program, which may also start threads and copies of itself."""
    column, _ = MACHINES[platform.machine()]
    rules = _rules(column) | dict.fromkeys(_numbers(_FORKS.values(), column), ALLOW)
    rules |= {_CLONE[column]: [*_argument(0), (_HAS_BITS, 0, 1, _CLONE_REFUSED), *REFUSE, *ALLOW]}
    return assemble(rules, REFUSE, beyond=(_NEWEST, answer(errno.ENOSYS)))


@cache
def computing_filter() -> bytes:
    """For a process that has open all that it needs: it gets memory and the time, reads, writes and ends."""
    column, _ = MACHINES[platform.machine()]
    named = ["read", "write", "lseek", "fstat", "close", "clock_gettime", "getrandom", "getpid", "gettid"]
    named += ["rt_sigprocmask", "rt_sigreturn", "exit", "exit_group"]
    wanted = _MEMORY_AND_THREADS | {name: ALLOWED[name] for name in named}
    return assemble(dict.fromkeys(_numbers(wanted.values(), column), ALLOW), REFUSE)


def _rules(column: int) -> dict[int | None, Code]:
    rules: dict[int | None, Code] = dict.fromkeys(_numbers(ALLOWED.values(), column), ALLOW)
    for numbers, argument, values in _WITH_ONE_OF.values():
        tests = [(_EQUAL, len(values) - index, 0, value) for index, value in enumerate(values)]
        rules[numbers[column]] = [*_argument(argument), *tests, *REFUSE, *ALLOW]
    rules[_SIGACTION[column]] = [*_argument(0), (_EQUAL, 0, 1, _SIGCHLD), *REFUSE, *ALLOW]
    for error, calls in _ANSWERED.items():
        rules |= dict.fromkeys(_numbers(calls.values(), column), answer(error))
    return rules


def _numbers(calls: Iterable[Number], column: int) -> list[int]:
    return [number for call in calls if (number := call[column]) is not None]


def _argument(index: int) -> Code:
    """Loads the lower half of an argument: of those that are looked at, the kernel takes no more."""
    return [(_LOAD, 0, 0, 16 + 8 * index)]


def assemble(rules: Mapping[int | None, Code], otherwise: Code, *, beyond: tuple[int, Code] | None = None) -> bytes:
    """A filter in the kernel's form: what to do by a call's number, ``otherwise`` for all others, ``beyond`` a number
    something else. A call in the form of another machine, 32 bits among them, ends the process."""
    changes: dict[int, Code] = {0: otherwise}  # from which number on what holds
    for number, code in sorted((number, code) for number, code in rules.items() if number is not None):
        changes[number] = code
        changes[number + 1] = otherwise
    if beyond is not None:
        changes[beyond[0] + 1] = beyond[1]
    steps: list[tuple[int, Code]] = []
    for number, code in changes.items():
        if not steps or steps[-1][1] != code:
            steps.append((number, code))
    _, machine = MACHINES[platform.machine()]
    head: Code = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, machine), *_KILL, (_LOAD, 0, 0, 0)]
    whole = head + _search(steps)
    return b"".join(struct.pack("=HBBI", what, true, false, value) for what, true, false, value in whole)


def _search(steps: list[tuple[int, Code]]) -> Code:
    """Halves the numbers until one step is left: eight comparisons at most, and none of them far down a list."""
    if len(steps) == 1:
        return steps[0][1]
    middle = len(steps) // 2
    lower, upper = _search(steps[:middle]), _search(steps[middle:])
    return [(_AT_LEAST, 0, 1, steps[middle][0]), (_SKIP, 0, 0, len(lower)), *lower, *upper]
