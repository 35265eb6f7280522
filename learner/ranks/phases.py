"""Weights beside the trained ones, of a method that learns in phases: the teacher, and the running mean.

A phase begins with its teacher equal to the trained weights. When it ends, the trained weights become their running
mean over its updates, where one is kept, and AdamW forgets its moments.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from rollout.adapters import AdapterState, adapter_parameters, pack, unpack

Weights = Mapping[str, torch.Tensor]
"""Adapter parameters by canonical name, whole."""


class TrainedWeights:
    """The adapter of a model that DeepSpeed trains, as whole tensors whatever the ZeRO stage. All ranks call alike.

    Args:
        model: with the adapter; at stage 0 it may as well be no engine's.
    """

    def __init__(self, model: torch.nn.Module, zero_stage: int) -> None:
        self._parameters, self._stage = adapter_parameters(model), zero_stage

    def exact(self) -> Weights:
        """Copies as the optimizer holds them, float32 from stage 1 on."""
        if self._stage == 0:
            return self.used()
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(p).detach().clone() for name, p in self._parameters.items()}

    def used(self) -> Weights:
        """Copies as the forward uses them."""
        with self._whole(write=False):
            return {name: p.detach().clone() for name, p in self._parameters.items()}

    def use(self, weights: Weights) -> None:
        """Give the forward other weights; the optimizer keeps its own, and puts them back with its next step."""
        with torch.no_grad(), self._whole(write=True):
            for name, parameter in self._parameters.items():
                parameter.copy_(weights[name])

    def set(self, weights: Weights) -> None:
        """Replace the weights, the optimizer's too."""
        if self._stage > 0:
            from deepspeed.utils import safe_set_full_fp32_param

            for name, parameter in self._parameters.items():
                safe_set_full_fp32_param(parameter, weights[name].float())
        self.use(weights)

    def _whole(self, *, write: bool) -> Any:
        if self._stage < 3:
            return nullcontext()
        import deepspeed

        parameters = list(self._parameters.values())
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None)


class PhaseWeights:
    """The teacher and the running mean of the present phase.

    Args:
        decay: of the running mean; None keeps none.
    """

    def __init__(self, trained: TrainedWeights, decay: float | None) -> None:
        self._trained, self._decay = trained, decay
        self.teacher: Weights = trained.used()
        self.mean: Weights | None = None if decay is None else trained.exact()
        """Copies of the adapter's parameters, whole."""

    def updated(self) -> None:
        """An update was made: move the mean."""
        if self.mean is None or self._decay is None:
            return
        for name, now in self._trained.exact().items():
            self.mean[name].lerp_(now.to(self.mean[name].dtype), 1.0 - self._decay)

    def next(self) -> None:
        """End the phase and begin another. The optimizer's moments are the caller's to clear."""
        if self.mean is not None:
            self._trained.set(self.mean)
        self.teacher = self._trained.used()
        self.mean = None if self._decay is None else self._trained.exact()

    @contextmanager
    def teaching(self) -> Iterator[None]:
        """The teacher's weights in the place of the trained ones, for forwards without gradient."""
        own = self._trained.used()
        self._trained.use(self.teacher)
        try:
            yield
        finally:
            self._trained.use(own)

    def state(self) -> dict[str, AdapterState]:
        """For a checkpoint: ``teacher`` and, where it is kept, ``mean``."""
        packed: dict[str, AdapterState] = {"teacher": pack(self.teacher)}
        if self.mean is not None:
            packed["mean"] = pack(self.mean)
        return packed

    def restore(self, state: Mapping[str, AdapterState]) -> None:
        """Take over what ``state`` gave."""
        device = next(iter(self.teacher.values())).device
        held = {
            part: {name: unpack(tensor).to(device) for name, tensor in weights.items()}
            for part, weights in state.items()
        }
        self.teacher = held["teacher"]
        self.mean = held["mean"] if self._decay is not None else None
