"""Cross-layer equalization computes the same network, with evener channels, and leaves alone what it may not touch."""

import numpy as np
import pytest
import torch
from conversion_graphs import FloatGraph
from conversion_support import random_images

from training.exact.calibration import calibrate
from training.exact.equalizing import MOST, equalize
from training.exact.executing import run
from training.exact.network import Conv, Linear, Network
from training.exact.reading import read_network


def _float64_logits(network: Network, images: np.ndarray) -> np.ndarray:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).double()
    scale, shift = (torch.from_numpy(one).reshape(1, -1, 1, 1) for one in (network.scale, network.shift))

    def weigh(layer: Conv | Linear) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(layer.weight), torch.from_numpy(np.asarray(layer.bias, np.float64))

    return run(network, pixels * scale + shift, lambda _, values: values, weigh).numpy()


def _network(middle, seed: int = 0) -> Network:
    """Return uneven convolutions around `middle`, which takes 4 channels to 4; the head reads every position."""
    graph = FloatGraph(seed=seed)
    x = graph.relu_conv(middle(graph, graph.relu_conv(graph.start, 3, 4)), 4, 4)
    flat = graph.add("Flatten", graph.add("MaxPool", x, kernel_shape=[8, 8]))
    weight = graph.constant(graph.rng.normal(size=(5, 4)).astype(np.float32))
    network = read_network(graph.model(graph.add("Gemm", flat, weight, transB=1)))
    uneven = np.exp(graph.rng.normal(0, 2, 4))
    first = network.layers[0]
    assert isinstance(first, Conv)
    first.weight, first.bias = first.weight * uneven[:, None, None, None], first.bias * uneven
    return network


@pytest.mark.parametrize("seed", range(5))
def test_the_equalized_network_equals_the_plain_one(seed: int):
    network = _network(lambda graph, x: graph.add("Relu", graph.conv(x, 4, 4)), seed)
    images = random_images(8, side=8, seed=seed)
    evened, pairs = equalize(network, calibrate(network, random_images(64, side=8)))
    assert pairs == 2
    wanted = _float64_logits(network, images)
    np.testing.assert_allclose(_float64_logits(evened, images), wanted, rtol=0, atol=1e-9 * np.abs(wanted).max())


def test_channels_are_evener_afterwards_and_the_network_given_is_left_alone():
    network = _network(lambda graph, x: graph.add("Relu", graph.conv(x, 4, 4)))
    before = [layer.weight.copy() for layer in network.weighted()]
    images = random_images(64, side=8)
    observed = calibrate(network, images)
    evened, _ = equalize(network, observed)
    after = calibrate(evened, images)
    tensor = network.layers[0].y

    def unevenness(largest: np.ndarray) -> float:
        return float(np.ptp(np.log(largest)))

    assert unevenness(after[tensor].largest) < unevenness(observed[tensor].largest)
    assert all(np.array_equal(layer.weight, kept) for layer, kept in zip(network.weighted(), before, strict=True))
    moved = observed[tensor].largest / after[tensor].largest
    assert moved.max() <= MOST * 1.001
    assert moved.min() >= 1 / (MOST * 1.001)


@pytest.mark.parametrize(
    "middle",
    [
        lambda graph, x: graph.add(
            "Clip", graph.conv(x, 4, 4), *(graph.constant(np.float32(end)) for end in (0, 6))
        ),
        lambda graph, x: graph.add("Relu", graph.conv(x, 4, 4, group=2)),
        lambda graph, x: graph.add("Add", x, graph.conv(x, 4, 4)),
        lambda graph, x: graph.add("Sigmoid", graph.conv(x, 4, 4)),
        lambda graph, x: graph.add("MaxPool", graph.conv(x, 4, 4), kernel_shape=[3, 3], pads=[1] * 4),
    ],
    ids=["ReLU6", "groups", "residual", "sigmoid", "max pooling"],
)  # fmt: skip
def test_what_scales_may_not_pass_is_left_as_it_is(middle):
    network = _network(middle)
    evened, _ = equalize(network, calibrate(network, random_images(64, side=8)))
    images = random_images(8, side=8, seed=1)
    wanted = _float64_logits(network, images)
    np.testing.assert_allclose(_float64_logits(evened, images), wanted, rtol=0, atol=1e-9 * np.abs(wanted).max())


def test_a_dead_channel_is_not_scaled():
    network = _network(lambda graph, x: graph.add("Relu", graph.conv(x, 4, 4)))
    first = network.layers[0]
    assert isinstance(first, Conv)
    first.weight[2], first.bias[2] = 0, 0
    evened, _ = equalize(network, calibrate(network, random_images(64, side=8)))
    assert all(np.isfinite(layer.weight).all() for layer in evened.weighted())
