"""What programs may do in the sandbox: the standard library works, but for what needs a network, other programs or
locks on files."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from rewards.sandbox.local import LocalRunner
from tests.support.sandboxed import LIMITS, ROOT, run


@pytest.fixture(scope="module")
def sandbox() -> Iterator[LocalRunner]:
    runner = LocalRunner()
    yield runner
    runner.close()


PROGRAMS = {
    "files": """
        import os, pathlib, shutil, tempfile
        def f():
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder, "a", "b.txt")
                path.parent.mkdir()
                path.write_text("text")
                shutil.copy2(path, path.with_suffix(".copy"))
                shutil.copytree(path.parent, folder + "/c")
                os.symlink(path, folder + "/link"); os.link(path, folder + "/other")
                os.rename(folder + "/other", folder + "/moved"); os.truncate(path, 2); os.utime(path); path.chmod(0o600)
                with open(path, "r+b") as file:
                    file.seek(1); file.write(b"x"); file.flush(); os.fsync(file.fileno()); file.truncate()
                found = sorted(os.listdir(folder)), len(list(os.walk(folder))), path.stat().st_size, os.access(path, 4)
                shutil.move(folder + "/c", folder + "/d")
                assert path.read_bytes() == b"tx" and os.path.realpath(folder + "/link") == str(path)
                with tempfile.NamedTemporaryFile(), tempfile.SpooledTemporaryFile(), tempfile.TemporaryFile() as file:
                    file.write(b"1")
            return found == (["a", "c", "link", "moved"], 3, 2, True)
    """,
    "formats": """
        import bz2, csv, gzip, hashlib, io, json, lzma, pickle, sqlite3, struct, tarfile, xml.etree.ElementTree, zipfile
        import secrets, uuid, base64, zlib, hmac, configparser
        def f():
            for module in (bz2, gzip, lzma):
                with module.open("file", "wt") as file: file.write("text")
                with module.open("file", "rt") as file: assert file.read() == "text"
            with zipfile.ZipFile("x.zip", "w", zipfile.ZIP_DEFLATED) as archive: archive.write("file")
            with zipfile.ZipFile("x.zip") as archive: archive.extractall("out")
            with tarfile.open("x.tar.gz", "w:gz") as archive: archive.add("out")
            with tarfile.open("x.tar.gz") as archive: archive.extractall("again")
            base = sqlite3.connect(":memory:")
            base.execute("create table t (x)"); base.executemany("insert into t values (?)", [(n,) for n in range(9)])
            assert base.execute("select sum(x) from t").fetchone() == (36,)
            pickle.loads(pickle.dumps({1: [2]})), secrets.token_hex(8), uuid.uuid4(), hashlib.sha256(b"x").hexdigest()
            return True
    """,
    "threads": """
        import concurrent.futures, queue, sched, threading, time
        def f():
            with concurrent.futures.ThreadPoolExecutor(3) as pool:
                assert list(pool.map(abs, [-1, 2, -3])) == [1, 2, 3]
            over, waiting = threading.Event(), queue.Queue()
            timer = threading.Timer(0.01, over.set); timer.start()
            threading.Thread(target=waiting.put, args=(1,), daemon=True).start()
            time.sleep(0.001)
            condition = threading.Condition()
            with condition: condition.wait(0.001)
            return waiting.get(timeout=5) == 1 and over.wait(5)
    """,
    "forked processes": """
        import multiprocessing, os, select, signal
        def work(end, value):
            end.send(value * 2); end.close()
        def f():
            context = multiprocessing.get_context("fork")
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, [1, 2])); process.start()
            assert ours.recv() == [1, 2, 1, 2]
            process.join()
            read, write = os.pipe()
            if (pid := os.fork()) == 0:
                os.write(write, b"x"); signal.pause()
            assert select.select([read], [], [], 5)[0] and os.read(read, 1) == b"x"
            os.kill(pid, signal.SIGTERM)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM and process.exitcode == 0
    """,
    "asyncio": """
        import asyncio, selectors, socket, socketserver, threading
        async def answer(reader, writer):
            writer.write(await reader.readline()); await writer.drain(); writer.close()
        async def talk():
            async with await asyncio.start_unix_server(answer, "socket"):
                reader, writer = await asyncio.open_unix_connection("socket")
                writer.write(b"line\\n")
                line = await asyncio.wait_for(reader.readline(), 5)
                writer.close()
                await asyncio.gather(asyncio.sleep(0.001), asyncio.to_thread(abs, -1))
                return line
        def f():
            a, b = socket.socketpair()
            a.setblocking(False); b.settimeout(1); b.sendall(b"x")
            for kind in (selectors.EpollSelector, selectors.PollSelector, selectors.SelectSelector):
                with kind() as selector:
                    selector.register(a, selectors.EVENT_READ)
                    assert len(selector.select(1)) == 1
            a.shutdown(socket.SHUT_RDWR)
            assert b.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_STREAM
            b.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            return asyncio.run(talk()) == b"line\\n"
    """,
    "time and numbers": """
        import cmath, datetime, decimal, fractions, locale, math, random, resource, statistics, time, zoneinfo
        def f():
            where = zoneinfo.ZoneInfo("Europe/Berlin")
            assert datetime.datetime(2024, 7, 1, 12, tzinfo=where).utcoffset() == datetime.timedelta(hours=2)
            datetime.datetime.now(), time.localtime(), time.perf_counter(), time.process_time(), time.thread_time()
            random.SystemRandom().random(), resource.getrusage(resource.RUSAGE_SELF), resource.getrlimit(0)
            resource.setrlimit(resource.RLIMIT_NOFILE, (16, 32))
            time.sleep(0.001)
            return decimal.Decimal(2).sqrt() > 1 and statistics.stdev(range(9)) > 2 and random.random() < 1
    """,
    "signals": """
        import signal, time
        def late(number, frame): raise TimeoutError
        def f():
            signal.signal(signal.SIGALRM, late); signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.alarm(5); signal.alarm(0)
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
            signal.raise_signal(signal.SIGUSR1)
            assert signal.sigpending() == {signal.SIGUSR1} and signal.sigtimedwait([signal.SIGUSR1], 1)
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            try:
                while True: time.sleep(1)
            except TimeoutError:
                return True
    """,
    "memory": """
        import ctypes, gc, mmap, os, sys, weakref
        from multiprocessing import shared_memory
        def f():
            with mmap.mmap(-1, 1 << 20) as area:
                area[:3] = b"abc"; area.flush()
            with open("file", "wb+") as file:
                file.truncate(4096)
                with mmap.mmap(file.fileno(), 4096) as area:
                    area[0:1] = b"x"; area.flush(); area.resize(8192)
            compare = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int))
            numbers = (ctypes.c_int * 3)(3, 1, 2)
            ctypes.CDLL(None).qsort(numbers, 3, 4, compare(lambda a, b: a[0] - b[0]))
            gc.collect(); os.cpu_count(); os.sched_getaffinity(0); x = bytearray(50 << 20); del x
            return list(numbers) == [1, 2, 3]
    """,
    "standard streams": """
        import argparse, contextlib, getpass, io, logging, os, platform, shutil, sys, traceback, warnings
        def f():
            logging.basicConfig(); logging.warning("x"); warnings.warn("y"); shutil.get_terminal_size()
            assert sys.stdin.read() == "" and not sys.stdout.isatty() and platform.system() == "Linux"
            with contextlib.redirect_stdout(io.StringIO()) as out: print("caught")
            os.getcwd(), os.umask(0o77), os.getpid(), os.getppid(), os.uname(), os.times(), os.getuid(), os.getgroups()
            return out.getvalue() == "caught\\n"
    """,
    "all modules": """
        import pkgutil, sys
        def f():
            missing = []
            for name in sorted(sys.stdlib_module_names - {"antigravity", "this", "idlelib", "lib2to3", "turtledemo"}):
                if "test" not in name:
                    try:
                        __import__(name)
                    except ImportError:
                        pass
                    except BaseException as error:
                        missing.append(f"{name} {error!r}")
            return missing or True
    """,
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_may(sandbox: LocalRunner, name: str) -> None:
    outcome = run(sandbox, PROGRAMS[name], "assert f() is True, f()")
    assert outcome.status == "passed", outcome


REFUSED = {
    "another program": "import subprocess\ndef f(): subprocess.run(['/bin/true'])",
    "a connection": "import urllib.request\ndef f(): urllib.request.urlopen('http://127.0.0.1')",
    "a lock on a file": "import fcntl\ndef f(): fcntl.lockf(open('x', 'w'), fcntl.LOCK_EX)",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_program_may_not_have(sandbox: LocalRunner, name: str) -> None:
    outcome = run(sandbox, REFUSED[name], "f()", limits=LIMITS)
    assert outcome.status == "failed" and "rror" in (outcome.error or ""), outcome


@pytest.mark.parametrize("names", [[], ["a folder"], ["one", "one/two", b"\xe9t\xe9"]], ids=["none", "one", "several"])
def test_what_is_mounted_below_tmp_changes_nothing(names: list[str | bytes]) -> None:
    """AppImages, volumes and network folders are mounted there. The control: so are these."""
    program = f"""
import os, subprocess, tempfile
from rewards.sandbox.local import LocalRunner
from rewards.sandbox.runner import Job, Limits
with tempfile.TemporaryDirectory(dir=tempfile.gettempdir()) as folder:
    points = [os.path.join(os.fsencode(folder), os.fsencode(name)) for name in {names}]
    for point in points:
        os.mkdir(point)
        subprocess.run(["mount", "-t", "tmpfs", "none", point], check=True)
    runner = LocalRunner()
    print(runner.run(Job("def f(): return 1", ("assert f() == 1",), {{"f": "f"}}), Limits()).status)
    runner.close()
    print(all(map(os.path.ismount, points)))
    for point in reversed(points):
        subprocess.run(["umount", point], check=True)
"""
    command = ["unshare", "--mount", "--map-root-user", "--propagation", "private", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout == "passed\nTrue\n", done.stderr
