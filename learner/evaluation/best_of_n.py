"""What training bought: trained policies beside the best of n completions from their base, at equal forward passes.

python -m learner.evaluation.best_of_n --base EVALUATION RUN [RUN ...]

Whoever has a grader can draw n completions and keep the best, without training. So a run's forward passes (a backward
counts two) are turned into completions of the base: with N problems, T forwards of training and f of a completion, n is
T / (N f), and one more for the trained policy's own. The base's figures are pass@n and best@n of its samples.

Two more tables follow. Of equally many completions of each policy: how many are right and different, for a problem and
in all, and the reward at equal diversity, that of the best few that lie at least ``APART`` from each other. And how
much is right greedily, by the first and last evaluation that a run made of itself.

RUNs differ in their seeds only. Each has an evaluation with samples (``learner.evaluate --run RUN base=false
decode.samples=16``); the newest counts. Shapes: Q runs, N problems, S samples, R resamples.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from learner.evaluation.intervals import best_of_k, pass_at_k, percentile_interval, wilson
from learner.evaluation.results import read_chunks, rewards_of
from learner.evaluation.variety import diverse_best, expected_distinct
from learner.reporting.metrics_file import read_rows
from learner.runs.directory import RunDirectory
from learner.runs.stopping import exit_status
from rewards.command import Parser
from rewards.errors import ConfigError, DataError
from rollout.process import prepare_process
from rollout.seeds import numpy_generator

RESAMPLES = 10_000
TRAINED_BEST_OF = 4
GREEDY = "eval/m/solve_rate"
DIVERSE, APART = 4, 0.5
"""So many completions of a problem, each at least so many edits per character from the others."""


@dataclass(frozen=True)
class Sampled:
    """The sampled completions of one policy."""

    problems: tuple[str, ...]
    right_N: np.ndarray
    """Right completions of each problem."""
    rewards: tuple[tuple[float, ...], ...]
    """Of each completion of each problem."""
    texts: tuple[tuple[str, ...], ...]
    """The completions themselves."""
    correct: tuple[tuple[int, ...], ...]
    figures: Mapping[str, Any]
    """As results.json has them."""
    sampler: Mapping[str, Any]

    @property
    def samples(self) -> int:
        return len(self.rewards[0])

    def pass_at(self, k: int) -> np.ndarray:
        """[N]."""
        return np.array([pass_at_k(self.samples, int(right), k) for right in self.right_N])

    def best_at(self, k: int) -> np.ndarray:
        """[N]."""
        return np.array([best_of_k(rewards, k) for rewards in self.rewards])

    def right_texts(self) -> list[list[str]]:
        """Of each problem, those that are right, as often as they were written."""
        both = zip(self.texts, self.correct, strict=True)
        return [[text for text, right in zip(*of_one, strict=True) if right] for of_one in both]

    def diverse_best(self, k: int) -> np.ndarray:
        """[N], of k completions at a time."""
        blocks = range(0, self.samples - k + 1, k)
        both = list(zip(self.texts, self.rewards, strict=True))
        found = [[diverse_best(t[at : at + k], r[at : at + k], DIVERSE, APART) for at in blocks] for t, r in both]
        return np.array(found).mean(axis=1)


def read_sampled(folder: Path, policy: str) -> Sampled:
    """The first sampled way to decode in an evaluation that has this policy. Raises ConfigError when there is none."""
    try:
        report = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        chunks = read_chunks(folder / "results.jsonl")
    except (OSError, ValueError, DataError) as error:
        raise ConfigError(f"{folder} is no evaluation that can be read: {error}") from error
    cell = next((cell for cell in report["cells"] if cell["decoding"] == "sampled" and policy in cell), None)
    if cell is None:
        raise ConfigError(f"{folder} has no samples of the {policy}; evaluate with decode.samples=16")
    if "key" not in cell:
        raise ConfigError(f"{folder} is an older version's report; the evaluation's command, again, makes it new")
    of_cell = {at.chunk: chunk for at, chunk in chunks.items() if (at.cell, at.policy) == (cell["key"], policy)}
    problems = [problem for _, chunk in sorted(of_cell.items()) for problem in chunk.problems]
    sampler = {name: cell[name] for name in ("steps", "position_rule", "temperature", "completion_length")}
    return Sampled(
        problems=tuple(problem["id"] for problem in problems),
        right_N=np.array([sum(problem["correct"]) for problem in problems]),
        rewards=tuple(tuple(rewards_of(problem)) for problem in problems),
        texts=tuple(tuple(problem["completions"]) for problem in problems),
        correct=tuple(tuple(problem["correct"]) for problem in problems),
        figures=cell[policy],
        sampler=sampler,
    )


def newest_sampled(run: Path) -> Sampled:
    """Of the run's trained policy. Raises ConfigError."""
    found = sorted(run.glob("evaluations/*/results.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ConfigError(f"{run} has no evaluation; run python -m learner.evaluate --run {run} decode.samples=16")
    return read_sampled(found[-1].parent, "adapter")


def training_forwards(run: Path) -> float:
    """Forward passes of one completion or view that the run's iterations took. Raises ConfigError."""
    path = RunDirectory(run).metrics_path
    rows = read_rows(path) if path.is_file() else []
    spent = [row["forward_equivalents"] for row in rows if "forward_equivalents" in row]
    if not spent:
        raise ConfigError(f"no iterations in {path}: give the folder of a run")
    return float(sum(spent))


def comparison(base: Sampled, runs: Mapping[Path, Sampled]) -> str:
    """Markdown. Raises ConfigError when the policies didn't write the same problems in the same way."""
    for run, trained in runs.items():
        if (trained.problems, trained.sampler) != (base.problems, base.sampler):
            raise ConfigError(
                f"{run} was evaluated on other problems than the base, or in another way ({dict(trained.sampler)}, "
                f"there {dict(base.sampler)}); evaluate both alike"
            )
    N, f = len(base.problems), base.figures["mean_nfe"]
    spent = {run: training_forwards(run) for run in runs}
    equal = {run: max(1, round((spent[run] / N + trained.figures["mean_nfe"]) / f)) for run, trained in runs.items()}
    drawn = {run: min(n, base.samples) for run, n in equal.items()}
    rows = [
        _row("base, one completion", [base.pass_at(1)], [base.best_at(1)], [base]),
        _row(
            f"base, best of {_range(drawn.values())}",
            [base.pass_at(n) for n in drawn.values()],
            [base.best_at(n) for n in drawn.values()],
        ),
        _row(
            "trained, one completion",
            [trained.pass_at(1) for trained in runs.values()],
            [trained.best_at(1) for trained in runs.values()],
            list(runs.values()),
        ),
    ]
    if all(trained.samples >= TRAINED_BEST_OF for trained in runs.values()):
        rows.append(
            _row(
                f"trained, best of {TRAINED_BEST_OF}",
                [trained.pass_at(TRAINED_BEST_OF) for trained in runs.values()],
                [trained.best_at(TRAINED_BEST_OF) for trained in runs.values()],
            )
        )
    lines = [
        "| | right | reward | different | apart | apart between problems | naturalness |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"{N} problems, {base.samples} samples each of the base, {_range(t.samples for t in runs.values())} of each of "
        f"{len(runs)} trained policies; 95 % intervals over {'seeds and ' if len(runs) > 1 else ''}problems. Training "
        f"took {_range(spent.values())} forwards, as many as {_range(equal.values())} completions of each problem from "
        f"the base{'' if equal == drawn else f' (no more than {base.samples} were drawn)'}.",
    ]
    return "\n".join([*lines, _pays(base, list(runs.values()), list(spent.values())), ""])


def variety(base: Sampled, runs: Mapping[Path, Sampled]) -> str:
    """Markdown, of as many completions of a problem as each policy has."""
    k = min(one.samples for one in (base, *runs.values()))
    lines = [
        f"Of {k} completions of each problem. At equal diversity: the best {DIVERSE} that are {APART:g} edits a letter"
        " or more from each other; one that isn't there counts 0.",
        "",
        "| | right and different, a problem | right and different, in all | reward at equal diversity |",
        "|---|---|---|---|",
    ]
    for name, one in {"base": base, **{run.name: trained for run, trained in runs.items()}}.items():
        right, samples = one.right_texts(), one.samples
        each_N = np.array([expected_distinct([texts], samples, k) for texts in right])
        cells = [_estimate(each_N[None], ".2f"), f"{expected_distinct(right, samples, k):.1f}"]
        lines.append(f"| {name} | {' | '.join([*cells, _estimate(one.diverse_best(k)[None], '.2f')])} |")
    return "\n".join([*lines, ""])


def greedily(runs: Iterable[Path]) -> str:
    """Markdown: what is right greedily by the runs' own evaluations, at the full number of steps; empty where a run has
    none. The interval of the mean is wide enough for runs that all solve the same problems: its variance is that over
    runs plus that of one run over problems."""
    lines, last = ["| | right before | right after |", "|---|---|---|"], []
    for run in runs:
        path = RunDirectory(run).metrics_path
        rows = [row for row in (read_rows(path) if path.is_file() else []) if GREEDY in row and "eval/problems" in row]
        if not rows:
            return ""
        N = int(rows[-1]["eval/problems"])
        before, after = rows[0][GREEDY], rows[-1][GREEDY]
        cells = [
            f"{rate:.3f} [{low:.3f}, {high:.3f}]"
            for rate in (before, after)
            for low, high in [wilson(round(rate * N), N)]
        ]
        lines.append(f"| {run.name} | {' | '.join(cells)} |")
        last.append(after)
    if (Q := len(last)) > 1:
        mean = float(np.mean(last))
        half = 1.96 * float(np.sqrt(np.var(last, ddof=1) / Q + mean * (1 - mean) / N))
        lines.append(f"| mean | | {mean:.3f} [{max(0.0, mean - half):.3f}, {min(1.0, mean + half):.3f}] |")
    return "\n".join([f"Greedily, {N} problems; 95 % intervals.", "", *lines, ""])


def _row(name: str, right: list[np.ndarray], reward: list[np.ndarray], written: Sequence[Sampled] = ()) -> str:
    cells = [_estimate(np.stack(right), ".3f"), _estimate(np.stack(reward), ".2f")]
    for figure in ("distinct_share", "distance", "distance_between_problems"):
        cells.append(f"{np.mean([one.figures[figure] for one in written]):.2f}" if written else "")
    told = [one.figures["naturalness"]["value"] for one in written if "naturalness" in one.figures]
    cells.append(f"{np.mean(told):.2f}" if told else "")
    return f"| {name} | {' | '.join(cells)} |"


def _estimate(value_QN: np.ndarray, form: str) -> str:
    """Mean and interval, over runs and problems drawn with replacement."""
    rng = numpy_generator(0, "best of n")
    Q, N = value_QN.shape
    mean_R = [value_QN[np.ix_(rng.integers(Q, size=Q), rng.integers(N, size=N))].mean() for _ in range(RESAMPLES)]
    low, high = percentile_interval(np.array(mean_R))
    return f"{value_QN.mean():{form}} [{low:{form}}, {high:{form}}]"


def _pays(base: Sampled, trained: Sequence[Sampled], spent: Sequence[float]) -> str:
    """What a right completion costs, and how many of them pay for the training."""
    before = base.right_N.mean() / base.samples
    after = float(np.mean([one.right_N.mean() / one.samples for one in trained]))
    if after == 0:
        return "The trained policies wrote nothing right."
    cost_after = float(np.mean([one.figures["mean_nfe"] for one in trained])) / after
    if before == 0:
        return f"A right completion takes {cost_after:.1f} forwards; the base wrote none."
    cost_before = base.figures["mean_nfe"] / before
    told = (
        f"A right completion takes {cost_before:.1f} forwards from the base and {cost_after:.1f} from a trained policy"
    )
    if cost_after >= cost_before:
        return f"{told}."
    T = float(np.mean(spent))
    return (
        f"{told}, so training has paid after {T / (cost_before - cost_after):.0f} right ones. Of ten times the "
        f"forwards of training come {10 * T / cost_before:,.0f} right ones from the base, and "
        f"{9 * T / cost_after:,.0f} when the first tenth is spent on training."
    )


def _range(values: Iterable[float]) -> str:
    found = list(values)
    low, high = f"{min(found):,.0f}", f"{max(found):,.0f}"
    return low if low == high else f"{low} to {high}"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 when something that is named isn't there or wasn't evaluated alike."""
    return exit_status(partial(_command, argv))


def _command(argv: Sequence[str] | None) -> int:
    parser = Parser(
        "python -m learner.evaluation.best_of_n",
        description="Trained policies beside the best of n completions from their base, at equal forward passes.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="runs that differ in their seeds")
    parser.add_argument("--base", type=Path, required=True, help="evaluation with samples of the base")
    options = parser.parse_args(argv)
    base = read_sampled(options.base, "base")
    runs = {run: newest_sampled(run) for run in options.runs}
    print("\n".join([comparison(base, runs), variety(base, runs), greedily(runs)]))
    return 0


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
