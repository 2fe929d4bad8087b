"""One optimizer step: forward and backward of each micro-batch, under autocast, guarded, clipped, averaged.

BatchNorm sees a micro-batch (of all processes where it is synchronised). A micro-batch whose loss or statistics are
not finite leaves every running statistic of the network as it was.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from training import compiling, distributed
from training.batches import Batch
from training.config import TrainConfig
from training.errors import Diverged, RunError
from training.normalization.domains import activate
from training.normalization.running import StatisticsKeeper, freeze_statistics
from training.normalization.synchronized import keep_whole, set_apart
from training.optimization import penalty

MOST_SKIPPED = 20  # steps in a row; each halves the loss scale, which 20 take from its 65,536 at the start to below 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """Sums over a step's images of this process."""

    loss: float
    hits: int
    images: int


class Learner:
    """A classifier of uint8 images with its optimizer; `network` is the part of `model` that is trained."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        *,
        domains: Sequence[str] = (),
        arithmetic: torch.dtype = torch.float32,
    ) -> None:
        self.model = model
        self.network = model[1] if isinstance(model, nn.Sequential) and len(model) == 2 else model
        self.optimizer = optimizer
        self.config = config
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=arithmetic == torch.float16)
        self.average = _average(self.network, config.weight_ema)
        self.skipped = 0  # steps in a row
        self._scale = self.scaler.get_scale()  # as it was read last: a GPU would wait for each read
        self._domains = domains
        self._arithmetic = arithmetic
        self._keeper = StatisticsKeeper(self.network)
        self._parallel = _parallel(model, config) if distributed.is_joined() else model
        self.is_compiled = False  # until it is warmed up
        self._judge = self._judged

    def warm_up(self, batch: Batch) -> str | None:
        """Compile the step where `compile` says so, and take a micro-batch there and back without learning from it.

        What a first step costs is then paid; statistics and weights stay as they are. Returns why the step is not
        compiled after all where `compile` is auto and torch cannot; raises RunError where it is on.
        """
        try:
            reason = self._compile(batch) if compiling.is_wanted(self.config, self.device) else None
            if not self.is_compiled or distributed.is_joined():
                self._rehearse(batch)
        finally:  # not sooner: torch's reducer asks for the gradient of what took part in a pass of one process alone
            self.optimizer.zero_grad(set_to_none=True)
        return reason

    def _compile(self, batch: Batch) -> str | None:
        """Compile in all processes or in none: the first pass asks nothing of the others, who might wait for ever."""
        failed = compiling.failure(distributed.gathered(self._tried(batch)))
        if failed is None:
            self.is_compiled = True
            return None
        self._judge = self._judged
        if self.config.compile == "on":
            raise compiling.refusal(failed)
        return failed

    def _tried(self, batch: Batch) -> str:
        """Return why this process cannot compile the step, nothing where it can."""
        try:
            keep_whole(self.network)
            self._judge = compiling.compiled(self._judged)
            self._rehearse(batch, is_alone=True)
        except compiling.FAILURES as error:
            return compiling.reason_of(error)
        return ""

    def _rehearse(self, batch: Batch, *, is_alone: bool = False) -> None:
        """Take a micro-batch there and back as each domain, and with frozen statistics where these are to come."""
        modes = (False, True) if self.config.freeze_statistics_from else (False,)
        self._keeper.keep()
        try:
            with _named_refusals(self.config):
                for domain, is_frozen in product(self._domains or [""], modes):
                    activate(self.network, domain)
                    self.model.train()
                    if is_frozen:
                        freeze_statistics(self.network)
                    if is_alone:
                        set_apart(self.network)
                    self._forward_backward(batch, 1, last=not is_alone)
        finally:
            self.model.train()
            self._keeper.restore()

    def step(self, micro: list[Batch], epoch: int) -> Outcome:
        """Learn from the micro-batches of one step; in float16, skip it where its loss or gradient is not finite.

        Raises Diverged where the loss is not finite, in float16 after MOST_SKIPPED such steps in a row; RunError where
        an operation that has to be deterministic is not.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with _named_refusals(self.config):
            outcomes = [self._backward(batch, len(micro), last=batch is micro[-1]) for batch in micro]
        is_finite = all(outcome is not None for outcome in outcomes)
        if not is_finite and not self.scaler.is_enabled():
            raise Diverged(
                f"the loss is not finite in epoch {epoch}; set learning_rate lower than {self.config.learning_rate}"
            )
        self._count_skipped(epoch, is_taken=self._update(is_finite=is_finite))
        good = [outcome for outcome in outcomes if outcome is not None]
        return Outcome(sum(one.loss for one in good), sum(one.hits for one in good), sum(one.images for one in good))

    def loss_scale(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of float16's loss scale, and of the steps skipped in a row."""
        return {**self.scaler.state_dict(), "skipped": self.skipped}

    def restore_loss_scale(self, kept: Mapping[str, Any]) -> None:
        """Take up what `loss_scale` returned."""
        self.skipped = int(kept.get("skipped", 0))
        self.scaler.load_state_dict({name: value for name, value in kept.items() if name != "skipped"})
        self._scale = self.scaler.get_scale()

    def _backward(self, batch: Batch, parts: int, *, last: bool) -> Outcome | None:
        """Add a micro-batch's gradient; None where it is not finite: no statistic has moved, no step must follow."""
        if self._domains and batch.domain >= 0:
            activate(self.network, self._domains[batch.domain])
        self._keeper.keep()
        loss, hits = self._forward_backward(batch, parts, last=last)
        # Read all at once and after the backward pass is under way: a GPU would wait for each number that is read.
        read = torch.stack([self._keeper.is_finite(loss), loss.detach(), hits]).tolist()
        if not self._all_finite(is_finite=read[0] == 1):
            self._keeper.restore()
            return None
        count = len(batch.targets)
        return Outcome(read[1] * count, int(read[2]), count)

    def _forward_backward(self, batch: Batch, parts: int, *, last: bool) -> tuple[Tensor, Tensor]:
        """Return the loss and the number of right answers of a micro-batch, its gradient on the way."""
        with self._unsynchronised(last=last):
            with self._autocast():
                loss, hits = self._judge(batch.images, batch.targets)
            loss = loss + penalty(self.config, self.network)
            self.scaler.scale(loss / parts).backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
        return loss, hits

    def _judged(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss and the number of right answers: what is compiled where that is asked for."""
        logits = self._parallel(images)
        loss = functional.cross_entropy(logits.float(), targets, label_smoothing=self.config.label_smoothing)
        return loss, (logits.argmax(1) == targets).sum()

    def _all_finite(self, *, is_finite: bool) -> bool:
        return distributed.summed([float(is_finite)], self.device) == [float(distributed.world_size())]

    def _update(self, *, is_finite: bool) -> bool:
        """Take the step; False where float16's loss scale was halved instead, since loss or gradient is not finite."""
        if not is_finite:
            self._spoil_gradient()
        if self.config.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip_norm)
        before = self._scale
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._scale = self.scaler.get_scale()
        is_taken = self._scale >= before
        if is_taken and self.average is not None:
            self.average.update_parameters(self.network)
        return is_taken

    def _spoil_gradient(self) -> None:
        """Let the scaler find what it skips a step for: behind a loss that is not finite a gradient may still be."""
        for parameter in self.network.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(torch.nan)

    def _count_skipped(self, epoch: int, *, is_taken: bool) -> None:
        self.skipped = 0 if is_taken else self.skipped + 1
        if self.skipped >= MOST_SKIPPED:
            raise Diverged(
                f"{MOST_SKIPPED} steps in a row were skipped by epoch {epoch}, their loss or gradient not finite in "
                "float16; use precision = bfloat16 or float32, or a learning_rate lower than "
                f"{self.config.learning_rate}"
            )

    def _autocast(self) -> AbstractContextManager[object]:
        is_narrow = self._arithmetic != torch.float32
        return torch.autocast(self.device.type, self._arithmetic) if is_narrow else nullcontext()

    def _unsynchronised(self, *, last: bool) -> AbstractContextManager[object]:
        """Gradients travel once a step, with the last micro-batch."""
        return nullcontext() if last or not isinstance(self._parallel, DistributedDataParallel) else self._no_sync()

    def _no_sync(self) -> AbstractContextManager[object]:
        context: AbstractContextManager[object] = self._parallel.no_sync()  # type: ignore[operator]
        return context


@contextmanager
def _named_refusals(config: TrainConfig) -> Iterator[None]:
    """Tell in our words that torch refuses an operation where only deterministic ones are allowed."""
    try:
        yield
    except RuntimeError as error:
        operation, refusal, _ = str(error).partition(" does not have a deterministic implementation")
        if not (config.deterministic and refusal):
            raise
        raise RunError(
            f"deterministic = true: {operation} gives other bits from run to run on this device; choose another "
            "architecture or device, or set deterministic = false"
        ) from None


def _average(network: nn.Module, decay: float) -> AveragedModel | None:
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None  # type: ignore[no-untyped-call]


def _parallel(model: nn.Module, config: TrainConfig) -> nn.Module:
    """Average gradients over processes; buffers are ours to synchronise, exactly."""
    is_partial = config.domains == "separate"  # a step uses one domain's BatchNorm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the name `broadcast_buffers`: its successor is not in 2.11
        return DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=is_partial)
