"""The cells of a comparison: one run each, of a method with a point of its grid and a seed.

Which cells there are follows from the settings, and from what the tuning cells found: their results choose the point
that a method is reported with, and their measured cost the number of iterations that the budget pays for.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from learner.comparison.budget import iterations_for, planned_cost
from learner.comparison.settings import ComparisonConfig, grid_points, method_arguments, run_config, step_counts
from learner.settings.arguments import validated
from learner.settings.run import RunConfig
from learner.settings.saved import OF_A_START, is_run, saved_settings
from rewards.errors import ConfigError, first_line

Role = Literal["tuning", "reported"]

REPORTED = frozenset(("iterations", "spent", "solved", "curve", "machine"))
"""What the results of every cell have at least."""
_ABOUT = frozenset(("key", "method", "role", "point", "seed", "arguments", "failed"))
"""What a report has of a cell beside its results."""


@dataclass(frozen=True)
class Cell:
    """A run that is to be trained and evaluated."""

    method: str
    role: Role
    point: Mapping[str, Any]
    """Value by key of the method's grid."""
    seed: int
    iterations: int
    evaluate_every: int
    problems: int
    """Held-out problems of the evaluation."""
    step_counts: tuple[int, ...]
    """Numbers of denoising steps of the evaluation, the largest first."""
    shared_arguments: tuple[str, ...]
    """``learner.main``'s, but for what the fields above say."""

    @property
    def name(self) -> str:
        """Of the run's folder."""
        values = "-".join(f"{key.rpartition('.')[2]}{_plain(value)}" for key, value in self.point.items())
        return f"{self.method}-{values}-s{self.seed}"

    @property
    def arguments(self) -> list[str]:
        """What ``learner.main`` trains with, but for the place."""
        return [
            *self.shared_arguments,
            f"run.seed={self.seed}",
            f"run.iterations={self.iterations}",
            f"evaluation.every={self.evaluate_every}",
        ]

    @cached_property
    def run(self) -> RunConfig:
        """The run's settings."""
        return run_config(self.arguments)

    @cached_property
    def key(self) -> str:
        """Names all that the cell's results depend on, 16 hex digits."""
        about = json.dumps([_decisive(self.run), self.problems, self.step_counts], sort_keys=True)
        return hashlib.sha256(about.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Findings:
    """What a cell gave, as its file holds it."""

    key: str
    failed: str | None
    """Why it has no results, in one sentence."""
    results: Mapping[str, Any]
    """See ``learner.comparison.findings``; empty where it failed."""

    @classmethod
    def read(cls, path: Path) -> "Findings | None":
        """None where there are none, or where they are not readable or not whole: they are made from the run again."""
        try:
            findings = cls(**json.loads(path.read_text(encoding="utf-8")))
            whole = findings.failed is not None or set(findings.results) >= REPORTED
        except (OSError, ValueError, TypeError):
            return None
        return findings if whole else None


Found = Mapping[str, Findings]
"""By the cell's name."""


def tuning_cells(config: ComparisonConfig, method: str) -> list[Cell]:
    """The cells that choose a method's point, in the order of its grid; each has the iterations that the budget pays
    for, to the nearest, at the method's full cost."""
    cells = []
    for point in grid_points(config, method):
        arguments = method_arguments(config, method, point)
        iterations = iterations_for(config.budget, planned_cost(run_config(arguments)))
        cells += [_cell(config, method, "tuning", point, seed, iterations) for seed in config.tuning_seeds]
    return cells


def chosen_point(config: ComparisonConfig, method: str, found: Found) -> dict[str, Any] | None:
    """The point with the highest mean solve rate, in the most steps, of its tuning cells; the first of equals. None
    while one of them is missing, and when every point has a cell that failed."""
    rates = {}
    for number, point in enumerate(grid_points(config, method)):
        cells = [cell for cell in tuning_cells(config, method) if cell.point == point]
        if any(cell.name not in found for cell in cells):
            return None
        results = [found[cell.name] for cell in cells]
        if not any(each.failed for each in results):
            rates[number] = sum(full_rate(each) for each in results) / len(results)
    return grid_points(config, method)[max(rates, key=lambda number: (rates[number], -number))] if rates else None


def reported_cells(config: ComparisonConfig, method: str, found: Found) -> list[Cell]:
    """The cells that are reported of a method; empty while its point isn't known, and where it has none.

    A method spends less than its full cost where completions without signal aren't scored, so what its tuning cells
    spent says how many iterations the budget pays for.
    """
    point = chosen_point(config, method, found)
    if point is None:
        return []
    tuned = [found[cell.name].results for cell in tuning_cells(config, method) if cell.point == point]
    cost = sum(each["spent"]["total"] for each in tuned) / sum(each["iterations"] for each in tuned)
    iterations = iterations_for(config.budget, cost)
    return [_cell(config, method, "reported", point, seed, iterations) for seed in config.seeds]


def known_cells(config: ComparisonConfig, found: Found, role: Role) -> list[Cell]:
    """The cells that the findings so far tell of, in the order in which they are to be run. The reported ones go by
    seed, so that a comparison which is cut short is one of all methods."""
    if role == "tuning":
        return [cell for method in config.methods for cell in tuning_cells(config, method)]
    by_method = [reported_cells(config, method, found) for method in config.methods]
    return [cells[number] for number in range(len(config.seeds)) for cells in by_method if cells]


def ready_cells(config: ComparisonConfig, found: Found) -> list[Cell]:
    """The cells that are known and not done, in the order in which they are to be run: tuning first."""
    cells = [*known_cells(config, found, "tuning"), *known_cells(config, found, "reported")]
    return [cell for cell in cells if cell.name not in found]


def found_cells(config: ComparisonConfig, out: Path) -> dict[str, Findings]:
    """What the folder, or else the known results, hold of the comparison's cells, by name.

    Raises:
        ConfigError: a cell was run, or begun, with other settings; or the known results can't be read.
    """
    found: dict[str, Findings] = {}
    known = {} if config.known is None else _known(Path(config.known).expanduser())
    for role in ("tuning", "reported"):  # what the first ones found says which the others are
        for cell in known_cells(config, found, role):
            findings = Findings.read(findings_path(out, cell))
            if not (_begun_alike(out / cell.name, cell) if findings is None else findings.key == cell.key):
                there = "" if findings is None else f" and {findings_path(out, cell)}"
                raise ConfigError(
                    f"{out / cell.name} is a run of other settings than this comparison's; set them back, give another "
                    f"out=, or delete that folder{there}"
                )
            if findings is None and cell.name in known and not is_run(out / cell.name):
                findings = known[cell.name]
                if findings.key != cell.key:
                    raise ConfigError(
                        f"{cell.name} of {config.known} is a run of other settings than this comparison's; set them "
                        "back, or leave out known="
                    )
            if findings is not None:
                found[cell.name] = findings
    return found


def _known(path: Path) -> dict[str, Findings]:
    """The cells that a report of a comparison has results of."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        cells, machines = report["cells"], report["machine"]["cells"]
        return {
            name: Findings(
                about["key"],
                None,
                {part: value for part, value in about.items() if part not in _ABOUT} | {"machine": machines[name]},
            )
            for name, about in cells.items()
            if about["failed"] is None
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"known={path} is not the results.json of a comparison: {first_line(error)}") from error


def findings_path(out: Path, cell: Cell) -> Path:
    """Where a cell's findings are kept."""
    return out / "cells" / f"{cell.name}.json"


def full_rate(findings: Findings) -> float:
    """Solve rate in the most denoising steps of the evaluation."""
    solved = findings.results["solved"]
    trained: str = solved[max(solved, key=int)]["trained"]
    return trained.count("1") / len(trained)


def _decisive(run: RunConfig) -> dict[str, Any]:
    """The settings that a cell's results depend on."""
    settings = run.model_dump(mode="json", exclude={"resources", "timeouts", "store", "trackers"})
    for actors in ("actors", "max_actors"):
        settings["rollout"].pop(actors)
    return settings


def _begun_alike(folder: Path, cell: Cell) -> bool:
    """Whether the run that was begun in the folder, if one was, has the cell's settings: it would go on with its
    own, over which only those that the cell names are laid."""
    if not is_run(folder):
        return True
    saved = validated(saved_settings(folder), RunConfig, source=f"'{folder}'")
    own, wanted = _decisive(saved), _decisive(cell.run)
    for key in OF_A_START:
        del own["run"][key], wanted["run"][key]
    return own == wanted


def _cell(
    config: ComparisonConfig, method: str, role: Role, point: Mapping[str, Any], seed: int, iterations: int
) -> Cell:
    return Cell(
        method=method,
        role=role,
        point=point,
        seed=seed,
        iterations=iterations,
        evaluate_every=max(1, -(-iterations // config.curve_points)),
        problems=config.problems,
        step_counts=step_counts(config),
        shared_arguments=tuple(method_arguments(config, method, point)),
    )


def _plain(value: Any) -> str:
    """A value as a part of a folder's name."""
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_")
