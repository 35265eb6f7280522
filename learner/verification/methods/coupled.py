"""Recorded cases of coupled-GRPO's official code, computed again with this code base.

The recorded masked inputs become units, and the recorded rate their weights; credit, log-probs, ratios, losses and
gradients come from the product. The official code's conventions stay on this side: it takes one token mean over a
micro-batch, and it reads token j at position j - 1, which ``model_outputs: raw`` leaves so and other cases undo.

Shapes: R rows, B rows and T tokens of a micro-batch, N scores of it in Z views, C completion positions.
"""

import dataclasses
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from learner.likelihood.masks import text_lengths
from learner.likelihood.scorer import PolicyScores, Scores
from learner.likelihood.views import Unit, ViewBatch
from learner.objectives.coupled_grpo import CoupledGrpo, batch_tokens, coupled_unit
from learner.settings.methods.one_step import CoupledGrpoConfig
from learner.verification.measurement import Measurement, Meter
from learner.verification.methods.case import Call, MethodCase, RecordedPolicy, compare_gradients, recorded_policy
from rewards.errors import DataError


class CoupledSettings(BaseModel):
    """Settings of a case, under the recorded names."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    mu: PositiveInt
    """Masks of the rollout; with one, the old log-probs are the new ones and weren't recorded."""
    beta: NonNegativeFloat
    eps: Annotated[float, Field(gt=0, le=1)]
    eps_high: PositiveFloat | None = None
    scale_rewards: bool
    model_outputs: Literal["raw"] | None = None


def check(case: MethodCase, meter: Meter) -> list[Measurement]:
    """Masks, weights, advantages, log-probs, ratios, losses and gradients of a case."""
    s, take, found, gradients = case.read(CoupledSettings), case.arrays.take, [], []
    objective = CoupledGrpo(
        CoupledGrpoConfig(
            clip_low=s.eps,
            clip_high=s.eps if s.eps_high is None else s.eps_high,
            beta=s.beta,
            scale_advantages=s.scale_rewards,
            average="token",
        )
    )
    R = len(case.completion_ids)
    groups = case.groups(take("rewards", (R,))[:, None])
    credit_R = np.concatenate(objective.credit(groups))
    lengths_R = np.concatenate([text_lengths(group, (case.settings.eos,)) for group in groups])
    text_RC = np.arange(case.settings.C) < lengths_R[:, None]
    found += [
        meter.elements("advantages", credit_R, take("advantages", (R,))),
        meter.elements("masks", text_RC, case.completion_mask, "completion_mask"),
    ]
    with recorded_policy(case, meter) as policy:
        if s.model_outputs == "raw":
            policy = dataclasses.replace(policy, family=dataclasses.replace(policy.family, logit_shift=1))
        for number, call in enumerate(case.calls()):
            recorded = _Call(case, s, meter, number, call, text_RC[call.rows])
            units = recorded.units(lengths_R, credit_R)
            batch = case.batch([view for unit in units for view in unit], groups, [len(unit) for unit in units])
            scores = _scores(policy, batch, call, reference=s.beta > 0)
            total, statistics = objective.loss(scores, batch)
            loss = total / int(lengths_R[call.rows].sum())
            rows = [
                objective.loss(_of_unit(scores, batch, u), case.batch(unit, groups, [len(unit)]))[0].item()
                for u, unit in enumerate(units)
            ]
            found += recorded.masks() + recorded.log_probs(scores, batch)
            found += recorded.losses(loss.item(), rows, statistics.values())
            gradients.append(policy.gradient(loss))
        return [*found, compare_gradients(policy, gradients, meter)]


@dataclasses.dataclass(frozen=True)
class _Call:
    """The record of one stored call of the loss."""

    case: MethodCase
    settings: CoupledSettings
    meter: Meter
    number: int
    call: Call
    text_BC: np.ndarray
    """[B, C] bool"""

    @property
    def hidden(self) -> tuple[np.ndarray, np.ndarray]:
        """What each of the three inputs masks: [3, B, P] of the prompt, [3, B, C] of the completion, bool."""
        width = self.case.settings.P + self.case.settings.C
        noised_3BL = self._take("noised_ids", 3, len(self.text_BC), width, integers=True)
        return self.case.hidden("noised_ids", noised_3BL, self.call.rows)

    @property
    def rate(self) -> float:
        rate = float(self._take("mask_ratio"))
        if not 0 < rate < 1:
            raise DataError(f"array mask_ratio has {rate:g}, which is no rate between 0 and 1")
        return rate

    def units(self, lengths_R: np.ndarray, credit_R: np.ndarray) -> list[Unit]:
        """[B], what the product makes of the recorded masks."""
        G, mask_BC = self.case.settings.G, self.hidden[1][1]
        return [
            coupled_unit(row // G, row % G, mask_C, self.rate, int(lengths_R[row]), float(credit_R[row]))
            for row, mask_C in zip(self.call.rows, mask_BC, strict=True)
        ]

    def masks(self) -> list[Measurement]:
        """The mask, its complement, and the clean prompt; the weights."""
        hidden_3BP, hidden_3BC = self.hidden
        mask_BC, t = hidden_3BC[1], self.rate
        ours_3BC = np.stack([np.ones_like(mask_BC), mask_BC, ~mask_BC])
        return [
            self._compare("masks", np.zeros_like(hidden_3BP), hidden_3BP, "noised_ids"),
            self._compare("masks", ours_3BC, hidden_3BC, "noised_ids"),
            self._compare("masks", mask_BC, self._take("mask_m", *mask_BC.shape), "mask_m"),
            self._compare("importance_weights", [1, 1 / t, 1 / (1 - t)], self._take("view_weights", 3), "view_weights"),
        ]

    def log_probs(self, scores: PolicyScores, batch: ViewBatch) -> list[Measurement]:
        """Of each view's scores, of the text's tokens under each set of weights; the ratios."""
        B, C = self.text_BC.shape
        tokens = batch_tokens(batch, scores.policy.logp_N)
        scored_3BC = self.hidden[1] & self.text_BC
        view_Z, row_Z = zip(*((v, b) for b in range(B) for v in range(3) if scored_3BC[v, b].any()), strict=True)
        at_N = (np.array(view_Z)[batch.view_of_score], np.array(row_Z)[batch.view_of_score], batch.position)
        new_T, old_T = (tokens.logp(s).detach().cpu().numpy() for s in (scores.policy, scores.old) if s)
        views_N = self._take("view_logps", 3, B, C)[at_N]
        new, ratio = (self._take(name, B, C)[self.text_BC] for name in ("new_logps", "ratio"))
        found = [
            self._compare("token log-probs", scores.policy.logp_N.detach().cpu().numpy(), views_N, "view_logps"),
            self._compare("token log-probs", new_T, new, "new_logps"),
            self._compare("ratios", np.exp(new_T - old_T), ratio, "ratio"),
        ]
        if self.settings.mu > 1:
            found.append(self._compare("token log-probs", old_T, self._of_rollout("old_logps"), "old_logps"))
        if scores.reference is not None:
            reference_T = tokens.logp(scores.reference).cpu().numpy()
            found.append(self._compare("token log-probs", reference_T, self._of_rollout("ref_logps"), "ref_logps"))
        return found

    def losses(self, loss: float, rows: list[float], figures: dict[str, float]) -> list[Measurement]:
        """The loss, its part of each row before the division by the tokens, clip fractions and KL."""
        scaled, name = self.meter.scaled, self._name
        found = [
            scaled("loss", loss, self._take("loss"), name("loss")),
            scaled(
                "row values",
                rows,
                self._take("row_loss_sum", len(rows)),
                name("row_loss_sum"),
                scale=self.text_BC.sum(),
            ),
            self._compare("clip fraction", figures["clip_fraction/low"], self._take("low_clip"), "low_clip"),
            self._compare("clip fraction", figures["clip_fraction/high"], self._take("high_clip"), "high_clip"),
        ]
        if self.settings.beta:
            found.append(scaled("ratios", figures["kl"], self._take("mean_kl"), name("mean_kl")))  # k3 is made of one
        return found

    def _of_rollout(self, name: str) -> np.ndarray:
        """[T], of the text's tokens, of an array that has one part for each mask of the rollout."""
        mu, masks = self.settings.mu, self.call.masks
        if masks >= mu:
            raise DataError(f"array call_iter has {masks}, which is none of mu = {mu} masks")
        whole = self.case.arrays.take(name, (mu, *self.case.completion_ids.shape))
        return whole[masks, self.call.rows][self.text_BC]

    def _take(self, name: str, *shape: int, integers: bool = False) -> np.ndarray:
        """The call's part of an array that has one for each call."""
        kind: Literal["integers", "numbers"] = "integers" if integers else "numbers"
        return self.case.arrays.take(name, (len(self.case.calls()), *shape), kind)[self.number]

    def _compare(self, quantity: str, ours: ArrayLike, recorded: np.ndarray, array: str) -> Measurement:
        return self.meter.elements(quantity, ours, recorded, self._name(array))

    def _name(self, array: str) -> str:
        return f"{array}[{self.number}]"


def _scores(policy: RecordedPolicy, batch: ViewBatch, call: Call, *, reference: bool) -> PolicyScores:
    """Under the weights of the rollout, without adapter if wanted, and under the call's, which stay in place."""
    policy.use("gen")
    with torch.no_grad():
        old = policy.scores(batch)
    without_adapter = policy.reference(batch) if reference else None
    policy.use(call.weights)
    return PolicyScores(policy.scores(batch), old, without_adapter)


def _of_unit(scores: PolicyScores, batch: ViewBatch, unit: int) -> PolicyScores:
    at_N = torch.from_numpy(batch.unit_of_score == unit).to(scores.policy.logp_N.device)

    def part(whole: Scores | None) -> Scores | None:
        return None if whole is None else Scores(whole.logp_N[at_N], whole.mass_N[at_N])

    policy = part(scores.policy)
    assert policy is not None
    return PolicyScores(policy, part(scores.old), part(scores.reference))
