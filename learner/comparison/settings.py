"""What is compared, and under which protocol. Imports no torch and no Ray."""

import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from learner.evaluation.settings import StatisticsSection
from learner.settings import arguments as overrides
from learner.settings.run import RunConfig
from learner.settings.sections import UserPath
from rewards.errors import ConfigError
from rewards.section import Section

OF_A_METHOD = (
    "objective.",
    *(f"learner.{name}" for name in ("lr", "warmup_fraction", "betas", "adam_eps", "weight_decay", "max_grad_norm")),
    "learner.updates_per_batch",
    *(f"rollout.sampler.{name}" for name in ("steps", "position_rule", "position_temperature")),
    "rollout.sampler.confidence_temperature",
)
"""Keys that a method may have of its own; one that ends in a dot stands for its section. All else is shared."""
OF_A_CELL = ("run.name", "run.dir", "run.seed", "run.iterations", "run.resume", "evaluation.every")
"""Keys that the comparison sets, run by run."""
GRID_KEY = "learner.lr"

_NAME = r"[A-Za-z0-9][A-Za-z0-9_]{0,39}"


class MethodSection(Section):
    """One of the methods that are compared."""

    recipe: str | None = None
    """Recipe whose settings it begins with; null: the comparison's."""
    settings: tuple[str, ...] = ()
    """Its own settings, as key.sub=value. Without a recipe and an objective.type among them, the method's name is its
    type."""
    grid: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = {}
    """Values by key, of which the best combination is looked for; empty: the learning rates that all methods share."""


class PaceSection(Section):
    """What --plan estimates with until there are runs to measure."""

    forwards_per_s: PositiveFloat = 450.0
    """Forward-equivalents a second of one run."""
    start_s: PositiveFloat = 75.0
    """Seconds of a run beside its training: imports, Ray, evaluations."""


class ComparisonConfig(Section):
    """The resolved settings of a comparison."""

    recipe: str = "sudoku"
    """Recipe that all methods begin with."""
    settings: tuple[str, ...] = ()
    """Settings that all methods share, as key.sub=value, laid over the recipes."""
    methods: Annotated[dict[str, MethodSection], Field(min_length=1)]
    """The methods by name; the first is what the others' differences are taken against."""
    budget: PositiveInt = 100_000
    """Forward-equivalents of each run's training: one forward of one sequence is 1, its backward 2 more."""
    learning_rates: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1e-3, 3e-4)
    """Peak learning rates that each method is tried with."""
    tuning_seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (100,)
    """Seeds of the runs that choose among a method's settings; they have bases and problems of their own."""
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0, 1, 2)
    """Seeds of the runs that are reported."""
    problems: PositiveInt = 256
    """Held-out problems that each trained adapter is evaluated on."""
    gradient_batches: NonNegativeInt = 0
    """Batches by which the noise of each method's gradient is measured, at the base of the first seed; 0: it isn't."""
    curve_points: PositiveInt = 8
    """Evaluations of a run on the way, on evaluation.problems of them."""
    out: UserPath = "runs/comparison"
    """Folder of the results and of all runs."""
    known: UserPath | None = None
    """results.json of an earlier comparison, whose runs count as done here."""
    run_limit_s: PositiveFloat = 7200.0
    """Longest time of one run's training, and of its evaluation; seconds."""
    statistics: StatisticsSection = StatisticsSection()
    pace: PaceSection = PaceSection()

    @model_validator(mode="after")
    def _no_contradictions(self) -> "ComparisonConfig":
        problems = [
            f"the name of method {name!r} is not usable: take up to 40 letters, digits or '_', beginning with a letter "
            "or digit"
            for name in self.methods
            if not re.fullmatch(_NAME, name)
        ]
        both = sorted(set(self.seeds) & set(self.tuning_seeds))
        if both:
            problems.append(
                f"seed {both[0]} is in tuning_seeds and in seeds: what chooses a method's settings must not be what is "
                "reported of it; take another"
            )
        for name in ("seeds", "tuning_seeds"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                problems.append(f"{name}={list(getattr(self, name))} names a seed twice")
        grids = {name: grid_points(self, name) for name in self.methods}
        for name, tried in grids.items():
            if twice := [point for number, point in enumerate(tried) if point in tried[:number]]:
                told = ", ".join(f"{key}={_yaml(value)}" for key, value in twice[0].items())
                problems.append(f"the grid of method {name} has {told} twice; take it out once")
        points = {name: len(tried) for name, tried in grids.items()}
        if len(set(points.values())) > 1:
            told = ", ".join(f"{name} {count}" for name, count in points.items())
            problems.append(f"the methods' grids have different sizes ({told}); give all of them as many points")
        given = (self.settings, *(about.settings for about in self.methods.values()))
        named = {setting.partition("=")[0] for settings in given for setting in settings}
        named |= {key for tried in grids.values() for point in tried for key in point}
        problems += [
            f"{key} is what a comparison sets, run by run (budget, seeds, tuning_seeds, curve_points, out); leave it "
            "out of settings and grids"
            for key in OF_A_CELL
            if key in named
        ]
        if problems:
            raise ConfigError("\n".join(problems))
        return self


Point = Mapping[str, Any]
"""A point of a method's grid: value by key."""


def grid_points(config: ComparisonConfig, method: str) -> list[dict[str, Any]]:
    """All combinations of a method's grid, in the order of its keys and values."""
    grid = config.methods[method].grid or {GRID_KEY: config.learning_rates}
    points: list[dict[str, Any]] = [{}]
    for key, values in grid.items():
        points = [{**point, key: value} for point in points for value in values]
    return points


def load_comparison(argv: Sequence[str], *, only: Sequence[str] = ()) -> ComparisonConfig:
    """The settings from ``plan=NAME_OR_PATH`` and ``key.sub=value`` arguments; every method's runs are checked.

    Args:
        only: names of the plan's methods to compare; empty: all of them.

    Raises:
        ConfigError: one sentence (one line) per problem.
    """
    plans = [argument.removeprefix("plan=") for argument in argv if argument.startswith("plan=")]
    if len(plans) > 1:
        raise ConfigError(f"plan is given {len(plans)} times ({', '.join(plans)}); give one")
    data = overrides.read_recipe(_plan_file(plans[0])) if plans else {}
    if isinstance(data.get("methods"), dict):  # one without settings of its own may be written as a name alone
        data["methods"] = {name: about or {} for name, about in data["methods"].items()}
    for argument in argv:
        if not argument.startswith("plan="):
            overrides.apply_override(data, argument, ComparisonConfig)
    if "methods" not in data:
        raise ConfigError(f"there is nothing to compare; give plan=NAME ({', '.join(plan_names())}) or methods={{...}}")
    methods = data["methods"]
    if isinstance(methods, dict):
        absent = [name for name in only if name not in methods]
        if absent:
            raise ConfigError(f"there is no method {absent[0]} to compare; there are {', '.join(methods)}")
        data["methods"] = {name: about or {} for name, about in methods.items() if not only or name in only}
    config = overrides.validated(data, ComparisonConfig, source="")
    require_equal_terms(config)
    return config


def plan_names() -> list[str]:
    """Names of the plans that are shipped, sorted."""
    files = (entry.name for entry in (resources.files("learner.comparison") / "plans").iterdir())
    return sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))


def _plan_file(name_or_path: str) -> str:
    if name_or_path.lower().endswith((".yaml", ".yml")):
        return name_or_path
    if name_or_path not in plan_names():
        shipped = ", ".join(plan_names())
        raise ConfigError(f"there is no plan '{name_or_path}'; shipped are {shipped}, or give the path of a .yaml file")
    return str(Path(str(resources.files("learner.comparison") / "plans")) / f"{name_or_path}.yaml")


# ---- the settings of the runs


def step_counts(config: ComparisonConfig) -> tuple[int, ...]:
    """Numbers of denoising steps in which all methods are evaluated: m, m/2, ... of the shared settings."""
    shared = _shared(config)
    return tuple(shared.rollout.sampler.steps // divisor for divisor in shared.evaluation.step_divisors)


def method_arguments(config: ComparisonConfig, method: str, point: Point) -> list[str]:
    """``learner.main``'s arguments for a method with a point of its grid, but for what a cell sets. One that trains in
    another number of steps is evaluated in the shared ones all the same."""
    arguments = _own_arguments(config, method, point)
    steps, counts = run_config(arguments).rollout.sampler.steps, step_counts(config)
    if steps in counts:
        return arguments
    divisors = [1, *(steps // count for count in counts)]
    return [*arguments, f"evaluation.step_divisors={divisors}"]


def _shared(config: ComparisonConfig) -> RunConfig:
    return run_config([f"recipe={config.recipe}", *config.settings])


def _own_arguments(config: ComparisonConfig, method: str, point: Point) -> list[str]:
    about = config.methods[method]
    named = about.recipe is not None or any(setting.startswith("objective.type=") for setting in about.settings)
    own = [*([] if named else [f"objective.type={method}"]), *about.settings]
    values = [f"{key}={_yaml(value)}" for key, value in point.items()]
    return [f"recipe={about.recipe or config.recipe}", *config.settings, *own, *values]


def run_config(arguments: Sequence[str]) -> RunConfig:
    """The settings that ``learner.main`` makes of the arguments. Raises ConfigError."""
    return overrides.settings_from_arguments(arguments, RunConfig, kind="run")


def require_equal_terms(config: ComparisonConfig) -> None:
    """Refuses methods that differ in more than what makes a method. Raises ConfigError, one sentence per problem."""
    problems = []
    shared = overrides.flat(_shared(config).model_dump(mode="json"))
    for method in config.methods:
        for point in grid_points(config, method):
            try:
                run = run_config(_own_arguments(config, method, point))
            except ConfigError as error:
                problems += [f"method {method}: {problem}" for problem in str(error).splitlines()]
                break
            if run.learner.lr_schedule != "constant":
                problems.append(
                    f"learner.lr_schedule={run.learner.lr_schedule} depends on a run's length, which the budget "
                    "decides here; take constant"
                )
            steps, counts = run.rollout.sampler.steps, step_counts(config)
            if steps < counts[0] or any(steps % count for count in counts):
                problems.append(
                    f"method {method} has rollout.sampler.steps={steps}, which can't be cut into the "
                    f"{', '.join(map(str, counts))} steps that all methods are evaluated in; take a multiple of them"
                )
            if run.rollout.sampler.threshold is not None:
                problems.append(
                    f"method {method} samples with rollout.sampler.threshold={run.rollout.sampler.threshold}, and "
                    "what a comparison plans and evaluates is in steps; take steps"
                )
            own = overrides.flat(run.model_dump(mode="json"))
            if others := [key for key in {**shared, **own} if shared.get(key) != own.get(key) and not _may_differ(key)]:
                problems.append(_unequal(method, {key: (own.get(key), shared.get(key)) for key in others}))
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))


def _unequal(method: str, others: Mapping[str, tuple[Any, Any]]) -> str:
    told = [f"{key}={_yaml(own)} where the comparison has {_yaml(shared)}" for key, (own, shared) in others.items()]
    more = f" and {len(told) - 3} more" if len(told) > 3 else ""
    return (
        f"method {method} has {', '.join(told[:3])}{more}; only objective, learning rate, optimizer, updates per "
        "batch, steps and order of positions in training are a method's own, so set it in settings, for all methods, "
        "or take it out"
    )


def _may_differ(key: str) -> bool:
    return key in OF_A_METHOD or key in OF_A_CELL or key.startswith(OF_A_METHOD[0])


def _yaml(value: Any) -> str:
    """A value as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def help_text() -> str:
    """The plans, and every key of a comparison with its meaning, unit and default."""
    lines = ["plans (plan=NAME, or the path of a .yaml file):"]
    lines += [f"  {name}" for name in plan_names()]
    lines += ["", "keys (key.sub=value; what is shown is the default before the plan):"]
    for key, field in overrides.leaf_fields(ComparisonConfig):
        default = "" if field.is_required() else json.dumps(field.get_default())
        lines.append(f"  {key + '=' + default:<44}{field.description}")
    lines += ["", "of each method, methods.NAME.key:"]
    lines += [f"  {key:<44}{field.description}" for key, field in overrides.leaf_fields(MethodSection)]
    return "\n".join(lines) + "\n"
