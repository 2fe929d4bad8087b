"""One optimizer step: forward and backward of each micro-batch, under autocast, guarded, clipped, averaged.

BatchNorm sees a micro-batch (of all processes where it is synchronised). A micro-batch whose loss or statistics are
not finite leaves every running statistic of the network as it was.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from training import distributed
from training.batches import Batch
from training.config import TrainConfig
from training.errors import Diverged, RunError
from training.normalization.domains import activate
from training.normalization.running import StatisticsKeeper
from training.optimization import penalty

MOST_SKIPPED = 20  # steps in a row; the loss scale has then been halved as often, from 65,536 to below 1


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
        self._domains = domains
        self._arithmetic = arithmetic
        self._keeper = StatisticsKeeper(self.network)
        self._parallel = _parallel(model, config) if distributed.world_size() > 1 else model

    def step(self, micro: list[Batch], epoch: int) -> Outcome:
        """Learn from the micro-batches of one step.

        Raises Diverged where the loss is not finite, RunError where an operation that has to be deterministic is not.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with _named_refusals(self.config):
            outcomes = [self._backward(batch, len(micro), last=batch is micro[-1]) for batch in micro]
        is_finite = all(outcome is not None for outcome in outcomes)
        if not is_finite and not self.scaler.is_enabled():
            raise Diverged(
                f"the loss is not finite in epoch {epoch}; set learning_rate lower than {self.config.learning_rate}"
            )
        self._count_skipped(epoch, is_finite=is_finite)
        if is_finite:
            self._update()
        good = [outcome for outcome in outcomes if outcome is not None]
        return Outcome(sum(one.loss for one in good), sum(one.hits for one in good), sum(one.images for one in good))

    def _backward(self, batch: Batch, parts: int, *, last: bool) -> Outcome | None:
        """Add a micro-batch's gradient; None where it is not finite, and nothing was touched."""
        if self._domains and batch.domain >= 0:
            activate(self.network, self._domains[batch.domain])
        self._keeper.keep()
        with self._unsynchronised(last=last):
            with self._autocast():
                logits = self._parallel(batch.images)
            smoothing = self.config.label_smoothing
            loss = functional.cross_entropy(logits.float(), batch.targets, label_smoothing=smoothing)
            loss = loss + penalty(self.config, self.network)
            if not self._all_finite(loss):
                self._keeper.restore()
                return None
            self.scaler.scale(loss / parts).backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
        count = len(batch.targets)
        return Outcome(loss.item() * count, int((logits.argmax(1) == batch.targets).sum()), count)

    def _all_finite(self, loss: Tensor) -> bool:
        is_finite = self._keeper.is_finite(loss)
        return distributed.summed([float(is_finite)], self.device) == [float(distributed.world_size())]

    def _update(self) -> None:
        if self.config.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.network)

    def _count_skipped(self, epoch: int, *, is_finite: bool) -> None:
        self.skipped = 0 if is_finite else self.skipped + 1
        if self.skipped >= MOST_SKIPPED:
            raise Diverged(
                f"{MOST_SKIPPED} batches in a row are not finite in epoch {epoch} in float16; use precision = bfloat16 "
                f"or float32, or a learning_rate lower than {self.config.learning_rate}"
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
