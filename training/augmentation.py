"""Random changes of training images, in batches on their device. Knows no data set and no network."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Jitter:
    """The largest change of each kind; each image draws its own, uniformly, within plus or minus of these."""

    translate: float = 0.0  # pixels, in both directions
    rotate: float = 0.0  # degrees
    scale: float = 0.0  # share of the size, in both directions


def jitter(images: Tensor, largest: Jitter, generator: torch.Generator) -> Tensor:
    """Turn, stretch and move each image by its own random amounts; black comes in from the edge.

    The random numbers are drawn on the CPU, so that they are the same whatever the device.

    Shapes: images (N, channels, height, width) of any dtype; the answer is float32, or `images` itself without jitter.
    """
    if largest == Jitter():
        return images
    maps = _affine_maps(len(images), images.shape[-2:], largest, generator).to(images.device)
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    return functional.grid_sample(images.float(), grid, align_corners=False)


def _affine_maps(count: int, size: torch.Size, largest: Jitter, generator: torch.Generator) -> Tensor:
    """Return maps (count, 2, 3) from output to input coordinates, both −1 … 1 across the image."""
    draws = 2 * torch.rand(5, count, generator=generator) - 1
    angle = draws[0] * math.radians(largest.rotate)
    stretch_x, stretch_y = 1 + draws[1] * largest.scale, 1 + draws[2] * largest.scale
    height, width = size
    move_x, move_y = draws[3] * (2 * largest.translate / width), draws[4] * (2 * largest.translate / height)
    aspect = height / width  # coordinates run from −1 to 1 both ways, so a turn has to pass from one scale to the other
    rows = (
        torch.stack([stretch_x * angle.cos(), -stretch_y * angle.sin() * aspect, move_x], dim=1),
        torch.stack([stretch_x * angle.sin() / aspect, stretch_y * angle.cos(), move_y], dim=1),
    )
    return torch.stack(rows, dim=1)
