"""Recorded cases of ESPO's official code, computed again with this code base.

The recorded masked inputs become units; credit, bounds, ratios, losses and gradients come from the product. With one
update per rollout (mu 1) the official code compares the policy with itself, else with the weights of the rollout.

Shapes: R rows, B rows of a micro-batch, P prompt tokens, C completion positions, M samples, N stored calls of the loss.
"""

import dataclasses
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveInt

from learner.likelihood.scorer import PolicyScores
from learner.likelihood.views import ViewBatch
from learner.objectives.elbo import unit_sums
from learner.objectives.espo import Espo
from learner.settings.methods.bounds import EspoConfig
from learner.verification.measurement import Measurement, Meter
from learner.verification.methods.case import MethodCase, RecordedPolicy, compare_gradients, recorded_policy
from rewards.errors import DataError
from rollout.trajectory import TrajectoryGroup


class Config(BaseModel):
    """The method's settings, under the recorded names. Another KL or baseline than these is not this method."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    num_mc: PositiveInt
    num_iterations: PositiveInt
    beta: NonNegativeFloat
    epsilon_low: NonNegativeFloat
    epsilon_high: NonNegativeFloat
    scale_rewards: bool
    leave_one_out: Literal[True] = True
    kl_estimator: Literal["k2"] = "k2"
    coupled: Literal[True] = True


class EspoSettings(BaseModel):
    """Settings of a case."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    config: Config
    rows_per_microbatch: PositiveInt


def check(case: MethodCase, meter: Meter) -> list[Measurement]:
    """Masks, advantages, log-probs, bounds, ratios, losses and gradients of a case."""
    s, take = case.read(EspoSettings), case.arrays.take
    R = len(case.completion_ids)
    rewards_RK = take("rewards_per_func", (R, None))
    groups = case.groups(rewards_RK)
    objective = Espo(
        EspoConfig(
            samples=s.config.num_mc,
            clip_low=s.config.epsilon_low,
            clip_high=s.config.epsilon_high,
            beta=s.config.beta,
            scale_advantages=s.config.scale_rewards,
        )
    )
    credit_R = np.concatenate(objective.credit(groups))
    found = [meter.elements("advantages", credit_R, take("advantages", (R,)))]
    with recorded_policy(case, meter) as policy:
        gradient = {name: np.zeros(tuple(p.shape), np.float32) for name, p in policy.parameters.items()}
        for number in range(len(take("losses", (None,)))):
            call = _Call(case, s, meter, number)
            batch = call.batch(objective, groups, credit_R)
            scores = _scores(policy, batch, s.config)
            terms = objective.terms(scores, batch)
            loss = objective.loss(scores, batch)[0] / len(call.rows)
            found += [*call.masks(credit_R), *call.log_probs(scores, batch)]
            found += [
                call.compare("ratios", terms.clipped.ratio_N, "ratio"),
                call.compare("ELBO loss", terms.clipped.loss_N, "row_policy_loss"),
                call.compare("clip fraction", _share(terms.clipped.averages["clip_fraction/low"]), "low_clip"),
                call.compare("clip fraction", _share(terms.clipped.averages["clip_fraction/high"]), "high_clip"),
                call.compare("ELBO loss", loss, "losses"),
            ]
            if terms.k2_per_token_U is not None:
                k2_B = call.recorded("kl_rows", len(call.rows))
                apart_B = (2 * case.settings.C * terms.k2_per_token_U).sqrt()
                found += [  # of a square, an error that is small beside the bounds' own isn't small beside it
                    call.compare("ELBO differences", apart_B, "kl_rows", np.sqrt(2 * k2_B)),
                    call.compare("ELBO loss", terms.k2_per_token_U.mean(), "mean_kl"),
                ]
            for name, part in policy.gradient(loss).items():
                gradient[name] += part
        found.append(compare_gradients(policy, [gradient], meter, quantity="gradient of the ELBO loss", floor=0.0))
    return found


@dataclasses.dataclass(frozen=True)
class _Call:
    """The record of one stored call of the loss."""

    case: MethodCase
    settings: EspoSettings
    meter: Meter
    number: int

    @property
    def rows(self) -> range:
        """[B], of the micro-batch."""
        B, R = self.settings.rows_per_microbatch, len(self.case.completion_ids)
        first = int(self.recorded("chunk_idx", integers=True)) * B
        if not 0 <= first <= R - B:
            raise DataError(f"array chunk_idx has {first // B}, and {R} rows have no such micro-batch of {B}")
        return range(first, first + B)

    @property
    def mask_MBC(self) -> np.ndarray:
        """[M, B, C] bool, the drawn masks."""
        return self.recorded("masks", self.M, len(self.rows), self.case.settings.C, integers=True).astype(bool)

    @property
    def M(self) -> int:
        return self.settings.config.num_mc

    def batch(self, objective: Espo, groups: list[TrajectoryGroup], credit_R: np.ndarray) -> ViewBatch:
        """What the product makes of the recorded masks: a unit of each row."""
        G, mask_MBC = self.case.settings.G, self.mask_MBC
        units = [
            objective.unit(row // G, row % G, mask_MBC[:, b], float(credit_R[row])) for b, row in enumerate(self.rows)
        ]
        return self.case.batch([view for unit in units for view in unit], groups, [len(unit) for unit in units])

    def masks(self, credit_R: np.ndarray) -> list[Measurement]:
        """Both inputs of each sample, with a clean prompt; counts; the rows' advantages."""
        mask_MBC, s = self.mask_MBC, self.case.settings
        found = []
        for name, hidden_MBC in (("masked_inputs", mask_MBC), ("complement_inputs", ~mask_MBC)):
            inputs_MBL = self.recorded(name, self.M, len(self.rows), s.P + s.C, integers=True)
            recorded_MBL = np.concatenate(self.case.hidden(name, inputs_MBL, self.rows), axis=2)
            ours_MBL = np.concatenate([np.zeros((*hidden_MBC.shape[:2], s.P), bool), hidden_MBC], axis=2)
            found.append(self.meter.elements("masks", ours_MBL, recorded_MBL, f"{name}[{self.number}]"))
        return [
            *found,
            self.compare("masks", mask_MBC.sum(axis=2), "counts"),
            self.compare("advantages", credit_R[self.rows], "call_advantages"),
        ]

    def log_probs(self, scores: PolicyScores, batch: ViewBatch) -> list[Measurement]:
        """Of every position in the view of each sample that scores it, and the bounds under each set of weights."""
        B, C = len(self.rows), self.case.settings.C
        sample_N = np.arange(B * self.M * C) // C % self.M  # a mask and its complement score each position once
        terms_N = self.recorded("token_terms", self.M, B, C)[sample_N, batch.unit_of_score, batch.position]
        logp_N = scores.policy.logp_N.detach().cpu().numpy()
        recorded_N, array = terms_N / (batch.weight * self.M), f"token_terms[{self.number}]"
        found = [
            self.meter.elements("ELBO log-probs", logp_N, recorded_N, array),
            self.compare("ELBO", unit_sums(scores.policy.logp_N, batch), "elbo_new"),
        ]
        assert scores.old is not None
        found.append(self.compare("ELBO", unit_sums(scores.old.logp_N, batch), "elbo_old"))
        if scores.reference is not None:
            found.append(self.compare("ELBO", unit_sums(scores.reference.logp_N, batch), "elbo_ref"))
        return found

    def compare(
        self, quantity: str, ours: np.ndarray | torch.Tensor, array: str, recorded: np.ndarray | None = None
    ) -> Measurement:
        """With the call's part of an array, or with what was made of it."""
        values = ours.detach().cpu().numpy() if isinstance(ours, torch.Tensor) else ours
        compare = self.meter.scaled if quantity == "ELBO loss" else self.meter.elements
        recorded = self.recorded(array, *values.shape) if recorded is None else recorded
        return compare(quantity, values, np.asarray(recorded), f"{array}[{self.number}]")

    def recorded(self, name: str, *shape: int, integers: bool = False) -> np.ndarray:
        """The call's part of an array that has one for each call."""
        kind: Literal["integers", "numbers"] = "integers" if integers else "numbers"
        calls = len(self.case.arrays.take("losses", (None,)))
        return self.case.arrays.take(name, (calls, *shape), kind)[self.number]


def _scores(policy: RecordedPolicy, batch: ViewBatch, config: Config) -> PolicyScores:
    """Under the weights of the rollout, without adapter if wanted, and under those of the loss, which stay in place."""
    policy.use("gen")
    old = reference = None
    if config.num_iterations > 1:
        with torch.no_grad():
            old = policy.scores(batch)
    if config.beta > 0:
        reference = policy.reference(batch)
    if any(name.startswith("cur/") for name in policy.case.arrays.by_name):
        policy.use("cur")
    scores = policy.scores(batch)
    return PolicyScores(scores, scores.detached() if old is None else old, reference)


def _share(flags_U: torch.Tensor) -> torch.Tensor:
    return flags_U.double().mean()
