"""Kinds of weights in few bits, and their sizes. Apart from ``rollout.models.quantization``, which loads torch."""

from typing import Literal

Quantization = Literal["nf4", "int8"]

BYTES_PER_PARAMETER: dict[Quantization, float] = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
"""nf4: 4 bits, an 8-bit scale per 64 weights and a float32 scale per 256 of those. int8: a float32 scale per output row
comes on top."""
