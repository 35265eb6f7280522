"""Verdicts that graders failed to give: told when they begin and when they become more, and too many end the run."""

from collections.abc import Callable

from rewards.errors import GradingFailed


class Verdicts:
    """Of a whole run.

    Args:
        on_event: called as (level, kind, text) at the first failure and whenever their number has doubled.
    """

    def __init__(self, on_event: Callable[[str, str, str], None]) -> None:
        self.failed = 0
        self._on_event = on_event
        self._told = 0
        self._reason: str | None = None

    def note(self, failed: int, reason: str | None) -> None:
        """So many more failed, the first of them for this reason."""
        if failed == 0:
            return
        self.failed, self._reason = self.failed + failed, reason
        if self.failed >= max(1, 2 * self._told):
            self._told = self.failed
            count = "1 verdict has" if self.failed == 1 else f"{self.failed} verdicts have"
            text = f"{count} failed so far and count as wrong; the last one: {reason}"
            self._on_event("warning", "grader", text)

    def require_most(self, what: str, *, failed: int, asked: int) -> None:
        """Raises GradingFailed when more than half of the verdicts of ``what`` failed: its rewards say nothing."""
        if 2 * failed > asked:
            raise GradingFailed(
                f"{failed} of {asked} verdicts of {what} failed; the last one: {self._reason}; repair the task's "
                "grade, or raise rollout.grade_timeout_s if it needs longer"
            )
