"""Rare-class sampling (DAFormer): draw a class, rare ones more often, then an image that shows enough of it."""

import random
from collections.abc import Sequence

import numpy as np

from madm_utils.cli import UserError


def rare_class_probabilities(class_pixel_counts: np.ndarray, temperature: float) -> np.ndarray:
    """Softmax over classes of `(1 - frequency) / temperature`.

    `class_pixel_counts` (K,) holds the labelled pixels of each class over the whole source set; the frequency is the
    share of all labelled pixels. Returns float64 (K,) that sums to 1.
    """
    frequency = class_pixel_counts / class_pixel_counts.sum()
    logits = (1 - frequency) / temperature
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


class RareClassSampler:
    """Draws (class, image) pairs and knows when a crop shows enough of its class.

    Counts are those of the native images while crops are cut at training size: the published behaviour.

    Args:
        class_pixel_counts: (N, K) labelled pixels per image and class of the source dataset, before any task map.
        temperature: of the softmax; the smaller, the more the rarest classes dominate.
        min_pixels: an image is a candidate for a class with more than `min_pixels` of it; a crop is accepted with
            more than half as many.

    Raises:
        UserError: no image has more than `min_pixels` pixels of any class.
    """

    max_crops = 10
    """Further crops drawn before the last one is taken as it is."""

    def __init__(self, class_pixel_counts: np.ndarray, temperature: float = 0.01, min_pixels: int = 3000):
        self.min_crop_pixels = min_pixels / 2
        enough = class_pixel_counts > min_pixels
        candidates = {c: np.flatnonzero(enough[:, c]).tolist() for c in range(enough.shape[1]) if enough[:, c].any()}
        if not candidates:
            raise UserError(
                f"rare-class sampling: none of {len(class_pixel_counts)} source images has more than {min_pixels} "
                f"pixels of a class (largest: {class_pixel_counts.max(initial=0)}); lower --rare_class_min_pixels or "
                "use --no-rare_class_sampling"
            )
        # A class without any candidate cannot be drawn: probability 0, the others keep their proportions.
        weights = rare_class_probabilities(class_pixel_counts.sum(axis=0), temperature)[list(candidates)]
        if not weights.sum() > 0:
            weights = np.ones(len(weights))
        self.classes: Sequence[int] = tuple(candidates)
        self.probabilities: Sequence[float] = (weights / weights.sum()).tolist()
        self._candidates = candidates

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """Return (class id, image index): the class by its probability, the image uniformly among its candidates."""
        class_id = rng.choices(self.classes, self.probabilities)[0]
        return class_id, rng.choice(self._candidates[class_id])

    def accepts(self, label_crop: np.ndarray, class_id: int) -> bool:
        """Whether a label crop (ids of the source dataset) shows more than half of `min_pixels` of the class."""
        return np.count_nonzero(label_crop == class_id) > self.min_crop_pixels


def evenly_spaced(count: int, limit: int | None) -> range | list[int]:
    """Indices of at most `limit` of `count` items, spread over all of them so that every sequence has its share."""
    if limit is None or limit >= count:
        return range(count)
    return [i * count // limit for i in range(limit)]
