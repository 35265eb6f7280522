"""Recorded cases of SPG's official code, computed again with this code base.

The recorded masked inputs become units; credit, weights, log-probs, both bounds, what is chosen of them, losses and
gradients come from the product. The official code's loss is over the tokens of a micro-batch.

Shapes: R rows, B rows of a micro-batch, K views of each, P prompt tokens, C completion positions, N scores.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from learner.likelihood.masks import text_lengths
from learner.likelihood.scorer import PolicyScores, Scores
from learner.likelihood.views import Unit, ViewBatch
from learner.objectives.spg import Mask, Spg, bound_unit, bounds
from learner.settings.methods.bounds import SpgConfig
from learner.settings.sections import Fraction
from learner.verification.measurement import Measurement, Meter
from learner.verification.methods.case import Call, MethodCase, compare_gradients, recorded_policy
from rewards.errors import DataError
from rollout.trajectory import TrajectoryGroup

NEGATIVE: Mapping[str, Literal["mixture", "eubo", "elbo", "zero"]] = {
    "mix": "mixture",
    "eubo": "eubo",
    "elbo": "elbo",
    "zero": "zero",
}


class SpgSettings(BaseModel):
    """Settings of a case, under the recorded names."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    logp_estimation: Literal["mix", "eubo", "elbo", "zero"]
    forward_type: Literal["block_random", "block_all", "random", "all"]
    num_t: PositiveInt
    BL: PositiveInt
    mix_weight: Fraction = 0.5
    eubo_beta: float = Field(default=1.5, ge=1)


def check(case: MethodCase, meter: Meter) -> list[Measurement]:
    """Masks, weights, advantages, log-probs, bounds, losses and gradients of a case."""
    s, take, gradients = case.read(SpgSettings), case.arrays.take, []
    objective = Spg(
        SpgConfig(
            samples=s.num_t,
            masking=s.forward_type,
            negative=NEGATIVE[s.logp_estimation],
            eubo_beta=s.eubo_beta,
            mixture_weight=s.mix_weight,
        )
    )
    R = len(case.completion_ids)
    groups = case.groups(take("rewards", (R,))[:, None])
    credit_R = np.concatenate(objective.credit(groups))
    lengths_R = np.concatenate([text_lengths(group, (case.settings.eos,)) for group in groups])
    text_RC = np.arange(case.settings.C) < lengths_R[:, None]
    found = [
        meter.elements("advantages", credit_R, take("advantages", (R,))),
        meter.elements("masks", text_RC, case.completion_mask, "completion_mask"),
    ]
    with recorded_policy(case, meter) as policy:
        for number, call in enumerate(case.calls()):
            recorded = _Call(case, s, meter, number, call, lengths_R[call.rows])
            units = recorded.units(credit_R[call.rows])
            batch = recorded.batch(units, groups)
            policy.use(call.weights)
            scores = policy.scores(batch)
            loss = objective.loss(PolicyScores(scores), batch)[0] / int(recorded.lengths_B.sum())
            found += recorded.masks(units) + recorded.log_probs(scores, batch)
            found += recorded.values(objective, scores.detached(), batch, loss.item())
            gradients.append(policy.gradient(loss))
        return [*found, compare_gradients(policy, gradients, meter)]


@dataclass(frozen=True)
class _Call:
    """The record of one stored call of the loss."""

    case: MethodCase
    settings: SpgSettings
    meter: Meter
    number: int
    call: Call
    lengths_B: np.ndarray
    """[B] int64, tokens of each text."""

    @property
    def upper(self) -> bool:
        """Whether what belongs to the upper bound was recorded."""
        return self.settings.logp_estimation in ("mix", "eubo")

    @property
    def hidden(self) -> tuple[np.ndarray, np.ndarray]:
        """What each input masks: [K, B, P] of the prompt, [K, B, C] of the completion, bool."""
        width = self.case.settings.P + self.case.settings.C
        noised_KBL = self._take("noised_ids", self.settings.num_t, width, integers=True).swapaxes(0, 1)
        return self.case.hidden("noised_ids", noised_KBL, self.call.rows)

    @property
    def scored(self) -> np.ndarray:
        """[B, K, C] bool, what is masked of the texts."""
        C = self.case.settings.C
        scored_BKC = self.hidden[1].swapaxes(0, 1) & (np.arange(C) < self.lengths_B[:, None])[:, None]
        if not scored_BKC.any(axis=2).all():
            raise DataError("array noised_ids has an input that masks nothing of its text")
        return scored_BKC

    def units(self, credit_B: np.ndarray) -> list[Unit]:
        """[B], what the product makes of the recorded masks; rows without credit too."""
        assert self.scored.any()  # raises for a mask that hides nothing of its text
        G, (hidden_KBP, hidden_KBC) = self.case.settings.G, self.hidden
        return [
            bound_unit(
                row // G,
                row % G,
                [Mask(*mask) for mask in zip(hidden_KBP[:, b], hidden_KBC[:, b], strict=True)],
                int(self.lengths_B[b]),
                float(credit_B[b]),
            )
            for b, row in enumerate(self.call.rows)
        ]

    def batch(self, units: list[Unit], groups: list[TrajectoryGroup]) -> ViewBatch:
        return self.case.batch([view for unit in units for view in unit], groups, [len(unit) for unit in units])

    def masks(self, units: list[Unit]) -> list[Measurement]:
        """How many tokens are masked, the weight of each view, and what must be masked: all behind the text, and behind
        the drawn block."""
        K, C = self.settings.num_t, self.case.settings.C
        hidden_BKC = self.hidden[1].swapaxes(0, 1)
        behind_BK = np.repeat(self.lengths_B[:, None], K, axis=1)
        counts = [[view.scored_n.size for view in unit] for unit in units]
        shares = [[1 / view.weight for view in unit] for unit in units]
        found = [self._compare("masks", counts, self._take("n_masked", K), "n_masked")]
        if self.upper:
            found.append(self._compare("importance_weights", shares, self._take("empirical_t", K), "empirical_t"))
        if self.settings.forward_type in ("block_random", "block_all"):
            block_BK, size = self._take("block_idx", K, integers=True), self.settings.BL
            inside_BKC = np.arange(C) // size == block_BK[:, :, None]
            in_block = (self.scored & inside_BKC).sum(axis=2)
            found.append(self._compare("masks", in_block, self._take("block_count", K), "block_count"))
            behind_BK = np.minimum(behind_BK, (block_BK + 1) * size)
        whole_BKC = hidden_BKC | (np.arange(C) >= behind_BK[:, :, None])
        return [*found, self._compare("masks", whole_BKC, hidden_BKC, "noised_ids")]

    def log_probs(self, scores: Scores, batch: ViewBatch) -> list[Measurement]:
        """Of every scored token in every view."""
        recorded_N = self._take("token_logps", self.settings.num_t, self.case.settings.C)[self.scored]
        return [self._compare("token log-probs", scores.logp_N.detach().cpu().numpy(), recorded_N, "token_logps")]

    def values(self, objective: Spg, scores: Scores, batch: ViewBatch, loss: float) -> list[Measurement]:
        """The bounds of each row, what stands for its likelihood, what would if it were lowered, and the loss."""
        elbo_U, eubo_U = bounds(scores.logp_N, batch, beta=objective.config.eubo_beta)
        credit_U = torch.tensor([view.credit for view in batch.first_views], device=elbo_U.device)
        ours = {
            "elbo": elbo_U,
            "ell": objective.likelihood(elbo_U, eubo_U, credit_U),
            "negative_value": objective.likelihood(elbo_U, eubo_U, -credit_U.abs()),
        }
        if self.upper:
            ours["eubo"] = eubo_U
        return [
            *(self._compare("row values", value.cpu().numpy(), self._take(name), name) for name, value in ours.items()),
            self._compare("loss", loss, self._take("loss", per_row=False), "loss"),
        ]

    def _take(self, name: str, *shape: int, integers: bool = False, per_row: bool = True) -> np.ndarray:
        """The call's part of an array that has one for each call."""
        kind: Literal["integers", "numbers"] = "integers" if integers else "numbers"
        rows = (len(self.call.rows),) if per_row else ()
        return self.case.arrays.take(name, (len(self.case.calls()), *rows, *shape), kind)[self.number]

    def _compare(self, quantity: str, ours: object, recorded: np.ndarray, array: str) -> Measurement:
        compare = self.meter.scaled if quantity in ("loss", "row values") else self.meter.elements
        return compare(quantity, np.asarray(ours), np.asarray(recorded), f"{array}[{self.number}]")
