"""Every method of the settings on real ranks: an update's gradient, on the policy and off it, doesn't depend on ranks,
forwards, passes and ZeRO stage; and a batch after a checkpoint is learnt from as without one, bit for bit."""

from collections.abc import Iterator

import pytest
import ray

from learner.objectives import make_objective
from learner.ranks.plan import UpdatePlan, plan_update
from rollout.adapters import AdapterState, digest
from rollout.models.family import policy_adapter
from rollout.trajectory import TrajectoryGroup
from tests.support.every_method import METHODS, Drawing, at, draw_batches, drawing_of, section
from tests.support.learner_ranks import (
    ProbedGroup,
    importing_ray,
    plain_gradient,
    probed_groups,
    put,
    random_adapter,
    relative,
    settings,
)

pytestmark = [pytest.mark.slow, pytest.mark.heavy]

LR = 1e-3
LAYOUTS = [(1, 0, 3), (1, 0, 1), (2, 0, 16), (2, 0, 1), (2, 2, 3), (2, 3, 16)]
"""(ranks, ZeRO stage, views in one pass at most); compared with (1, 0, 16)"""


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with importing_ray(cpus=4):
        yield


@pytest.fixture(scope="module")
def groups(cluster, tiny_model) -> Iterator[dict[int, ProbedGroup]]:
    """Processes by number of ranks; each test restarts what is in them."""
    with probed_groups(tiny_model) as started:
        yield started


@pytest.fixture(scope="module")
def adapter(tiny_model) -> AdapterState:
    return random_adapter(tiny_model, settings())


@pytest.fixture(scope="module")
def batches(tiny_model, adapter) -> dict[Drawing, list[TrajectoryGroup]]:
    return draw_batches(tiny_model, adapter)


@pytest.fixture
def batch(batches, method) -> list[TrajectoryGroup]:
    return batches[drawing_of(method)]


@pytest.fixture
def refs(cluster, batch) -> list[ray.ObjectRef]:
    return put(batch)


def gradients(groups, adapter, refs, method: str, *layout: int) -> tuple[AdapterState, AdapterState]:
    """Of a batch's first update, and of its second one."""
    config = at(method, *layout)
    group = groups[config.learner.ranks].restart(config, adapter)
    first = group.gradient(refs, 0)
    assert group.update(refs, 0, LR).applied
    return first, group.gradient(refs, 1)


def plan(tiny_model, batch, config) -> UpdatePlan:
    return plan_update(
        batch,
        objective=make_objective(config.objective),
        run_seed=config.run.seed,
        update_index=0,
        eos_ids=(policy_adapter(tiny_model).eos_token_id,),
        ranks=1,
        views_per_forward=config.learner.views_per_forward,
    )


@pytest.mark.parametrize("method", METHODS)
def test_gradients_do_not_depend_on_the_layout(groups, tiny_model, adapter, batch, refs, method):
    expected = gradients(groups, adapter, refs, method)
    normaliser = plan(tiny_model, batch, at(method)).normaliser
    by_autograd = plain_gradient(tiny_model, at(method), adapter, batch, normaliser=normaliser)
    errors = {"plain autograd": relative(by_autograd, expected[0])}
    for layout in LAYOUTS:
        first, second = gradients(groups, adapter, refs, method, *layout)
        errors[layout] = relative(expected[0], first)
        errors[*layout, "second"] = relative(expected[1], second)
    print(method, {layout: f"{error:.1e}" for layout, error in errors.items()})
    assert relative(*expected) > 0.1, "control: the second update has views of its own"
    assert max(errors.values()) <= 1e-5, "largest seen: 4e-6, of a second update"


@pytest.mark.parametrize("method", METHODS)
def test_control_units_that_are_cut_in_two_have_another_gradient(groups, tiny_model, adapter, batch, refs, method):
    units = [unit for forward in plan(tiny_model, batch, at(method)).forwards[0] for unit in forward.units]
    group = groups[1].restart(at(method), adapter)
    whole = {**group.gradient(refs, 0), **group.ask("head_gradients")[0]}
    group.ask("cut_units")
    error = relative(whole, {**group.gradient(refs, 0), **group.ask("head_gradients")[0]})
    print(f"{method}: relative L2 {error:.1e}")
    if max(map(len, units)) == 1:
        assert error == 0.0, "there is nothing to cut"
    else:
        assert error > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_after_a_checkpoint_the_next_batch_is_learnt_from_bit_for_bit(groups, adapter, refs, method):
    group = groups[1].restart(at(method, views=3), adapter)
    updates = range(2)
    for index in updates:
        group.update(refs, index, LR)
    saved, shards = group.publish().state, group.export()
    phase = group.phase_state() if section(method).phases() else None
    later = refs[2:]
    went_on = [group.update(later, index, LR).loss for index in updates]
    through = group.publish().digest

    group.restart(at(method, views=3), saved, shards)
    if phase is not None:
        group.enter_phase(0, phase)
    assert [group.update(later, index, LR).loss for index in updates] == went_on
    assert group.publish().digest == through != digest(saved)
    group.restart(at(method, views=3), saved)
    for index in updates:
        group.update(later, index, LR)
    assert group.publish().digest != through, "control: without the optimizer's state it goes elsewhere"
