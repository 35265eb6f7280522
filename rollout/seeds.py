"""Private randomness: every random choice comes from a stream named by what it is for.

A stream's name is (run seed, group id, ..., purpose). Two runs that ask for the same names get the same numbers, in any
order, in any process; the global generators of Python, numpy and torch are never touched.
"""

import hashlib

import numpy as np


def derive_seed(*parts: int | str) -> int:
    """63-bit seed of the stream with this name. Integers and strings of equal spelling name different streams."""
    name = "/".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1


def numpy_generator(*parts: int | str) -> np.random.Generator:
    """A numpy generator on the stream with this name."""
    return np.random.Generator(np.random.Philox(key=derive_seed(*parts)))
