"""How many tokens rounding alone would clip, of weights that were never updated: with logits in fp32, as they are, and
in bfloat16, as they would be without ``rollout.models.head``.

The engine draws and the learner scores the same tokens in batches of other shapes. The weights are random, and the
head's are multiplied so that the largest logit is that of a trained model.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from learner.bench import llada_8b as bench
from learner.bench.compare import forward_loss, planned_update
from learner.bench.first_minutes.figures import Figure
from learner.bench.first_minutes.speed import ENGINE, fitting
from learner.bench.policy import BenchEngine, Shape, build_policy, generate, prompt_ids
from learner.objectives.statistics import Statistics
from rollout.models.family import PolicyAdapter
from rollout.models.head import Head

PEAK_LOGIT = 25.0
"""Assumed of trained models, at tokens that they are sure of; spacing of bfloat16 there: 0.125."""
EXPECTED = {"fp32": 0.0, "bfloat16": 0.1}
"""Share beyond a clip of 0.2, from synthetic logits with an assumed error of 0.01 before the head."""


def measure(*, small: bool) -> list[Figure]:
    whole, _, note = fitting(bench.SMALL if small else ENGINE, bench.engine_case, small=small)
    shape = dataclasses.replace(whole, views_per_forward=whole.rows // 4)
    model, family = build_policy(shape, device="cpu" if small else "cuda", dtype=torch.bfloat16)
    head = next(module for module in model.modules() if isinstance(module, Head))
    sharpen(model, head, shape)
    figures = []
    for logits, rounded in (("fp32", contextlib.nullcontext()), ("bfloat16", rounded_logits(head))):
        with rounded:
            found = not_updated(model, family, shape)
        figures += [
            Figure(f"share beyond the clip, logits {logits}", found["ratio/beyond_clip"], EXPECTED[logits], note),
            Figure(f"rms |log ratio|, logits {logits}", found["log_ratio/rms"]),
            Figure(f"largest |log ratio|, logits {logits}", found["log_ratio/abs_max"]),
        ]
    return [*figures, Figure("tokens", int(found["scored_tokens"]), note=f"peak logit {PEAK_LOGIT:g}")]


def sharpen(model: torch.nn.Module, head: Head, shape: Shape) -> None:
    """Multiply the head's weights so that the largest logit after the prompt is ``PEAK_LOGIT``."""
    ids = torch.from_numpy(prompt_ids(shape)).long().to(head.weight.device)[None]
    last = torch.tensor([ids.numel() - 1], device=ids.device)
    with torch.no_grad():
        head.weight.mul_(PEAK_LOGIT / float(model(input_ids=ids, logit_rows=last).logits.max()))


@contextlib.contextmanager
def rounded_logits(head: Head) -> Iterator[None]:
    """The head as an ordinary map, whose logits have the model's dtype."""
    head.forward = partial(F.linear, weight=head.weight, bias=head.bias)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.forward


def not_updated(model: torch.nn.Module, family: PolicyAdapter, shape: Shape) -> dict[str, float]:
    """AGRPO's figures of a group of these very weights, all its steps scored."""
    group = generate(BenchEngine(model, family, max_rows=shape.rows), shape)
    objective, plan = planned_update(family, group, shape, shape.steps)
    with torch.no_grad():
        found = [forward_loss(model, family, objective, forward, group) for forward in plan.forwards[0]]
    return Statistics.merged(statistics for *_, statistics in found).values()
