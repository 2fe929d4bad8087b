"""A report for the terminal."""

import textwrap
from collections.abc import Iterator

from service.wording import counted
from training.doctor.findings import Finding, Report

WIDTH = 100
NAMED = 4  # so many layers are named; --json has them all


def as_text(report: Report) -> str:
    """Return the report in plain lines: what, where, why it matters, what to do."""
    folded = f", {report.folded} of them folded away" if report.folded else ""
    layers = counted(report.layers, "BatchNorm layer")
    lines = [f"{report.path}: {report.kind}, {layers}{folded}"]
    lines += [f"note     {note}" for note in report.notes]
    for finding in report.findings:
        lines += _finding(finding)
    lines.append(summary(report))
    return "\n".join(lines)


def summary(report: Report) -> str:
    """Return the counts in one line."""
    if not report.findings:
        return "healthy: nothing found"
    return f"{counted(len(report.errors), 'error')}, {counted(len(report.warnings), 'warning')}"


def named(where: tuple[str, ...]) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(where) - NAMED} more" if len(where) > NAMED else ""
    return ", ".join(where[:NAMED]) + more


def _finding(finding: Finding) -> Iterator[str]:
    yield f"{finding.severity:8} {finding.title} [{finding.check}]: {finding.observed}"
    if finding.where:
        yield from _wrapped("where", named(finding.where))
    yield from _wrapped("why", finding.explanation)
    yield from _wrapped("mend", finding.mend)


def _wrapped(word: str, text: str) -> list[str]:
    indent = " " * 15
    return textwrap.wrap(text, WIDTH, initial_indent=f"         {word:5} ", subsequent_indent=indent)
