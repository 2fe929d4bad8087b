"""The examination: a subject's numbers, its graph, and, where images are given, what they show."""

from pathlib import Path

from training.doctor.findings import Finding, Report
from training.doctor.graph import examine_graph
from training.doctor.history import examine_history
from training.doctor.network import examine_network
from training.doctor.norms import Subject
from training.doctor.numbers import examine_numbers, warmth_note
from training.doctor.read import read_subject


def inspect(path: Path, momentum: float | None = None) -> Report:
    """Examine a file without data. Raises FileRefused or UsageError."""
    return examine(read_subject(path, momentum))


def examine(subject: Subject) -> Report:
    """Return the report of what the file alone shows, errors first."""
    findings = [*examine_numbers(subject), *examine_history(subject)]
    if subject.network is not None:
        findings += examine_network(subject.network)
    elif subject.model is not None:
        findings += examine_graph(subject.model)
    notes = [note for note in (warmth_note(subject), _emptiness(subject), _depth(subject)) if note]
    return Report(
        subject.path, subject.kind, len(subject.layers), subject.folded, by_severity(findings), notes=tuple(notes)
    )


def by_severity(findings: list[Finding]) -> tuple[Finding, ...]:
    """Return the errors, then the rest, each in the order in which they were found."""
    return tuple(sorted(findings, key=lambda one: one.severity != "error"))


def _emptiness(subject: Subject) -> str | None:
    if subject.layers or subject.missing:
        return None
    folded = f"; {subject.folded} are folded, as its manifest says" if subject.folded else ""
    return f"no BatchNorm is left in this file{folded}"


def _depth(subject: Subject) -> str | None:
    nested = sum(layer.nested for layer in subject.layers)
    if not nested:
        return None
    return (
        f"{nested} of the BatchNorm layers {'lie' if nested > 1 else 'lies'} in branches or loops (If, Loop, Scan): "
        "judged by numbers alone, not by what stands before them, nor by images; `foldserve repair` does not mend them"
    )
