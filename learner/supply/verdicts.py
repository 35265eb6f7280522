"""What fails over verdicts: told when it begins and when it becomes more, and too much of it ends the run."""

from collections import Counter
from collections.abc import Iterable

from rewards.errors import GradingFailed
from rollout.messages import GradingFault
from services.store.faults import Cause, OnFault, Part


class Verdicts:
    """Of a whole run.

    Args:
        on_fault: called at the first fault of a kind and whenever their number has doubled; ``times`` says how many
            there were since it was told of the last.
    """

    def __init__(self, on_fault: OnFault) -> None:
        self.failed = 0
        """Verdicts that nobody gave."""
        self._on_fault = on_fault
        self._count: Counter[tuple[Part, Cause, bool]] = Counter()
        self._told: Counter[tuple[Part, Cause, bool]] = Counter()
        self._reason: str | None = None

    def note(self, faults: Iterable[GradingFault]) -> None:
        """These have come, whose groups are not dropped for them."""
        for fault in faults:
            kind = (fault.part, fault.cause, fault.graded)
            self._count[kind] += 1
            if not fault.graded:
                self.failed += 1
                self._reason = fault.error
            count, told = self._count[kind], self._told[kind]
            if count >= max(1, 2 * told):
                self._told[kind] = count
                text = f"{_told(count, fault)}; the last one: {fault.error}"
                self._on_fault(fault.part, fault.cause, text, times=count - told)

    def require_most(self, what: str, *, failed: int, asked: int) -> None:
        """Raises GradingFailed when more than half of the verdicts of ``what`` failed: its rewards say nothing."""
        if 2 * failed > asked:
            raise GradingFailed(
                f"{failed} of {asked} verdicts of {what} failed; the last one: {self._reason}; repair the task's "
                "grade, or raise rollout.grade_timeout_s if it needs longer"
            )


def _told(count: int, fault: GradingFault) -> str:
    if fault.graded:
        graders = "grader" if count == 1 else "graders"
        was = "was" if count == 1 else "were"
        return f"{count} {graders} that {fault.cause} {was} replaced so far, and others gave the verdicts"
    return f"{'1 verdict has' if count == 1 else f'{count} verdicts have'} failed so far and count as wrong"
