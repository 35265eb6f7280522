"""``learner.verify`` on this device, section by section."""

import itertools
from pathlib import Path

from learner.bench.first_minutes.figures import Figure
from learner.verification.checks import Check, meter_on, sections
from learner.verification.measurement import Measurement
from learner.verification.recorded import Recorded, recorded_cases

RECORDED = Path(__file__).parents[3] / "tests" / "golden"
"""Of official code; a checkout has them."""


def in_float32(*, small: bool) -> list[Figure]:
    return _verified("float32", small=small)


def in_bfloat16(*, small: bool) -> list[Figure]:
    return _verified("bfloat16", small=small)


def _verified(dtype: str, *, small: bool) -> list[Figure]:
    """How many measurements of each section are above their bounds, and the largest error over its bound.

    small: the first check alone.
    """
    meter = meter_on("cpu" if small else "cuda", dtype)
    golden = RECORDED if RECORDED.is_dir() and not small else None
    recorded = Recorded([], [], []) if golden is None else recorded_cases(golden)
    figures = []
    for name, checks in sections(meter, golden, recorded):
        figures += _section(name, list(itertools.islice(checks, 1 if small else None)))
        if small:
            break
    return figures


def _section(name: str, checks: list[Check]) -> list[Figure]:
    found = [(check.name, each) for check in checks for each in check.measurements]
    wrong = [f"{check}: {each.quantity}" for check, each in found if not each.passed]
    wrong += [check.error for check in checks if check.error]
    figures = [Figure(f"{name}: wrong of {len(found)}", len(wrong), "0", "; ".join(wrong))]
    shares = [(_error(each) / each.bound, f"{check}: {each.quantity}") for check, each in found if _bounds(each)]
    if shares:
        largest, where = max(shares)
        figures.append(Figure(f"{name}: largest error over its bound", largest, "<= 1", where))
    return figures


def _bounds(found: Measurement) -> bool:
    return not found.control and found.bound > 0


def _error(found: Measurement) -> float:
    return found.absolute if found.metric == "absolute" else found.relative
