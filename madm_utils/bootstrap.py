"""How far a score would move if other images of the same kind had been evaluated: bootstrap over images.

A resample draws as many images as there are, with replacement (Efron 1979). Scores are computed from sums over
images, so a resample is a vector of how often each image was drawn, and all resamples are one matrix product.
"""

from collections.abc import Callable

import numpy as np

RESAMPLES = 1000
LEVEL = 95.0
"""Percent of the resampled scores that lie in the interval."""
SEED = 0


def resampled_sums(
    per_image: np.ndarray, num_resamples: int = RESAMPLES, seed: int = SEED, columns: int = 4096
) -> np.ndarray:
    """Sums of integers (N, ...) over resampled images: float64 (num_resamples, ...), exact below 2^53.

    The same number of images gets the same resamples, which is what makes the difference of two models paired.
    Memory: `num_resamples` x N and the result.

    Args:
        per_image: what adds up over images.
        num_resamples: how many.
        seed: of the draws.
        columns: numbers per image that are converted to float64 at a time.
    """
    images = len(per_image)
    draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), num_resamples)
    draws = draws.astype(np.float64)
    flat = per_image.reshape(images, -1)
    parts = [draws @ flat[:, k : k + columns].astype(np.float64) for k in range(0, flat.shape[1], columns)]
    return np.concatenate(parts, axis=1).reshape(num_resamples, *per_image.shape[1:])


def interval(values: np.ndarray) -> list[float] | None:
    """Percentile interval of resampled scores, [low, high]; `None` where no resample has a score."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    tail = (100 - LEVEL) / 2
    return [float(bound) for bound in np.percentile(values, (tail, 100 - tail))]


def paired_difference(
    score: Callable[[np.ndarray], np.ndarray], first: np.ndarray, other: np.ndarray
) -> dict[str, float | list[float] | None]:
    """How much better `other` is than `first` on the same images: `difference` and its `interval`.

    Args:
        score: from summed counts (..., *) to scores (...).
        first, other: counts of two models, (N, *), image by image.
    """
    resampled = score(resampled_sums(other)) - score(resampled_sums(first))
    difference = float(score(other.sum(0)) - score(first.sum(0)))
    return {"difference": None if np.isnan(difference) else difference, "interval": interval(resampled)}
