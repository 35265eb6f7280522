"""The rewards that methods see: parts as they are, or normalised each; and tokens per forward as one of them."""

import dataclasses

import numpy as np
import pytest

from learner.objectives import make_objective
from learner.objectives.rewards import seen_rewards
from learner.settings.run import load_config
from learner.settings.sections import RewardSection
from rewards.errors import ConfigError, DataError
from rollout.trajectory import DIVERSITY, SPEED, SamplerSpec
from tests.support.hand_made import make_group
from tests.support.learner_ranks import draw_batch, importing_ray, probed_groups, put, random_adapter, settings

COMPONENTS = RewardSection(normalise="components", speed_weight=0.5)
REWARDS = np.array([[0.0, 2.0, 7.0], [1.0, 4.0, 7.0], [0.0, 9.0, 7.0], [1.0, 3.0, 7.0]])


def group_of(rewards=REWARDS, names=("right", SPEED, "same")):
    ids = np.random.default_rng(0).integers(1, 9, (len(rewards), 4))
    return make_group(ids, np.zeros_like(ids), steps=1, rewards=rewards, reward_names=names)


def test_totals_are_as_they_were_given():
    group = group_of()
    assert seen_rewards(group, RewardSection()) is group
    assert seen_rewards(group, RewardSection(speed_weight=2.0)) is group, "a part comes with its weight in it"


def test_each_part_has_mean_0_and_deviation_1_times_its_weight_and_a_constant_one_counts_nothing():
    seen = seen_rewards(group_of(), COMPONENTS)
    np.testing.assert_allclose(seen.rewards.mean(axis=0), 0, atol=1e-7)
    np.testing.assert_allclose(seen.rewards.std(axis=0), [1, 0.5, 0], rtol=1e-6)
    assert (seen.rewards[:, 2] == 0).all()
    without = seen_rewards(group_of(REWARDS[:, :2], ("right", SPEED)), COMPONENTS)
    np.testing.assert_array_equal(seen.rewards[:, :2], without.rewards)
    np.testing.assert_array_equal(seen_rewards(group_of(REWARDS * 3 + 1), COMPONENTS).rewards, seen.rewards)
    assert (group_of().rewards == REWARDS).all(), "what was given is kept for the figures"


def test_a_part_of_small_spread_isn_t_drowned():
    (credit_G,) = make_objective(load_config([]).objective).credit([seen_rewards(group_of(), COMPONENTS)])
    (drowned_G,) = make_objective(load_config([]).objective).credit([group_of()])
    assert credit_G[1] > credit_G[2], "right and slow before wrong and fast"
    assert drowned_G[1] < drowned_G[2], "control: as they are, speed decides"


def test_a_reward_that_is_no_number_is_refused_whatever_is_normalised():
    broken = REWARDS.copy()
    broken[1, 0] = np.nan
    with pytest.raises(DataError, match="reward component 0"):
        make_objective(load_config([]).objective).credit([seen_rewards(group_of(broken), COMPONENTS)])


def test_tokens_per_forward_are_those_of_the_text():
    ids = np.array([[3, 4, 1, 1], [3, 4, 5, 6], [1, 1, 1, 1]])
    group = make_group(ids, np.zeros_like(ids), steps=1, nfe=np.array([1, 2, 1], np.int32))
    np.testing.assert_array_equal(group.tokens_per_forward([1]), [2.0, 2.0, 0.0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["reward.speed_weight=1"], "needs rollout.sampler.threshold"),
        (["rollout.sampler.threshold=0.9"], "isn't scored"),
        (["objective.type=d2", "rollout.sampler.threshold=0.9"], "isn't scored"),
        (["objective.type=egspo", "reward.normalise=components"], "graded by the task alone"),
        (["objective.type=egspo", "reward.diversity_weight=1"], "reward.diversity_weight at 0"),
        (["objective.baseline=fills", "reward.speed_weight=1"], "leave reward.speed_weight at 0"),
        (["objective.type=dtm", "reward.normalise=components"], "objective.type=dtm takes each as it is"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        load_config(arguments)


def test_fills_of_agrpo_may_stand_beside_diversity():
    config = load_config(["objective.baseline=fills", "reward.diversity_weight=0.5"])
    assert config.reward.diversity_weight == 0.5


def test_methods_that_don_t_score_the_path_take_a_threshold():
    names = ("diffu_grpo", "wd1", "coupled_grpo", "espo", "gdpo", "spg", "dmpo", "rspo", "trafl")
    for name in names:
        arguments = [f"objective.type={name}", "rollout.sampler.threshold=0.9", "reward.speed_weight=1"]
        config = load_config([*arguments, *(["objective.samples=1"] if name == "spg" else [])])
        sampler = config.rollout.sampler.spec()
        assert sampler.most_steps == sampler.completion_length
        greedy = sampler.greedy(steps=4, position_rule="low_confidence")
        assert greedy.threshold is None and greedy.most_steps == 4, "evaluations go by steps"


@pytest.mark.slow
def test_ranks_show_the_method_what_the_settings_say(tiny_model):
    def config_with(normalise: str):
        return settings(objective__type="diffu_grpo", reward__normalise=normalise, samples_per_iteration=0)

    sampler = SamplerSpec(24, 12, 8, "random", temperature=1.0, threshold=0.01)
    adapter = random_adapter(tiny_model, settings())
    batch = draw_batch(tiny_model, settings(), adapter, sampler)
    assert all((group.nfe < sampler.steps).all() for group in batch), "the policy decides how many steps it takes"
    batch = [
        dataclasses.replace(
            group,
            rewards=np.column_stack([group.rewards, group.tokens_per_forward([1]).astype(np.float32)]),
            reward_names=(*group.reward_names, SPEED),
        )
        for group in batch
    ]
    with importing_ray(cpus=4), probed_groups(tiny_model) as groups:
        refs, found = put(batch), {}
        for normalise in ("total", "components"):
            config = config_with(normalise)
            report = groups[1].restart(config, adapter).update(refs, 0, 1e-3)
            expected = make_objective(config.objective).credit([seen_rewards(group, config.reward) for group in batch])
            for ours, theirs in zip(report.credit, expected, strict=True):
                np.testing.assert_array_equal(ours, theirs)
            found[normalise] = report
        given = np.mean([group.rewards.sum(axis=1) for group in batch])
        assert found["components"].plan_statistics["reward/mean"] == pytest.approx(given), (
            "figures are of what was given"
        )
        assert found["components"].plan_statistics["tokens_per_forward"] > 1
        assert (found["total"].credit[0] != found["components"].credit[0]).any(), "control"


def test_diversity_has_its_weight_when_parts_are_normalised():
    seen = seen_rewards(
        group_of(REWARDS[:, :2], ("right", DIVERSITY)), RewardSection(normalise="components", diversity_weight=0.25)
    )
    np.testing.assert_allclose(seen.rewards.std(axis=0), [1, 0.25], rtol=1e-6)
