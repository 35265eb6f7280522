"""Counter-based noise: the same numbers for the same (row, step, position, token) in any batch, on any device up to the
last bit of a logarithm.

Each (row, denoising step, position) owns a SplitMix64 stream (Steele, Lea, Flood 2014, public domain algorithm) whose
element v belongs to token v. Its bits are the same everywhere; the logarithms that make Gumbel noise of them are
rounded differently on CPU and GPU. Nothing is stateful, so a row's draws don't depend on which rows share its batch,
and a lease that is repeated draws the same again. Shapes: N scored positions, K candidate tokens.
"""

import torch

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MUL1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MUL2 = -7723592293110705685  # 0x94D049BB133111EB
_ELEMENTS_AT_ONCE = 1 << 22


def streams(row_keys_N: torch.Tensor, steps_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
    """Keys of the streams, [N] int64, from row keys, denoising steps and completion positions (all [N] int64)."""
    return _mix(_mix(row_keys_N + steps_N * _GOLDEN) + (positions_N + 1) * _GOLDEN)


def gumbel(streams_N: torch.Tensor, tokens_NK: torch.Tensor | int) -> torch.Tensor:
    """Standard Gumbel noise, [N, K] float32.

    Args:
        streams_N: keys from ``streams``, [N] int64.
        tokens_NK: token ids, [N, K] int64; or the vocabulary size, for all tokens in order.
    """
    if isinstance(tokens_NK, int):
        tokens_NK = torch.arange(tokens_NK, device=streams_N.device).unsqueeze(0)
    noise = torch.empty(streams_N.shape[0], tokens_NK.shape[1], dtype=torch.float32, device=streams_N.device)
    rows = max(1, _ELEMENTS_AT_ONCE // max(1, tokens_NK.shape[1]))
    for start in range(0, streams_N.shape[0], rows):
        part = slice(start, start + rows)
        tokens = tokens_NK if tokens_NK.shape[0] == 1 else tokens_NK[part]
        noise[part] = _gumbel_of(uniform_bits(streams_N[part].unsqueeze(1), tokens))
    return noise


def uniform_bits(streams_N1: torch.Tensor, index_NK: torch.Tensor) -> torch.Tensor:
    """63 random bits for each (stream, index), int64 >= 0; broadcasts."""
    return _mix(streams_N1 + (index_NK + 1) * _GOLDEN).bitwise_and_(0x7FFFFFFFFFFFFFFF)


def _gumbel_of(bits: torch.Tensor) -> torch.Tensor:
    # -log(-log(1 - u)): small u keeps its relative precision in float32, and small u is what makes a large Gumbel,
    # so the tail that decides between 100,000 tokens is not cut off at 24 bits.
    u = bits.to(torch.float32).add_(0.5).mul_(2.0**-63)
    return u.neg_().log1p_().neg_().log_().neg_()


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * _MUL1
    x = (x ^ _shift_right(x, 27)) * _MUL2
    return x ^ _shift_right(x, 31)


def _shift_right(x: torch.Tensor, n: int) -> torch.Tensor:
    return (x >> n) & ((1 << (64 - n)) - 1)  # torch shifts int64 arithmetically; the mask makes it logical
