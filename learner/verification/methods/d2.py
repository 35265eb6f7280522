"""Recorded cases of d2-StepMerge's official code, computed again with this code base.

The recorded segments become the steps of a rollout, and the recorded masks of the prompts its masks; segments' states,
credit, log-probs under each set of weights, ratios, losses and gradients come from the product. A stored call is one
segment of one micro-batch, with a loss of N times the sum over its tokens, divided by all tokens of the micro-batch.

Shapes: R rows of all M micro-batches, B rows of each, P prompt tokens, C completion positions, N segments, U masks of
the prompts, K stored calls.
"""

import dataclasses
from functools import cached_property

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveInt

from learner.likelihood.masks import text_lengths
from learner.likelihood.scorer import PolicyScores
from learner.likelihood.views import View, ViewBatch
from learner.objectives.d2 import D2, segment_starts
from learner.settings.methods.states import D2Config
from learner.settings.objective import ClipLow
from learner.verification.cases import Arrays
from learner.verification.measurement import Measurement, Meter
from learner.verification.methods.case import MethodCase, RecordedPolicy, compare_gradients, recorded_policy
from rewards.errors import DataError
from rollout.trajectory import TrajectoryGroup


class Config(BaseModel):
    """The method's settings, under the recorded names."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    num_iterations: PositiveInt
    N: PositiveInt
    beta: NonNegativeFloat
    epsilon: ClipLow


class D2Settings(BaseModel):
    """Settings of a case."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    config: Config
    B: PositiveInt
    T: PositiveInt
    n_rollout_batches: PositiveInt


def check(case: MethodCase, meter: Meter) -> list[Measurement]:
    """Masks, advantages, log-probs, ratios, losses and gradients of a case."""
    s = case.read(D2Settings)
    c, rows = s.config, _by_row(case, s)
    objective = D2(D2Config(segments=c.N, clip_low=c.epsilon, clip_high=c.epsilon, beta=c.beta, average="token"))
    record = _Record(rows, s, meter, objective, _segment_of(rows, s))
    advantages_R = rows.arrays.take("advantages", (s.n_rollout_batches, s.B)).reshape(-1)
    found = [meter.elements("advantages", record.credit_R, advantages_R, "advantages"), *record.states()]
    with recorded_policy(rows, meter) as policy:
        gradient = {name: np.zeros(tuple(p.shape), np.float32) for name, p in policy.parameters.items()}
        for number in range(len(case.arrays.take("losses", (None,)))):
            call = _Call(record, number)
            batch, masks = call.batch()
            scores = _scores(policy, batch, c)
            total, statistics = objective.loss(scores, batch)
            loss = total * c.N / call.tokens
            found += [*masks, *call.log_probs(scores, batch)]
            found.append(meter.scaled("loss", loss.item(), call.recorded("losses"), f"losses[{number}]"))
            if c.beta:
                kl_N = call.of_scores(call.recorded("token_kl", s.B, rows.settings.C), batch)
                kl = statistics.values()["kl"]
                found.append(meter.scaled("ratios", kl, np.asarray(kl_N.mean()), f"token_kl[{number}]"))
            for name, part in policy.gradient(loss).items():
                gradient[name] += part
        return [*found, compare_gradients(policy, [gradient], meter)]


def _by_row(case: MethodCase, s: D2Settings) -> MethodCase:
    """The case with the rows of all micro-batches in one axis, where it has the texts."""
    arrays = dict(case.arrays.by_name)
    for name, width in (("prompt_ids", "P"), ("completion_ids", "C"), ("completion_mask", "C")):
        shape = (s.n_rollout_batches, s.B, getattr(case.settings, width))
        arrays[name] = case.arrays.take(name, shape, "integers").reshape(-1, shape[2])
    return dataclasses.replace(case, arrays=Arrays(arrays))


def _segment_of(rows: MethodCase, s: D2Settings) -> np.ndarray:
    """[R, C] int64, the segment in which each position was written."""
    shape = (s.n_rollout_batches, s.config.N, s.B, rows.settings.C)
    written_MNBC = rows.arrays.take("segment_masks", shape, "integers", within=(0, 1))
    if not (written_MNBC.sum(axis=1) == 1).all():
        raise DataError("array segment_masks has a position that isn't written once")
    return written_MNBC.argmax(axis=1).reshape(-1, shape[3])


@dataclasses.dataclass(frozen=True)
class _Record:
    """A case as rollouts."""

    case: MethodCase
    settings: D2Settings
    meter: Meter
    objective: D2
    segment_RC: np.ndarray

    @cached_property
    def groups(self) -> list[TrajectoryGroup]:
        """The rows as rollouts in which a segment's positions were all written at its first step."""
        s, G = self.settings, self.case.settings.G
        rewards_RK = self.case.arrays.take("rewards_per_func", (s.n_rollout_batches, s.B, None)).reshape(
            s.n_rollout_batches * s.B, -1
        )
        step_RC = np.array(segment_starts(s.T, s.config.N))[self.segment_RC].astype(np.int16)
        return [
            dataclasses.replace(
                group,
                unmask_step=step_RC[number * G : (number + 1) * G],
                sampler=dataclasses.replace(group.sampler, steps=s.T),
            )
            for number, group in enumerate(self.case.groups(rewards_RK))
        ]

    @cached_property
    def credit_R(self) -> np.ndarray:
        return np.concatenate(self.objective.credit(self.groups))

    def views(self, row: int, hidden_P: np.ndarray) -> dict[int, View]:
        """What the product makes of a row and a mask of its prompt, by segment; those that score nothing are absent."""
        index, within = divmod(row, self.case.settings.G)
        group, credit = self.groups[index], float(self.credit_R[row])
        length = int(text_lengths(group, (self.case.settings.eos,))[within])
        views = self.objective.segments(group, index, within, hidden_P, length, credit, weight=1.0)
        return {int(self.segment_RC[row, view.scored_n[0]]): view for view in views}

    def states(self) -> list[Measurement]:
        """The completions before each segment, and the positions that any of a row's segments scores."""
        s, form = self.settings, self.case.settings
        shape = (s.n_rollout_batches, s.config.N, s.B, form.P + form.C)
        states_MNBL = self.case.arrays.take("segment_states", shape, "integers")
        states_NRL = states_MNBL.swapaxes(0, 1).reshape(s.config.N, -1, shape[3])
        clean_NRP, hidden_NRC = self.case.hidden("segment_states", states_NRL, range(states_NRL.shape[1]))
        ours_NRC, scored_RC = hidden_NRC.copy(), np.zeros(self.segment_RC.shape, bool)
        for row in range(len(scored_RC)):
            for segment, view in self.views(row, clean_NRP[0, row]).items():
                ours_NRC[segment, row] = view.hidden_C
                scored_RC[row, view.scored_n] = True
        return [
            self.meter.elements("masks", ours_NRC, hidden_NRC, "segment_states"),
            self.meter.elements("masks", scored_RC, self.case.completion_mask, "completion_mask"),
        ]


@dataclasses.dataclass(frozen=True)
class _Call:
    """A stored call of the loss."""

    record: _Record
    number: int

    @property
    def rows(self) -> range:
        """[B], of the micro-batch."""
        first = self.at("call_batch", self.record.settings.n_rollout_batches) * self.record.settings.B
        return range(first, first + self.record.settings.B)

    @property
    def tokens(self) -> int:
        """Of the texts of the micro-batch."""
        return int(self.record.case.completion_mask[self.rows].sum())

    def at(self, name: str, below: int) -> int:
        """The call's entry of an array of indices."""
        calls = len(self.record.case.arrays.take("losses", (None,)))
        return int(self.record.case.arrays.take(name, (calls,), "integers", within=(0, below - 1))[self.number])

    def recorded(self, name: str, *shape: int, integers: bool = False) -> np.ndarray:
        """The call's part of an array that has one for each call."""
        calls = len(self.record.case.arrays.take("losses", (None,)))
        return self.record.case.arrays.take(name, (calls, *shape), "integers" if integers else "numbers")[self.number]

    def batch(self) -> tuple[ViewBatch, list[Measurement]]:
        """The segment's views of all rows under the recorded masks of their prompts; what is masked and scored."""
        case, B, name = self.record.case, len(self.rows), f"noised_inputs[{self.number}]"
        form, segment = case.settings, self.at("call_segment", self.record.settings.config.N)
        inputs_BL = self.recorded("noised_inputs", B, form.P + form.C, integers=True)
        hidden_BP, hidden_BC = case.hidden("noised_inputs", inputs_BL, self.rows)
        by_segment = [self.record.views(row, hidden_BP[b]) for b, row in enumerate(self.rows)]
        views = {b: views[segment] for b, views in enumerate(by_segment) if segment in views}
        ours_BC, scored_BC = hidden_BC.copy(), np.zeros_like(hidden_BC)
        for b, view in views.items():
            ours_BC[b] = view.hidden_C
            scored_BC[b, view.scored_n] = True
        recorded_BC = self.recorded("scored_mask", B, form.C, integers=True).astype(bool)
        elements = self.record.meter.elements
        masks = [
            elements("masks", ours_BC, hidden_BC, name),
            elements("masks", scored_BC, recorded_BC, f"scored_mask[{self.number}]"),
        ]
        return case.batch(list(views.values()), self.record.groups), masks

    def of_scores(self, recorded_BC: np.ndarray, batch: ViewBatch) -> np.ndarray:
        """[N], what is recorded of the scored tokens."""
        G, first = self.record.case.settings.G, self.rows[0]
        row_Z = np.array([view.group * G + view.row - first for view in batch.views])
        return recorded_BC[row_Z[batch.view_of_score], batch.position]

    def log_probs(self, scores: PolicyScores, batch: ViewBatch) -> list[Measurement]:
        """Of the scored tokens under each set of weights, and their ratios."""
        s, C = self.record.settings, self.record.case.settings.C
        place = self.at("call_batch", s.n_rollout_batches), self.at("call_itr", s.config.num_iterations)
        whole = (s.n_rollout_batches, s.config.num_iterations, s.B, C)
        assert scores.old is not None
        new_N, old_N = (part.logp_N.detach().cpu().numpy() for part in (scores.policy, scores.old))
        compared = [
            ("token log-probs", new_N, "logp_new", self.recorded("logp_new", s.B, C)),
            ("ratios", np.exp(new_N - old_N), "ratio", self.recorded("ratio", s.B, C)),
            ("token log-probs", old_N, "logp_old", self.record.case.arrays.take("logp_old", whole)[place]),
        ]
        if scores.reference is not None:
            reference_N = scores.reference.logp_N.cpu().numpy()
            recorded_BC = self.record.case.arrays.take("logp_ref", whole)[place]
            compared.append(("token log-probs", reference_N, "logp_ref", recorded_BC))
        return [
            self.record.meter.elements(quantity, ours_N, self.of_scores(recorded_BC, batch), f"{name}[{self.number}]")
            for quantity, ours_N, name, recorded_BC in compared
        ]


def _scores(policy: RecordedPolicy, batch: ViewBatch, config: Config) -> PolicyScores:
    """Under the weights of the rollout, without adapter if wanted, and under those of the loss, which stay in place."""
    policy.use("gen")
    with torch.no_grad():
        old = policy.scores(batch)
    reference = policy.reference(batch) if config.beta > 0 else None
    if any(name.startswith("cur/") for name in policy.case.arrays.by_name):
        policy.use("cur")
    return PolicyScores(policy.scores(batch), old, reference)
