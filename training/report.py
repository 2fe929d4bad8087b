"""What a run leaves for people and tools: `metrics.csv`, TensorBoard's event files, `result.json`."""

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.tensorboard import SummaryWriter

from training.checkpoint import write_atomically
from training.errors import RunError
from training.normalization.running import Snapshot, drift, snapshot

METRICS_FILE = "metrics.csv"
RESULT_FILE = "result.json"


@dataclass(frozen=True, slots=True)
class EpochRow:
    """One row of metrics.csv; accuracies are 0 to 1, `seconds` count from the start of training."""

    epoch: int
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    learning_rate: float
    images_per_second: float
    seconds: float


class Recorder:
    """Writes each epoch to metrics.csv, flushed, and to TensorBoard, with the drift of every BatchNorm."""

    def __init__(self, rows: "csv.DictWriter[str]", flush: Any, events: SummaryWriter, path: Path) -> None:
        self._rows = rows
        self._flush = flush
        self._events = events
        self._path = path
        self._statistics: Snapshot | None = None

    def epoch(self, row: EpochRow, model: nn.Module) -> None:
        """Record an epoch. Raises RunError when the disk refuses."""
        values = asdict(row)
        try:
            self._rows.writerow(values)
            self._flush()
        except OSError as error:
            raise RunError(
                f"{self._path} cannot be written: {error.strerror}; make room and go on with --resume"
            ) from None
        for name, value in values.items():
            if name != "epoch":
                self._events.add_scalar(name.replace("_", "/", 1), value, row.epoch)
        self._statistics_of(model, row.epoch)
        self._events.flush()

    def _statistics_of(self, model: nn.Module, epoch: int) -> None:
        now = snapshot(model)
        for name, (mean, variance) in now.items():
            self._events.add_scalar(f"batchnorm/{name}/mean", mean.mean(), epoch)
            self._events.add_scalar(f"batchnorm/{name}/variance", variance.mean(), epoch)
        for name, (mean_way, variance_way) in drift(self._statistics or now, now).items():
            if self._statistics is not None:
                self._events.add_scalar(f"batchnorm/{name}/mean_drift", mean_way, epoch)
                self._events.add_scalar(f"batchnorm/{name}/variance_drift", variance_way, epoch)
        self._statistics = now


class Silent(Recorder):
    """What every process but the first records."""

    def __init__(self) -> None:
        """Need nothing."""

    def epoch(self, row: EpochRow, model: nn.Module) -> None:
        """Record nothing."""


@contextmanager
def recorder(run: Path, last_epoch: int, *, is_writing: bool = True) -> Iterator[Recorder]:
    """Open the run's records after `last_epoch`, 0 for a new run; rows beyond it, of a run cut short, are dropped."""
    if not is_writing:
        yield Silent()
        return
    path = run / METRICS_FILE
    names = [field.name for field in fields(EpochRow)]
    kept = io.StringIO(newline="")
    writer = csv.DictWriter(kept, names)
    writer.writeheader()
    writer.writerows(asdict(row) for row in read_metrics(path) if row.epoch <= last_epoch)
    write_atomically(path, kept.getvalue().encode())
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        with SummaryWriter(str(run), purge_step=last_epoch + 1) as events:
            yield Recorder(writer, file.flush, events, path)


def read_metrics(path: Path) -> list[EpochRow]:
    """Return the rows of a metrics.csv, none where it is missing; a row cut short while it was written is left out."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            _row(values) for values in csv.DictReader(file) if all(values.get(one.name) for one in fields(EpochRow))
        ]


def write_result(run: Path, result: dict[str, Any]) -> None:
    """Write what came of the run."""
    write_atomically(run / RESULT_FILE, (json.dumps(result, indent=2) + "\n").encode())


def read_result(run: Path) -> dict[str, Any]:
    """Return what came of the run. Raises RunError where it has not ended, or the file is none that a run writes."""
    try:
        result = json.loads((run / RESULT_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{run / RESULT_FILE} is missing: the run has not ended; continue it with --resume") from None
    except (OSError, ValueError):
        result = None
    if not isinstance(result, dict):
        raise RunError(f"{run / RESULT_FILE} is damaged; --resume of the run writes it anew")
    return result


def _row(values: dict[str, str]) -> EpochRow:
    numbers = {name: float(text) for name, text in values.items()}
    return EpochRow(**{**numbers, "epoch": int(values["epoch"])})  # type: ignore[arg-type] # the epoch is whole
