"""Compares the packages that deploy/'s lists pin with the known vulnerabilities of OSV (https://osv.dev).

    python deploy/audit.py [DATABASE]

DATABASE is an export of OSV's records for PyPI, as a zip file or as a folder of its JSON files, for a machine without a
network; when it is not given, the current export is downloaded. The exit status is 0 when no record names a pinned
version, 1 when one does, and 3 when that could not be found out: no database, or records that can't be read.
"""

import http.client
import json
import re
import sys
import tempfile
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from packaging.version import InvalidVersion, Version

URL = "https://osv-vulnerabilities.storage.googleapis.com/PyPI/all.zip"
TIME_LIMIT_S = 300
SILENCE_LIMIT_S = 20
LISTS = [Path(__file__).with_name(name) for name in ("constraints.txt", "requirements-cluster.txt")]
UNKNOWN = 3


def main(arguments: list[str]) -> int:
    try:
        records, database = (read(Path(arguments[0])), arguments[0]) if arguments else (download(), URL)
        return report(records, database)
    except (OSError, ValueError, http.client.HTTPException, zipfile.BadZipFile, zlib.error, RuntimeError) as problem:
        remedy = "" if arguments else f"; without a network, fetch {URL} elsewhere and run make audit AUDIT_DB=all.zip"
        print(f"error: the pinned packages could not be audited: {problem}{remedy}", file=sys.stderr)
        return UNKNOWN


def report(records: Iterator[tuple[str, Any]], database: str) -> int:
    pins = dict(pin for file in LISTS for pin in pinned(file))
    count, newest, found, unclear = 0, "", 0, 0
    for name, record in records:
        try:
            count, newest = count + 1, max(newest, record["modified"])
            packages = set() if "withdrawn" in record else affected_packages(record, pins)
        except (AttributeError, KeyError, TypeError, InvalidVersion) as problem:
            unclear += 1
            print(f"can't read {name!r}: {problem!r}")
            continue
        for package in sorted(packages):
            found += 1
            names = ", ".join([record["id"], *record.get("aliases", [])])
            print(f"{package} {pins[package]}: {names!r} {record.get('summary', '')!r}")  # quoted: others' text
    if not count:
        raise ValueError(f"{database} holds no record")
    print(f"{len(pins)} pinned packages, {count} records up to {newest}: {found} found, {unclear} records not readable")
    return 1 if found else UNKNOWN if unclear else 0


def pinned(file: Path) -> list[tuple[str, Version]]:
    return [(normalised(name), Version(v)) for name, v in re.findall(r"^([\w.-]+)==([^\s;]+)", file.read_text(), re.M)]


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# ---- what a record says (https://ossf.github.io/osv-schema)


def affected_packages(record: dict[str, Any], pins: dict[str, Version]) -> set[str]:
    """Those of ``pins`` that the record names with the version that is pinned."""
    with_package = [entry for entry in record.get("affected", []) if "package" in entry]
    named = [(normalised(entry["package"]["name"]), entry) for entry in with_package]
    return {name for name, entry in named if name in pins and is_affected(pins[name], entry)}


def is_affected(version: Version, entry: dict[str, Any]) -> bool:
    if entry["package"]["ecosystem"] != "PyPI":
        return False
    ranges = [r["events"] for r in entry.get("ranges", []) if r["type"] == "ECOSYSTEM"]  # others count git's commits
    return any(same(version, text) for text in entry.get("versions", [])) or any(in_range(version, r) for r in ranges)


def same(version: Version, text: str) -> bool:
    try:
        return version == Version(text)
    except InvalidVersion:
        return False  # such as "2004d": from before versions had a form, while every pin has it


def in_range(version: Version, events: list[dict[str, str]]) -> bool:
    """The last event at or before ``version`` decides: it is affected from "introduced" on, up to before "fixed"."""
    inside = False
    for at, kind in sorted((Version(text), kind) for event in events for kind, text in event.items()):
        if kind == "introduced" and at <= version:
            inside = True
        elif (kind == "fixed" and at <= version) or (kind == "last_affected" and at < version):
            inside = False
    return inside


# ---- where the records come from


def read(database: Path | IO[bytes]) -> Iterator[tuple[str, Any]]:
    """Name and content of each record."""
    if isinstance(database, Path) and database.is_dir():
        for file in sorted(database.rglob("*.json")):
            yield str(file), parsed(file.name, file.read_bytes())
        return
    with zipfile.ZipFile(database) as archive:
        for name in archive.namelist():
            yield name, parsed(name, archive.read(name))


def parsed(name: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError as problem:
        raise ValueError(f"{name} is no JSON: {problem}") from None


def download() -> Iterator[tuple[str, Any]]:
    end = time.monotonic() + TIME_LIMIT_S
    with tempfile.TemporaryFile() as file:
        with urllib.request.urlopen(URL, timeout=SILENCE_LIMIT_S) as answer:
            while block := answer.read(1 << 20):
                file.write(block)
                if time.monotonic() > end:
                    raise TimeoutError(f"{URL} sent only {file.tell()} bytes in {TIME_LIMIT_S} s")
        yield from read(file)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
