"""The plain way to do what the engine and the learner do: the baseline of the benchmark, and a check of its results.

It is written as one would write it without thinking about large vocabularies, with care but no tricks: logits of all
positions, the sampler at all positions of the block, a boolean support mask over the vocabulary, and in the learner
one forward over the full batch for every sampled timestep, repeated ones included.

Shapes: B rows, L = P + C tokens, C completion positions, W positions of a block, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from learner.bench.policy import Shape, prompt_ids
from learner.settings.methods.states import AgrpoConfig

Noise = Callable[[int, slice], torch.Tensor]
"""(step, the block's positions) -> Gumbel noise [B, W, V]."""


@dataclass(frozen=True)
class PlainRollout:
    """What the plain sampler leaves for the plain learner, all tensors."""

    completion_ids: torch.Tensor
    """[B, C] int64."""
    unmask_step: torch.Tensor
    """[B, C] int64."""
    logp: torch.Tensor
    """[B, C] float32, log-prob under the law it was drawn from."""
    logp_raw: torch.Tensor
    """[B, C] float32, at temperature 1, untruncated."""
    entropy: torch.Tensor
    """[B, C] float32."""
    support: torch.Tensor
    """[B, C, V] bool."""


def plain_generate(
    model: torch.nn.Module,
    shape: Shape,
    unmask_step_BC: np.ndarray,
    *,
    mask_id: int,
    steps: int | None = None,
    noise: Noise | None = None,
) -> PlainRollout:
    """Denoise in the order given (a random order costs nothing to draw).

    Args:
        steps: stop after so many; None for all.
        noise: None for torch's own generator, which is what is timed.
    """
    B, P, C, V = shape.rows, shape.prompt, shape.completion, shape.vocabulary
    order_BC = torch.from_numpy(unmask_step_BC.astype(np.int64))
    ids_BL = torch.full((B, P + C), mask_id)
    ids_BL[:, :P] = torch.from_numpy(prompt_ids(shape).astype(np.int64))
    done = PlainRollout(
        completion_ids=ids_BL[:, P:],
        unmask_step=order_BC,
        logp=torch.zeros(B, C),
        logp_raw=torch.zeros(B, C),
        entropy=torch.zeros(B, C),
        support=torch.zeros(B, C, V, dtype=torch.bool),
    )
    per_block = shape.steps // (C // shape.block)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for step in range(shape.steps if steps is None else steps):
            start = step // per_block * shape.block
            block = slice(start, start + shape.block)
            logits_BLV = model(input_ids=ids_BL).logits
            logits_BWV = logits_BLV[:, P + block.start : P + block.stop].float()
            logits_BWV[..., mask_id] = -torch.inf
            raw_BWV = torch.log_softmax(logits_BWV, dim=-1)
            tempered_BWV = _top_p(_top_k(logits_BWV / shape.temperature, shape.top_k), shape.top_p)
            law_BWV = torch.log_softmax(tempered_BWV, dim=-1)
            gumbel_BWV = (
                torch.empty_like(law_BWV).exponential_(generator=generator).log_().neg_()
                if noise is None
                else noise(step, block)
            )
            token_BW = (law_BWV + gumbel_BWV).argmax(-1)
            revealed = order_BC[:, block] == step
            finite_BWV = law_BWV.masked_fill(law_BWV == -torch.inf, 0.0)
            for name, value_BW in (
                ("completion_ids", token_BW),
                ("logp", law_BWV.gather(-1, token_BW.unsqueeze(-1)).squeeze(-1)),
                ("logp_raw", raw_BWV.gather(-1, token_BW.unsqueeze(-1)).squeeze(-1)),
                ("entropy", -(law_BWV.exp() * finite_BWV).sum(-1)),
            ):
                getattr(done, name)[:, block][revealed] = value_BW[revealed]
            done.support[:, block][revealed] = (law_BWV > -torch.inf)[revealed]
    return done


def plain_update(
    model: torch.nn.Module,
    shape: Shape,
    rollout: PlainRollout,
    advantage_B: np.ndarray,
    draws: Sequence[Sequence[int]],
    *,
    mask_id: int,
    config: AgrpoConfig,
    keep: int | None = None,
) -> tuple[float, list[tuple[int, int, torch.Tensor]]]:
    """AGRPO's loss and gradient (left in the parameters) for uniformly drawn steps of weight 1.

    Args:
        draws: [B][k] steps, repeats included.
        keep: forward only so many of the k draws (the memory doesn't depend on k); None for all.

    Returns:
        The loss, and (row, step, log-probs of the step's tokens) of all draws.
    """
    B, P, k = shape.rows, shape.prompt, len(draws[0])
    advantage_B1 = torch.as_tensor(advantage_B, dtype=torch.float32).unsqueeze(1)
    prompts_BP = torch.from_numpy(prompt_ids(shape).astype(np.int64)).expand(B, P)
    total, scored = 0.0, []
    for draw in range(k if keep is None else keep):
        step_B1 = torch.tensor([row[draw] for row in draws]).unsqueeze(1)
        state_BC = rollout.completion_ids.masked_fill(rollout.unmask_step >= step_B1, mask_id)
        logits_BLV = model(input_ids=torch.cat([prompts_BP, state_BC], dim=1)).logits
        tempered_BCV = logits_BLV[:, P:].float() / shape.temperature
        law_BCV = torch.log_softmax(tempered_BCV.masked_fill(~rollout.support, -torch.inf), dim=-1)
        logp_BC = law_BCV.gather(-1, rollout.completion_ids.unsqueeze(-1)).squeeze(-1)
        here_BC = rollout.unmask_step == step_B1
        ratio_BC = (logp_BC - rollout.logp).exp()
        clipped_BC = ratio_BC.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
        loss_BC = -torch.minimum(ratio_BC * advantage_B1, clipped_BC * advantage_B1)
        loss = (loss_BC * here_BC).sum() / (B * k)
        loss.backward()
        total += float(loss.detach())
        scored += [(b, int(step_B1[b]), logp_BC[b, here_BC[b]].detach()) for b in range(B)]
    return total, scored


def _top_k(logits_BWV: torch.Tensor, k: int) -> torch.Tensor:
    kth_BW1 = logits_BWV.topk(min(k, logits_BWV.shape[-1]), dim=-1).values[..., -1:]
    return logits_BWV.masked_fill(logits_BWV < kth_BW1, -torch.inf)


def _top_p(logits_BWV: torch.Tensor, p: float) -> torch.Tensor:
    """Drops every token whose inclusive cumulative mass passes p, except the first (the product's rule)."""
    sorted_BWV, ids_BWV = logits_BWV.sort(dim=-1, descending=True, stable=True)
    beyond_BWV = torch.softmax(sorted_BWV, dim=-1).cumsum(-1) > p
    beyond_BWV[..., 0] = False
    return logits_BWV.masked_fill(torch.zeros_like(beyond_BWV).scatter(-1, ids_BWV, beyond_BWV), -torch.inf)
