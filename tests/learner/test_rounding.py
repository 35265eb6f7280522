"""What rounding makes of weights that were never updated: how often the clip takes it for an update, and how little of
it is left since logits are in fp32.

Shapes: N tokens, D model width.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
import torch

from learner.bench import llada_8b
from learner.bench.first_minutes.rounding import not_updated, rounded_logits
from learner.bench.policy import build_policy, prompt_ids
from learner.control.controller import unupdated_metrics
from learner.objectives.ratio import clipped_terms, ratio_statistics
from learner.objectives.statistics import Statistics
from rollout.models.head import Head

SHAPE = dataclasses.replace(
    llada_8b.SMALL, vocabulary=200, d_model=64, mlp=128, rows=16, views_per_forward=7, temperature=0.3, top_k=50
)
"""At this temperature a step of 0.125 of one logit, by which bfloat16 rounds from 16 to 32, is 0.42 nats. The clip is
at log(1.2) = 0.18 and log(0.8) = -0.22."""


def figures(ratios: list[float]) -> Statistics:
    terms = clipped_terms(torch.tensor(ratios).log(), torch.ones(len(ratios)), clip=(0.2, 0.3))
    return ratio_statistics(terms.log_ratio_N, terms.averages, count="scored_tokens")


def test_the_share_beyond_the_clip_is_of_all_tokens_of_the_update() -> None:
    """Of both sides, whatever the advantage, and not a mean of the forwards' shares."""
    forwards = [figures([1.0, 0.79, 1.31, 1.29]), figures([0.81, 1.0, 1.0, 1.0, 0.5, 1.0])]
    found = unupdated_metrics(Statistics.merged(forwards))
    assert found["ratio/unupdated_beyond_clip"] == pytest.approx(3 / 10)
    assert found["log_ratio/unupdated_abs_max"] == pytest.approx(0.6931, abs=1e-4)
    assert unupdated_metrics(figures([1.0, 1.0]))["ratio/unupdated_beyond_clip"] == 0.0
    assert unupdated_metrics(Statistics()) == {"log_ratio/unupdated_abs_max": 0.0}, "a method without a ratio"


@contextlib.contextmanager
def rounded_before(head: Head) -> Iterator[None]:
    """A quarter of the hidden numbers that the head reads is moved to either neighbour in bfloat16, in each forward
    anew, as kernels for other shapes would move some. On a CPU rows are computed alike whatever is beside them."""
    generator = torch.Generator().manual_seed(0)

    def moved(module: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        (x_ND,) = args
        which_ND = torch.randint(8, x_ND.shape, generator=generator)
        step_ND = (which_ND == 0).int() - (which_ND == 1).int()
        return (x_ND * (1 + step_ND / 128).to(x_ND.dtype),)

    hook = head.register_forward_pre_hook(moved)
    try:
        yield
    finally:
        hook.remove()


def as_large_as_trained(model: torch.nn.Module, head: Head) -> torch.Tensor:
    """Give the head logits around 22, 0.5 apart from each other, as those of a trained model are among the tokens that
    are in question. Returns some of them."""
    ids = torch.from_numpy(prompt_ids(SHAPE)).long()[None]
    seen: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    rows = torch.arange(SHAPE.prompt)
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, logit_rows=rows).logits
        hook.remove()
        mean_D = seen[0].float().mean(0)
        head.weight.copy_(head.weight.float() / (2 * logits.std()) + 22 * mean_D / (mean_D @ mean_D))
        logits = model(input_ids=ids, logit_rows=rows).logits
    return logits


def test_a_bfloat16_model_is_clipped_by_its_rounding_unless_its_logits_are_in_fp32() -> None:
    model, family = build_policy(SHAPE, dtype=torch.bfloat16)
    head = next(module for module in model.modules() if isinstance(module, Head))
    logits = as_large_as_trained(model, head)
    assert logits.dtype is torch.float32 and 16 < logits.quantile(0.05) < logits.max() < 32
    with rounded_before(head):
        ours = not_updated(model, family, SHAPE)
        with rounded_logits(head):
            rounded = not_updated(model, family, SHAPE)
    print({name: (ours[name], rounded[name]) for name in ours if "ratio" in name})
    assert ours["scored_tokens"] == rounded["scored_tokens"] > 200
    assert 0 < ours["log_ratio/rms"] < rounded["log_ratio/rms"] / 4
    assert ours["ratio/beyond_clip"] == 0 and rounded["ratio/beyond_clip"] > 0, "control: logits in bfloat16"
