"""A learner rank and a rollout actor of one GPU as one process with one base.

The engine's model and the learner's are two sets of modules over the same weights, each with an adapter of its own.
What one process does it does one after the other, so rollout and learning take turns, as they do in a synchronous run
anyway. The pool starts, watches and replaces the processes; a group of ranks is made of those that are ready.
"""

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from ray.util.placement_group import remove_placement_group

from learner.ranks.trajectories import LearnerRank
from learner.settings.run import RunConfig
from rollout.actor import RolloutActor
from rollout.adapters import adapter_parameters
from rollout.engines.torch import TorchEngine
from rollout.events import ActorLost
from rollout.given_up import ray_given_up
from rollout.pool import RolloutPool
from rollout.waits import end_actor

_BESIDE_WEIGHTS = ("quant_state", "state")
"""Attributes of bitsandbytes' maps that hold tensors which belong to the weights."""


def over_the_same_base(model: PeftModel) -> PeftModel:
    """A second model that computes with the very weights of the base of ``model``; its adapter is a copy."""
    adapter = {id(parameter) for parameter in adapter_parameters(model).values()}
    shared: list[Any] = [
        tensor for tensor in itertools.chain(model.parameters(), model.buffers()) if id(tensor) not in adapter
    ]
    for module in model.modules():
        shared += [vars(module)[name] for name in _BESIDE_WEIGHTS if vars(module).get(name) is not None]
    return copy.deepcopy(model, {id(each): each for each in shared})


class _RankBeside(LearnerRank):
    """Learns over the base of an engine in the same process."""

    def __init__(self, engine: TorchEngine, config: RunConfig, model_path: str, rank: int) -> None:
        super().__init__(config, model_path, rank, config.learner.ranks)
        self._engine = engine

    def _policy(self, device: torch.device) -> PeftModel:
        assert self._engine.device == device, f"engine on {self._engine.device}, rank on {device}"
        assert isinstance(self._engine.model, PeftModel), "a run's engine has an adapter"
        return over_the_same_base(self._engine.model)


class OneProcess(RolloutActor):
    """A rollout actor that becomes a learner rank too."""

    def become(self, config: RunConfig, model_path: str, rank: int) -> None:
        """Be this rank of the group, besides. Once, since a process can't leave its group."""
        assert isinstance(self._engine, TorchEngine), "the settings refuse other engines"
        self._rank = _RankBeside(self._engine, config, model_path, rank)

    def as_rank(self, method: str, *args: Any) -> Any:
        """What the rank answers."""
        return getattr(self._rank, method)(*args)


class OneProcessPool(RolloutPool):
    """The pool of processes that are ranks too; gives their placement back when it is closed."""

    actor_class = OneProcess

    def hosts(self) -> list[Any]:
        """The processes, all ready, for ``LearnerGroup``."""
        assert self.ready == self.size, "wait_ready comes before"
        return [place.handle for place in self._staying()]

    def renew(self, hosts: Sequence[Any]) -> None:
        """End those of these processes that are left, and start others: none can leave the group that it was in."""
        for place in self._places:
            if not any(place.handle is host for host in hosts):
                continue  # it was replaced when it was lost, and has been in no group
            if place.task is not None:
                self._repeat(place.task)
                text = f"{place.name} is started anew, since the learner ranks were lost"
                self._events.append(ActorLost(place.name, place.lease_id, text))
            end_actor(place.handle)
            self._starter.start(place)

    def close(self) -> None:
        super().close()
        if self._starter.placement is not None and not ray_given_up():
            remove_placement_group(self._starter.placement)
