"""Named configurations, each measured; `foldserve presets` lists them."""

from dataclasses import replace

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
        raise UsageError(f"{name} is not a preset{nearest(name, PRESETS)}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
