"""What a job says is nowhere in the memory that the next one starts with, which is the server's."""

from collections.abc import Iterator

import pytest

from rewards.sandbox.local import LocalRunner
from rewards.sandbox.runner import Job
from tests.support.sandboxed import LIMITS


@pytest.fixture(scope="module")
def sandbox() -> Iterator[LocalRunner]:
    runner = LocalRunner()
    yield runner
    runner.close()


PLACES = ("OUTPUT", "ERRORS", "LATE", "PROGRAM", "SETUP", "PREAMBLE", "TEST", "NAME", "DESCRIPTORS", "REPORT")
_ANY = "|".join(PLACES)
# The pages around the heap and around the interpreter's objects, those that are there. The text of the pattern is not
# what it looks for.
SCAN = f"""
import ctypes, os, re
libc = ctypes.CDLL(None, use_errno=True)
libc.sbrk.restype = ctypes.c_void_p
read, write = os.pipe()
def there(address):
    return libc.write(write, ctypes.c_void_p(address), 1) == 1 and bool(os.read(read, 1))
def scan():
    middle, found = id(object()), set()
    for first, last in ((libc.sbrk(0) - (24 << 20), libc.sbrk(0)), (middle - (32 << 20), middle + (32 << 20))):
        for page in range(first & ~4095, last, 4096):
            if there(page):
                found.update(re.findall(b"[M]ARKED({_ANY})", ctypes.string_at(page, 4096)))
    return sorted(word.decode() for word in found)
"""


def speaks(sandbox: LocalRunner) -> None:
    """Two jobs that leave a mark wherever a job can: the second ends in the middle of its verdict."""
    program = """
import sys
MARKEDPROGRAM = 'MARKEDPROGRAM'
def MARKEDNAME(): print('MARKEDLATE' * 3000, flush=True)
print('MARKEDOUTPUT' * 3000, flush=True)
print('MARKEDERRORS' * 3000, file=sys.stderr, flush=True)
"""
    everywhere = """
import os
for fd in range(16):
    try: os.write(fd, b'MARKEDDESCRIPTORS' * 1000)
    except OSError: pass
"""
    names = {"MARKEDNAME": "MARKEDNAME"}
    tests = ("MARKEDNAME() #MARKEDTEST", "raise ValueError('MARKEDREPORT' * 20)")
    outcome = sandbox.run(Job(program, tests, names, "x = 'MARKEDSETUP'", "x = 'MARKEDPREAMBLE'"), LIMITS)
    assert outcome.status == "failed" and "MARKEDREPORT" in str(outcome.tests[1])
    assert len(outcome.stdout) == len(outcome.stderr) == 16 << 10, "the beginning is kept"
    assert outcome.stdout.startswith("MARKEDOUTPUT") and outcome.stderr.startswith("MARKEDERRORS")
    assert sandbox.run(Job(program, (everywhere,), names), LIMITS).status == "crashed"


def test_nothing_of_a_job_is_in_the_next_ones_memory(sandbox: LocalRunner) -> None:
    speaks(sandbox)
    check = "found = scan(); assert found == [], found"
    scanned = sandbox.run(Job(SCAN, (check,), {"scan": "scan"}), LIMITS)
    assert scanned.status == "passed", scanned
    judged = sandbox.run(Job("", (f"{SCAN}\n{check}",)), LIMITS)
    assert judged.status == "passed", judged


def test_the_scan_finds_what_a_job_holds_itself(sandbox: LocalRunner) -> None:
    """The control: in small objects and in large ones."""
    held = f"held = ['MARKED' + word for word in {PLACES[1:]}]\nbig = ('MARKED' + '{PLACES[0]}') * 3000\n"
    check = f"found = scan(); assert found == {sorted(PLACES)}, found"
    outcome = sandbox.run(Job(SCAN + held, (check,), {"scan": "scan"}), LIMITS)
    assert outcome.status == "passed", outcome
    outcome = sandbox.run(Job("", (f"{SCAN}\n{held}\n{check}",)), LIMITS)
    assert outcome.status == "passed", outcome
