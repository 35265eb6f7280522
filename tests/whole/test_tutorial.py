"""docs/tutorial.md is executed: its files are written, its commands run as they stand, and it keeps its promises."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.real_runs import clean_environment

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "tutorial.md"
FILE = re.compile(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    return [body for language, body in BLOCK.findall(PAGE.read_text(encoding="utf-8")) if language == "bash"]


def outputs() -> list[str]:
    """What the page shows of the answers."""
    return [body for language, body in BLOCK.findall(PAGE.read_text(encoding="utf-8")) if language == "text"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new folder with the page's files, and those that their first command makes."""
    path = tmp_path_factory.mktemp("tutorial")
    for name, text in FILE.findall(PAGE.read_text(encoding="utf-8")):
        (path / name).write_text(text)
    shell(commands()[0], path)
    return path


def shell(command: str, folder: Path, limit_s: float = 600.0) -> str:
    """What the command prints, errors included; ``python`` is the one that runs this test."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = clean_environment() | {"PATH": path, "UNMASK_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-e", "-c", command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit_s,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}"
    return done.stdout


def test_the_grader_answers_as_the_page_says(folder: Path) -> None:
    assert shell(commands()[1], folder) == outputs()[0]


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(1500)
@pytest.mark.heavy
def test_every_command_does_what_it_says(folder: Path) -> None:
    answers = [shell(command, folder) for command in commands()[1:]]
    grader, dry_run, training, regraded, evaluation, tried, exported, evaluated_again = answers
    assert grader == outputs()[0]
    assert dry_run.count("prompt: ") == 2 and "first batch" in dry_run and "held out" not in dry_run
    summary = json.loads((folder / "runs" / "sorting" / "summary.json").read_text())
    base, trained = summary["base"]["greedy"]["m"], summary["trained"]["greedy"]["m"]
    print(f"solved: base {base:.3f}, trained {trained:.3f}")
    assert base < 0.2 and trained > base + 0.4
    assert "greedy exact-solve rate, held out: sorting" in training
    kept = len((folder / "runs" / "sorting" / "samples" / "completions.jsonl").read_text().splitlines())
    assert regraded.startswith(f"{kept} graded, ")
    assert "128 problems, 95 % intervals" in evaluation and "adapter - base" in evaluation
    assert tried.count("step 8/8  <answer>") == 3 and re.search(r"^(right|wrong).*; reward", tried, re.MULTILINE)
    written = json.loads((folder / "written.json").read_text())
    (completion,) = written["completions"]
    assert "Sort: 40713" in written["prompt"]["text"]
    assert sorted(token["step"] for token in completion["tokens"]) == [*range(1, 9)]
    assert (folder / "merged" / "model.safetensors").is_file()
    assert exported.splitlines()[0].endswith("merged") or "\nmerged\n" in exported
    assert exported.count(f"\n{completion['text']}\n") == 1, "the merged model writes what base and adapter write"
    assert "everything is in" in evaluated_again
    (of_the_run,) = (folder / "runs" / "sorting" / "evaluations").glob("*/results.jsonl")
    base_writes, adapter_writes = completions(of_the_run, "base"), completions(of_the_run, "adapter")
    merged_writes = completions(folder / "evaluations" / "merged" / "results.jsonl", "base")
    assert len(merged_writes) == 128 * 9 and merged_writes == adapter_writes
    assert sum(merged_writes[which] == base_writes[which] for which in base_writes) < 0.2 * len(base_writes), "control"


def completions(path: Path, policy: str) -> dict[tuple[str, str], tuple[str, int]]:
    """Of each way to decode and problem: what was written, and whether it is right."""
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return {
        (row["cell"].rpartition(" ")[0], problem["id"]): (problem["completions"][0], problem["correct"][0])
        for row in rows
        if row["policy"] == policy
        for problem in row["problems"]
    }
