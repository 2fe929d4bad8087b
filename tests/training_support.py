"""What tests of training share: a quick configuration, networks with a past, data sets, a run and its artifact."""

import copy
import gzip
import hashlib
import io
import resource
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from service.preprocessing import encode_png
from training.config import TrainConfig
from training.data import IdxSource
from training.environment import data_folders
from training.export import export
from training.folding.modules import Folded, fold, verify
from training.learner import Learner
from training.loop import Batches, Progress, Score, Tally, arithmetic, continue_epoch
from training.normalization import batch_norms
from training.optimization import build_optimizer
from training.packaging import Exported
from training.run import Trained, load_run, train

IDX_STEMS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
FOLDED_RIGHT = 1e-10  # relative, in float64; a wrong fold is off by 0.01 or more
PHOTO_CLASSES = ("cat", "dog")
# digits has 1,437 images outside the test part: all but 137 are held out, so that an epoch takes a moment
QUICK = TrainConfig(
    dataset="digits",
    architecture="small_cnn",
    epochs=3,
    batch_size=16,
    learning_rate=0.05,
    translate=1.0,
    validation_images=1300,
    device="cpu",
)


def hush(_: str) -> None:
    """Say nothing."""


def real_data() -> Path | None:
    """Return the folder that FOLDSERVE_DATA names, None where it is unset."""
    *given, _ = data_folders(None)
    return given[0] if given else None


def aged(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm a past: statistics, γ of both signs and β that no fresh layer has. Evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for _, norm in batch_norms(model):
        size = norm.num_features
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.copy_(torch.randn(size, generator=generator))
            norm.running_var.copy_(torch.rand(size, generator=generator) * 3 + 0.1)
            norm.num_batches_tracked.add_(7)
        if norm.affine:
            with torch.no_grad():
                norm.weight.copy_(torch.randn(size, generator=generator) * 2)
                norm.bias.copy_(torch.randn(size, generator=generator))
    return model.eval()


def relative_difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest difference over the largest magnitude."""
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


@torch.no_grad()
def folded_and_compared(model: nn.Module) -> Folded:
    """Fold an aged model, and hold it against itself in float64; the model itself is left alone."""
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = copy.deepcopy(model.state_dict())
    wanted = copy.deepcopy(model).double()(images.clone())
    folded = verify(fold(model, images), images)
    assert relative_difference(folded.module(images), wanted) <= FOLDED_RIGHT
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return folded


def idx_bytes(values: np.ndarray) -> bytes:
    """Return unsigned bytes in LeCun's IDX format."""
    header = struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return header + values.astype(np.uint8).tobytes()


def idx_files(seed: int = 0) -> dict[str, bytes]:
    """Return a tiny data set of 3 classes, 30 training and 9 test images of 6 × 6 pixels, by file name without .gz."""
    rng = np.random.default_rng(seed)
    contents = {}
    for prefix, count in (("train", 30), ("t10k", 9)):
        contents[f"{prefix}-images-idx3-ubyte"] = idx_bytes(rng.integers(0, 256, (count, 6, 6)))
        contents[f"{prefix}-labels-idx1-ubyte"] = idx_bytes(np.arange(count) % 3)
    return contents


def idx_source(contents: dict[str, bytes], url: str = "http://127.0.0.1:9/unreachable") -> IdxSource:
    """Describe `contents` as a published data set."""
    sums = {stem: hashlib.sha256(content).hexdigest() for stem, content in contents.items()}
    return IdxSource(url, ("a", "b", "c"), "none", sums)


def write_idx(folder: Path, contents: dict[str, bytes], *, packed: bool = True) -> Path:
    """Write the files of a data set, gzipped or plain."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, content in contents.items():
        path = folder / (f"{stem}.gz" if packed else stem)
        path.write_bytes(gzip.compress(content) if packed else content)
    return folder


def write_photos(folder: Path, count: int = 8, classes: tuple[str, ...] = PHOTO_CLASSES, seed: int = 0) -> Path:
    """Write `count` small photos a class, brighter from class to class."""
    rng = np.random.default_rng(seed)
    for index, label in enumerate(classes):
        (folder / label).mkdir(parents=True)
        for number in range(count):
            height, width = 9 + number % 3, 14 - number % 4
            pixels = rng.integers(0, 128, (height, width, 3), dtype=np.uint8) + np.uint8(127 * index)
            (folder / label / f"{number}.png").write_bytes(encode_png(pixels))
    return folder


def train_epoch(
    model: nn.Module,
    batches: Batches,
    config: TrainConfig,
    epoch: int,
    report: Callable[[Progress], None] | None = None,
) -> Score:
    """Train one whole epoch with an optimizer of its own."""
    learner = Learner(model, build_optimizer(config, model), config, arithmetic=arithmetic(config, batches.device))
    return continue_epoch(learner, batches, epoch, Tally(), report or (lambda _: None))


class Scattered(nn.Module):
    """Puts its logits in place by an operation whose order nobody fixes."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the same ten logits for each image."""
        places = torch.arange(10 * len(images))
        spread = self.logits.expand(len(images), -1).flatten()
        return torch.zeros_like(spread).put(places, spread).view(-1, 10)


class StopsAfterFirstEpoch(io.StringIO):
    """A standard output that interrupts whoever writes to it once metrics.csv has its first row."""

    def __init__(self, metrics: Path) -> None:
        super().__init__()
        self._metrics = metrics

    def write(self, text: str) -> int:
        """Write, or press Ctrl-C."""
        if self._metrics.exists() and len(self._metrics.read_text().splitlines()) > 1:
            raise KeyboardInterrupt
        return super().write(text)


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Let no file grow over `size` bytes: a write beyond fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny networks run faster on one thread, and sums keep their order on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def quick_run(base: Path) -> Path:
    """Train QUICK once below `base`."""
    run = base / "quick-run"
    with one_thread():
        train(QUICK, run, say=hush)
    return run


@cache
def quick_trained(base: Path) -> Trained:
    """Load that run. What a test changes it changes in a copy."""
    return load_run(quick_run(base))


@cache
def quick_export(base: Path) -> Exported:
    """Export that run once below `base`, as `models/digits/1`."""
    return export(quick_trained(base), base / "quick-models", "digits", say=hush)
