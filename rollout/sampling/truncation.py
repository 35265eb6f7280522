"""The law that a token is drawn from: mask token out, temperature, top-k, top-p, in this order.

Shapes: N positions, V vocabulary, K the most tokens kept at any of the positions.

Tie rules (official AGRPO, section 1.2 of the specification): tokens that tie with the k-th logit all survive; top-p
drops every token whose *inclusive* cumulative mass passes top_p, except the first. That is stricter than the rule of
transformers, which keeps the token that crosses the threshold. Equal logits are ordered by token id.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Law:
    """Distributions over the kept tokens of N positions.

    ``ids_NK`` is None when all tokens are kept (then K = V and column = token id). Padding columns have log-prob -inf.
    """

    logp_NK: torch.Tensor
    """[N, K] float32, normalised over the kept tokens."""
    ids_NK: torch.Tensor | None
    """[N, K] int64 token ids."""

    def support(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[N] int64, how many tokens each position keeps, and their ids, int64, ascending, position after position."""
        kept_NK = self.logp_NK > -torch.inf
        count_N = kept_NK.sum(-1)
        ids_NK = torch.arange(kept_NK.shape[1], device=kept_NK.device) if self.ids_NK is None else self.ids_NK
        last = torch.iinfo(torch.int64).max
        sorted_NK = ids_NK.expand_as(kept_NK).masked_fill(~kept_NK, last).sort(-1).values
        return count_N, sorted_NK[sorted_NK < last]

    def entropy(self) -> torch.Tensor:
        """[N] float32, in nats."""
        return -(self.logp_NK.exp() * self.logp_NK.masked_fill(self.logp_NK == -torch.inf, 0.0)).sum(-1)


def without_mask(logits_NV: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """A copy of the logits in fp32 in which the mask token can't be drawn, [N, V]."""
    logits_NV = logits_NV.to(torch.float32, copy=True)
    logits_NV[:, mask_token_id] = -torch.inf
    return logits_NV


def truncate(logits_NV: torch.Tensor, *, top_k: int | None, top_p: float) -> Law:
    """Apply top-k, then top-p to tempered logits, and normalise."""
    if (top_k is None or top_k >= logits_NV.shape[-1]) and top_p >= 1.0:
        return Law(torch.log_softmax(logits_NV, dim=-1), None)
    if top_k is None:
        total_N1 = logits_NV.logsumexp(-1, keepdim=True)
        values_NK, ids_NK = _descending(logits_NV, _head_size(logits_NV, total_N1, top_p))
    else:
        values_NK, ids_NK = _top_k(logits_NV, min(top_k, logits_NV.shape[-1]))
        total_N1 = values_NK.logsumexp(-1, keepdim=True)
    if top_p < 1.0:
        mass_NK = (values_NK - total_N1).exp().cumsum(-1)
        beyond_NK = mass_NK > top_p
        beyond_NK[:, 0] = False
        values_NK = values_NK.masked_fill(beyond_NK, -torch.inf)
    widest = int((values_NK > -torch.inf).sum(-1).max())
    return Law(torch.log_softmax(values_NK[:, :widest], dim=-1), ids_NK[:, :widest])


def _top_k(logits_NV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All logits from the k-th largest up, as ``_descending`` gives them; smaller ones of other rows are -inf."""
    largest = logits_NV.topk(k, dim=-1)
    kth_N1 = largest.values[:, -1:]
    size = int((logits_NV >= kth_N1).sum(-1).max())
    values_NK, ids_NK = _descending(logits_NV, size, largest.indices if size == k else None)
    return values_NK.masked_fill(values_NK < kth_N1, -torch.inf), ids_NK


def _head_size(logits_NV: torch.Tensor, total_N1: torch.Tensor, top_p: float) -> int:
    """How many of the largest logits surely contain all that top-p keeps."""
    V = logits_NV.shape[-1]
    size = min(V, 256)
    while size < V:
        mass_N = (logits_NV.topk(size, dim=-1).values - total_N1).exp().sum(-1)
        # Rounding may put the sorted cumulative sum on either side of the threshold: keep a margin.
        if bool((mass_N > top_p + 1e-4).all()):
            return size
        size = min(V, size * 4)
    return V


def _descending(
    logits_NV: torch.Tensor, size: int, among_NK: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``size`` largest logits and their ids, descending, equal ones by ascending id. ``among_NK``: the same ids in
    any order, where they are known."""
    if size == logits_NV.shape[-1]:
        return logits_NV.sort(dim=-1, descending=True, stable=True)
    if among_NK is None:
        among_NK = logits_NV.topk(size, dim=-1).indices
    ids_NK = among_NK.sort(dim=-1).values
    values_NK, order_NK = logits_NV.gather(-1, ids_NK).sort(dim=-1, descending=True, stable=True)
    return values_NK, ids_NK.gather(-1, order_NK)
