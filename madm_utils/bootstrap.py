"""How far a score would move if other images of the same kind had been evaluated: bootstrap over images.

A resample draws as many images as there are, with replacement (Efron 1979). Scores are computed from sums over
images, so a resample is a vector of how often each image was drawn, and many resamples are one matrix product.
"""

from collections.abc import Callable

import numpy as np

RESAMPLES = 1000
LEVEL = 95.0
"""Percent of the resampled scores that lie in the interval."""
SEED = 0


def resampled_sums(
    per_image: np.ndarray, num_resamples: int = RESAMPLES, seed: int = SEED, draws_at_once: int = 2**20
) -> np.ndarray:
    """Sums of integers (N, ...) over resampled images: float64 (num_resamples, ...), exact below 2^53.

    The same number of images gets the same resamples, which is what makes the difference of two models paired.
    Memory: 16 bytes x the larger of `draws_at_once` and N, `per_image` as float64, and the result.

    Args:
        per_image: what adds up over images.
        num_resamples: how many.
        seed: of the draws.
        draws_at_once: numbers that say how often an image was drawn, held at a time; the sums do not depend on it.
    """
    images = len(per_image)
    share, numbers = np.full(images, 1 / images), per_image.reshape(images, -1).astype(np.float64)
    rng = np.random.default_rng(seed)
    rows = max(1, draws_at_once // images)
    sizes = [min(rows, num_resamples - start) for start in range(0, num_resamples, rows)]
    parts = [rng.multinomial(images, share, size).astype(np.float64) @ numbers for size in sizes]
    return np.concatenate(parts).reshape(num_resamples, *per_image.shape[1:])


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
