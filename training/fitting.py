"""The epochs of a run: train, validate, keep the best, stop early or when asked, and choose the statistics at the end.

`best` holds what validates best, with corrected or population statistics; `last` holds what training goes on from.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn

from service.wording import counted
from training import console, distributed
from training.batches import Batches, epoch_steps
from training.checkpoint import (
    Facts,
    load_average,
    load_checkpoint,
    optimizer_tensors,
    refuse_other_data,
    restore_optimizer,
    save_checkpoint,
)
from training.config import TrainConfig
from training.errors import Diverged, RunError
from training.learner import Learner
from training.loop import Score, Tally, continue_epoch, evaluate
from training.normalization.domains import activate, active
from training.normalization.layers import Statistics
from training.normalization.population import estimate
from training.normalization.running import correction
from training.normalization.synchronized import merge_processes, merge_running_statistics
from training.optimization import learning_rate
from training.report import EpochRow, Recorder, recorder
from training.stopping import asked_to_stop

BEST_FILE = "best.safetensors"
LAST_FILE = "last.safetensors"
POPULATION_BATCH = 250


@dataclass(slots=True)
class Fit:
    """A run while it trains: what learns, from what, into which folder, and where it stands."""

    learner: Learner
    training: Batches
    validation: Batches
    domains: tuple[str, ...]
    run: Path
    facts: Facts
    say: Callable[[str], None] = print
    is_stopping: bool = False

    @property
    def config(self) -> TrainConfig:
        """The run's configuration."""
        return self.learner.config

    def resume(self) -> None:
        """Take up what `last` holds, if it is there. Raises RunError, also where the data set is another by now."""
        path = self.run / LAST_FILE
        if not path.exists():
            return
        refuse_other_data(path, self.facts.data)
        facts, tensors = load_checkpoint(path, self.learner.network)
        self.facts = replace(facts, data=self.facts.data)
        restore_optimizer(path, self.learner.optimizer, tensors)
        if self.learner.average is not None:
            load_average(path, self.learner.average)
        self.learner.restore_loss_scale(self.facts.loss_scale)

    @property
    def is_over(self) -> bool:
        """True where no epoch is left to train."""
        return self.facts.epoch >= self.config.epochs or self._is_patience_over()

    def warmed_up(self, seconds: float) -> None:
        """Note what was paid before training goes on, and how its steps run from here."""
        before, is_compiled = self.facts.warm_up_seconds, self.learner.is_compiled
        self.facts = replace(self.facts, warm_up_seconds=before + seconds, compiled=is_compiled)

    def epochs(self) -> None:
        """Train the epochs that are left. Raises RunError when it was asked to stop, or diverges."""
        per_epoch = epoch_steps(self.training, self.config) * self.config.batch_size
        first = self.facts.epoch + 1
        with (
            recorder(self.run, self.facts.epoch, is_writing=distributed.rank() == 0) as records,
            console.display(self.config.epochs, first, per_epoch, is_shown=distributed.rank() == 0) as display,
            asked_to_stop(self._stop),
        ):
            for epoch in range(first, self.config.epochs + 1):
                if self._is_patience_over():
                    self.say(f"stopped after epoch {self.facts.epoch}: no better since epoch {self.facts.best_epoch}")
                    break
                self._epoch(epoch, records, display)
                if self.is_stopping and epoch < self.config.epochs:
                    raise RunError(f"stopped after epoch {epoch}, which is kept; go on with --resume")

    def choose_statistics(self) -> Facts:
        """Hold population statistics against those of `best` on validation; keep the better there, and say which.

        Averaged weights have had population statistics in every epoch, and keep them.
        """
        path, network = self.run / BEST_FILE, self.learner.network
        if self.facts.best_epoch == 0:
            raise Diverged(
                f"the loss on validation images was not finite after any epoch; train anew with learning_rate lower "
                f"than {self.config.learning_rate}"
            )
        facts, _ = load_checkpoint(path, network)
        if facts.compared or not self._has_choice:
            return facts
        kept = self._validate()
        self._estimate(network)
        found = self._validate()
        compared: dict[str, float] = {facts.statistics: kept.accuracy, "population": found.accuracy}
        if (found.accuracy, -found.loss) > (kept.accuracy, -kept.loss):
            facts = replace(facts, statistics="population", validation_accuracy=found.accuracy)
        else:
            load_checkpoint(path, network)
        facts = replace(facts, compared=compared)
        self._save(path, facts)
        self.say(
            f"BatchNorm statistics: {facts.statistics} kept; validation "
            + ", ".join(f"{accuracy:.2%} with {name}" for name, accuracy in compared.items())
        )
        return facts

    @property
    def _has_choice(self) -> bool:
        """True where the network has running statistics, and others are to be held against them."""
        is_wanted = self.config.population_images > 0 and self.learner.average is None
        return is_wanted and any("running_mean" in name for name, _ in self.learner.network.named_buffers())

    def _epoch(self, epoch: int, records: Recorder, display: console.Display) -> None:
        started = perf_counter()
        facts = self.facts
        tally = Tally(facts.step, *(facts.tally.get(name, 0) for name in ("loss", "hits", "images")))  # type: ignore[arg-type] # JSON keeps whole numbers whole
        trained_before = tally.images
        score = continue_epoch(
            self.learner,
            self.training,
            epoch,
            tally,
            display.step,
            lambda tally: self._after_step(epoch, tally, facts.seconds + perf_counter() - started),
        )
        trained_s = perf_counter() - started
        if distributed.world_size() > 1 and not self.config.sync_bn:
            merge_running_statistics(self.learner.network)
        row = self._validated(
            epoch, score, facts.seconds, started, (tally.images - trained_before) / trained_s, records
        )
        display.epoch(row)

    def _validated(
        self, epoch: int, score: Score, seconds: float, started: float, rate: float, records: Recorder
    ) -> EpochRow:
        """Validate, record, keep: `best` where it is one, then `last`, which makes the epoch count."""
        with self._to_keep() as statistics:
            held_out = self._validate()
            steps = epoch_steps(self.training, self.config)
            row = EpochRow(
                epoch=epoch,
                train_loss=score.loss,
                train_accuracy=score.accuracy,
                validation_loss=held_out.loss,
                validation_accuracy=held_out.accuracy,
                learning_rate=learning_rate(self.config, epoch * steps, self.config.epochs * steps),
                images_per_second=rate * distributed.world_size(),
                seconds=seconds + perf_counter() - started,
            )
            self._keep_best(row, statistics)
        records.epoch(row, self.learner.network)  # before `last`: a row without one is dropped when the run resumes
        self._save_last(replace(self.facts, step=0, tally={}))
        return row

    def _keep_best(self, row: EpochRow, statistics: Statistics) -> None:
        facts = replace(self.facts, epoch=row.epoch, validation_accuracy=row.validation_accuracy, seconds=row.seconds)
        before = facts.best_validation_accuracy, -facts.best_validation_loss
        found = row.validation_accuracy, -row.validation_loss  # accuracy ties often; the loss then decides
        if math.isfinite(row.validation_loss) and found >= before:  # of NaN every answer is the first class
            facts = replace(
                facts,
                best_epoch=row.epoch,
                best_validation_accuracy=row.validation_accuracy,
                best_validation_loss=row.validation_loss,
            )
            self._save(self.run / BEST_FILE, replace(facts, statistics=statistics, step=0, tally={}))
        self.facts = facts

    @contextmanager
    def _to_keep(self) -> Iterator[Statistics]:
        """Let the network hold for a while what is validated and kept: averaged weights, corrected statistics."""
        network, average = self.learner.network, self.learner.average
        if average is None:
            with correction(network, is_on=self.config.bn_bias_correction):
                yield "corrected" if self.config.bn_bias_correction else "raw"
            return
        before = {name: value.clone() for name, value in network.state_dict().items()}
        network.load_state_dict(average.module.state_dict())
        self._estimate(network)
        yield "population"
        network.load_state_dict(before)

    def _validate(self) -> Score:
        return validate(self.learner.model, self.learner.network, self.validation, self.domains, self.config)

    def _estimate(self, network: nn.Module) -> None:
        """Re-estimate population statistics on training images without random changes, domain by domain."""
        shared = not self.domains or self.config.domains != "separate"
        for domain in [None] if shared else range(len(self.domains)):
            if domain is not None:
                activate(network, self.domains[domain])
            estimate_on(self.learner.model, self.training, self.config, domain)

    def _after_step(self, epoch: int, tally: Tally, seconds: float) -> None:
        """Write `last` in the middle of an epoch where that is due, and end the run where it was asked to."""
        every = self.config.save_steps
        is_due = bool(every) and tally.step % every == 0
        is_within = tally.step < epoch_steps(self.training, self.config)
        if is_within and (is_due or self.is_stopping):
            sums = {name: value for name, value in asdict(tally).items() if name != "step"}
            self._save_last(replace(self.facts, step=tally.step, tally=sums, seconds=seconds))
        if self.is_stopping and is_within:
            raise RunError(
                f"stopped in epoch {epoch} after {counted(tally.step, 'step')}, nothing is lost; go on with --resume"
            )

    def _save_last(self, facts: Facts) -> None:
        self.facts = replace(self.facts, step=facts.step, tally=facts.tally)
        scale = self.learner.loss_scale()
        average = None if self.learner.average is None else self.learner.average.state_dict()
        stored = replace(facts, statistics="raw", loss_scale=scale, threads=torch.get_num_threads())
        self._save(self.run / LAST_FILE, stored, optimizer_tensors(self.learner.optimizer), average)

    def _save(
        self,
        path: Path,
        facts: Facts,
        optimizer: dict[str, Tensor] | None = None,
        average: dict[str, Tensor] | None = None,
    ) -> None:
        """Write a checkpoint from the first process; the others wait, so that all may read it next."""
        if distributed.rank() == 0:
            save_checkpoint(path, self.learner.network, facts, optimizer, average)
        distributed.barrier()

    def _is_patience_over(self) -> bool:
        waited = self.facts.epoch - self.facts.best_epoch
        return bool(self.config.patience) and waited >= self.config.patience

    def _stop(self) -> None:
        self.is_stopping = True


def validate(
    model: nn.Module, network: nn.Module, batches: Batches, domains: tuple[str, ...], config: TrainConfig
) -> Score:
    """Evaluate all domains together, each with its own statistics where BatchNorm is kept apart."""
    if config.domains != "separate":
        return evaluate(model, batches)
    counts = np.bincount(batches.domains, minlength=len(domains))
    scores = score_domains(model, network, batches, domains)
    shares = counts / counts.sum()
    return Score(
        float(sum(share * score.loss for share, score in zip(shares, scores, strict=True))),
        float(sum(share * score.accuracy for share, score in zip(shares, scores, strict=True))),
    )


def score_domains(model: nn.Module, network: nn.Module, batches: Batches, domains: tuple[str, ...]) -> list[Score]:
    """Evaluate each domain alone, with its own statistics where it has some."""
    scores = []
    for index, domain in enumerate(domains):
        with active(network, domain):
            scores.append(evaluate(model, batches, index))
    return scores


def estimate_on(model: nn.Module, batches: Batches, config: TrainConfig, domain: int | None = None) -> None:
    """Estimate population statistics on at most `population_images` images, seeded, each process on its share."""
    pool = np.arange(len(batches)) if domain is None else np.flatnonzero(batches.domains == domain)
    wanted = config.population_images or len(pool)
    chosen = np.random.default_rng(config.seed).permutation(pool)[:wanted]
    chosen = chosen[: len(chosen) - len(chosen) % distributed.world_size()]  # so that all take as many steps
    mine = chosen[distributed.rank() :: distributed.world_size()]
    parts = [mine[start : start + POPULATION_BATCH] for start in range(0, len(mine), POPULATION_BATCH)]
    if len(parts) > 1 and len(parts[-1]) < POPULATION_BATCH // 2:
        parts[-2:] = [np.concatenate(parts[-2:])]  # a few images alone would be a poor batch for the layers above
    estimate(model, (images for images, _ in batches.fetch(parts)), merge_processes)
