"""Write Keras classifiers as ONNX files, for `foldserve import`: `python benchmarks/keras_export.py FOLDER`.

Runs in a Python of its own that has `tensorflow-cpu` and `tf2onnx`, for TensorFlow and foldserve need not share one.
Weights are random; the running statistics are warmed on smooth noise. The small network is what tests/data holds.
"""

import argparse
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
import tf2onnx
from keras import layers

UPDATES = 12
FAST = 0.5  # momentum in Keras's sense, so that few updates leave nothing of the start: 0.5¹² = 0.02 %


def small() -> keras.Model:
    """Every place of a BatchNorm that Keras networks have: behind and before convolutions, without γ, depthwise."""
    image = keras.Input((32, 32, 3), name="photo")
    x = layers.Rescaling(1 / 127.5, offset=-1)(image)
    x = layers.ZeroPadding2D(1)(x)
    x = layers.Conv2D(8, 3, strides=2, use_bias=False)(x)
    x = layers.BatchNormalization()(x)
    x = layers.ReLU(6.0)(x)
    x = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization(scale=False, epsilon=1e-3)(x)
    x = layers.Activation("swish")(x)
    x = layers.Conv2D(16, 1)(x)
    y = layers.BatchNormalization(center=False)(x)
    y = layers.Activation("relu")(y)
    y = layers.SeparableConv2D(16, 3, padding="same", use_bias=False)(y)
    y = layers.BatchNormalization()(y)
    x = layers.Add()([x, y])
    x = layers.MaxPooling2D()(x)
    x = layers.BatchNormalization()(x)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dropout(0.2)(x)
    return keras.Model(image, layers.Dense(5, activation="softmax")(x), name="small")


def applications() -> dict[str, keras.Model]:
    """Keras's own networks for small images; EfficientNet has Rescaling and Normalization inside."""
    options = {"weights": None, "classes": 10, "input_shape": (64, 64, 3)}
    return {
        "mobilenet_v2": keras.applications.MobileNetV2(alpha=0.35, **options),
        "resnet50_v2": keras.applications.ResNet50V2(**options),
        "efficientnet_b0": keras.applications.EfficientNetB0(**options),
    }


def warm(model: keras.Model, low: float, high: float) -> None:
    """Update the running statistics on smooth noise between `low` and `high`."""
    for norm in model.layers:
        if isinstance(norm, layers.BatchNormalization):
            norm.momentum = FAST
    random = np.random.default_rng(0)
    for _ in range(UPDATES):
        coarse = random.uniform(low, high, (16, 8, 8, 3))
        images = tf.image.resize(tf.constant(coarse, tf.float32), model.input_shape[1:3])
        model(images, training=True)


def main() -> None:
    """Write each network by tf2onnx and the small one by Keras's own export too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    keras.utils.set_random_seed(0)
    for name, model in {"small": small(), **applications()}.items():
        takes_bytes = name in ("small", "efficientnet_b0")
        warm(model, *((0, 255) if takes_bytes else (-1, 1)))
        tf2onnx.convert.from_keras(model, output_path=str(folder / f"keras_{name}.onnx"), opset=15)
        if name == "small":
            model.export(str(folder / "keras_small_export.onnx"), format="onnx", verbose=False)


if __name__ == "__main__":
    main()
