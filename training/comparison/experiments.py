"""The experiments that `foldserve compare` knows: what is varied, what is held still, and what is looked at."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from service.errors import nearest
from training.config import TrainConfig
from training.errors import UsageError
from training.presets import preset


@dataclass(frozen=True, slots=True)
class Variant:
    """One curve, or one point of one: `series` is its line, `place` where it stands on the x axis of a sweep."""

    name: str
    values: dict[str, Any]
    series: str = ""
    place: float = 0.0


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is run: seeds, training images shown to each trial, looks at the test set, test images looked at."""

    seeds: int = 5
    images: int = 600_000
    evaluations: int = 40
    test_images: int = 10_000


@dataclass(frozen=True, slots=True)
class Experiment:
    """A question, the configuration that is held still, and the variants. A sweep is drawn over `axis`, in decades."""

    title: str
    question: str
    base: TrainConfig
    variants: tuple[Variant, ...]
    scale: Scale = field(default_factory=Scale)
    quick: Scale = field(default_factory=lambda: Scale(seeds=2, images=24_000, evaluations=12, test_images=2_000))
    kind: Literal["curves", "sweep"] = "curves"
    axis: str = ""

    def only(self, names: Iterable[str]) -> tuple[Variant, ...]:
        """Return the named variants, all where none is named. Raises UsageError with the nearest name."""
        known = {variant.name: variant for variant in self.variants}
        for name in names:
            if name not in known:
                raise UsageError(f"--variant {name} is not there{nearest(name, known)}; there are {', '.join(known)}")
        return tuple(known[name] for name in names) or self.variants


PLAIN = TrainConfig(
    dataset="mnist",
    architecture="small_cnn",
    epochs=1,
    batch_size=128,
    learning_rate=0.05,
    schedule="constant",
    weight_decay=0.0,
)
PUBLISHED = TrainConfig(
    dataset="mnist",
    architecture="lenet_crelu",
    epochs=1,
    batch_size=1024,
    optimizer="adagrad",
    accumulator=0.1,
    learning_rate=0.1,
    schedule="exponential",
    decay_rate=0.95,
    decay_steps=1000,
    weight_decay=0.0,
    dropout=0.3,
    bn_momentum=0.05,
)
NORMS = {"batch": "BatchNorm", "layer": "LayerNorm", "group": "GroupNorm", "none": "no norm"}
WAYS = {
    "union": "mixed batches, one BatchNorm",
    "batches": "a batch from one domain, one BatchNorm",
    "separate": "a batch from one domain, a BatchNorm for each",
}
BATCH_SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512)
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
DECAYS = (0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)


def _batch_sizes() -> tuple[Variant, ...]:
    """Each norm at each size, the rate in proportion to the size (Goyal et al. 2017, arXiv 1706.02677, section 2.1)."""
    return tuple(
        Variant(f"{kind}-{size}", {"norm": kind, "batch_size": size, "learning_rate": 0.05 * size / 128}, words, size)
        for kind, words in NORMS.items()
        for size in BATCH_SIZES
    )


def _rates() -> tuple[Variant, ...]:
    return tuple(
        Variant(f"{kind}-{rate:g}", {"norm": kind, "learning_rate": rate, "momentum": 0.0}, NORMS[kind], rate)
        for kind in ("batch", "none")
        for rate in RATES
    )


def _decays() -> tuple[Variant, ...]:
    return tuple(
        Variant(f"decay-{decay:g}", {"bn_momentum": round(1 - decay, 6)}, f"decay {decay:g}", 1 - decay)
        for decay in DECAYS
    )


def _inputs() -> tuple[Variant, ...]:
    return tuple(
        Variant(f"{kind}-{told}", {"norm": kind, "standardise": told == "standardised"}, f"{NORMS[kind]}, {words}")
        for kind in ("batch", "none")
        for told, words in (("standardised", "standardised"), ("raw", "pixels 0 to 1"))
    )


EXPERIMENTS = {
    "mnist-batchnorm": Experiment(
        "The MNIST experiment, with and without BatchNorm",
        "How many steps, and how many seconds, does BatchNorm save on the way to 98% and 99%?",
        PUBLISHED,
        (
            Variant("batchnorm", {"norm": "batch"}, "with BatchNorm"),
            Variant("plain", {"norm": "none"}, "without"),
        ),
        Scale(seeds=5, images=1024 * 2000, evaluations=80),
        Scale(seeds=2, images=1024 * 60, evaluations=12, test_images=2_000),
    ),
    "norms": Experiment(
        "Batch, layer, group and no normalization",
        "Which normalization learns fastest at an ordinary batch size?",
        PLAIN,
        tuple(Variant(kind, {"norm": kind}, words) for kind, words in NORMS.items()),
    ),
    "batch-sizes": Experiment(
        "Normalizations at batch sizes 2 to 512",
        "Where does BatchNorm stop working, and do the others?",
        PLAIN,
        _batch_sizes(),
        Scale(seeds=3, images=120_000, evaluations=1),
        Scale(seeds=2, images=6_400, evaluations=1, test_images=2_000),
        kind="sweep",
        axis="batch size, images",
    ),
    "learning-rates": Experiment(
        "Learning rates over four decades",
        "How wide is the range of learning rates that work, with BatchNorm and without?",
        PLAIN,
        _rates(),
        Scale(seeds=3, images=120_000, evaluations=1),
        kind="sweep",
        axis="learning rate, SGD without momentum",
    ),
    "decay": Experiment(
        "The running statistics' decay in a short run",
        "How much does the warm-up of the running statistics cost, and does correcting it win that back?",
        PLAIN,
        _decays(),
        Scale(seeds=5, images=128 * 200, evaluations=1),
        Scale(seeds=2, images=128 * 100, evaluations=1, test_images=2_000),
        kind="sweep",
        axis="1 − decay (PyTorch's momentum)",
    ),
    "inputs": Experiment(
        "Input standardised or not",
        "Does BatchNorm make standardising the input unnecessary?",
        PLAIN,
        _inputs(),
        Scale(seeds=5, images=120_000, evaluations=30),
    ),
    "domains": Experiment(
        "Two domains, one network, three ways",
        "What becomes of BatchNorm where each batch is of one domain, and does a BatchNorm for each mend it?",
        preset("domains-union"),
        tuple(Variant(way, {"domains": way}, words) for way, words in WAYS.items()),
        Scale(seeds=5, images=12 * 46 * 64, evaluations=12),  # 12 epochs, a look after each
        Scale(seeds=2, images=12_000, evaluations=8, test_images=1_000),
    ),
}


def experiment(name: str) -> Experiment:
    """Return an experiment. Raises UsageError with the nearest name."""
    if name not in EXPERIMENTS:
        known = ", ".join(EXPERIMENTS)
        raise UsageError(f"{name} is not a comparison{nearest(name, EXPERIMENTS)}; there are {known}")
    return EXPERIMENTS[name]
