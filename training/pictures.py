"""How pictures look, and how they are kept: matplotlib's only owner besides what draws with the axes it hands out."""

from collections.abc import Sequence
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

# Okabe & Ito's colours, told apart with any colour vision
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, FAINT = "#222222", "#DDDDDD"
DOTS_PER_INCH = 110


def figure(title: str, *, width: float = 7.0, height: float = 4.2) -> tuple[Figure, Axes]:
    """Return a figure of inches with one empty plot that has a light grid and no box."""
    canvas, (axes,) = panels([title], width=width, height=height)
    return canvas, axes


def panels(titles: Sequence[str], *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure of inches with empty plots side by side, which share their y axis."""
    canvas = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    plots = canvas.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    return canvas, [style(axes, title) for axes, title in zip(plots, titles, strict=True)]


def style(axes: Axes, title: str) -> Axes:
    """Give a plot its title, grid and colours."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.grid(visible=True, color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#999999")
    axes.tick_params(colors="#444444", labelsize=9)
    return axes


def percent(axes: Axes, *, decimals: int | None = None) -> None:
    """Write the y axis, a share, in percent."""
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=decimals))


def legend(axes: Axes, *, entries: int) -> None:
    """Put the names of the lines where they cover least; in two columns where they are many."""
    axes.legend(frameon=False, fontsize=9, ncols=2 if entries > 5 else 1, loc="best")


def band(axes: Axes, places: Sequence[float], lows: Sequence[float], highs: Sequence[float], colour: str) -> None:
    """Shade what lies between two curves."""
    axes.fill_between(places, lows, highs, color=colour, alpha=0.15, linewidth=0)


def png(canvas: Figure) -> bytes:
    """Return the figure as a PNG file without a date in it."""
    stream = BytesIO()
    canvas.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
