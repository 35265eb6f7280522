"""What a forward and a backward hold in memory, in bytes, derived from the operations of the models' own code.

*Kept* is what autograd saves for the backward (tests/learner/test_planning.py counts it with saved-tensor hooks).
*Working* is what lives for a moment: the largest sum of tensors that are alive together at one place, counted above
what is kept. A tensor of the model's dtype takes e bytes a number; norms, softmax and log-probs are computed in fp32.

Kept per token by a block of the gated kind (d width, q width of all heads, H heads, f hidden width of the MLP):

    two norms      2 (4d + 4)   their inputs in fp32 (which in fp32 are the residual stream itself), 1/rms
    maps' inputs   2 e d        the normalised inputs of attention and MLP: LoRA's A needs them
    attention      4 e q + 4 H  queries, keys, values (repeated to all heads), output; the fused kernels' log-sum-exp
    MLP            4 e f        gate, silu(gate), up, their product
    LoRA           7 e r        A x of every map

The first block's first norm keeps nothing: below it nothing is trained. The last block keeps of all tokens the input of
its first norm, what its keys and values are made of, and these; of the N positions that the head runs at the rest; and
queries and attention's output of min(N, L) places a row. A masked LM's last block is like the others. With activation
checkpointing a block keeps its input, e d, and the rest exists for one block at a time. Both fused attention kernels,
the CPU's and FlashAttention, keep these tensors and no [L, L] scores; torch's math kernel, which learner.deterministic
asks for, keeps 2 e H L more.
"""

from dataclasses import dataclass

from learner.planning.shapes import ModelShape

_NOISE_CELLS = 1 << 22
"""Cells of Gumbel noise made at once (rollout/sampling/noise.py)."""
_NOISE_BYTES = 28
"""Of 64-bit intermediates for each of them."""


@dataclass(frozen=True)
class Trunk:
    """Sizes of one forward through the blocks."""

    model: ModelShape
    rows: int
    length: int
    lora_r: int
    itemsize: int
    """e, bytes of the model's dtype."""
    scores: bool = False
    """Attention is torch's plain one, which makes and keeps its scores."""
    head_rows: int | None = None
    """N, positions that the head runs at; None for all."""

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def cells(self) -> int:
        """Of a token's attention scores, where they are made."""
        return self.model.heads * self.length if self.scores else 0


def kept_by_block(trunk: Trunk, *, first: bool = False, last: bool = False) -> int:
    """Bytes that one block saves for the backward."""
    model, e, r = trunk.model, trunk.itemsize, trunk.lora_r
    d, f, q, T = model.width, model.mlp, model.heads * model.head_width, trunk.tokens
    if model.kind == "encoder":
        adapters = e * r * sum(one.used for one in model.maps if one.adapted)
        attention = 4 * e * q + 4 * model.heads + 2 * e * trunk.cells + 2 * e * q * model.fused_qkv
        mlp = e * f * (4 if model.gated else 2 + 3 * model.unfused_gelu)  # x/2, tanh, 1 + tanh
        masks = trunk.rows * trunk.length**2 * e if model.window_mask else 0
        return T * ((1 if first else 2) * (e * d + 8) + 2 * e * d + attention + mlp + adapters) + masks
    asked, queries, places = _asked(trunk) if last else (T, T, T)
    norm, kv = 4 * d + 4, model.kv_heads * model.head_width
    # Taken out of all tokens, where they are: what queries are made of, they, and attention's output.
    inputs = e * d * T + e * asked * ((d + q) * (queries < T) + q * (asked < T))
    attention = 2 * e * q * T + places * (2 * e * q + 4 * model.heads + 2 * e * trunk.cells)
    if model.qk_norm:
        attention += 4 * (queries * (q + model.heads) + T * (kv + model.kv_heads))
    if model.kind == "experts":
        # Of each of the token's experts gate, silu and up, its output to be weighted, and where it goes; what only an
        # adapter's A would need, the inputs and the product, isn't kept without one.
        adapted = model.maps[-1].adapted
        mlp = model.active_experts * (e * (3 * f + d) + e * (f + d) * adapted + 24) + 4 * model.experts
    else:
        mlp = e * (d + 4 * f)
    passing = (queries, T, T, *(asked for _ in model.maps[3:]))
    adapters = e * r * sum(n * one.used for n, one in zip(passing, model.maps, strict=True) if one.adapted)
    return (not first) * norm * T + norm * asked + inputs + attention + mlp * asked + adapters


def _asked(trunk: Trunk) -> tuple[int, int, int]:
    """Of the last block: the positions that its outputs are wanted at, the queries that are computed, and the places
    that attention has for them (``rollout.models.layers.attention``)."""
    asked = trunk.tokens
    if trunk.head_rows is not None and trunk.model.kind != "encoder":
        asked = min(asked, trunk.head_rows)
    few = asked <= trunk.length and asked < trunk.tokens
    return asked, asked if few else trunk.tokens, trunk.rows * min(asked, trunk.length)


def kept(trunk: Trunk, *, checkpointing: bool) -> int:
    """Bytes that all blocks save for the backward, when it begins."""
    layers = trunk.model.layers
    if checkpointing:
        return layers * trunk.tokens * trunk.itemsize * trunk.model.width
    if layers == 1:
        return kept_by_block(trunk, first=True, last=True)
    return kept_by_block(trunk, first=True) + (layers - 2) * kept_by_block(trunk) + kept_by_block(trunk, last=True)


def working_forward(trunk: Trunk) -> int:
    """Bytes alive inside one block of a forward without backward, its input included."""
    model, e = trunk.model, trunk.itemsize
    d, f, q = model.width, model.mlp, model.heads * model.head_width
    # x before and after attention and the normed x; the finished half, and of the map at work its own output, its
    # adapter's, and the scaled one.
    widest = 6 * f if model.kind == "encoder" and model.gated else 4 * f
    mlp = e * (3 * d + widest)
    if model.kind == "experts":
        mlp = e * (4 * d + model.active_experts * (2 * d + 4 * f))
    turning = 4 * (3 + (e < 4)) if model.rotary_fp32 else 3 * e
    attention = max(e * (2 * d + 2 * q) + turning * q, 8 * trunk.cells)
    return trunk.tokens * max(mlp, attention)


def working_backward(trunk: Trunk, *, checkpointing: bool) -> int:
    """Bytes alive inside one block of a backward, above what is kept: gradients, and with checkpointing the block's own
    tensors, computed again. What the last block kept is gone when another's turn comes."""
    model, e, T = trunk.model, trunk.itemsize, trunk.tokens
    f = model.mlp * (model.active_experts or 1) * (2 if model.kind == "encoder" and model.gated else 1)
    f += model.mlp * model.unfused_gelu
    asked, _, places = _asked(trunk)
    of_mlp, of_attention = e * (2 * f + 3 * model.width), e * 2 * (model.heads * model.head_width + model.width)
    last = max(asked * of_mlp, T * of_attention, 8 * places * trunk.cells)
    last += kept_by_block(trunk, first=model.layers == 1, last=True) if checkpointing else 0
    if model.layers == 1:
        return last
    before = T * max(of_mlp, 8 * trunk.cells)
    before += kept_by_block(trunk) if checkpointing else -kept_by_block(trunk, last=True)
    return max(last, before)


def scoring(*, rows: int, vocabulary: int, itemsize: int, restricted: bool) -> int:
    """Bytes of logits at scored positions, at the worse of forward and backward (learner/likelihood/scorer.py).

    Forward: the model's logits, the tempered fp32 copy, and one fp32 intermediate. Backward: the copy, which autograd
    keeps, and fp32 gradients. Of a law that is restricted to a recorded support these are two, of its gathers; of the
    whole law the logsumexp's three: what is exponentiated, the exponential, and the product with the gradient.
    """
    return rows * vocabulary * max(itemsize + 8, 12 if restricted else 16)


def scoring_laws(*, rows: int, vocabulary: int) -> int:
    """The same where whole laws are scored, the policy's and a teacher's or the base's, and compared token by token.

    Both laws and the policy's tempered copy; of the loss the other law's exponential and which cells are empty, which
    autograd keeps; and of the figures another exponential, the cells, the law without them, and the product.
    """
    return rows * vocabulary * (3 * 4 + (4 + 1) + (3 * 4 + 1))


def scoring_positions(*, candidates: int, rows: int, vocabulary: int, itemsize: int, tempered: bool) -> int:
    """The same where the choice of positions is scored, on the logits of all candidates (decoupled confidence)."""
    kept_cells = itemsize + 4 + 4 * tempered
    return vocabulary * (candidates * (kept_cells + 8) + rows * (itemsize + 4))


def sampling(*, cells: int, itemsize: int, truncation: str, cpu: bool) -> int:
    """Bytes of drawing tokens from logits, the logits included (rollout/sampling/denoise.py).

    Args:
        cells: positions times vocabulary.
        truncation: "top_k", "top_p" or "none".
        cpu: there torch counts ties in 64 bits a cell.
    """
    if truncation == "top_k":
        return cells * (itemsize + 9 + 8 * cpu)
    if truncation == "top_p":  # a flat law's mass lies in the whole vocabulary, which is then sorted
        return cells * (itemsize + 26 + 8 * cpu)
    noise = _NOISE_BYTES * min(cells, _NOISE_CELLS)
    return max(cells * (itemsize + 12) + noise, cells * (itemsize + 20))


def choosing(*, cells: int, itemsize: int, tempered: bool) -> int:
    """Bytes of the candidates' confidences, the logits included, where positions are chosen before tokens."""
    return cells * (itemsize + 8 + 4 * tempered)
