"""A denoiser of free logits for tests of methods that score states of the rollout: one table for each state of prompt
and completion. EOS, mask and sizes are those of ``one_step_tables``."""

import numpy as np
import torch

from learner.likelihood.views import ViewBatch
from rollout.trajectory import TrajectoryGroup
from tests.support.hand_made import make_group
from tests.support.one_step_tables import EOS, MASK, C, Denoiser, P, V

ROWS = 4001
"""A prime: states of prompt and completion share these rows out, and which share one hardly matters."""


def walked_group(texts, orders, *, steps: int = C, block_length: int = C, rewards=None, **fields) -> TrajectoryGroup:
    """Completions of C positions that end in EOS, and the step at which each position was written."""
    ids = [text + [EOS] * (C - len(text)) for text in texts]
    rewards_GR = None if rewards is None else [[r] for r in rewards]
    return make_group(ids, orders, steps=steps, block_length=block_length, rewards=rewards_GR, **fields)


def state_table(seed: int = 0, *, gradient: bool = True) -> torch.Tensor:
    """[rows, C, V] float64."""
    return torch.tensor(np.random.default_rng(seed).normal(size=(ROWS, C, V)), requires_grad=gradient)


def state_logp(theta: torch.Tensor, batch: ViewBatch) -> torch.Tensor:
    prompts_Z = (batch.input_ids[:, -C - P : -C] == MASK) @ 2 ** np.arange(P)
    states_Z = prompts_Z + 2**P * (batch.input_ids[:, -C:] @ (V + 1) ** np.arange(C))
    rows_N = torch.from_numpy(states_Z[batch.view_of_score] % ROWS)
    return theta[rows_N, batch.position].log_softmax(-1)[torch.arange(len(rows_N)), batch.targets]


STATE_TABLES = Denoiser(state_table, state_logp)


def path_logp(theta: torch.Tensor, group: TrajectoryGroup, row: int, hidden_P: np.ndarray | None = None):
    """[C], each token's log-prob in the state in which it was written, from the recorded steps alone."""
    prompt = 0 if hidden_P is None else int(hidden_P @ 2 ** np.arange(P))
    steps, ids = group.unmask_step[row].astype(int), group.completion_ids[row].astype(int)
    found = []
    for j in range(C):
        shown = [MASK if steps[i] >= steps[j] else int(ids[i]) for i in range(C)]
        state = prompt + 2**P * sum(token * (V + 1) ** i for i, token in enumerate(shown))
        found.append(theta[state % ROWS, j].log_softmax(-1)[ids[j]])
    return torch.stack(found)
