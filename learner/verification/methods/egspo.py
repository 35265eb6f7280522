"""Recorded cases of EGSPO's and EGSPO-SA's official code, computed again with this code base.

The recorded rollouts become groups with branches; ranking, credit, views, ratios, losses and gradients come from the
product, as do the likeliest fills of the ranked states. Each stored call of the loss is of one rank. Entropies are
ranked as they were recorded (temperature 1), which the product leaves to the law that drew. Of a case with one step a
completion the official code compares the policy with itself; so does this reader then.

Shapes: R rows, K ranks, T steps of a rollout, U tokens of a step, F reward functions, P prompt tokens, C completion
positions, N stored calls.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt

from learner.likelihood.scorer import PolicyScores
from learner.likelihood.views import View, ViewBatch, step_view
from learner.objectives.egspo import Egspo
from learner.settings.methods.branches import EgspoConfig
from learner.verification.measurement import Measurement, Meter
from learner.verification.methods.case import MethodCase, RecordedPolicy, compare_gradients, recorded_policy
from rewards.errors import DataError
from rollout.sampling.branches import highest_entropy_steps, last_branch_step
from rollout.trajectory import SamplerSpec, TrajectoryGroup


class Config(BaseModel):
    """The method's settings, under the recorded names."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    logps_eval_num_steps: PositiveInt
    logps_eval_time_steps_mode: Literal["high_entropy", "uniform"]
    logps_aggregation_mode: Literal["sum", "mean"]
    terminate_at_last_non_eos: bool
    use_exact_kl: bool
    lambda1_used: NonNegativeFloat
    normalize_returns: bool
    standard_grpo_returns: bool
    correctness_step_reward_only: bool
    epsilon: PositiveFloat
    epsilon_high: PositiveFloat
    beta: NonNegativeFloat
    diffusion_steps: PositiveInt
    block_length: PositiveInt
    temperature: PositiveFloat


class EgspoSettings(BaseModel):
    """Settings of a case."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    config: Config


def check(case: MethodCase, meter: Meter) -> list[Measurement]:
    """Ranked steps, fills, rewards, advantages, states, log-probs, ratios, losses and gradients of a case."""
    s = case.read(EgspoSettings).config
    record = _Record(case, s, meter)
    objective = Egspo(
        EgspoConfig(
            k=s.logps_eval_num_steps,
            lam=s.lambda1_used,
            normalise=s.normalize_returns,
            centre="reward" if s.standard_grpo_returns else "return",
            step_reward=f"recorded_{record.functions - 1}" if s.correctness_step_reward_only else None,
            step_range="until_last_token" if s.terminate_at_last_non_eos else "all",
            aggregate=s.logps_aggregation_mode,
            clip_low=s.epsilon,
            clip_high=s.epsilon_high,
            kl="exact" if s.use_exact_kl else "k3",
            beta=s.beta,
        )
    )
    groups = record.groups()
    credit_RK = np.concatenate([credit.reshape(len(credit), -1) for credit in objective.credit(groups)])
    credit_RK = np.broadcast_to(credit_RK, record.steps_RK.shape)
    found = [
        *record.ranking(objective, groups),
        *record.rewards(objective, groups),
        meter.elements("advantages", credit_RK, record.take("advantages_per_step", credit_RK.shape)),
    ]
    with recorded_policy(case, meter) as policy:
        found.append(record.fills(policy, groups))
        gradient = {name: np.zeros(tuple(p.shape), np.float32) for name, p in policy.parameters.items()}
        if any(name.startswith("cur/") for name in case.arrays.by_name):
            policy.use("cur")
        for call in record.calls():
            loss = call.check(policy, objective, groups, credit_RK, found)
            for name, part in policy.gradient(loss).items():
                gradient[name] += part
        found.append(compare_gradients(policy, [gradient], meter))
    return found


@dataclasses.dataclass(frozen=True)
class _Record:
    """The arrays of a case."""

    case: MethodCase
    config: Config
    meter: Meter

    def take(
        self, name: str, shape: tuple[int | None, ...], kind: Literal["integers", "numbers"] = "numbers"
    ) -> np.ndarray:
        return self.case.arrays.take(name, shape, kind)

    @property
    def R(self) -> int:
        return len(self.case.completion_ids)

    @property
    def K(self) -> int:
        return self.config.logps_eval_num_steps

    @property
    def functions(self) -> int:
        return int(self.rewards_RKF.shape[2])

    @property
    def unmask_RC(self) -> np.ndarray:
        """[R, C], the step that wrote each position."""
        last = self.config.diffusion_steps - 1
        shape = self.case.completion_ids.shape
        return self.case.arrays.take("unmask_steps", shape, "integers", within=(0, last)).astype(np.int16)

    @property
    def steps_RK(self) -> np.ndarray:
        """[R, K], the ranked steps as they were recorded."""
        last = self.config.diffusion_steps - 1
        return self.case.arrays.take("eval_time_steps", (self.R, self.K), "integers", within=(0, last))

    @property
    def rewards_RKF(self) -> np.ndarray:
        """[R, K + 1, F], weighted: of the fills by rank, and last of the completions."""
        rewards_RKF = self.take("rewards_per_func", (self.R, self.K + 1, None))
        return rewards_RKF * self.take("reward_weights", (rewards_RKF.shape[2],))

    def by_position(self, name: str) -> np.ndarray:
        """[R, C] float32, from [R, T, U] by step, then by position."""
        order_RC = np.argsort(self.unmask_RC, axis=1, kind="stable")
        T, C = self.config.diffusion_steps, self.case.settings.C
        if C % T or (np.sort(self.unmask_RC, axis=1) != np.repeat(np.arange(T), C // T)).any():
            raise DataError(f"array unmask_steps has steps of other than {C / T:g} tokens")
        found_RC = np.zeros((self.R, C), np.float32)
        np.put_along_axis(found_RC, order_RC, self.take(name, (self.R, T, C // T)).reshape(self.R, C), axis=1)
        return found_RC

    def groups(self) -> list[TrajectoryGroup]:
        """The rows with what the rollout recorded, and with the branches at the ranked steps."""
        rewards_RKF, config, C = self.rewards_RKF, self.config, self.case.settings.C
        fields = {
            "unmask_step": self.unmask_RC,
            "logp_raw": self.by_position("gen_logps"),
            "entropy": self.by_position("gen_entropies"),
            "branch_step": self.steps_RK.astype(np.int16),
            "branch_ids": self.recorded_fills().astype(np.int32)[:, :, None],
            "branch_rewards": rewards_RKF[:, : self.K, None].astype(np.float32),
            "branch_correct": np.zeros((self.R, self.K, 1), bool),
        }
        sampler = SamplerSpec(C, config.block_length, config.diffusion_steps, "low_confidence", config.temperature)
        G, plain = self.case.settings.G, self.case.groups(rewards_RKF[:, self.K])
        return [
            dataclasses.replace(
                group,
                sampler=sampler,
                **{name: array[i * G : (i + 1) * G] for name, array in fields.items()},  # type: ignore[arg-type]
            )
            for i, group in enumerate(plain)
        ]

    def recorded_fills(self) -> np.ndarray:
        """[R, K, C], the likeliest fills of the ranked states."""
        T, C = self.config.diffusion_steps, self.case.settings.C
        fills_RTC = self.take("x0_greedy", (self.R, T + 1, C), "integers")
        return np.take_along_axis(fills_RTC, self.steps_RK[:, :, None], axis=1)

    def ranking(self, objective: Egspo, groups: list[TrajectoryGroup]) -> Iterator[Measurement]:
        """Each step's mean entropy, and the ranked steps where they were ranked by it."""
        if self.config.logps_eval_time_steps_mode != "high_entropy":
            return
        eos = (self.case.settings.eos,)
        ours = []
        for group in groups:
            last_G = last_branch_step(
                group.completion_ids,
                group.unmask_step,
                eos,
                until_last_token=objective.config.step_range == "until_last_token",
            )
            ours.append(
                highest_entropy_steps(group.unmask_step, group.drawn, group.entropy, states=self.K, last_G=last_G)
            )
        yield self.meter.elements("masks", np.concatenate(ours), self.steps_RK, "eval_time_steps")

    def rewards(self, objective: Egspo, groups: list[TrajectoryGroup]) -> Iterator[Measurement]:
        """Of the fills, and of the completions."""
        ours_RK = np.concatenate([objective.fill_rewards(group) for group in groups])
        whole_R = self.rewards_RKF[:, self.K].sum(axis=1)
        recorded_RK = self.take("rewards_per_step", (self.R, self.K + 1))
        yield self.meter.elements("advantages", np.column_stack([ours_RK, whole_R]), recorded_RK, "rewards_per_step")

    def fills(self, policy: RecordedPolicy, groups: list[TrajectoryGroup]) -> Measurement:
        """The share of masked tokens of the ranked states that the weights of the rollout would fill otherwise."""
        views, recorded = [], []
        for index, group in enumerate(groups):
            assert group.branch_step is not None and group.branch_ids is not None
            for row, step in np.ndindex(group.branch_step.shape):
                hidden_C = group.unmask_step[row] >= group.branch_step[row, step]
                views.append(View(index, row, hidden_C, np.flatnonzero(hidden_C), 0.0, 1.0))
                recorded.append(group.branch_ids[row, step, 0, hidden_C])
        with torch.no_grad():
            law_NV = policy.scores(self.case.batch(views, groups), vocabulary=True).law_NV
        assert law_NV is not None
        share = float((law_NV.argmax(1).cpu().numpy() != np.concatenate(recorded)).mean())
        return self.meter.measured("likeliest fills", "x0_greedy" if share else "", share, share)

    def calls(self) -> list["_Call"]:
        ranks_N = self.case.arrays.take("call_rank_idx", (None,), "integers", within=(0, self.K - 1))
        return [_Call(self, number, int(rank)) for number, rank in enumerate(ranks_N)]


@dataclasses.dataclass(frozen=True)
class _Call:
    """A stored call of the loss."""

    record: _Record
    number: int
    rank: int

    def check(
        self,
        policy: RecordedPolicy,
        objective: Egspo,
        groups: list[TrajectoryGroup],
        credit_RK: np.ndarray,
        found: list[Measurement],
    ) -> torch.Tensor:
        """Its loss; what was compared goes to ``found``."""
        case, s = self.record.case, self.record.case.settings
        rows = range(self.record.R)
        views = [
            step_view(
                groups[row // s.G],
                row // s.G,
                row % s.G,
                int(self.record.steps_RK[row, self.rank]),
                float(credit_RK[row, self.rank]),
                1.0,
            )
            for row in rows
        ]
        batch = case.batch(views, groups)
        scores = self.scores(policy, objective, batch)
        if self.record.K == 1:  # the official code takes the policy for the old one
            batch = dataclasses.replace(batch, logp=scores.policy.logp_N.detach().cpu().numpy())
        terms = objective.terms(scores, batch)
        divisor = self.record.R * objective.per_step(groups[0])
        loss = objective.loss(scores, batch)[0] / divisor
        inputs_RL = self.recorded("state_inputs", self.record.R, s.P + s.C, integers=True)
        hidden = case.hidden("state_inputs", inputs_RL, rows)[1]
        found += [
            self.compare("masks", np.stack([view.hidden_C for view in views]), "state_inputs", hidden),
            self.compare("advantages", credit_RK[:, self.rank], "call_advantages"),
            self.compare("token log-probs", terms.logp_Z, "logp_new"),
            self.compare("ratios", terms.clipped.ratio_N, "ratio"),
            self.compare("row values", terms.clipped.loss_N, "row_loss"),
            self.compare("loss", loss, "losses"),
        ]
        if scores.reference is not None:
            reference_Z = objective.of_steps(scores.reference.logp_N, terms.steps)
            found.append(self.compare("token log-probs", reference_Z, "logp_ref_call"))
        if self.record.K > 1:
            old_Z = objective.of_steps(terms.steps.rollout_logp_N, terms.steps)
            found.append(self.compare("token log-probs", old_Z, "logp_old_call"))
        return loss

    def scores(self, policy: RecordedPolicy, objective: Egspo, batch: ViewBatch) -> PolicyScores:
        whole, reference = objective.needs.vocabulary, None
        if objective.needs.reference:
            reference = policy.reference(batch, vocabulary=whole)
        return PolicyScores(policy.scores(batch, vocabulary=whole), reference=reference)

    def compare(
        self, quantity: str, ours: np.ndarray | torch.Tensor, array: str, recorded: np.ndarray | None = None
    ) -> Measurement:
        """With the call's part of an array, or with what was made of it."""
        values = ours.detach().cpu().numpy() if isinstance(ours, torch.Tensor) else ours
        compare = self.record.meter.scaled if quantity in ("row values", "loss") else self.record.meter.elements
        recorded = self.recorded(array, *values.shape) if recorded is None else recorded
        return compare(quantity, values, np.asarray(recorded), f"{array}[{self.number}]")

    def recorded(self, name: str, *shape: int, integers: bool = False) -> np.ndarray:
        """The call's part of an array that has one for each call."""
        calls = len(self.record.case.arrays.take("losses", (None,)))
        return self.record.take(name, (calls, *shape), "integers" if integers else "numbers")[self.number]
