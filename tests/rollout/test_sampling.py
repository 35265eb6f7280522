"""Schedules, noise, truncation and the denoising loop, on table models and on recorded cases of the reference."""

import json

import numpy as np
import pytest
import torch

from rewards.errors import ConfigError
from rollout.sampling import noise
from rollout.sampling.denoise import POSITION_RULES, Request, Tokens, denoise
from rollout.sampling.head import LogitsHead, padded
from rollout.sampling.schedule import tokens_per_step
from rollout.sampling.truncation import truncate
from rollout.trajectory import SamplerSpec
from tests.support.hand_made import GOLDEN

MASK, EOS, PAD, V = 5, 4, 3, 12
TOKENS = Tokens(mask=MASK, eos=(EOS,), pad=PAD)


def table_model(seed: int = 0, eos_bias: float = 0.0):
    """A denoiser whose logits at a position depend on the position and on every token of the row."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(64, V, V, generator=generator)

    def forward(input_ids_RL, attention_mask_RL, logit_rows_N):
        R, L = input_ids_RL.shape
        real = torch.ones_like(input_ids_RL) if attention_mask_RL is None else attention_mask_RL
        first_R = L - real.sum(1)
        place_RL = torch.arange(L) - first_R.unsqueeze(1)
        mixed_RV = torch.stack([table[place_RL[r][real[r] > 0], input_ids_RL[r][real[r] > 0]].sum(0) for r in range(R)])
        rows, positions = logit_rows_N // L, logit_rows_N % L
        logits = 0.3 * mixed_RV[rows] + table[place_RL[rows, positions], 0]
        logits[:, EOS] += eos_bias
        return logits

    return forward


def run(sampler, n=6, max_rows=4, forward=None, prompt_lengths=(3,)):
    requests = [Request([7] * prompt_lengths[i % len(prompt_lengths)], key=1000 + i) for i in range(n)]
    head = LogitsHead(padded(forward or table_model(), torch.device("cpu")), MASK)
    return denoise(head, requests, sampler, TOKENS, max_rows=max_rows)


def sampler(**changes) -> SamplerSpec:
    settings = dict(completion_length=8, block_length=4, steps=4, position_rule="random", temperature=1.0)
    return SamplerSpec(**{**settings, **changes})


@pytest.mark.parametrize(
    ("C", "block", "m", "expected"),
    [
        (8, 4, 4, [2, 2, 2, 2]),
        (8, 8, 8, [1] * 8),
        (24, 24, 2, [12, 12]),
        (12, 6, 8, [2, 2, 1, 1, 2, 2, 1, 1]),  # LLaDA's floor split, remainder up front, block by block
    ],
)
def test_schedule_reveals_every_position_once(C, block, m, expected):
    assert tokens_per_step(C, block, m) == expected


@pytest.mark.parametrize(("C", "block", "m"), [(8, 3, 4), (8, 4, 3), (8, 4, 16), (8, 0, 4), (8, 4, 0)])
def test_schedule_refuses_contradictions(C, block, m):
    with pytest.raises(ConfigError, match=r"\d"):
        tokens_per_step(C, block, m)


def test_gumbel_noise_has_the_right_law_and_tail():
    values = noise.gumbel(torch.arange(40), 50_000).double().flatten()
    assert abs(values.mean() - 0.5772) < 0.005
    assert abs(values.var() - np.pi**2 / 6) < 0.01
    for x in (-1.0, 0.0, 2.0, 6.0, 10.0):
        expected = np.exp(-np.exp(-x))
        assert abs((values <= x).double().mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / 2e6) + 1e-6


def test_noise_is_named_by_row_step_position_and_token_only():
    key = noise.streams(torch.tensor([9, 9, 8]), torch.tensor([1, 2, 1]), torch.tensor([0, 0, 0]))
    all_tokens = noise.gumbel(key, 100)
    some = torch.tensor([[3, 50], [7, 7], [99, 0]])
    assert torch.equal(noise.gumbel(key, some), all_tokens.gather(1, some))
    assert torch.equal(noise.gumbel(key[1:], 100), all_tokens[1:])
    assert not torch.equal(all_tokens[0], all_tokens[1])
    assert not torch.equal(all_tokens[0], all_tokens[2])


def plain_truncation(logits, top_k, top_p):
    """The rule spelled out with loops: a second implementation to compare with."""
    kept = list(range(len(logits)))
    if top_k is not None:
        kth = sorted(logits, reverse=True)[min(top_k, len(logits)) - 1]
        kept = [v for v in kept if logits[v] >= kth]
    order = sorted(kept, key=lambda v: (-logits[v], v))
    total = sum(np.exp(logits[v]) for v in order)
    mass, chosen = 0.0, []
    for i, v in enumerate(order):
        mass += np.exp(logits[v]) / total
        if i == 0 or top_p >= 1 or mass <= top_p:
            chosen.append(v)
    return set(chosen)


@pytest.mark.parametrize("top_k", [None, 1, 5, 40, 10_000])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.93, 1.0])
def test_truncation_matches_the_rule_spelled_out(top_k, top_p):
    generator = torch.Generator().manual_seed(3)
    logits_NV = torch.randn(6, 700, generator=generator).double().float() * 2
    law = truncate(logits_NV, top_k=top_k, top_p=top_p)
    for row in range(6):
        ids = law.ids_NK[row] if law.ids_NK is not None else torch.arange(700)
        kept = ids[law.logp_NK[row] > -torch.inf]
        wanted = plain_truncation(logits_NV[row].double().tolist(), top_k, top_p)
        assert set(kept.tolist()) == wanted
        direct = logits_NV[row, kept].log_softmax(0)
        assert torch.allclose(law.logp_NK[row][law.logp_NK[row] > -torch.inf], direct, atol=1e-5)


def test_ties_at_the_kth_logit_survive_and_top_p_keeps_the_first():
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    law = truncate(logits, top_k=2, top_p=1.0)
    assert law.ids_NK is not None and law.ids_NK[0].tolist() == [0, 1, 2, 3]
    law = truncate(logits, top_k=2, top_p=0.01)
    assert law.ids_NK is not None and law.ids_NK[0].tolist() == [0]
    # The token that crosses the threshold is dropped: 0.475 + 0.175 > 0.6.
    assert truncate(logits, top_k=4, top_p=0.6).ids_NK[0].tolist() == [0]


@pytest.mark.parametrize("rule", POSITION_RULES)
@pytest.mark.parametrize("truncation", [dict(), dict(top_k=3), dict(top_p=0.8), dict(top_k=6, top_p=0.9)])
def test_every_position_is_revealed_once_within_its_block(rule, truncation):
    spec = sampler(position_rule=rule, **truncation)
    for completion in run(spec, prompt_lengths=(3, 5)):
        drawn = completion.drawn
        assert not np.isin(completion.ids, [MASK]).any()
        assert (completion.unmask_step[drawn] // 2 == np.flatnonzero(drawn) // 4).all()
        for step in range(4):
            at = drawn & (completion.unmask_step == step)
            assert at.sum() in (0, 2)
            assert sorted(completion.unmask_rank[at]) == list(range(at.sum()))
        if spec.truncates:
            assert all(t in kept for t, kept, d in zip(completion.ids, completion.support, drawn, strict=True) if d)


def test_left_to_right_goes_left_to_right():
    for completion in run(sampler(position_rule="left_to_right", steps=8)):
        assert completion.unmask_step[completion.drawn].tolist() == list(range(int(completion.drawn.sum())))


def test_a_row_does_not_depend_on_its_batch():
    spec = sampler(top_p=0.9)
    together, alone = run(spec, n=7, max_rows=3), run(spec, n=7, max_rows=1)
    for a, b in zip(together, alone, strict=True):
        assert (a.ids == b.ids).all() and (a.unmask_step == b.unmask_step).all()
        np.testing.assert_allclose(a.logp, b.logp, atol=1e-5)


def test_rows_leave_and_waiting_prompts_take_their_place():
    seen = []
    forward = table_model(eos_bias=9.0)

    def counting(input_ids, mask, rows):
        seen.append(len(input_ids))
        return forward(input_ids, mask, rows)

    done = run(sampler(completion_length=16), n=6, max_rows=4, forward=counting)
    assert any(c.nfe == 1 for c in done), "an EOS block should end a completion early"
    assert seen[0] == 4 and max(seen) == 4 and len(seen) < 16
    assert sum(seen) == sum(c.nfe for c in done), "a finished row still took part in a forward"


def test_a_finished_block_of_eos_fills_the_rest_without_calling_it_drawn():
    for completion in run(sampler(completion_length=16), forward=table_model(eos_bias=50.0)):
        assert (completion.ids == EOS).all()
        assert completion.drawn.tolist() == [True] * 4 + [False] * 12
        assert (completion.unmask_step[4:] == 1).all(), "filler carries the step at which the row left"
        assert (completion.logp[4:] == 0).all() and (completion.entropy[4:] == 0).all()


def test_the_mask_token_is_never_drawn_even_when_the_model_wants_it():
    forward = table_model()

    def wants_mask(input_ids, mask, rows):
        logits = forward(input_ids, mask, rows)
        logits[:, MASK] = 100.0
        return logits

    for temperature in (0.0, 1.0):
        for completion in run(sampler(temperature=temperature), forward=wants_mask):
            assert MASK not in completion.ids
            assert (completion.logp[completion.drawn] > -20).all(), "the mask token's mass was not removed"


def test_large_logits_do_not_overflow():
    """exp() of fp32 logits over temperature overflows at 88 and then draws the first infinity only."""

    def forward(input_ids, mask, rows):
        logits = torch.full((len(rows), V), -1e4)
        logits[:, [0, 1]] = 200.0
        return logits

    drawn = np.concatenate([c.ids for c in run(sampler(temperature=0.5), n=60, forward=forward)])
    assert 0.4 < (drawn == 0).mean() < 0.6 and np.isin(drawn, [0, 1]).all()


def test_sampled_tokens_follow_the_law():
    logits_V = torch.randn(V, generator=torch.Generator().manual_seed(5))
    logits_V[MASK] = 3.0
    spec = sampler(completion_length=1, block_length=1, steps=1, temperature=0.7, top_k=6, top_p=0.9)
    done = run(spec, n=6000, max_rows=2000, forward=lambda i, m, rows: logits_V.repeat(len(rows), 1))
    masked = logits_V.clone()
    masked[MASK] = -torch.inf
    law = truncate((masked / 0.7).unsqueeze(0), top_k=6, top_p=0.9)
    expected = torch.zeros(V).scatter(0, law.ids_NK[0], law.logp_NK[0].exp()).numpy()
    observed = np.bincount([c.ids[0] for c in done], minlength=V) / 6000
    assert np.abs(observed - expected).max() < 0.03
    assert (observed[expected == 0] == 0).all()
    assert np.allclose([c.logp[0] for c in done[:50]], np.log(expected[[c.ids[0] for c in done[:50]]]), atol=1e-5)


# ---- threshold decoding


def confidences(completion, step: int, forward, prompt: int = 3) -> np.ndarray:
    """[C], largest probability at temperature 1 in the state before ``step``, without the mask token."""
    C = len(completion.ids)
    state = np.where(completion.unmask_step >= step, MASK, completion.ids)
    row = torch.tensor([[7] * prompt + state.tolist()])
    logits = forward(row, None, torch.arange(C) + prompt)
    logits[:, MASK] = -torch.inf
    return logits.softmax(1).max(1).values.numpy()


@pytest.mark.parametrize("rule", ["low_confidence", "random", "decoupled_confidence"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_threshold_reveals_what_passes_it_and_at_least_the_surest(temperature, rule):
    spec = sampler(threshold=0.35, temperature=temperature, position_rule=rule, steps=2)
    forward, sizes = table_model(), set()
    for completion in run(spec, forward=forward):
        drawn = completion.drawn
        assert completion.nfe == len(set(completion.unmask_step[drawn].tolist())) <= 8
        for step in range(completion.nfe):
            at = np.flatnonzero(drawn & (completion.unmask_step == step))
            c = confidences(completion, step, forward)
            masked = np.flatnonzero((completion.unmask_step >= step) & (np.arange(8) // 4 == at[0] // 4))
            passing = [i for i in masked if c[i] > 0.35]
            assert sorted(at) == (passing or [masked[c[masked].argmax()]])
            order = at[completion.unmask_rank[at].argsort()]
            assert (np.diff(c[order]) <= 1e-6).all(), "the surest first"
            sizes.add(len(at))
        assert completion.position_logp is None
    assert len(sizes) > 1, "control: steps of several sizes were seen"


def test_the_ends_of_the_threshold():
    """0 reveals a block a step; 1 one position a step, which at temperature 0 is low_confidence with all steps."""
    for completion in run(sampler(threshold=0.0)):
        assert completion.nfe == 2 and completion.unmask_step.tolist() == [0] * 4 + [1] * 4
    greedy = dict(temperature=0.0, position_rule="low_confidence")
    for ours, theirs in zip(run(sampler(threshold=1.0, **greedy)), run(sampler(steps=8, **greedy)), strict=True):
        assert ours.nfe == theirs.nfe == 8
        assert (ours.ids == theirs.ids).all() and (ours.unmask_step == theirs.unmask_step).all()


def test_threshold_decoding_ends_after_a_block_of_eos():
    for completion in run(sampler(completion_length=16, threshold=0.5), forward=table_model(eos_bias=50.0)):
        assert (completion.ids == EOS).all() and completion.nfe == 1
        assert completion.drawn.tolist() == [True] * 4 + [False] * 12
        assert (completion.unmask_step[4:] == 1).all()


def test_a_threshold_that_is_no_probability_is_refused():
    with pytest.raises(ConfigError, match=r"threshold 1\.5"):
        run(sampler(threshold=1.5))


def test_unknown_position_rule_is_refused():
    with pytest.raises(ConfigError, match="middle_out"):
        run(sampler(position_rule="middle_out"))


def test_greedy_low_confidence_reproduces_the_recorded_reference():
    """Recorded case 20: the reference's own sampler at temperature 0 (it may draw the mask token, but here didn't)."""
    from rollout.models.llada import LLaDAConfig, LLaDAModelLM

    case = np.load(GOLDEN / "20_gen_greedy_low_confidence.npz")
    settings = json.loads((GOLDEN / "20_gen_greedy_low_confidence.json").read_text())
    weights = np.load(GOLDEN / "weights_base.npz")
    config = LLaDAConfig(d_model=64, n_layers=4, n_heads=4, mlp_hidden_size=128, vocab_size=70, mask_token_id=2,
                         eos_token_id=1, pad_token_id=0)  # fmt: skip
    model = LLaDAModelLM(config).eval()
    model.load_state_dict({name: torch.from_numpy(weights[name]) for name in weights.files})
    spec = SamplerSpec(settings["max_completion_length"], settings["block_length"], settings["sampling_steps"],
                       "low_confidence", 0.0)  # fmt: skip
    requests = [Request(ids[mask > 0].tolist(), key=i)
                for i, (ids, mask) in enumerate(zip(case["prompt_ids"], case["prompt_mask"], strict=True))]  # fmt: skip
    head = LogitsHead(padded(lambda i, a, r: model(i, a, r).logits, torch.device("cpu")), 2)
    with torch.inference_mode():
        done = denoise(head, requests, spec, Tokens(2, (1,), 0), max_rows=8)
    for row, completion in enumerate(done):
        assert (completion.ids == case["completion_ids"][row]).all()
        assert (completion.unmask_step == case["unmask_steps"][row]).all()
        # The reference's law keeps the mask token (here up to 3e-4 of the mass); ours excludes it.
        assert np.abs(completion.logp - case["logps"][row]).max() < 5e-4
