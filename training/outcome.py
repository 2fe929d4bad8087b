"""What is said of a run: the line before it, and the result after it. Knows no file."""

import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from service.wording import counted
from training import distributed
from training.batches import Batches
from training.checkpoint import Facts
from training.config import TrainConfig
from training.data import Dataset
from training.fitting import Fit, score_domains, validate
from training.loop import choose_precision


def opening_line(config: TrainConfig, dataset: Dataset, model: nn.Module, device: torch.device) -> str:
    """Return what is trained on what, and what BatchNorm sees of it, in one line."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    test = counted(len(dataset.test), "test image")
    sizes = f"{len(dataset.training):,} training, {len(dataset.validation):,} validation, {test}"
    network = f"{config.architecture} ({counted(parameters, 'parameter')})"
    line = f"{network} on {dataset.name}: {sizes}, {counted(config.epochs, 'epoch')}, {device}"
    return line + _seen_by_norms(config)


def _seen_by_norms(config: TrainConfig) -> str:
    """Return in words what a BatchNorm normalises over, where that is not the whole batch of one process."""
    world = distributed.world_size()
    seen = config.batch_size // config.accumulate // (1 if config.sync_bn else world)
    if seen == config.batch_size and world == 1:
        return ""
    parts = f" in {config.accumulate} parts" if config.accumulate > 1 else ""
    over = f" over {world} processes" if world > 1 else ""
    return f"; batches of {config.batch_size}{parts}{over}, of which BatchNorm sees {counted(seen, 'image')} at a time"


def result_of(config: TrainConfig, dataset: Dataset, facts: Facts, fit: Fit, device: torch.device) -> dict[str, Any]:
    """Return what came of a run, as result.json keeps it; the test images are looked at here, once."""
    learner, test = fit.learner, Batches.on(device, dataset.test, config.workers)
    score = validate(learner.model, learner.network, test, dataset.domains, config)
    scores = score_domains(learner.model, learner.network, test, dataset.domains)
    return {
        "dataset": dataset.name,
        "split": dataset.split,
        "architecture": config.architecture,
        "seed": config.seed,
        "epochs": config.epochs,
        "best_epoch": facts.epoch,
        "validation_accuracy": facts.validation_accuracy,
        "test_accuracy": score.accuracy,
        "test_images": len(dataset.test),
        "statistics": facts.statistics,
        "statistics_compared": facts.compared,
        "domains": {name: one.accuracy for name, one in zip(dataset.domains, scores, strict=True)},
        "skipped_images": len(dataset.skipped),
        "seconds": round(fit.facts.seconds, 1),
        "warm_up_seconds": round(fit.facts.warm_up_seconds, 1),
        "compiled": fit.facts.compiled,
        "precision": choose_precision(config.precision, device),
        "processes": distributed.world_size(),
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"CPU, {counted(torch.get_num_threads(), 'thread')}",
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
