"""DiFFPO's sampler: the thresholds' expected gradient by enumeration, their clip, their states, and the settings."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from learner.likelihood.scorer import PolicyScores, Scores
from learner.objectives.base import UpdateContext
from learner.objectives.diffpo import Diffpo
from learner.settings.methods.states import DiffpoConfig
from learner.settings.run import load_config
from rewards.errors import ConfigError
from tests.support.one_step_tables import EOS, build
from tests.support.state_tables import state_logp, state_table, walked_group

THRESHOLDS = (0.25, 0.5, 0.75)
CONTEXT = UpdateContext(3, 0, groups=1, eos_ids=(EOS,))
LEARNING = ["objective.type=diffpo", "objective.threshold_lr=1e-3", "rollout.sampler.threshold=[0.5,0.9]"]
LEARNS = DiffpoConfig(beta=0, threshold_lr=1e-3, clip_low=0.2, clip_high=0.3)


def group_of(chosen, rewards, old_law, *, nfe=None):
    """Completions that drew these thresholds."""
    texts = [[2, 3, 4, 5]] * len(chosen)
    group = walked_group(texts, [[2, 0, 3, 1]] * len(chosen), rewards=list(rewards))
    return dataclasses.replace(
        group,
        sampler=dataclasses.replace(group.sampler, threshold=THRESHOLDS),
        threshold=np.float32(THRESHOLDS)[list(chosen)],
        threshold_logp=np.asarray(old_law)[list(chosen)].astype(np.float64),
        nfe=group.nfe if nfe is None else np.asarray(nfe, np.int32),
    )


def head_slope(group, chosen, logits_K: torch.Tensor, config=LEARNS):
    """The gradient of an update's loss by the law's logits, and its figures."""
    objective = Diffpo(config)
    wanted = objective.wanted(0, group, objective.credit([group])[0], CONTEXT)
    if not wanted.units:
        return np.zeros(3), {}
    batch = build(wanted.units, [group])
    logp_N = state_logp(state_table(gradient=False), batch)
    value_Z = logits_K.log_softmax(-1)[[chosen[view.row] for view in batch.views]]
    scores = Scores(logp_N, torch.ones_like(logp_N), value_Z=value_Z)
    loss, figures = objective.loss(PolicyScores(scores, scores.detached()), batch)
    return torch.autograd.grad(loss / wanted.divisor, logits_K)[0].numpy(), figures.values()


@pytest.mark.parametrize("size", [2, 3])
def test_the_expected_gradient_is_that_of_the_expected_reward(size):
    """All draws of three thresholds in a group: (G-1)/G times the gradient of sum over k of pi_k r_k."""
    logits = torch.tensor([0.3, -0.4, 0.8], dtype=torch.float64, requires_grad=True)
    law, rewards = logits.detach().log_softmax(-1).numpy(), np.array([0.5, 2.0, -1.0])
    exact = torch.autograd.grad((logits.softmax(-1) * torch.from_numpy(rewards)).sum(), logits)[0].numpy()
    found, wrong = np.zeros(3), np.zeros(3)
    for chosen in itertools.product(range(3), repeat=size):
        group = group_of(chosen, rewards[list(chosen)], law)
        chance = np.exp(law[list(chosen)].sum())
        found += chance * head_slope(group, chosen, logits)[0]
        swapped = [(k + 1) % 3 for k in chosen]
        mistaken = group_of(swapped, rewards[list(chosen)], law)
        wrong += chance * head_slope(mistaken, swapped, logits)[0]
    np.testing.assert_allclose(found, -(size - 1) / size * exact, atol=1e-7)
    assert np.linalg.norm(wrong + (size - 1) / size * exact) > 0.1, "control: credit of another draw"


def test_off_the_law_that_drew_the_ratio_is_clipped():
    logits = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    chosen, rewards, old = (0, 1, 2), np.array([1.0, -1.0, 0.0]), np.log([0.2, 0.5, 0.3])
    slope, figures = head_slope(group_of(chosen, rewards, old), chosen, logits)
    # Ratios are 0.665 / 0.2, 0.245 / 0.5 and 0.09 / 0.3: the first, with A > 0, and the second, with A < 0, are cut.
    np.testing.assert_allclose(slope, 0, atol=1e-12)
    assert figures["threshold/clip_fraction/high"] == figures["threshold/clip_fraction/low"] == pytest.approx(1 / 2)
    assert figures["scored_thresholds"] == 2, "the third has the mean reward"
    turned, _ = head_slope(group_of(chosen, -rewards, old), chosen, logits)
    law = logits.log_softmax(-1)
    by_hand = -(-(law[0] - old[0]).exp() + (law[1] - old[1]).exp()) / 3
    np.testing.assert_allclose(turned, torch.autograd.grad(by_hand, logits)[0].numpy(), rtol=1e-6)


def test_a_completions_boundary_is_among_its_own_steps():
    group = group_of((0,) * 4, range(4), np.log([1 / 3] * 3), nfe=[1, 2, 3, 4])
    many = [Diffpo(LEARNS).draw(group, UpdateContext(3, number, 1, (EOS,))) for number in range(200)]
    assert [sorted(set(column)) for column in np.transpose(many)] == [[1], [1], [1, 2], [1, 2, 3]]
    one_step = dataclasses.replace(group, unmask_step=np.zeros_like(group.unmask_step), nfe=np.ones(4, np.int32))
    units = Diffpo(LEARNS).wanted(0, one_step, np.ones(4), CONTEXT).units
    assert [[view.scored_n.tolist() for view in unit] for unit in units] == [[[0, 1, 2, 3]]] * 4


def test_both_views_of_a_completion_meet_so_that_its_threshold_counts_once():
    group = group_of((0, 1, 2), [0, 1, 2], np.log([1 / 3] * 3))
    for config, sizes in ((LEARNS, {2}), (DiffpoConfig(beta=0), {1})):
        units = Diffpo(config).wanted(0, group, np.ones(3), CONTEXT).units
        assert {len(unit) for unit in units} == sizes
    head = Diffpo(LEARNS).needs.head
    assert head is not None and (head.of, head.lr, head.width) == ("thresholds", 1e-3, 64)
    assert Diffpo(DiffpoConfig()).needs.head is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["objective.type=diffpo", "rollout.sampler.threshold=[0.5,0.9]"], "nobody learns here"),
        (["objective.type=wd1", "rollout.sampler.threshold=[0.5,0.9]"], "nobody learns here"),
        (["objective.type=agrpo", "rollout.sampler.threshold=[0.5,0.9]"], "nobody learns here"),
        (["objective.type=dispo", "rollout.sampler.threshold=[0.5,0.9]"], "nobody learns here"),
        (["objective.type=diffpo", "objective.threshold_lr=1e-3"], "learns which of several thresholds"),
        (["objective.type=diffpo", "objective.threshold_lr=1e-3", "rollout.sampler.threshold=0.5"], "which of several"),
        ([*LEARNING, "rollout.engine=vllm"], "which rollout.engine=vllm keeps to itself"),
        (
            [*LEARNING, "rollout.sampler.threshold=[0.5]"],
            r"^\S*threshold=\[0.5\] must be a number or a list of at least 2",
        ),
        (
            [*LEARNING, "rollout.sampler.threshold=[0.5,2]"],
            r"rollout.sampler.threshold.1=2 must be a number of at most 1",
        ),
        ([*LEARNING, "rollout.sampler.threshold=[0.9,0.5,0.9]"], "has a threshold twice"),
        ([*LEARNING, "rollout.sampler.threshold=[0.5,0.500000001]"], "has a threshold twice"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        load_config(arguments)


def test_several_thresholds_and_speed_go_together():
    several = ["rollout.sampler.threshold=[0.5,0.7,0.9]", "reward.speed_weight=0.1"]
    config = load_config(["objective.type=diffpo", "objective.threshold_lr=1e-3", *several])
    sampler = config.rollout.sampler.spec()
    assert sampler.threshold == (0.5, 0.7, 0.9) and sampler.most_steps == sampler.completion_length
    assert sampler.greedy(steps=4, position_rule="low_confidence").threshold is None
    assert load_config(["objective.type=diffpo", "rollout.sampler.threshold=0.9"]).rollout.sampler.threshold == 0.9
