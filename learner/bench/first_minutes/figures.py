"""A figure of a step, beside what is expected of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    figure: str
    measured: float | int | str | None
    """None: can't be measured here."""
    expected: float | str | None = None
    """An estimate, or a bound as text; None where nothing is known."""
    note: str = ""
