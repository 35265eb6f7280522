"""The enumeration test and its negative controls (``learner.verification.enumeration``), as measurements."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from learner.settings.methods.states import AgrpoConfig
from learner.verification.enumeration import (
    RANDOM_ORDER,
    RETIRING,
    SMALLEST,
    THREE_POSITIONS,
    TWO_TOKENS_A_STEP,
    K,
    Law,
    Toy,
    cosine,
    enumerate_trajectories,
    exact_gradient,
    expected_estimate,
    independent_law,
    low_confidence_law,
    relative_error,
)
from learner.verification.measurement import Measurement, Meter

TOYS = {
    "random order": RANDOM_ORDER,
    "blocks, early end": RETIRING,
    "two tokens a step": TWO_TOKENS_A_STEP,
}
DRAWS: dict[str, dict[str, object]] = {
    "low discrepancy": {},
    "low discrepancy within each completion": {"strata": "row"},
    "plain uniforms": {"low_discrepancy": False},
}
CONTROL_AT_LEAST = 0.1


def check_enumeration(meter: Meter) -> Iterator[tuple[str, list[Measurement]]]:
    """Named checks: the expected gradient is the gradient of expected reward, for every estimator that is exact."""
    for name, toy in TOYS.items():
        for sampling in ("uniform", "entropy"):
            law = AgrpoConfig(k=K, timestep_sampling=sampling, weight_floor=0)
            for stratified, change in DRAWS.items():
                yield f"{name}, {sampling}, {stratified}", [_compare(meter, toy, law.model_copy(update=change))]
    floor = AgrpoConfig(k=K, timestep_sampling="entropy", weight_floor=0.2)
    yield "random order, entropy with floor 0.2", [_compare(meter, RANDOM_ORDER, floor)]
    three = _compare(meter, SMALLEST, AgrpoConfig(k=1, timestep_sampling="uniform"), size=3)
    yield "three completions a group, (G-1)/G = 2/3", [three]


def check_controls(meter: Meter) -> Iterator[tuple[str, list[Measurement]]]:
    """Named checks of estimators that are biased: their error must be above the bound."""
    for name, toy in TOYS.items():
        published = AgrpoConfig(k=K, timestep_sampling="uniform", step_range="until_last_token")
        yield f"steps until the last token: {name}", [_control(_compare(meter, toy, published))]
    ordered = _compare(meter, THREE_POSITIONS, AgrpoConfig(k=1), law=low_confidence_law)
    yield "confidence order, token terms only", [_control(ordered)]


def _compare(meter: Meter, toy: Toy, config: AgrpoConfig, *, law: Law = independent_law, size: int = 2) -> Measurement:
    exact = exact_gradient(toy, law, size)
    ours = expected_estimate(toy, law(toy, toy.parameters, enumerate_trajectories(toy)), config, size)
    largest = float(np.abs(ours - exact).max())
    where = f"cosine {cosine(ours, exact):.4f}"
    return meter.measured("expected gradient", where, largest, relative_error(ours, exact))


def _control(measurement: Measurement) -> Measurement:
    return dataclasses.replace(measurement, control=True, bound=CONTROL_AT_LEAST)
