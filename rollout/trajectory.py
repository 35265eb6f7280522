"""The trajectory contract: what a rollout leaves behind for the learner.

Shapes: G completions of one prompt, C completion positions, P prompt tokens, R reward components, m denoising steps, S
branched states of a completion, Z fills of a state.

A branch is a completion of a state that the rollout went through: every masked position is filled at once, each from
its own law, out of the logits that the step made anyway. It is graded like a completion.

Everything is numpy, so a group comes out of Ray's object store without a copy.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rewards.errors import DataError, TrajectoryError
from rewards.task import Problem
from rollout.spans import ascending

SCHEMA_VERSION = 2

SPEED = "speed"
"""The part of a reward that is a weight times a completion's tokens per forward."""

DIVERSITY = "diversity"
"""The part that is a weight times a completion's mean distance to the others of its group."""

PositionRule = Literal["random", "low_confidence", "entropy", "left_to_right", "decoupled_confidence"]


@dataclass(frozen=True)
class SamplerSpec:
    """How completions are denoised. Blocks are finished left to right, each in its share of the steps."""

    completion_length: int
    block_length: int
    steps: int
    position_rule: PositionRule
    temperature: float
    top_k: int | None = None
    top_p: float = 1.0
    position_temperature: float = 1.0
    """tau of ``decoupled_confidence``; inf is random order, 0 the order of the largest probability."""
    confidence_temperature: float = 1.0
    """Of the untruncated law whose largest probability is a position's confidence in ``decoupled_confidence``."""
    threshold: float | tuple[float, ...] | None = None
    """Reveal what passes this confidence (at temperature 1), at least one position a step, instead of following
    ``steps`` and ``position_rule``. Several: each completion draws one of them, from the law that the adapter's head
    makes of the prompt (``rollout.models.prompt_head``); at temperature 0 it takes the likeliest."""

    @property
    def most_steps(self) -> int:
        """Denoising steps of a completion, at most."""
        return self.steps if self.threshold is None else self.completion_length

    @property
    def scores_positions(self) -> bool:
        """True when the choice of positions is a random action of the policy, so that its log-prob is recorded."""
        chosen = self.position_rule == "decoupled_confidence" and self.threshold is None
        return chosen and self.position_temperature > 0 and self.temperature > 0

    @property
    def truncates(self) -> bool:
        """True when top-k or top-p removes tokens, so that the support must be recorded."""
        return self.temperature > 0 and (self.top_k is not None or self.top_p < 1.0)

    def greedy(self, *, steps: int, position_rule: PositionRule) -> "SamplerSpec":
        """Temperature 0 without truncation, in this many steps and this order; the rest as it is."""
        greedy = replace(self, temperature=0.0, top_k=None, top_p=1.0, threshold=None)
        return replace(greedy, steps=steps, position_rule=position_rule)


def sampler_of(fields: Mapping[str, Any]) -> SamplerSpec:
    """The sampler with these fields, as JSON keeps them. Raises TypeError when they are others than a sampler's."""
    threshold = fields.get("threshold")
    return SamplerSpec(**{**fields, "threshold": tuple(threshold) if isinstance(threshold, list) else threshold})


@dataclass(frozen=True)
class GreedyBranches:
    """The likeliest fill of the states before the steps whose drawn tokens had the largest mean entropy, or before
    evenly spaced steps."""

    states: int
    """S, at most as many as there were steps."""
    until_last_token: bool = False
    """Whether only steps up to the one that revealed the last token other than EOS count."""
    evenly: bool = False
    """Whether the steps are S evenly spaced ones of the sampler's, the first included, which are known beforehand."""

    fills: ClassVar[int] = 1


@dataclass(frozen=True)
class DrawnBranches:
    """Fills drawn as the rollout draws a step's tokens, at one state of each completion. Its step is drawn beforehand,
    with a density over the progress t from 0 to 1 that is proportional to t**degree; a completion that ends before it
    has none."""

    fills: int
    degree: float

    states: ClassVar[int] = 1


BranchSpec = GreedyBranches | DrawnBranches
"""Which states of a completion are branched, and how they are filled."""


@dataclass(frozen=True)
class GroupSpec:
    """One prompt group as the plan names it: all that an actor needs to draw it. ``seed`` names its random streams."""

    group_id: int
    problem: Problem
    size: int
    seed: int


@dataclass(frozen=True)
class Lease:
    """Groups that are computed together, in this order, and delivered whole."""

    lease_id: int
    groups: tuple[GroupSpec, ...]


@dataclass(frozen=True)
class TrajectoryGroup:
    """G completions of one prompt, with the order in which they were written and the law they were drawn from."""

    group_id: int
    problem_id: str
    prompt_ids: np.ndarray
    """[P] int32, no padding; of a text with gaps, the tokens outside of them."""
    completion_ids: np.ndarray
    """[G, C] int32, final tokens; the pad where ``places`` has none."""
    unmask_step: np.ndarray
    """[G, C] int16, the step at which the position was revealed; -1 where ``places`` has none."""
    unmask_rank: np.ndarray
    """[G, C] int16, its order within the step."""
    drawn: np.ndarray
    """[G, C] bool, false where the position was filled with EOS after a finished block: a filler is not an action."""
    logp: np.ndarray
    """[G, C] float32, log-prob of the token under the law it was drawn from; 0 where not drawn."""
    logp_raw: np.ndarray
    """[G, C] float32, the same at temperature 1 and untruncated; 0 where not drawn."""
    entropy: np.ndarray
    """[G, C] float32, entropy in nats of the law it was drawn from; 0 where not drawn."""
    support_indptr: np.ndarray | None
    """[G*C+1] int64, CSR row pointers over flattened (g, c); None when nothing was truncated."""
    support_ids: np.ndarray | None
    """[nnz] int32, the kept token ids of each drawn position, ascending."""
    rewards: np.ndarray
    """[G, R] float32, reward components; the reward is their sum."""
    reward_names: tuple[str, ...]
    correct: np.ndarray
    """[G] bool, the verdict of the grader, which is never a reward."""
    policy_version: int
    adapter_digest: str
    sampler: SamplerSpec
    seed: int
    nfe: np.ndarray
    """[G] int32, forward passes that each completion took part in."""
    actor_id: str = ""
    counters: Mapping[str, int] = field(default_factory=dict)
    """recoveries of the actor's that must stay visible, e.g. grader timeouts"""
    position_logp: np.ndarray | None = None
    """[G, m] float32, log-prob of the step's choice of positions, where it is part of the policy: of the set for up to
    4 positions, of the order too above that; 0 where nothing was left to choose and for steps never taken."""
    position_entropy: np.ndarray | None = None
    """[G, m] float32, nats: the entropies of the laws that the step's positions were picked from, one after the other,
    added up; 0 where ``position_logp`` is."""
    branch_step: np.ndarray | None = None
    """[G, S] int16, the steps before which the branched states were, the one of the largest entropy first; -1 where a
    completion had fewer. None, as all of them, where nothing was branched."""
    branch_ids: np.ndarray | None = None
    """[G, S, Z, C] int32, whole completions: what was revealed, and the fill."""
    branch_logp: np.ndarray | None = None
    """[G, S, Z, C] float32, log-prob of drawn fills under the law they were drawn from, 0 where nothing was filled;
    None for greedy ones."""
    branch_rewards: np.ndarray | None = None
    """[G, S, Z, R] float32; 0 in the part of diversity, which is of completions alone."""
    branch_correct: np.ndarray | None = None
    """[G, S, Z] bool."""
    threshold: np.ndarray | None = None
    """[G] float32, the threshold that each completion drew; None where the sampler leaves none to draw."""
    threshold_logp: np.ndarray | None = None
    """[G] float32, its log-prob under the law that it was drawn from."""
    places: np.ndarray | None = None
    """[G, C] int32, where in the text (prompt and completion together) each position stands, ascending; -1 for
    positions that a completion doesn't have (``rollout.spans``). None: all follow the prompt."""
    schema_version: int = SCHEMA_VERSION

    @property
    def size(self) -> int:
        return int(self.completion_ids.shape[0])

    def place(self, row: int) -> np.ndarray | None:
        """[C], the completion's row of ``places``; None where it follows the prompt."""
        return None if self.places is None else self.places[row]

    @property
    def there(self) -> np.ndarray:
        """[G, C] bool, the positions that the completions have."""
        return np.ones(self.completion_ids.shape, dtype=bool) if self.places is None else self.places >= 0

    def text_length(self, row: int) -> int:
        """Tokens of prompt and completion together."""
        return int(self.prompt_ids.size + self.there[row].sum())

    def text_tokens(self, eos_ids: Collection[int]) -> np.ndarray:
        """[G, C] bool, the tokens of the completions' texts: all but ``eos_ids``."""
        return ~np.isin(self.completion_ids, list(eos_ids)) & self.there

    def tokens_per_forward(self, eos_ids: Collection[int]) -> np.ndarray:
        """[G] float64: tokens of the text per forward pass that their completion took part in."""
        return np.asarray(self.text_tokens(eos_ids).sum(axis=1) / self.nfe)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in arrays_of(self).values())

    @property
    def is_outline(self) -> bool:
        """Whether its supports are elsewhere (``outline``)."""
        return self.support_ids is None and self.sampler.truncates

    def support(self, row: int, position: int) -> np.ndarray | None:
        """Kept token ids at one position, or None when nothing was truncated."""
        if self.support_indptr is None or self.support_ids is None:
            return None
        cell = row * self.completion_ids.shape[1] + position
        return self.support_ids[self.support_indptr[cell] : self.support_indptr[cell + 1]]

    def validate(self) -> None:
        """Check shapes, dtypes and the relations between the fields.

        Raises:
            TrajectoryError: naming the group, the field and what is wrong with it.
        """
        G, C = self.completion_ids.shape
        m = self.sampler.steps
        R = len(self.reward_names)
        expected: dict[str, tuple[tuple[int, ...], type]] = {
            "completion_ids": ((G, C), np.int32),
            "unmask_step": ((G, C), np.int16),
            "unmask_rank": ((G, C), np.int16),
            "drawn": ((G, C), np.bool_),
            "logp": ((G, C), np.float32),
            "logp_raw": ((G, C), np.float32),
            "entropy": ((G, C), np.float32),
            "rewards": ((G, R), np.float32),
            "correct": ((G,), np.bool_),
            "nfe": ((G,), np.int32),
        }
        choices = {"position_logp": self.position_logp, "position_entropy": self.position_entropy}
        for name, recorded in choices.items():
            self._require(
                recorded is not None or not self.sampler.scores_positions, f"no {name}, and positions are scored"
            )
            if recorded is not None:
                expected[name] = ((G, m), np.float32)
        branched = (self.branch_step, self.branch_ids, self.branch_rewards, self.branch_correct)
        self._require(len({array is None for array in branched}) == 1, "some arrays of its branches are missing")
        if self.branch_ids is not None:
            S, Z = self.branch_ids.shape[1:3]
            expected |= {
                "branch_step": ((G, S), np.int16),
                "branch_ids": ((G, S, Z, C), np.int32),
                "branch_rewards": ((G, S, Z, R), np.float32),
                "branch_correct": ((G, S, Z), np.bool_),
            }
            if self.branch_logp is not None:
                expected["branch_logp"] = ((G, S, Z, C), np.float32)
        if isinstance(self.sampler.threshold, tuple):
            found = self.threshold is not None and self.threshold_logp is not None
            self._require(found, "no threshold or no threshold_logp, and thresholds were drawn")
            expected |= {"threshold": ((G,), np.float32), "threshold_logp": ((G,), np.float32)}
        if self.places is not None:
            expected["places"] = ((G, C), np.int32)
        for name, (shape, dtype) in expected.items():
            array = getattr(self, name)
            self._require(array.shape == shape, f"{name} has shape {array.shape}, expected {shape}")
            self._require(array.dtype == dtype, f"{name} has dtype {array.dtype}, expected {np.dtype(dtype)}")
        self._require(self.prompt_ids.ndim == 1 and self.prompt_ids.dtype == np.int32, "prompt_ids is not [P] int32")
        self._require(
            self.sampler.completion_length == C, f"{C} positions, sampler says {self.sampler.completion_length}"
        )
        last = self.sampler.most_steps - 1
        there, fits = self.there, self.places is None or ascending(self.places, self.prompt_ids.size)
        self._require(fits, "places don't ascend within the text")
        inside = np.where(there, (self.unmask_step >= 0) & (self.unmask_step <= last), self.unmask_step == -1)
        self._require(
            bool(inside.all()), f"unmask_step outside 0..{last}, or not -1 where a completion has no position"
        )
        self._require(bool((there | ~self.drawn).all()), "a token was drawn where a completion has no position")
        for name in ("logp", "logp_raw", "entropy"):
            array = getattr(self, name)
            self._require(bool(np.isfinite(array).all()), f"{name} is not finite")
            self._require(bool((array[~self.drawn] == 0).all()), f"{name} is not 0 at filled positions")
        self._require(bool((self.logp <= 1e-6).all()), "logp above 0")
        for name, recorded in choices.items():
            self._require(recorded is None or bool(np.isfinite(recorded).all()), f"{name} is not finite")
        self._require(self.position_logp is None or bool((self.position_logp <= 0).all()), "position_logp above 0")
        self._validate_branches(last)
        if self.support_indptr is None or self.support_ids is None:
            self._require(not self.sampler.truncates, "the sampler truncates but no support was recorded")
        else:
            self._validate_support(G * C)

    def save(self, path: Path) -> None:
        """Write safetensors with a JSON header; never pickle."""
        meta = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if not isinstance(getattr(self, f.name), np.ndarray) and getattr(self, f.name) is not None
        }
        meta["sampler"] = dataclasses.asdict(self.sampler)
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays_of(self).items()}
        save_file(arrays, path, metadata={"group": json.dumps(meta, default=dict)})

    @classmethod
    def load(cls, path: Path) -> "TrajectoryGroup":
        """Read what ``save`` wrote.

        Raises:
            DataError: when the file is damaged or of another schema version.
        """
        try:
            with safe_open(path, framework="numpy") as f:
                meta: dict[str, Any] = json.loads(f.metadata()["group"])
                arrays = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - not a dict
            found = meta["schema_version"]
            if found != SCHEMA_VERSION:
                raise DataError(f"{path} has trajectory schema {found}, this version reads {SCHEMA_VERSION}")
            meta["sampler"] = sampler_of(meta["sampler"])
            meta.pop("timings", None)  # older files have seconds that nothing reads
            meta["reward_names"] = tuple(meta["reward_names"])
            absent: dict[str, Any] = {name: None for name in ("support_indptr", "support_ids") if name not in arrays}
            return cls(**meta, **arrays, **absent)
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise DataError(f"{path} is not a readable trajectory group: {error}") from error

    def _validate_branches(self, last: int) -> None:
        if self.branch_step is None or self.branch_ids is None:
            return
        inside = (self.branch_step >= -1) & (self.branch_step <= last)
        self._require(bool(inside.all()), f"branch_step outside -1..{last}")
        shown_GSC = (self.unmask_step[:, None] < self.branch_step[:, :, None])[:, :, None]
        kept = self.branch_ids == self.completion_ids[:, None, None]
        self._require(bool((kept | ~shown_GSC).all()), "a branch differs from its completion where that was revealed")
        if self.branch_logp is not None:
            hidden = (self.branch_step >= 0)[:, :, None, None] & ~shown_GSC
            fits = np.where(hidden, self.branch_logp <= 1e-6, self.branch_logp == 0)
            self._require(bool(fits.all()), "branch_logp is above 0, not finite, or not 0 where nothing was filled")

    def _validate_support(self, cells: int) -> None:
        assert self.support_indptr is not None and self.support_ids is not None
        indptr, ids = self.support_indptr, self.support_ids
        self._require(indptr.shape == (cells + 1,) and indptr.dtype == np.int64, "support_indptr is not [G*C+1] int64")
        self._require(ids.dtype == np.int32 and ids.shape == (int(indptr[-1]),), "support_ids is not [nnz] int32")
        self._require(int(indptr[0]) == 0, "support_indptr doesn't begin at 0")
        counts = np.diff(indptr)
        drawn = self.drawn.ravel()
        self._require(bool((counts[drawn] > 0).all() and (counts[~drawn] == 0).all()), "support and drawn disagree")
        chosen = np.repeat(self.completion_ids.ravel(), counts) == ids
        hits = np.bincount(np.repeat(np.arange(cells), counts)[chosen], minlength=cells)
        self._require(bool((hits[drawn] == 1).all()), "a drawn token lies outside its own support")

    def _require(self, condition: bool, problem: str) -> None:
        if not condition:
            raise TrajectoryError(
                f"trajectory group {self.group_id} from actor {self.actor_id or 'unknown'}: {problem}"
            )


def outline(group: TrajectoryGroup) -> TrajectoryGroup:
    """The group without its supports, which only the scoring of its tokens reads: enough for a plan, and a twentieth of
    the bytes at top-k 150."""
    return replace(group, support_indptr=None, support_ids=None)


def arrays_of(group: TrajectoryGroup) -> dict[str, np.ndarray]:
    """By the names of their fields."""
    values = {f.name: getattr(group, f.name) for f in dataclasses.fields(group)}
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
