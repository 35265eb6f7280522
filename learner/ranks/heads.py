"""Heads: a value of each prompt, or of each scored token, learned beside the policy, where a method asks for one.

What a head reads is the policy's own: the hidden states that the last block leaves, without gradient, so that the head
learns and the policy doesn't bend to it. Of a prompt these are the states at its positions when all of the completion
is masked, averaged over them; of a scored token the one that its logits are made of. A head is small and whole on every
rank, whatever the ZeRO stage: ranks average their gradients as DeepSpeed does the adapter's, and all take the same
step, with a rate of its own, whenever the adapter takes one. Its weights and AdamW's state are kept in the ranks'
shards of a checkpoint, and go on from there bit for bit. Actors have no use for it.

Shapes: Z views and N scored positions of one forward, L tokens, D model width, Q groups of the update.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from learner.likelihood.views import View, ViewBatch
from learner.objectives.base import HeadSpec
from rewards.errors import CheckpointError
from rollout.models.family import PolicyAdapter
from rollout.trajectory import TrajectoryGroup

_PEFT_PREFIX = "base_model.model."
_STATE = "head."


def prompt_view(group: TrajectoryGroup, index: int) -> View:
    """The state that a completion of the group at ``index`` begins with. It scores nothing."""
    hidden_C = np.ones(group.completion_ids.shape[1], dtype=bool)
    return View(index, 0, hidden_C, np.zeros(0, np.int64), credit=0.0, weight=0.0)


class Head:
    """The network, and what learning it takes.

    Args:
        model: the policy, as the rank holds it.
        seed: of the initial weights. Those of the last map are 0, and so are all values at first.
    """

    def __init__(self, model: Any, family: PolicyAdapter, spec: HeadSpec, *, seed: int) -> None:
        self.spec, self.block, self.device = spec, last_block(model, family), next(model.parameters()).device
        D = model.config.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first, last = nn.Linear(D, spec.width), nn.Linear(spec.width, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        norm = nn.LayerNorm(D, elementwise_affine=False)
        self.net = nn.Sequential(norm, first, nn.Tanh(), last).to(self.device)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=spec.lr, weight_decay=0.0)

    @contextlib.contextmanager
    def reading(self) -> Iterator[list[torch.Tensor]]:
        """What the last block leaves in each forward of the model meanwhile, [Z, L, D], without gradient."""
        found: list[torch.Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found.append((output[0] if isinstance(output, tuple) else output).detach())

        hook = self.block.register_forward_hook(keep)
        try:
            yield found
        finally:
            hook.remove()

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
                raise CheckpointError(f"the checkpoint holds no head of {self.spec.width} units for this model")
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
        with self.reading() as found, torch.no_grad():
            for batch in batches:
                score(batch)
        assert len(found) == len(batches), "each forward runs the last block once"
        sums_QD = torch.zeros(len(groups), found[0].shape[2], device=self.device)
        for batch, hidden_ZLD in zip(batches, found, strict=True):
            for view, hidden_LD in zip(batch.views, hidden_ZLD, strict=True):
                if view.hidden_C.any():  # no pad
                    C, P = view.hidden_C.size, groups[view.group].prompt_ids.size
                    sums_QD[view.group] = hidden_LD[-C - P : -C].float().mean(0)
        torch.distributed.all_reduce(sums_QD)
        self.features_QD = sums_QD

    def values(self, views: Sequence[View]) -> torch.Tensor:
        """[Z] float32, the value of each view's prompt, with the head's gradient."""
        value_Q = self.net(self.features_QD).squeeze(1)
        return value_Q[torch.tensor([view.group for view in views], device=self.device)]


class TokenHead(Head):
    """Values of scored tokens."""

    def values(self, hidden_ZLD: torch.Tensor, rows_N: np.ndarray) -> torch.Tensor:
        """[N] float32, with the head's gradient, at the flat rows z*L + l."""
        features_ND = hidden_ZLD.flatten(0, 1)[torch.from_numpy(rows_N).to(self.device)].float()
        values_N: torch.Tensor = self.net(features_ND).squeeze(1)
        return values_N


def make_head(model: Any, family: PolicyAdapter, spec: HeadSpec, *, seed: int) -> PromptHead | TokenHead:
    """The head that a method asks for, new."""
    kind = PromptHead if spec.of == "prompts" else TokenHead
    return kind(model, family, spec, seed=seed)


def last_block(model: nn.Module, family: PolicyAdapter) -> nn.Module:
    """The last of the blocks whose linear maps the family names."""
    names = [name.removeprefix(_PEFT_PREFIX) for name, _ in model.named_modules()]
    blocks = [re.match(r".*?\.\d+(?=\.)", name) for name in names if re.fullmatch(family.lora_regex, name)]
    found = [block.group() for block in blocks if block is not None]
    assert found, f"a family whose blocks aren't numbered: {family.lora_regex}"
    return model.get_submodule(_PEFT_PREFIX + found[-1])
