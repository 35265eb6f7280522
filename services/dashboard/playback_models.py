"""What the playback routes answer with: a completion as columns of its positions, and the order of a whole batch."""

from typing import Any, Literal

from rewards.layout import Mark
from services.dashboard.models import Model, Number


class Cells(Model):
    """The completion's positions, as columns of equal length. A filler (drawn false) has no law: its figures are
    null."""

    text: list[str]
    """The token by itself; may be a part of a character."""
    token: list[int]
    special: list[bool]
    """A special token, such as the end of the text."""
    step: list[int]
    """Denoising step, from 0, at which the position was revealed; a filler's is the first one not taken."""
    rank: list[int]
    """Its order within the step."""
    drawn: list[bool]
    """False where the position was filled with the end of the text after a finished block."""
    logp: list[Number | None]
    """Log-prob under the law that the token was drawn from (temperature, truncation)."""
    logp_raw: list[Number | None]
    """The same at temperature 1, untruncated."""
    confidence: list[Number | None]
    """exp(logp)."""
    entropy: list[Number | None]
    """Entropy of that law in nats."""
    mark: list[Mark | None] = []
    """What the task says of the part of the answer that the position belongs to: a clue kept, right, wrong."""


class Context(Model):
    """Text of the prompt between the gaps that a completion fills."""

    before: int
    """How many of the completion's positions stand before it."""
    text: str


class LayoutCell(Model):
    """A part of an answer as the task shows it."""

    text: str
    """Shown until the cell is written, or always."""
    written: str | None
    """What the completion has there; null in a cell that shows nothing of it."""
    mark: Mark | None
    """What the cell is worth."""
    positions: list[int] = []
    """Completion positions that ``written`` comes from; empty where that isn't known, and in a frame."""


class Layout(Model):
    """An answer as the task shows it: a grid of so many columns, a line, or code."""

    kind: Literal["grid", "line", "code"]
    columns: int
    cells: list[LayoutCell]


class Scales(Model):
    """The largest values in a whole batch, by which all of its completions are drawn."""

    entropy: Number
    """Mean of a step, in nats."""
    weight: Number
    """Absolute, of a scored view."""
    log_ratio: Number
    """Absolute, of a scored view that the rollout went through."""


class ScoredToken(Model):
    """A token that an update scored."""

    position: int
    old_logp: Number | None
    """As the rollout recorded it; null in a view that the rollout never saw."""
    new_logp: Number
    """Under the weights that the update started from."""
    ratio: Number | None
    """exp(new - old)."""


class ScoredView(Model):
    """A view in which an update scored this completion: its state before a denoising step, or a drawn mask."""

    update: int
    """Number of the update on this batch, from 0."""
    step: int | None
    """Null for a mask that was drawn for the update, under which the rollout never saw the completion."""
    count: int
    """How often the view was drawn."""
    weight: Number
    """Factor of its log-probs, count included; may be negative."""
    new_logp: Number
    """New log-prob, summed over the view's tokens."""
    log_ratio: Number | None
    """New minus old log-prob, summed over the view's tokens."""
    choice_old_logp: Number | None
    """Log-prob of the choice of positions, where it is an action of the policy."""
    choice_new_logp: Number | None
    tokens: list[ScoredToken]


class Branch(Model):
    """A completion of a state that was branched: all that was masked filled at once."""

    step: int
    """The denoising step before which the state was, from 0."""
    text: str
    correct: bool
    reward: Number
    logp: Number | None
    """Of a drawn fill, under the law that it was drawn from; null for the likeliest fill."""


class SampleReference(Model):
    """Another sample of the run."""

    id: int
    kind: str
    iteration: int
    group_id: int
    row: int
    problem_id: str
    correct: bool
    reward: Number | None


class Frame(SampleReference):
    """The same problem at another time of training."""

    completion: str
    """Its first 400 characters."""
    layout: Layout | None
    """As the task shows the answer."""


class Playback(Model):
    """One sampled completion, ready to be played back."""

    id: int
    run_id: str
    iteration: int
    kind: str
    """train; base and trained are greedy completions of held-out problems."""
    group_id: int
    row: int
    problem_id: str
    time: Number
    prompt: str
    """As the model got it."""
    question: str
    """What the prompt asks, without the template around it."""
    expected: str | None
    """A right answer; null where the task has none, and in samples of older versions."""
    layout: Layout | None
    """The answer as the task shows it; null: as text."""
    completion: str
    correct: bool
    reward: Number | None
    rewards: dict[str, Number]
    """By component."""
    largest: dict[str, Number]
    """The largest absolute value of a component, where there is one."""
    scales: Scales | None
    """Null in samples of older versions."""
    advantage: Number | None
    """Within its group; null where nothing was learnt from it."""
    steps: int
    """Denoising steps that it took: fewer than the sampler's where the text ended before the last block."""
    cells: Cells
    context: list[Context] = []
    """What stands between and around the positions, in reading order; empty where the completion follows its prompt."""
    position_logp: list[Number] | None
    """Log-prob of each step's choice of positions, where it is an action of the policy."""
    updates: int
    """Updates that were made on the batch."""
    scored: list[ScoredView]
    """By update and step; empty where the completion had no signal."""
    branches: list[Branch]
    """Of the completion's states; empty where none was branched."""
    sampler: dict[str, Any]
    provenance: dict[str, str]
    """Policy version, adapter digest, actor, seed, forward passes, and the threshold, where it drew one."""
    notes: list[str]
    """What this sample lacks, in sentences."""
    siblings: list[SampleReference] = []
    """The kept completions of the same group, this one included, by row."""
    counterparts: list[Frame] = []
    """The same problem through training, this one included, by iteration: of an evaluation greedy completions, the
    base's first; of a training sample the completions of the same row whenever the problem came."""
    has_order_map: bool = False
    """Whether an order map of its iteration was kept."""


class SampleIterations(Model):
    """How many samples each iteration kept, by iteration and kind."""

    run_id: str
    iteration: list[int]
    kind: list[str]
    samples: list[int]


class OrderMap(Model):
    """When each position is written, over all completions of an iteration."""

    iteration: int
    completions: int
    positions: int
    steps: int
    positions_per_bin: int
    steps_per_bin: int
    counts: list[list[int]]
    """[bin of positions][bin of steps]: tokens drawn there."""
    mean_step: list[Number | None]
    """By position; null where none was drawn."""
