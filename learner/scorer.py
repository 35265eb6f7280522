"""Log-probs of stored tokens under the current policy, at the scored positions only.

The trunk runs over whole sequences; the final norm and the LM head run inside the model's forward on the N scored rows
alone (ZeRO-3 gathers parameters only inside a module's forward).

Shapes: N scored positions of one forward, V vocabulary, K the largest recorded support among them.
"""

from dataclasses import dataclass

import numpy as np
import torch

from learner.views import ViewBatch
from rollout.models import PolicyAdapter


@dataclass(frozen=True)
class Scores:
    """What one forward says about the scored tokens."""

    logp_N: torch.Tensor
    """[N] float32, log-prob under the tempered law restricted to the recorded support; carries the gradient."""
    mass_N: torch.Tensor
    """[N] float32, no gradient: mass of the tempered, untruncated law on the recorded support (1 without one)."""


def score(model: torch.nn.Module, batch: ViewBatch, *, family: PolicyAdapter, temperature: float) -> Scores:
    """Score one forward's views with ``model``, whose device the tensors are moved to."""
    device = next(model.parameters()).device
    mask = None if batch.attention_mask is None else torch.from_numpy(batch.attention_mask).to(device)
    rows_N = torch.from_numpy(batch.score_rows - family.logit_shift).to(device)
    logits_NV = model(
        input_ids=torch.from_numpy(batch.input_ids).to(device), attention_mask=mask, logit_rows=rows_N
    ).logits
    targets_N = torch.from_numpy(batch.targets).to(device)
    return restricted_logp(
        logits_NV, targets_N, batch.support, temperature=temperature, mask_token_id=family.mask_token_id
    )


def restricted_logp(
    logits_NV: torch.Tensor,
    targets_N: torch.Tensor,
    support: tuple[np.ndarray, np.ndarray] | None,
    *,
    temperature: float,
    mask_token_id: int | None,
) -> Scores:
    """Log-probs under softmax(logits / temperature) without the mask token, restricted to the recorded support.

    Args:
        support: CSR (indptr [N+1], ids [nnz]) of the tokens kept when the target was drawn; never recomputed, since a
            token could fall outside the support of slightly different logits. None when nothing was truncated.
        mask_token_id: excluded from the law; None for a law that could draw it (recorded cases of other code).
    """
    scaled_NV = logits_NV.float() / temperature
    if mask_token_id is not None:
        excluded = torch.tensor([mask_token_id], device=scaled_NV.device)
        scaled_NV = scaled_NV.index_fill(1, excluded, -torch.inf)
    target_N = scaled_NV.gather(1, targets_N.unsqueeze(1)).squeeze(1)
    if support is None:
        return Scores(target_N - scaled_NV.logsumexp(1), torch.ones_like(target_N))
    ids_NK, kept_NK = (t.to(scaled_NV.device) for t in _padded(*support))
    inside_N = scaled_NV.gather(1, ids_NK).masked_fill(~kept_NK, -torch.inf).logsumexp(1)
    with torch.no_grad():
        mass_N = (inside_N - scaled_NV.logsumexp(1)).exp()
    return Scores(target_N - inside_N, mass_N)


def _padded(indptr: np.ndarray, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """CSR rows as a rectangle: ids [N, K] int64 (0 in the padding) and which cells are real [N, K] bool."""
    counts_N = np.diff(indptr)
    kept_NK = np.arange(counts_N.max()) < counts_N[:, None]
    ids_NK = np.zeros(kept_NK.shape, np.int64)
    ids_NK[kept_NK] = ids
    return torch.from_numpy(ids_NK), torch.from_numpy(kept_NK)
