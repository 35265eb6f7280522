"""Lists that come a page at a time. A cursor names the last row seen: what comes or goes meanwhile shifts nothing."""

import base64
import json
import math
from typing import Any, NamedTuple

from services.store.values import plain


class Page(NamedTuple):
    """``next`` is the cursor of the page behind this one; None at the end."""

    rows: list[dict[str, Any]]
    next: str | None


def write_cursor(*values: str | int | float) -> str:
    return base64.urlsafe_b64encode(json.dumps(values, separators=(",", ":")).encode()).decode().rstrip("=")


def read_cursor(cursor: str, *kinds: type | tuple[type, ...]) -> list[Any]:
    """What ``write_cursor`` packed. Raises ``ValueError`` for anything that it didn't write."""
    try:
        values = json.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True))
        fits = isinstance(values, list) and len(values) == len(kinds)
        fits = fits and all(isinstance(value, kind) for value, kind in zip(values, kinds, strict=True))
    except (ValueError, RecursionError):
        fits = False
    if not fits or any(isinstance(value, bool) or _too_large(value) for value in values):
        raise ValueError("the cursor is none: take the one that came with the page before, or none for the first page")
    return [plain(value) if isinstance(value, str) else value for value in values]


def _too_large(value: Any) -> bool:
    return not math.isfinite(value) if isinstance(value, float) else isinstance(value, int) and not abs(value) < 2**63
