"""Grades a file of completions: ``python -m rewards.grade --task NAME < in.jsonl > out.jsonl``.

``FORMAT`` below says what goes in and out. Every line is answered in order and flushed at once, so that this also
serves as a co-process (write a line, wait for a line).
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

from rewards.command import Parser, reported, results_alone
from rewards.errors import ConfigError, DataError
from rewards.parsing import shorten
from rewards.task import BUILT_IN, Grade, Task, get_task

FORMAT = """\
In, one JSON object a line: "completion", the text to grade; the fields of its problem, in an object "fields" or
beside the completion; and, if you like, "id", a string or a number. A run's samples/completions.jsonl is such a file.

  {"id": "a", "completion": "<answer>(3+5)*2=16</answer>", "fields": {"numbers": [3, 5, 2], "target": 16}}
  {"id": "b", "completion": "<answer>3*5+2=16</answer>", "numbers": [3, 5, 2], "target": 16}

Out, one for every line in: "id"; "correct", the strict verdict; "reward", the sum of "components"; and "error", why it
is wrong or can't be graded. A line that can't be graded gets correct false, reward 0, no components and one sentence
in "error" ("id" null when it is not known); the next lines are graded all the same.

  {"id": "a", "correct": true, "reward": 4.0, "components": {"one_equals": 0.0, ...}, "error": null}

Then, on standard error, how many were graded and how many of those are right.

Exit status: 0; 1 when not one line could be graded, or the reader of the results went away; 2 for a missing or unknown
task."""

MAX_LINE_BYTES = 32 * 2**20
MAX_INTEGER_DIGITS = 100


class _BadLine(Exception):
    """A line that can't be graded; the message says why."""


def grade_line(task: Task, line: bytes, number: int) -> dict[str, Any]:
    """The output record for one input line. Never raises an Exception; ``number`` counts from 1, for messages."""
    known_id = None
    try:
        record = _parse(line)
        known_id = _checked_id(record.pop("id", None))
        return {"id": known_id, **_graded(task, record)}
    except _BadLine as error:
        return {"id": known_id, **_record(Grade(False, {}, f"line {number}: {error}"))}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: see above."""
    return reported(partial(_command, argv))


def _command(argv: Sequence[str] | None) -> int:
    parser = Parser(
        "python -m rewards.grade",
        usage="%(prog)s --task NAME [--judge JSON] < completions.jsonl > grades.jsonl",
        description="Grades completions, stdin to stdout, as JSON lines.",
        epilog=FORMAT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--judge", metavar="JSON", help="settings of a judge, as task.judge has them (docs/tasks.md)")
    parser.add_argument("--task", help=f"{', '.join(sorted(BUILT_IN))}, or your own as module:Class")
    options = parser.parse_args(argv)
    with results_alone() as results:  # a user's task may print
        if options.task is None:
            raise ConfigError(f"--task is missing; name one of {', '.join(sorted(BUILT_IN))}, or give module:Class")
        task = _task(options.task, options.judge)
        task.prepare()
        count = _Count()
        try:
            for number, line in enumerate(_lines(sys.stdin.buffer), start=1):
                grade = grade_line(task, line, number)
                count.add(grade)
                results.write(json.dumps(grade, allow_nan=False) + "\n")
                results.flush()
        except BrokenPipeError:  # the reader has gone, as in "| head"; keep the interpreter's last flush from failing
            os.dup2(os.open(os.devnull, os.O_WRONLY), results.fileno())
            return 1
    print(count.told(), file=sys.stderr)
    return 0


def _task(name: str, judge: str | None) -> Task:
    if judge is None:
        return get_task(name)
    from rewards.judge.judged import load_task  # it takes a third of a second, which most graders need not wait
    from rewards.judge.settings import read_settings

    return load_task(name, read_settings(judge))


@dataclass
class _Count:
    """What became of the lines."""

    lines: int = 0
    graded: int = 0
    right: int = 0
    first_error: str = ""
    """Of the lines that could not be graded."""

    def add(self, grade: dict[str, Any]) -> None:
        self.lines += 1
        self.graded += bool(grade["components"])
        self.right += grade["correct"]
        if not grade["components"]:
            self.first_error = self.first_error or grade["error"]

    def told(self) -> str:
        """Raises DataError when not one line could be graded."""
        if self.graded == 0:
            why = f"none of {self.lines} lines could be graded; {self.first_error}" if self.lines else "no line came in"
            raise DataError(f"{why} (see --help for the format)")
        left = self.lines - self.graded
        rest = f"; {left} lines could not be graded ({self.first_error})" if left else ""
        return f"{self.graded} graded, {self.right} of them right ({self.right / self.graded:.3f}){rest}"


def _lines(source: IO[bytes]) -> Iterator[bytes]:
    """Lines without their end; of one that is over the limit, the first MAX_LINE_BYTES + 1 bytes."""
    while line := source.readline(MAX_LINE_BYTES + 1):
        tail = line
        while not tail.endswith(b"\n") and (tail := source.readline(MAX_LINE_BYTES)):
            pass  # the rest of a line that is too long, or the end of the file
        yield line.removesuffix(b"\n")


def _parse(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise _BadLine(f"longer than {MAX_LINE_BYTES} bytes; shorten the completion")
    try:
        record = json.loads(line.decode("utf-8-sig"), parse_int=_bounded_integer, parse_constant=_refused_constant)
    except UnicodeDecodeError as error:
        raise _BadLine(f"not UTF-8 ({error.reason} at byte {error.start}); convert the file") from None
    except RecursionError:
        raise _BadLine("not usable as JSON (nested too deeply)") from None
    except ValueError as error:
        raise _BadLine(f"not usable as JSON ({error})") from None
    if not isinstance(record, dict):
        raise _BadLine(f"not a JSON object but {shorten(record)}")
    return record


def _bounded_integer(digits: str) -> int:
    if len(digits) > MAX_INTEGER_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _refused_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _checked_id(value: Any) -> Any:
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise _BadLine(f"id must be a string or a number, not {shorten(value)}")


def _graded(task: Task, record: dict[str, Any]) -> dict[str, Any]:
    if "completion" not in record:
        raise _BadLine("the field completion is missing")
    completion = record.pop("completion")
    if not isinstance(completion, str):
        raise _BadLine(f"completion must be a string, not {shorten(completion)}")
    fields = record.get("fields", record)
    if not isinstance(fields, dict):
        raise _BadLine(f"fields must be an object, not {shorten(fields)}")
    try:
        return _record(task.grade(fields, completion))
    except DataError as error:
        raise _BadLine(str(error)) from None
    except Exception as error:  # a user's task may raise anything; the line is lost, the file is not
        raise _BadLine(f"task raised {type(error).__name__}: {str(error)[:300]}") from None


def _record(grade: Grade) -> dict[str, Any]:
    """A grade as JSON values. JSON has no NaN: a component that is not finite becomes null, and so does the reward."""
    components = {str(name): float(value) for name, value in grade.components.items()}
    reward = sum(components.values(), 0.0)
    error = None if grade.error is None else str(grade.error)
    broken = [name for name, value in components.items() if not math.isfinite(value)]
    if not math.isfinite(reward):
        error = f"task returned a reward that is not a finite number (components {', '.join(broken or components)})"
    return {
        "correct": bool(grade.correct),
        "reward": reward if math.isfinite(reward) else None,
        "components": {name: None if name in broken else value for name, value in components.items()},
        "error": error,
    }


if __name__ == "__main__":
    sys.exit(main())
