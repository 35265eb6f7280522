"""Groups of trajectories from a head: what the engines have in common.

Shapes: G completions of a group, C completion positions, Q prompts, K thresholds, N completions of all groups.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rewards.errors import ConfigError
from rollout.models.family import PolicyAdapter
from rollout.models.prompt_head import draw_thresholds
from rollout.sampling.denoise import Completion, Request, Tokens, denoise
from rollout.sampling.head import Head
from rollout.seeds import derive_seed
from rollout.spans import Gap, places
from rollout.trajectory import BranchSpec, GroupSpec, SamplerSpec, TrajectoryGroup

OnCompletion = Callable[[int, int, np.ndarray, np.ndarray | None], None]
"""See ``draw_groups``."""


def draw_groups(
    head: Head,
    family: PolicyAdapter,
    groups: Sequence[GroupSpec],
    prompts: Sequence[Sequence[int]],
    sampler: SamplerSpec,
    *,
    held: tuple[int, str],
    max_rows: int,
    gaps: Sequence[Sequence[Gap]] | None = None,
    branches: BranchSpec | None = None,
    on_completion: OnCompletion | None = None,
    on_step: Callable[[int, np.ndarray, np.ndarray], None] | None = None,
    threshold_law: Callable[[Sequence[Sequence[int]]], torch.Tensor] | None = None,
) -> list[TrajectoryGroup]:
    """Draw all completions of the groups; temperature 0 decodes greedily (evaluation only).

    Args:
        prompts: token ids of each group's prompt.
        gaps: where each group's prompt has gaps for its completions; None, or an empty one: they follow it.
        held: version and digest of the adapter that the head draws with.
        max_rows: completions denoised together.
        branches: which states of the completions are branched.
        on_completion: called with (group index, completion index, ids [1 + F, C] int32, places [C] or None) as soon as
            one is finished: its own, and those of its branches' F fills in their order, states that it never reached
            left out; places as in ``TrajectoryGroup``.
        on_step: as ``denoise`` calls it, completions counted through all groups.
        threshold_law: log-probs [Q, K] of the sampler's thresholds for each prompt; None for an engine without a law.

    Returns:
        Groups in request order, without rewards (R = 0) and with verdicts false: grading is the caller's.
    """
    gaps = gaps or [()] * len(groups)
    # With shifted logits a sequence's first token would be read off the row before it.
    starts = [its[0].before if its else len(prompt) for prompt, its in zip(prompts, gaps, strict=True)]
    if any(start < family.logit_shift for start in starts):
        raise ConfigError(
            f"models of the family {family.family} read a token off the position before it, and a completion here has "
            "none before it; begin the text with something that stands"
        )
    place = [(g, row) for g, group in enumerate(groups) for row in range(group.size)]
    keys = [derive_seed(groups[g].seed, row) for g, row in place]
    drawn_with, thresholds = sampler, None
    if isinstance(sampler.threshold, tuple):
        if any(gaps):
            raise ConfigError("several thresholds (rollout.sampler.threshold) are for prompts without gaps; give one")
        if threshold_law is None:
            raise ConfigError("this engine draws with one threshold; several (rollout.sampler.threshold) take torch's")
        law_NK = threshold_law(prompts)[[g for g, _ in place]]
        thresholds = draw_thresholds(sampler.threshold, law_NK, keys, greedy=sampler.temperature == 0)
        drawn_with = replace(sampler, threshold=max(sampler.threshold))  # each request has its own
    own: list[float | None] = [None] * len(keys) if thresholds is None else thresholds.value_N.tolist()
    requests = [
        Request(
            prompts[g],
            key,
            its,
            places(gaps[g], sampler.block_length, sampler.completion_length, key) if gaps[g] else None,
        )
        for (g, _), key, its in zip(place, keys, own, strict=True)
    ]

    def finished(index: int, completion: Completion) -> None:
        if on_completion:
            fills = [] if completion.branches is None else [completion.branches.found_ids]
            on_completion(*place[index], np.concatenate([completion.ids[None], *fills]), requests[index].place_C)

    completions = denoise(
        head,
        requests,
        drawn_with,
        Tokens(family.mask_token_id, (family.eos_token_id,), family.pad_token_id),
        max_rows=max_rows,
        branches=branches,
        on_completion=finished,
        on_step=on_step,
    )
    drawn, asked = iter(completions), iter(requests)
    found = [
        _group(group, [next(asked) for _ in range(group.size)], [next(drawn) for _ in range(group.size)], sampler, held)
        for group in groups
    ]
    if thresholds is None:
        return found
    ends = np.cumsum([group.size for group in groups])[:-1]
    of_groups = zip(found, *(np.split(array_N, ends) for array_N in thresholds), strict=True)
    return [replace(group, threshold=value_G, threshold_logp=logp_G) for group, value_G, logp_G in of_groups]


def _group(
    spec: GroupSpec,
    requests: list[Request],
    completions: list[Completion],
    sampler: SamplerSpec,
    held: tuple[int, str],
) -> TrajectoryGroup:
    indptr = ids = None
    if sampler.truncates:
        cells = [kept for c in completions for kept in c.support or []]
        indptr = np.concatenate([[0], np.cumsum([len(kept) for kept in cells])]).astype(np.int64)
        ids = np.concatenate(cells).astype(np.int32)
    names = ["unmask_step", "unmask_rank", "drawn", "logp", "logp_raw", "entropy"]
    if sampler.scores_positions:
        names += ["position_logp", "position_entropy"]
    arrays: dict[str, Any] = {name: np.stack([getattr(c, name) for c in completions]) for name in names}
    if branches := [c.branches for c in completions if c.branches is not None]:
        kept = [name for name in ("step", "ids", "logp") if getattr(branches[0], name) is not None]
        arrays |= {f"branch_{name}": np.stack([getattr(b, name) for b in branches]) for name in kept}
        shape = arrays["branch_ids"].shape[:3]
        arrays |= {"branch_rewards": np.zeros((*shape, 0), np.float32), "branch_correct": np.zeros(shape, bool)}
    places_GC = [request.place_C for request in requests if request.place_C is not None]
    return TrajectoryGroup(
        group_id=spec.group_id,
        problem_id=spec.problem.id,
        prompt_ids=np.asarray(requests[0].prompt_ids, dtype=np.int32),
        completion_ids=np.stack([c.ids for c in completions]),
        **arrays,
        support_indptr=indptr,
        support_ids=ids,
        rewards=np.zeros((spec.size, 0), np.float32),
        reward_names=(),
        correct=np.zeros(spec.size, bool),
        policy_version=held[0],
        adapter_digest=held[1],
        sampler=sampler,
        seed=spec.seed,
        nfe=np.array([c.nfe for c in completions], np.int32),
        places=np.stack(places_GC) if places_GC else None,
    )
