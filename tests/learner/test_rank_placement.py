"""Ranks and actors that share GPUs: every rank has one that no other rank sits on, and actors take what is left."""

import time

import pytest
import ray
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from learner.ranks.group import reserve_ranks
from learner.runs.local_ray import local_ray
from learner.runs.stopping import StopRequested
from learner.settings.run import load_config
from rewards.errors import WaitTimeout
from rollout.waits import bounded_get

CONFIG = load_config(
    ["learner.ranks=2", "resources.gpus_per_rank=0.6", "resources.gpus_per_actor=0.4", "resources.cpus_per_rank=0"]
    + ["timeouts.start=5", "learner.device=cuda"]
)


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    """A Ray that believes in two GPUs."""
    with local_ray(num_cpus=1, num_gpus=2, logging_level="ERROR"):
        yield


@ray.remote
class Place:
    def gpus(self) -> list[int]:
        return ray.get_gpu_ids()


def gpus_of(actors) -> list[int]:
    found = bounded_get([actor.gpus.remote() for actor in actors], who="placed actors", timeout_s=60)
    return [int(gpu) for (gpu,) in found]


def started(placement, gpus: float) -> list:
    """Both ranks, as ``LearnerGroup`` starts them."""
    strategies = [PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=i) for i in range(2)]
    return [Place.options(num_cpus=0, num_gpus=gpus, scheduling_strategy=s).remote() for s in strategies]


@pytest.mark.slow
def test_ranks_first_then_actors_share_the_gpus():
    placement = reserve_ranks(CONFIG)
    assert placement is not None
    try:
        actors = [Place.options(num_cpus=0, num_gpus=CONFIG.resources.gpus_per_actor).remote() for _ in range(2)]
        ranks = started(placement, CONFIG.resources.gpus_per_rank)
        assert sorted(gpus_of(ranks)) == [0, 1] == sorted(gpus_of(actors))
    finally:
        for actor in (*actors, *ranks):
            ray.kill(actor)
        remove_placement_group(placement)


@pytest.mark.slow
def test_a_stop_is_heard_while_there_is_no_room():
    """And nothing stays reserved; the control waits as long as it may."""
    asked = CONFIG.model_copy(update={"learner": CONFIG.learner.model_copy(update={"ranks": 9})})
    ticks = []

    def stop_at_the_second() -> None:
        ticks.append(time.monotonic())
        if len(ticks) == 2:
            raise StopRequested

    began = time.monotonic()
    with pytest.raises(StopRequested):
        reserve_ranks(asked, stop_at_the_second)
    assert ticks[1] - began < 4.0
    states = [group["state"] for group in ray.util.placement_group_table().values()]
    assert set(states) <= {"REMOVED"}
    with pytest.raises(WaitTimeout, match="did not give 9 learner ranks 0.6 GPU each within 5 s"):
        reserve_ranks(asked, lambda: ticks.append(0.0))
    assert len(ticks) >= 5


@pytest.mark.slow
def test_control_smaller_shares_put_two_ranks_on_one_gpu():
    """Which is why the settings refuse them (tests/learner/test_config.py)."""
    share = CONFIG.resources.model_copy(update={"gpus_per_rank": 0.4})
    placement = reserve_ranks(CONFIG.model_copy(update={"resources": share}))
    assert placement is not None
    ranks = started(placement, 0.4)
    try:
        assert len(set(gpus_of(ranks))) == 1
    finally:
        for actor in ranks:
            ray.kill(actor)
        remove_placement_group(placement)
