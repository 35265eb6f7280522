"""Recorded cases of TraceRL's official code for models that attend to the whole sequence, computed again with this code
base. All weights were trained.

The recorded steps become a rollout's, from which the product makes the views; log-probs, losses and gradients of each
micro-batch of views come from the product too. Advantages and old log-probs are inputs: the weights that the old ones
are of weren't recorded.

Shapes: R completions, P prompt tokens, C completion positions, L = P + C, N views, B views of a micro-batch.
"""

import dataclasses
from functools import cached_property

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveInt

from learner.likelihood.scorer import PolicyScores, Scores
from learner.likelihood.views import View, ViewBatch
from learner.objectives.trace_rl import TraceRl
from learner.settings.methods.states import TraceRlConfig
from learner.settings.objective import ClipLow
from learner.verification.cases import Arrays
from learner.verification.measurement import Measurement, Meter
from learner.verification.methods.case import MethodCase, RecordedPolicy, compare_gradients
from learner.verification.policy import recorded_model
from rewards.errors import DataError
from rollout.trajectory import TrajectoryGroup


class TraceRlSettings(BaseModel):
    """Settings of a case, under the recorded names."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    shrink: PositiveInt
    post_num: NonNegativeInt | None
    batch_size_lm: PositiveInt
    beta: NonNegativeFloat
    use_kl_estimator_k3: bool
    eps: ClipLow


def check(case: MethodCase, meter: Meter) -> list[Measurement]:
    """Masks, advantages, log-probs, losses and gradients of a case."""
    s = case.read(TraceRlSettings)
    objective = TraceRl(
        TraceRlConfig(
            shrink=s.shrink,
            eos_scored=s.post_num,
            clip_low=s.eps,
            clip_high=s.eps,
            beta=s.beta,
            kl="k3" if s.use_kl_estimator_k3 else "k1",
        )
    )
    record = _Record(_by_row(case), objective)
    found = record.masks(meter)
    with recorded_model(case.weights, meter, mask=record.mask, eos=record.eos, pad=case.settings.pad_id) as built:
        model, family = built
        weights = dict(model.named_parameters())
        policy = RecordedPolicy(case, model, family, weights)
        gradient = {name: np.zeros(tuple(p.shape), np.float32) for name, p in weights.items()}
        starts = range(0, len(record.views), s.batch_size_lm)
        losses = case.arrays.take("loss_per_micro_batch", (len(starts),))
        for number, first in enumerate(starts):
            views = record.views[first : first + s.batch_size_lm]
            batch = record.case.batch(views, record.groups)
            scores = policy.scores(batch)
            old_N, new_N = (record.of_scores(name, batch, first) for name in ("old_logps", "new_logps"))
            old = Scores(torch.from_numpy(old_N).to(scores.logp_N), scores.mass_N)
            loss = objective.loss(PolicyScores(scores, old), batch)[0] / len(views)
            ours_N = scores.logp_N.detach().cpu().numpy()
            found += [
                meter.elements("token log-probs", ours_N, new_N, f"new_logps[{first}:]"),
                meter.scaled("loss", loss.item(), losses[number], f"loss_per_micro_batch[{number}]"),
            ]
            for name, part in policy.gradient(loss).items():
                gradient[name] += part
        recorded = {name: p for name, p in weights.items() if f"grad/{name}" in case.arrays.by_name}
        found.append(_norms(case, gradient, meter))
        return [*found, compare_gradients(dataclasses.replace(policy, parameters=recorded), [gradient], meter)]


def _by_row(case: MethodCase) -> MethodCase:
    """The case with prompts and completions apart."""
    P, C = case.settings.P, case.settings.C
    ids_RL = case.arrays.take("input_ids", (None, P + C), "integers")
    texts = {"prompt_ids": ids_RL[:, :P], "completion_ids": ids_RL[:, P:]}
    return dataclasses.replace(case, arrays=Arrays({**case.arrays.by_name, **texts}))


def _norms(case: MethodCase, gradient: dict[str, np.ndarray], meter: Meter) -> Measurement:
    """Of the gradients of all weights, those that weren't recorded too."""
    if "grad_names" not in case.arrays.by_name:
        raise DataError("array grad_names is missing")
    names = [str(name) for name in case.arrays.by_name["grad_names"]]
    if set(names) != gradient.keys():
        raise DataError("array grad_names names other weights than the model's")
    norms = case.arrays.take("grad_norms", (len(names),))
    ours = [float(np.linalg.norm(gradient[name])) for name in names]
    return meter.scaled("gradient of the loss", ours, norms, "grad_norms", scale=max(1.0, float(norms.max())))


@dataclasses.dataclass(frozen=True)
class _Record:
    """A case as rollouts, each completion a group of its own, since prompts differ."""

    case: MethodCase
    objective: TraceRl

    @property
    def mask(self) -> int:
        return self.case.settings.mask

    @property
    def eos(self) -> int:
        return self.case.settings.eos

    @cached_property
    def groups(self) -> list[TrajectoryGroup]:
        R, C = self.case.completion_ids.shape
        step_RC = self.case.arrays.take("step_map", (R, C), "integers", within=(0, np.inf))
        return [
            dataclasses.replace(
                group,
                unmask_step=step_RC[[row]].astype(np.int16),
                sampler=dataclasses.replace(group.sampler, steps=int(step_RC.max()) + 1),
            )
            for row, group in enumerate(self.case.groups(np.zeros((R, 1))))
        ]

    @cached_property
    def views(self) -> list[View]:
        """[N], by completion, then by step."""
        advantages_R = self.case.arrays.take("advantages", (len(self.groups),))
        views = [
            view
            for row, group in enumerate(self.groups)
            for view in self.objective.views(row, group, advantages_R[[row]], (self.eos,))[0]
        ]
        recorded = len(self.case.arrays.take("ex_advantages", (None,)))
        if len(views) != recorded:
            raise DataError(f"array ex_advantages has {recorded} entries, the completions have {len(views)} views")
        return views

    def masks(self, meter: Meter) -> list[Measurement]:
        """What the views mask, which positions they score, and their advantages."""
        N, P, C = len(self.views), self.case.settings.P, self.case.settings.C
        inputs_NL = self.case.arrays.take("ex_input_ids", (N, P + C), "integers")
        hidden_NP, hidden_NC = self.case.hidden("ex_input_ids", inputs_NL, [view.group for view in self.views])
        scored_NL = np.zeros((N, P + C), bool)
        for z, view in enumerate(self.views):
            scored_NL[z, P + view.scored_n] = True
        recorded_NL = self.case.arrays.take("ex_p_mask", (N, P + C), "integers").astype(bool)
        advantages_N = self.case.arrays.take("ex_advantages", (N,))
        ours_NC = np.array([view.hidden_C for view in self.views])
        return [
            meter.elements("masks", ours_NC, hidden_NC, "ex_input_ids"),
            meter.elements("masks", np.zeros_like(hidden_NP), hidden_NP, "ex_input_ids"),
            meter.elements("masks", scored_NL, recorded_NL, "ex_p_mask"),
            meter.elements("advantages", [view.credit for view in self.views], advantages_N, "ex_advantages"),
        ]

    def of_scores(self, name: str, batch: ViewBatch, first: int) -> np.ndarray:
        """What is recorded of a batch's tokens; the batch's views begin at ``first``."""
        P, C = self.case.settings.P, self.case.settings.C
        whole_NL = self.case.arrays.take(name, (len(self.views), P + C))
        return whole_NL[first + batch.view_of_score, P + batch.position]
