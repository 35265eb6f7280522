"""Recorded cases of d1's diffu-GRPO trainer, computed again with this code base.

Masks, weights, completions and rewards are inputs; advantages, log-probs under each set of weights, ratios, row sums,
losses and gradients are compared. The trainer takes the token mean over a micro-batch.

Shapes: R rows, B rows of a micro-batch, P prompt tokens, C completion positions, N tokens of a micro-batch's texts.
"""

import dataclasses

import numpy as np
import torch
from numpy.typing import ArrayLike
from pydantic import BaseModel, NonNegativeFloat, PositiveInt

from learner.likelihood.masks import text_lengths
from learner.likelihood.scorer import PolicyScores, Scores
from learner.likelihood.views import View, ViewBatch
from learner.objectives.diffu_grpo import DiffuGrpo
from learner.objectives.one_step import one_step_unit
from learner.settings.methods.one_step import DiffuGrpoConfig
from learner.settings.objective import ClipLow
from learner.verification.measurement import Measurement, Meter
from learner.verification.methods.case import Call, MethodCase, RecordedPolicy, compare_gradients, recorded_policy
from rewards.errors import DataError
from rollout.trajectory import TrajectoryGroup


class DiffuGrpoSettings(BaseModel):
    """Settings of a case, under the recorded names."""

    mu: PositiveInt
    """Masks of the rollout; with one, the old log-probs are the new ones and weren't recorded."""
    beta: NonNegativeFloat
    eps: ClipLow


def check(case: MethodCase, meter: Meter) -> list[Measurement]:
    """Masks, advantages, log-probs, ratios, losses and gradients of a case."""
    s, R = case.read(DiffuGrpoSettings), len(case.completion_ids)
    objective = DiffuGrpo(DiffuGrpoConfig(clip_low=s.eps, clip_high=s.eps, beta=s.beta, average="token"))
    groups = case.groups(case.arrays.take("rewards", (R,))[:, None])
    credit_R = np.concatenate(objective.credit(groups))
    found = [meter.elements("advantages", credit_R, case.arrays.take("advantages", (R,)))]
    gradients = []
    with recorded_policy(case, meter) as policy:
        for number, call in enumerate(case.calls()):
            record = OneStepCall(case, meter, groups, number, call)
            views = record.views(credit_R[call.rows])
            batch = case.batch(views, groups)
            scores = _scores(policy, record, views, s)
            total, statistics = objective.loss(scores, batch)
            loss = total / batch.targets.size
            rows = [
                objective.loss(_of_row(scores, batch.view_of_score == b), case.batch([view], groups))[0].item()
                for b, view in enumerate(views)
            ]
            row_sums, tokens = record.take("row_loss_sum", len(rows)), batch.targets.size
            found += [
                *record.masks(),
                *_log_probs(record, scores, s),
                record.compare("clip fraction", _logged_clip_fraction(scores, batch, s.eps), "clip_ratio"),
                meter.scaled("loss", loss.item(), record.take("loss"), record.name("loss")),
                meter.scaled("row values", rows, row_sums, record.name("row_loss_sum"), scale=tokens),
            ]
            if s.beta:
                kl = statistics.values()["kl"]
                found.append(meter.scaled("ratios", kl, record.take("mean_kl"), record.name("mean_kl")))
            gradients.append(policy.gradient(loss))
        return [*found, compare_gradients(policy, gradients, meter)]


@dataclasses.dataclass(frozen=True)
class OneStepCall:
    """The record of one stored call of a loss that scores whole completions in one view each."""

    case: MethodCase
    meter: Meter
    groups: list[TrajectoryGroup]
    number: int
    call: Call

    def take(self, name: str, *shape: int) -> np.ndarray:
        """The call's part of an array that has one for each call."""
        return self.case.arrays.take(name, (len(self.case.calls()), *shape))[self.number]

    def name(self, array: str) -> str:
        return f"{array}[{self.number}]"

    def compare(self, quantity: str, ours: ArrayLike, array: str, *shape: int) -> Measurement:
        """Element by element with the call's part of the array."""
        return self.meter.elements(quantity, ours, self.take(array, *shape), self.name(array))

    def of_tokens(self, recorded_BC: np.ndarray) -> np.ndarray:
        """[N], what is recorded of the texts' tokens."""
        return recorded_BC[np.arange(self.case.settings.C) < self.lengths_B[:, None]]

    @property
    def lengths_B(self) -> np.ndarray:
        """[B] int64, of the texts, as the product finds them."""
        lengths = [text_lengths(group, (self.case.settings.eos,)) for group in self.groups]
        return np.concatenate(lengths)[self.call.rows]

    @property
    def hidden(self) -> tuple[np.ndarray, np.ndarray]:
        """[B, P] and [B, C] bool, what the recorded inputs mask."""
        s, B = self.case.settings, len(self.call.rows)
        inputs_BL = self.case.arrays.take("noised_ids", (len(self.case.calls()), B, s.P + s.C), "integers")[self.number]
        return self.case.hidden("noised_ids", inputs_BL, self.call.rows)

    def views(self, credit_B: np.ndarray) -> list[View]:
        """[B], what the product makes of the recorded prompt masks."""
        G, views = self.case.settings.G, list[View]()
        for row, hidden_P, length, credit in zip(self.call.rows, self.hidden[0], self.lengths_B, credit_B, strict=True):
            group = self.groups[row // G]
            views += one_step_unit(group, row // G, row % G, hidden_P, int(length), float(credit), 1.0)
        return views

    def masks(self) -> list[Measurement]:
        """Of the completions, and the positions that are scored."""
        rows, (_, hidden_BC) = self.call.rows, self.hidden
        views = self.views(np.zeros(len(rows)))
        scored_BC = np.array([np.isin(np.arange(hidden_BC.shape[1]), view.scored_n) for view in views])
        return [
            self.meter.elements("masks", [view.hidden_C for view in views], hidden_BC, self.name("noised_ids")),
            self.meter.elements("masks", scored_BC, self.case.completion_mask[rows], "completion_mask"),
        ]


def _scores(policy: RecordedPolicy, record: OneStepCall, views: list[View], s: DiffuGrpoSettings) -> PolicyScores:
    """Under the weights of the rollout and without adapter where the method has them, and under the call's weights,
    which stay in place."""
    batch = record.case.batch(views, record.groups)
    policy.use("gen")
    with torch.no_grad():
        old = policy.scores(batch) if s.mu > 1 else None
    reference = policy.reference(batch) if s.beta else None
    policy.use(record.call.weights)
    current = policy.scores(batch)
    return PolicyScores(current, old or current.detached(), reference)


def _log_probs(record: OneStepCall, scores: PolicyScores, s: DiffuGrpoSettings) -> list[Measurement]:
    """Of the texts' tokens under each set of weights, and their ratios."""
    shape, rows = (len(record.call.rows), record.case.settings.C), record.call.rows
    new_N, old_N, reference_N = (None if part is None else part.logp_N.detach().cpu().numpy() for part in scores[:3])
    assert new_N is not None and old_N is not None
    compare = record.meter.elements
    found = [
        compare("token log-probs", new_N, record.of_tokens(record.take("new_logps", *shape)), record.name("new_logps")),
        compare("ratios", np.exp(new_N - old_N), record.of_tokens(record.take("ratio", *shape)), record.name("ratio")),
    ]
    if record.call.masks >= s.mu:
        raise DataError(f"array call_iter has {record.call.masks}, which is none of mu = {s.mu} masks")
    for name, ours_N in (("old_logps", old_N if s.mu > 1 else None), ("ref_logps", reference_N)):
        if ours_N is not None:
            whole = record.case.arrays.take(name, (s.mu, *record.case.completion_ids.shape))
            recorded_N = record.of_tokens(whole[record.call.masks, rows])
            found.append(compare("token log-probs", ours_N, recorded_N, name))
    return found


def _logged_clip_fraction(scores: PolicyScores, batch: ViewBatch, eps: float) -> float:
    """What the trainer logs: the share of tokens whose clipped term is larger, which the minimum leaves unclipped."""
    assert scores.old is not None
    ratio_N = (scores.policy.logp_N.detach() - scores.old.logp_N).exp().cpu().numpy()
    clipped_N = ratio_N.clip(1 - eps, 1 + eps)
    return float((clipped_N * batch.credit > ratio_N * batch.credit).mean())


def _of_row(scores: PolicyScores, of_row_N: np.ndarray) -> PolicyScores:
    at_N = torch.from_numpy(of_row_N).to(scores.policy.logp_N.device)

    def part(whole: Scores | None) -> Scores | None:
        return None if whole is None else Scores(whole.logp_N[at_N], whole.mass_N[at_N])

    policy = part(scores.policy)
    assert policy is not None
    return PolicyScores(policy, part(scores.old), part(scores.reference))
