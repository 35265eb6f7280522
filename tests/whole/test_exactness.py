"""The expected AGRPO gradient is that of expected reward, by enumeration (``learner.verification.enumeration``)."""

import pytest

from learner.settings.methods.states import AgrpoConfig
from learner.verification.enumeration import (
    BLOCKS,
    RANDOM_ORDER,
    RETIRING,
    SMALLEST,
    THREE_POSITIONS,
    TWO_TOKENS_A_STEP,
    G,
    K,
    all_groups,
    cosine,
    enumerate_trajectories,
    exact_gradient,
    expected_estimate,
    independent_law,
    low_confidence_law,
    relative_error,
)


@pytest.mark.parametrize("toy", [RANDOM_ORDER, THREE_POSITIONS, RETIRING, BLOCKS, TWO_TOKENS_A_STEP], ids=str)
def test_the_enumeration_is_a_probability(toy):
    paths = enumerate_trajectories(toy)
    assert independent_law(toy, toy.parameters, paths).sum() == pytest.approx(1, abs=1e-12)
    if toy.block == toy.length:
        assert low_confidence_law(toy, toy.parameters, paths).sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("toy", [RANDOM_ORDER, RETIRING, TWO_TOKENS_A_STEP], ids=str)
def test_enumerated_groups_are_what_an_engine_could_deliver(toy):
    groups = all_groups(toy)
    assert len(groups) == len(enumerate_trajectories(toy).ids) ** G
    for group in groups[:: max(1, len(groups) // 50)]:
        group.validate()


@pytest.mark.parametrize("strata", [("group", True), ("row", True), ("group", False)])
@pytest.mark.parametrize(("sampling", "floor"), [("uniform", 0.0), ("entropy", 0.0), ("entropy", 0.2)])
@pytest.mark.parametrize("toy", [RANDOM_ORDER, RETIRING, TWO_TOKENS_A_STEP], ids=str)
def test_expected_gradient_is_the_reward_gradient(toy, sampling, floor, strata):
    law = {"timestep_sampling": sampling, "weight_floor": floor, "strata": strata[0], "low_discrepancy": strata[1]}
    config = AgrpoConfig(k=K, **law)
    law_n = independent_law(toy, toy.parameters, enumerate_trajectories(toy))
    assert relative_error(expected_estimate(toy, law_n, config), exact_gradient(toy)) < 1e-6


@pytest.mark.parametrize("toy", [THREE_POSITIONS, BLOCKS], ids=str)
def test_expected_gradient_of_longer_completions(toy):
    config = AgrpoConfig(k=1, timestep_sampling="entropy", weight_floor=0)
    law_n = independent_law(toy, toy.parameters, enumerate_trajectories(toy))
    assert relative_error(expected_estimate(toy, law_n, config), exact_gradient(toy)) < 1e-6


def test_the_factor_of_the_group_baseline_at_three_completions():
    """Groups of two can't tell (G-1)/G from 1/G."""
    toy, config = SMALLEST, AgrpoConfig(k=1, timestep_sampling="entropy", weight_floor=0)
    law_n = independent_law(toy, toy.parameters, enumerate_trajectories(toy))
    ours = expected_estimate(toy, law_n, config, size=3)
    assert relative_error(ours, exact_gradient(toy, size=3)) < 1e-6
    assert relative_error(ours, exact_gradient(toy, size=2)) > 0.1, "control: another group size, another factor"


@pytest.mark.parametrize("toy", [RANDOM_ORDER, RETIRING, TWO_TOKENS_A_STEP], ids=str)
def test_control_the_published_step_range_is_biased(toy):
    config = AgrpoConfig(k=K, timestep_sampling="uniform", step_range="until_last_token")
    law_n = independent_law(toy, toy.parameters, enumerate_trajectories(toy))
    ours = expected_estimate(toy, law_n, config)
    assert relative_error(ours, exact_gradient(toy)) > 0.1
    assert cosine(ours, exact_gradient(toy)) < 0.97, "nor is it a multiple of the gradient"


def test_control_confidence_ordered_positions_with_token_terms_only_are_biased():
    toy, paths = THREE_POSITIONS, enumerate_trajectories(THREE_POSITIONS)
    exact = exact_gradient(toy, low_confidence_law)
    ours = expected_estimate(toy, low_confidence_law(toy, toy.parameters, paths), AgrpoConfig(k=1))
    assert relative_error(ours, exact) > 0.1
    assert cosine(ours, exact) < 0.97
