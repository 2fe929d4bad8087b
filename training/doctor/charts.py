"""Bar charts of channels as inline SVG, and what they say in words."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.pictures import COLOURS

WIDTH, HEIGHT, LEFT, TOP, FOOT = 800, 120, 44, 14, 18
LABELS = 20  # under an axis
MOST_LIMITS = 6.0  # a bar ends here, with its number above it: one wild channel shall not flatten the rest


@dataclass(frozen=True, slots=True)
class Chart:
    """Groups of bars, one for each channel; `limit` is drawn as a dashed line where there is one."""

    title: str
    words: str
    labels: Sequence[str]
    series: Sequence[Sequence[float]]
    limit: float | None = None

    def to_html(self) -> str:
        """Return a figure; what a bar stands for is its tooltip."""
        values = [value for one in self.series for value in one if np.isfinite(value)]
        top = max([*values, 1e-12])
        if self.limit is not None:
            top = min(max(top, 1.25 * self.limit), MOST_LIMITS * self.limit)
        parts = [*self._axis(top), *self._bars(top), *self._names()]
        box = f'viewBox="0 0 {WIDTH} {TOP + HEIGHT + FOOT}" role="img" aria-label="{html.escape(self.words)}"'
        title, words = html.escape(self.title), html.escape(self.words)
        return f"<figure><figcaption><b>{title}:</b> {words}</figcaption><svg {box}>{''.join(parts)}</svg></figure>"

    @property
    def _step(self) -> float:
        return (WIDTH - LEFT) / max(1, len(self.labels))

    def _bars(self, top: float) -> list[str]:
        width = min(0.8 * self._step / len(self.series), 26)
        bars = []
        for place, values in enumerate(self.series):
            for index, value in enumerate(values):
                height = HEIGHT * (min(1.0, value / top) if np.isfinite(value) else 1.0)
                left = LEFT + (index + 0.5) * self._step + (place - len(self.series) / 2) * width
                bars.append(
                    f'<rect x="{left:.1f}" y="{TOP + HEIGHT - height:.1f}" width="{0.92 * width:.1f}" rx="1.5" '
                    f'height="{max(height, 0.5):.1f}" fill="{COLOURS[place]}">'
                    f"<title>channel {html.escape(self.labels[index])}: {value:.3g}</title></rect>"
                )
                if not value <= top:
                    bars.append(_text(left + width / 2, TOP - 3, f"{value:.3g}", "middle"))
        return bars

    def _axis(self, top: float) -> list[str]:
        marks = {0.0: "0", top: f"{top:.3g}"} | ({} if self.limit is None else {self.limit: f"{self.limit:.3g}"})
        lines = []
        for value, word in marks.items():
            y = TOP + HEIGHT * (1 - value / top)
            kind = "limit" if value == self.limit else "grid"
            lines.append(f'<line class="{kind}" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH}" y2="{y:.1f}"/>')
            lines.append(_text(LEFT - 6, y + 4, word, "end"))
        return lines

    def _names(self) -> list[str]:
        every = max(1, -(-len(self.labels) // LABELS))
        return [
            _text(LEFT + (index + 0.5) * self._step, TOP + HEIGHT + 13, label, "middle")
            for index, label in enumerate(self.labels)
            if index % every == 0
        ]


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'
