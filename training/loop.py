"""Training and evaluation, as functions over (network, images, optimizer).

An epoch's batches come from `batches`, a step is `learner`'s; here are the epoch, the schedule and the score.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn import functional

from training import compiling, distributed
from training.batches import Batches as Batches  # noqa: PLC0414 - who evaluates needs both
from training.batches import epoch_steps, seed_of, training_batches
from training.batches import steps_per_epoch as steps_per_epoch  # noqa: PLC0414
from training.config import TrainConfig
from training.errors import UsageError
from training.learner import Learner
from training.normalization.running import correction, freeze_statistics
from training.optimization import build_schedule


@dataclass(frozen=True, slots=True)
class Score:
    """Mean loss and accuracy, 0 to 1, over some images."""

    loss: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Progress:
    """Where an epoch stands; `seconds` is its training time so far."""

    epoch: int
    images: int
    loss: float
    accuracy: float
    seconds: float


class Normalize(nn.Module):
    """uint8 pixels → float32, standardised per channel by statistics of pixels scaled to 0–1."""

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        shape = (1, len(mean), 1, 1)
        self.register_buffer("mean", 255 * torch.tensor(mean, dtype=torch.float64).reshape(shape), persistent=False)
        self.register_buffer(
            "scale", 1 / (255 * torch.tensor(std, dtype=torch.float64)).reshape(shape), persistent=False
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return (images − mean) · scale in the buffers' dtype."""
        return (images.to(self.mean.dtype) - self.mean) * self.scale


def choose_device(requested: str) -> torch.device:
    """Return CUDA where it works or is demanded, else the CPU. Raises UsageError when it is demanded and not there."""
    if requested == "cuda" and not torch.cuda.is_available():
        raise UsageError("device = cuda: torch finds no CUDA device here; use auto or cpu")
    return torch.device("cuda" if requested != "cpu" and torch.cuda.is_available() else "cpu")


def choose_precision(requested: str, device: torch.device) -> str:
    """Return bfloat16 where it is asked for, or where `auto` meets hardware that multiplies it; else float32."""
    if requested != "auto":
        return requested
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.12
    is_native = device.type == "cuda" or capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bfloat16" if is_native else "float32"


@dataclass(slots=True)
class Tally:
    """Sums over the images of an epoch so far, and the steps that they took."""

    step: int = 0
    loss: float = 0.0
    hits: int = 0
    images: int = 0

    def score(self) -> Score:
        """Return the means; 0 before the first image."""
        count = max(self.images, 1)
        return Score(self.loss / count, self.hits / count)


def continue_epoch(
    learner: Learner,
    batches: Batches,
    epoch: int,
    tally: Tally,
    report: Callable[[Progress], None],
    after_step: Callable[[Tally], None] = lambda _: None,
) -> Score:
    """Train what is left of epoch `epoch`, counted from 1, after `tally.step` steps, which `tally` goes on to count.

    `report` is told each step. Raises RunError, Diverged where the loss is not finite.
    """
    config = learner.config
    steps = epoch_steps(batches, config)
    schedule = build_schedule(config, learner.optimizer, steps)
    is_frozen = 0 < config.freeze_statistics_from <= epoch
    learner.model.train()
    if is_frozen:
        freeze_statistics(learner.network)
    started = perf_counter()
    for step, micro in training_batches(batches, config, epoch, tally.step):
        torch.manual_seed(seed_of(config.seed, epoch, step, distributed.rank()))  # dropout and the like
        schedule.apply((epoch - 1) * steps + step)
        with correction(learner.network, is_on=True) if is_frozen and config.bn_bias_correction else nullcontext():
            outcome = learner.step(micro, epoch)
        tally.step, tally.images = step + 1, tally.images + outcome.images
        tally.loss, tally.hits = tally.loss + outcome.loss, tally.hits + outcome.hits
        score = tally.score()
        report(Progress(epoch, tally.images, score.loss, score.accuracy, perf_counter() - started))
        after_step(tally)
    loss, hits, images = distributed.summed([tally.loss, tally.hits, tally.images], learner.device)
    return Score(loss / max(images, 1), hits / max(images, 1))


def warm_up(learner: Learner, batches: Batches, say: Callable[[str], None]) -> float:
    """Pay beforehand what a first step costs where that is much: CUDA loads its libraries, and a compiler runs.

    Returns the seconds, 0 where nothing was due. Raises RunError where the step was to be compiled and cannot be.
    """
    if learner.device.type != "cuda" and not compiling.is_wanted(learner.config, learner.device):
        return 0.0
    started = perf_counter()
    _, micro = next(training_batches(batches, learner.config, 1))
    if reason := learner.warm_up(micro[0]):
        say(f"compile = auto: torch could not compile the step here ({reason}); it runs as it is")
    if learner.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = perf_counter() - started
    what = "compiled and warmed up" if learner.is_compiled else "warmed up"
    say(f"{what} in {seconds:.1f} s, which training's clock does not count")
    return seconds


def arithmetic(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Return the type in which training multiplies; parameters and BatchNorm's arithmetic are float32 in any case."""
    chosen: torch.dtype = getattr(torch, choose_precision(config.precision, device))
    return chosen


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, domain: int | None = None) -> Score:
    """Return loss and accuracy in evaluation mode, in float32, over all processes; of one domain where given."""
    model.eval()
    loss, hits, seen = 0.0, 0, 0
    for images, targets in batches.fetch(batches.in_order(domain)):
        logits = model(images)
        loss += functional.cross_entropy(logits, targets, reduction="sum").item()
        hits += int((logits.argmax(1) == targets).sum())
        seen += len(targets)
    total_loss, total_hits, total = distributed.summed([loss, hits, seen], batches.device)
    return Score(total_loss / max(total, 1), total_hits / max(total, 1))
