"""Named configurations, each measured; `foldserve presets` lists them."""

from dataclasses import replace
from pathlib import Path

from service.errors import nearest
from training.config import TrainConfig
from training.errors import UsageError

PRESETS = {
    "digits": TrainConfig(
        dataset="digits",
        architecture="small_cnn",
        epochs=25,
        batch_size=64,
        validation_images=200,
        label_smoothing=0.05,
        translate=1.0,
    ),
    "mnist": TrainConfig(
        dataset="mnist",
        architecture="small_cnn",
        epochs=6,
        learning_rate=0.4,
        weight_decay=1e-3,
        label_smoothing=0.1,
        translate=2.0,
        rotate=10.0,
        scale=0.1,
    ),
    "mnist-resnet": TrainConfig(dataset="mnist", architecture="small_resnet", epochs=4, translate=2.0),
    "fashion-mnist": TrainConfig(
        dataset="fashion-mnist",
        architecture="small_cnn",
        epochs=16,
        learning_rate=0.3,
        label_smoothing=0.05,
        flip=True,
        translate=1.0,
    ),
}
# For a GPU: wide steps and few of them, compiled where that works. What each is good for stands in docs/training.md.
_FAST = TrainConfig(
    dataset="fashion-mnist",
    architecture="fast_cnn",
    epochs=14,
    batch_size=512,
    learning_rate=0.8,
    label_smoothing=0.1,
    bn_momentum=0.4,  # TensorFlow's decay 0.6: statistics as young as the weights
    freeze_gamma=True,
    flip=True,
    alternate_flip=True,
    translate=1.0,
    validation_images=2000,
    compile="auto",
)
PRESETS |= {
    "fashion-mnist-fast": _FAST,
    "mnist-fast": replace(
        _FAST,
        dataset="mnist",
        epochs=6,
        flip=False,
        alternate_flip=False,
        translate=2.0,
        rotate=10.0,
        scale=0.1,
    ),
}
# The three ways of one network for two domains; MNIST and photos of hand signs share their ten classes.
# foldserve train domains-separate --set dataset=mnist+svhn takes SVHN where it is.
_TWO_DOMAINS = TrainConfig(
    dataset="mnist+folder:sign-digits",
    architecture="small_cnn",
    epochs=12,
    batch_size=64,
    learning_rate=0.1,
    size=32,
    limit_images=1500,
    validation_images=300,
    translate=2.0,
    label_smoothing=0.05,
)
PRESETS |= {f"domains-{way}": replace(_TWO_DOMAINS, domains=way) for way in ("union", "batches", "separate")}


def preset(name: str) -> TrainConfig:
    """Return a preset. Raises UsageError with the nearest name."""
    if name not in PRESETS:
        is_data = "/" in name or ":" in name or Path(name).is_dir()
        hint = "; images of your own: PRESET --set dataset=folder:PATH" if is_data else nearest(name, PRESETS)
        raise UsageError(f"{name} is not a preset{hint}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
