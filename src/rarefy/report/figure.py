"""What every figure of the report shares: colours, axes, the reading of a curve, and the way to SVG.

The colours are mid-tones, legible on white and on black. In the page each of them becomes a CSS variable with the same
value as its fallback, so that the figures follow the page's light or dark theme. The text stays text, in the page's
font.
"""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import matplotlib.style
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from rarefy.report.wording import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from numpy.typing import NDArray

INK = "#71767f"
GRID = "#a9aeb8"
RUN = "#3f7fd6"
OTHER = "#8d919b"
AIM = "#d0702a"
SECOND = "#2b9a86"
FAINT = "#9fb6d6"

#: The CSS variable that stands for each colour in the page.
VARIABLES = {INK: "ink-plot", GRID: "grid", RUN: "run", OTHER: "other", AIM: "aim", SECOND: "second", FAINT: "faint"}

#: From the first layer to the last, in mid-tones.
_DEPTH = LinearSegmentedColormap.from_list("depth", ["#3f74d8", "#2b9a86", "#c98a1c", "#cc4b6c"])

WIDTH = 430  # pixels: two figures beside each other on a screen, one on a phone

#: Every figure is drawn under this style, so that the user's own matplotlib settings cannot change a report.
STYLE = matplotlib.style.context(
    [
        "default",
        {
            "font.size": 11,
            "font.family": ["DejaVu Sans"],
            "text.color": INK,
            "text.parse_math": False,  # a layer's name may hold a dollar sign
            "axes.edgecolor": GRID,
            "axes.labelcolor": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.linewidth": 0.8,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.axisbelow": True,
            "axes.unicode_minus": False,
            "grid.color": GRID,
            "grid.alpha": 0.35,
            "grid.linewidth": 0.8,
            "xtick.color": GRID,
            "ytick.color": GRID,
            "xtick.labelcolor": INK,
            "ytick.labelcolor": INK,
            "lines.linewidth": 1.8,
            "lines.solid_capstyle": "round",
            "legend.frameon": False,
            "legend.handlelength": 1.6,
            "legend.borderpad": 0.1,
            "legend.columnspacing": 1.4,
            "svg.fonttype": "none",
            "savefig.transparent": True,
        },
    ]
)


@dataclass(frozen=True)
class Plot:
    """A figure for the page: SVG, with what it shows in words for those who cannot see it."""

    title: str
    caption: str
    alt: str
    svg: str


def figure(height: float = 255, width: float = WIDTH) -> Figure:
    """An empty figure of so many pixels, apart from pyplot and its state."""
    return Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")


def svg(drawn: Figure, salt: str) -> str:
    """The figure as an SVG document, the same at every call; `salt` keeps its ids apart from those of other figures."""
    with matplotlib.rc_context({"svg.hashsalt": salt}), warnings.catch_warnings():
        # Only widths are measured here; whoever shows the SVG has the letters.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font", category=UserWarning)
        text = io.StringIO()
        drawn.savefig(text, format="svg", metadata={"Date": None})
    body = text.getvalue()
    body = body[body.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # "figure_1", "axes_1", ...: the same in all figures, and unused
    body = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag.group()), body)  # 1/100 pixel will do
    return re.sub(r">\s+<", "><", body)


def inline(title: str, caption: str, alt: str, drawn: Figure) -> Plot:
    """The figure as an element for the page, in the page's colours and with `alt` as its label."""
    body = svg(drawn, salt=title)
    for colour, variable in VARIABLES.items():
        body = body.replace(f": {colour}", f": var(--{variable}, {colour})")
    view = re.search(r'viewBox="[^"]*"', body)
    head = f'<svg class="plot" role="img" aria-label="{escape(alt)}" {view.group() if view else ""}>'
    return Plot(title, caption, alt, re.sub(r"^<svg[^>]*>", lambda _: head, body, count=1))


def label(name: str, width: int = 26) -> str:
    """A name from the run as one line of at most `width` characters, cut in the middle.

    matplotlib keeps labels that begin with an underscore out of its legends: a space of no width stands before those.
    """
    clean = "".join(" " if unicodedata.category(letter)[0] in "CZ" else letter for letter in name)
    if len(clean) > width:
        head = (width - 1) // 2
        clean = f"{clean[:head]}…{clean[head + 1 - width :]}"
    return f"\u200b{clean}" if clean.startswith("_") else clean


def curve(
    xs: Sequence[float], ys: Sequence[float | None], most: int = 300
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The points that have a value (infinities as gaps): at most so many, evenly chosen, the last one among them."""
    kept = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None]
    points = np.array(kept, dtype=np.float64).reshape(-1, 2)
    chosen = np.unique(np.linspace(0, max(len(points) - 1, 0), min(most, len(points))).round().astype(int))
    x, y = points[chosen].T
    return x, np.where(np.isfinite(y), y, np.nan)


def depth_colours(layers: int) -> list[str]:
    """A colour for each layer, from the first to the last."""
    return [to_hex(_DEPTH(i / max(layers - 1, 1))) for i in range(layers)]


def percent_axis(axis: Axis) -> None:
    """Ticks of shares as percentages."""
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.4g}\u00a0%"))


def count_axis(axis: Axis) -> None:
    """Ticks of counts as 10 k, 2 M."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value) if value else "0"))
    axis.set_minor_locator(NullLocator())


def epochs_axis(axes: Axes) -> None:
    """The x axis of everything that is drawn over the training."""
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xlim(left=0)


def legend_above(axes: Axes, columns: int = 3) -> None:
    """The legend over the axes, where it covers no curve."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, borderaxespad=0.2)
