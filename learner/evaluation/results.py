"""results.jsonl: what has been evaluated so far, one line a chunk, so that an evaluation can go on where it stopped.

The first line holds the settings that decide what every completion looks like, and their key; the grid is not among
them, as every chunk names its cell. Only whole lines count: the last one may be torn by a kill.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from learner.runs.atomic import disk_errors
from learner.runs.directory import make_folder
from learner.runs.lock import FileLock, Held
from learner.settings.arguments import flat
from rewards.errors import ConfigError, DataError

if TYPE_CHECKING:  # the results can be read without Ray
    from rollout.messages import EvalReport

FORMAT = 1
POLICIES = ("base", "adapter")


@dataclass(frozen=True)
class ChunkId:
    """The chunk-th slice of the problems, decoded by a policy ("base" or "adapter") in a cell's way."""

    cell: str
    policy: str
    chunk: int


@dataclass(frozen=True)
class Chunk:
    """What a chunk gave: a mapping per problem (id, correct, nfe, tokens, components, completions), in order."""

    problems: list[dict[str, Any]]
    grader_failures: int
    generate_s: float

    @classmethod
    def of(cls, report: "EvalReport") -> "Chunk":
        problems = [
            {
                "id": result.problem_id,
                "correct": [int(right) for right in result.correct],
                "nfe": list(result.nfe),
                "tokens": list(result.tokens),
                "components": {
                    name: [value if math.isfinite(value) else None for value in values]
                    for name, values in result.components.items()
                },
                "completions": list(result.completions),
            }
            for result in report.results
        ]
        return cls(problems, sum(result.grader_failures for result in report.results), report.generate_s)


def rewards_of(problem: Mapping[str, Any]) -> list[float]:
    """Of each completion of a chunk's problem: the sum of its components, of which one without a number counts
    nothing."""
    parts = problem["components"].values()
    return [sum(value or 0.0 for value in given) for given in zip(*parts, strict=True)]


def read_chunks(path: Path) -> dict[ChunkId, Chunk]:
    """What a results.jsonl holds that nobody writes any more.

    Raises:
        DataError: it can't be read.
    """
    try:
        _, *lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path} can't be read: {error}") from error
    # Of a chunk that is there twice the first counts, as in ``ResultsFile``.
    return {at: chunk for at, chunk, _ in reversed([*filter(None, map(_parsed, lines))])}


def _parsed(line: bytes) -> tuple[ChunkId, Chunk, str | None] | None:
    """A chunk with the identity of the code that it is of; None for a line that a kill has torn."""
    try:
        row = json.loads(line)
        at = ChunkId(row["cell"], row["policy"], row["chunk"])
        return at, Chunk(row["problems"], row["grader_failures"], row["generate_s"]), row.get("code")
    except (ValueError, KeyError, TypeError):
        return None


def settings_key(settings: Mapping[str, Any]) -> str:
    """Names the settings, 16 hex digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class ResultsFile:
    """The open file, which this process alone may write.

    Args:
        settings: JSON-able; what all completions depend on.
        code: identity of the source; completions of other code are kept, and ``other_code`` says that there are some.
        shared: a folder that is made is not the owner's alone (``run.shared``).

    Raises:
        ConfigError: the file is of other settings, or another process writes it.
        UnmaskError: the disk refuses.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, code: str, shared: bool = False) -> None:
        self.path = path
        self.chunks: dict[ChunkId, Chunk] = {}
        self.dropped_lines = 0
        self.other_code = False
        self._code = code
        with disk_errors(path):
            make_folder(path.parent, shared=shared)
        with contextlib.ExitStack() as opened, disk_errors(path):
            opened.enter_context(self._lock())
            self._file = opened.enter_context(open(path, "a+b", buffering=0))
            self._read(settings)
            self._opened = opened.pop_all()

    def append(self, at: ChunkId, chunk: Chunk) -> None:
        """Add a chunk and bring it to disk."""
        self._write_line({**vars(at), **vars(chunk), "code": self._code})
        self.chunks[at] = chunk

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> "ResultsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> FileLock:
        try:
            return FileLock(self.path.with_suffix(".lock"))
        except Held as holder:
            raise ConfigError(
                f"{self.path} is being written by another evaluation ({holder}); wait for it, or give out="
            ) from None

    def _read(self, settings: Mapping[str, Any]) -> None:
        self._file.seek(0)
        *lines, torn = self._file.read().split(b"\n")
        if torn:
            self.dropped_lines += 1
            self._file.truncate(self._file.tell() - len(torn))
        if not lines:
            header = {"format": FORMAT, "key": settings_key(settings), "settings": dict(settings), "code": self._code}
            self._write_line(header)
            return
        self._check_header(lines[0], settings)
        for line in lines[1:]:
            parsed = _parsed(line)
            if parsed is None:
                self.dropped_lines += 1
                continue
            at, chunk, code = parsed
            self.other_code |= code != self._code
            self.chunks.setdefault(at, chunk)

    def _check_header(self, line: bytes, settings: Mapping[str, Any]) -> None:
        try:
            header = json.loads(line)
            found, before = header["format"], header["settings"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{self.path} is not the results of an evaluation; give another out=") from None
        if found != FORMAT:
            raise ConfigError(f"{self.path} has results format {found}, this version reads {FORMAT}; give another out=")
        old, new = flat(before), flat(settings)
        changes = [f"{key} {old.get(key)} -> {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)]
        if changes:
            raise ConfigError(
                f"{self.path} holds results of other settings ({'; '.join(changes)}); "
                "set them back, give another out=, or delete that file"
            )

    def _write_line(self, row: Mapping[str, Any]) -> None:
        with disk_errors(self.path):
            left = json.dumps(row, allow_nan=False).encode() + b"\n"
            while left:  # a full disk takes a part, then raises
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
