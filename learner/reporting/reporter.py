"""What a run tells: metrics.jsonl, the run store, trackers, and the person at the terminal.

Iterations count finished updates: the first is 1, and 0 is the base model's evaluation. Reports never stop training: a
line, row or tracker call that fails is counted, and the first failure of each is shown.
"""

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from learner.reporting.metrics_file import LineFile, json_line, read_rows, unreadable_lines
from learner.reporting.samples import pack_trajectory
from learner.reporting.trackers import Tracker
from learner.runs.atomic import atomic_write_text
from learner.runs.directory import RunDirectory
from rollout.trajectory import TrajectoryGroup
from services.store.faults import FAULT, Cause, Part
from services.store.writer import StoreWriter

PROBLEMS = "eval/problems"
"""How many held-out problems an evaluation had."""


class Reporter:
    """The one voice of a run. ``store`` takes workers and checkpoints directly.

    Within an iteration call ``iteration``, ``evaluation`` and ``sample`` first, then ``flush``, then save the
    checkpoint: a run resumed at that checkpoint then has every row up to it, and ``truncate_after`` removes the rest.

    Attributes:
        failures: how many reports failed, by where they should have gone ("metrics.jsonl", "samples", tracker names).
    """

    def __init__(
        self,
        run_dir: RunDirectory,
        store_writer: StoreWriter,
        trackers: Sequence[Tracker] = (),
        *,
        total_iterations: int,
        quiet: bool = False,
        console: Console | None = None,
    ):
        """``quiet`` shows warnings and errors only. ``console`` is standard output unless given."""
        self.store = store_writer
        self.failures: Counter[str] = Counter()
        self._run_dir = run_dir
        self._trackers = list(trackers)
        self._total = total_iterations
        self._quiet = quiet
        self._console = console or Console(highlight=False)
        self._metrics_file = LineFile(run_dir.metrics_path)
        self._samples_file = LineFile(run_dir.samples_path)
        self._progress: Progress | None = None
        self._pace = _Pace(total_iterations)
        self._store_loss_shown = False

    def iteration(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Report a finished iteration."""
        values = {name: float(value) for name, value in metrics.items()}
        values["machine/store_lost_rows"] = float(self.store.lost_rows)
        values["machine/failed_reports"] = float(self.failures.total())
        to_go_s = self._pace.to_go_s(iteration, values.get("time/iteration_s"))
        if to_go_s is not None:
            values["machine/to_go_s"] = to_go_s
        self._record(iteration, values)
        self._show_iteration(iteration, values)
        if self.store.lost_rows and not self._store_loss_shown:
            self._store_loss_shown = True
            self.event(
                "warning",
                "store",
                f"rows for the run store are being lost ({self.store.last_error}); training and metrics.jsonl go on",
            )

    def evaluation(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Report an evaluation of the policy after this many updates."""
        values = {name: float(value) for name, value in metrics.items()}
        self._record(iteration, values)
        problems = values.get(PROBLEMS)
        shown = [f"{name.removeprefix('eval/')} {value:.3f}" for name, value in values.items() if name != PROBLEMS]
        of = "" if problems is None else f" of {problems:.0f} problems"
        self.event("info", "evaluation", f"evaluation after {iteration} iterations{of}: {', '.join(shown)}")

    def event(self, level: str, kind: str, text: str, **data: Any) -> None:
        """Report something that happened. ``level``: info, warning or error; ``kind``: a short word to filter by."""
        self.store.event(level, kind, text, data)
        if level == "info":
            self._say(text)
        else:
            self._print(f"{level}: {text}", style="bold red" if level == "error" else "yellow")

    def fault(self, part: Part, cause: Cause, text: str, **cost: Any) -> None:
        """Report a fault and what is done about it: a warning that is counted by part and cause.

        ``part``: what failed; ``cause``: how; ``cost``: what it took, such as ``silent_s`` (seconds until it was
        noticed), ``seconds`` (until work went on), ``groups`` or ``iterations`` (work that is done again).
        """
        self.event("warning", FAULT, text, part=part, cause=cause, **cost)

    def sample(
        self,
        iteration: int,
        group: TrajectoryGroup,
        row: int,
        prompt: str,
        completion: str,
        *,
        kind: str = "train",
        fields: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        arrays: Mapping[str, np.ndarray] | None = None,
        metadata: Mapping[str, str] | None = None,
        branches: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Keep one completion of a group for playback, and its text in samples/completions.jsonl, from which
        ``rewards.grade`` grades it anew.

        ``kind``: where it was drawn (train, base, trained, ...); ``fields``: its problem's; ``data`` is kept beside it,
        ``arrays`` and ``metadata`` with the trajectory, ``branches`` with the text, see ``learner.reporting.playback``.
        """
        rewards = {name: float(value) for name, value in zip(group.reward_names, group.rewards[row], strict=True)}
        correct = bool(group.correct[row])
        about = {
            "seed": group.seed,
            "policy_version": group.policy_version,
            "adapter_digest": group.adapter_digest,
            "actor_id": group.actor_id,
            "nfe": int(group.nfe[row]),
            "sampler": dataclasses.asdict(group.sampler),
            **({} if group.threshold is None else {"threshold": round(float(group.threshold[row]), 6)}),
            **(data or {}),
        }
        self.store.sample(
            iteration,
            kind=kind,
            group_id=group.group_id,
            row=row,
            problem_id=group.problem_id,
            prompt=prompt,
            completion=completion,
            correct=correct,
            rewards=rewards,
            trajectory=pack_trajectory(group, row, arrays, metadata),
            data=about,
        )
        text = {
            "id": f"{kind}-{iteration}-{group.group_id}-{row}",
            "iteration": iteration,
            "kind": kind,
            "group_id": group.group_id,
            "row": row,
            "problem_id": group.problem_id,
            "fields": dict(fields or {}),
            "correct": correct,
            "rewards": {name: value if math.isfinite(value) else None for name, value in rewards.items()},
            "prompt": prompt,
            "completion": completion,
        }
        if branches:
            text["branches"] = list(branches)
        self._append(self._samples_file, "samples", text)

    def truncate_after(self, iteration: int) -> None:
        """Forget everything reported beyond ``iteration``, which a resumed run reports anew. Call it before the first
        report. Raises ``StoreError`` or ``UnmaskError`` when the store or the disk refuses."""
        for file in (self._metrics_file, self._samples_file):
            file.close()
            if damaged := unreadable_lines(file.path):
                text = (
                    f"{len(damaged)} lines of {file.path} are no rows and are dropped, the first is line {damaged[0]}"
                )
                self.event("warning", "reporting", text)
            kept = [json_line(row) for row in read_rows(file.path) if row["iteration"] <= iteration]
            atomic_write_text(file.path, "".join(kept))
        self.store.truncate_after(iteration)

    def tell_store_again(self, after: int) -> None:
        """Give the store the metrics of the iterations beyond ``after`` as metrics.jsonl has them."""
        for row in read_rows(self._metrics_file.path):
            if row["iteration"] > after:
                values = {name: value for name, value in row.items() if isinstance(value, float)}
                self.store.metrics(row["iteration"], values)

    def flush(self, timeout_s: float = 2.0) -> bool:
        """Bring all reports to disk; False when the store did not take its rows in time (they stay queued)."""
        self.attempt("metrics.jsonl", self._metrics_file.sync)
        return self.store.flush(timeout_s)

    def closing_table(self, summary: Mapping[str, Any], *, steps: int | None = None) -> None:
        """Print base against trained from ``summary`` (see ``RunDirectory.write_summary``), a line per step count.

        ``steps``: m, to name the step counts. What the summary lacks is shown as "-".
        """
        self._stop_progress()
        rows = _closing_rows(summary, steps)
        if self._console.is_terminal:
            table = Table("denoising steps", title=f"Greedy exact-solve rate, held out: {self._run_dir.id}")
            for column in ("base", "trained", "gain"):
                table.add_column(column, justify="right")
            for row in rows:
                table.add_row(*row)
            self._console.print(table)
        else:
            self._print(f"greedy exact-solve rate, held out: {self._run_dir.id}")
            for row in [("denoising steps", "base", "trained", "gain"), *rows]:
                self._print(f"  {row[0]:<16}{row[1]:>8}{row[2]:>9}{row[3]:>9}")
        self._print(best_words(summary))
        if "train_seconds" in summary:
            self._print(f"training took {_duration(float(summary['train_seconds']))}")
        lost = self.failures.total() + self.store.lost_rows
        if lost:
            self._print(
                f"not everything was recorded: {self.store.lost_rows} store rows lost "
                f"({self.store.last_error}), {self.failures.total()} failed reports {dict(self.failures)}"
            )
        self._print(f"everything is in {self._run_dir.path}")

    def close(self, timeout_s: float = 10.0) -> None:
        """End the bar, close files and trackers, and give the store ``timeout_s`` seconds to take what is queued."""
        self._stop_progress()
        for tracker in self._trackers:
            self.attempt(tracker.name, tracker.close)
        for file in (self._metrics_file, self._samples_file):
            file.close()
        self.store.close(timeout_s)
        if self.store.lost_rows and not self._store_loss_shown:
            self._print(
                f"warning: {self.store.lost_rows} rows for the run store were lost ({self.store.last_error})",
                style="yellow",
            )

    def attempt(self, what: str, action: Callable[..., Any], *arguments: Any) -> None:
        """Do it; a failure is counted and the first of its kind told. Other people's trackers may raise anything."""
        try:
            action(*arguments)
        except Exception as error:
            self.failures[what] += 1
            if self.failures[what] == 1:
                self.event(
                    "warning",
                    "reporting",
                    f"reporting to {what} failed ({type(error).__name__}: {error}); "
                    f"training goes on, further failures are only counted",
                    target=what,
                )

    def _record(self, iteration: int, values: dict[str, float]) -> None:
        line: dict[str, Any] = {"iteration": iteration}
        line |= {name: values[name] if math.isfinite(values[name]) else None for name in sorted(values)}
        nonfinite = [name for name in sorted(values) if not math.isfinite(values[name])]
        if nonfinite:
            line["nonfinite"] = nonfinite
        self._append(self._metrics_file, "metrics.jsonl", line)
        self.store.metrics(iteration, values)
        for tracker in self._trackers:
            self.attempt(tracker.name, tracker.log, iteration, values)

    def _append(self, file: LineFile, what: str, row: dict[str, Any]) -> None:
        self.attempt(what, file.append, json_line(row))

    def _show_iteration(self, iteration: int, values: dict[str, float]) -> None:
        if self._quiet:
            return
        if "reward/mean" in values or "loss" not in values:
            solved = _number(values.get("solve_rate"), ".3f")
            figures = f"reward {_number(values.get('reward/mean'), '.3f')}  solve {solved}"
        else:
            figures = f"loss {_number(values['loss'], '.4f')}"
        eta = _duration(values["machine/to_go_s"]) if "machine/to_go_s" in values else "-"
        pace = f"{_number(values.get('machine/tokens_per_s'), ',.0f')} tokens/s  ETA {eta}"
        status = f"{figures}  {pace}"
        if not self._console.is_terminal:
            self._print(f"iteration {iteration}/{self._total}  {status}")
            return
        if self._progress is None:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
            self._progress = Progress(*columns, console=self._console)
            self._progress.add_task("training", total=self._total, status=status)
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=iteration, status=status)

    def _stop_progress(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _say(self, text: str) -> None:
        if not self._quiet:
            self._print(text)

    def _print(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, markup=False, soft_wrap=True)


class _Pace:
    """Time to go, from the mean time between the reports that this process made: evaluations and checkpoints count."""

    def __init__(self, total: int):
        self._total = total
        self._first: tuple[int, float] | None = None

    def to_go_s(self, iteration: int, seconds: float | None) -> float | None:
        """``seconds``: that this iteration took, if known, which is all that is known at the first report."""
        now_s = time.monotonic()
        if self._first is None or iteration <= self._first[0]:
            self._first = (iteration, now_s)
        else:
            seconds = (now_s - self._first[1]) / (iteration - self._first[0])
        return None if seconds is None else seconds * max(0, self._total - iteration)


def best_words(summary: Mapping[str, Any]) -> str:
    """Where the best checkpoint is and where the last, by a summary."""
    best, places = summary.get("best", {}), summary.get("checkpoints", {})
    last = f"the last checkpoint is {places['last']}" if "last" in places else "no checkpoint was saved"
    if not best:
        return last
    measured = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in best.items() if name != "iteration")
    if best["iteration"] == 0:
        return f"no evaluation was better than the base's ({measured}); {last}"
    where = places.get("best", "not kept")
    return f"the best checkpoint is {where} ({measured} after iteration {best['iteration']}); {last}"


def _closing_rows(summary: Mapping[str, Any], steps: int | None) -> list[tuple[str, str, str, str]]:
    base = summary.get("base", {}).get("greedy", {})
    trained = summary.get("trained", {}).get("greedy", {})
    rows = []
    for name in [*base, *(name for name in trained if name not in base)]:
        divisor = int(name.partition("/")[2] or 1)
        before, after = base.get(name), trained.get(name)
        gain = None if before is None or after is None else after - before
        label = name if steps is None else f"{name} = {steps // divisor}"
        rows.append((label, _number(before, ".3f"), _number(after, ".3f"), _number(gain, "+.3f")))
    return rows


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
