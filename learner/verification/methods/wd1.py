"""Recorded cases of wd1's trainers, computed again with this code base.

Masks, weights, completions and rewards are inputs; the softmaxes, log-probs, texts' log-likelihoods, losses and
gradients are compared. The trainers take the softmaxes over a micro-batch, whatever groups are in it.

Shapes: R rows, B rows of a micro-batch, C completion positions, N tokens of a micro-batch's texts.
"""

from typing import Literal

import numpy as np
from pydantic import BaseModel

from learner.likelihood.scorer import PolicyScores
from learner.objectives.advantages import group_advantages
from learner.objectives.wd1 import Wd1
from learner.settings.methods.one_step import Wd1Config
from learner.verification.measurement import Measurement, Meter
from learner.verification.methods.case import MethodCase, compare_gradients, recorded_policy
from learner.verification.methods.d1 import OneStepCall
from rewards.errors import DataError
from rollout.trajectory import TrajectoryGroup


class Wd1Settings(BaseModel):
    """Settings of a case, under the recorded names."""

    official_class: Literal["RevDiffuGRPOTrainer", "RevPSRDiffuGRPOTrainer"]
    """The second has the positive half alone."""


def check(case: MethodCase, meter: Meter) -> list[Measurement]:
    """Masks, weights, log-probs, losses and gradients of a case."""
    halves = case.read(Wd1Settings).official_class == "RevDiffuGRPOTrainer"
    objective = Wd1(Wd1Config(softmax_over="batch", negative_weight=1.0 if halves else 0.0))
    raising = Wd1(Wd1Config(softmax_over="batch", negative_weight=0.0))
    R = len(case.completion_ids)
    groups = case.groups(case.arrays.take("rewards", (R,))[:, None])
    advantages_R = np.concatenate([group_advantages(group.rewards) for group in groups])
    found = [meter.elements("advantages", advantages_R, case.arrays.take("advantages", (R,)))]
    gradients = []
    with recorded_policy(case, meter) as policy:
        for number, call in enumerate(case.calls()):
            record = OneStepCall(case, meter, groups, number, call)
            credit_B, w_pos_B = (np.concatenate(o.credit(_groups(record))) for o in (objective, raising))
            batch, B = case.batch(record.views(credit_B), groups), len(call.rows)
            policy.use(call.weights)
            scores = policy.scores(batch)
            loss, _ = objective.loss(PolicyScores(scores), batch)
            positive, _ = raising.loss(PolicyScores(scores), case.batch(record.views(w_pos_B), groups))
            new_N = scores.logp_N.detach().cpu().numpy()
            ell_B = np.bincount(batch.view_of_score, new_N.astype(np.float64), minlength=B)
            recorded_N = record.of_tokens(record.take("new_logps", B, case.settings.C))
            scaled = {"loss": loss.item(), "ce_loss": positive.item()}
            found += [
                *record.masks(),
                record.compare("advantages", w_pos_B, "w_pos", B),
                meter.elements("token log-probs", new_N, recorded_N, record.name("new_logps")),
                meter.scaled("row values", ell_B, record.take("ell", B), record.name("ell")),
            ]
            if halves:
                found.append(record.compare("advantages", w_pos_B - credit_B, "w_neg", B))
                scaled["neg_loss"] = loss.item() - positive.item()
            found += [meter.scaled("loss", x, record.take(name), record.name(name)) for name, x in scaled.items()]
            gradients.append(policy.gradient(loss))
        return [*found, compare_gradients(policy, gradients, meter)]


def _groups(record: OneStepCall) -> list[TrajectoryGroup]:
    """The groups of the micro-batch, which share the softmaxes."""
    G, rows = record.case.settings.G, record.call.rows
    if rows.start % G or rows.stop % G:
        raise DataError(f"array call_rows has the rows {rows.start} to {rows.stop}, no whole groups of G = {G}")
    return record.groups[rows.start // G : rows.stop // G]
