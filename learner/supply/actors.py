"""The rollout actors that a run's settings ask for."""

from collections.abc import Callable
from functools import partial
from typing import Any

from ray.util.placement_group import PlacementGroup

from learner.planning.remedy import remedy
from learner.ranks.group import rank_environment
from learner.ranks.one_process import OneProcessPool
from learner.ranks.rank import rank_manners
from learner.settings.run import RunConfig
from rollout.actor import ActorSettings
from rollout.code import code_identity
from rollout.engines.base import Engine
from rollout.engines.torch import TorchEngine
from rollout.engines.vllm.engine import VllmEngine
from rollout.gpu import GpuManners
from rollout.models.lora import LoraSpec
from rollout.pool import RolloutPool

MAX_RESTARTS = 3


def start_actors(
    config: RunConfig,
    model_path: str,
    lora: LoraSpec | None,
    *,
    seed: int,
    placement: PlacementGroup | None = None,
) -> RolloutPool:
    """A pool whose actors are starting; ``wait_ready`` waits for them.

    Args:
        model_path: folder or hub name of the base.
        lora: shape of the adapters that they will load; None for the bare base.
        seed: names the random streams of evaluations.
        placement: what ``reserve_ranks`` gave, where actors and ranks are one process; the pool's to give back.
    """
    resources = config.resources
    cpus, gpus = resources.of("actor")
    # Ray would set OMP_NUM_THREADS=1.
    environment = {"OMP_NUM_THREADS": str(resources.threads_per_process), **_manners(config).environment()}
    settings = ActorSettings(
        make_engine=_engine(config, model_path, lora),
        task=config.task.name,
        graders=config.rollout.graders_per_actor,
        grade_timeout_s=config.rollout.grade_timeout_s,
        pull_timeout_s=config.timeouts.publish,
        run_seed=seed,
        code_digest=code_identity().digest,
        speed_weight=config.reward.speed_weight,
        diversity_weight=config.reward.diversity_weight,
        judge=config.task.judge,
        remedy=partial(remedy, config, "rollout actor"),
    )
    pool = OneProcessPool if resources.one_process else RolloutPool
    return pool(
        settings,
        size=config.rollout.wanted_actors,
        least=config.rollout.fewest_actors,
        resources={"CPU": cpus, "GPU": gpus},
        environment=rank_environment(config) if resources.one_process else environment,
        start_timeout_s=config.timeouts.start,
        max_restarts=MAX_RESTARTS,
        heartbeat_s=config.timeouts.heartbeat,
        placement=placement,
    )


def _engine(config: RunConfig, model_path: str, lora: LoraSpec | None) -> Callable[[], Engine]:
    resources = config.resources
    shape: dict[str, Any] = {
        "model_path": model_path,
        "lora": lora,
        "max_rows": config.rollout.max_rows,
        "threads": resources.threads_per_process,
        "device": "cuda" if resources.gpus_per_actor > 0 else "cpu",
        "dtype": config.learner.dtype,
    }
    if config.rollout.engine == "vllm":
        return partial(VllmEngine, settings=config.rollout.vllm, **shape)
    return partial(TorchEngine, quantization=config.model.quantization, manners=_manners(config), **shape)


def _manners(config: RunConfig) -> GpuManners:
    """vLLM has its own, for which ``rollout.vllm.memory_share`` is."""
    if config.resources.one_process:
        return rank_manners(config)
    share = config.resources.gpus_per_actor if config.rollout.engine == "torch" else 0.0
    return GpuManners(share, deterministic=config.learner.deterministic)
