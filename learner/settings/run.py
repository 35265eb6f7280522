"""Every setting of a run, checked together before anything starts.

``load_config`` builds a ``RunConfig`` from a recipe and ``key.sub=value`` arguments; the sections are in
``learner.settings.sections``. Imports no torch and no Ray.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt, model_validator

from learner.settings import arguments as overrides
from learner.settings.methods.states import AgrpoConfig
from learner.settings.objectives import ObjectiveConfig
from learner.settings.one_process import one_process_problems
from learner.settings.resuming import load_start
from learner.settings.saved import run_of
from learner.settings.sections import (
    CheckpointSection,
    EvaluationSection,
    GroupSection,
    LearnerSection,
    LoraSection,
    ModelSection,
    ResourcesSection,
    RewardSection,
    RolloutSection,
    RunPlace,
    RunSection,
    StoreSection,
    TaskSection,
    TimeoutsSection,
)
from rewards.errors import ConfigError
from rewards.judge.judged import grading_problems
from rewards.section import Section
from rewards.tasks.hub import PREFIX

DEFAULT_RECIPE = "sudoku"
LARGEST_GROUP = 4096
"""Completions, a hundred times what published runs take."""


class RunConfig(Section):
    """The resolved settings of a run."""

    run: RunSection = RunSection()
    task: TaskSection = TaskSection()
    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    rollout: RolloutSection = RolloutSection()
    reward: RewardSection = RewardSection()
    learner: LearnerSection = LearnerSection()
    objective: ObjectiveConfig = AgrpoConfig()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    resources: ResourcesSection = ResourcesSection()
    timeouts: TimeoutsSection = TimeoutsSection()
    store: StoreSection = StoreSection()
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also report to these: tensorboard, wandb."""
    samples_per_iteration: NonNegativeInt = 2
    """Completions kept per iteration for playback, rounded up to whole groups, so that two of a group can be compared;
    0 keeps none."""

    @model_validator(mode="after")
    def _no_contradictions(self) -> "RunConfig":
        problems = [
            *name_problems(self.run.name),
            *store_problems(self.store),
            *_sampler_problems(self),
            *self.objective.refuses(self.rollout.sampler.spec()),
            *_reward_problems(self),
            *self.rollout.refuses(),
            *_rollout_problems(self),
            *_phase_problems(self),
            *group_problems(self.learner, self.resources),
            *one_process_problems(self.resources, self.rollout, self.learner),
            *model_problems(self.model, self.learner),
        ]
        if problems:
            raise ConfigError("\n".join(problems))
        return self


def load_config(argv: Sequence[str]) -> RunConfig:
    """The settings of a run from its arguments: ``recipe=NAME_OR_PATH`` (default sudoku) and ``key.sub=value``;
    ``resume=`` is short for ``run.resume=``, and the run that it names gives the settings that no argument does.

    Raises ConfigError with one sentence (one line) per problem.
    """
    return load_start(argv, RunConfig, kind="run", default=DEFAULT_RECIPE)


def dump_config(config: Section) -> str:
    """The settings as JSON, in the order of the models, ending in a newline; ``load_dumped`` reads it back."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"


def load_dumped(path: str | Path) -> RunConfig:
    """The settings that ``dump_config`` wrote to ``path``. Raises ConfigError."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"'{path}' is not a saved configuration: {error}") from None
    return overrides.validated(data, RunConfig, source=f"'{path}'")


def help_text() -> str:
    """The recipes, and every key with its meaning, unit and default."""
    return overrides.help_text(RunConfig, "run")


def in_ray_job() -> bool:
    """Whether this process is the entry point of ``ray job submit`` (which sets this variable, unlike RAY_JOB_ID)."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def check_paths(config: RunConfig, in_job: bool) -> None:
    """Refuses what is to be read and isn't there, and inside a Ray job relative paths: its working directory is a
    temporary copy that Ray may delete."""
    read = {
        "run.resume": named_resume(config.run),
        "task.train_path": config.task.train_path,
        "task.test_path": config.task.test_path,
        "model.path": config.model.path,
        "lora.adapter": None if run_of(config.run.resume) else config.lora.adapter,  # a run that goes on has its own
    }
    if in_job:
        written = {
            "run.dir": config.run.dir,
            "model.cache_dir": config.model.cache_dir,
            "task.judge.cache_dir": config.task.judge.cache_dir,
            "UNMASK_CACHE": None if config.model.cache_dir else os.environ.get("UNMASK_CACHE"),
        }
        refuse_relative(written | read)
    refuse_absent(read)


def named_resume(run: RunPlace) -> str | None:
    """The path in ``run.resume``; None where there is none."""
    return None if run.resume in ("never", "auto") else run.resume


def refuse_relative(paths: Mapping[str, str | None]) -> None:
    """Raises ConfigError naming the settings, by key, whose paths are relative; names of the hub are none."""
    files = {
        key: path
        for key, path in paths.items()
        if path and not path.startswith(PREFIX) and not (key == "model.path" and _is_hub_name(path))
    }
    relative = [(key, path) for key, path in files.items() if not Path(path).expanduser().is_absolute()]
    if relative:
        raise ConfigError(
            "\n".join(
                f"{key}={path} is relative, and a Ray job works in a temporary copy that Ray may delete; "
                "give an absolute path"
                for key, path in relative
            )
        )


def refuse_absent(paths: Mapping[str, str | None]) -> None:
    """Raises ConfigError naming the settings, by key, that name a file or folder that isn't there. What may be on the
    hub isn't looked for: that takes a network."""

    def here(key: str, path: str) -> bool:
        as_folder = path.startswith((".", "~", "/")) or path.count("/") > 1
        return not path.startswith(PREFIX) and (key != "model.path" or as_folder)

    def there(key: str, path: str) -> bool:
        # A run knows its checkpoints, and says more of one that it hasn't.
        return Path(path).expanduser().exists() or (key == "run.resume" and run_of(path) is not None)

    absent = [(key, path) for key, path in paths.items() if path and here(key, path) and not there(key, path)]
    if absent:
        raise ConfigError("\n".join(f"{key}={path}: there is no such file or folder" for key, path in absent))


def _is_hub_name(model_path: str) -> bool:
    """Whether this reads as a model of the hub, ``owner/name``, and no folder here has that name."""
    name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model_path)
    return name is not None and not Path(model_path).exists()


def bias_warnings(config: RunConfig) -> list[str]:
    """What makes this run's gradient another than that of expected reward, one sentence each."""
    sampler = config.rollout.sampler
    rule = f"rollout.sampler.position_rule={sampler.position_rule}"
    remedy = "random and left_to_right are unbiased, and so is decoupled_confidence with position_temperature above 0"
    if sampler.position_rule in ("low_confidence", "entropy"):
        return [f"{rule} chooses positions by the policy and their choice isn't scored: biased; {remedy}"]
    if sampler.position_rule == "decoupled_confidence" and sampler.position_temperature == 0:
        return [f"{rule} with position_temperature=0 is greedy in its positions and scores no choice: biased; {remedy}"]
    return []


def required_resources(config: RunConfig) -> tuple[float, float]:
    """(logical CPUs, GPUs) that the ranks and the fewest actors that will do ask for together."""
    actors, ranks, resources = config.rollout.fewest_actors, config.learner.ranks, config.resources
    cpus = actors * resources.cpus_per_actor + ranks * resources.cpus_per_rank
    return cpus, actors * resources.gpus_per_actor + ranks * resources.gpus_per_rank


def check_resources(config: RunConfig, cpus: float, gpus: float) -> None:
    """Refuses a run that asks for more than the Ray cluster's ``cpus`` (logical) and ``gpus``. Raises ConfigError."""
    actors, ranks = config.rollout.fewest_actors, config.learner.ranks
    for name, needed, present in zip(("CPUs", "GPUs"), required_resources(config), (cpus, gpus), strict=True):
        if needed > present:
            raise ConfigError(
                f"learner.ranks={ranks} and rollout.actors={actors} ask for {needed:g} {name} and Ray has {present:g}; "
                f"lower one of them, or resources.{name.lower()}_per_rank or resources.{name.lower()}_per_actor"
            )


# ---- contradictions, each as one sentence


def store_problems(store: StoreSection) -> list[str]:
    """What is wrong with the place of the run's records; a password is not repeated."""
    if (url := store.url) is None:
        return []
    if not url.startswith(("postgresql://", "sqlite:////")):
        return [f"store.url={url.partition('://')[0]}... is no run store: use postgresql://user@host/database, or null"]
    if ":" in url.partition("://")[2].rpartition("@")[0] or "password=" in url:
        return ["store.url holds a password, which config.json would show: put it into PGPASSWORD or ~/.pgpass"]
    return []


def name_problems(name: str | None) -> list[str]:
    """What is wrong with the name that the run is to have, which becomes its folder's; None gives it one."""
    if name is None or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        return []
    return [
        f"run.name={name} is not usable: take up to 100 letters, digits, '.', '_' or '-', beginning with "
        "a letter or digit"
    ]


def _sampler_problems(config: RunConfig) -> list[str]:
    sampler, prefix = config.rollout.sampler, "rollout.sampler"
    length, block, steps = sampler.completion_length, sampler.block_length, sampler.steps
    problems = []
    if length % block:
        problems.append(
            f"{prefix}.completion_length={length} is not a multiple of {prefix}.block_length={block}; "
            "take a block length that divides it"
        )
        return problems
    blocks = length // block
    if steps % blocks or length % steps:
        allowed = [m for m in range(blocks, length + 1, blocks) if length % m == 0]
        problems.append(
            f"{prefix}.steps={steps} does not reveal the same number of tokens in every step (it must divide "
            f"{prefix}.completion_length={length} and be a multiple of the number of blocks, {blocks}); "
            f"take one of {', '.join(map(str, allowed))}"
        )
    else:
        problems += [
            f"evaluation.step_divisors holds {d}, and {prefix}.steps={steps} ({blocks} block(s)) can't be cut by it; "
            f"take divisors of {steps // blocks}"
            for d in config.evaluation.step_divisors
            if steps % (d * blocks)
        ]
    if 1 not in config.evaluation.step_divisors:
        problems.append("evaluation.step_divisors lacks 1, the full number of steps, which picks the best checkpoint")
    return problems


def _reward_problems(config: RunConfig) -> list[str]:
    reward, sampler, problems = config.reward, config.rollout.sampler, []
    if reward.speed_weight and sampler.threshold is None:
        problems.append(
            f"reward.speed_weight={reward.speed_weight:g} needs rollout.sampler.threshold, or the number of forward "
            "passes isn't the policy's doing; set it (0.9, for example), or the weight to 0"
        )
    if reward.normalise == "components" and config.objective.smallest_group < 2:
        problems.append(
            f"reward.normalise=components counts rewards against the others of a prompt, and objective.type="
            f"{config.objective.type} takes each as it is; leave it at total"
        )
    branched = config.objective.branches(sampler.spec()) is not None
    diverse = reward.diversity_weight and not config.objective.fills_leave_out_diversity
    if branched and (reward.speed_weight or diverse or reward.normalise == "components"):
        diversity = " and reward.diversity_weight" if diverse else ""
        problems.append(
            f"objective.type={config.objective.type} compares completions with branches, which are graded by the task "
            f"alone; leave reward.speed_weight{diversity} at 0 and reward.normalise at total"
        )
    return problems


def _rollout_problems(config: RunConfig) -> list[str]:
    rollout, problems = config.rollout, []
    if rollout.groups_per_lease > rollout.prompts_per_iteration:
        problems.append(
            f"rollout.groups_per_lease={rollout.groups_per_lease} is more than "
            f"rollout.prompts_per_iteration={rollout.prompts_per_iteration}; lower it"
        )
    if rollout.group_size < config.objective.smallest_group:
        problems.append(
            f"rollout.group_size={rollout.group_size} gives a completion none to be compared with; take "
            f"{config.objective.smallest_group} or more"
        )
    if rollout.group_size > LARGEST_GROUP:
        problems.append(
            f"rollout.group_size={rollout.group_size} is more than {LARGEST_GROUP}, and a group is drawn, delivered "
            "and recorded as a whole; lower it, and raise rollout.prompts_per_iteration for more completions"
        )
    if rollout.fewest_actors > rollout.wanted_actors:
        problems.append(
            f"rollout.actors.min={rollout.fewest_actors} is more than rollout.actors.max={rollout.wanted_actors}; "
            "lower the one or raise the other"
        )
    if rollout.max_actors is not None and rollout.max_actors < rollout.wanted_actors:
        problems.append(
            f"rollout.max_actors={rollout.max_actors} is less than the {rollout.wanted_actors} that rollout.actors "
            "asks for; raise it, or leave it null"
        )
    if rollout.buffer_size < rollout.prompts_per_iteration:
        problems.append(
            f"rollout.buffer_groups={rollout.buffer_groups} can't hold one iteration of "
            f"{rollout.prompts_per_iteration} groups; raise it to at least that"
        )
    if config.evaluation.problems > config.task.test_size:
        problems.append(
            f"evaluation.problems={config.evaluation.problems} is more than task.test_size={config.task.test_size}; "
            "lower the one or raise the other"
        )
    problems += grading_problems(config.task.name, config.task.judge, rollout.grade_timeout_s)
    if config.model.base.d_model % (2 * config.model.base.n_heads):
        problems.append(
            f"model.base.d_model={config.model.base.d_model} does not split into "
            f"model.base.n_heads={config.model.base.n_heads} heads of even width; change one of them"
        )
    return problems


def _phase_problems(config: RunConfig) -> list[str]:
    phases, rollout = config.objective.phases(), config.rollout
    if phases is None:
        return []
    problems = []
    if phases.prompts < rollout.prompts_per_iteration:
        problems.append(
            f"objective.buffer_prompts={phases.prompts} can't hold the {rollout.prompts_per_iteration} groups that "
            "rollout.prompts_per_iteration draws; raise the one or lower the other"
        )
    if rollout.max_staleness > 0:
        problems.append(
            f"rollout.max_staleness={rollout.max_staleness} would draw ahead with the teacher of the phase before; "
            f"objective.type={config.objective.type} needs 0"
        )
    if rollout.buffer_groups is not None and rollout.buffer_groups < phases.prompts:
        problems.append(
            f"rollout.buffer_groups={rollout.buffer_groups} can't hold the {phases.prompts} groups that a phase begins "
            "with; raise it to at least that, or leave it null"
        )
    return problems


def group_problems(learner: GroupSection, resources: ResourcesSection) -> list[str]:
    """Contradictions between the ranks' settings and what they ask Ray for."""
    device, problems = learner.device, []
    if device == "cpu" and resources.gpus_per_rank > 0:
        problems.append(
            f"resources.gpus_per_rank={resources.gpus_per_rank:g} contradicts learner.device=cpu; drop one of them"
        )
    if device == "cuda" and resources.gpus_per_rank == 0:
        problems.append(
            "learner.device=cuda needs resources.gpus_per_rank above 0, or Ray hides the GPUs from the ranks"
        )
    if learner.ranks > 1 and 0 < resources.gpus_per_rank <= 0.5 and not resources.one_process:
        problems.append(
            f"resources.gpus_per_rank={resources.gpus_per_rank:g} lets two of learner.ranks={learner.ranks} share a "
            "GPU, which NCCL refuses; take more than 0.5 and leave the rest to resources.gpus_per_actor"
        )
    if learner.dtype == "bfloat16" and learner.zero_stage == 0:
        problems.append(
            "learner.dtype=bfloat16 needs gradients that add up in float32, which DeepSpeed refuses at "
            "learner.zero_stage=0; take stage 1, 2 or 3"
        )
    address = resources.ray_address
    if address is not None and not re.fullmatch(r"auto|local|(\[[^\]]+\]|[^\s:/]+):\d+", address):
        problems.append(f"resources.ray_address={address} must be auto, local or host:port")
    return problems


def model_problems(model: ModelSection, learner: GroupSection) -> list[str]:
    """Contradictions between the base and the ranks that hold it."""
    if model.quantization is not None and learner.zero_stage == 3:
        return [
            f"model.quantization={model.quantization} can't be combined with learner.zero_stage=3, which cuts weights "
            "into shards without their scales; take stage 2 or lower (only the adapter has an optimizer)"
        ]
    return []
