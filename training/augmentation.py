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
    flip: bool = False  # mirror half of the images, left and right
    cutout: float = 0.0  # side of a black square somewhere in the image, pixels


@dataclass(frozen=True, slots=True)
class Changes:
    """What happens to each of some images; None where nothing of the kind does."""

    maps: Tensor | None  # (N, 2, 3), from output to input coordinates
    mirrored: Tensor | None  # (N,) bool
    holes: Tensor | None  # (N, 2), centres as shares of height and width
    hole_side: float = 0.0  # pixels

    def take(self, part: slice) -> "Changes":
        """Return the changes of some of the images."""
        maps, mirrored, holes = (
            None if values is None else values[part] for values in (self.maps, self.mirrored, self.holes)
        )
        return Changes(maps, mirrored, holes, self.hole_side)


def draw(count: int, size: torch.Size, largest: Jitter, generator: torch.Generator) -> Changes:
    """Draw changes for `count` images of a size (height, width), on the CPU: the same ones whatever the device."""
    is_moved = max(largest.translate, largest.rotate, largest.scale) > 0
    return Changes(
        _affine_maps(count, size, largest, generator) if is_moved else None,
        torch.rand(count, generator=generator) < 0.5 if largest.flip else None,
        torch.rand(count, 2, generator=generator) if largest.cutout else None,
        largest.cutout,
    )


def jitter(images: Tensor, largest: Jitter, generator: torch.Generator) -> Tensor:
    """Change each image by its own random amounts; black comes in from the edge.

    Shapes: images (N, channels, height, width) of any dtype; float32 where images move, else their own dtype, and
    `images` itself without jitter.
    """
    return apply(images, draw(len(images), images.shape[-2:], largest, generator))


def apply(images: Tensor, changes: Changes) -> Tensor:
    """Return the images changed, on their device. Shapes: images (N, channels, height, width)."""
    if changes.mirrored is not None:
        is_mirrored = changes.mirrored.to(images.device).view(-1, 1, 1, 1)
        images = torch.where(is_mirrored, images.flip(-1), images)
    if changes.maps is not None:
        grid = functional.affine_grid(changes.maps.to(images.device), list(images.shape), align_corners=False)
        images = functional.grid_sample(images.float(), grid, align_corners=False)
    if changes.holes is not None:
        images = images.masked_fill(_holes(images, changes), 0)
    return images


def _holes(images: Tensor, changes: Changes) -> Tensor:
    """Return (N, 1, height, width), true within half a side of the centre: DeVries & Taylor 2017, cut at the edges."""
    assert changes.holes is not None
    centres = changes.holes.to(images.device)
    near = []
    for axis, length in enumerate(images.shape[-2:]):
        pixels = torch.arange(length, device=images.device) + 0.5
        near.append((pixels[None] - centres[:, axis, None] * length).abs() <= changes.hole_side / 2)  # (N, length)
    return (near[0][:, :, None] & near[1][:, None, :])[:, None]


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
