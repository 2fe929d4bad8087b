"""A run: a folder with its configuration, metrics, checkpoints and result, made by `train` and read by `export`."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from service.manifest import PixelStatistics
from service.wording import counted
from training import distributed
from training.architectures import build
from training.batches import Batches, epoch_steps
from training.checkpoint import Facts, load_checkpoint, read_facts, refuse_other_data, write_atomically
from training.config import TrainConfig
from training.data import Dataset, load
from training.distributed import processes
from training.errors import DataError, RunError, UsageError
from training.fitting import BEST_FILE, LAST_FILE, Fit
from training.learner import Learner
from training.loop import Normalize, arithmetic, choose_device, warm_up
from training.normalization.domains import of_domain, separate
from training.normalization.layers import Statistics
from training.normalization.running import freeze_affine, freeze_gamma
from training.normalization.synchronized import synchronize
from training.optimization import build_optimizer
from training.outcome import opening_line, result_of
from training.report import METRICS_FILE, RESULT_FILE, read_result, write_result

CONFIG_FILE = "config.json"
PIXEL_CHUNK = 10_000
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

    @property
    def statistics(self) -> Statistics:
        """Which BatchNorm statistics the network holds."""
        return "raw" if self.facts.statistics == "running" else self.facts.statistics

    def by_domain(self) -> "dict[str, Trained]":
        """Return one run for each domain that has BatchNorm of its own, by name; nothing where it is shared."""
        if self.config.domains != "separate":
            return {}
        return {domain: self._of_domain(domain) for domain in self.dataset.domains}

    def _of_domain(self, domain: str) -> "Trained":
        dataset, test_accuracy = self.dataset.of_domain(domain), self.result["domains"][domain]
        told = {"dataset": domain, "split": dataset.split, "test_images": len(dataset.test)}
        result = {**self.result, **told, "test_accuracy": test_accuracy, "domain_of": self.dataset.name}
        return replace(self, dataset=dataset, network=of_domain(self.network, domain), result=result)


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

    Under torchrun every process calls it; the first writes. Raises UsageError, DataError or RunError; nothing that a
    run folder held is lost unless `overwrite`.
    """
    config = _resumed(run) if resume else config
    with processes(choose_device(config.device), say) as device:
        tell = say if distributed.rank() == 0 else _say_nothing
        if not resume and distributed.rank() == 0:  # before the data, which may take minutes
            _refuse_another_run(run, overwrite=overwrite)
        set_threads(config, run / LAST_FILE if resume else None, tell)
        dataset = load_dataset(config, data_dir, download=download, say=tell)
        setup = prepare(config, dataset, device)
        fit = Fit(*setup, domains=dataset.domains, run=run, facts=Facts.at_start(dataset.digest()), say=tell)
        if resume:
            fit.resume()
        tell(opening_line(config, dataset, fit.learner.model, device))
        if kept := _kept_result(run, fit):
            tell(f"the run is over; {run / RESULT_FILE} stays as it is")
            return kept
        if not fit.is_over:
            fit.warmed_up(warm_up(fit.learner, fit.training, tell))
        if not resume and distributed.rank() == 0:  # once nothing is left that could refuse the configuration
            _prepare_folder(run, config)
        distributed.barrier()
        fit.epochs()
        facts = fit.choose_statistics()  # what is described below is what `best` holds
        result = result_of(config, dataset, facts, fit, device)
        if distributed.rank() == 0:
            write_result(run, result)
        return result


def load_dataset(
    config: TrainConfig, data_dir: Path | None, *, download: bool, say: Callable[[str], None] = print
) -> Dataset:
    """Load the data set, downloaded by the first process alone. Raises UsageError or DataError."""
    if distributed.world_size() == 1:
        return load(config, data_dir, download=download, say=say)
    if distributed.rank() == 0:
        load(config, data_dir, download=download, say=say)
    distributed.barrier()
    return load(config, data_dir, say=_say_nothing)


def prepare(config: TrainConfig, dataset: Dataset, device: torch.device) -> tuple[Learner, Batches, Batches]:
    """Build what learns, and put training and validation images where it learns. Raises UsageError or DataError."""
    _check_shares(config)
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.allow_tf32 = False  # what is called float32 is: validation, population statistics
    torch.manual_seed(config.seed)
    pixels = pixel_statistics(dataset, standardise=config.standardise)
    training = Batches.on(device, dataset.training, config.workers)
    epoch_steps(training, config)
    network = build_network(config, dataset)
    if config.freeze_affine:
        freeze_affine(network)
    if config.freeze_gamma:
        freeze_gamma(network)
    if distributed.world_size() > 1 and config.sync_bn:
        network = synchronize(network, device)
    model = nn.Sequential(Normalize(pixels.mean, pixels.std), network)
    model.to(device, torch.float32, memory_format=torch.channels_last)  # type: ignore[call-overload] # not in the stubs
    optimizer = build_optimizer(config, model)
    learner = Learner(model, optimizer, config, domains=dataset.domains, arithmetic=arithmetic(config, device))
    return learner, training, Batches.on(device, dataset.validation, config.workers)


def set_threads(config: TrainConfig, last: Path | None, say: Callable[[str], None] = print) -> None:
    """Use the threads that are asked for, or those of the run that goes on: another number sums in another order."""
    recorded = read_facts(last).threads if last is not None and last.exists() else 0
    wanted = config.threads or recorded
    if wanted and wanted != torch.get_num_threads():
        why = "configured" if config.threads else "the run had"
        say(f"{counted(wanted, 'CPU thread')}, as {why}; here it would be {torch.get_num_threads()}")
        torch.set_num_threads(wanted)


def load_run(run: Path, data_dir: Path | None = None) -> Trained:
    """Load the best checkpoint of a finished run with the data set that it was trained on.

    Raises DataError, or RunError where the run or its data set is not what it was: other files divide into other parts.
    """
    config = read_config(run)
    result = read_result(run)
    dataset = load(config, data_dir)
    refuse_other_data(run / BEST_FILE, dataset.digest())
    network = build_network(config, dataset)
    facts, _ = load_checkpoint(run / BEST_FILE, network)
    pixels = pixel_statistics(dataset, standardise=config.standardise)
    return Trained(config, dataset, pixels, network.eval(), facts, result)


def read_config(run: Path) -> TrainConfig:
    """Return the configuration of a run. Raises RunError."""
    try:
        return TrainConfig.from_mapping(json.loads((run / CONFIG_FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise RunError(f"{run} is not a run folder: {run / CONFIG_FILE} is missing; check the name") from None
    except (OSError, ValueError, UsageError) as error:
        raise RunError(f"{run} is not a run folder: {run / CONFIG_FILE}: {error}") from None


def build_network(config: TrainConfig, dataset: Dataset) -> nn.Module:
    """Build the untrained network of a run, with a BatchNorm for each domain where that is asked for."""
    _, height, _, channels = dataset.training.images.shape
    classes = len(dataset.labels)
    network = build(
        config.architecture,
        channels=channels,
        classes=classes,
        size=height,
        norm=config.norm,
        bn_momentum=config.bn_momentum,
        bn_eps=config.bn_eps,
        dropout=config.dropout,
    )
    return separate(network, dataset.domains) if config.domains == "separate" else network


def pixel_statistics(dataset: Dataset, *, standardise: bool = True) -> PixelStatistics:
    """Return mean and deviation per channel of the training pixels scaled to 0–1, in float64, rounded to 6 digits.

    Without `standardise` they are 0 and 1, which leaves pixels scaled to 0–1 as they are.
    Raises DataError where a channel has one value only: dividing by its deviation would say nothing.
    """
    images = dataset.training.images
    channels = images.shape[-1]
    counts = np.zeros((channels, 256), np.int64)
    for start in range(0, len(images), PIXEL_CHUNK):
        pixels = images[start : start + PIXEL_CHUNK]
        counts += [np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(channels)]
    levels = np.arange(256) / 255
    means = [float(np.average(levels, weights=count)) for count in counts]
    variances = [np.average((levels - mean) ** 2, weights=count) for mean, count in zip(means, counts, strict=True)]
    deviations = tuple(round(float(np.sqrt(variance)), 6) for variance in variances)
    if min(deviations) == 0:
        mend = "check the images" if max(deviations) == 0 else "check the images, or set mode = L"
        raise DataError(
            f"{dataset.name}: every training image has one and the same value in channel {deviations.index(0)}; {mend}"
        )
    if not standardise:
        return PixelStatistics(mean=(0.0,) * channels, std=(1.0,) * channels)
    return PixelStatistics(mean=tuple(round(mean, 6) for mean in means), std=deviations)


def _say_nothing(_: str) -> None:
    pass


def _check_shares(config: TrainConfig) -> None:
    """Raise UsageError where a micro-batch cannot be divided evenly over the processes."""
    size, world = config.batch_size // config.accumulate, distributed.world_size()
    if size % world or (world > 1 and size // world < 2):
        raise UsageError(f"batch_size = {config.batch_size}: {size} images do not divide over {world} processes")


def _resumed(run: Path) -> TrainConfig:
    """Return the configuration of a run that goes on. Raises RunError where it cannot go on as configured."""
    last = run / LAST_FILE
    if not last.exists() and any((run / name).exists() for name in (BEST_FILE, RESULT_FILE)):
        raise RunError(f"{last} is gone, and with it where the run stood; export what there is, or start anew")
    config = read_config(run)
    done = read_facts(last).epoch if last.exists() else 0
    if done > config.epochs:
        raise RunError(
            f"{run / CONFIG_FILE} asks for epochs = {config.epochs}, and {done} are done; nothing was changed: with "
            f"epochs = {done} the run ends as it is, with more it goes on"
        )
    return config


def _kept_result(run: Path, fit: Fit) -> dict[str, Any] | None:
    """Return the result of a run that is over, measured when it ended, unless it is not of what the run holds now."""
    if not fit.is_over:
        return None
    try:
        result = read_result(run)
    except RunError:
        return None
    best = read_facts(run / BEST_FILE)
    wanted = {
        "epochs": fit.config.epochs,
        "best_epoch": best.epoch,
        "validation_accuracy": best.validation_accuracy,
        "statistics": best.statistics,
        "seconds": round(fit.facts.seconds, 1),
    }
    return result if wanted.items() <= result.items() else None


def _holds_a_run(run: Path) -> bool:
    return any((run / name).exists() for name in (BEST_FILE, LAST_FILE, RESULT_FILE))


def _refuse_another_run(run: Path, *, overwrite: bool) -> None:
    if _holds_a_run(run) and not overwrite:
        raise RunError(f"{run} already holds a run; give --resume to continue it, --overwrite, or another --out")


def _prepare_folder(run: Path, config: TrainConfig) -> None:
    if _holds_a_run(run):
        for path in [*(run / name for name in RUN_FILES), *run.glob("events.out.tfevents.*")]:
            path.unlink(missing_ok=True)
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{run} cannot be made: {error.strerror}") from None
    write_atomically(run / CONFIG_FILE, config.to_json().encode())
