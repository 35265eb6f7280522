"""Tokens per forward as a part of the reward: an actor's own engine and graders, with and without a threshold."""

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rewards.diversity import distance
from rewards.errors import ConfigError
from rewards.task import Problem
from rollout.actor import ActorSettings, RolloutActor
from rollout.code import code_identity
from rollout.engines.torch import TorchEngine
from rollout.messages import Weights
from rollout.models.encoding import completion_texts, load_tokenizer
from rollout.trajectory import BranchSpec, GreedyBranches, GroupSpec, Lease, SamplerSpec, TrajectoryGroup
from tests.support.learner_ranks import importing_ray

pytestmark = pytest.mark.slow

TASK = """
from rewards.task import Grade, Task

class Vowels(Task):
    name = "vowels"
    components = ("length",)
    def problems(self, split, *, seed, size, path=None):
        return []
    def messages(self, fields):
        return [{"role": "user", "content": "go"}]
    def validate_fields(self, fields):
        pass
    def grade(self, fields, completion):
        return Grade(fields["right"], {"length": float(len(completion))})

class Fast(Vowels):
    components = ("length", "speed")
"""


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder: Path = tmp_path_factory.mktemp("task")
    (folder / "vowels_task.py").write_text(TASK)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder))
        with importing_ray(cpus=1):
            yield


def actor_of(model: str, speed_weight: float, task: str = "Vowels", diversity_weight: float = 0.0) -> RolloutActor:
    engine = functools.partial(TorchEngine, model_path=model, lora=None, max_rows=8, threads=1)
    name, code = f"vowels_task:{task}", code_identity().digest
    return RolloutActor("actor", ActorSettings(engine, name, 1, 30.0, 30.0, 0, code, speed_weight, diversity_weight))


def drawn(
    model: str,
    speed_weight: float,
    threshold: float | None,
    diversity_weight: float = 0.0,
    branches: BranchSpec | None = None,
) -> list[TrajectoryGroup]:
    """A group in which all is right, and one in which nothing is."""
    actor = actor_of(model, speed_weight, diversity_weight=diversity_weight)
    actor.start()
    groups = [GroupSpec(i, Problem(f"p{i}", {"right": i == 0}), 4, seed=i) for i in range(2)]
    sampler = SamplerSpec(12, 12, 6, "random", temperature=1.0, threshold=threshold)
    _, *found = actor.run_lease(Lease(0, tuple(groups)), sampler, Weights(-1, "", []), branches)
    return found


def test_speed_is_a_part_of_the_reward_where_something_is_right(tiny_model: str) -> None:
    right, wrong = drawn(tiny_model, 0.25, threshold=0.01)
    engine = TorchEngine(model_path=tiny_model, lora=None, max_rows=1)
    for group in (right, wrong):
        assert group.reward_names == ("length", "speed")
    speed_G = right.tokens_per_forward([engine.family.eos_token_id])
    np.testing.assert_allclose(right.rewards[:, 1], 0.25 * speed_G, rtol=1e-6)
    assert speed_G.max() > 2, "more than in six steps"
    assert not wrong.rewards[:, 1].any() and wrong.rewards[:, 0].any()


@pytest.mark.parametrize(("weight", "threshold"), [(0.0, 0.05), (0.25, None)])
def test_without_weight_or_threshold_rewards_are_the_tasks(tiny_model: str, weight: float, threshold: float) -> None:
    for group in drawn(tiny_model, weight, threshold):
        assert group.reward_names == ("length",)


def test_diversity_is_a_part_of_the_reward(tiny_model: str) -> None:
    for group in drawn(tiny_model, 0.0, threshold=None, diversity_weight=0.5):
        assert group.reward_names == ("length", "diversity")
        texts = completion_texts(load_tokenizer(tiny_model), group)
        for row, text in enumerate(texts):
            apart = [distance(text, other) for other in texts[:row] + texts[row + 1 :]]
            assert group.rewards[row, 1] == pytest.approx(0.5 * np.mean(apart), rel=1e-6)
        assert group.rewards[:, 1].max() > 0


def test_fills_have_none_of_it(tiny_model: str) -> None:
    for group in drawn(tiny_model, 0.0, None, diversity_weight=0.5, branches=GreedyBranches(2, evenly=True)):
        assert group.branch_rewards is not None and group.branch_step is not None
        assert group.branch_rewards.shape[3] == 2 and not group.branch_rewards[..., 1].any()
        texts = completion_texts(load_tokenizer(tiny_model), group)
        assert group.rewards[:, 1].any() or len(set(texts)) == 1


def test_a_task_with_a_part_of_that_name_is_refused(tiny_model: str) -> None:
    with pytest.raises(ConfigError, match="of its own"):
        actor_of(tiny_model, 0.25, task="Fast").start()
