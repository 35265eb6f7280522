"""Settings of an evaluation: those of the run that it looks at, and its own. Imports no torch and no Ray."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from learner.settings import arguments as overrides
from learner.settings.run import DEFAULT_RECIPE, RunConfig, load_dumped, refuse_relative
from learner.settings.sections import Fraction, NonNegative, UserPath
from rewards.errors import ConfigError
from rewards.section import Section
from rollout.trajectory import PositionRule

STEP_DIVISORS = (1, 2, 4, 8)

NO_ADAPTER = "none"

_OWN = ("adapter", "base", "out", "data", "decode", "statistics")
# What an evaluation may change about a run that it looks at: where, how fast and by which judge, not what was trained.
_CHANGEABLE = (
    *("model.path", "model.cache_dir", "learner.dtype", "resources", "timeouts", "task.judge"),
    *("rollout.actors", "rollout.max_rows", "rollout.graders_per_actor", "rollout.grade_timeout_s"),
    *("rollout.engine", "rollout.vllm"),
)


class DataSection(Section):
    """The problems."""

    split: Literal["train", "test"] = "test"
    """train or test."""
    path: UserPath | None = None
    """File of problems, or hub:NAME[:CONFIG]:SPLIT, as task.test_path, instead of the split's own."""
    size: PositiveInt | None = None
    """Problems used; null: evaluation.problems, or the whole file that data.path names."""
    seed: NonNegativeInt | None = None
    """Seed of generated problems; null: run.seed."""


class DecodeSection(Section):
    """The grid: every order in every number of steps, greedily and sampled, and every threshold."""

    completion_length: PositiveInt | None = None
    """C, tokens; null: rollout.sampler.completion_length."""
    block_length: PositiveInt | None = None
    """Tokens of one block; null: rollout.sampler.block_length."""
    step_divisors: tuple[PositiveInt, ...] | None = None
    """Divide m, the training step count (scaled with C when that is changed); null: 1, 2, 4, 8 as far as they go."""
    steps: tuple[PositiveInt, ...] | None = None
    """Step counts instead of step_divisors."""
    position_rules: tuple[PositionRule, ...] | None = None
    """Which positions a step reveals; null: evaluation.position_rule and rollout.sampler.position_rule."""
    position_temperature: NonNegative | None = None
    """Of decoupled_confidence; null: rollout.sampler.position_temperature."""
    greedy: bool = True
    """Decode the grid at temperature 0."""
    thresholds: tuple[Fraction, ...] = (0.9,)
    """Reveal, greedily, all positions of the block whose largest probability is above this; []: none."""
    samples: NonNegativeInt = 0
    """n, completions per problem sampled over the grid, for pass@k; 0: none."""
    pass_at: tuple[PositiveInt, ...] | None = None
    """k of pass@k; null: 1, 2, 4, ... up to n."""
    temperature: PositiveFloat | None = None
    """When sampling; null: rollout.sampler.temperature."""
    top_k: NonNegativeInt | None = None
    """When sampling, 0: all tokens; null: rollout.sampler.top_k."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """When sampling, 1: all; null: rollout.sampler.top_p."""
    seed: NonNegativeInt | None = None
    """Names the noise of sampled tokens and random orders; null: run.seed."""


class StatisticsSection(Section):
    """Intervals."""

    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Coverage of every interval."""
    resamples: PositiveInt = 10_000
    """Bootstrap resamples of the problems."""
    naturalness: NonNegativeInt = 0
    """Completions of a problem whose tokens the base scores, each from all others (pseudo-log-likelihood); 0: none."""


class EvaluateConfig(RunConfig):
    """A run's settings and what to evaluate of it."""

    adapter: UserPath | None = None
    """Folder of a run, a checkpoint or a PEFT adapter; null: the adapter of the run given; none: the base alone."""
    base: bool = True
    """Evaluate the base beside the adapter."""
    out: UserPath | None = None
    """Output folder; null: RUN/evaluations/NAME, or evaluations/NAME, the name made from the settings."""
    data: DataSection = DataSection()
    decode: DecodeSection = DecodeSection()
    statistics: StatisticsSection = StatisticsSection()

    @model_validator(mode="after")
    def _grid_can_be_decoded(self) -> "EvaluateConfig":
        problems = _grid_problems(self)
        if problems:
            raise ConfigError("\n".join(problems))
        return self

    @property
    def lengths(self) -> tuple[int, int]:
        """(completion length, block length) of the grid."""
        sampler, decode = self.rollout.sampler, self.decode
        return (
            decode.completion_length or sampler.completion_length,
            decode.block_length or sampler.block_length,
        )

    @property
    def full_steps(self) -> int | None:
        """m at the grid's completion length: as many tokens a step as in training; None when that is no number of
        steps that the blocks can share."""
        (C, block), sampler = self.lengths, self.rollout.sampler
        steps, rest = divmod(sampler.steps * C, sampler.completion_length)
        return None if rest or not _shareable(steps, C, block) else steps

    @property
    def step_counts(self) -> tuple[int, ...]:
        """Numbers of denoising steps of the grid, descending."""
        if self.decode.steps is not None:
            return tuple(sorted(set(self.decode.steps), reverse=True))
        assert self.full_steps is not None, "the validator refuses this"
        asked = self.decode.step_divisors
        counts = {self.full_steps // d for d in asked or STEP_DIVISORS if self.full_steps % d == 0}
        return tuple(sorted((steps for steps in counts if _shareable(steps, *self.lengths)), reverse=True))

    @property
    def pass_at(self) -> tuple[int, ...]:
        """k of pass@k, ascending; empty when nothing is sampled."""
        if self.decode.pass_at is not None:
            return tuple(sorted(set(self.decode.pass_at)))
        return tuple(1 << power for power in range(self.decode.samples.bit_length()))

    @property
    def noise_seed(self) -> int:
        return self.run.seed if self.decode.seed is None else self.decode.seed


def load_evaluation(argv: Sequence[str], run: str | None) -> tuple[EvaluateConfig, Path | None]:
    """Settings from ``key.sub=value`` arguments, and the run directory they build on (None: a recipe).

    ``run`` is a run directory; without one, that of the run which ``adapter`` lies in is taken, unless a recipe is
    given. Raises ConfigError with one sentence (one line) per problem.
    """
    recipes = [argument.removeprefix("recipe=") for argument in argv if argument.startswith("recipe=")]
    settings = [argument for argument in argv if not argument.startswith("recipe=")]
    if len(recipes) > 1 or (recipes and run is not None):
        raise ConfigError("give one recipe=, or --run, which brings the run's own settings")
    if run is not None:
        run_dir: Path | None = Path(run).expanduser().absolute()
    else:
        run_dir = (
            None if recipes else _run_around([s.removeprefix("adapter=") for s in settings if s[:8] == "adapter="])
        )
    if run_dir is None:
        data = overrides.read_recipe(recipes[0] if recipes else DEFAULT_RECIPE)
    else:
        if not (run_dir / "config.json").is_file():
            raise ConfigError(f"no run at {run_dir}: config.json is not there; give the folder of an earlier run")
        data = json.loads(load_dumped(run_dir / "config.json").model_dump_json())
    for argument in settings:
        if run_dir is not None:
            _refuse_other_training(argument, run_dir)
        overrides.apply_override(data, argument, EvaluateConfig)
    learner = data.setdefault("learner", {})
    if isinstance(learner, dict) and learner.get("zero_stage", 0) == 0:
        learner["zero_stage"] = 1  # there are no gradients here, for whose sake stage 0 refuses bfloat16
    return overrides.validated(data, EvaluateConfig, source=""), run_dir


def check_paths(config: EvaluateConfig, run_dir: Path | None, in_job: bool) -> None:
    """Refuses relative paths inside a Ray job: its working directory is a temporary copy that Ray may delete."""
    if not in_job:
        return
    paths = {
        "out": config.out if config.out is not None or run_dir is not None else "evaluations",
        "adapter": None if config.adapter == NO_ADAPTER else config.adapter,
        "data.path": config.data.path,
        "task.train_path": config.task.train_path,
        "task.test_path": config.task.test_path,
        "model.path": config.model.path,
        "model.cache_dir": config.model.cache_dir,
        "UNMASK_CACHE": None if config.model.cache_dir else os.environ.get("UNMASK_CACHE"),
    }
    refuse_relative(paths)


def help_text() -> str:
    """The evaluation's own keys and what it may change about a run, with meaning, unit and default."""
    lines = ["keys (key.sub=value; what is shown is the default):"]
    lines += [_help_line(key, field) for key, field in overrides.leaf_fields(EvaluateConfig) if _begins(key, _OWN)]
    lines += ["", "with --run also these; with a recipe, every key of learner.main:"]
    lines += [
        _help_line(key, field) for key, field in overrides.leaf_fields(EvaluateConfig) if _begins(key, _CHANGEABLE)
    ]
    return "\n".join(lines) + "\n"


# ---- checks, each as one sentence


def _grid_problems(config: EvaluateConfig) -> list[str]:
    (C, block), decode = config.lengths, config.decode
    if C % block:
        return [f"{C} completion tokens are not a multiple of {block}; change decode.completion_length or block_length"]
    blocks = C // block
    problems = [
        f"decode.{name} is empty; leave it null for the default"
        for name in ("steps", "step_divisors", "position_rules")
        if getattr(decode, name) == ()
    ]
    if decode.steps is not None:
        if decode.step_divisors is not None:
            problems.append("decode.steps and decode.step_divisors are both given; give one")
        problems += [
            f"decode.steps holds {steps}, which {blocks} block(s) of {block} tokens can't share; "
            f"take multiples of {blocks} up to {C}"
            for steps in decode.steps
            if not _shareable(steps, C, block)
        ]
    elif config.full_steps is None:
        problems.append(
            f"the training step count gives none for decode.completion_length={C} in {blocks} block(s); "
            "set decode.steps"
        )
    else:
        problems += [
            f"decode.step_divisors holds {d}, and {config.full_steps} steps in {blocks} block(s) can't be cut by it; "
            "take another, or set decode.steps"
            for d in decode.step_divisors or ()
            if config.full_steps % d or not _shareable(config.full_steps // d, C, block)
        ]
    if not (decode.greedy or decode.thresholds or decode.samples):
        problems.append("decode.greedy=false, no decode.thresholds and decode.samples=0 leave nothing to decode")
    problems += [
        f"decode.pass_at holds {k}, and pass@{k} needs decode.samples of at least {k}, not {decode.samples}"
        for k in decode.pass_at or ()
        if k > decode.samples
    ]
    return problems


def _shareable(steps: int, C: int, block: int) -> bool:
    return C % block == 0 and 0 < steps <= C and steps % (C // block) == 0


def _refuse_other_training(argument: str, run_dir: Path) -> None:
    key = argument.partition("=")[0].strip()
    known = any(key == name for name, _ in overrides.leaf_fields(EvaluateConfig))
    if known and not _begins(key, (*_OWN, *_CHANGEABLE)):
        raise ConfigError(
            f"{key} says how {run_dir.name} was trained, which an evaluation can't change; "
            "data.*, decode.* and statistics.* say what is evaluated (see --help)"
        )


def _run_around(paths: Sequence[str]) -> Path | None:
    """The run directory that the adapter lies in, at most as deep as its checkpoints' adapters."""
    if not paths or paths[-1] in ("", "null", NO_ADAPTER):
        return None
    path = Path(paths[-1]).expanduser().absolute()
    for folder in (path, *list(path.parents)[:3]):
        if (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
            return folder
    return None


def _begins(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(section + ".") for section in sections)


def _help_line(key: str, field: Any) -> str:
    return f"  {key + '=' + json.dumps(field.get_default()):<44}{field.description}"
