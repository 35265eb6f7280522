"""What all plots share: colours, style, a figure that needs no display, its file. matplotlib is loaded when one is
drawn."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which stay apart for colour-blind eyes too.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
INK, FAINT = "#22262b", "#6b7280"
STYLE: Any = {
    "font.size": 10.5,
    "text.color": INK,
    "text.parse_math": False,  # names may hold any character
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa1ab",
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "legend.fontsize": 9.5,
    "lines.solid_capstyle": "round",
}


def new_figure(**how: Any) -> "Figure":
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    return Figure(**how)


def save_figure(figure: "Figure", path: Path) -> Path:
    """Write a PNG; a reader finds the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(temporary, dpi=130, facecolor="white", format="png")
        return temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
