"""Named configurations, each measured; `foldserve presets` lists them."""

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
    "fashion-mnist": TrainConfig(dataset="fashion-mnist", architecture="small_resnet", epochs=10, translate=1.0),
}


def preset(name: str) -> TrainConfig:
    """Return a preset. Raises UsageError with the nearest name."""
    if name not in PRESETS:
        raise UsageError(f"{name} is not a preset{nearest(name, PRESETS)}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
