"""Whole evaluations on a real Ray: killed, stopped, resumed, and beside the run that they look at."""

import json
import logging
import os
import signal
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from learner.evaluation.drive import evaluate
from learner.runs.directory import RunDirectory
from learner.runs.local_ray import local_ray
from tests.support.evaluations import LIMIT_S, call, results, settings, started, write_adapter
from tests.support.real_runs import send, wait_until

REPOSITORY = Path(__file__).resolve().parents[2]

# A user's task that any model solves now and then. Its grader waits at problem 9 while the file "gate" is there.
TASK = """
import pathlib, time, zlib
from rewards.task import Grade, Problem, Task

HERE = pathlib.Path(__file__).parent

class Lucky(Task):
    name = "lucky"
    components = ("length",)
    def problems(self, split, *, seed, size, path=None):
        return [Problem(f"{split}-{i}", {"number": i, "split": split}) for i in range(size)]
    def messages(self, fields):
        return [{"role": "user", "content": "Puzzle: " + "1" * (fields["number"] % 5)}]
    def validate_fields(self, fields):
        pass
    def grade(self, fields, completion):
        while fields.get("number") == 9 and (HERE / "gate").exists():
            (HERE / "reached").touch()
            time.sleep(0.02)
        luck = zlib.crc32((str(fields.get("number")) + completion).encode())
        return Grade(luck % 3 == 0, {"length": float(len(completion))})
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Ray that evaluations join; what they need of the environment."""
    (tmp_path / "lucky_task.py").write_text(TASK)
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        with local_ray(num_cpus=4, logging_level=logging.ERROR) as joining:
            yield joining | {"PYTHONPATH": path}


@pytest.mark.slow
@pytest.mark.timeout(900)  # four processes, one after the other
@pytest.mark.heavy
def test_killed_and_stopped_evaluations_go_on_to_the_same_result(
    cluster: dict[str, str], tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path / "peft", tiny_model)
    grid_settings = [
        "recipe=smoke",
        "task.name=lucky_task:Lucky",
        f"adapter={tmp_path / 'peft'}",
        "data.size=12",
        "rollout.max_rows=8",
        "rollout.grade_timeout_s=100",
        "decode.step_divisors=[1,4]",
        "decode.position_rules=[low_confidence,random]",
        "decode.thresholds=[0.2]",
        "decode.samples=3",
        "statistics.resamples=500",
    ]
    answer = call(*grid_settings, f"out={tmp_path / 'whole'}", "rollout.actors=1", **cluster)
    assert answer.returncode == 0, answer.stderr
    assert "joined the Ray cluster" in answer.stdout and "12 problems, 9 ways to decode" in answer.stdout
    whole = results(tmp_path / "whole")
    check_whole(whole, tmp_path / "whole")

    out = tmp_path / "out"
    arguments = [*grid_settings, f"out={out}", "rollout.actors=2"]
    gate, reached, lines = tmp_path / "gate", tmp_path / "reached", out / "results.jsonl"

    def hold(popen: subprocess.Popen[bytes], output: Path, chunks: int) -> None:
        """Wait until that many lines are there, and then until an actor is in the middle of a chunk."""

        def met(condition: Callable[[], bool]) -> bool:
            assert popen.poll() is None, output.read_text()
            return condition()

        wait_until(lambda: met(lambda: lines.exists() and lines.read_bytes().count(b"\n") > chunks), "chunks", LIMIT_S)
        gate.touch()
        wait_until(lambda: met(reached.exists), "problem 9", LIMIT_S)

    output = tmp_path / "killed.out"
    with started(output, *arguments, **cluster) as popen:
        hold(popen, output, chunks=6)
        send(signal.SIGKILL, [popen.pid])
        popen.wait(timeout=60)
    assert not (out / "results.json").exists()
    with lines.open("ab") as file:
        file.write(b'{"cell": "greedy')
    before = lines.read_bytes().count(b"\n") - 1
    gate.unlink()
    reached.unlink()

    output = tmp_path / "stopped.out"
    with started(output, *arguments, **cluster) as popen:
        hold(popen, output, chunks=before + 6)
        send(signal.SIGINT, [popen.pid])
        assert popen.wait(timeout=60) == 130, output.read_text()
    gate.unlink()
    told = output.read_text()
    assert f"68 chunks, {before} of them done" in told
    assert "1 torn or damaged lines" in told and "the same command goes on" in told
    partial = results(out)
    assert not partial["complete"] and partial["unfinished"]
    assert partial["cells"] and partial["cells"][0]["base"] == whole["cells"][0]["base"]

    answer = call(*arguments, **cluster)
    assert answer.returncode == 0, answer.stderr
    assert results(out) == whole, "neither interruptions nor the number of actors change anything"
    assert (out / "results.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.syspath_prepend(tmp_path)
    less = [*arguments, "decode.samples=0", "resources.ray_address=127.0.0.1:1"]
    assert evaluate(settings(*less), None) == 0, "what is there needs no Ray, also when less is asked for"
    assert results(out)["cells"] == whole["cells"][:5]


def check_whole(report: dict[str, Any], out: Path) -> None:
    """Every figure against the completions themselves."""
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()][1:]
    assert report["complete"] and len(report["cells"]) == 9
    assert report["cells"][0]["adapter"] != report["cells"][0]["base"], "the adapter does something"
    texts = {}
    for cell in report["cells"]:
        for policy in ("base", "adapter"):
            mine = [row for row in rows if row["policy"] == policy and row["cell"].startswith(cell["label"] + " ")]
            problems = [problem for row in sorted(mine, key=lambda row: row["chunk"]) for problem in row["problems"]]
            assert [problem["id"] for problem in problems] == [f"test-{i}" for i in range(12)]
            right = [sum(problem["correct"]) for problem in problems]
            nfe = [forwards for problem in problems for forwards in problem["nfe"]]
            assert cell[policy]["solve_rate"]["value"] == pytest.approx(sum(right) / 12 / cell["samples"])
            assert cell[policy]["mean_nfe"] == pytest.approx(sum(nfe) / len(nfe))
            if cell["steps"] is not None:
                assert set(nfe) == {cell["steps"]}
            for i, problem in enumerate(problems):
                luck = [zlib.crc32(f"{i}{text}".encode()) % 3 for text in problem["completions"]]
                assert problem["correct"] == [int(n == 0) for n in luck] and len(luck) == cell["samples"]
            if cell["decoding"] == "sampled":
                assert any(len(set(problem["completions"])) > 1 for problem in problems), "samples are not copies"
                assert cell[policy]["pass@2"]["value"] >= cell[policy]["pass@1"]["value"]
            texts[cell["label"], policy] = [problem["completions"] for problem in problems]
    assert len({json.dumps(text) for text in texts.values()}) > len(texts) / 2, "ways to decode differ"


@pytest.mark.slow
@pytest.mark.heavy
def test_an_evaluation_of_a_run_gives_the_rates_that_the_run_reported(
    undisturbed: RunDirectory, runs: Any, tmp_path: Path
) -> None:
    """The same problems, chunks and noise: bit for bit. On a local Ray."""
    arguments = ["--run", str(undisturbed.path), f"out={tmp_path}", "decode.position_rules=[low_confidence]"]
    answer = call(*arguments, "statistics.resamples=100", UNMASK_CACHE=str(runs.cache))
    assert answer.returncode == 0, answer.stderr
    assert "started a local Ray" in answer.stdout and "loss" not in answer.stdout, "the base was there"
    summary = json.loads(undisturbed.summary_path.read_text())
    divisors = {8: "m", 4: "m/2", 2: "m/4"}
    cells = {cell["steps"]: cell for cell in results(tmp_path)["cells"] if cell["steps"] in divisors}
    for steps, name in divisors.items():
        assert cells[steps]["base"]["solve_rate"]["value"] == summary["base"]["greedy"][name]
        assert cells[steps]["adapter"]["solve_rate"]["value"] == summary["trained"]["greedy"][name]
