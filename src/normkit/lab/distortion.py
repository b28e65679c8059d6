"""Distorted images for training: turned, shifted, and of other contrast and brightness."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from .dataset import Dataset
from .training import seeded

__all__ = ["Distortion", "distorted_once"]

# What strength 1 draws from, uniformly and per image, on either side of no change.
DEGREES = 30.0
SHIFT_PIXELS = 4.0
CONTRAST = 0.5
BRIGHTNESS = 0.5


class Distortion(nn.Module):
    """Distort every image of a training batch by itself; in evaluation images pass as they are.

    Angle, shift, contrast and brightness are uniform in ``±strength`` times 30 degrees, 4 pixels, a factor's half, and
    half a deviation of the pixels. They are drawn from torch's random numbers. Pixels that come in from outside repeat
    the image's border.

    Args:
        strength: 0 for none, 1 for the ranges above.

    Shape:
        ``(N, C, H, W)``, in and out.

    >>> images = torch.rand(2, 1, 28, 28)
    >>> torch.equal(Distortion(0.0)(images), images), torch.equal(Distortion(1.0).eval()(images), images)
    (True, True)
    """

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength

    def forward(self, images: Tensor) -> Tensor:
        """Return the images, distorted where the module is in training mode."""
        if not self.training or self.strength == 0:
            return images
        draws = (2 * torch.rand(5, len(images), device=images.device) - 1) * self.strength
        angle = draws[0] * math.radians(DEGREES)
        # The grid's unit is half the image's side.
        right, down = draws[1] * 2 * SHIFT_PIXELS / images.shape[3], draws[2] * 2 * SHIFT_PIXELS / images.shape[2]
        rows = (
            torch.stack([angle.cos(), -angle.sin(), right], dim=1),
            torch.stack([angle.sin(), angle.cos(), down], dim=1),
        )
        grid = functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
        moved = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
        contrast, brightness = 1 + CONTRAST * draws[3], BRIGHTNESS * draws[4]
        distorted: Tensor = moved * contrast.view(-1, 1, 1, 1) + brightness.view(-1, 1, 1, 1)
        return distorted


def distorted_once(dataset: Dataset, strength: float, seed: int) -> Dataset:
    """Return the data set with every image, training and test, distorted once: placed and lit as it comes.

    Args:
        dataset: its images are those of a studio, centred and lit alike.
        strength: that of `Distortion`.
        seed: of how each image is distorted.

    >>> from normkit.lab.data import load
    >>> digits = load("digits")
    >>> loose = distorted_once(digits, 1.0, seed=0)
    >>> loose.test_images.shape == digits.test_images.shape, torch.equal(loose.test_images, digits.test_images)
    (True, False)
    """
    distort = Distortion(strength)
    with seeded(seed):
        return replace(
            dataset, train_images=distort(dataset.train_images), test_images=distort(dataset.test_images)
        )  # fmt: skip
