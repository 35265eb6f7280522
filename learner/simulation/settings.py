"""What is simulated: a run's settings, its service times, and what goes wrong. Imports no torch and no Ray."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from learner.settings import arguments as overrides
from learner.settings.run import DEFAULT_RECIPE, RunConfig
from learner.settings.saved import CONFIG
from learner.settings.sections import Fraction, NonNegative
from rewards.errors import ConfigError

ACTORS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 10_000)


class SimulationConfig(RunConfig):
    """The settings of a run, and beside them those of its simulation. Times in seconds, sizes in 10^6 bytes; null: as
    the run of --run measured it, or as learner.plan estimates it."""

    actors: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = ACTORS
    """Numbers of rollout actors, one row each."""
    iterations: Annotated[int, Field(ge=4)] | None = None
    """Iterations of each row that are counted; null: 40, fewer where that makes more than 20,000 leases, 6 at least."""
    warm_up: NonNegativeInt | None = None
    """Iterations before those; null: a fifth of them, and as many for each version that groups may be behind."""
    most_idle: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of time that the recommended number of actors leaves either side idle, at most."""
    lease_s: PositiveFloat | None = None
    """An actor's time for a lease of rollout.groups_per_lease groups, without loading weights."""
    lease_spread: NonNegative | None = None
    """Standard deviation of a lease's time, as a share of it; null without --run: 0.2."""
    load_s: NonNegative | None = None
    """An actor's time to fetch, copy and hash a version that it does not hold; null without --run: 1 GB/s."""
    update_s: PositiveFloat | None = None
    """The ranks' time for all updates of an iteration."""
    update_spread: NonNegative | None = None
    """Standard deviation of update_s, as a share of it; null without --run: 0.05."""
    publish_s: NonNegative | None = None
    """From the end of the update until the new version can be leased; null without --run: 0.5 GB/s."""
    report_s: NonNegative = 0.0
    """What the controller does between two iterations beside that."""
    adapter_mb: NonNegative | None = None
    """Size of the adapter."""
    group_mb: NonNegative | None = None
    """Size of a group in the object store; null: as learner.plan estimates it."""
    controller_groups_per_s: PositiveFloat = 250.0
    """Groups that the controller passes on when it does nothing else (python -m learner.bench.control measures it: 126
    to 294 on two cores that actors and ranks used too)."""
    link_mb_s: PositiveFloat = 1250.0
    """What the link of a node carries; 1250: 10 Gbit/s."""
    actors_per_node: PositiveInt = 8
    """Actors that share a node's link and its copy of the adapter."""
    mean_time_between_failures_s: PositiveFloat | None = None
    """Of one actor; null: none fails."""
    replace_s: NonNegative = 60.0
    """From an actor's death, as the controller sees it, until another one is ready."""
    hangs: Fraction = 0.0
    """Share of failures in which a busy actor hangs instead of dying; timeouts.heartbeat finds it."""
    slow: Fraction = 0.0
    """Share of the actors that are slow."""
    slow_by: Annotated[float, Field(ge=1)] = 3.0
    """How many times as long a slow actor takes."""

    @model_validator(mode="after")
    def _two_sides(self) -> "SimulationConfig":
        if self.resources.one_process:
            raise ConfigError(
                "resources.one_process=true makes actors and ranks the same processes, which take turns: there is no "
                "number of actors and no staleness to choose; give resources.one_process=false"
            )
        return self

    @property
    def leases_per_iteration(self) -> int:
        """Leases that an iteration is cut into."""
        return -(-self.rollout.prompts_per_iteration // self.rollout.groups_per_lease)

    @property
    def counted(self) -> int:
        """``iterations``, its default filled in."""
        return self.iterations or max(6, min(40, 20_000 // self.leases_per_iteration))

    @property
    def warming(self) -> int:
        """``warm_up``, its default filled in: actors that are a little too fast need long to fill the buffer."""
        of_a_version = -(-self.counted // 5)
        return of_a_version * (self.rollout.max_staleness + 1) if self.warm_up is None else self.warm_up


OWN = tuple(name for name in SimulationConfig.model_fields if name not in RunConfig.model_fields)


def load_simulation(argv: Sequence[str], run: Path | None) -> tuple[SimulationConfig, RunConfig | None]:
    """The settings from ``recipe=NAME_OR_PATH`` and ``key.sub=value`` arguments, and those that ``run`` had; with a run
    the arguments are laid over its settings.

    Raises:
        ConfigError: one sentence (one line) per problem.
    """
    if run is None:
        return overrides.settings_from_arguments(argv, SimulationConfig, kind="run", default=DEFAULT_RECIPE), None
    if recipe := overrides.recipe_in(argv, "run"):
        raise ConfigError(f"--run {run} has settings of its own, so recipe={recipe} would not be heard; leave one out")
    saved = _saved(run)
    before = overrides.validated(saved, RunConfig, source=str(run / CONFIG))
    # Through JSON, for the arguments are laid into it.
    settings = overrides.laid_over(json.loads(before.model_dump_json()), argv, SimulationConfig)
    return overrides.validated(settings, SimulationConfig, source=""), before


def help_text() -> str:
    """The simulation's own keys; those of a run are ``learner.main``'s."""
    lines = ["keys of the simulation (key=value; what is shown is the default):"]
    for name in OWN:
        field = SimulationConfig.model_fields[name]
        lines.append(f"  {name + '=' + json.dumps(field.get_default()):<44}{field.description}")
    lines += [
        "",
        "All keys of learner.main are settings too. These matter: rollout.max_staleness, prompts_per_iteration, "
        "groups_per_lease,",
        "buffer_groups and second_lease_after_s, timeouts.lease and timeouts.heartbeat, run.seed. docs/simulation.md "
        "says what is computed.",
    ]
    return "\n".join(lines) + "\n"


def _saved(run: Path) -> dict[str, Any]:
    try:
        saved = json.loads((run / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--run {run} is no run's folder: {CONFIG} can't be read ({error})") from None
    if not isinstance(saved, dict) or "rollout" not in saved:
        raise ConfigError(f"--run {run} is no run of reinforcement learning; give the folder of one")
    return saved
