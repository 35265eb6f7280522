"""How many different completions a policy writes, and how good they are when they must be different.

Shapes: none; texts and rewards are those of one problem, or lists of them, one for each problem.
"""

from collections import Counter
from collections.abc import Sequence
from math import comb, prod

from rewards.diversity import distance


def expected_distinct(counted: Sequence[Sequence[str]], samples: int, k: int) -> float:
    """How many different texts k of each problem's completions hold, on average over all choices of k (rarefaction,
    Hurlbert 1971): the sum over texts of 1 - the product over problems of C(n - m, k) / C(n, k), m of n being the text.

    Args:
        counted: of each problem, the texts that count, as often as they were written; those that are right, say.
        samples: n, completions of each problem, of which the others don't count.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"{k} of {samples} completions")
    times = [Counter(texts) for texts in counted]
    missed = [
        prod(comb(samples - of_problem[text], k) / comb(samples, k) for of_problem in times if text in of_problem)
        for text in set().union(*times)
    ]
    return sum(1 - chance for chance in missed)


def diverse_best(texts: Sequence[str], rewards: Sequence[float], k: int, apart: float) -> float:
    """Mean reward of k completions that are at least ``apart`` from each other (``rewards.diversity.distance``), taken
    from the best down, the earlier of equals first. One that can't be had counts 0; no reward may be negative."""
    taken: list[int] = []
    for at in sorted(range(len(texts)), key=lambda at: -rewards[at]):
        if len(taken) < k and all(distance(texts[at], texts[other]) >= apart for other in taken):
            taken.append(at)
    return sum(rewards[at] for at in taken) / k
