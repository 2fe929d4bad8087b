"""A report as one self-contained page: no script, no other file, pictures as inline SVG."""

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from service.wording import counted
from training.checkpoint import write_atomically
from training.doctor.charts import Chart
from training.doctor.findings import Finding, Report
from training.doctor.norms import Layer, Subject
from training.doctor.numbers import share_of
from training.doctor.text import summary
from training.page import Table
from training.pictures import COLOURS

STYLE = """
:root { color-scheme: light dark; --line: #8884; --quiet: #777; --error: #c0392b; --warning: #b9770e; --fine: #2e7d4f; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0 0 .3rem; } p { margin: .3rem 0; } .quiet, figcaption { color: var(--quiet); }
.badge { display: inline-block; color: #fff; border-radius: 1rem; padding: .1rem .8rem; margin: .6rem .4rem 0 0; }
.error > .badge, .badge.error { background: var(--error); } .badge.warning { background: var(--warning); }
.badge.fine { background: var(--fine); }
section { border: 1px solid var(--line); border-left: 4px solid var(--warning); border-radius: 6px;
  padding: .8rem 1.1rem; margin: .9rem 0; }
section.error { border-left-color: var(--error); }
code { font-size: .87em; background: #8882; border-radius: 3px; padding: 0 .25em; overflow-wrap: anywhere; }
figure { margin: 1.2rem 0; } figcaption { font-size: .87rem; } figcaption b { color: CanvasText; }
svg { width: 100%; height: auto; } text { font: 11px system-ui, sans-serif; fill: var(--quiet); }
line.grid { stroke: var(--line); } line.limit { stroke: var(--error); stroke-dasharray: 5 4; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .87rem; }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--quiet); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
.key { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin: 0 .3em 0 .8em; }
"""
MOST_PICTURES, MOST_CHANNELS, NAMED = 6, 40, 12
FAR = 1.0  # in the units of the pictures: what counts as far is 1 for the mean and for the variance
FAR_VARIANCE = np.log(4)
TINY = 1e-12


def write_page(path: Path, report: Report, subject: Subject) -> None:
    """Write the page. Raises RunError when the disk refuses."""
    title = html.escape(f"BatchNorm of {Path(report.path).name}")
    layers = counted(report.layers, "layer")
    body = [f"<h1>{title}</h1>", f'<p class="quiet">{html.escape(report.kind)}, {layers}</p>']
    body += [_badge(report), *(f'<p class="quiet">{html.escape(note)}</p>' for note in report.notes)]
    body += [_section(finding) for finding in report.findings]
    if report.data:
        body += ["<h2>What the images show</h2>", *_drifts(report.data)]
    if subject.layers:
        body += ["<h2>Layers</h2>", _table(subject), *([] if report.data else _spectra(subject))]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    head += f"<style>{STYLE}</style>"
    page = f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>'
    write_atomically(path, page.encode())


def _badge(report: Report) -> str:
    kind = "error" if report.errors else "warning" if report.warnings else "fine"
    return f'<span class="badge {kind}">{summary(report)}</span>'


def _section(finding: Finding) -> str:
    more = f" and {len(finding.where) - NAMED} more" if len(finding.where) > NAMED else ""
    where = ", ".join(f"<code>{html.escape(name)}</code>" for name in finding.where[:NAMED]) + more
    named = f"<p>In {where}</p>" if where else ""
    return (
        f'<section class="{finding.severity}"><h3>{finding.severity}: {html.escape(finding.title)}</h3>'
        f'<p>{html.escape(finding.observed)}</p>{named}<p class="quiet">{html.escape(finding.explanation)}</p>'
        f"<p><b>Mend:</b> {_with_code(finding.mend)}</p></section>"
    )


def _with_code(text: str) -> str:
    return re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _drifts(data: dict[str, Any]) -> Iterator[str]:
    """Draw the layers that drift most, mean and variance each in units of what counts as far."""
    accuracy = data.get("accuracy")
    told = f"{counted(data['images'], 'image')}. "
    if accuracy:
        told += f"Accuracy {accuracy['running']:.1%} by running statistics, {accuracy['batch']:.1%} by the batch's."
    yield f"<p>{told}</p>"
    keys = "".join(
        f'<span class="key" style="background:{colour}"></span>{word}'
        for colour, word in zip(COLOURS, ("mean, of one deviation", "variance, of a factor of four"), strict=False)
    )
    yield f'<p class="quiet">How far each channel of the file is from the data:{keys}. Beyond the line it is far.</p>'
    for one in data["drift"][:MOST_PICTURES]:
        channels = one["channels"][:MOST_CHANNELS]
        means = [entry["mean"] for entry in channels]
        variances = [entry["variance"] / FAR_VARIANCE for entry in channels]
        words = f"{one['far']:.0%} of its channels are far; the worst channels"
        yield Chart(
            one["layer"], words, [str(entry["channel"]) for entry in channels], [means, variances], FAR
        ).to_html()


def _table(subject: Subject) -> str:
    head = ("layer", "channels", "variance", "largest scale", "largest |mean|", "batches", "initial share")
    return Table(head, [_row(layer) for layer in subject.layers]).to_html()


def _row(layer: Layer) -> tuple[str, ...]:
    mean, var, scale, share = layer.running_mean, layer.running_var, layer.scale, share_of(layer)
    return (
        layer.name,
        "–" if var is None else str(len(var)),
        "–" if var is None else f"{var.min():.2g} … {var.max():.2g}",
        "–" if scale is None else f"{scale.max():.3g}",
        "–" if mean is None else f"{np.abs(mean).max():.3g}",
        "–" if layer.num_batches_tracked is None else f"{layer.num_batches_tracked:,}",
        "–" if share is None else f"{share:.2%}",
    )


def _spectra(subject: Subject) -> Iterator[str]:
    """Draw the running variances of the layers where they spread most."""
    drawable = [layer for layer in subject.layers if _logs(layer).size]
    for layer in sorted(drawable, key=lambda one: -float(np.ptp(_logs(one))))[:MOST_PICTURES]:
        heights = _logs(layer)
        order = np.argsort(heights)
        if len(order) > MOST_CHANNELS:
            order = np.r_[order[: MOST_CHANNELS // 2], order[-MOST_CHANNELS // 2 :]]
        low = np.floor(heights.min() - 0.01)
        words = f"running variance of its smallest and largest channels, in decades above 1e{low:.0f}"
        bars = [float(value) for value in heights[order] - low]
        yield Chart(layer.name, words, [str(channel) for channel in order], [bars]).to_html()


def _logs(layer: Layer) -> np.ndarray:
    """Return log10 of each variance, nothing where they are missing, or one cannot be."""
    var = layer.running_var
    usable = var is not None and bool(np.isfinite(var).all() and (var >= 0).all())
    return np.log10(np.maximum(var, TINY)) if usable and var is not None else np.zeros(0)
