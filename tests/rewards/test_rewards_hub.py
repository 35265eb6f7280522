"""Problems by file or hub name: the real package ``datasets``, offline, on local data in the hub's layout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rewards.errors import ConfigError, DataError
from rewards.task import get_task
from rewards.tasks.hub import problems_from_source

ROOT = Path(__file__).resolve().parents[2]

CARD = """---
configs:
- config_name: main
  data_files: [{split: train, path: main/train.jsonl}, {split: test, path: main/test.jsonl}]
- config_name: other
  data_files: [{split: train, path: other/train.jsonl}]
---
"""

# In a process of its own: the package reads HF_HOME and HF_HUB_OFFLINE when it is imported.
LOAD = """
import json, sys
from rewards.errors import UnmaskError
from rewards.tasks.hub import problems_from_source
assert "datasets" not in sys.modules and "pandas" not in sys.modules, "imported before it is needed"
for source, size in json.loads(sys.argv[1]):
    try:
        problems = problems_from_source(source, task="t", size=size, convert=lambda row: row if row["n"] != 2 else None)
        print(json.dumps([[problem.id, problem.fields] for problem in problems]))
    except UnmaskError as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))
"""


def load(home: Path, sources: list[tuple[str, int]], code: str = LOAD) -> list:
    pytest.importorskip("datasets")
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(sources)], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "train split" not in done.stderr, "a progress bar"
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two configurations as the hub lays it out."""
    folder = tmp_path_factory.mktemp("sets") / "numbers"
    (folder / "main").mkdir(parents=True)
    (folder / "other").mkdir()
    (folder / "README.md").write_text(CARD)
    (folder / "main/train.jsonl").write_text("".join(json.dumps({"n": n, "word": f"w{n}"}) + "\n" for n in range(6)))
    (folder / "main/test.jsonl").write_text(json.dumps({"n": 9, "word": "w9"}) + "\n")
    (folder / "other/train.jsonl").write_text(json.dumps({"n": 7, "word": "a"}) + "\n")
    return folder


def test_rows_in_order_by_configuration_and_split(folder: Path, tmp_path: Path) -> None:
    sources = [
        (f"hub:{folder}:main:train", 4),
        (f"hub:{folder}:main:test", 4),
        (f"hub:{folder}:other:train", 4),
        (f"hub:{folder}:main:train[:3]", 9),
        (f"hub:{folder}:main:train[-2:]", 9),
    ]
    first, test, other, head, tail = load(tmp_path, sources)
    assert first == [[f"t-numbers-train-{n + 1}", {"n": n, "word": f"w{n}"}] for n in (0, 1, 3, 4)], (
        "row 2 is not usable"
    )
    assert [fields["n"] for _, fields in test] == [9] and [fields["n"] for _, fields in other] == [7]
    assert [fields["n"] for _, fields in head] == [0, 1] and [fields["n"] for _, fields in tail] == [4, 5]


def test_every_fault_is_one_sentence_with_a_remedy(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/train.jsonl").write_text('{"n": 1}\n{"n": ')
    faults = [
        (f"hub:{folder}:main:nope", "Unknown split"),
        (f"hub:{folder}:third:train", "BuilderConfig 'third' not found"),
        (f"hub:{folder}:train", "main"),  # two configurations: one must be named
        ("hub:openai/gsm8k:main:train", "the connection"),
        (f"hub:{tmp_path}/none:train", "can't be read"),
        (f"hub:{tmp_path}/broken:train", "can't be read"),
        (f"hub:{folder}:main:train[2:3]", "has no problem for the task t"),
    ]
    answers = load(tmp_path / "home", [(source, 9) for source, _ in faults])
    for (source, part), answer in zip(faults, answers, strict=True):
        assert isinstance(answer, str) and answer.startswith("DataError: ") and "\n" not in answer, source
        assert source in answer and part in answer and len(answer) < 700


def test_a_row_is_bounded(tmp_path: Path) -> None:
    """The bound is set low and counts what lies inside lists and objects too."""
    rows = [{"n": 1, "words": ["a" * 40]}, {"n": 3, "words": ["a" * 40, "b" * 40]}]
    (tmp_path / "long").mkdir()
    (tmp_path / "long/train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = f"hub:{tmp_path}/long:train"
    code = "import rewards.tasks.hub\nrewards.tasks.hub.MAX_ROW = 60\n" + LOAD
    refused, taken = load(tmp_path / "home", [(source, 9), (source, 1)], code)
    assert refused.startswith(f"DataError: {source}, row 2: longer than")
    assert taken == [["t-long-train-1", rows[0]]]


def test_a_named_data_set_is_taken_from_the_cache_without_a_connection(folder: Path, tmp_path: Path) -> None:
    """What ``datasets`` cached under a hub name is found again offline: the cache of the local set, under that name."""
    load(tmp_path, [(f"hub:{folder}:main:train", 9)])
    (made,) = (tmp_path / "datasets/numbers/main/0.0.0").glob("*/dataset_info.json")
    cached = tmp_path / "datasets/someone___numbers/main/0.0.0" / made.parent.name
    cached.parent.mkdir(parents=True)
    made.parent.rename(cached)
    (answer,) = load(tmp_path, [("hub:someone/numbers:main:train", 2)])
    assert answer == [["t-numbers-train-1", {"n": 0, "word": "w0"}], ["t-numbers-train-2", {"n": 1, "word": "w1"}]]


def test_without_the_package(tmp_path: Path) -> None:
    code = "import sys; sys.modules['datasets'] = None\n" + LOAD.replace('"datasets" not in sys.modules and', "")
    (answer,) = load(tmp_path, [("hub:openai/gsm8k:main:train", 2)], code)
    assert answer.startswith("ConfigError: hub:openai/gsm8k:main:train needs the package datasets")
    assert "pip install datasets" in answer


@pytest.mark.parametrize(
    "source",
    ["hub:", "hub:gsm8k", "hub:a:b:c:d", "hub:a::train", "hub::train", "hub:a b:train", "hub:a:train[", "hub:a:main:"],
)
def test_a_source_that_cannot_be_understood(source: str) -> None:
    with pytest.raises(ConfigError, match="hub:NAME:CONFIG:SPLIT"):
        problems_from_source(source, task="t", size=1, convert=lambda row: row)


def test_a_path_is_read_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text('{"numbers": [1, 2, 3], "target": 6}\n')
    monkeypatch.setenv("HOME", str(tmp_path))
    problems = get_task("countdown").problems("test", seed=0, size=5, path="~/a.jsonl")
    assert [problem.id for problem in problems] == ["countdown-a-1"]
    with pytest.raises(DataError, match="No such file"):
        get_task("countdown").problems("test", seed=0, size=5, path="hub.jsonl")


def test_a_task_reads_a_hub_set(tmp_path: Path) -> None:
    rows = [{"nums": [1, 2, 3], "target": 6}, {"nums": [1, 2, 3, 4], "target": 10}, {"nums": [2, 3, 4], "target": 9}]
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code = (
        "import json, sys\n"
        "from rewards.task import get_task\n"
        "[(source, size)] = json.loads(sys.argv[1])\n"
        "problems = get_task('countdown').problems('train', seed=0, size=size, path=source)\n"
        "print(json.dumps([[problem.id, problem.fields] for problem in problems]))\n"
    )
    assert load(tmp_path / "home", [(f"hub:{tmp_path}/set:train", 9)], code) == [
        [
            ["countdown-set-train-1", {"numbers": [1, 2, 3], "target": 6}],
            ["countdown-set-train-3", {"numbers": [2, 3, 4], "target": 9}],
        ]
    ]
