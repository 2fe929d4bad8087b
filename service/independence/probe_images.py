"""Images that make rounding visible, made anew from a seed: the probe's inputs. Pure; knows no model.

Two orders of summation that differ show it only on inputs whose partial sums round differently, so natural images
alone would flatter a kernel: noise, sparse light, extremes and flat fields go with them.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

SEED = 20260101
HOT_PIXELS = 3

Pixels = NDArray[np.uint8]
Maker = Callable[[np.random.Generator, tuple[int, ...]], Pixels]


def probe_images(count: int, shape: tuple[int, int, int], real: Pixels) -> Pixels:
    """Return `count` images uint8 (count, height, width, channels): real ones first, a quarter of all at the most."""
    generator = np.random.default_rng(SEED)
    chosen = real[: max(1, count // 4)]
    makers = (_noise, _extremes, _sparse, _faint_noise, _flat, _noise, _gradient)
    made = [makers[index % len(makers)](generator, shape) for index in range(count - len(chosen))]
    return np.concatenate([chosen, np.stack(made)])[:count] if made else chosen[:count]


def hostile_neighbours(size: int, target: Pixels) -> dict[str, Pixels]:
    """Return what may share a batch with `target`, by name, each uint8 (size, height, width, channels)."""
    shape = target.shape
    generator = np.random.default_rng(SEED + size)
    checkers = np.stack([np.full(shape, 255 * (index % 2), np.uint8) for index in range(size)])
    return {
        "filler": np.zeros((size, *shape), np.uint8),
        "white": np.full((size, *shape), 255, np.uint8),
        "copies": np.repeat(target[np.newaxis], size, axis=0),
        "black and white in turn": checkers,
        "noise": generator.integers(0, 256, (size, *shape), np.uint8),
    }


def _noise(generator: np.random.Generator, shape: tuple[int, ...]) -> Pixels:
    return generator.integers(0, 256, shape, np.uint8)


def _faint_noise(generator: np.random.Generator, shape: tuple[int, ...]) -> Pixels:
    return generator.integers(0, 4, shape, np.uint8)


def _extremes(generator: np.random.Generator, shape: tuple[int, ...]) -> Pixels:
    return (255 * generator.integers(0, 2, shape)).astype(np.uint8)


def _sparse(generator: np.random.Generator, shape: tuple[int, ...]) -> Pixels:
    image = np.zeros(shape, np.uint8)
    image.reshape(-1)[generator.integers(0, image.size, HOT_PIXELS)] = 255
    return image


def _flat(generator: np.random.Generator, shape: tuple[int, ...]) -> Pixels:
    return np.full(shape, generator.integers(0, 256), np.uint8)


def _gradient(generator: np.random.Generator, shape: tuple[int, ...]) -> Pixels:
    ramp = np.linspace(0, 255, int(np.prod(shape)))
    return np.roll(ramp, generator.integers(0, ramp.size)).reshape(shape).astype(np.uint8)
