"""Attention of every family: no pad and no neighbour in a packed row is seen, by mask or by FlashAttention's kernel for
variable lengths; and what the head and the last block are spared."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import varlen

from rollout.models import decoder, llada
from rollout.models.layers import (
    attend,
    attend_few,
    attend_few_varlen,
    attend_varlen,
    rotary_tables,
    rotate,
    sequences,
    varlen_flash,
    visibility,
)
from rollout.models.loading import load_model
from tests.support.published import FAMILIES, HEAD, random_ids, write_published
from tests.support.varlen import varlen_attn, varlen_loop


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp(family)
    write_published(path, family)
    return path


@pytest.fixture(scope="module")
def model(folder) -> torch.nn.Module:
    return load_model(folder)


@torch.no_grad()
def test_left_pads_are_not_seen(model):
    ids = random_ids(2, 11)
    padded = torch.cat([random_ids(2, 5, seed=1), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 5), torch.ones(2, 11)], dim=1).long()
    expected = model(ids).logits
    torch.testing.assert_close(model(padded, mask).logits[:, 5:], expected, atol=1e-5, rtol=1e-5)
    assert (model(padded).logits[:, 5:] - expected).abs().max() > 0.1  # control: pads seen


@torch.no_grad()
def test_packed_sequences_are_as_if_alone(model):
    first, second, third = random_ids(1, 6), random_ids(1, 9, seed=1), random_ids(1, 4, seed=2)
    pads = random_ids(1, 3, seed=3)
    packed = torch.cat([torch.cat([pads[:, :2], first, second], 1), torch.cat([third, pads, second, pads[:, :1]], 1)])
    mask = torch.tensor([[0] * 2 + [1] * 6 + [2] * 9, [3] * 4 + [0] * 3 + [1] * 9 + [0]])
    logits = model(packed, mask).logits
    assert logits.isfinite().all()
    alone = {name: model(ids).logits[0] for name, ids in (("first", first), ("second", second), ("third", third))}
    for row, start, name in ((0, 2, "first"), (0, 8, "second"), (1, 0, "third"), (1, 7, "second")):
        found = logits[row, start : start + len(alone[name])]
        torch.testing.assert_close(found, alone[name], atol=1e-5, rtol=1e-5)
    together = model(packed, (mask > 0).long()).logits  # control: the neighbour is seen
    assert (together[0, 2:8] - alone["first"]).abs().max() > 0.1


@torch.no_grad()
def test_logit_rows_are_rows_of_the_full_logits(model):
    ids, rows = random_ids(3, 9), torch.tensor([26, 0, 10, 10, 7])
    full = model(ids).logits.flatten(0, 1)
    torch.testing.assert_close(model(ids, logit_rows=rows).logits, full[rows], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(ids, logit_rows=rows.flip(0)).logits, full[rows])


def test_the_head_runs_on_the_wanted_rows_only(model, family):
    seen = []
    handle = model.get_submodule(HEAD[family]).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    model(random_ids(3, 9), logit_rows=torch.tensor([4, 20]))
    handle.remove()
    assert seen == [(2, 32)]


MASKS = {
    "one sequence a row": torch.ones(3, 8).long(),
    "left pads": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8, [0] * 7 + [1]]),
    "packed": torch.tensor([[1, 1, 2, 2, 2, 3, 3, 3], [4] * 8, [0, 1, 1, 1, 0, 2, 2, 0]]),
    "interleaved": torch.tensor([[1, 2, 1, 2, 0, 1, 2, 2], [7, 7, 0, 0, 3, 3, 7, 3], [1] * 8]),
    "a row of pads": torch.tensor([[1] * 8, [0] * 8, [2, 2, 2, 2, 1, 1, 1, 1]]),
    "bools": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8, [0] * 7 + [1]]).bool(),
    "bools in between": torch.tensor([[1, 0, 0, 1, 1, 0, 1, 0], [0] * 8, [0, 1, 1, 1, 0, 0, 0, 0]]).bool(),
}
ROWS = {
    "few": [23, 3, 9, 9, 15],  # fewer than a row's tokens, and one of them twice
    "many": [*range(3, 8), 9, 9, *range(20, 24)],
    "more than there are": [7, *range(24)],
}


def trained(model: torch.nn.Module, ids, mask, rows, *, asked: bool):
    """Logits at the rows, and the gradient of all weights; those at all positions are made where nobody is asked."""
    logits = model(ids, mask, logit_rows=rows).logits if asked else model(ids, mask).logits.flatten(0, 1)[rows]
    model.zero_grad()
    (logits * torch.linspace(-1, 1, logits.shape[1])).square().sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", ["one sequence a row", "left pads", "packed"])
def test_the_last_block_at_asked_rows_is_the_block_at_all(folder, name, rows):
    model, ids, mask, at = load_model(folder), random_ids(3, 8), MASKS[name], torch.tensor(ROWS[rows])
    expected, gradient = trained(model, ids, mask, at, asked=False)
    found, ours = trained(model, ids, mask, at, asked=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for weights, slope in gradient.items():
        torch.testing.assert_close(ours[weights], slope, atol=1e-4, rtol=1e-4, msg=weights)
    other, _ = trained(model, ids, None if name != "one sequence a row" else MASKS["packed"], at, asked=True)
    assert (other - expected).abs().max() > 0.01, "control: another mask"

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, recomputed = trained(model.train(), ids, mask, at, asked=True)
    torch.testing.assert_close((again, recomputed), (found, ours), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rows", ["few", "many"])
def test_a_model_learns_the_same_by_attention_of_variable_lengths(folder, rows, monkeypatch):
    """In fp32, which the kernel on CUDA doesn't take, so that nothing is rounded."""
    model, ids, mask, at = load_model(folder), random_ids(3, 8), MASKS["packed"], torch.tensor(ROWS[rows])
    at = at[(mask > 0).flatten()[at]]
    expected, gradient = trained(model, ids, mask, at, asked=True)
    for trunk in (llada, decoder):
        monkeypatch.setattr(trunk, "visibility", lambda mask, dtype: sequences(mask))
    with pytest.raises(RuntimeError):  # control: here torch has no such kernel, so it is asked
        trained(model, ids, mask, at, asked=True)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    found, ours = trained(model, ids, mask, at, asked=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for weights, slope in gradient.items():
        torch.testing.assert_close(ours[weights], slope, atol=1e-3, rtol=1e-3, msg=weights)


def test_the_last_block_runs_on_the_asked_rows_only(model, family):
    """Its norm before the MLP is given them alone; other blocks', and its own when no row is named, all positions."""
    name = "ff_norm" if family == "llada" else "post_attention_layernorm"
    norms = [module for path, module in model.named_modules() if path.endswith(name)]
    seen: list[tuple[int, ...]] = []
    handles = [norm.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape))) for norm in norms]
    everywhere = (3, 9, 32)
    for rows, last in (([4, 20], (2, 32)), ([], everywhere), (None, everywhere), ([0] * 27, everywhere)):
        seen.clear()
        logits = model(random_ids(3, 9), logit_rows=None if rows is None else torch.tensor(rows).long()).logits
        assert seen == [everywhere] * (len(norms) - 1) + [last] and len(norms) > 1
        assert logits.shape[:-1] == ((3, 9) if rows is None else (len(rows),))
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", MASKS)
def test_attention_of_variable_lengths_is_attention_with_a_mask(name, kv_heads):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, 8, 6, generator=generator) for heads in (4, kv_heads, kv_heads))
    mask = MASKS[name]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with_mask = attend(*leaves, visibility(mask, torch.float32))
    by_kernel = attend_varlen(*leaves, sequences(mask), varlen_loop)
    real = mask > 0
    torch.testing.assert_close(by_kernel[real], with_mask[real], atol=1e-5, rtol=0)
    assert by_kernel.isfinite().all() and with_mask.isfinite().all()
    factors = torch.randn(by_kernel[real].shape, generator=generator)
    by_mask = torch.autograd.grad((with_mask[real] * factors).sum(), leaves)
    by_varlen = torch.autograd.grad((by_kernel[real] * factors).sum(), leaves)
    torch.testing.assert_close(by_varlen, by_mask, atol=1e-5, rtol=0)
    if name != "one sequence a row":
        assert (attend(q, k, v, None)[real] - by_kernel[real]).abs().max() > 0.05  # control: the mask ignored


def test_sequences_of_bools_have_the_same_shapes_whatever_is_padded():
    """A GPU needn't be waited for, then: they are found on a device that has shapes alone."""
    seen = sequences(torch.empty(3, 8, dtype=torch.bool, device="meta"))
    assert (seen.order_T.shape, seen.starts.shape, seen.longest) == ((24,), (7,), 8)
    with pytest.raises(NotImplementedError, match="meta"):
        sequences(torch.empty(3, 8, dtype=torch.int64, device="meta"))  # control: how many numbers there are is read


@pytest.mark.parametrize("width", [6, 8])
def test_torchs_kernel_is_asked_for_attention_of_variable_lengths(width, monkeypatch):
    """torch has it for CUDA alone: here arguments are bound to its signature, and shapes made on no device."""
    mask = MASKS["interleaved"]
    q, k, v = (torch.randn(3, heads, 8, width) for heads in (4, 2, 2))
    seen = sequences(mask)
    expected = attend_varlen(q, k, v, seen, varlen_loop)
    shapes = [torch.empty(len(seen.order_T), heads, width, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2)]
    starts, longest = seen.starts.to("meta"), seen.longest
    assert varlen_flash(*shapes, starts, starts, longest, longest).shape == shapes[0].shape
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    torch.testing.assert_close(attend_varlen(q, k, v, seen, varlen_flash), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", MASKS)
def test_attention_of_few_queries_is_attention_at_these_rows(name, kv_heads):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, 8, 6, generator=generator) for heads in (4, kv_heads, kv_heads))
    seen, rows = visibility(MASKS[name], torch.float32), torch.tensor([23, 9, 9, 3])
    whole = attend(q, k, v, seen).flatten(0, 1)[rows]
    q_NHE = q.transpose(1, 2).flatten(0, 1)[rows]
    torch.testing.assert_close(attend_few(q_NHE, k, v, seen, rows), whole, atol=1e-6, rtol=0)
    assert (attend_few(q_NHE, k, v, seen, rows.flip(0)) - whole).abs().max() > 0.05, "control: of other rows"


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", MASKS)
def test_few_queries_of_variable_lengths_are_those_of_a_mask(name, rows):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, 8, 6, generator=generator).requires_grad_() for heads in (4, 2, 2))
    rows_N = torch.tensor(ROWS[rows])
    rows_N = rows_N[(MASKS[name] > 0).flatten()[rows_N]]  # at pads both mean nothing
    whole = attend(q, k, v, visibility(MASKS[name], torch.float32)).flatten(0, 1)[rows_N]
    few = (q.transpose(1, 2).flatten(0, 1)[rows_N], k, v, sequences(MASKS[name]))
    found = attend_few_varlen(*few, rows_N, varlen_loop)
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)
    factors = torch.randn(found.shape, generator=generator)
    slopes = [torch.autograd.grad((out * factors).sum(), (q, k, v)) for out in (found, whole)]
    torch.testing.assert_close(*slopes, atol=1e-5, rtol=0)
    other = attend_few_varlen(*few, (rows_N + 8) % 24, varlen_loop)
    assert (other - whole).abs().max() > 0.05, "control: of other rows"


def test_a_mask_of_zeros_and_ones_keeps_its_cheap_form():
    assert visibility(None, torch.float32) is None
    plain, packed = (visibility(MASKS[name], torch.float32) for name in ("left pads", "packed"))
    assert plain.shape == (3, 1, 1, 8) and packed.shape == (3, 1, 8, 8)


def test_rotary_tables_are_rounded_as_published():
    cos, sin = rotary_tables(50, 8, 10000.0, torch.device("cpu"), torch.bfloat16)
    exact, _ = rotary_tables(50, 8, 10000.0, torch.device("cpu"))
    assert cos.dtype == sin.dtype == torch.bfloat16 and torch.equal(cos, exact.bfloat16())
    x = torch.randn(1, 2, 50, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    low = rotate(x, cos, sin)
    high = rotate(x, *rotary_tables(50, 8, 10000.0, torch.device("cpu")))
    assert low.dtype == high.dtype == torch.bfloat16 and not torch.equal(low, high)
