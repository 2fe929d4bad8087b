"""Training and evaluation, as functions over (network, images, optimizer).

Images live on the device as uint8 and are augmented there in batches; each epoch's order and changes follow from the
seed and the epoch's number alone, so that a resumed run sees what a whole one would.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.augmentation import Jitter, jitter
from training.config import TrainConfig
from training.data import Split
from training.errors import RunError, UsageError

EVALUATION_BATCH = 1000


@dataclass(frozen=True, slots=True)
class Batches:
    """A split on its device: images uint8 (N, channels, height, width), targets int64 (N,)."""

    images: Tensor
    targets: Tensor

    @classmethod
    def on(cls, device: torch.device, split: Split) -> "Batches":
        """Move a split to the device once."""
        images = torch.from_numpy(split.images).permute(0, 3, 1, 2)  # (N, H, W, C) → (N, C, H, W)
        return cls(images.contiguous().to(device), torch.from_numpy(split.targets).to(device))

    def __len__(self) -> int:
        return len(self.targets)


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


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[object]:
    """Return the arithmetic of a training step; parameters and BatchNorm statistics stay float32 in any case."""
    precision = choose_precision(config.precision, device)
    return nullcontext() if precision == "float32" else torch.autocast(device.type, getattr(torch, precision))


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """Return SGD with Nesterov momentum. Weight decay spares biases and BatchNorm's γ and β: they are vectors."""
    parameters = list(model.parameters())
    groups = [
        {"params": [one for one in parameters if one.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [one for one in parameters if one.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.momentum > 0)


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Return the rate at `progress` (0 to 1): from a 25th of the peak up to it, then down to 0, both in a line."""
    if progress < config.warmup_share:
        return config.learning_rate * (1 + 24 * progress / config.warmup_share) / 25
    return config.learning_rate * (1 - progress) / (1 - config.warmup_share)


def train_epoch(
    model: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    epoch: int,
    report: Callable[[Progress], None],
) -> Score:
    """Train epoch `epoch`, counted from 1, telling `report` each step. Raises RunError when the loss is not finite."""
    device = batches.images.device
    steps = steps_per_epoch(len(batches), config)
    model.train()
    started = perf_counter()
    losses, hits, seen = 0.0, 0, 0
    for step, (images, targets) in enumerate(_training_batches(batches, config, epoch)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, ((epoch - 1) * steps + step) / (config.epochs * steps))
        with autocast(config, device):
            logits = model(images)
        loss = functional.cross_entropy(logits.float(), targets, label_smoothing=config.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
        optimizer.step()
        losses += loss.item() * len(targets)
        hits += int((logits.argmax(1) == targets).sum())
        seen += len(targets)
        if not math.isfinite(losses):
            raise RunError(
                f"the loss is not finite in epoch {epoch}; set learning_rate lower than {config.learning_rate}"
            )
        report(Progress(epoch, seen, losses / seen, hits / seen, perf_counter() - started))
    return Score(losses / seen, hits / seen)


def steps_per_epoch(images: int, config: TrainConfig) -> int:
    """Return the number of whole batches; BatchNorm would learn from a last batch of one image. Raises UsageError."""
    if images < config.batch_size:
        raise UsageError(f"batch_size = {config.batch_size}: there are only {images} training images")
    return images // config.batch_size


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches) -> Score:
    """Return loss and accuracy in evaluation mode, in float32."""
    model.eval()
    loss, hits = 0.0, 0
    for start in range(0, len(batches), EVALUATION_BATCH):
        targets = batches.targets[start : start + EVALUATION_BATCH]
        logits = model(batches.images[start : start + EVALUATION_BATCH])
        loss += functional.cross_entropy(logits, targets, reduction="sum").item()
        hits += int((logits.argmax(1) == targets).sum())
    return Score(loss / len(batches), hits / len(batches))


def _training_batches(batches: Batches, config: TrainConfig, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    # Large strides keep the streams of neighbouring seeds and epochs apart.
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    torch.manual_seed(config.seed * 1_000_003 + epoch)  # dropout and the like
    largest = Jitter(config.translate, config.rotate, config.scale)
    device = batches.images.device
    order = torch.randperm(len(batches), generator=generator).to(device)
    for step in range(steps_per_epoch(len(batches), config)):
        indices = order[step * config.batch_size : (step + 1) * config.batch_size]
        yield jitter(batches.images[indices], largest, generator), batches.targets[indices]
