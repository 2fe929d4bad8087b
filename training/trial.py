"""Trying a configuration without a run: two steps of everything, or a few images learned by heart. Writes nothing."""

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from service.wording import counted
from training import distributed
from training.batches import epoch_steps, training_batches
from training.config import TrainConfig
from training.data import Dataset
from training.distributed import processes
from training.errors import RunError
from training.fitting import estimate_on
from training.loop import Tally, choose_device, continue_epoch, evaluate, warm_up
from training.normalization.domains import activate
from training.normalization.running import correction
from training.outcome import opening_line
from training.run import load_dataset, prepare, set_threads

DRY_STEPS = 2
OVERFIT_STEPS = 300
LEARNED = 1.0  # accuracy


def dry_run(
    config: TrainConfig,
    *,
    data_dir: Path | None = None,
    download: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Load the data, take two training steps, validate, and say what a run would be. Raises as `train` would."""
    with processes(choose_device(config.device)) as device:
        tell = say if distributed.rank() == 0 else _say_nothing
        set_threads(config, None, tell)
        dataset = load_dataset(config, data_dir, download=download, say=tell)
        learner, training, validation = prepare(config, dataset, device)
        tell(opening_line(config, dataset, learner.model, device))
        warm_up(learner, training, tell)
        learner.model.train()
        for _, micro in islice(training_batches(training, config, 1), DRY_STEPS):
            learner.step(micro, 1)
        if dataset.domains:
            activate(learner.network, dataset.domains[0])
        evaluate(learner.model, validation, 0 if dataset.domains else None)
        steps = epoch_steps(training, config)
        tell(f"dry run: {DRY_STEPS} steps and a validation passed; a run takes {config.epochs} × {steps} steps")


def overfit(
    config: TrainConfig,
    count: int,
    *,
    data_dir: Path | None = None,
    download: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Learn `count` training images by heart, unchanged and as one batch; say how well, in both modes of BatchNorm.

    Raises RunError where the network cannot: then something is wrong that more data or time would not mend. Images
    learned by their batch's statistics and lost by the running ones point to BatchNorm.
    """
    dataset = _few(load_dataset(config, data_dir, download=download, say=say), count, config.seed)
    count = len(dataset.training)  # there may be fewer
    config = _by_heart(config, count)
    with processes(choose_device(config.device)) as device:
        learner, training, _ = prepare(config, dataset, device)
        score = None
        for epoch in range(1, OVERFIT_STEPS + 1):
            score = continue_epoch(learner, training, epoch, Tally(), lambda _: None)
            if score.accuracy == LEARNED and score.loss < 0.1:
                break
        assert score is not None
        with correction(learner.network, is_on=config.bn_bias_correction):
            running = evaluate(learner.model, training)
        estimate_on(learner.model, training, config)
        population = evaluate(learner.model, training)
    say(
        f"{counted(count, 'image')}, {counted(epoch, 'step')}: {score.accuracy:.0%} by batch statistics, "
        f"{running.accuracy:.0%} by running, {population.accuracy:.0%} by population statistics"
    )
    if score.accuracy < LEARNED:
        raise RunError(
            f"the network cannot learn {counted(count, 'image')} by heart in {counted(OVERFIT_STEPS, 'step')}; "
            "check labels and learning_rate"
        )
    if max(running.accuracy, population.accuracy) < LEARNED:
        raise RunError("what was learned is lost in evaluation mode: BatchNorm's statistics do not fit the network")


def _by_heart(config: TrainConfig, count: int) -> TrainConfig:
    """Return the configuration without what makes learning by heart harder, and with a constant schedule's length."""
    plain = replace(config.unchanged_images(), domains="union", learning_rate=0.05, weight_ema=0.0)
    return replace(plain, batch_size=count, accumulate=1, epochs=OVERFIT_STEPS)


def _few(dataset: Dataset, count: int, seed: int) -> Dataset:
    chosen = np.random.default_rng(seed).permutation(len(dataset.training))[:count]
    few = dataset.training.take(np.sort(chosen))
    alone = replace(few, domains=np.zeros(len(few), np.int64))
    return replace(dataset, training=alone, domains=())


def _say_nothing(_: str) -> None:
    pass
