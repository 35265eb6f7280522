"""Problem files: every format, and every fault named by file and line. Finding tasks by name."""

import csv
import gzip
import io
import json
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from rewards import files
from rewards.cells import listed, whole
from rewards.errors import ConfigError, DataError
from rewards.task import Grade, get_task

ROOT = Path(__file__).resolve().parents[2]
PUZZLE, SOLUTION = "0321003004002100", "4321123434122143"
FIELDS = {"puzzle": PUZZLE, "solution": SOLUTION}
CSV = f"Puzzle,Solution\n{PUZZLE},{SOLUTION}\n"
JSONL = json.dumps(FIELDS) + "\n"


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", CSV.encode()),
        ("a.csv", ("\ufeff" + CSV.replace("\n", "\r\n")).encode()),
        ("a.csv.gz", gzip.compress(CSV.encode())),
        ("a.jsonl", JSONL.encode()),
        ("a.jsonl", (JSONL + "\n\n").encode()),
        ("a.jsonl.gz", gzip.compress(JSONL.encode())),
        ("a.jsonl", json.dumps({"puzzle": PUZZLE}).encode()),
        ("A.CSV", CSV.encode()),
        ("A.JSONL.GZ", gzip.compress(JSONL.encode())),
        ("a.csv", CSV.replace("Puzzle,", " Puzzle ,").encode()),
        ("a.tsv", CSV.replace(",", "\t").encode()),
        ("a.tsv.gz", gzip.compress(CSV.replace(",", "\t").encode())),
        ("a.json", JSONL.encode()),
        ("a.json", json.dumps([FIELDS]).encode()),
        ("a.json", ("\ufeff\n" + json.dumps([FIELDS], indent=2) + "\n").encode()),
        ("a.json.gz", gzip.compress(json.dumps([FIELDS]).encode())),
        ("a.parquet", parquet([FIELDS])),
        ("A.PARQUET", parquet([FIELDS | {"other": [1.5, None]}])),
    ],
    ids=[
        *("csv", "csv with BOM and CRLF", "csv.gz", "jsonl", "blank lines", "jsonl.gz", "solution worked out"),
        *(
            "CSV",
            "JSONL.GZ",
            "spaces in the head",
            "tsv",
            "tsv.gz",
            "json by lines",
            "json list",
            "json list over lines",
        ),
        *("json.gz", "parquet", "PARQUET with a nested column"),
    ],
)
def test_formats(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    problems = get_task("sudoku").problems("test", seed=0, size=10, path=str(path))
    assert [problem.fields for problem in problems] == [FIELDS]


def test_rows_come_in_file_order_up_to_size(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    rows = [{"nums": [1, 2, number], "target": 3} for number in range(5)] + [{"nums": [1, 2, 3, 4], "target": 3}]
    path.write_text("\n".join(map(json.dumps, rows)))
    task = get_task("countdown")
    problems = task.problems("train", seed=0, size=3, path=str(path))
    assert [problem.fields["numbers"][2] for problem in problems] == [0, 1, 2]
    assert [problem.id for problem in problems] == ["countdown-c-1", "countdown-c-2", "countdown-c-3"]
    assert len(task.problems("train", seed=0, size=100, path=str(path))) == 5, "four numbers are passed over"


@pytest.mark.parametrize("indent", [None, 0, 2])
def test_elements_of_a_json_list_are_told_apart_wherever_they_stand(indent: int | None, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps([{"nums": [1, 2, number], "target": 3} for number in range(3)], indent=indent))
    problems = get_task("countdown").problems("train", seed=0, size=3, path=str(path))
    assert [problem.id for problem in problems] == ["countdown-c-1", "countdown-c-2", "countdown-c-3"]


FAULTS = [
    ("sudoku", "a.csv", CSV + f"{PUZZLE[1:]},{SOLUTION}\n", r"a\.csv, line 3: .*leading zeros"),
    ("sudoku", "a.csv", CSV + f"{PUZZLE}\n", None),
    ("sudoku", "a.csv", CSV + f"{PUZZLE},{'1' * 16}\n", "line 3: solution .* does not solve"),
    ("sudoku", "a.csv", "question,answer\n1,2\n", "line 2: puzzle must be 16 digits .* not None"),
    ("sudoku", "a.csv", "", "no problem for the task sudoku"),
    ("sudoku", "a.jsonl", json.dumps({"puzzle": "0" * 16}), "line 1: puzzle 0000000000000000 has 288 solutions"),
    ("countdown", "a.jsonl", '{"nums": [1, 2, 3], "target": 6}\n{"nums"', "line 2: not JSON"),
    ("countdown", "a.jsonl", "[1]\n", "line 1: not a JSON object"),
    ("countdown", "a.jsonl", "[" * 100_000, "line 1: not JSON"),
    ("countdown", "a.jsonl", '{"input": "1,2,x", "output": "6"}', "line 1: each of numbers"),
    ("countdown", "a.jsonl", '{"input": "1,2,3", "output": "six"}', "line 1: target must be an integer"),
    ("countdown", "a.jsonl", '{"nums": [1, 2, 3, 4], "target": 6}', "no problem for the task countdown"),
    ("countdown", "a.json", '[{"nums": [1, 2, 3],\n"target": 6},\n\n{"nums"', "line 4: not JSON"),
    ("countdown", "a.json", '[{"nums": [1, 2, 3], "target": 6} {}]', "line 1: not JSON .neither a comma"),
    ("countdown", "a.json", '[{"nums": [1, 2, 3], "target": 6}', "line 1: not JSON .neither a comma"),
    ("countdown", "a.json", "[1]", "line 1: not a JSON object"),
    ("countdown", "a.json", '[{"a": ' + "[" * 100_000, "line 1: not JSON"),
    ("countdown", "a.json", "[]", "no problem for the task"),
    ("countdown", "a.parquet", "PAR1 and no more", "can't be read|not parquet"),
    ("countdown", "a.parquet.gz", "", "file type is not known"),
    ("gsm8k", "a.jsonl", '{"question": "a \\ud800 b", "answer": "#### 2"}', "line 1: half of a surrogate pair"),
    ("gsm8k", "a.jsonl", '{"question": "q", "answer": null}', "answer must be the gold answer as text, not None"),
    ("gsm8k", "a.jsonl", '{"question": "q", "answer": NaN}', "answer must be a number .* not 'nan'"),
    ("gsm8k", "a.jsonl", '{"question": "q", "answer": [1]}', r"answer must be the gold answer as text, not \[1\]"),
    ("countdown", "a.txt", "", "file type is not known"),
    ("countdown", "a.jsonl.gz", "not gzip", "can't be read"),
]


@pytest.mark.parametrize(("task", "name", "content", "message"), FAULTS)
def test_faults_name_the_file_and_line(tmp_path: Path, task: str, name: str, content: str, message: str | None) -> None:
    path = tmp_path / name
    path.write_text(content)
    if message is None:  # a row without a solution: it is unique, so it is worked out
        assert len(get_task(task).problems("test", seed=0, size=9, path=str(path))) == 2
        return
    with pytest.raises(DataError, match=message) as caught:
        get_task(task).problems("test", seed=0, size=9, path=str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("answer", ["18", "18.0", "1.8e1", '"18"', '"9*2 = #### 18"'])
def test_a_gold_number_may_be_a_number(tmp_path: Path, answer: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"question": "a \\ud83d\\ude00", "answer": {answer}}}\n')
    (problem,) = get_task("gsm8k").problems("train", seed=0, size=1, path=str(path))
    assert problem.fields == {"question": "a \U0001f600", "answer": "18"}


@pytest.mark.parametrize(
    "text, value",
    [
        ("[44, 19, 35]", [44, 19, 35]),
        (" ['a', \"it's\"]", ["a", "it's"]),
        ('["a", "b"]', ["a", "b"]),
        ("[{'role': 'user', 'content': 'x'}]", [{"role": "user", "content": "x"}]),
        ("44, 19", "44, 19"),
        ("[open('x')]", "[open('x')]"),
        ("[" * 100_000, "[" * 100_000),
        ("[x] a text", "[x] a text"),
        ([1], [1]),
        (None, None),
    ],
)
def test_lists_that_came_as_text(text: object, value: object) -> None:
    assert listed(text) == value


@pytest.mark.parametrize(
    "value, number",
    [(18.0, 18), ("18", 18), ("18.0", 18), (18, 18), (1.5, 1.5), ("1_8", "1_8"), ("x", "x"), ("9" * 5000, "9" * 5000)],
)
def test_whole_numbers_that_came_as_something_else(value: object, number: object) -> None:
    assert whole(value) == number and type(whole(value)) is type(number)


def test_a_long_field_of_a_csv_is_read(tmp_path: Path) -> None:
    path = tmp_path / "big.csv"
    path.write_text(f'question,answer\n"{"x" * 140_000}","#### 2"\n')
    (problem,) = get_task("gsm8k").problems("train", seed=0, size=1, path=str(path))
    assert len(problem.fields["question"]) == 140_000


def test_a_json_list_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([FIELDS] * 3))
    assert len(list(files.read_rows(str(path)))) == 3
    monkeypatch.setattr(files, "MAX_LIST", path.stat().st_size - 1)
    with pytest.raises(DataError, match="write it as .jsonl"):
        list(files.read_rows(str(path)))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    task = get_task("sudoku")
    with pytest.raises(DataError, match="No such file"):
        task.problems("test", seed=0, size=9, path=str(tmp_path / "none.csv"))
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress((CSV + f"{PUZZLE},{SOLUTION}\n" * 5000).encode())[:-20])
    with pytest.raises(DataError, match="can't be read"):
        task.problems("test", seed=0, size=10**6, path=str(tmp_path / "cut.csv.gz"))
    (tmp_path / "latin.csv").write_bytes(b"Puzzle,Solution\n\xe9,1\n")
    with pytest.raises(DataError, match="can't be read"):
        task.problems("test", seed=0, size=9, path=str(tmp_path / "latin.csv"))
    with pytest.raises(ConfigError, match="size is 0"):
        task.problems("test", seed=0, size=0, path=str(tmp_path / "none.csv"))


def write(path: Path, text: str) -> None:
    data = text.encode()
    path.write_bytes(gzip.compress(data, 1) if path.name.endswith(".gz") else data)


LONG = "a" * files.MAX_ROW
TOO_LONG = [
    ("jsonl", 2, JSONL + json.dumps({"puzzle": LONG})),
    ("jsonl", 3, JSONL + "\n" + "[" * (files.MAX_ROW + 1)),
    ("json", 2, f'[{JSONL.strip()},\n{{"puzzle": "{LONG}"}}]'),
    ("jsonl", 1, " " * (files.MAX_ROW + 1)),
    ("csv", 1, f"{LONG},Solution\n"),
    ("csv", 3, CSV + f'{PUZZLE},"{LONG}"\n'),
    ("csv", 3, CSV + "1," * files.MAX_ROW + "\n"),
    ("csv", 18, CSV + f'{PUZZLE},"' + ("a" * 2**20 + "\n") * 20 + '"\n'),  # no line of it is too long, the row is
]


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize(("kind", "line", "text"), TOO_LONG, ids=[f"{row[0]} {i}" for i, row in enumerate(TOO_LONG)])
def test_a_row_is_bounded(
    tmp_path: Path, long_fields: None, monkeypatch: pytest.MonkeyPatch, kind: str, line: int, text: str, end: str
) -> None:
    path = tmp_path / f"a.{kind}{end}"
    write(path, text)
    message = f"{path}, line {line}: longer than {files.MAX_ROW} characters"
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        list(files.read_rows(str(path)))
    assert len(str(caught.value)) < 300
    monkeypatch.setattr(files, "MAX_ROW", 10 * files.MAX_ROW)  # the control
    if kind == "csv":
        assert len(list(files.read_rows(str(path)))) == len(text.split(PUZZLE)) - 1 + ("1,1," in text)


@pytest.fixture
def long_fields() -> Iterator[None]:
    """csv's own bound on a field, far below ours, is off."""
    limit = csv.field_size_limit(2**30)
    yield
    csv.field_size_limit(limit)


def test_the_longest_row_is_read(tmp_path: Path) -> None:
    text = json.dumps({"puzzle": "a" * (files.MAX_ROW - 15)}) + "\n"
    assert len(text) == files.MAX_ROW
    for name in ("a.jsonl", "a.jsonl.gz"):
        write(tmp_path / name, text * 2)
        assert [number for number, _, _ in files.read_rows(str(tmp_path / name))] == [1, 2]


@pytest.mark.parametrize("line", [JSONL, "\n"], ids=["rows", "blank lines"])
def test_a_gzipped_file_of_many_short_lines_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.setattr(files, "MAX_UNPACKED", 1000 * len(line))
    for name in ("a.jsonl", "a.jsonl.gz"):
        write(tmp_path / name, line * 1001)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz, line 1001: the file unpacks to more than \d+ characters"):
        list(files.read_rows(str(tmp_path / "a.jsonl.gz")))
    list(files.read_rows(str(tmp_path / "a.jsonl")))  # its size can be seen


# 512 MiB of text in half a megabyte, read by a process that may have 300 MiB.
BOMB = """
import gzip, resource, sys
from rewards.errors import DataError
from rewards.files import read_rows
resource.setrlimit(resource.RLIMIT_DATA, (300 * 2**20,) * 2)
try:
    next(read_rows(sys.argv[1]))
except DataError as error:
    print("refused" if "line 1: longer than" in str(error) else error)
try:
    gzip.open(sys.argv[1], "rt").readline()
except MemoryError:
    print("out of memory")
"""


@pytest.mark.slow
def test_a_line_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path: Path) -> None:
    packer = zlib.compressobj(1, wbits=31)
    block = b"a" * 2**20
    data = b"".join([packer.compress(b'{"question": "'), *(packer.compress(block) for _ in range(512)), packer.flush()])
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(data)
    assert len(data) < 4 * 2**20
    done = subprocess.run([sys.executable, "-c", BOMB, path], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stdout.split("\n") == ["refused", "out of memory", ""], done.stderr


def test_unknown_tasks() -> None:
    with pytest.raises(ConfigError, match="'sudku'; known tasks are antibody_cdr, .*, countdown, .*, sudoku_spg, or"):
        get_task("sudku")
    with pytest.raises(ConfigError, match="can't be imported"):
        get_task("no_such_module_at_all:Task")
    with pytest.raises(ConfigError, match="can't be imported"):
        get_task("rewards.tasks.sudoku:Missing")
    with pytest.raises(ConfigError, match="not a subclass"):
        get_task("fractions:Fraction")
    with pytest.raises(ConfigError, match="lacks grade, messages, problems, validate_fields"):
        get_task("rewards.task:Task")


def test_a_users_own_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_task_for_tests.py").write_text(
        "from rewards.task import Grade, Problem, Task\n"
        "class Echo(Task):\n"
        "    name = 'echo'\n"
        "    components = ('same',)\n"
        "    def problems(self, split, *, seed, size, path=None):\n"
        "        return [Problem(f'echo-{split}-{i}', {'word': f'{split}{i}'}) for i in range(size)]\n"
        "    def messages(self, fields): return [{'role': 'user', 'content': fields['word']}]\n"
        "    def validate_fields(self, fields): pass\n"
        "    def grade(self, fields, completion):\n"
        "        same = fields['word'] == completion\n"
        "        return Grade(same, {'same': float(same)})\n"
        "class Nameless(Echo):\n"
        "    pass\n"
        "del Echo.name\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="lacks the class attributes name"):
        get_task("own_task_for_tests:Nameless")
    sys.modules["own_task_for_tests"].Echo.name = "echo"
    task = get_task("own_task_for_tests:Echo")
    assert task.grade({"word": "a"}, "a") == Grade(True, {"same": 1.0})
    train, test = task.problems("train", seed=0, size=3), task.problems("test", seed=0, size=3)
    task.check_disjoint(train, test)
    with pytest.raises(DataError, match="echo-train-0"):
        task.check_disjoint(train, train)
