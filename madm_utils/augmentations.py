"""Class mix and strong augmentation on the device; pure functions of tensors and explicit random draws."""

import math
import random
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from madm_utils.distributed import LOCAL_BATCH, BatchScope
from madm_utils.label_spaces import IGNORE_INDEX

JITTER_STRENGTH = 0.2
BLUR_SIGMA = (0.15, 1.15)


def label_classes(labels: Iterable[Tensor]) -> np.ndarray:
    """Which ids from 0 to 255 each of B integer labels holds, (B, 256) bool in host memory.

    Training counts them in the data loader, because reading labels waits for their device.
    """
    return np.stack([np.bincount(label.numpy(force=True).ravel(), minlength=256) > 0 for label in labels])


def choose_classes(present: np.ndarray, rng: np.random.Generator, scope: str = "batch") -> np.ndarray:
    """ClassMix (2007.07936): half of the classes for every image, rounded up.

    Args:
        present: (B, 256) bool of `label_classes`.
        rng: draws the classes.
        scope: `batch`: every image chooses among the classes of the whole batch, 255 included (published);
            `image`: among the classes of its own label, 255 excluded.

    Returns:
        (B, 256) bool, True for the classes whose pixels are pasted.
    """
    chosen = np.zeros_like(present)
    for own, row in zip(chosen, present, strict=True):
        classes = np.flatnonzero(present.any(axis=0) if scope == "batch" else row[:IGNORE_INDEX])
        own[classes[rng.choice(len(classes), (len(classes) + 1) // 2, replace=False)]] = True
    return chosen


def class_masks(labels: Tensor, chosen: np.ndarray) -> Tensor:
    """(B, H, W) bool, True where the class of `labels` is among `chosen` (B, 256) for its image."""
    table = torch.from_numpy(chosen)
    if labels.device.type == "cuda":
        table = table.pin_memory()  # from pageable memory the copy would wait for the device
    table = table.to(labels.device, non_blocking=True)
    return table.gather(1, labels.flatten(1)).view_as(labels)


def mix(mask: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """`source` where the (B, H, W) mask is True, else `target`; (B, H, W) or (B, C, H, W)."""
    return torch.where(mask[:, None] if source.dim() == 4 else mask, source, target)


def strong_augment(
    images: Tensor,
    rng: random.Random,
    jitter_probability: float = 0.8,
    blur_probability: float = 0.5,
    across: BatchScope = LOCAL_BATCH,
) -> Tensor:
    """Colour jitter and Gaussian blur of the mixed images (B, 3, H, W) in [0, 1].

    Whether each is applied is drawn once for the batch, the parameters per image (DAFormer, MADM). Every process draws
    for the images of all processes in `across` and applies what is meant for its own.
    """
    jitter, blur = rng.random() > 1 - jitter_probability, rng.random() > 1 - blur_probability
    everyone = range(len(images) * across.num_processes)
    if jitter:
        drawn = across.local([draw_jitter(rng) for _ in everyone])
        images = torch.stack([color_jitter(image, **factors) for image, factors in zip(images, drawn, strict=True)])
    if blur:
        drawn = across.local([rng.uniform(*BLUR_SIGMA) for _ in everyone])
        images = torch.stack([gaussian_blur(image, sigma) for image, sigma in zip(images, drawn, strict=True)])
    return images


def draw_jitter(rng: random.Random, strength: float = JITTER_STRENGTH) -> dict:
    """Parameters of `color_jitter`: factors in 1 +- strength, hue in +- strength turns, random order."""
    factors = {name: rng.uniform(1 - strength, 1 + strength) for name in ("brightness", "contrast", "saturation")}
    return {**factors, "hue": rng.uniform(-strength, strength), "order": rng.sample(range(4), 4)}


def color_jitter(
    image: Tensor, brightness: float, contrast: float, saturation: float, hue: float, order: Sequence[int]
) -> Tensor:
    """Colour jitter of one (3, H, W) image in [0, 1], as kornia 0.6.0 computes it (today's `ColorJiggle`).

    Args:
        image: RGB in [0, 1].
        brightness: `brightness - 1` is added.
        contrast: the image is multiplied by it (no mean subtraction).
        saturation: multiplies the saturation in HSV.
        hue: added to the hue, in turns.
        order: permutation of 0 (brightness), 1 (contrast), 2 (saturation), 3 (hue).
    """
    for operation in order:
        if operation == 0:
            image = (image + (brightness - 1)).clamp(0, 1)
        elif operation == 1:
            image = (image * contrast).clamp(0, 1)
        else:
            h, s, v = rgb_to_hsv(image)
            if operation == 2:
                s = (s * saturation).clamp(0, 1)
            else:
                h = h + hue
            image = hsv_to_rgb(h, s, v).clamp(0, 1)
    return image


def rgb_to_hsv(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(3, H, W) in [0, 1] -> hue in turns [0, 1), saturation [0, 1], value [0, 1], each (H, W)."""
    value, argmax = image.max(dim=0)
    delta = value - image.min(dim=0).values
    saturation = delta / (value + 1e-8)
    red, green, blue = (value - image) / torch.where(delta == 0, torch.ones_like(delta), delta)
    sextant = torch.stack([blue - green, 2 + red - blue, 4 + green - red]).gather(0, argmax[None])[0]
    return torch.where(delta == 0, torch.zeros_like(delta), sextant / 6) % 1, saturation, value


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Inverse of `rgb_to_hsv`; the hue may be any number of turns. Returns (3, H, W)."""
    # 5, 3, 1, made on the device: a copy from the host would wait for it.
    offsets = 5 - 2 * torch.arange(3, device=hue.device, dtype=hue.dtype)[:, None, None]
    k = (offsets + hue * 6) % 6
    return value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)


def blur_kernel_size(length: int) -> int:
    """Odd kernel width of about a tenth of the image side (51 at 512)."""
    tenth = math.ceil(0.1 * length)
    return math.floor(tenth - 0.5 + tenth % 2)


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian blur of one (C, H, W) image with reflect padding; kernel sizes from `blur_kernel_size`."""
    channels, height, width = image.shape
    for axis, length in ((-2, height), (-1, width)):
        size = blur_kernel_size(length)
        x = torch.arange(size, device=image.device, dtype=image.dtype) - size // 2
        kernel = torch.exp(-(x**2) / (2 * sigma**2))
        shape = (1, 1, size, 1) if axis == -2 else (1, 1, 1, size)
        kernel = (kernel / kernel.sum()).view(shape).expand(channels, 1, *shape[2:])
        padding = (0, 0, size // 2, size // 2) if axis == -2 else (size // 2, size // 2, 0, 0)
        image = F.conv2d(F.pad(image[None], padding, mode="reflect"), kernel, groups=channels)[0]
    return image
