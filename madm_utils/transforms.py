"""Resize, random crop and flip of an image and its label: PIL resampling, NumPy geometry, Python randomness.

The order of operations and of random draws is that of MADM (resize, draw flip, x, y, crop, then flip the crop), so
that the same `random.Random` state gives the same sample.
"""

import random
from typing import NamedTuple

import numpy as np
from PIL import Image

Size = tuple[int, int]


class Crop(NamedTuple):
    """A square crop of a resized image, mirrored after cutting when `flip` is set. `left`, `top` in pixels."""

    flip: bool
    left: int
    top: int


def resize_image(image: Image.Image, size: Size) -> Image.Image:
    """Resize to `size` = (height, width) with PIL's area-aware BILINEAR; the same object when it fits already."""
    height, width = size
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)


def resize_label(label: Image.Image, size: Size) -> Image.Image:
    """Resize a label image to `size` = (height, width) with PIL's NEAREST; the same object when it fits already."""
    height, width = size
    return label if label.size == (width, height) else label.resize((width, height), Image.Resampling.NEAREST)


def draw_crop(rng: random.Random, size: Size, side: int) -> Crop:
    """Draw flip (probability 1/2), x, y in this order, uniform over every `side` x `side` crop of `size` = (h, w)."""
    height, width = size
    flip = rng.random() < 0.5
    left = rng.randint(0, width - side)
    top = rng.randint(0, height - side)
    return Crop(flip, left, top)


def apply_crop(array: np.ndarray, crop: Crop, side: int) -> np.ndarray:
    """Cut `crop` out of (H, W) or (H, W, C) and mirror it if asked; a view of `side` x `side` pixels."""
    cut = array[crop.top : crop.top + side, crop.left : crop.left + side]
    return cut[:, ::-1] if crop.flip else cut
