"""Linux calls that shut a process in: namespaces, a root of its own, capabilities, users, rlimits.

Through ctypes, as Python 3.11 has none of them. Used inside processes that shut themselves in. Every function raises
OSError naming the call that the kernel refused.
"""

import contextlib
import ctypes
import os
import platform
import re
import resource
import stat
import sysconfig
import tempfile
from pathlib import Path

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
PROGRAMS_USER, JUDGES_USER = 1, 2

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND = 1, 2, 4, 8, 32, 4096
_MS_REC, _MS_PRIVATE = 16384, 1 << 18
_KEPT_MOUNT_FLAGS = 1 | 2 | 4 | 8  # read-only, nosuid, nodev, noexec: may be locked, so a remount must repeat them
_MNT_DETACH = 2
_CAPBSET_DROP, _SET_SECCOMP, _SET_NO_NEW_PRIVS = 24, 22, 38
_DEVICES = ("null", "zero", "full", "random", "urandom")
_OUTSIDE_ID = 0x78000000  # of the unprivileged users outside: above what SSSD, systemd and others give to accounts
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_ESCAPED = re.compile(rb"\\([0-7]{3})")  # a space and the like in /proc/self/mountinfo

_libc = ctypes.CDLL(None, use_errno=True)
_THIS_PROCESS = (ctypes.c_uint32 * 2)(0x20080522, 0)  # as capset wants it: a version, and 0
_NO_CAPABILITY = (ctypes.c_uint32 * 6)()


def be_the_first_to_go() -> None:
    """When the machine is out of memory, the kernel ends this process and its children before others."""
    with contextlib.suppress(OSError):  # a matter of politeness
        Path("/proc/self/oom_score_adj").write_text("1000")


def unshare(flags: int) -> None:
    _check("unshare", _libc.unshare(flags))


def enter_pid_namespace(fd: int) -> None:
    """Where this process' next children go."""
    _check("setns", _libc.setns(fd, NEWPID))


def enter_user_namespace(flags: int) -> bool:
    """A user namespace, and the other namespaces of ``flags``. This process is its root, and has no power outside.

    Returns whether PROGRAMS_USER and JUDGES_USER exist inside, two unprivileged ones: root can give away ids, others
    only have their own.
    """
    user, group = os.geteuid(), os.getegid()
    spare = _spare_ids() if user == 0 else None
    if spare is None:
        unshare(NEWUSER | flags)
        Path("/proc/self/setgroups").write_text("deny")
        _write_maps("self", f"0 {user} 1\n", f"0 {group} 1\n")
    else:
        _unshare_mapped_by_a_child(flags, f"0 {user} 1\n1 {spare} 2\n", f"0 {group} 1\n1 {spare} 2\n")
        os.setgroups([])
    with contextlib.suppress(OSError):  # where /proc/sys is read-only, the system call filter is left to refuse them
        Path("/proc/sys/user/max_user_namespaces").write_text("0")
    return spare is not None


def hide_names() -> None:
    """The host's name, in a UTS namespace of its own."""
    for call in (_libc.sethostname, _libc.setdomainname):
        _check(call.__name__, call(b"sandbox", len(b"sandbox")))


def _unshare_mapped_by_a_child(flags: int, users: str, groups: str) -> None:
    """A map that gives away ids has to be written by a process that is still root outside."""
    receive, send = os.pipe()
    writer = os.fork()
    if writer == 0:
        os.close(send)
        status = 1
        with contextlib.suppress(OSError):
            if os.read(receive, 1):
                _write_maps(str(os.getppid()), users, groups)
                status = 0
        os._exit(status)
    os.close(receive)
    try:
        unshare(NEWUSER | flags)
        os.write(send, b"x")
    finally:
        os.close(send)
        _, status = os.waitpid(writer, 0)
    if status != 0:
        raise OSError("uid_map: the ids of the user namespace can't be mapped")


def _write_maps(process: str, users: str, groups: str) -> None:
    Path(f"/proc/{process}/gid_map").write_text(groups)
    Path(f"/proc/{process}/uid_map").write_text(users)


def enter_jail() -> None:
    """A root directory that holds this interpreter's library, the system's shared libraries, five devices and an empty
    /tmp; all of it read-only. Needs a mount namespace, and /proc for the last time."""
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    sources = [(path, os.open(path, os.O_PATH | os.O_CLOEXEC)) for path in _visible_paths()]
    root = os.path.realpath(tempfile.gettempdir())
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=1m")
    for path, fd in sources:
        target = root + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            os.makedirs(target, exist_ok=True)
        else:
            Path(target).touch()
        _mount(f"/proc/self/fd/{fd}", target, None, _MS_BIND | _MS_REC)
        os.close(fd)
    for name in ("lib", "lib64"):
        if os.path.islink(f"/{name}"):
            os.symlink(os.readlink(f"/{name}"), f"{root}/{name}")
    os.makedirs(f"{root}/tmp", exist_ok=True)
    for point in _mount_points_under(root):
        flags = os.statvfs(point).f_flag & _KEPT_MOUNT_FLAGS | _MS_RDONLY | _MS_NOSUID
        if not point.startswith(f"{root}/dev/"):
            flags |= _MS_NODEV
        _mount(None, point, None, _MS_REMOUNT | _MS_BIND | flags)
    os.chdir(root)
    _check("pivot_root", _libc.syscall(_PIVOT_ROOT[platform.machine()], b".", b"."))
    _check("umount", _libc.umount2(b".", _MNT_DETACH))
    os.chdir("/")


def mount_scratch(megabytes: int) -> None:
    """A fresh /tmp of this process' mount namespace, in memory, and the working directory there."""
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, f"mode=777,size={megabytes}m,nr_inodes=4096")
    os.chdir("/tmp")


def set_limits(*, cpu_seconds: int, memory_mb: int, processes: int, file_mb: int, open_files: int) -> None:
    """Hard limits; nothing without CAP_SYS_RESOURCE outside can raise them again."""
    megabyte = 1 << 20
    # The soft one first: it ends a process by a signal that tells why.
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    for kind, limit in (
        (resource.RLIMIT_AS, memory_mb * megabyte),
        (resource.RLIMIT_FSIZE, file_mb * megabyte),
        (resource.RLIMIT_NOFILE, open_files),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, 64),
    ):
        resource.setrlimit(kind, (limit, limit))


def forgo_privileges() -> None:
    """This process and those it forks gain no right any more by a file that they execute."""
    capability = 0
    while _libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    _check("prctl", _libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def drop_privileges(user: int | None, system_calls: bytes, *, obeys: int | None = None) -> None:
    """No capability, no other user's rights (where there is a ``user`` to become), and the system call filter. After
    ``forgo_privileges`` there is no way back.

    ``obeys``: another user whose signals reach this process too.
    """
    if user is not None:
        os.setresgid(user, user, user)
        os.setresuid(user, user, user if obeys is None else obeys)  # the filter lets nobody take up the saved id
    _check("capset", _libc.capset(_THIS_PROCESS, _NO_CAPABILITY))
    filter_system_calls(system_calls)


def filter_system_calls(instructions: bytes) -> None:
    """``instructions``: of ``rewards.sandbox.system_calls``. Needs ``forgo_privileges``."""
    described = _FilterProgram(len(instructions) // 8, instructions)
    _check("seccomp", _libc.prctl(_SET_SECCOMP, 2, ctypes.byref(described), 0, 0))


class _FilterProgram(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def _visible_paths() -> list[str]:
    """What the jail shows, shortest first, none inside another."""
    stdlib = os.path.dirname(sysconfig.get_path("stdlib"))
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"]
    wanted = [path for path in system if os.path.isdir(path) and not os.path.islink(path)]
    wanted += [stdlib, os.path.dirname(sysconfig.get_path("platstdlib")), *(f"/dev/{name}" for name in _DEVICES)]
    found: list[str] = []
    for path in sorted(set(wanted), key=len):
        if os.path.exists(path) and not any(path.startswith(outer + "/") for outer in found):
            found.append(path)
    return found


def _mount_points_under(root: str) -> list[str]:
    """The newest mount at ``root`` and those on it. What was mounted below ``root`` before it is still listed, but no
    path leads there any more."""
    top, below = b"", dict[bytes, list[bytes]]()
    places: dict[bytes, bytes] = {}
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        identity, parent, _, _, escaped = line.split(b" ")[:5]
        places[identity] = _ESCAPED.sub(lambda match: bytes([int(match[1], 8)]), escaped)
        below.setdefault(parent, []).append(identity)
        top = identity if places[identity] == os.fsencode(root) else top
    found = [top]
    for identity in found:  # grows while it is read
        found += below.get(identity, [])
    return [os.fsdecode(places[identity]) for identity in found]


def _spare_ids() -> int | None:
    """The first of two ids that exist in the present user namespace and that nobody uses; None in one that has too
    few. Of every process another two, where there are so many."""
    wanted = _OUTSIDE_ID + 2 * os.getpid()
    for name in ("uid_map", "gid_map"):
        ranges = [tuple(map(int, line.split())) for line in Path(f"/proc/self/{name}").read_text().splitlines()]
        last = max(first + count - 1 for first, _, count in ranges)
        wanted = min(wanted, last - 3)  # the last but one of 65,536 is called nobody, and may own something
    return wanted if wanted > 0 else None


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    _check(f"mount {target}", _libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]))


def _check(name: str, result: int) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
