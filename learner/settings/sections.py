"""The sections of a run's settings, one frozen model each; ``learner.settings.run`` puts them together and checks them.

The text under a field is its help; it names the unit.
"""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt

from rewards.judge.judged import load_task
from rewards.judge.settings import JudgeSettings
from rewards.section import Section
from rewards.task import Task
from rollout.engines.vllm.settings import VllmSettings
from rollout.trajectory import PositionRule, SamplerSpec

Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
UserPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A file or folder; no shell expands the ~ of key=~/x."""


class RunPlace(Section):
    """Name and place of a run."""

    name: str | None = None
    """Name of the run's folder; null: made from the task and the time of the start."""
    dir: UserPath = "runs"
    """Folder that holds the runs' folders."""
    seed: NonNegativeInt = 0
    """Every random choice derives from it."""
    resume: UserPath = "never"
    """never; auto (the newest good checkpoint of the run that name names, or that was started last); or the path of a
    run or checkpoint. The run goes on with its own settings; what the command line names is laid over them."""
    restarts: NonNegativeInt = 0
    """Times that the run is started again, from its newest checkpoint, when its process is killed or ends with an
    error; the process that was called then only looks after the one that works."""
    shared: bool = False
    """Let other users of the machine read the run's folder, as the umask says; false: the folder is the owner's alone
    (mode 0700)."""
    dashboard: bool = False
    """Serve the dashboard on 127.0.0.1 while the run lasts (make run does); its address is told as an event."""


class RunSection(RunPlace):
    """Name, place and length of the run."""

    iterations: PositiveInt = 50
    """Rollout batches to train on."""


class TaskSection(Section):
    """Where the prompts come from and how they are graded."""

    name: str = "sudoku"
    """A shipped task, or module:Class of your own."""
    train_path: UserPath | None = None
    """Training problems: a file (.csv, .tsv, .jsonl, .json, also .gz; .parquet) or hub:NAME[:CONFIG]:SPLIT; null: the
    task's own data set, or generated from the seed (docs/tasks.md)."""
    test_path: UserPath | None = None
    """Held-out problems, likewise."""
    train_size: PositiveInt = 2000
    """Training problems."""
    test_size: PositiveInt = 256
    """Held-out problems."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """What is done with problems whose prompt leaves no room for a completion: the run is refused, or they are left out
    and counted."""
    judge: JudgeSettings = JudgeSettings()

    def load(self) -> Task:
        """The task, judged where a judge is named. Raises ConfigError."""
        return load_task(self.name, self.judge)


class BaseSpec(Section):
    """The small base model that is built, and cached, when model.path is null."""

    d_model: PositiveInt = 128
    """Width."""
    n_layers: PositiveInt = 4
    """Transformer blocks."""
    n_heads: PositiveInt = 4
    """Attention heads."""
    mlp_hidden: PositiveInt = 256
    """Width of the MLP's hidden layer."""
    sft_steps: PositiveInt = 1600
    """Optimizer steps of masked-diffusion pre-training."""
    sft_batch: PositiveInt = 32
    """Demonstrations per step."""
    sft_lr: PositiveFloat = 2e-3
    """Peak learning rate of the pre-training."""
    sft_examples: PositiveInt = 4000
    """Demonstrations generated."""
    right_first: Fraction = 0.7
    """Share of the steps, at the start, that see right demonstrations only."""
    right_fraction: Fraction = 0.35
    """Share of right demonstrations in the steps after that; the others follow one consistent wrong rule."""
    seed: NonNegativeInt = 0
    """Seed of the base's weights and batches; its training problems are those of run.seed, so no split leaks."""


class ModelSection(Section):
    """The policy's base model."""

    path: UserPath | None = None
    """Folder with the model in Hugging Face layout; null: build the small base, or reuse the cached one."""
    quantization: Literal["nf4", "int8"] | None = None
    """How the blocks' linear maps are stored, in learner and actors alike (bitsandbytes); null: in learner.dtype."""
    base: BaseSpec = BaseSpec()
    cache_dir: UserPath | None = None
    """Folder of built bases; null: the environment variable UNMASK_CACHE, or ~/.cache/unmask."""

    @property
    def cache_path(self) -> Path:
        """Absolute folder of built bases."""
        return Path(self.cache_dir or os.environ.get("UNMASK_CACHE") or "~/.cache/unmask").expanduser().absolute()


class LoraSection(Section):
    """The trained adapter: LoRA on every linear map of every block (a mixture of experts: on the attention's maps),
    unless ``target_modules`` says otherwise."""

    r: PositiveInt = 16
    """Rank."""
    alpha: PositiveFloat = 16.0
    """Scale: the update is multiplied by alpha / r."""
    include_head: bool = False
    """Adapt the LM head too."""
    target_modules: list[str] | None = None
    """What to adapt: names of linear maps, in full or their last parts, such as [q_proj, v_proj]; null: the model
    family's own choice."""
    adapter: UserPath | None = None
    """Folder of an existing PEFT adapter to start from."""


class SamplerConfig(Section):
    """How training completions are denoised."""

    completion_length: PositiveInt = 24
    """C, tokens."""
    block_length: PositiveInt = 24
    """Tokens of one semi-autoregressive block; divides C."""
    steps: PositiveInt = 8
    """m, denoising steps for the whole completion; divides C, and the blocks divide it."""
    position_rule: PositionRule = "random"
    """Which positions a step reveals. AGRPO is exact for random, left_to_right and decoupled_confidence (positions are
    drawn by confidence first, then tokens there); low_confidence and entropy are biased."""
    position_temperature: NonNegative = 1.0
    """tau of decoupled_confidence: weights confidence^(1/tau); large is random order, 0 is greedy order (biased)."""
    confidence_temperature: PositiveFloat = 1.0
    """Of the untruncated law whose largest probability is a position's confidence, in decoupled_confidence."""
    temperature: NonNegative = 1.0
    """Of the law that tokens are drawn from; above 0 in training."""
    top_k: PositiveInt | None = None
    """Tokens kept before drawing; null: all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability mass kept after top_k; 1: all."""
    threshold: Fraction | Annotated[tuple[Fraction, ...], Field(min_length=2)] | None = None
    """Reveal in each step all positions of the block whose largest probability (temperature 1) is above this, one at
    least, in place of what steps and position_rule say; null: what those say. Several: each completion draws one of
    them, by a law of its prompt that the method learns. Evaluations go by steps; with several, by the likeliest of them
    too."""

    def spec(self) -> SamplerSpec:
        """What the engine takes."""
        return SamplerSpec(**self.model_dump())


class RewardSection(Section):
    """How the parts of a reward become what completions are compared by, in all methods alike."""

    normalise: Literal["total", "components"] = "total"
    """total: the parts are added as they are; components: each part is first made a z-score over the completions of a
    prompt, so that none drowns the others by its scale, as LightningRL does (arXiv 2603.13319)."""
    speed_weight: NonNegative = 0.0
    """Weight of a further part, speed: tokens of a completion's text per forward pass that wrote it, 0 where no
    completion of the prompt is right. Needs rollout.sampler.threshold. LightningRL: 1, with a threshold of 0.9."""
    diversity_weight: NonNegative = 0.0
    """Weight of a further part, diversity: a completion's mean distance to the others of its prompt, in edits per
    character (0: all are the same; 1: nothing in common). Against a policy that writes one text for all."""


class ActorRange(Section):
    """Numbers of rollout actors between which a run goes on."""

    min: PositiveInt
    """With so many it begins; with fewer, for longer than timeouts.start, it ends."""
    max: PositiveInt
    """So many it asks the cluster for."""


class RolloutSection(Section):
    """The actors that draw and grade completions."""

    actors: PositiveInt | ActorRange = 2
    """Rollout actors: a number, or {min, max}. With fewer than max the run begins as soon as there are min, takes more
    as nodes come, and goes on without those whose nodes go."""
    max_actors: PositiveInt | None = None
    """Actors that the run may be given while it runs, for which a local Ray is started with room; null: no more than
    actors on a local Ray, as many as there is room for on a cluster."""
    prompts_per_iteration: PositiveInt = 16
    """Prompt groups of one iteration."""
    group_size: PositiveInt = 8
    """G, completions of one prompt."""
    groups_per_lease: PositiveInt = 4
    """Prompt groups that an actor takes, computes and delivers together."""
    max_rows: PositiveInt = 32
    """Completions that an actor denoises at once."""
    engine: Literal["torch", "vllm"] = "torch"
    """What computes the model in the actors: torch, embedded; or vLLM, which is installed apart."""
    vllm: VllmSettings = VllmSettings()
    sampler: SamplerConfig = SamplerConfig()
    max_staleness: NonNegativeInt = 0
    """Policy versions a group may be behind when it is learned from; 0: synchronous and strictly on-policy."""
    buffer_groups: PositiveInt | None = None
    """Groups issued and not yet learned from, at most; null: prompts_per_iteration * (max_staleness + 1)."""
    graders_per_actor: PositiveInt = 1
    """Grading workers beside each actor."""
    grade_timeout_s: PositiveFloat = 2.0
    """Seconds for grading one completion; then another grader is asked, and after that it counts as wrong."""
    second_lease_after_s: PositiveFloat | None = None
    """Seconds until a straggler's groups are leased a second time, and whoever delivers first counts; null: never. A
    synchronous run draws the same either way; in others it depends on timing with which weights."""

    def refuses(self) -> list[str]:
        """What the engine can't do that is asked of it, one sentence each."""
        if self.engine == "torch" or not isinstance(self.sampler.threshold, tuple):
            return []
        return [
            f"rollout.sampler.threshold={list(self.sampler.threshold)} is drawn by a head on the model's hidden "
            f"states, which rollout.engine={self.engine} keeps to itself; take rollout.engine=torch"
        ]

    @property
    def fewest_actors(self) -> int:
        """With how many actors the run begins, and goes on."""
        return self.actors.min if isinstance(self.actors, ActorRange) else self.actors

    @property
    def wanted_actors(self) -> int:
        """How many actors it would have."""
        return self.actors.max if isinstance(self.actors, ActorRange) else self.actors

    @property
    def most_actors(self) -> int:
        """How many actors a local Ray has room for."""
        return max(self.wanted_actors, self.max_actors or 0)

    @property
    def buffer_size(self) -> int:
        """``buffer_groups``, its default filled in."""
        return self.buffer_groups or self.prompts_per_iteration * (self.max_staleness + 1)


class GroupSection(Section):
    """The DeepSpeed ranks and their optimizer (AdamW)."""

    ranks: PositiveInt = 1
    """Learner processes."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """DeepSpeed ZeRO stage."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda when the rank was given a GPU."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights and forwards, in learner and actors alike."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After the warm-up; cosine and linear fall to 0 after the last update."""
    warmup_fraction: Fraction = 0.0
    """Share of the updates over which the rate rises from 0."""
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """AdamW's decay rates."""
    adam_eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this L2 norm."""
    max_nonfinite: PositiveInt = 3
    """Updates with a non-finite gradient in a row that stop the run."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward: less memory, more time."""
    deterministic: bool = False
    """On a GPU let ranks and actors compute the same bits again, as far as torch can: more memory, more time
    (docs/how-a-run-flows.md)."""
    meeting_port: Annotated[int, Field(ge=1024, le=65534)] | None = None
    """Port at which ranks on several nodes meet, and the next one where that is taken; null: any free one."""
    network_interface: str | None = None
    """Of the network between ranks on several nodes, such as eth0; null: what NCCL_SOCKET_IFNAME says on the node, else
    NCCL's choice."""


class LearnerSection(GroupSection):
    """The DeepSpeed ranks, and what they do with rollouts."""

    views_per_forward: PositiveInt = 16
    """Sampled states that share one forward; memory only, the numbers are the same for any value."""
    updates_per_batch: PositiveInt = 1
    """Optimizer steps on each rollout batch; above 1 the later ones are off-policy."""
    log_ratio_alarm: PositiveFloat = 1e-3
    """Largest |log ratio| on un-updated weights that passes without an alarm event, nats."""


class EvaluationSection(Section):
    """Greedy solve rate on held-out problems."""

    every: NonNegativeInt = 10
    """Iterations between evaluations; 0: only the base and the end."""
    problems: PositiveInt = 128
    """Held-out problems used."""
    step_divisors: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 4)
    """Evaluate at steps / divisor denoising steps, for each."""
    position_rule: PositionRule = "low_confidence"
    """Which positions a step reveals."""
    kept: NonNegativeInt = 4
    """Problems whose greedy completion is kept for playback at each evaluation, the base's and the trained one's."""


class CheckpointSection(Section):
    """Resumable checkpoints."""

    every: PositiveInt = 10
    """Iterations between checkpoints; the last iteration always gets one."""
    keep: PositiveInt = 3
    """Newest checkpoints kept, the best one beside them."""


class ResourcesSection(Section):
    """What the processes ask Ray for."""

    threads_per_process: PositiveInt = 1
    """Compute threads of every actor and rank."""
    cpus_per_actor: NonNegative = 1.0
    """Logical CPUs of a rollout actor."""
    cpus_per_rank: NonNegative = 1.0
    """Logical CPUs of a learner rank."""
    gpus_per_actor: NonNegative = 0.0
    """GPUs of a rollout actor; above 0 it samples on cuda."""
    gpus_per_rank: NonNegative = 0.0
    """GPUs of a learner rank."""
    one_process: bool = False
    """Each rank and an actor are one process with one base, which asks for what both ask; they take turns."""
    check_memory: bool = True
    """Refuse to start a run that, by its plan (python -m learner.plan), needs more memory than there is, or
    more time for a lease or an update than timeouts.* gives."""
    ray_address: str | None = None
    """auto, local or host:port; null: join what RAY_ADDRESS or a Ray job names, otherwise start a local Ray."""
    ray_insecure: bool = False
    """Join a Ray cluster too that has no authentication and can be reached over the network (docs/security.md)."""

    def of(self, kind: Literal["actor", "rank"]) -> tuple[float, float]:
        """(logical CPUs, GPUs) of the process that a rollout actor or a learner rank is in."""
        kinds = ("actor", "rank") if self.one_process else (kind,)
        asked = [sum(getattr(self, f"{unit}_per_{each}") for each in kinds) for unit in ("cpus", "gpus")]
        return asked[0], asked[1]


class StoreSection(Section):
    """Where the run is recorded for people to look at, and for how long (docs/run-store.md)."""

    url: str | None = None
    """A store that many runs share, postgresql://user@host/database; null: store.sqlite in the run's folder. A password
    goes into PGPASSWORD or ~/.pgpass: the settings are kept in clear."""
    keep_samples: NonNegativeInt | None = None
    """Newest samples kept of each kind; null: all."""
    metric_days: PositiveFloat | None = None
    """Days after which values give way to the mean, extremes and count of eight iterations; null: never."""


class TimeoutsSection(Section):
    """Longest waits, in seconds; when one runs out the error names who was awaited."""

    lease: PositiveFloat = 600.0
    """Seconds for an actor to deliver a lease."""
    update: PositiveFloat = 1800.0
    """Seconds for the ranks to finish an update."""
    publish: PositiveFloat = 300.0
    """Seconds for an adapter to be returned by rank 0, and loaded by an actor."""
    start: PositiveFloat = 300.0
    """Seconds for a process to start and load its model."""
    heartbeat: PositiveFloat = 60.0
    """Seconds that the process of an actor or rank may stay without answering, or with run.restarts the run's own; then
    it is killed and replaced."""
    resize: PositiveFloat = 120.0
    """Seconds for actors that are added to a run to be ready; the old number is kept otherwise."""
    evaluate: PositiveFloat = 1800.0
    """Seconds for one evaluation."""
    checkpoint: PositiveFloat = 300.0
    """Seconds for the ranks to hand over their state."""
    stop: PositiveFloat = 60.0
    """Seconds that a run which is asked to stop still gives to the update or evaluation it is in."""
