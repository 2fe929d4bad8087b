"""A run: a folder with its configuration, metrics, checkpoints and result, made by `train` and read by `export`."""

import json
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from service.artifact import PixelStatistics
from training import console
from training.architectures import build
from training.checkpoint import (
    Facts,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
    write_atomically,
)
from training.config import TrainConfig
from training.data import Dataset, load
from training.errors import RunError, UsageError
from training.loop import (
    Batches,
    Normalize,
    build_optimizer,
    choose_device,
    choose_precision,
    evaluate,
    learning_rate,
    steps_per_epoch,
    train_epoch,
)
from training.report import METRICS_FILE, RESULT_FILE, EpochRow, read_result, recorder, write_result

CONFIG_FILE = "config.json"
BEST_FILE = "best.safetensors"
LAST_FILE = "last.safetensors"
RUN_FILES = (CONFIG_FILE, METRICS_FILE, RESULT_FILE, BEST_FILE, LAST_FILE)


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished run, loaded: `network` takes standardised images, is in evaluation mode and on the CPU."""

    config: TrainConfig
    dataset: Dataset
    pixels: PixelStatistics
    network: nn.Module
    facts: Facts
    result: dict[str, Any]


def train(
    config: TrainConfig,
    run: Path,
    *,
    data_dir: Path | None = None,
    download: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train, or continue, and return the result, which also lies in the run folder.

    Raises UsageError, DataError or RunError; nothing that a run folder held is lost unless `overwrite`.
    """
    config = _resumed(run) if resume else config
    device = choose_device(config.device)
    dataset = load(config, data_dir, download=download)
    steps_per_epoch(len(dataset.training), config)
    torch.manual_seed(config.seed)
    pixels = pixel_statistics(dataset)
    model = nn.Sequential(Normalize(pixels.mean, pixels.std), build_network(config, dataset))
    if not resume:
        _prepare_folder(run, config, overwrite=overwrite)  # once nothing is left that could refuse the configuration
    model.to(device, torch.float32, memory_format=torch.channels_last)  # type: ignore[call-overload] # not in the stubs
    say(_opening_line(config, dataset, model, device))
    seconds = _fit(model, dataset, config, run, device).seconds
    facts, _ = load_checkpoint(run / BEST_FILE, model[1])  # what is described below is what this file holds
    test = evaluate(model, Batches.on(device, dataset.test))
    result = _result(config, dataset, facts, seconds, test.accuracy, device)
    write_result(run, result)
    return result


def load_run(run: Path, data_dir: Path | None = None) -> Trained:
    """Load the best checkpoint of a finished run with its data set. Raises RunError or DataError."""
    config = read_config(run)
    result = read_result(run)
    dataset = load(config, data_dir)
    network = build_network(config, dataset)
    facts, _ = load_checkpoint(run / BEST_FILE, network)
    return Trained(config, dataset, pixel_statistics(dataset), network.eval(), facts, result)


def read_config(run: Path) -> TrainConfig:
    """Return the configuration of a run. Raises RunError."""
    try:
        return TrainConfig.from_mapping(json.loads((run / CONFIG_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, UsageError) as error:
        raise RunError(f"{run} is not a run folder: {run / CONFIG_FILE}: {error}") from None


def build_network(config: TrainConfig, dataset: Dataset) -> nn.Module:
    """Build the untrained network of a run."""
    _, height, _, channels = dataset.training.images.shape
    classes = len(dataset.labels)
    return build(config.architecture, channels=channels, classes=classes, size=height, bn_momentum=config.bn_momentum)


def pixel_statistics(dataset: Dataset) -> PixelStatistics:
    """Return mean and deviation per channel of the training pixels scaled to 0–1, in float64, rounded to 6 digits."""
    pixels = dataset.training.images
    counts = [np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(pixels.shape[-1])]
    levels = np.arange(256) / 255
    means = [float(np.average(levels, weights=count)) for count in counts]
    variances = [np.average((levels - mean) ** 2, weights=count) for mean, count in zip(means, counts, strict=True)]
    deviations = tuple(round(float(np.sqrt(variance)), 6) for variance in variances)
    return PixelStatistics(mean=tuple(round(mean, 6) for mean in means), std=deviations)


def _resumed(run: Path) -> TrainConfig:
    """Return the configuration of a run that goes on. Raises RunError where what it would go on from is gone."""
    if not (run / LAST_FILE).exists() and any((run / name).exists() for name in (BEST_FILE, RESULT_FILE)):
        raise RunError(
            f"{run / LAST_FILE} is gone, and with it where the run stood; export what there is, or start anew"
        )
    return read_config(run)


def _prepare_folder(run: Path, config: TrainConfig, *, overwrite: bool) -> None:
    if any((run / name).exists() for name in (BEST_FILE, LAST_FILE, RESULT_FILE)):
        if not overwrite:
            raise RunError(f"{run} already holds a run; give --resume to continue it, --overwrite, or another --out")
        for path in [*(run / name for name in RUN_FILES), *run.glob("events.out.tfevents.*")]:
            path.unlink(missing_ok=True)
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{run} cannot be made: {error.strerror}") from None
    write_atomically(run / CONFIG_FILE, config.to_json().encode())


def _fit(model: nn.Sequential, dataset: Dataset, config: TrainConfig, run: Path, device: torch.device) -> Facts:
    """Train the epochs that are left; return the facts of the last checkpoint."""
    network, optimizer = model[1], build_optimizer(model, config)
    facts = Facts(
        epoch=0,
        validation_accuracy=0.0,
        best_epoch=0,
        best_validation_accuracy=-1.0,
        best_validation_loss=0.0,
        seconds=0.0,
    )
    if (run / LAST_FILE).exists():
        facts, tensors = load_checkpoint(run / LAST_FILE, network)
        restore_optimizer(optimizer, tensors)
    training, validation = Batches.on(device, dataset.training), Batches.on(device, dataset.validation)
    per_epoch = steps_per_epoch(len(training), config) * config.batch_size
    with (
        recorder(run, facts.epoch) as records,
        console.display(config.epochs, facts.epoch + 1, per_epoch) as display,
    ):
        for epoch in range(facts.epoch + 1, config.epochs + 1):
            row = _one_epoch(model, training, validation, optimizer, config, epoch, facts.seconds, display)
            records.epoch(row, network)  # before the checkpoint: a row without one is dropped when the run resumes
            facts = _keep(run, network, optimizer, row, facts)
            display.epoch(row)
    return facts


def _one_epoch(
    model: nn.Module,
    training: Batches,
    validation: Batches,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    epoch: int,
    seconds_before: float,
    display: console.Display,
) -> EpochRow:
    started = perf_counter()
    score = train_epoch(model, training, optimizer, config, epoch, display.step)
    trained_s = perf_counter() - started
    held_out = evaluate(model, validation)
    images = steps_per_epoch(len(training), config) * config.batch_size
    return EpochRow(
        epoch=epoch,
        train_loss=score.loss,
        train_accuracy=score.accuracy,
        validation_loss=held_out.loss,
        validation_accuracy=held_out.accuracy,
        learning_rate=learning_rate(config, epoch / config.epochs),
        images_per_second=images / trained_s,
        seconds=seconds_before + perf_counter() - started,
    )


def _keep(run: Path, network: nn.Module, optimizer: torch.optim.Optimizer, row: EpochRow, before: Facts) -> Facts:
    """Write the checkpoints of an epoch: `best` where it is one, then `last`, which makes the epoch count."""
    facts = replace(before, epoch=row.epoch, validation_accuracy=row.validation_accuracy, seconds=row.seconds)
    best_so_far = before.best_validation_accuracy, -before.best_validation_loss
    if (row.validation_accuracy, -row.validation_loss) >= best_so_far:  # accuracy ties often; the loss then decides
        facts = replace(
            facts,
            best_epoch=row.epoch,
            best_validation_accuracy=row.validation_accuracy,
            best_validation_loss=row.validation_loss,
        )
        save_checkpoint(run / BEST_FILE, network, facts)
    save_checkpoint(run / LAST_FILE, network, facts, optimizer_tensors(optimizer))
    return facts


def _opening_line(config: TrainConfig, dataset: Dataset, model: nn.Module, device: torch.device) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sizes = f"{len(dataset.training)} training, {len(dataset.validation)} validation, {len(dataset.test)} test images"
    network = f"{config.architecture} ({parameters:,} parameters)"
    return f"{network} on {dataset.name}: {sizes}, {config.epochs} epochs, {device}"


def _result(
    config: TrainConfig, dataset: Dataset, facts: Facts, seconds: float, test_accuracy: float, device: torch.device
) -> dict[str, Any]:
    return {
        "dataset": dataset.name,
        "split": dataset.split,
        "architecture": config.architecture,
        "seed": config.seed,
        "epochs": config.epochs,
        "best_epoch": facts.epoch,
        "validation_accuracy": facts.validation_accuracy,
        "test_accuracy": test_accuracy,
        "test_images": len(dataset.test),
        "seconds": round(seconds, 1),
        "precision": choose_precision(config.precision, device),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "versions": {
            "foldserve": version("foldserve"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _commit() -> str | None:
    """Return the commit of this source tree, marked where it was changed since, or None where it is not in git."""
    git = shutil.which("git")
    if git is None or not (Path(__file__).parent.parent / ".git").exists():
        return None
    answer = subprocess.run(  # noqa: S603 - fixed words
        [git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() if answer.returncode == 0 else None
