"""How different texts are from each other: a policy that writes one text for every problem has found one trick."""

from collections.abc import Sequence
from itertools import combinations


def distinct_share(texts: Sequence[str]) -> float:
    """Different texts per text, from 1/n (all the same) to 1 (all different). 0 for none."""
    return len(set(texts)) / len(texts) if texts else 0.0


LONGEST = 400
"""Characters of a text that ``distances_to_others`` looks at: a pair takes their product."""


def distances_to_others(texts: Sequence[str]) -> list[float]:
    """For each text its mean ``distance`` to the others, by their first ``LONGEST`` characters; 0 for a single one."""
    cut = [text[:LONGEST] for text in texts]
    apart: dict[tuple[str, str], float] = {}
    for one, other in combinations(sorted(set(cut)), 2):
        apart[one, other] = apart[other, one] = distance(one, other)
    others = max(len(cut) - 1, 1)
    return [sum(apart.get((one, other), 0.0) for other in cut) / others for one in cut]


def distance(a: str, b: str) -> float:
    """Fewest insertions, deletions and changes of a character that make ``b`` of ``a`` (Levenshtein's distance, by the
    recursion of Wagner and Fischer 1974), per character of the longer one: 0 when equal, 1 at most."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1] / max(len(a), len(b), 1)
