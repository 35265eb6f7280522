"""Every setting of a supervised fine-tuning run, checked together before it starts. Imports no torch and no Ray."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from learner.settings import arguments as overrides
from learner.settings.resuming import load_start
from learner.settings.run import (
    group_problems,
    model_problems,
    name_problems,
    named_resume,
    refuse_absent,
    refuse_relative,
    store_problems,
)
from learner.settings.saved import run_of
from learner.settings.sections import (
    CheckpointSection,
    GroupSection,
    LoraSection,
    ModelSection,
    ResourcesSection,
    RunPlace,
    StoreSection,
    TimeoutsSection,
    UserPath,
)
from rewards.errors import ConfigError
from rewards.section import Section


class DataSection(Section):
    """Where the demonstrations come from."""

    train: UserPath | None = None
    """Demonstrations: a file (.jsonl, .json, .csv, .tsv, also .gz; .parquet), or hub:NAME[:CONFIG]:SPLIT; docs/sft.md
    shows the formats."""
    held_out: UserPath | None = None
    """Held-out demonstrations, in the same formats; null: a share of train's."""
    held_out_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of train's demonstrations, drawn by the seed, that is held out when held_out is null; 0: none."""
    size: PositiveInt | None = None
    """Demonstrations of train that are used, the first ones; null: all."""
    reasoning: Literal["think", "d1"] = "think"
    """How thinking and answer become a completion: in <think> and <answer> as our tasks ask for, or as in d1, in
    <reasoning> and <answer> with an instruction before the question."""
    max_tokens: PositiveInt = 1024
    """Longest example, prompt and completion together, and the length of a packed row."""
    too_long: Literal["drop", "cut"] = "drop"
    """Examples above max_tokens are left out, or lose the end of their completion (published)."""


class SftSection(Section):
    """How they are learned."""

    epochs: PositiveInt = 3
    """Passes over the demonstrations."""
    batch: PositiveInt = 16
    """Examples of one optimizer step, over all ranks."""
    packing: bool = True
    """Lay several examples into one row; the numbers are the same, the padding is gone."""
    rows_per_forward: PositiveInt = 1
    """Rows of up to data.max_tokens tokens that share one forward; memory only, the numbers are the same."""
    eos_tokens: PositiveInt | None = 64
    """EOS that follow an example's end and are learned: a number drawn from 1 to this, anew in every epoch; null: as
    many as data.max_tokens leaves room for (published), which fills every row."""
    masking: Literal["count", "rate"] = "count"
    """How many completion tokens are masked: a number from 1 to all, weight length/number; or each token with a rate
    drawn from (0.001, 1), weight 1/rate (published)."""
    normaliser: Literal["example", "token"] = "example"
    """What counts the same: every example, whatever its length (published), or every completion token."""
    evaluate_every: NonNegativeInt = 50
    """Updates between held-out losses; 0: only at the start and the end."""
    held_out_draws: PositiveInt = 4
    """Fixed masks per held-out example."""
    adapter: Literal["best", "last"] = "best"
    """Which adapter the run leaves behind: the one with the lowest held-out loss (published), or the last."""


class SftConfig(Section):
    """The resolved settings of a fine-tuning run; the sections that ``RunConfig`` has too mean the same."""

    run: RunPlace = RunPlace()
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    learner: GroupSection = GroupSection()
    sft: SftSection = SftSection()
    checkpoint: CheckpointSection = CheckpointSection()
    resources: ResourcesSection = ResourcesSection()
    timeouts: TimeoutsSection = TimeoutsSection()
    store: StoreSection = StoreSection()
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also report to these: tensorboard, wandb."""

    @model_validator(mode="after")
    def _no_contradictions(self) -> "SftConfig":
        problems = [
            *name_problems(self.run.name),
            *store_problems(self.store),
            *_data_problems(self),
            *_sft_problems(self),
            *group_problems(self.learner, self.resources),
            *model_problems(self.model, self.learner),
        ]
        if problems:
            raise ConfigError("\n".join(problems))
        return self


def load_sft_config(argv: Sequence[str]) -> SftConfig:
    """The settings from ``recipe=NAME_OR_PATH`` and ``key.sub=value`` arguments; without a recipe, the defaults. A run
    that is resumed gives those that no argument does.

    Raises ConfigError with one sentence (one line) per problem.
    """
    return load_start(argv, SftConfig, kind="sft")


def help_text() -> str:
    """The recipes, and every key with its meaning, unit and default."""
    return overrides.help_text(SftConfig, "sft")


def check_resources(config: SftConfig, cpus: float, gpus: float) -> None:
    """Refuses a run that asks for more than the Ray cluster's ``cpus`` (logical) and ``gpus``. Raises ConfigError."""
    ranks, resources = config.learner.ranks, config.resources
    for name, each, present in (("CPU", resources.cpus_per_rank, cpus), ("GPU", resources.gpus_per_rank, gpus)):
        if ranks * each > present:
            raise ConfigError(
                f"learner.ranks={ranks} asks for {ranks * each:g} {name}s and Ray has {present:g}; "
                f"lower it, or resources.{name.lower()}s_per_rank"
            )


def files_read(config: SftConfig) -> dict[str, str | None]:
    """The settings that name files or folders to read, by key."""
    return {
        "run.resume": named_resume(config.run),
        "data.train": config.data.train,
        "data.held_out": config.data.held_out,
        "model.path": config.model.path,
        "lora.adapter": None if run_of(config.run.resume) else config.lora.adapter,
    }


def check_paths(config: SftConfig, in_job: bool) -> None:
    """Refuses what is to be read and isn't there, and inside a Ray job relative paths."""
    read = files_read(config)
    if in_job:
        refuse_relative({"run.dir": config.run.dir} | read)
    refuse_absent(read)


def _data_problems(config: SftConfig) -> list[str]:
    data, problems = config.data, []
    if data.train is None:
        problems.append("data.train is missing; give a .jsonl file of demonstrations, or hub:NAME[:CONFIG]:SPLIT")
    if config.model.path is None:
        problems.append("model.path is missing; fine-tuning starts from an existing model: a folder or a hub name")
    if data.held_out is not None and data.held_out == data.train:
        problems.append(f"data.held_out={data.held_out} is data.train; give another file, or null for a share of it")
    if data.held_out is None and data.held_out_fraction == 0 and config.sft.adapter == "best":
        problems.append(
            "sft.adapter=best needs held-out demonstrations to choose by; set data.held_out_fraction above 0 or "
            "data.held_out, or take sft.adapter=last"
        )
    return problems


def _sft_problems(config: SftConfig) -> list[str]:
    sft, longest = config.sft, config.data.max_tokens
    if config.resources.one_process:
        return [
            "resources.one_process=true is for ranks that share a GPU with actors, and fine-tuning has none; drop it"
        ]
    if sft.eos_tokens is None and sft.packing:
        return [
            "sft.packing=true has nothing to pack when sft.eos_tokens=null fills every row with EOS; "
            "give a number of EOS, or set sft.packing=false"
        ]
    if sft.eos_tokens is not None and sft.eos_tokens >= longest:
        return [
            f"sft.eos_tokens={sft.eos_tokens} leaves no room in data.max_tokens={longest}; "
            "lower it, or take null with sft.packing=false to fill every row"
        ]
    return []
