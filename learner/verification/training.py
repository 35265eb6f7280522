"""Recorded training cases of the reference, computed again with this code base.

What is recorded as an input (weights, completions, unmasking order, kept tokens, rewards, uniforms) goes through the
product's functions: advantages, step table, draws, views, scorer, objective. Everything else that is recorded is
compared with what comes out. The reference's conventions stay on this side: its law can draw the mask token, its LM
head carries an adapter, its losses are divided by k G, its last Monte-Carlo sample weighs GA times the others.

Shapes: B rows, C completion positions, m steps, k draws, U tokens a step.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from peft import PeftModel

from learner.likelihood.scorer import PolicyScores, Scores, score
from learner.likelihood.timesteps import draw_timesteps, last_token_step, step_probabilities, step_table
from learner.likelihood.views import View, ViewBatch, build_batch, step_view
from learner.objectives.advantages import group_advantages
from learner.objectives.agrpo import Agrpo
from learner.settings.methods.states import AgrpoConfig
from learner.verification.cases import Case, TrainingSettings
from learner.verification.measurement import Measurement, Meter
from learner.verification.policy import check_laws, recorded_model
from rewards.errors import DataError
from rollout.adapters import adapter_parameters
from rollout.models.family import PolicyAdapter
from rollout.models.lora import LoraSpec, attach_lora


def check_training(case: Case, meter: Meter) -> list[Measurement]:
    """Draws, log-probs, losses and gradients of a training case."""
    s = case.settings
    assert isinstance(s, TrainingSettings)
    draws = _Draws(case)
    with recorded_model(case.weights, meter, mask=s.mask, eos=s.eos, pad=s.pad_id) as (base, family):
        model: torch.nn.Module = base
        if s.lora_r:
            spec = LoraSpec(s.lora_r, s.lora_alpha, include_head=True)
            model = attach_lora(base, family, spec).to(meter.device)
            case.arrays.fill("gen/", adapter_parameters(model))
        found = draws.measurements(meter) + check_laws(case, model, family, meter)
        batches = [build_batch(draws.views(draw), draws.groups, mask_id=s.mask, pad_id=s.pad_id) for draw in range(s.k)]
        references = _references(case, model, family, batches)
        trained = adapter_parameters(model) if s.lora_r else dict(model.named_parameters())
        if any(name.startswith("cur/") for name in case.arrays.by_name):
            case.arrays.fill("cur/", trained)
        return found + _check_losses(case, draws, model, family, batches, references, trained, meter)


class _Draws:
    """The draws of a training case, from the product's functions, and their record."""

    def __init__(self, case: Case) -> None:
        s = case.settings
        assert isinstance(s, TrainingSettings)
        self.case, self.settings, self.rollout = case, s, case.rollout
        if s.B % s.G:
            raise DataError(f"setting B = {s.B} is no multiple of G = {s.G}")
        rewards_BR = case.arrays.take("rewards_per_func", (s.B, None))
        self.u_Bk = case.arrays.take("u", (s.B, s.k), within=(0.0, 1.0))
        self.groups = case.rollout.groups()
        self.advantages_B = np.concatenate(
            [group_advantages(rewards_BR[start : start + s.G]) for start in range(0, s.B, s.G)]
        )
        self.tables = [step_table(group, "until_last_token", (s.eos,)) for group in self.groups]
        self.probabilities_Bm = np.concatenate([step_probabilities(t, s.importance_sampling) for t in self.tables])
        self.steps_Bk = np.zeros((s.B, s.k), np.int64)
        self.weights_Bk = np.zeros((s.B, s.k))
        for row, table in enumerate(self.tables):
            for draw in range(s.k):  # one at a time: the product merges repeated draws, the record lists them
                (drawn,) = draw_timesteps(table, self.u_Bk[row : row + 1, [draw]], s.importance_sampling)
                self.steps_Bk[row, draw], self.weights_Bk[row, draw] = drawn.steps[0], drawn.weights[0]

    def views(self, draw: int) -> list[View]:
        """[B], what Monte-Carlo sample ``draw`` scores."""
        columns = zip(self.steps_Bk[:, draw], self.advantages_B, self.weights_Bk[:, draw], strict=True)
        return [
            step_view(self.groups[row], row, 0, int(step), float(a), float(w))
            for row, (step, a, w) in enumerate(columns)
        ]

    def merged_views(self) -> list[View]:
        """The same draws as the product makes them: repeated ones once, with their summed weight."""
        views = []
        for row, table in enumerate(self.tables):
            (drawn,) = draw_timesteps(table, self.u_Bk[row : row + 1], self.settings.importance_sampling)
            a = float(self.advantages_B[row])
            views += [
                step_view(self.groups[row], row, 0, int(t), a, float(w))
                for t, w in zip(drawn.steps, drawn.weights, strict=True)
            ]
        return views

    def positions(self) -> np.ndarray:
        """[k, B, U], ascending: the positions revealed at the drawn steps."""
        at_kBC = self.rollout.unmask_steps == self.steps_Bk.T[:, :, None]
        return np.argsort(~at_kBC, axis=2, kind="stable")[:, :, : self.rollout.per_step]

    def measurements(self, meter: Meter) -> list[Measurement]:
        take, s, m = self.case.arrays.take, self.settings, self.rollout.sampler.steps
        last_B = np.concatenate([last_token_step(group, (s.eos,)) for group in self.groups])
        recorded = np.sort(take("mc_positions", (s.k, s.B, self.rollout.per_step), "integers"), axis=2)
        found = [
            meter.elements("advantages", self.advantages_B, take("advantages", (s.B,))),
            meter.elements("last_step", last_B[:, None], take("last_step", (s.B, 1), "integers")),
            meter.elements("mc_steps", self.steps_Bk, take("mc_steps", (s.B, s.k), "integers")),
            meter.elements("importance_weights", self.weights_Bk, take("importance_weights", (s.B, s.k))),
            meter.elements("mc_positions", self.positions(), recorded),
        ]
        if s.importance_sampling == "entropy":
            p_Bm = self.probabilities_Bm
            found += [
                meter.elements("step_probs", p_Bm, take("step_probs", (s.B, m))),
                meter.elements("step_cdf", p_Bm.cumsum(axis=1), take("step_cdf", (s.B, m))),
            ]
        return found


def _references(
    case: Case, model: torch.nn.Module, family: PolicyAdapter, batches: Sequence[ViewBatch]
) -> list[Scores | None]:
    """[k] scores without adapter, where the case has a KL term. Full-parameter cases hold the base until now."""
    s = case.settings
    assert isinstance(s, TrainingSettings)
    if not s.beta:
        return [None] * s.k
    bare = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
    with torch.no_grad(), bare:
        return [score(model, batch, family=family) for batch in batches]


def _check_losses(
    case: Case,
    draws: _Draws,
    model: torch.nn.Module,
    family: PolicyAdapter,
    batches: Sequence[ViewBatch],
    references: Sequence[Scores | None],
    trained: Mapping[str, torch.nn.Parameter],
    meter: Meter,
) -> list[Measurement]:
    s, take = case.settings, case.arrays.take
    assert isinstance(s, TrainingSettings)
    clip_high = s.eps if s.eps_high is None else s.eps_high
    agrpo = Agrpo(AgrpoConfig(k=s.k, clip_low=s.eps, clip_high=clip_high, beta=s.beta))
    shape_kBU = (s.k, s.B, case.rollout.per_step)
    figures: dict[str, list[float]] = {name: [] for name in ("loss", "low", "high", "kl", "norm")}
    new, old, ref = (np.full(shape_kBU, np.nan) for _ in range(3))
    passed_on = {name: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for name, p in trained.items()}
    plain = {name: torch.zeros_like(total) for name, total in passed_on.items()}
    for i, (batch, reference) in enumerate(zip(batches, references, strict=True)):
        policy = score(model, batch, family=family)
        total, statistics = agrpo.loss(PolicyScores(policy, reference=reference), batch)
        loss = total / (s.k * s.G)
        gradients = torch.autograd.grad(loss, list(trained.values()))
        quirk = 1.0 if i == s.k - 1 else 1.0 / s.GA
        for name, gradient in zip(trained, gradients, strict=True):
            plain[name] += gradient.float()
            passed_on[name] += gradient.float() * quirk
        named = statistics.values()
        figures["loss"].append(loss.item())
        figures["low"].append(named["clip_fraction/low"])
        figures["high"].append(named["clip_fraction/high"])
        figures["kl"].append(named.get("kl", 0.0))
        figures["norm"].append(float(torch.stack([g.norm() for g in passed_on.values()]).norm()))
        # A batch's scores run over rows, then positions: [B, U], as recorded.
        assert batch.logp is not None
        new[i], old[i] = policy.logp_N.detach().cpu().reshape(shape_kBU[1:]), batch.logp.reshape(shape_kBU[1:])
        if reference is not None:
            ref[i] = reference.logp_N.cpu().reshape(shape_kBU[1:])
    order = np.argsort(take("mc_positions", shape_kBU, "integers"), axis=2)

    def ascending(name: str) -> np.ndarray:
        return np.take_along_axis(take(name, shape_kBU), order, axis=2)

    quirks = np.array([1.0 / s.GA] * (s.k - 1) + [1.0])
    found = [
        meter.elements("old_logps_at_step", old, ascending("old_logps_at_step")),
        meter.elements("new_logps", new, ascending("new_logps")),
        meter.elements("low_clip", figures["low"], take("low_clip", (s.k,))),
        meter.elements("high_clip", figures["high"], take("high_clip", (s.k,))),
        meter.elements("loss_per_mc_sample", figures["loss"], take("loss_per_mc_sample", (s.k,))),
        meter.elements("loss_passed_to_backward", quirks * figures["loss"], take("loss_passed_to_backward", (s.k,))),
        meter.elements("cum_grad_norm", figures["norm"], take("cum_grad_norm", (s.k,))),
    ]
    if s.beta:
        found += [
            meter.elements("ref_logps", ref, ascending("ref_logps")),
            meter.elements("kls", figures["kl"], take("kls", (s.k,))),
        ]
    recorded = case.arrays.tensors("grad/", trained)
    tensors = tuple(
        meter.norms("gradient", passed_on[name].cpu().numpy(), recorded[name], f"grad/{name}") for name in trained
    )
    worst = max(tensors, key=lambda tensor: tensor.absolute if tensor.metric == "absolute" else tensor.relative)
    found.append(dataclasses.replace(worst, parts=tensors))
    found.append(
        meter.norms(
            "whole gradient", _flat(passed_on), np.concatenate([g.ravel() for g in recorded.values()]), "grad/*"
        )
    )
    if not s.beta:
        batch = build_batch(draws.merged_views(), draws.groups, mask_id=s.mask, pad_id=s.pad_id)
        total, _ = agrpo.loss(PolicyScores(score(model, batch, family=family)), batch)
        merged = torch.autograd.grad(total / (s.k * s.G), list(trained.values()))
        merged_by_name = dict(zip(trained, (g.float() for g in merged), strict=True))
        found.append(meter.norms("merged draws", _flat(merged_by_name), _flat(plain), "our own sum over draws"))
    return found


def _flat(tensors: Mapping[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([tensor.cpu().numpy().ravel() for tensor in tensors.values()])
