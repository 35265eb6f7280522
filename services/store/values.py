"""What any database takes of what a run reports, and what is taken of it again."""

import json
import math
from collections.abc import Mapping
from typing import Any

from rewards.errors import StoreError

MAX_JSON_BYTES = 2**22
"""Of one JSON value that is read."""
ROW_BYTES = 200
"""A row without its texts and blobs, roughly."""


def plain(value: Any) -> Any:
    """A copy that every database takes: numpy scalars as numbers, non-finite numbers as text, text without NUL and lone
    surrogates, anything else as its ``str``."""
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
    if value is None or isinstance(value, bool | int | bytes):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return plain(value.item())
    return plain(str(value))


def stored(value: float) -> dict[str, Any]:
    """A metric's value as the columns ``value`` and ``nonfinite``."""
    return {"value": value, "nonfinite": None} if math.isfinite(value) else {"value": None, "nonfinite": str(value)}


def size(value: Any) -> int:
    """Bytes that the value takes in memory, roughly."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return ROW_BYTES + sum(size(item) for item in value.values())
    if isinstance(value, list):
        return sum(size(item) for item in value)
    return 8


def to_json(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def from_json(text: str) -> Any:
    """Raises StoreError for what no run writes."""
    try:
        if len(text) > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES >> 20} MiB")
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, TypeError, RecursionError) as error:
        raise StoreError(f"the run store holds JSON that no run writes: {str(error)[:200]}") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")
