"""What the kernel refuses to programs and to the tests that come with a problem, both of them anybody's code."""

import os
import re
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewards.sandbox import system_calls
from rewards.sandbox.local import LocalRunner
from rewards.sandbox.runner import Job
from tests.support.sandboxed import LIMITS, ROOT, left_running, plainly, run, try_call


@pytest.fixture(scope="module")
def sandbox() -> Iterator[LocalRunner]:
    runner = LocalRunner()
    yield runner
    runner.close()


WITH_ALL_RIGHTS = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from rewards.sandbox import isolation
isolation.enter_user_namespace(isolation.NEWNS | isolation.NEWIPC | isolation.NEWUTS)
"""
"""The control: what tests were able to do as root of the namespaces, before they dropped their rights."""
IN_THE_JAIL = WITH_ALL_RIGHTS + "isolation.enter_jail()\n"

REMOUNT = """
import ctypes, os
def attempt():
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.mount(None, b"/usr/lib", None, ctypes.c_ulong(32 | 4096 | 2 | 4), None)
    error = ctypes.get_errno()
    writable = not os.statvfs("/usr/lib").f_flag & os.ST_RDONLY if done == 0 else False
    return done, error, writable
"""


@pytest.mark.parametrize("side", ["program", "test"])
def test_the_jail_stays_read_only(sandbox: LocalRunner, side: str) -> None:
    try_call(sandbox, side, REMOUNT, "(-1, 1, False)")
    assert plainly(IN_THE_JAIL + REMOUNT + "print(attempt())") == "(0, 0, True)", "the control"


RIGHTS = """
import ctypes, os
def attempt():
    libc = ctypes.CDLL(None)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    bounding = sum(libc.prctl(23, number, 0, 0, 0) == 1 for number in range(64))
    return any(sets), bounding, libc.prctl(39, 0, 0, 0, 0), libc.prctl(21, 0, 0, 0, 0)
"""


@pytest.mark.parametrize("side", ["program", "test"])
def test_no_capability_and_a_filter(sandbox: LocalRunner, side: str) -> None:
    try_call(sandbox, side, RIGHTS, "(False, 0, 1, 2)")
    assert re.fullmatch(r"\(True, [1-9]\d, \d, \d\)", plainly(WITH_ALL_RIGHTS + RIGHTS + "print(attempt())"))


def test_seen_from_outside_they_are_nobody(sandbox: LocalRunner) -> None:
    assert run(sandbox, "x = 1").status == "passed"
    thread = threading.Thread(target=sandbox.run, args=(Job("import time\ntime.sleep(2)"), LIMITS))
    thread.start()
    seen: list[dict[str, str]] = []
    while thread.is_alive() and not (len(seen) == 4 and all(one["Seccomp"] == "2" for one in seen[2:])):
        time.sleep(0.02)
        seen = [status(pid) for pid in left_running(sandbox)]
    thread.join()
    outer, server, judge, program = seen
    for process in (judge, program):
        assert {process[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
        assert (process["NoNewPrivs"], process["Seccomp"]) == ("1", "2")
    assert int(server["CapEff"], 16) != 0, "the control"
    if os.geteuid() == 0:
        ids = [int(process["Uid"].split()[0]) for process in (judge, program)]
        assert len({0, *ids}) == 3 and not any(200_000 <= one <= 2_000_200_000 for one in ids), "SSSD's default range"
        assert [int(process["Gid"].split()[0]) for process in (judge, program)] == ids


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_three_users(sandbox: LocalRunner) -> None:
    if os.geteuid() != 0:
        pytest.skip("another user has only one id to give")
    outcome = run(sandbox, "import os\nf = os.getuid", "import os; x = os.getuid(); assert x and f() and x != f()")
    assert outcome.status == "passed", outcome
    judge_signals = "import os\nos.kill(1, 0)\ndef f(): pass"
    assert "PermissionError" in (run(sandbox, judge_signals, "f()").error or ""), "the judge is out of its reach"


# What gives (-1, EPERM); calls by number are the same on all machines.
REFUSED = {
    "socketpair inet": "libc.socketpair(2, 1, 0, (ctypes.c_int * 2)())",
    "socketpair netlink": "libc.socketpair(16, 3, 0, (ctypes.c_int * 2)())",
    "socketpair tipc": "libc.socketpair(30, 1, 0, (ctypes.c_int * 2)())",
    "socketpair vsock": "libc.socketpair(40, 1, 0, (ctypes.c_int * 2)())",
    "execve": "libc.execv(b'/', None)",
    "execveat": "libc.fexecve(0, (ctypes.c_char_p * 1)(), (ctypes.c_char_p * 1)())",
    "flock": "libc.flock(0, 1)",
    "inotify": "libc.inotify_init1(0)",
    "a watch": "libc.inotify_add_watch(0, b'/usr/lib', 1)",
    "fcntl lock": "libc.fcntl(0, 6, bytes(64))",
    "fcntl lease": "libc.fcntl(0, 1024, 0)",
    "fcntl notice": "libc.fcntl(0, 1026, 1)",
    "input of a terminal": "libc.ioctl(libc.open(b'/dev/null', 0), 0x5412, b'x')",
    "statmount": "libc.syscall(457, None, None, 0, 0)",
    "listmount": "libc.syscall(458, None, None, 0, 0)",
    "open_tree_attr": "libc.syscall(467, -1, None, 0, None, 0)",
    "limits of a process by its number": "libc.prlimit(os.getpid(), 1, None, bytes(16))",
    "limits of no process": "libc.prlimit(-1, 1, None, bytes(16))",
    "kernel log": "libc.klogctl(10, None, 0)",
    "mount": "libc.mount(b'x', b'/tmp', b'tmpfs', ctypes.c_ulong(0), None)",
    "unmount": "libc.umount2(b'/tmp', 0)",
    "unshare": "libc.unshare(0x10000000)",
    "chroot": "libc.chroot(b'/tmp')",
    "other ids": "libc.setresuid(2, 2, 2)",
    "pidfd_open": "libc.syscall(434, 1, 0)",
    "pidfd_send_signal": "libc.syscall(424, 0, 0, None, 0)",
    "pidfd_getfd": "libc.syscall(438, 0, 0, 0)",
    "process_madvise": "libc.syscall(440, 0, None, 0, 0, 0)",
    "io_uring": "libc.syscall(425, 1, None)",
    "scheduling": "libc.sched_setaffinity(0, 8, bytes(8))",
    "priority": "libc.setpriority(0, 0, 5)",
    "personality": "libc.personality(0)",
    "shared memory": "libc.shmget(0, 4096, 0o1600)",
    "memory file": "libc.memfd_create(b'x', 0)",
    "splice": "libc.splice(0, None, 0, None, 1, 0)",
    "sync": "libc.syncfs(0)",
    "ignored children": "libc.sigaction(17, bytes(152), None)",
    "socket filter": "libc.setsockopt(0, 1, 26, bytes(16), 16)",
    "filter of its own": "libc.prctl(22, 1, 0, 0, 0)",
}  # fmt: skip
CALLS = """
import ctypes, os
def attempt():
    libc = ctypes.CDLL(None, use_errno=True)
    found = []
    for name, call in {calls!r}.items():
        ctypes.set_errno(0)
        if (result := eval(call)) != -1 or ctypes.get_errno() != 1:
            found.append((name, result, ctypes.get_errno()))
    return found
"""


@pytest.mark.parametrize("side", ["program", "test"])
def test_system_calls_that_are_refused(sandbox: LocalRunner, side: str) -> None:
    try_call(sandbox, side, CALLS.format(calls=REFUSED), "[]")


def test_without_the_filter_the_kernel_answers_otherwise() -> None:
    """The control: they are not refused for want of rights. Each in a process of its own, as some succeed."""
    forked = """
import ctypes, os
def forked(call):
    read, write = os.pipe()
    if os.fork() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        os.write(write, f"{eval(call)} {ctypes.get_errno()}".encode())
        os._exit(0)
    os.wait()
    os.close(write)
    result, error = map(int, os.read(read, 99).split())
    os.close(read)
    ctypes.set_errno(error)
    return result
"""
    code = CALLS.format(calls=REFUSED).replace("eval(call)", "forked(call)")
    printed = plainly(WITH_ALL_RIGHTS + forked + code + "\nprint(*(one[0] for one in attempt()), sep='\\n')")
    needs_the_hosts_root = {"kernel log"}
    assert set(REFUSED) - set(printed.splitlines()) <= needs_the_hosts_root


def test_numbers_are_the_kernels() -> None:
    """As its headers have them, for both machines."""
    headers = (Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), Path("/usr/include/asm-generic/unistd.h"))
    tables = [system_calls.ALLOWED, system_calls._FORKS, *system_calls._ANSWERED.values()]
    tables += [{name: row[0] for name, row in system_calls._WITH_ONE_OF.items()}]
    tables += [{"clone": system_calls._CLONE, "rt_sigaction": system_calls._SIGACTION}]
    compared = 0
    for column, header in enumerate(headers):
        text = header.read_text() if header.exists() else ""
        found = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
        if column == 1:  # one name for two widths
            found |= {"newfstatat": found.get("fstatat", 79)}
        for name, numbers in ((name, numbers) for table in tables for name, numbers in table.items()):
            if name in found and numbers[column] is not None:
                assert numbers[column] == found[name], name
                compared += 1
    if not compared:
        pytest.skip("no headers of the kernel here")
    assert compared > 100


@pytest.mark.parametrize("column", [0, 1], ids=["x86_64", "aarch64"])
def test_the_filter_finds_every_number(column: int) -> None:
    """Followed by hand for all numbers, as the kernel does."""
    rules = system_calls._rules(column)
    absent = system_calls.answer(38)
    packed = system_calls.assemble(rules, system_calls.REFUSE, beyond=(system_calls._NEWEST, absent))
    steps = list(struct.iter_unpack("=HBBI", packed))
    for number in [*range(600), 0x40000000, 0x40000000 + 59, 0xFFFFFFFF]:
        rule = rules.get(number, absent if number > system_calls._NEWEST else system_calls.REFUSE)
        at = 4  # after the machine was found to be this one
        while steps[at][0] in (0x35, 0x05):
            what, true, false, value = steps[at]
            at += 1 + (value if what == 0x05 else true if number >= value else false)
        assert steps[at : at + len(rule)] == rule, number


def test_its_own_limits_it_may_lower(sandbox: LocalRunner) -> None:
    program = """
    import resource
    def f():
        resource.setrlimit(resource.RLIMIT_NOFILE, (10, 10))
        return resource.getrlimit(resource.RLIMIT_NOFILE), resource.getrlimit(resource.RLIMIT_SIGPENDING)
    """
    assert run(sandbox, program, "assert f() == ((10, 10), (64, 64)), f()").status == "passed"


EXECUTABLE = """
import mmap
def attempt():
    with open("code", "wb+") as file:
        file.truncate(4096)
        try:
            mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC, flags=mmap.MAP_PRIVATE).close()
            return "mapped"
        except PermissionError:
            return "refused"
"""


@pytest.mark.parametrize("side", ["program", "test"])
def test_no_code_is_mapped_from_its_files(sandbox: LocalRunner, side: str, tmp_path: Path) -> None:
    try_call(sandbox, side, EXECUTABLE, "'refused'")
    control = f"import os\nos.chdir({str(tmp_path)!r})\n{EXECUTABLE}print(attempt())"
    assert plainly(control) == "mapped", "the control"


NAMES = """
import os, sys
def attempt():
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    frame, code = sys._getframe(), []
    while frame:
        code.append(frame.f_code.co_filename)
        frame = frame.f_back
    shown = repr((sys.argv, sys.orig_argv, sys.executable, sys.path, os.getcwd(), files, code))
    return [os.uname().nodename, {root!r} in shown]
"""


@pytest.mark.parametrize("side", ["program", "test"])
def test_neither_the_hosts_name_nor_where_we_are_installed(sandbox: LocalRunner, side: str) -> None:
    code = NAMES.format(root=str(ROOT))
    try_call(sandbox, side, code, "['sandbox', False]")
    control = plainly(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}print(attempt())")
    assert control == repr([os.uname().nodename, True])
