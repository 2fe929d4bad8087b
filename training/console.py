"""What a person sees while a network trains: a bar on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from training.loop import Progress as EpochProgress
from training.report import EpochRow


class Display(Protocol):
    """Where progress goes."""

    def step(self, progress: EpochProgress) -> None:
        """A training step ended."""

    def epoch(self, row: EpochRow) -> None:
        """An epoch ended and was validated."""


@contextmanager
def display(epochs: int, first_epoch: int, images_per_epoch: int, *, is_shown: bool = True) -> Iterator[Display]:
    """Give a display for the epochs from `first_epoch` to `epochs`."""
    if not is_shown:
        yield Nothing()
        return
    if not sys.stdout.isatty():
        yield PlainLines(epochs)
        return
    columns = (
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(bar_width=None),
        TextColumn("loss {task.fields[loss]:.4f}  accuracy {task.fields[accuracy]:.2%}"),
        TextColumn("{task.fields[rate]:,.0f} images/s"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=Console()) as bar:
        yield Bar(bar, epochs, first_epoch, images_per_epoch)


class Nothing:
    """What every process but the first shows."""

    def step(self, progress: EpochProgress) -> None:
        """Say nothing."""

    def epoch(self, row: EpochRow) -> None:
        """Say nothing."""


class PlainLines:
    """One line an epoch, for logs."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs

    def step(self, progress: EpochProgress) -> None:
        """Say nothing."""

    def epoch(self, row: EpochRow) -> None:
        """Print the epoch's line."""
        print(describe(row, self._epochs), flush=True)


class Bar:
    """A bar over all epochs, with a line above it for each that ended."""

    def __init__(self, bar: Progress, epochs: int, first_epoch: int, images_per_epoch: int) -> None:
        self._bar = bar
        self._epochs = epochs
        self._images_per_epoch = images_per_epoch
        self._first_epoch = first_epoch
        total = (epochs - first_epoch + 1) * images_per_epoch
        epoch = f"{first_epoch}/{epochs}"
        self._task = bar.add_task("train", total=total, epoch=epoch, loss=0.0, accuracy=0.0, rate=0.0)

    def step(self, progress: EpochProgress) -> None:
        """Move the bar."""
        before = (progress.epoch - self._first_epoch) * self._images_per_epoch
        self._bar.update(
            self._task,
            completed=before + progress.images,
            epoch=f"{progress.epoch}/{self._epochs}",
            loss=progress.loss,
            accuracy=progress.accuracy,
            rate=progress.images / progress.seconds,
        )

    def epoch(self, row: EpochRow) -> None:
        """Print the epoch's line above the bar."""
        self._bar.console.print(describe(row, self._epochs), highlight=False)


def describe(row: EpochRow, epochs: int) -> str:
    """Return the line of an epoch."""
    return (
        f"epoch {row.epoch:>{len(str(epochs))}}/{epochs}  loss {row.train_loss:.4f}  train {row.train_accuracy:.2%}  "
        f"validation {row.validation_accuracy:.2%}  {row.images_per_second:,.0f} images/s"
    )
