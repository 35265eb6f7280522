"""What a row of metrics.jsonl has of an iteration's updates."""

from collections.abc import Sequence

from learner.objectives.statistics import Statistics
from learner.ranks.rank import UpdateReport


def update_metrics(reports: Sequence[UpdateReport]) -> dict[str, float]:
    """Of an iteration's updates."""
    return {
        **reports[0].plan_statistics,
        **Statistics.merged(report.statistics for report in reports).values(),
        "loss": sum(report.loss for report in reports) / len(reports),
        "grad_norm": reports[-1].grad_norm,
        "lr": reports[-1].learning_rate,
        "updates/applied": float(sum(report.applied for report in reports)),
        "updates/forwards": float(sum(report.forwards for report in reports)),
    }
