"""Evaluates a finished run on its test images and writes what came of it: PNG, CSV, JSON and one HTML page."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from service.artifact import Artifact
from service.wording import counted
from training.batches import Batches
from training.checkpoint import write_atomically
from training.errors import RunError, UsageError
from training.evaluation.drawing import draw_confusion, draw_reliability, draw_worst
from training.evaluation.measures import (
    Calibration,
    ClassScore,
    calibration,
    class_scores,
    confusion,
    probabilities,
    worst,
)
from training.loop import Normalize
from training.normalization.domains import active
from training.page import Picture, Section, Table, build_page
from training.run import Trained

FOLDER = "evaluation"
CARD_HEADING = "## Evaluation\n"
OF_THE_RUN = ("dataset", "architecture", "seed", "best_epoch", "test_accuracy", "seconds")  # no two runs have all alike


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was found on the test images."""

    accuracy: float
    matrix: NDArray[np.int64]  # (classes, classes): is, called
    classes: list[ClassScore]
    calibration: Calibration
    chances: NDArray[np.float64]  # (N, classes)
    worst: NDArray[np.int64]  # indices of test images


def evaluate_run(trained: Trained, *, worst_images: int) -> Evaluation:
    """Run the best network of a finished run over its test images, one answer each."""
    test, labels = trained.dataset.test, trained.dataset.labels
    chances = probabilities(_logits(trained))
    guesses = chances.argmax(axis=1)
    matrix = confusion(test.targets, guesses, len(labels))
    return Evaluation(
        accuracy=float((guesses == test.targets).mean()),
        matrix=matrix,
        classes=class_scores(matrix, labels),
        calibration=calibration(chances.max(axis=1), guesses == test.targets),
        chances=chances,
        worst=worst(chances, test.targets, worst_images),
    )


def write_evaluation(trained: Trained, found: Evaluation, folder: Path) -> list[Path]:
    """Write pictures, tables and page into `folder`; return the files. Raises RunError when the disk refuses."""
    labels = trained.dataset.labels
    pictures = {
        "confusion.png": draw_confusion(found.matrix, labels),
        "reliability.png": draw_reliability(found.calibration),
        "worst.png": draw_worst(trained.dataset.test.images[found.worst], _captions(trained, found)),
    }
    contents = {
        **pictures,
        "confusion.csv": _csv(
            [["", *labels], *([label, *row] for label, row in zip(labels, found.matrix, strict=True))]
        ),
        "classes.csv": _csv([list(asdict(found.classes[0])), *(list(asdict(one).values()) for one in found.classes)]),
        "worst.csv": _csv([["test image", "is", "called", "probability of what it is"], *_worst_rows(trained, found)]),
        "evaluation.json": (json.dumps(_numbers(found), indent=2) + "\n").encode(),
        "evaluation.html": _page(trained, found, pictures).encode(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be made: {error.strerror}") from None
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [folder / name for name in contents]


def for_card(trained: Trained, model: Path) -> Trained:
    """Return the part of a run that an artifact's folder holds: one domain, where each has BatchNorm of its own.

    Raises ArtifactError where the model cannot be read, UsageError where it is another run's or of none of the domains.
    """
    told, domains = Artifact.load(model).manifest.training, trained.by_domain()
    domain = str(told.get("dataset"))
    if domains and domain not in domains:
        raise UsageError(f"{model} is of {domain}, expected one of the run's domains: {', '.join(domains)}")
    part = domains[domain] if domains else trained
    if other := next((key for key in OF_THE_RUN if told.get(key) != part.result.get(key)), None):
        raise UsageError(
            f"{model} is another run's: its {other} is {told.get(other)}, this run's {part.result.get(other)}; export "
            "this run, or name the model that it became"
        )
    return part


def write_card(trained: Trained, found: Evaluation, model: Path) -> Path:
    """Put the evaluation into the model card of an artifact's folder, in the place of an earlier one; return the card.

    Raises RunError where there is no card, or the disk refuses.
    """
    path = model / "README.md"
    try:
        card = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise RunError(
            f"{path} is missing; name the folder that `foldserve export` wrote, models/NAME/VERSION"
        ) from None
    before = card.partition(CARD_HEADING)[0].rstrip("\n")
    write_atomically(path, f"{before}\n\n{CARD_HEADING}{_card_section(trained, found)}".encode())
    return path


def _card_section(trained: Trained, found: Evaluation) -> str:
    rows = "\n".join(
        f"| {one.label} | {one.images} | {_share(one.precision)} | {_share(one.recall)} | {_share(one.f1)} |"
        for one in found.classes
    )
    return (
        f"\n{found.accuracy:.2%} of {counted(len(trained.dataset.test), 'test image')}; expected calibration error "
        f"{found.calibration.error:.2%} in {len(found.calibration.counts)} bins of confidence.\n\n"
        f"| class | images | precision | recall | F1 |\n|---|---|---|---|---|\n{rows}\n"
    )


@torch.no_grad()
def _logits(trained: Trained) -> NDArray[np.float64]:
    """Return the logits of the test images (N, classes), each domain's with its own BatchNorm where it has one."""
    model = nn.Sequential(Normalize(trained.pixels.mean, trained.pixels.std), trained.network).float().eval()
    test, domains = Batches.on(torch.device("cpu"), trained.dataset.test), trained.dataset.domains
    logits = np.empty((len(test), len(trained.dataset.labels)))
    for index, domain in enumerate(domains or ("",)):
        order = test.in_order(index if domains else None)
        with active(trained.network, domain):
            for places, (images, _) in zip(order, test.fetch(order), strict=True):
                logits[places] = model(images).double().numpy()
    return logits


def _numbers(found: Evaluation) -> dict[str, Any]:
    return {
        "accuracy": found.accuracy,
        "expected_calibration_error": found.calibration.error,
        "largest_calibration_error": found.calibration.largest,
        "mean_confidence": float(found.chances.max(axis=1).mean()),
        "classes": [asdict(one) for one in found.classes],
    }


def _page(trained: Trained, found: Evaluation, pictures: dict[str, bytes]) -> str:
    result, test = trained.result, trained.dataset.test
    lead = (
        f"{found.accuracy:.2%} of {counted(len(test), 'test image')} of {trained.dataset.name}, which chose nothing. "
        f"{result['architecture']}, seed {result['seed']}, epoch {result['best_epoch']}, trained {result['date']}."
    )
    table = Table(
        ["class", "images", "precision", "recall", "F1"],
        [[one.label, str(one.images), *map(_share, (one.precision, one.recall, one.f1))] for one in found.classes],
    )
    mean = float(found.chances.max(axis=1).mean())
    way = "more" if mean > found.accuracy else "less"
    trust = (
        f"On average the network is {abs(mean - found.accuracy):.2%} {way} confident than right; the expected "
        f"calibration error is {found.calibration.error:.2%} in {len(found.calibration.counts)} bins."
    )
    sections = [
        Section("Classes", "Of each class: how many of what is called so is so, how many of it are found.", [table]),
        Section("Confusion", "Rows: what an image is. Columns: what it was called.", [_shown(pictures, "confusion")]),
        Section("Calibration", trust, [_shown(pictures, "reliability")]),
        Section("Worst images", "Those whose own class got the least probability.", [_shown(pictures, "worst")]),
    ]
    return build_page(f"Evaluation of {trained.dataset.name}", lead, sections)


def _shown(pictures: dict[str, bytes], name: str) -> Picture:
    return Picture(pictures[f"{name}.png"], name)


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.2%}"


def _captions(trained: Trained, found: Evaluation) -> list[str]:
    return [f"{is_} → {called}\n{chance:.1%}" for _, is_, called, chance in _worst_rows(trained, found)]


def _worst_rows(trained: Trained, found: Evaluation) -> list[tuple[int, str, str, float]]:
    labels, targets = trained.dataset.labels, trained.dataset.test.targets
    return [
        (
            int(index),
            labels[targets[index]],
            labels[found.chances[index].argmax()],
            float(found.chances[index, targets[index]]),
        )
        for index in found.worst
    ]


def _csv(rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()
