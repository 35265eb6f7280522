"""How natural a text is to a masked language model: the log-likelihood of each token given all others.

Their sum is the pseudo-log-likelihood (Salazar et al. 2020, https://doi.org/10.18653/v1/2020.acl-main.240). It is no
likelihood of the text: no order of writing has it. It compares texts of the same length under one model.

Shapes: P prompt tokens, c tokens written, R rows of a forward, L tokens of the text, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch

from learner.likelihood.scorer import restricted_logp
from rollout.models.encoding import EncodedPrompt
from rollout.models.family import PolicyAdapter


def pseudo_logp(
    model: torch.nn.Module,
    family: PolicyAdapter,
    prompt: EncodedPrompt,
    contents: Sequence[Sequence[int]],
    *,
    rows: int = 32,
) -> np.ndarray:
    """[c] float64, in nats: the log-prob of each written token where it alone is masked, of all tokens but the mask.

    Args:
        prompt: what stands around.
        contents: token ids of each of its gaps, in reading order; of a prompt without gaps, the completion's alone.
        rows: texts that share a forward.
    """
    ids_L, written_c = _text(prompt, contents)
    device = next(model.parameters()).device
    found = [np.zeros(0)]
    for at_R in np.split(written_c, range(rows, written_c.size, rows)) if written_c.size else ():
        ids_RL = np.repeat(ids_L[None], at_R.size, axis=0)
        ids_RL[np.arange(at_R.size), at_R] = family.mask_token_id
        logit_rows = torch.from_numpy(np.arange(at_R.size) * ids_L.size + at_R - family.logit_shift)
        with torch.inference_mode():
            logits_RV = model(
                input_ids=torch.from_numpy(ids_RL).to(device), attention_mask=None, logit_rows=logit_rows.to(device)
            ).logits
            targets_R = torch.from_numpy(ids_L[at_R]).to(device)
            scores = restricted_logp(logits_RV, targets_R, None, temperature=1.0, mask_token_id=family.mask_token_id)
        found.append(scores.logp_N.double().cpu().numpy())
    return np.concatenate(found)


def _text(prompt: EncodedPrompt, contents: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """([L] int64 token ids, [c] int64 where the written ones stand)."""
    starts = [gap.before for gap in prompt.gaps] or [len(prompt.ids)]
    ids: list[int] = []
    written: list[int] = []
    done = 0
    for start, content in zip(starts, contents, strict=True):
        ids += prompt.ids[done:start]
        written += range(len(ids), len(ids) + len(content))
        ids += content
        done = start
    return np.array(ids + prompt.ids[done:], np.int64), np.array(written, np.int64)
