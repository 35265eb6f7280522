"""Heads: a value of each prompt, or of each scored token, or a law of each prompt's thresholds, learned beside the
policy, where a method asks for one.

What a head reads is the policy's own: the hidden states that the last block leaves, without gradient, so that the head
learns and the policy doesn't bend to it. Of a prompt these are the states at its positions when all of the completion
is masked, averaged over them; of a scored token the one that its logits are made of. A head is small and whole on every
rank, whatever the ZeRO stage: ranks average their gradients as DeepSpeed does the adapter's, and all take the same
step, with a rate of its own, whenever the adapter takes one. Its weights and AdamW's state are kept in the ranks'
shards of a checkpoint, and go on from there bit for bit. Actors have no use for it but for a law of thresholds, by
which they draw: that one is published with the adapter.

Shapes: Z views and N scored positions of one forward, L tokens, D model width, Q groups of the update, K thresholds.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from learner.likelihood.views import View, ViewBatch
from learner.objectives.base import HeadSpec
from rewards.errors import CheckpointError
from rollout.models.family import PolicyAdapter
from rollout.models.layers import at_rows
from rollout.models.prompt_head import head_net, last_block, outputs_of, prompt_features
from rollout.spans import prompt_places
from rollout.trajectory import TrajectoryGroup

_STATE = "head."


def prompt_view(group: TrajectoryGroup, index: int) -> View:
    """The state that a completion of the group at ``index`` begins with. It scores nothing."""
    hidden_C = np.ones(group.completion_ids.shape[1], dtype=bool)
    return View(index, 0, hidden_C, np.zeros(0, np.int64), credit=0.0, weight=0.0)


class Head:
    """The network, and what learning it takes.

    Args:
        model: the policy, as the rank holds it.
        seed: of the initial weights. Those of the last map are 0, and so is all that it says at first.
    """

    def __init__(self, model: Any, family: PolicyAdapter, spec: HeadSpec, *, seed: int, outputs: int = 1) -> None:
        self.spec, self.block, self.device = spec, last_block(model, family), next(model.parameters()).device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = head_net(model.config.hidden_size, spec.width, outputs, device=self.device)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=spec.lr, weight_decay=0.0)

    def reading(self) -> AbstractContextManager[list[torch.Tensor]]:
        """What the last block leaves in each forward of the model meanwhile, as ``outputs_of`` says."""
        return outputs_of(self.block)

    def zero_grad(self) -> None:
        """Forget the gradients so far."""
        self.optimizer.zero_grad()

    def reduce(self, world: int) -> bool:
        """Average the gradients over ranks. Returns whether all are finite, the same on every rank."""
        finite = True
        for parameter in self.net.parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.distributed.all_reduce(gradient)
            parameter.grad = gradient / world
            finite = finite and bool(parameter.grad.isfinite().all())
        return finite

    def step(self, schedule: float, max_grad_norm: float) -> None:
        """One step.

        Args:
            schedule: share of the peak rate that is due.
            max_grad_norm: L2 norm that the head's gradient is clipped to.
        """
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.spec.lr * schedule
        self.optimizer.step()

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold of it."""
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self.net.named_parameters():
            held = {"weights": parameter, **self.optimizer.state.get(parameter, {})}
            tensors |= {f"{_STATE}{name}/{key}": value for key, value in held.items()}
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what ``state`` gave, among other tensors.

        Raises:
            CheckpointError: when there is no head among them, or another one.
        """
        for name, parameter in self.net.named_parameters():
            prefix = f"{_STATE}{name}/"
            held = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            weights = held.pop("weights", None)
            if weights is None or weights.shape != parameter.shape:
                raise CheckpointError(
                    f"the checkpoint holds no head of {self.spec.width} units for this model; leave the settings of "
                    "the method's head as they were, or start a new run with lora.adapter=<checkpoint>/adapter"
                )
            with torch.no_grad():
                parameter.copy_(weights)
            if held:
                step = held.pop("step")
                moments = {key: value.to(self.device) for key, value in held.items()}
                self.optimizer.state[parameter] = {"step": step, **moments}


class PromptHead(Head):
    """Values of prompts."""

    features_QD: torch.Tensor
    """float32, what it reads of each group's prompt in the present update"""

    def read(
        self, batches: Sequence[ViewBatch], groups: Sequence[TrajectoryGroup], score: Callable[[ViewBatch], Any]
    ) -> None:
        """Read all prompts of an update; each rank runs the model over its share of them.

        Args:
            batches: this rank's ``prompt_view``s, and pads.
            score: runs the model.
        """
        features: dict[int, torch.Tensor] = {}
        with self.reading() as found, torch.no_grad():
            for batch in batches:
                score(batch)
                (hidden_ZLD,) = found
                found.clear()  # all of an update's prompts may be more than its largest forward
                for view, hidden_LD in zip(batch.views, hidden_ZLD, strict=True):
                    if view.hidden_C.any():  # no pad
                        group = groups[view.group]
                        place_P = prompt_places(group.place(view.row), group.prompt_ids.size)
                        features[view.group] = prompt_features(hidden_LD, place_P, group.text_length(view.row))
        sums_QD = torch.zeros(len(groups), hidden_ZLD.shape[2], device=self.device)
        for index, feature_D in features.items():
            sums_QD[index] = feature_D
        torch.distributed.all_reduce(sums_QD)
        self.features_QD = sums_QD

    def values(self, views: Sequence[View]) -> torch.Tensor:
        """[Z] float32, the value of each view's prompt, with the head's gradient."""
        value_Q = self.net(self.features_QD).squeeze(1)
        return value_Q[torch.tensor([view.group for view in views], device=self.device)]


class ThresholdHead(PromptHead):
    """Laws of the sampler's thresholds, for each prompt.

    Args:
        thresholds: the sampler's.
    """

    def __init__(
        self, model: Any, family: PolicyAdapter, spec: HeadSpec, *, seed: int, thresholds: Sequence[float]
    ) -> None:
        super().__init__(model, family, spec, seed=seed, outputs=len(thresholds))
        self._thresholds_K = np.array(thresholds, np.float32)
        self._drawn: list[np.ndarray] = []
        """of each group [G] int64, which one each completion drew"""

    def read(
        self, batches: Sequence[ViewBatch], groups: Sequence[TrajectoryGroup], score: Callable[[ViewBatch], Any]
    ) -> None:
        super().read(batches, groups, score)
        thresholds = [group.threshold for group in groups]
        self._drawn = [
            abs(value_G[:, None] - self._thresholds_K).argmin(1) for value_G in thresholds if value_G is not None
        ]
        assert len(self._drawn) == len(groups), "a group without drawn thresholds"

    def values(self, views: Sequence[View]) -> torch.Tensor:
        """[Z] float32, log-prob of the threshold of each view's completion, with the head's gradient."""
        law_QK = self.net(self.features_QD).log_softmax(-1)
        at_2Z = [[view.group for view in views], [int(self._drawn[view.group][view.row]) for view in views]]
        group_Z, drawn_Z = torch.tensor(at_2Z, device=self.device)
        return law_QK[group_Z, drawn_Z]


class TokenHead(Head):
    """Values of scored tokens."""

    def values(self, hidden: torch.Tensor, rows_N: np.ndarray) -> torch.Tensor:
        """[N] float32, with the head's gradient, at the flat rows z*L + l that the forward was asked for."""
        features_ND = hidden if hidden.dim() == 2 else at_rows(hidden, torch.from_numpy(rows_N).to(self.device))
        values_N: torch.Tensor = self.net(features_ND.float()).squeeze(1)
        return values_N


def make_head(
    model: Any, family: PolicyAdapter, spec: HeadSpec, *, seed: int, thresholds: Sequence[float] | float | None
) -> PromptHead | TokenHead:
    """The head that a method asks for, new. ``thresholds``: the sampler's."""
    if spec.of == "thresholds":
        assert isinstance(thresholds, tuple), "the method refuses a sampler without several thresholds"
        return ThresholdHead(model, family, spec, seed=seed, thresholds=thresholds)
    kind = PromptHead if spec.of == "prompts" else TokenHead
    return kind(model, family, spec, seed=seed)
