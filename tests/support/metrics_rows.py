"""What two equal runs must have in common."""

from collections.abc import Mapping
from typing import Any

from learner.reporting.metrics_file import TIMING_PREFIXES


def deterministic(row: Mapping[str, Any]) -> dict[str, Any]:
    """A metrics.jsonl row without what may differ between two equal runs: times and machine figures."""
    kept = {key: value for key, value in row.items() if not key.startswith(TIMING_PREFIXES)}
    if "nonfinite" in kept:
        kept["nonfinite"] = [name for name in kept["nonfinite"] if not name.startswith(TIMING_PREFIXES)]
    return kept
