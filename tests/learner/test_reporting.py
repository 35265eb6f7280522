"""What a run tells, and that telling it never stops the run."""

import dataclasses
import io
import json
import math
import os
import sqlite3
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load

from learner.reporting.metrics_file import read_rows
from learner.reporting.reporter import Reporter
from learner.reporting.samples import pack_trajectory
from learner.reporting.trackers import Tracker, build_trackers
from learner.runs.directory import RunDirectory
from rewards.errors import ConfigError
from rollout.trajectory import SamplerSpec, TrajectoryGroup
from services.store import schema
from services.store.writer import StoreWriter
from tests.support import store_rows
from tests.support.metrics_rows import deterministic

REPOSITORY = Path(__file__).resolve().parents[2]


class BrokenTracker:
    name = "broken"

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        raise RuntimeError("server gone")

    def close(self) -> None:
        raise RuntimeError("still gone")


class Run:
    """A run directory with its reporter and what it printed."""

    def __init__(self, run_dir: RunDirectory, trackers: list[Tracker], *, terminal: bool, quiet: bool):
        self.dir = run_dir
        self.output = io.StringIO()
        self.store = StoreWriter(run_dir.store_url, run_dir.id)
        console = Console(file=self.output, force_terminal=terminal, width=110, highlight=False)
        self.reporter = Reporter(run_dir, self.store, trackers, total_iterations=4, quiet=quiet, console=console)

    @property
    def lines(self) -> list[str]:
        return self.output.getvalue().splitlines()

    def engine(self):
        return schema.open_engine(self.dir.store_url, create=False)


@pytest.fixture
def start(tmp_path):
    """Makes the run "r", or opens it again."""
    runs: list[Run] = []

    def start(trackers: list[Tracker] | None = None, *, terminal: bool = False, quiet: bool = False) -> Run:
        if runs:
            run_dir = RunDirectory.open(tmp_path / "r")
        else:
            run_dir = RunDirectory.create(tmp_path, "r")
            run_dir.write_config("{}")
        runs.append(Run(run_dir, trackers or [], terminal=terminal, quiet=quiet))
        return runs[-1]

    yield start
    for run in runs:
        run.reporter.close()
        run.dir.close()


@pytest.fixture
def run(start) -> Run:
    return start()


def metrics(iteration: int) -> dict[str, float]:
    return {
        "solve_rate": 0.1 * iteration,
        "reward/mean": 1.0 + iteration / 3,
        "machine/tokens_per_s": 1234.5,
        "time/update_s": 0.5,
    }


def group() -> TrajectoryGroup:
    """G 2 completions of P 3 prompt tokens, C 4 positions, m 2 steps."""
    shape = (2, 4)
    made = TrajectoryGroup(
        group_id=12,
        problem_id="p",
        prompt_ids=np.array([5, 6, 7], dtype=np.int32),
        completion_ids=np.arange(8, dtype=np.int32).reshape(shape),
        unmask_step=np.array([[0, 0, 1, 1], [1, 1, 0, 0]], dtype=np.int16),
        unmask_rank=np.array([[0, 1, 0, 1], [1, 0, 1, 0]], dtype=np.int16),
        drawn=np.ones(shape, dtype=np.bool_),
        logp=np.full(shape, -0.5, dtype=np.float32),
        logp_raw=np.full(shape, -0.75, dtype=np.float32),
        entropy=np.full(shape, 0.25, dtype=np.float32),
        support_indptr=None,
        support_ids=None,
        rewards=np.array([[0.5, 0.0], [1.0, 2.0]], dtype=np.float32),
        reward_names=("cells", "solved"),
        correct=np.array([False, True]),
        policy_version=3,
        adapter_digest="abc",
        sampler=SamplerSpec(4, 4, 2, "low_confidence", 1.0),
        seed=2**62,
        nfe=np.array([2, 2], dtype=np.int32),
    )
    made.validate()
    return made


def test_rows_go_to_file_and_store(run):
    run.reporter.evaluation(0, {"eval/m/solve_rate": 0.1, "eval/m/2/solve_rate": 0.05})
    run.reporter.iteration(1, metrics(1))
    assert run.reporter.flush(10)
    first, second = read_rows(run.dir.metrics_path)
    assert first == {"iteration": 0, "eval/m/2/solve_rate": 0.05, "eval/m/solve_rate": 0.1}
    assert second["reward/mean"] == 1.0 + 1 / 3  # to the last bit
    assert list(second)[1:] == sorted(list(second)[1:])
    series = store_rows.metric_series(run.engine(), "r", ["reward/mean", "eval/m/2/solve_rate"])
    assert series == {"reward/mean": [(1, 1.0 + 1 / 3)], "eval/m/2/solve_rate": [(0, 0.05)]}


def test_non_finite_values_are_null_and_named(run):
    run.reporter.iteration(1, {"loss": math.nan, "kl": math.inf, "time/x_s": -math.inf, "lr": np.float32(0.5)})
    text = run.dir.metrics_path.read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (row["loss"], row["kl"], row["time/x_s"], row["lr"]) == (None, None, None, 0.5)
    assert row["nonfinite"] == ["kl", "loss", "time/x_s"]
    assert deterministic(row) == {"iteration": 1, "kl": None, "loss": None, "lr": 0.5, "nonfinite": ["kl", "loss"]}


def test_deterministic_drops_times_and_nothing_else(start):
    rows = []
    for seconds in (1.0, 2.0):
        run = start()
        run.reporter.truncate_after(0)
        run.reporter.iteration(1, {**metrics(1), "time/update_s": seconds, "machine/tokens_per_s": 1 / seconds})
        rows.append(read_rows(run.dir.metrics_path)[0])
        run.reporter.close()
        run.dir.close()
    assert rows[0] != rows[1] and deterministic(rows[0]) == deterministic(rows[1])
    assert deterministic({**rows[0], "solve_rate": 0.2}) != deterministic(rows[1])


def test_a_resumed_run_forgets_what_lies_beyond(start):
    run = start()
    for iteration in range(1, 5):
        run.reporter.iteration(iteration, metrics(iteration))
        run.reporter.sample(iteration, group(), 0, "prompt", "completion")
    run.reporter.close()
    run.dir.close()
    with open(run.dir.metrics_path, "a") as file:
        file.write('{"iteration": 5, "reward/me')  # cut short by a kill
    resumed = start()
    resumed.reporter.truncate_after(2)
    resumed.reporter.iteration(3, {"reward/mean": 33.0})
    assert resumed.reporter.flush(10)
    assert [row["iteration"] for row in read_rows(run.dir.metrics_path)] == [1, 2, 3]
    assert len(run.dir.metrics_path.read_text().splitlines()) == 3
    assert [row["iteration"] for row in read_rows(run.dir.samples_path)] == [1, 2]
    engine = resumed.engine()
    assert [i for i, _ in store_rows.metric_series(engine, "r", ["reward/mean"])["reward/mean"]] == [1, 2, 3]
    assert [i for i, _ in store_rows.metric_series(engine, "r", ["solve_rate"])["solve_rate"]] == [1, 2]
    assert [sample["iteration"] for sample in store_rows.list_samples(engine, "r")] == [1, 2]


def test_a_damaged_line_is_told_and_one_that_a_kill_cut_short_is_not(start):
    run = start()
    run.dir.metrics_path.write_text(
        '{"iteration": 1}\n{"iteration": 2, x\n[]\n\n{"iteration": 3}\n{"iteration": 4, "re'
    )
    run.reporter.truncate_after(3)
    assert run.reporter.flush(10)
    assert [row["iteration"] for row in read_rows(run.dir.metrics_path)] == [1, 3]
    told = f"2 lines of {run.dir.metrics_path} are no rows and are dropped, the first is line 2"
    assert [event["text"] for event in store_rows.list_events(run.engine(), "r")] == [told]


def test_the_store_is_told_again_what_the_file_has(start):
    run = start()
    for iteration in (1, 2, 3):
        run.reporter.iteration(iteration, {"reward/mean": iteration / 2})
    run.reporter.store.truncate_after(1)
    run.reporter.tell_store_again(1)
    assert run.reporter.flush(10)
    found = store_rows.metric_series(run.engine(), "r", ["reward/mean"])["reward/mean"]
    assert found == [(1, 0.5), (2, 1.0), (3, 1.5)]


def test_a_plot_that_fails_is_told_and_fails_nothing(run):
    def plot(folder):
        raise OSError("No space left on device")

    run.reporter.attempt("plots", plot, "folder")
    assert run.reporter.failures["plots"] == 1


def test_a_sample_is_the_row_it_says(run):
    run.reporter.sample(2, group(), 1, "Puzzle: 1", "[bold]4321", data={"k": 4}, arrays={"steps": np.array([0, 1])})
    assert run.reporter.flush(10)
    (sample,) = store_rows.list_samples(run.engine(), "r")
    assert (sample["iteration"], sample["group_id"], sample["row"], sample["kind"]) == (2, 12, 1, "train")
    assert sample["correct"] is True and sample["reward"] == 3.0 and sample["rewards"] == {"cells": 1.0, "solved": 2.0}
    assert sample["data"]["k"] == 4 and sample["data"]["sampler"]["position_rule"] == "low_confidence"
    tensors = load(store_rows.sample_trajectory(run.engine(), sample["id"]))
    assert tensors["completion_ids"].tolist() == [4, 5, 6, 7] and tensors["prompt_ids"].tolist() == [5, 6, 7]
    assert tensors["unmask_step"].tolist() == [1, 1, 0, 0] and tensors["steps"].tolist() == [0, 1]
    assert tensors["drawn"].dtype == np.bool_
    assert pack_trajectory(group(), 0) != pack_trajectory(group(), 1)
    (text,) = read_rows(run.dir.samples_path)
    assert text["completion"] == "[bold]4321" and text["rewards"] == {"cells": 1.0, "solved": 2.0}
    assert "threshold" not in sample["data"]


def test_a_sample_keeps_the_threshold_that_its_completion_drew(run):
    drawn = dataclasses.replace(
        group(),
        sampler=dataclasses.replace(group().sampler, threshold=(0.5, 0.7)),
        threshold=np.array([0.5, 0.7], np.float32),
        threshold_logp=np.log([0.4, 0.6]).astype(np.float32),
    )
    run.reporter.sample(2, drawn, 1, "Puzzle: 1", "4321")
    assert run.reporter.flush(10)
    (sample,) = store_rows.list_samples(run.engine(), "r")
    assert sample["data"]["threshold"] == 0.7 and sample["data"]["sampler"]["threshold"] == [0.5, 0.7]


def test_plain_lines_without_a_terminal(run):
    run.reporter.iteration(1, metrics(1))
    run.reporter.iteration(2, {"reward/mean": math.nan})
    run.reporter.event("info", "note", "[red]not markup[/red]")
    run.reporter.event("error", "actor", "actor 1 died")
    assert run.lines[0] == "iteration 1/4  reward 1.333  solve 0.100  1,234 tokens/s  ETA -"
    assert run.lines[1].startswith("iteration 2/4  reward nan  solve -  - tokens/s  ETA 0s")
    assert run.lines[2:] == ["[red]not markup[/red]", "error: actor 1 died"]


def test_quiet_shows_trouble_only(start):
    run = start(quiet=True)
    run.reporter.iteration(1, metrics(1))
    run.reporter.event("info", "note", "hello")
    run.reporter.event("warning", "note", "careful")
    assert run.lines == ["warning: careful"]


def test_a_bar_on_a_terminal(start):
    run = start(terminal=True)
    run.reporter.iteration(1, metrics(1))
    run.reporter.event("warning", "note", "careful")
    run.reporter.iteration(2, metrics(2))
    run.reporter.closing_table({})
    text = run.output.getvalue()
    assert "2/4" in text and "solve 0.200" in text and "1,234 tokens/s" in text and "warning: careful" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_closing_table(start, terminal):
    run = start(terminal=terminal)
    base, trained = {"m": 0.1, "m/2": 0.05, "m/4": 0.0}, {"m": 0.75, "m/2": 0.7}
    summary = {"base": {"greedy": base}, "trained": {"greedy": trained}, "train_seconds": 125.4}
    run.reporter.closing_table(summary, steps=8)
    text = run.output.getvalue()
    rows = [[word for word in line.split() if word[0] in "0123456789m+-"] for line in run.lines]
    assert ["m", "0.100", "0.750", "+0.650"] in [[r[0], *r[-3:]] for r in rows if len(r) > 3]
    assert any("m/2 = 4" in line for line in run.lines)
    assert any("m/4 = 2" in line and "0.000" in line and "- " in line for line in run.lines)
    assert "training took 2m05s" in text and str(run.dir.path) in text.replace("\n", "")
    assert "not everything was recorded" not in text


def test_a_broken_tracker_is_counted_and_told_once(start):
    run = start([BrokenTracker()])
    for iteration in range(1, 4):
        run.reporter.iteration(iteration, metrics(iteration))
    run.reporter.close()
    assert run.reporter.failures == {"broken": 4}
    assert sum("broken" in line for line in run.lines) == 1 and "server gone" in "".join(run.lines)
    rows = read_rows(run.dir.metrics_path)
    assert [row["machine/failed_reports"] for row in rows] == [0.0, 1.0, 2.0]
    (event,) = store_rows.list_events(run.engine(), "r")
    assert event["data"] == {"target": "broken"} and event["level"] == "warning"


def test_metrics_jsonl_on_a_full_device_stops_nothing(start):
    run = start()
    run.dir.metrics_path.symlink_to("/dev/full")
    for iteration in range(1, 4):
        run.reporter.iteration(iteration, metrics(iteration))
    assert run.reporter.failures["metrics.jsonl"] == 3
    assert sum("No space left on device" in line for line in run.lines) == 1
    assert run.reporter.store.flush(10)
    assert len(store_rows.metric_series(run.engine(), "r", ["solve_rate"])["solve_rate"]) == 3
    run.reporter.closing_table({})
    assert any("not everything was recorded" in line for line in run.lines)
    run.dir.metrics_path.unlink()


PARTLY_FULL = """
import resource, sys
from learner.reporting.reporter import Reporter
from learner.runs.directory import RunDirectory
from services.store.writer import StoreWriter
run = RunDirectory.create(sys.argv[1], "r")
run.write_config("{}")
reporter = Reporter(run, StoreWriter(run.store_url, "r"), total_iterations=100)
for iteration in range(1, 101):
    if iteration == 51:  # room for a part of a line
        room = run.metrics_path.stat().st_size + 30
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, old[1]))
    if iteration == 61:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    reporter.iteration(iteration, {"loss": 1.0 / iteration})
reporter.close()
print(dict(reporter.failures), reporter.store.lost_rows)
"""


def test_a_disk_that_is_full_for_a_while(tmp_path):
    command = [sys.executable, "-c", PARTLY_FULL, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "{'metrics.jsonl': 10} 0"
    lines = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [*range(1, 51), *range(61, 101)]  # no part of a line
    engine = schema.open_engine(f"sqlite:///{tmp_path}/r/store.sqlite", create=False)
    assert len(store_rows.metric_series(engine, "r", ["loss"])["loss"]) == 100  # queued meanwhile


def test_lost_store_rows_are_shown(start):
    run = start()
    small = StoreWriter(run.dir.store_url, "r", max_queued_bytes=2000)
    console = Console(file=run.output, highlight=False)
    reporter = Reporter(run.dir, small, total_iterations=4, console=console)
    with closing(sqlite3.connect(run.dir.store_path, isolation_level=None)) as locker:
        locker.execute("BEGIN EXCLUSIVE")
        for iteration in range(1, 5):
            reporter.iteration(iteration, metrics(iteration))
    reporter.close()
    assert small.lost_rows > 0
    assert sum("rows for the run store are being lost" in line for line in run.lines) == 1
    assert read_rows(run.dir.metrics_path)[-1]["machine/store_lost_rows"] > 0


def test_tensorboard_gets_every_value(start, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = start(build_trackers(["tensorboard"], run_dir=tmp_path, run_id="r", config={}))
    run.reporter.iteration(1, metrics(1))
    run.reporter.iteration(2, metrics(2))
    run.reporter.close()
    assert not run.reporter.failures
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("solve_rate")] == [(1, 0.1), (2, 0.2)]


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_a_missing_tracker_package_is_told_at_the_start(tmp_path, name, package):
    # in a process of its own, where importing the package fails as if it were not installed
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from pathlib import Path\n"
        "from learner.reporting.trackers import build_trackers\n"
        f"build_trackers([{name!r}], run_dir=Path({str(tmp_path)!r}), run_id='r', config={{}})"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=100
    )
    assert "ConfigError" in done.stderr.splitlines()[-1] and f"pip install 'unmask-rl[{name}]'" in done.stderr


def test_wandb_has_one_run_for_each_of_ours_whatever_its_name(tmp_path, monkeypatch):
    asked = []
    wandb = types.ModuleType("wandb")
    wandb.Error = RuntimeError
    wandb.init = lambda **how: asked.append(how["id"]) or types.SimpleNamespace(define_metric=lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    first = RunDirectory.create(tmp_path / "here", "a")
    second = RunDirectory.create(tmp_path / "there", "a")
    for run in (first, first, second):
        build_trackers(["wandb"], run_dir=run.path, run_id=run.id, config={})
    first.close()
    second.close()
    renamed = RunDirectory(first.path.rename(first.path.with_name("b")))
    build_trackers(["wandb"], run_dir=renamed.path, run_id=renamed.id, config={})
    assert asked[0] == asked[1] == asked[3] != asked[2], "the same when it is resumed"


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="'mlflow': choose from tensorboard, wandb"):
        build_trackers(["mlflow"], run_dir=tmp_path, run_id="r", config={})


@pytest.fixture(autouse=True)
def no_colour_variables(monkeypatch) -> Iterator[None]:
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    yield
