"""Random changes of training images, seen as a network sees them while it trains: how far, what comes in, seeded."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from training_support import QUICK, train_epoch

from training.augmentation import Jitter, apply, draw, jitter
from training.config import TrainConfig
from training.loop import Batches

SIDE = 17
CENTRE = SIDE // 2
COUNT = 200
PLAIN = replace(QUICK, epochs=1, batch_size=COUNT, translate=0.0)


class Witness(nn.Module):
    """Keeps the images it is shown."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(10))
        self.images = torch.empty(0)

    def forward(self, images):
        self.images = images.double()
        return self.logits.expand(len(images), -1)


def seen(images: torch.Tensor, epoch: int = 1, **changes: float) -> torch.Tensor:
    config: TrainConfig = replace(PLAIN, **changes)
    witness = Witness()
    batches = Batches(images, torch.zeros(len(images), dtype=torch.int64))
    train_epoch(witness, batches, config, epoch)
    return witness.images


def spot(row: int = CENTRE, column: int = CENTRE) -> torch.Tensor:
    """COUNT black images with one spot of 3 × 3 white pixels."""
    images = torch.zeros(COUNT, 1, SIDE, SIDE, dtype=torch.uint8)
    images[:, :, row - 1 : row + 2, column - 1 : column + 2] = 255
    return images


def centroids(images: torch.Tensor) -> np.ndarray:
    """Return the centre of light of each image as (row, column), from the middle of the image."""
    light = images[:, 0].numpy()
    steps = np.arange(SIDE) - CENTRE
    total = light.sum((1, 2))
    return np.stack([light.sum(2) @ steps / total, light.sum(1) @ steps / total], axis=1)


def test_without_augmentation_the_network_sees_the_images_themselves():
    images = torch.randint(0, 256, (COUNT, 1, SIDE, SIDE), dtype=torch.uint8)
    found = {tuple(image.flatten().tolist()) for image in seen(images)}
    assert found == {tuple(image.flatten().double().tolist()) for image in images}


@pytest.mark.parametrize("largest", [1.0, 2.0, 4.0])
def test_images_move_by_at_most_the_given_amount_in_both_directions(largest: float):
    moves = centroids(seen(spot(), translate=largest))
    # interpolation between pixels keeps the centre of light; float32 sums of 9 pixels of 255 keep it to 1e-4
    assert np.abs(moves).max() <= largest + 1e-4
    # of 200 images, one in 100 (0.5 % at either end) would stay out of the outer tenth with probability 1e-9
    assert (moves.max(axis=0) > 0.8 * largest).all()
    assert (moves.min(axis=0) < -0.8 * largest).all()


def test_each_image_moves_by_itself():
    moves = centroids(seen(spot(), translate=3.0))
    assert len(np.unique(moves.round(3), axis=0)) > 10
    assert abs(np.corrcoef(moves.T)[0, 1]) < 0.3, "rows and columns move apart: 4 deviations of 1/√200 are 0.28"


def test_moving_keeps_all_the_light_of_what_stays_inside():
    light = seen(spot(), translate=3.0).sum((1, 2, 3)).numpy()
    np.testing.assert_allclose(light, 9 * 255, rtol=1e-4)  # float32 weights that add up to 1 within 1e-6 each


@pytest.mark.parametrize("changes", [{"translate": 3.0}, {"rotate": 30.0}, {"scale": 0.3}], ids=str)
def test_black_comes_in_from_the_edge(changes: dict[str, float]):
    images = seen(torch.full((COUNT, 1, SIDE, SIDE), 255, dtype=torch.uint8), **changes)
    assert float(images.max()) <= 255 * (1 + 1e-6)  # rounding of interpolation weights
    assert float(images.min()) == 0
    assert float(images[:, :, CENTRE, CENTRE].min()) == pytest.approx(255, rel=1e-5), "nothing reaches the middle"


def test_images_turn_by_at_most_the_given_angle_around_their_middle():
    offsets = centroids(seen(spot(column=CENTRE + 5), rotate=30.0))
    angles = np.degrees(np.arctan2(offsets[:, 0], offsets[:, 1]))
    # resampling shifts the centre of light of a spot of 3 pixels by less than a tenth of a pixel, 1.2° at 5 pixels
    assert np.abs(angles).max() <= 30 + 1.2
    assert angles.max() > 20
    assert angles.min() < -20
    np.testing.assert_allclose(np.hypot(*offsets.T), 5, atol=0.1)


def test_images_stretch_by_at_most_the_given_share_around_their_middle():
    offsets = centroids(seen(spot(row=CENTRE + 4, column=CENTRE + 4), scale=0.2))
    # a share of the size of the output or of the input: 1 / 0.8 is the wider of the two
    assert offsets.max() <= 4 / 0.8 + 0.1
    assert offsets.min() >= 4 / 1.2 - 0.1
    assert offsets.max() > 4.3
    assert offsets.min() < 3.7


@pytest.mark.parametrize("changes", [{"translate": 2.0}, {"rotate": 10.0}, {"scale": 0.1}], ids=str)
def test_changes_follow_from_seed_and_epoch(changes: dict[str, float]):
    images = torch.randint(0, 256, (COUNT, 1, SIDE, SIDE), dtype=torch.uint8)
    first = seen(images, **changes)
    torch.manual_seed(12345)
    assert torch.equal(seen(images, **changes), first)
    assert not torch.equal(seen(images, epoch=2, **changes), first)
    assert not torch.equal(seen(images, seed=1, **changes), first)


def test_all_channels_move_together():
    images = spot().repeat(1, 3, 1, 1)
    found = seen(images, translate=2.0, rotate=10.0, scale=0.1)
    assert torch.equal(found[:, 0], found[:, 1])
    assert torch.equal(found[:, 0], found[:, 2])


def test_half_of_the_images_are_mirrored_and_bytes_stay_bytes():
    images = torch.arange(400 * 12, dtype=torch.int64).remainder(251).to(torch.uint8).reshape(400, 1, 3, 4)
    changed = jitter(images, Jitter(flip=True), torch.Generator().manual_seed(0))
    assert changed.dtype == torch.uint8
    mirrored = [torch.equal(one, image.flip(-1)) for one, image in zip(changed, images, strict=True)]
    same = [torch.equal(one, image) for one, image in zip(changed, images, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 160 < sum(mirrored) < 240  # four standard deviations of 400 throws


def test_alternating_flips_show_each_image_from_both_sides_in_any_two_epochs():
    images = torch.arange(COUNT, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 1, 2)
    images[..., 1] = 255
    is_mirrored = []
    for epoch in (1, 2, 3):
        shown = seen(images, epoch, flip=True, alternate_flip=True)[:, 0, 0]
        by_image = {int(row.min()): bool(row[0] == 255) for row in shown}
        is_mirrored.append([by_image[image] for image in range(COUNT)])
    first, second, third = is_mirrored
    assert [not one for one in first] == second
    assert third == first
    assert 70 < sum(first) < 130, "half of them, within four standard deviations of 7"


def test_cutout_blackens_a_square_that_edges_may_cut():
    images = torch.full((300, 2, 9, 9), 200, dtype=torch.uint8)
    changed = jitter(images, Jitter(cutout=4.0), torch.Generator().manual_seed(0))
    assert set(changed.unique().tolist()) == {0, 200}
    holes = changed[:, 0] == 0
    assert torch.equal(holes, changed[:, 1] == 0), "a hole goes through every channel"
    for hole in holes:
        rows, columns = hole.any(1).nonzero().ravel(), hole.any(0).nonzero().ravel()
        assert hole.sum() == len(rows) * len(columns), "it is a rectangle"
        assert 2 <= len(rows) <= 5
        assert 2 <= len(columns) <= 5
    assert holes.float().mean(0).min() > 0, "and may be anywhere"


def test_the_changes_of_a_part_are_those_that_the_whole_would_get():
    images = torch.rand(8, 1, 6, 6)
    largest = Jitter(translate=2, rotate=20, flip=True, cutout=2.0)
    changes = draw(8, images.shape[-2:], largest, torch.Generator().manual_seed(1))
    assert torch.equal(apply(images[2:5], changes.take(slice(2, 5))), apply(images, changes)[2:5])
