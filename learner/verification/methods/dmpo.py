"""Recorded cases of DMPO's trainer, computed again with this code base.

The recorded masks, weights, completions and rewards are inputs; the bounds of policy and base, the weights made of
them, log-probs, losses and gradients are compared. What the trainer takes over the rows of a process is a group's here:
the coefficient of an adaptive case is given, the logged effective sample size left out, and the softmax of unbiased
centering is taken over the rows of a process as if they were one group.

Shapes: R rows, P prompt tokens, C completion positions, K masked copies, U updates and Q processes, B rows of one.
"""

from typing import Annotated, Literal

import numpy as np
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveInt

from learner.likelihood.scorer import PolicyScores, Scores
from learner.likelihood.views import View, ViewBatch
from learner.objectives.copies import copies
from learner.objectives.dmpo import Dmpo
from learner.settings.methods.bounds import DmpoConfig
from learner.verification.measurement import Measurement, Meter
from learner.verification.methods.case import MethodCase, RecordedPolicy, compare_gradients, recorded_policy
from rewards.errors import DataError
from rollout.trajectory import TrajectoryGroup


class Config(BaseModel):
    """The trainer's settings, under the recorded names; what this method doesn't offer must be off."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    alpha: NonNegativeFloat
    samples: Annotated[PositiveInt, Field(validation_alias=AliasChoices("num_replicates"))]
    measured: Annotated[PositiveInt, Field(validation_alias=AliasChoices("compute_ref_log_prob_elbo_size"))]
    loss_antithetic: bool
    loss: Literal["wdce"]
    loss_mask_non_eos: Literal[False] = False
    advantage_centering: bool = True
    advantage_centering_unbias: bool = False
    advantage_centering_neg: bool
    centering_strength: NonNegativeFloat

    @property
    def strength(self) -> float:
        """Without centering nothing is taken from the weights, and what would be wasn't recorded."""
        return self.centering_strength if self.advantage_centering else 0.0

    @property
    def centering(self) -> Literal["negative", "mean", "unbiased"]:
        """The trainer asks for the unbiased one first."""
        if self.advantage_centering_unbias and self.advantage_centering:
            return "unbiased"
        return "negative" if self.advantage_centering_neg else "mean"


class DmpoSettings(BaseModel):
    """Settings of a case."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    config: Config
    rows_per_process: PositiveInt
    num_processes: PositiveInt


def check(case: MethodCase, meter: Meter) -> list[Measurement]:
    """Bounds, weights, log-probs, losses and gradients of a case."""
    s, take = case.read(DmpoSettings), case.arrays.take
    R = len(case.completion_ids)
    if s.rows_per_process * s.num_processes != R:
        raise DataError(f"{s.num_processes} processes of {s.rows_per_process} rows are not the case's {R}")
    objective = Dmpo(
        DmpoConfig(
            alpha=s.config.alpha,
            samples=s.config.samples,
            measured_samples=s.config.measured,
            antithetic=s.config.loss_antithetic,
            centering=s.config.centering,
            centering_strength=s.config.strength,
        )
    )
    reward_R = np.nan_to_num(take("rewards_per_func", (R, None))) @ take("reward_weights", (None,))
    groups = case.groups(reward_R[:, None])
    found = [meter.elements("advantages", reward_R, take("rewards", (R,)))]
    with recorded_policy(case, meter) as policy:
        check_ = _Check(case, s, meter, objective, groups, policy)
        current_R, base_R = check_.bounds()
        found += [
            meter.elements("ELBO", current_R, take("elbo_cur", (R,))),
            meter.elements("ELBO", base_R, take("elbo_pre", (R,))),
        ]
        found += check_.weights(base_R - current_R, reward_R)
        if any(name.startswith("cur/") for name in case.arrays.by_name):
            policy.use("cur")
        return [*found, *check_.losses()]


class _Check:
    """The record of a case, and what the product makes of it."""

    def __init__(
        self,
        case: MethodCase,
        settings: DmpoSettings,
        meter: Meter,
        objective: Dmpo,
        groups: list[TrajectoryGroup],
        policy: RecordedPolicy,
    ) -> None:
        self.case, self.settings, self.meter = case, settings, meter
        self.objective, self.groups, self.policy = objective, groups, policy

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """[R] each, of the rollout's policy and of the base, on the recorded copies."""
        take, s = self.case.arrays.take, self.case.settings
        Q, B, K = self.settings.num_processes, self.settings.rows_per_process, self.settings.config.measured
        inputs_QNL = take("elbo_inputs", (Q, K * B, s.P + s.C), "integers")
        mask_RKC = np.concatenate([self.masks("elbo_inputs", inputs_QNL[q], q, K) for q in range(Q)])
        views = [
            view
            for row, mask_KC in enumerate(mask_RKC)
            for view in copies(row // s.G, row % s.G, mask_KC, credit=0.0, weight=s.C / K)
        ]
        batch = self.case.batch(views, self.groups)
        row_N = np.array([view.group * s.G + view.row for view in views])[batch.view_of_score]

        def sums(scores: Scores) -> np.ndarray:
            logp_N = scores.logp_N.detach().double().cpu().numpy()
            return np.bincount(row_N, batch.weight * logp_N, minlength=len(mask_RKC))

        return sums(self.policy.scores(batch)), sums(self.policy.reference(batch))

    def weights(self, difference_R: np.ndarray, reward_R: np.ndarray) -> list[Measurement]:
        """From the bounds, with the recorded coefficient."""
        take, G, R = self.case.arrays.take, self.case.settings.G, reward_R.size
        coefficient_Q = take("coeff", (self.settings.num_processes,))
        rows = [slice(start, start + G) for start in range(0, R, G)]
        found = [
            self.objective.weights(
                difference_R[of], reward_R[of], float(coefficient_Q[of.start // self.settings.rows_per_process])
            )
            for of in rows
        ]
        plus_R = np.concatenate([weights.plus_G for weights in found])
        compared = [
            self.meter.elements("weights", plus_R, take("w_plus", (R,))),
            self.meter.elements("weights", [weights.ess for weights in found], take("ess_per_group", (len(rows),))),
        ]
        if self.settings.config.centering == "unbiased":
            return compared
        ours = {"row_weight": [weights.final_G for weights in found]}
        if self.settings.config.advantage_centering:
            ours["centering_factor"] = [weights.centre_G for weights in found]
        for name, by_group in ours.items():
            recorded_R = take(name, (None, len(coefficient_Q), None))[0][:, : self.settings.rows_per_process].ravel()
            compared.append(self.meter.elements("weights", np.concatenate(by_group), recorded_R, name))
        return compared

    def moved(self, scores: Scores, batch: ViewBatch, update: int, process: int) -> list[Measurement]:
        """Of unbiased centering: the bounds of a loss' own scores, and what they take from the weights."""
        take, R, B = self.case.arrays.take, len(self.case.completion_ids), self.settings.rows_per_process
        Q, K, s = self.settings.num_processes, self.settings.config.samples, self.settings.config
        rows, of_call = slice(process * B, (process + 1) * B), (update, process)
        row_N = np.array([view.group * self.case.settings.G + view.row for view in batch.views])[batch.view_of_score]
        logp_N = scores.logp_N.detach().double().cpu().numpy()
        theta_B = np.bincount(row_N - rows.start, self.case.settings.C * batch.weight * logp_N, minlength=B)
        recorded_B = take("elbo_theta", (None, Q, B))[of_call]
        centre_B = self.objective.weights(np.zeros(B), np.zeros(B), moved_G=recorded_B - take("elbo_cur", (R,))[rows])
        final_B = take("w_plus", (R,))[rows] - s.strength * centre_B.centre_G
        return [
            self.meter.elements("ELBO", theta_B, recorded_B, f"elbo_theta[{update}, {process}]"),
            *(
                self.meter.elements("weights", ours_B, take(name, (None, Q, K * B))[of_call][:B], name)
                for name, ours_B in (("centering_factor", centre_B.centre_G), ("row_weight", final_B))
            ),
        ]

    def losses(self) -> list[Measurement]:
        """Of each update and process, with the recorded weights of rows, and the gradient of their sum."""
        take, s = self.case.arrays.take, self.case.settings
        Q, B, K = self.settings.num_processes, self.settings.rows_per_process, self.settings.config.samples
        loss_UQ = take("losses", (None, Q))
        inputs_UQNL = take("loss_inputs", (len(loss_UQ), Q, K * B, s.P + s.C), "integers")
        weight_UQN = take("row_weight", (len(loss_UQ), Q, K * B))
        token_UQNC = take("token_ce", (len(loss_UQ), Q, K * B, s.C))
        gradient = {name: np.zeros(tuple(p.shape), np.float32) for name, p in self.policy.parameters.items()}
        found = []
        for u, q in np.ndindex(*loss_UQ.shape):
            where = f"[{u}, {q}]"
            mask_BKC = self.masks("loss_inputs", inputs_UQNL[u, q], q, K)
            views: list[View] = []
            for b, mask_KC in enumerate(mask_BKC):
                row = q * B + b
                views += copies(row // s.G, row % s.G, mask_KC, float(weight_UQN[u, q, b]), 1.0 / K)
            batch = self.case.batch(views, self.groups)
            scores = self.policy.scores(batch)
            loss, _ = self.objective.loss(PolicyScores(scores), batch)
            recorded_N = token_UQNC[u, q].reshape(K, B, s.C).swapaxes(0, 1)[mask_BKC]
            logp_N = scores.logp_N.detach().cpu().numpy()
            found += [
                self.meter.elements("ELBO log-probs", -logp_N, recorded_N, f"token_ce{where}"),
                self.meter.scaled("ELBO loss", loss.item(), loss_UQ[u, q], f"losses{where}"),
            ]
            if self.settings.config.centering == "unbiased":
                found += self.moved(scores, batch, u, q)
            for name, part in self.policy.gradient(loss).items():
                gradient[name] += part
        return [
            *found,
            compare_gradients(self.policy, [gradient], self.meter, quantity="gradient of the ELBO loss", floor=0.0),
        ]

    def masks(self, name: str, inputs_NL: np.ndarray, process: int, samples: int) -> np.ndarray:
        """[B, K, C] bool, what a process' recorded inputs mask; they list copy 0 of all rows, then copy 1, ..."""
        B = self.settings.rows_per_process
        rows = list(range(process * B, (process + 1) * B)) * samples
        prompt_NP, hidden_NC = self.case.hidden(name, inputs_NL, rows)
        if prompt_NP.any():
            raise DataError(f"array {name} masks a prompt")
        return hidden_NC.reshape(samples, B, -1).swapaxes(0, 1)
