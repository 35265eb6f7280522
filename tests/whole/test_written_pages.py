"""docs/metrics.md and docs/costs.md hold what the code says now."""

from services.dashboard.metric_reference import METRICS
from tests.support.written_pages import pages, with_part


def test_pages_are_what_the_code_says() -> None:
    for path, text in pages().items():
        assert path.read_text(encoding="utf-8") == text, "old: python -m tests.support.written_pages"
        assert with_part(text, "another part") != text, "the control"
        if path.name == "metrics.md":
            assert all(text.count(f"\n| `{metric.name}` | {metric.what}") == 1 for metric in METRICS)
