"""Decoupled confidence: a law for the choice of positions that can be scored exactly.

A step that reveals n positions draws them one after the other, without replacement, from the masked positions of the
block, with weights c_i^(1/tau). c_i is the largest probability of position i's untruncated law: unlike the probability
of a drawn token it doesn't depend on what will be drawn, so the tokens are independent of the choice given the state.
Drawing without replacement is taking the n largest of log(c_i)/tau plus Gumbel noise.

The same functions serve the rollout, which records, and the learner, which differentiates; all in float64, since a
small tau magnifies rounding.

Shapes: N positions, V vocabulary, S steps (of any rows) that reveal n positions each, K the most candidates of any.
"""

import itertools

import torch

SET_UP_TO = 4
"""Up to this many positions a step the action is the set that was chosen (a sum over n! orders), above it the order."""


def log_confidence(logits_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    """[N] log of the largest probability at this temperature, of logits without the mask token (-inf there).

    Its gradient goes through the most probable token.
    """
    scaled_NV = logits_NV if temperature == 1.0 else logits_NV / temperature
    return scaled_NV.max(dim=-1).values - scaled_NV.logsumexp(dim=-1)


def choice_logp(scores_SK: torch.Tensor, chosen_Sn: torch.Tensor) -> torch.Tensor:
    """Log-prob of the positions that a step chose, [S] float64.

    Args:
        scores_SK: log(c)/tau of the candidates, float64, padded with -inf.
        chosen_Sn: columns of the chosen ones in the order of choice, int64; each row leaves at least one candidate.
    """
    n = chosen_Sn.shape[1]
    left_S1 = scores_SK.scatter(1, chosen_Sn, -torch.inf).logsumexp(1, keepdim=True)
    chosen_scores_Sn = scores_SK.gather(1, chosen_Sn)
    orders = torch.tensor(list(itertools.permutations(range(n)) if n <= SET_UP_TO else [range(n)]))
    picks_SOn = chosen_scores_Sn[:, orders.to(scores_SK.device)]
    left_SO1 = left_S1.unsqueeze(1).expand(-1, len(orders), -1)
    # What is still there at each pick: the positions never chosen, and those picked from here on.
    there_SOn = torch.cat([left_SO1, picks_SOn.flip(-1)], dim=-1).logcumsumexp(-1)[..., 1:].flip(-1)
    return (picks_SOn - there_SOn).sum(-1).logsumexp(-1)


def choice_entropy(scores_SK: torch.Tensor, chosen_Sn: torch.Tensor) -> torch.Tensor:
    """Sum over the picks of the entropy of the law that each was drawn from, given the picks before it, [S] float64.

    Its expectation is the entropy of the ordered choice. It only serves to propose steps to score, which may be done by
    any law.
    """
    entropy_S = torch.zeros(scores_SK.shape[0], dtype=scores_SK.dtype, device=scores_SK.device)
    for pick in range(chosen_Sn.shape[1]):
        logp_SK = scores_SK.scatter(1, chosen_Sn[:, :pick], -torch.inf).log_softmax(1)
        entropy_S = entropy_S - (logp_SK.exp() * logp_SK.masked_fill(logp_SK == -torch.inf, 0.0)).sum(1)
    return entropy_S
