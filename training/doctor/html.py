"""A report as one self-contained page: no script, no other file, pictures as inline SVG."""

import html
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from training.checkpoint import write_atomically
from training.doctor.findings import Finding, Report
from training.doctor.norms import Layer, Subject
from training.doctor.text import summary

STYLE = """
:root { color-scheme: light dark; --line: #8886; --error: #c0392b; --warning: #b9770e; --bar: #3a7ca5; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } h3 { font-size: 1rem; margin: 0; }
section { border-left: 4px solid var(--warning); padding: .2rem 0 .2rem 1rem; margin: 1rem 0; }
section.error { border-color: var(--error); }
code { font-size: .85em; overflow-wrap: anywhere; } p { margin: .3rem 0; } svg { width: 100%; height: auto; }
figure { margin: 1rem 0; } figcaption { font-size: .85rem; }
text { font: 11px system-ui, sans-serif; fill: currentColor; }
"""
MOST_PICTURES, MOST_CHANNELS, NAMED = 6, 40, 12
COLOURS = ("#3a7ca5", "#d9822b")
WIDTH, HEIGHT, LEFT = 800, 130, 60
TINY = 1e-12


def write_page(path: Path, report: Report, subject: Subject) -> None:
    """Write the page. Raises RunError when the disk refuses."""
    title = html.escape(f"BatchNorm of {Path(report.path).name}")
    body = [f"<h1>{title}</h1><p>{html.escape(report.kind)}, {report.layers} layers. <b>{summary(report)}</b></p>"]
    body += [f"<p>{html.escape(note)}</p>" for note in report.notes]
    body += [_section(finding) for finding in report.findings]
    pictures = list(_pictures(report, subject))
    if pictures:
        body += ["<h2>Layers</h2>", *pictures]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    head += f"<style>{STYLE}</style>"
    page = f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>'
    write_atomically(path, page.encode())


def _section(finding: Finding) -> str:
    more = f" and {len(finding.where) - NAMED} more" if len(finding.where) > NAMED else ""
    where = ", ".join(f"<code>{html.escape(name)}</code>" for name in finding.where[:NAMED]) + more
    return (
        f'<section class="{finding.severity}"><h3>{finding.severity}: {html.escape(finding.title)}</h3>'
        f"<p>{html.escape(finding.observed)}</p><p>{where}</p><p>{html.escape(finding.explanation)}</p>"
        f"<p><b>Mend:</b> {html.escape(finding.mend)}</p></section>"
    )


def _pictures(report: Report, subject: Subject) -> Iterator[str]:
    """Draw the drifting layers where images were given, else the running variances that spread most."""
    drifts = report.data.get("drift", [])
    for one in drifts[:MOST_PICTURES]:
        caption = (
            f"{one['layer']}: worst channels, |mean in the file − mean of the data| in deviations of the data (blue) "
            "and |ln(variance in the file / variance of the data)| (orange)"
        )
        channels = one["channels"][:MOST_CHANNELS]
        series = [[entry["mean"] for entry in channels], [entry["variance"] for entry in channels]]
        yield _figure(caption, [str(entry["channel"]) for entry in channels], series)
    if not drifts:
        layers = sorted((layer for layer in subject.layers if _is_drawable(layer)), key=_spread, reverse=True)
        for layer in layers[:MOST_PICTURES]:
            yield _spectrum(layer)


def _is_drawable(layer: Layer) -> bool:
    return layer.running_var is not None and bool(np.isfinite(layer.running_var).all())


def _spread(layer: Layer) -> float:
    assert layer.running_var is not None
    return float(np.ptp(_log(layer.running_var)))


def _log(values: np.ndarray) -> np.ndarray:
    return np.asarray(np.log10(np.maximum(np.abs(values), TINY)))


def _spectrum(layer: Layer) -> str:
    assert layer.running_var is not None
    order = np.argsort(layer.running_var)
    worst = np.unique(np.r_[order[: MOST_CHANNELS // 2], order[-MOST_CHANNELS // 2 :]])
    worst = worst[np.argsort(layer.running_var[worst])]
    heights = _log(layer.running_var[worst])
    low = np.floor(heights.min() - 0.01)
    caption = (
        f"{layer.name}: running variance, the {len(worst)} smallest and largest of {len(order)} channels, "
        f"decades above 1e{low:.0f}"
    )
    return _figure(caption, [str(channel) for channel in worst], [[float(value) for value in heights - low]])


def _figure(caption: str, labels: list[str], series: list[list[float]]) -> str:
    """Return bars, one group for each label; the axis ends at the largest value."""
    top = max((value for values in series for value in values if np.isfinite(value)), default=0) or 1.0
    step = (WIDTH - LEFT) / max(1, len(labels))
    width = 0.8 * step / len(series)
    bars = [
        f'<rect x="{LEFT + index * step + place * width:.1f}" y="{HEIGHT - height:.1f}" width="{width:.1f}" '
        f'height="{height:.1f}" fill="{COLOURS[place]}"><title>channel {label}: {value:.3g}</title></rect>'
        for place, values in enumerate(series)
        for index, (label, value) in enumerate(zip(labels, values, strict=True))
        if np.isfinite(height := HEIGHT * min(1.0, value / top) if np.isfinite(value) else HEIGHT)
    ]
    names = [
        f'<text x="{LEFT + (index + 0.4) * step:.1f}" y="{HEIGHT + 14}" text-anchor="middle">{label}</text>'
        for index, label in enumerate(labels)
        if index % max(1, len(labels) // 20) == 0
    ]
    axis = f'<text x="0" y="11">{top:.3g}</text><text x="0" y="{HEIGHT}">0</text>'
    line = f'<line x1="{LEFT}" y1="{HEIGHT}" x2="{WIDTH}" y2="{HEIGHT}" stroke="currentColor"/>'
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT + 20}" role="img">{axis}{line}{"".join(bars)}{"".join(names)}</svg>'
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>{drawing}</figure>"
