"""A playback as an animated SVG: for slides and pages where no script may run.

SMIL only (``animate`` with discrete values), no style sheet and no script, so a strict content policy and an ``<img>``
play it too. What can't animate shows the finished text. Times are fractions of one round, which repeats.
"""

import math
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from typing import Literal

from services.dashboard.playback_models import Context, LayoutCell, Playback

Theme = Literal["light", "dark"]

COLOURS: dict[Theme, dict[str, str]] = {
    "light": {
        **{"ground": "#ffffff", "raised": "#eef1f4", "line": "#b9c2cc", "text": "#18212c", "muted": "#586473"},
        **{"accent": "#0a5fa8", "right": "#00734f", "wrong": "#b3361b", "clue": "#586473"},
    },
    "dark": {
        **{"ground": "#141a21", "raised": "#27303a", "line": "#3d4956", "text": "#dfe6ee", "muted": "#95a2b1"},
        **{"accent": "#6db7ff", "right": "#3fc598", "wrong": "#ff8a66", "clue": "#95a2b1"},
    },
}
SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif"
MONO = "ui-monospace, 'SF Mono', 'Cascadia Mono', 'DejaVu Sans Mono', 'Liberation Mono', monospace"

WHOLE_S = 8.0
"""From the first step to the last, where single steps are neither too quick nor too slow."""
STEP_S = (0.06, 0.9)
BEFORE_S, AFTER_S = 1.0, 3.5
"""How long the masked and the finished text stand."""

PANEL, MARGIN, GAP = 430, 20, 16
CELL, TOKEN, LINE, CHARACTER = 38, 26, 30, 8.5
MOST_TOKENS = 600
"""Positions that are drawn; of a longer completion the first."""
MOST_AROUND = 300
"""Characters of each text between gaps; of a longer one those beside the gaps."""
MOST_LINES = 4
"""Of a question."""


def animation(plays: Sequence[Playback], theme: Theme) -> str:
    """One document, or two side by side whose steps go together."""
    return _Picture(plays, theme).drawn()


class _Picture:
    """The drawing: ``y`` is where the next part goes."""

    def __init__(self, plays: Sequence[Playback], theme: Theme) -> None:
        self.plays, self.colour = plays, COLOURS[theme]
        self.steps = max(play.steps for play in plays)
        self.step_s = min(STEP_S[1], max(STEP_S[0], WHOLE_S / self.steps))
        self.round_s = BEFORE_S + self.steps * self.step_s + AFTER_S
        self.width = 2 * MARGIN + len(plays) * PANEL + (len(plays) - 1) * GAP
        self.svg = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "font-family": SANS, "role": "img"})

    def drawn(self) -> str:
        said = " ".join(f"{_name(play)}: {_verdict(play)}." for play in self.plays)
        ET.SubElement(self.svg, "title").text = _visible(f"{self.plays[0].question} {said}")
        ground = self._rect(0.5, 0.5, self.width - 1, 0, fill="ground", stroke="line", rx=10)
        y = self._question(MARGIN + 12)
        lefts = [MARGIN + index * (PANEL + GAP) for index in range(len(self.plays))]
        bottoms = [self._panel(play, x, y + GAP) for play, x in zip(self.plays, lefts, strict=True)]
        height = self._foot(max(bottoms) + GAP) + MARGIN
        ground.set("height", f"{height - 1:g}")
        for name, value in (("width", self.width), ("height", height)):
            self.svg.set(name, f"{value:g}")
        self.svg.set("viewBox", f"0 0 {self.width:g} {height:g}")
        return ET.tostring(self.svg, encoding="unicode")

    # ---- parts

    def _question(self, y: float) -> float:
        question, expected = self.plays[0].question, self.plays[0].expected
        letters = [letter for letter in question if letter.isalpha()]
        capitals = sum(map(str.isupper, letters)) > len(letters) / 2  # a sequence, whose letters are wide
        wide = int((self.width - 2 * MARGIN) / (12 if capitals else 8))
        lines = [line for part in question.splitlines() for line in textwrap.wrap(part, wide)] or [""]
        if len(lines) > MOST_LINES:
            lines = [*lines[: MOST_LINES - 1], f"{lines[MOST_LINES - 1][: wide - 1]}…"]
        for line in lines:
            self._text(MARGIN, y, line, size=16, font_weight="600")
            y += 22
        if expected is not None:
            self._text(MARGIN, y, f"Expected: {' '.join(expected.split())[: wide - 10]}", size=13, fill="muted")
            y += 20
        return y - 8

    def _panel(self, play: Playback, x: float, y: float) -> float:
        self._text(x, y + 14, _name(play), size=14, font_weight="600")
        good = "right" if play.correct else "wrong"
        self._text(x + PANEL, y + 14, _verdict(play), size=14, font_weight="700", fill=good, text_anchor="end")
        y += 28
        left, bottom = x, y
        if play.layout is not None and play.layout.kind == "grid":
            columns = play.layout.columns
            for index, cell in enumerate(play.layout.cells):
                self._cell(play, cell, x + index % columns * CELL, y + index // columns * CELL)
            rows = math.ceil(len(play.layout.cells) / columns)
            self._frame(x, y, columns, rows)
            left, bottom = x + columns * CELL + GAP, y + rows * CELL
        return max(bottom, self._tokens(play, left, y, x + PANEL))

    def _cell(self, play: Playback, cell: LayoutCell, x: float, y: float) -> None:
        at = [play.cells.step[position] + 1 for position in cell.positions if play.cells.drawn[position]]
        shown = max(at, default=0)
        if cell.mark == "clue" or (cell.text and not shown):
            self._rect(x, y, CELL, CELL, fill="raised")
        if not shown:
            self._digit(x, y, cell.text if cell.written is None else cell.written, "clue")
            return
        if not cell.text:
            self._hidden_at(self._rect(x, y, CELL, CELL, fill="raised", stroke="line"), shown)
        elif cell.text != cell.written:
            self._hidden_at(self._digit(x, y, cell.text, "clue"), shown)
        text = self._digit(x, y, cell.written or "", cell.mark or "text")
        if not cell.text or cell.text != cell.written:
            self._shown_at(text, shown)
        if cell.mark == "wrong":
            self._shown_at(self._rect(x, y, CELL, CELL, fill="wrong", opacity=0.16), shown, of=0.16)
        self._flash(self._rect(x + 1, y + 1, CELL - 2, CELL - 2, stroke="accent", stroke_width=2), shown)

    def _digit(self, x: float, y: float, text: str, fill: str) -> ET.Element:
        weight = "700" if fill == "wrong" else "400"
        how = {"text_anchor": "middle", "font_weight": weight}
        return self._text(x + CELL / 2, y + 26, text, size=20, fill=fill, mono=True, **how)

    def _frame(self, x: float, y: float, columns: int, rows: int) -> None:
        box = math.isqrt(columns) if math.isqrt(columns) ** 2 == columns and columns > 1 else columns
        for column in range(columns + 1):
            thick = 2 if column % box == 0 else 1
            self._line(x + column * CELL, y, x + column * CELL, y + rows * CELL, thick)
        for row in range(rows + 1):
            thick = 2 if row % box == 0 else 1
            self._line(x, y + row * CELL, x + columns * CELL, y + row * CELL, thick)

    def _tokens(self, play: Playback, left: float, y: float, right: float) -> float:
        cells, x = play.cells, left
        count = min(MOST_TOKENS, 1 + max((at for at, drawn in enumerate(cells.drawn) if drawn), default=0))
        end = count
        while end > 0 and cells.special[end - 1] and not play.context:
            end -= 1
        around = dict(_around(play.context))
        for at in range(end):
            x, y = self._fixed(around.pop(at, ""), left, x, y, right)
            text = "∎" if cells.special[at] else _visible(cells.text[at])[:40] or "∅"
            wide = max(TOKEN - 4, len(text) * CHARACTER + 8)
            if x + wide > right and x > left:
                x, y = left, y + LINE
            self._token(text, x, y, min(wide, right - left), [cells.step[at] + 1], cells.mark[at])
            x += wide + 3
            if "\n" in cells.text[at]:
                x, y = left, y + LINE
        if end < count:
            text = f"∎ ×{count - end}"
            wide = len(text) * CHARACTER + 8
            if x + wide > right and x > left:
                x, y = left, y + LINE
            self._token(text, x, y, wide, [cells.step[at] + 1 for at in range(end, count)], None)
        for text in around.values():
            x, y = self._fixed(text, left, x, y, right)
        return y + TOKEN

    def _fixed(self, text: str, left: float, x: float, y: float, right: float) -> tuple[float, float]:
        """Text of the prompt beside a gap, broken anywhere; where the next token goes."""
        for number, line in enumerate(text.split("\n")):
            if number:
                x, y = left, y + LINE
            while line:
                room = int((right - x) / CHARACTER)
                if room < 1:
                    x, y = left, y + LINE
                    continue
                self._text(x, y + 18, line[:room], size=14, fill="muted", mono=True)
                x, line = x + len(line[:room]) * CHARACTER + 3, line[room:]
        return x, y

    def _token(self, text: str, x: float, y: float, wide: float, steps: list[int], mark: str | None) -> None:
        """Of several steps (the folded end) the token stands from the last one on."""
        known = mark if mark in ("right", "wrong") else None
        self._shown_at(self._rect(x, y, wide, TOKEN, stroke=known or "line", rx=4), max(steps))
        shown = self._text(x + wide / 2, y + 18, text, size=14, text_anchor="middle", mono=True, fill=known or "text")
        self._shown_at(shown, max(steps))
        self._hidden_at(self._rect(x, y, wide, TOKEN, fill="raised", stroke="line", rx=4), max(steps))
        for step in sorted(set(steps)):
            self._flash(self._rect(x, y, wide, TOKEN, stroke="accent", stroke_width=2, rx=4), step)

    def _foot(self, y: float) -> float:
        wide = self.width - 2 * MARGIN
        self._rect(MARGIN, y, wide, 4, fill="raised", rx=2)
        bar = self._rect(MARGIN, y, wide, 4, fill="accent", rx=2)
        times = [0.0, *(self._time(step) for step in range(1, self.steps + 1))]
        widths = [f"{wide * step / self.steps:g}" for step in range(self.steps + 1)]
        self._animate(bar, "width", widths, times)
        for step in range(self.steps + 1):
            masked = [sum(at >= step for at in play.cells.step) for play in self.plays]
            left = " and ".join(map(str, masked)) if any(masked) else "none"
            text = self._text(MARGIN, y + 24, f"Step {step} of {self.steps}: {left} masked", size=13, fill="muted")
            last = step == self.steps
            values = [*(["0"] if step else []), "1", *([] if last else ["0"])]
            times = [0.0] if not step else [0.0, self._time(step)]
            self._animate(text, "opacity", values, [*times, *([] if last else [self._time(step + 1)])])
            text.set("opacity", "1" if last else "0")
        return y + 28

    # ---- pieces

    def _time(self, step: int) -> float:
        """When a step, from 1, is done."""
        return (BEFORE_S + (step - 1) * self.step_s) / self.round_s

    def _shown_at(self, element: ET.Element, step: int, of: float = 1.0) -> None:
        self._animate(element, "opacity", ["0", f"{of:g}"], [0.0, self._time(step)])

    def _hidden_at(self, element: ET.Element, step: int) -> None:
        element.set("opacity", "0")
        self._animate(element, "opacity", ["1", "0"], [0.0, self._time(step)])

    def _flash(self, element: ET.Element, step: int) -> None:
        element.set("opacity", "0")
        end = self._time(step + 1) if step < self.steps else self._time(step) + self.step_s / self.round_s
        self._animate(element, "opacity", ["0", "1", "0"], [0.0, self._time(step), end])

    def _animate(self, element: ET.Element, name: str, values: Sequence[str], times: Sequence[float]) -> None:
        about = {"attributeName": name, "calcMode": "discrete", "repeatCount": "indefinite"}
        about |= {"dur": f"{self.round_s:.2f}s", "values": ";".join(values)}
        ET.SubElement(element, "animate", about | {"keyTimes": ";".join(f"{time:.4f}" for time in times)})

    def _rect(self, x: float, y: float, wide: float, high: float, **how: str | float) -> ET.Element:
        """``fill`` and ``stroke`` are names of colours, none where not given."""
        about = {"x": f"{x:g}", "y": f"{y:g}", "width": f"{wide:g}", "height": f"{high:g}", "fill": "none"}
        for name, value in how.items():
            about[name.replace("_", "-")] = self.colour[value] if isinstance(value, str) else f"{value:g}"
        return ET.SubElement(self.svg, "rect", about)

    def _line(self, x1: float, y1: float, x2: float, y2: float, wide: float) -> None:
        about = {"x1": f"{x1:g}", "y1": f"{y1:g}", "x2": f"{x2:g}", "y2": f"{y2:g}", "stroke-width": f"{wide:g}"}
        ET.SubElement(self.svg, "line", about | {"stroke": self.colour["line"]})

    def _text(
        self, x: float, y: float, text: str, *, size: int, fill: str = "text", mono: bool = False, **how: str
    ) -> ET.Element:
        about = {"x": f"{x:g}", "y": f"{y:g}", "font-size": str(size), "fill": self.colour[fill]}
        about |= {"font-family": MONO} if mono else {}
        about |= {name.replace("_", "-"): value for name, value in how.items()}
        element = ET.SubElement(self.svg, "text", about)
        element.text = _visible(text)
        return element


def _around(context: Sequence[Context]) -> Iterator[tuple[int, str]]:
    """Of each text between gaps where it stands, and what is drawn of it."""
    half = MOST_AROUND // 2
    for number, piece in enumerate(context):
        text, first, last = piece.text, number == 0 and piece.before == 0, number == len(context) - 1
        if len(text) > MOST_AROUND:
            ends = text[:half], text[-half:]
            text = f"…{text[-MOST_AROUND:]}" if first else f"{text[:MOST_AROUND]}…" if last else "…".join(ends)
        yield piece.before, text


def _name(play: Playback) -> str:
    if play.kind == "train":
        return f"iteration {play.iteration}, completion {play.row + 1}"
    return "base model" if play.kind == "base" else f"{play.kind}, iteration {play.iteration}"


def _verdict(play: Playback) -> str:
    return "✓ right" if play.correct else "✗ wrong"


def _visible(text: str) -> str:
    """Text of which XML takes every character, and a reader sees each."""
    signs = {"\n": "↵", "\t": "⇥"}
    return "".join(signs.get(one, one if one.isprintable() else "·") for one in text)
