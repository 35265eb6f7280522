"""What the API answers with. Times are Unix seconds; numbers that are none are the strings NaN, Infinity, -Infinity."""

import math
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Item = TypeVar("Item")


def number(value: Any) -> Any:
    """A float as JSON takes it."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


Number = Annotated[float | Literal["NaN", "Infinity", "-Infinity"], BeforeValidator(number)]
"""JSON has no NaN: such a value is a string, which JavaScript's Number() reads back."""


class Model(BaseModel):
    """What all answers share: field docstrings are descriptions, unknown columns of a store are left out."""

    model_config = ConfigDict(use_attribute_docstrings=True, protected_namespaces=())


class Page(BaseModel, Generic[Item]):
    """One page of a list."""

    items: list[Item] = Field(description="In the order asked for")
    next_cursor: str | None = Field(default=None, description="Give it as cursor for the next page; null on the last")


class RunSummary(Model):
    """A run in the list of runs."""

    id: str
    task: str = ""
    method: str = ""
    """The objective, agrpo for example."""
    status: str
    """running, paused, finished, stopped, failed; lost: says running and has been silent for a minute, or its process
    on this machine is gone; unreadable: its store can't be read now."""
    unreadable: str | None = None
    """Why the store can't be read; it is tried again all the time."""
    iteration: int = 0
    """The newest finished iteration."""
    total_iterations: int = 0
    created: float | None = None
    heartbeat: float | None = None
    """When the run last wrote."""
    ended: float | None = None
    starts: int = 0
    """1, and one more per resume."""
    host: str = ""
    pid: int | None = None
    lost_rows: int = 0
    """Rows that the run could not write since its last start."""
    unstored_iterations: int = 0
    """Iterations that the run's metrics.jsonl has and its store lacks, which takes nothing: locked, or its disk full.
    Known only where the store lies in the run's folder."""
    reward: Number | None = None
    """Mean reward of the newest iteration."""
    solve_rate: Number | None = None
    """Share of right completions in the newest iteration."""
    tokens_per_s: Number | None = None
    held_out: Number | None = None
    """Share of held-out problems that the newest evaluation on the way solved, greedily in as many steps as in
    training."""
    held_out_best: Number | None = None
    """The highest such share so far."""
    held_out_best_iteration: int | None = None
    workers: int = 0
    """Actors and ranks of the run, without retired ones."""
    seed: int | None = None
    model: str = ""
    """Folder or name of the base model; empty: the small base that is built."""
    recipe: str | None = None
    """The recipe that the run was started from; null where it was not told."""
    differs: dict[str, Any] = {}
    """Settings that the run has otherwise than its recipe, by full key."""
    group: str = ""
    """The same for runs whose settings differ in name and seed alone."""
    tags: list[str] = []
    note: str = ""
    """What people wrote about the run."""
    archived: bool = False
    """Left out of lists unless asked for."""
    acknowledged: int = 0
    """Id of the last event whose warnings and errors somebody has taken note of."""


class RunList(Page[RunSummary]):
    """Runs that match the filter."""

    total: int = Field(description="Matching runs on all pages")
    archived: int = Field(default=0, description="Archived runs among those that q finds")
    folder: str = Field(description="The folder of runs that the service shows; empty for a store by URL")


class Latest(Model):
    """The newest value of a metric."""

    iteration: int
    value: Number


class RunDetail(RunSummary):
    """A run with its newest figures."""

    latest: dict[str, Latest] = {}
    """The newest value of every metric."""
    summary: dict[str, Any] | None = None
    """Base against trained, when the run has ended."""
    marker: str = ""
    """Where the event stream stands: open the stream with ``since=MARKER`` to miss nothing after this answer."""


class Series(Model):
    """A metric over iterations, downsampled when it has more points than were asked for."""

    iteration: list[int]
    value: list[Number | None]
    low: list[Number | None]
    """Smallest value of each point's bucket."""
    high: list[Number | None]
    """Largest value of each point's bucket."""
    count: list[int]
    """Values behind each point."""


class Metrics(Model):
    """Series by the metric's name; a name that the run has no values of has an empty one."""

    run_id: str
    series: dict[str, Series]


class MetricNames(Model):
    """Every metric that the run has reported."""

    run_id: str
    names: list[str]


class MetricEntry(Model):
    """What a metric is, what is healthy, and what to do when it isn't."""

    name: str
    """{...} stands for a part that differs."""
    pattern: str
    """Regular expression of its names; the first entry that matches is meant."""
    group: str
    """learning, policy health, throughput or internals."""
    what: str
    healthy: str
    act: str
    unit: str


class MetricReference(Model):
    """Every metric that a run may write, those of one name first."""

    items: list[MetricEntry]


class Event(Model):
    """Something that happened in a run."""

    id: int
    time: float
    level: Literal["info", "warning", "error"] | str
    kind: str
    text: str
    data: dict[str, Any]


class EventKind(Model):
    """How many events of a kind there are."""

    kind: str
    count: int


class EventKinds(Model):
    """Kinds of a run's events."""

    run_id: str
    items: list[EventKind]


class Worker(Model):
    """The newest state of a rollout actor or learner rank."""

    worker_id: str
    role: str
    """rollout or learner."""
    node: str
    pid: int | None
    status: str
    policy_version: int | None
    """The adapter version that it holds."""
    restarts: int
    last_error: str | None
    heartbeat: float
    """Its last answer; for one that is starting, when its start began. Nothing is heard of a worker while it works."""
    data: dict[str, Any]
    """What it is ``doing`` and ``since`` when (Unix seconds), or null; when the run ``told`` this; memory, GPU, engine
    and so on, as reported."""


class Workers(Model):
    """A run's workers."""

    run_id: str
    items: list[Worker]


class Checkpoint(Model):
    """A checkpoint."""

    iteration: int
    time: float
    path: str
    data: dict[str, Any]
    on_disk: bool | None = None
    """Whether its folder is there; null where the run's folder isn't known, as in a store by URL."""
    held_out: Number | None = None
    """What the evaluation after this iteration measured, if there was one."""
    measure: str | None = None
    """Name of that metric."""
    best: bool = False
    """Whether that is the best among these checkpoints."""
    last: bool = False
    evaluate: str = ""
    """Command that evaluates its adapter."""
    export: str = ""
    """Command that merges its adapter into the base."""


class Checkpoints(Model):
    """A run's checkpoints, by rising iteration."""

    run_id: str
    items: list[Checkpoint]


STATES = ("issued", "pending", "leased", "ready", "consumed", "dropped")
"""The ledger's counts: the first is the sum of the others."""


class Ledger(Model):
    """Prompt groups by state: issued = pending + leased + ready + consumed + dropped."""

    run_id: str
    iteration: int | None
    """Iteration that the counts are of; null before the first."""
    issued: int = 0
    pending: int = 0
    leased: int = 0
    ready: int = 0
    consumed: int = 0
    dropped: int = 0
    dropped_by_reason: dict[str, int] = {}
    recoveries: dict[str, int] = {}
    """What was taken back or given out again: leases that timed out, lost objects, refused deliveries and so on."""
    balanced: bool = True
    """Whether the equation holds."""


class RunConfiguration(Model):
    """The resolved settings of a run."""

    run_id: str
    config: dict[str, Any]


class Difference(Model):
    """A setting that differs; a side that lacks it says so in ``only_in``."""

    key: str
    value: Any
    other: Any
    only_in: str | None = None
    """Run that has the setting, when the other lacks it."""


class ConfigDiff(Model):
    """Settings of a run that differ from another run's."""

    run_id: str
    other_id: str
    differences: list[Difference]
    equal: int
    """Settings that both have alike."""


class Sample(Model):
    """A sampled completion, without its trajectory."""

    id: int
    iteration: int
    kind: str
    """train, base, trained, ..."""
    group_id: int
    row: int
    time: float
    problem_id: str
    prompt: str
    question: str
    """What the prompt asks, without the template around it."""
    completion: str
    correct: bool
    reward: Number | None
    rewards: dict[str, Number]
    """By component."""
    data: dict[str, Any]
    """Sampler, seed, policy version, adapter digest, actor and so on."""


class Health(Model):
    """Whether the service can do its work."""

    status: Literal["ok", "degraded"]
    runs: int | None = None
    """Runs that are listed."""
    unreadable: int | None = None
    """Runs whose store can't be read now."""
