"""The scorer: its law against a dense one, and replay parity, that is the rollout's log-probs found again.

Shapes: N scored positions, V vocabulary.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from learner.likelihood.scorer import padded_support, restricted_logp, score
from learner.likelihood.views import ViewBatch, build_batch
from learner.verification.parity import recorded_states
from rewards.task import Problem
from rollout.adapters import adapter_parameters, digest, load_state, pack
from rollout.engines.torch import TorchEngine
from rollout.models.family import policy_adapter
from rollout.models.loading import load_model
from rollout.models.lora import LoraSpec, attach_lora
from rollout.sampling.denoise import POSITION_RULES
from rollout.sampling.truncation import truncate, without_mask
from rollout.trajectory import GroupSpec, SamplerSpec, TrajectoryGroup
from tests.support.hand_made import acting_adapter

N, V, MASK = 9, 40, 7
LORA = LoraSpec(r=4, alpha=8.0)
TRUNCATIONS = {
    "whole": {},
    "top_k": {"top_k": 20},
    "top_p": {"top_p": 0.95},
    "both": {"top_k": 20, "top_p": 0.95},
}


@pytest.fixture
def logits() -> torch.Tensor:
    return 3 * torch.randn(N, V, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def support() -> tuple[np.ndarray, np.ndarray]:
    """Rows keep 1 to 9 tokens, never the mask token; ascending, as they are stored."""
    rng = np.random.default_rng(1)
    others = np.delete(np.arange(V), MASK)
    kept = [np.sort(rng.choice(others, size, replace=False)) for size in range(1, N + 1)]
    return np.concatenate([[0], np.cumsum([ids.size for ids in kept])]), np.concatenate(kept)


def targets_of(support) -> torch.Tensor:
    indptr, ids = support
    return torch.from_numpy(ids[indptr[1:] - 1].astype(np.int64))


def dense_logp(logits_NV, targets_N, kept_NV, temperature):
    """The law spelled out: every token that isn't kept has no mass."""
    law_NV = (logits_NV / temperature).masked_fill(~kept_NV, -torch.inf).log_softmax(1)
    return law_NV[torch.arange(len(targets_N)), targets_N]


def padded(support) -> torch.Tensor:
    return torch.from_numpy(padded_support(*support))


def kept_mask(support) -> torch.Tensor:
    indptr, ids = support
    kept_NV = torch.zeros(N, V, dtype=torch.bool)
    kept_NV[np.repeat(np.arange(N), np.diff(indptr)), ids] = True
    return kept_NV


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_restricted_law_and_gradient_match_the_dense_ones(logits, support, temperature):
    targets = targets_of(support)
    factors = torch.linspace(-1, 2, N)
    ours, dense = logits.clone().requires_grad_(), logits.double().requires_grad_()
    scores = restricted_logp(ours, targets, padded(support), temperature=temperature, mask_token_id=MASK)
    expected = dense_logp(dense, targets, kept_mask(support), temperature)
    torch.testing.assert_close(scores.logp_N, expected.float(), atol=2e-6, rtol=1e-6)
    (scores.logp_N * factors).sum().backward()
    (expected * factors.double()).sum().backward()
    torch.testing.assert_close(ours.grad, dense.grad.float(), atol=1e-6, rtol=1e-5)
    assert (ours.grad[~kept_mask(support)] == 0).all(), "padding of short rows, or a dropped token, got a gradient"
    assert scores.logp_N[0] == 0, "a support of one token leaves nothing to chance"


def test_without_a_support_all_tokens_but_the_mask_count(logits):
    targets = torch.arange(N) + 10
    everything = torch.ones(N, V, dtype=torch.bool)
    everything[:, MASK] = False
    ours = logits.clone().requires_grad_()
    scores = restricted_logp(ours, targets, None, temperature=0.8, mask_token_id=MASK)
    torch.testing.assert_close(scores.logp_N, dense_logp(logits, targets, everything, 0.8))
    assert (scores.mass_N == 1).all()
    scores.logp_N.sum().backward()
    assert (ours.grad[:, MASK] == 0).all() and ours.grad.isfinite().all()
    everything[:, MASK] = True
    with_mask = restricted_logp(logits, targets, None, temperature=0.8, mask_token_id=None)
    torch.testing.assert_close(with_mask.logp_N, dense_logp(logits, targets, everything, 0.8))
    assert (with_mask.logp_N < scores.logp_N - 1e-3).any(), "control: the mask token has mass of its own"


def test_a_mask_token_that_the_model_is_sure_of_changes_nothing(logits, support):
    targets = targets_of(support)
    sure = logits.clone()
    sure[:, MASK] = 80.0
    for kept in (None, padded(support)):
        plain = restricted_logp(logits, targets, kept, temperature=1.0, mask_token_id=MASK)
        ours = restricted_logp(sure, targets, kept, temperature=1.0, mask_token_id=MASK)
        torch.testing.assert_close(ours.logp_N, plain.logp_N, atol=0, rtol=0)
        torch.testing.assert_close(ours.mass_N, plain.mass_N, atol=0, rtol=0)


def test_mass_is_what_the_untruncated_law_gives_the_support(logits, support):
    logits.requires_grad_()
    scores = restricted_logp(logits, targets_of(support), padded(support), temperature=0.7, mask_token_id=MASK)
    law = without_mask(logits.detach(), MASK).div(0.7).softmax(1)
    torch.testing.assert_close(scores.mass_N, (law * kept_mask(support)).sum(1), atol=1e-6, rtol=0)
    assert not scores.mass_N.requires_grad and scores.logp_N.requires_grad


def test_half_precision_logits_are_scored_in_float32(logits, support):
    half = logits.bfloat16()
    scores = restricted_logp(half, targets_of(support), padded(support), temperature=0.7, mask_token_id=MASK)
    assert scores.logp_N.dtype == scores.mass_N.dtype == torch.float32
    exact = restricted_logp(half.float(), targets_of(support), padded(support), temperature=0.7, mask_token_id=MASK)
    torch.testing.assert_close(scores.logp_N, exact.logp_N, atol=0, rtol=0)


def test_logits_of_any_size_stay_finite(support):
    logits = torch.full((N, V), -1e4)
    logits[:, 3] = 1e4
    logits.requires_grad_()
    scores = restricted_logp(logits, targets_of(support), padded(support), temperature=0.5, mask_token_id=MASK)
    scores.logp_N.sum().backward()
    assert scores.logp_N.isfinite().all() and logits.grad.isfinite().all()


# ---- replay parity


@pytest.fixture(scope="module")
def engine(tiny_model) -> TorchEngine:
    """Holds an adapter that acts, as version 3."""
    engine = TorchEngine(model_path=tiny_model, lora=LORA, max_rows=5, threads=1)
    state = acting_adapter(engine.model)
    engine.load_adapter(3, state, digest(state))
    return engine


@pytest.fixture(scope="module")
def learner_model(tiny_model, engine) -> torch.nn.Module:
    """The policy as a learner rank builds it, with the weights that the engine holds."""
    model = attach_lora(load_model(tiny_model), policy_adapter(tiny_model), LORA)
    load_state(model, pack(adapter_parameters(engine.model)))
    return model.train()


def rollout(engine: TorchEngine, rule: str, **truncation) -> list[TrajectoryGroup]:
    sampler = SamplerSpec(24, 12, 8, rule, temperature=0.7, **truncation)
    specs = [GroupSpec(i, Problem(str(i), {}), 3, 50 + i) for i in range(3)]
    return engine.generate(specs, [list(range(10, 20 + 3 * i)) for i in range(3)], sampler)


def batches(groups: Sequence[TrajectoryGroup], family, *, views_per_forward: int = 7) -> Iterator[ViewBatch]:
    """Every drawn token of the groups once, in batches that mix groups, rows and steps unlike any rollout batch."""
    views = recorded_states(groups)
    order = np.random.default_rng(0).permutation(len(views))
    for start in range(0, len(views), views_per_forward):
        chosen = [views[i] for i in order[start : start + views_per_forward]]
        yield build_batch(chosen, groups, mask_id=family.mask_token_id, pad_id=family.pad_token_id)


def worst_difference(model, groups, family, *, law_of=None) -> float:
    """Largest |recomputed - stored| over all drawn tokens; ``law_of`` edits the batch that is scored."""
    worst, scored = 0.0, 0
    for batch in batches(groups, family):
        wanted = batch if law_of is None else law_of(batch)
        with torch.no_grad():
            logp = score(model, wanted, family=family).logp_N.numpy()
        worst, scored = max(worst, float(np.abs(logp - batch.logp).max())), scored + logp.size
    assert scored == sum(int(group.drawn.sum()) for group in groups)
    return worst


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("rule", POSITION_RULES)
def test_replay_parity(engine, learner_model, rule, truncation):
    groups = rollout(engine, rule, **TRUNCATIONS[truncation])
    assert all(group.policy_version == 3 for group in groups)
    family = engine.family
    parity = worst_difference(learner_model, groups, family)
    print(f"{rule}, {truncation}: largest |difference| {parity:.1e}")
    assert parity <= 1e-5
    off = worst_difference(learner_model, groups, family, law_of=lambda b: dataclasses.replace(b, temperature=0.735))
    assert off > 1e-3, "control: another temperature is another law"
    if truncation != "whole":
        ignored = worst_difference(learner_model, groups, family, law_of=lambda b: dataclasses.replace(b, support=None))
        assert ignored > 1e-3, "control: the recorded support matters"


def test_replay_parity_fails_on_other_weights(engine, learner_model, tiny_model):
    groups = rollout(engine, "random", **TRUNCATIONS["both"])
    model = attach_lora(load_model(tiny_model), policy_adapter(tiny_model), LORA)
    assert worst_difference(model, groups, engine.family) > 1e-2, "the base instead of the adapter"
    load_state(model, acting_adapter(model, scale=0.0501))
    assert worst_difference(model, groups, engine.family) > 1e-5, "an adapter that is off by 0.2 %"


def test_a_recomputed_support_would_lose_tokens_after_an_update(engine, tiny_model):
    """Why the support is recorded: under slightly newer weights some stored tokens fall outside their own top-k."""
    groups = rollout(engine, "random", top_k=20)
    model = attach_lora(load_model(tiny_model), policy_adapter(tiny_model), LORA)
    load_state(model, acting_adapter(model, scale=0.06))
    family, outside = engine.family, 0
    for batch in batches(groups, family):
        scores = score(model, batch, family=family)
        assert scores.logp_N.isfinite().all() and (scores.mass_N < 1).all()
        rows = torch.from_numpy(batch.score_rows)
        mask = None if batch.attention_mask is None else torch.from_numpy(batch.attention_mask)
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(batch.input_ids), attention_mask=mask, logit_rows=rows).logits
        law = truncate(without_mask(logits, family.mask_token_id) / 0.7, top_k=20, top_p=1.0)
        kept = (law.ids_NK == torch.from_numpy(batch.targets).unsqueeze(1)) & (law.logp_NK > -torch.inf)
        outside += int((~kept.any(1)).sum())
    assert outside > 0


def test_replay_parity_of_completions_that_ended_early(engine, learner_model):
    """With EOS likely, some completions end after a block; their fillers are seen by the policy and never scored."""
    models = (engine.model, learner_model)
    heads = [module for model in models for name, module in model.named_modules() if name.endswith("former.ff_out")]
    eos = engine.family.eos_token_id

    def eos_likely(module, args, logits):
        return logits.index_add(-1, torch.tensor([eos]), torch.full((*logits.shape[:-1], 1), 3.8))

    hooks = [head.register_forward_hook(eos_likely) for head in heads]
    try:
        groups = rollout(engine, "random", **TRUNCATIONS["both"])
        parity = worst_difference(learner_model, groups, engine.family)
    finally:
        for hook in hooks:
            hook.remove()
    filled = [not group.drawn[row].all() for group in groups for row in range(group.size)]
    assert any(filled) and not all(filled)
    assert parity <= 1e-5
    assert worst_difference(learner_model, groups, engine.family) > 1e-2, "control: without the hook"
