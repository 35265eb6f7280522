"""A small network on a prompt's hidden states, as learner and engines have it; and the law of thresholds that it makes.

What it reads are the states that the last block leaves at the prompt's positions when all of the completion is masked,
averaged over them. With one output for each of some thresholds it is a law of them, from which each completion draws
its own before it is written.

Shapes: Q prompts, Z rows of a forward, L tokens, D model width, K thresholds, N completions.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from rollout.models.family import PolicyAdapter
from rollout.sampling import noise

_PEFT_PREFIX = "base_model.model."
_STREAM = -2  # of a completion's noise; completion positions are >= 0, the choice of positions is -1


def head_net(width_in: int, width: int, outputs: int, *, device: torch.device | None = None) -> nn.Sequential:
    """The network. What its last map makes is 0 at first, and so a law of thresholds uniform."""
    first, last = nn.Linear(width_in, width), nn.Linear(width, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.LayerNorm(width_in, elementwise_affine=False), first, nn.Tanh(), last).to(device)


def net_of(tensors: Mapping[str, torch.Tensor], device: torch.device) -> nn.Sequential:
    """The network with these weights, in inference."""
    width, width_in = tensors["1.weight"].shape
    net = head_net(width_in, width, tensors["3.weight"].shape[0], device=device)
    net.load_state_dict(dict(tensors))
    return net.eval().requires_grad_(False)


def last_block(model: nn.Module, family: PolicyAdapter) -> nn.Module:
    """The last of the blocks whose linear maps the family names."""
    wrapped = [name for name, _ in model.named_modules()]
    prefix = _PEFT_PREFIX if any(name.startswith(_PEFT_PREFIX) for name in wrapped) else ""
    names = [name.removeprefix(_PEFT_PREFIX) for name in wrapped]
    blocks = [re.match(r".*?\.\d+(?=\.)", name) for name in names if re.fullmatch(family.lora_regex, name)]
    found = [block.group() for block in blocks if block is not None]
    assert found, f"a family whose blocks aren't numbered: {family.lora_regex}"
    return model.get_submodule(prefix + found[-1])


@contextlib.contextmanager
def outputs_of(block: nn.Module) -> Iterator[list[torch.Tensor]]:
    """What the last block leaves in each forward of the model meanwhile, without gradient: [Z, L, D], or [N, D] at the
    rows whose logits are wanted, where it runs on these alone (``layers.through``)."""
    found: list[torch.Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).detach())

    hook = block.register_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


def prompt_features(hidden_LD: torch.Tensor, place_P: np.ndarray, text: int) -> torch.Tensor:
    """[D] float32, of a row that ends in a text of so many tokens.

    Args:
        place_P: where in the text the prompt's tokens stand (``rollout.spans.prompt_places``).
    """
    return hidden_LD[-text:][torch.from_numpy(place_P).to(hidden_LD.device)].float().mean(0)


class DrawnThresholds(NamedTuple):
    """Of each completion."""

    value_N: np.ndarray
    """float32"""
    logp_N: np.ndarray
    """float32, log-prob of the draw"""


def draw_thresholds(
    thresholds: Sequence[float], law_NK: torch.Tensor, keys: Sequence[int], *, greedy: bool
) -> DrawnThresholds:
    """One of the thresholds for each completion, by the noise of its key, or the likeliest, the first of equals.

    Args:
        law_NK: log-probs, of each completion's prompt.
    """
    law_NK = law_NK.double().cpu()
    scores_NK = law_NK
    if not greedy:
        keys_N = torch.tensor(list(keys))
        streams_N = noise.streams(keys_N, torch.zeros_like(keys_N), torch.full_like(keys_N, _STREAM))
        scores_NK = law_NK + noise.gumbel(streams_N, law_NK.shape[1])
    at_N = scores_NK.argmax(1)
    logp_N = law_NK.gather(1, at_N.unsqueeze(1)).squeeze(1)
    return DrawnThresholds(np.array(thresholds, np.float32)[at_N.numpy()], logp_N.float().numpy())
