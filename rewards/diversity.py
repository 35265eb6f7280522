"""How different texts are from each other: a policy that writes one text for every problem has found one trick."""

from collections.abc import Sequence
from itertools import combinations

from rapidfuzz.distance import Levenshtein


def distinct_share(texts: Sequence[str]) -> float:
    """Different texts per text, from 1/n (all the same) to 1 (all different). 0 for none."""
    return len(set(texts)) / len(texts) if texts else 0.0


def distances_to_others(texts: Sequence[str]) -> list[float]:
    """For each text its mean ``distance`` to the others; 0 for a single one."""
    apart: dict[tuple[str, str], float] = {}
    for one, other in combinations(sorted(set(texts)), 2):
        apart[one, other] = apart[other, one] = distance(one, other)
    others = max(len(texts) - 1, 1)
    return [sum(apart.get((one, other), 0.0) for other in texts) / others for one in texts]


def distance(a: str, b: str) -> float:
    """Fewest insertions, deletions and changes of a character that make ``b`` of ``a`` (Levenshtein's distance), per
    character of the longer one: 0 when equal, 1 at most."""
    return Levenshtein.normalized_distance(a, b)
