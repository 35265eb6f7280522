"""Log-probs of stored tokens, and of stored choices of positions, under the current policy.

The trunk runs over whole sequences; the final norm and the LM head run inside the model's forward on the N scored rows
alone (ZeRO-3 gathers parameters only inside a module's forward), or on the M candidates, which hold the scored ones,
where a choice of positions is scored.

Shapes: Z views and N scored positions of one forward, M candidate positions, V vocabulary, K the largest recorded
support among them, or the most candidates of a view.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from learner.likelihood.views import PositionChoices, ViewBatch
from rollout.copies import in_one_copy
from rollout.models.family import PolicyAdapter
from rollout.sampling.positions import choice_logp, log_confidence
from rollout.sampling.truncation import without_mask


@dataclass(frozen=True)
class Scores:
    """What one forward says about the scored tokens."""

    logp_N: torch.Tensor
    """[N] float32, log-prob under the batch's law, on the recorded support where it has one; carries the gradient."""
    mass_N: torch.Tensor
    """[N] float32, no gradient: mass of the untruncated law on the recorded support (1 without one)."""
    choice_logp_Z: torch.Tensor | None = None
    """[Z] float32, log-prob of each view's choice of positions, 0 where there was none; carries the gradient. None
    where the choice is no action of the policy."""
    law_NV: torch.Tensor | None = None
    """[N, V] float32, log-probs of all tokens under the untruncated law, -inf for the mask token; carries the gradient.
    None where nobody asked for them."""
    value_Z: torch.Tensor | None = None
    """[Z] float32, what the method's head says of each view's prompt, or the log-prob that it gives the completion's
    threshold; carries the head's gradient, none of the policy's. None without such a head, and for other weights than
    the current ones."""
    value_N: torch.Tensor | None = None
    """[N] float32, what the method's head says of each scored token; carries the head's gradient, none of the policy's.
    None without a head of tokens."""

    def at(self, at_n: torch.Tensor) -> "Scores":
        """Of these scores alone, [n] int64, without choices of positions."""
        assert self.choice_logp_Z is None
        law_NV, value_N = (None if found is None else found[at_n] for found in (self.law_NV, self.value_N))
        return Scores(self.logp_N[at_n], self.mass_N[at_n], law_NV=law_NV, value_N=value_N)

    def detached(self) -> "Scores":
        """The same numbers without gradient."""
        choices, law, values = (
            None if found is None else found.detach() for found in (self.choice_logp_Z, self.law_NV, self.value_N)
        )
        return Scores(self.logp_N.detach(), self.mass_N, choices, law, value_N=values)


class PolicyScores(NamedTuple):
    """The same views under each set of weights that a method compares."""

    policy: Scores
    """Of the current weights; carries the gradient."""
    old: Scores | None = None
    """Of the weights that the batch's first update began with."""
    reference: Scores | None = None
    """Of the base without adapter."""
    teacher: Scores | None = None
    """Of the weights that the method's phase began with."""

    def at(self, at_n: torch.Tensor) -> "PolicyScores":
        """Of these scores alone, [n] int64; of the raw law."""
        old, reference, teacher = (None if scores is None else scores.at(at_n) for scores in self[1:])
        return PolicyScores(self.policy.at(at_n), old, reference, teacher)


def joined(parts: Sequence[Scores]) -> Scores:
    """The scores of several passes as those of one."""
    if len(parts) == 1:
        return parts[0]
    choices = [part.choice_logp_Z for part in parts if part.choice_logp_Z is not None]
    assert all(part.law_NV is None and part.value_N is None for part in parts), "these are scored in units of one view"
    return Scores(
        torch.cat([part.logp_N for part in parts]),
        torch.cat([part.mass_N for part in parts]),
        torch.cat(choices) if choices else None,
    )


def score(model: torch.nn.Module, batch: ViewBatch, *, family: PolicyAdapter, vocabulary: bool = False) -> Scores:
    """Score one forward's views with ``model``, whose device the tensors are moved to.

    Args:
        vocabulary: the log-probs of all tokens at the scored positions are wanted too.
    """
    choices = batch.choices
    rows = batch.score_rows if choices is None else choices.candidate_rows
    # With shifted logits a sequence's first token would be read off the row before it.
    assert (rows % batch.input_ids.shape[1] >= family.logit_shift).all(), "a completion without a prompt"
    input_ids, mask, logit_rows, targets_N, support_NK, of_score_N = in_one_copy(
        next(model.parameters()).device,
        batch.input_ids,
        batch.attention_mask,
        rows - family.logit_shift,
        batch.targets,
        None if batch.support is None else padded_support(*batch.support),
        None if choices is None else choices.candidate_of_score,
    )
    logits_MV = model(
        input_ids=input_ids,
        attention_mask=None if mask is None else mask.bool(),
        logit_rows=logit_rows,
    ).logits
    assert choices is None or not vocabulary, "whole laws and choices of positions are not scored together"
    scores = restricted_logp(
        logits_MV if choices is None else logits_MV[of_score_N],
        targets_N,
        support_NK,
        temperature=batch.temperature,
        mask_token_id=family.mask_token_id,
        vocabulary=vocabulary,
    )
    if choices is None:
        return scores
    choice_logp_Z = position_choice_logp(logits_MV, choices, batch.view_of_score, mask_token_id=family.mask_token_id)
    return dataclasses.replace(scores, choice_logp_Z=choice_logp_Z)


def position_choice_logp(
    logits_MV: torch.Tensor, choices: PositionChoices, view_of_score: np.ndarray, *, mask_token_id: int
) -> torch.Tensor:
    """Log-prob of each view's choice of positions, [Z] float32, from the logits of all candidates."""
    device = logits_MV.device
    confidence_M = log_confidence(without_mask(logits_MV, mask_token_id), choices.confidence_temperature)
    scores_M = confidence_M.double() / choices.temperature
    logp_Z = torch.zeros(choices.free.size, dtype=torch.float64, device=device)
    sizes_Z = np.bincount(view_of_score, minlength=choices.free.size)
    for n in np.unique(sizes_Z[choices.free]):
        views_S = np.flatnonzero(choices.free & (sizes_Z == n))
        of_M = np.flatnonzero(np.isin(choices.view_of_candidate, views_S))
        row_M = np.searchsorted(views_S, choices.view_of_candidate[of_M])
        column_M = np.arange(of_M.size) - np.searchsorted(row_M, row_M)
        shape = (views_S.size, int(column_M.max()) + 1)
        at_M = (torch.from_numpy(row_M).to(device), torch.from_numpy(column_M).to(device))
        scores_SK = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)
        scores_SK = scores_SK.index_put(at_M, scores_M[torch.from_numpy(of_M).to(device)])
        of_score = np.flatnonzero(np.isin(view_of_score, views_S))
        chosen = column_M[np.searchsorted(of_M, choices.candidate_of_score[of_score])].reshape(-1, n)
        order_Sn = np.take_along_axis(chosen, choices.rank[of_score].reshape(-1, n).argsort(axis=1), axis=1)
        chosen_logp_S = choice_logp(scores_SK, torch.from_numpy(order_Sn).to(device))
        logp_Z = logp_Z.index_put((torch.from_numpy(views_S).to(device),), chosen_logp_S)
    return logp_Z.float()


def restricted_logp(
    logits_NV: torch.Tensor,
    targets_N: torch.Tensor,
    support_NK: torch.Tensor | None,
    *,
    temperature: float,
    mask_token_id: int | None,
    vocabulary: bool = False,
) -> Scores:
    """Log-probs under softmax(logits / temperature) without the mask token, restricted to the recorded support.

    Args:
        support_NK: int64, the tokens kept when the target was drawn, -1 where a row has no more (``padded_support``);
            never recomputed, since a token could fall outside the support of slightly different logits. None when
            nothing was truncated.
        mask_token_id: excluded from the law; None for a law that could draw it (recorded cases of other code).
        vocabulary: the whole law is wanted too; it must not be truncated.
    """
    scaled_NV = logits_NV.float() / temperature
    if mask_token_id is not None:
        excluded_V = torch.arange(scaled_NV.shape[1], device=scaled_NV.device) == mask_token_id
        scaled_NV = scaled_NV.masked_fill(excluded_V, -torch.inf)
    target_N = scaled_NV.gather(1, targets_N.unsqueeze(1)).squeeze(1)
    if support_NK is None:
        total_N = scaled_NV.logsumexp(1)
        law_NV = scaled_NV - total_N.unsqueeze(1) if vocabulary else None
        return Scores(target_N - total_N, torch.ones_like(target_N), law_NV=law_NV)
    assert not vocabulary, "whole laws are of the untruncated law"
    inside_N = scaled_NV.gather(1, support_NK.clamp(min=0)).masked_fill(support_NK < 0, -torch.inf).logsumexp(1)
    with torch.no_grad():
        mass_N = (inside_N - scaled_NV.logsumexp(1)).exp()
    return Scores(target_N - inside_N, mass_N)


def padded_support(indptr: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """CSR rows (indptr [N+1], ids [nnz]) as a rectangle: [N, K] int64, -1 where a row has no more."""
    counts_N = np.diff(indptr)
    kept_NK = np.arange(counts_N.max(initial=1)) < counts_N[:, None]
    ids_NK = np.full(kept_NK.shape, -1, np.int64)
    ids_NK[kept_NK] = ids
    return ids_NK
