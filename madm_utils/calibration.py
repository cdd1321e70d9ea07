"""Whether a model is as often right as it says: expected calibration error, per pixel (Guo et al., 1706.04599)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from madm_utils.label_spaces import IGNORE_INDEX

BINS = 15
"""Of equal width over (0, 1], each with its upper end, as the authors have them."""
_UNITS = 2**24
"""Confidences are summed as whole multiples of 1 / _UNITS, so that sums do not depend on their order. A power of two:
multiplying by it is exact in float32."""


def calibration_counts(confidence: Tensor, prediction: Tensor, label: Tensor) -> Tensor:
    """Labelled pixels by confidence, ignored ones left out; counts of several images add up.

    Args:
        confidence: probability of the predicted class, float32 (H, W) in [0, 1].
        prediction: class ids (H, W).
        label: class ids, or 255 = ignore, (H, W).

    Returns:
        int64 (3, BINS) on the device of the inputs: pixels, correct pixels, and the sum of confidences in units of
        2^-24.
    """
    labelled = label != IGNORE_INDEX
    confidence, correct = confidence[labelled], prediction[labelled] == label[labelled]
    edges = torch.arange(1, BINS, device=confidence.device) / BINS
    bins = torch.bucketize(confidence, edges)
    units = (confidence * _UNITS).round().long()
    values = torch.stack([torch.ones_like(units), correct.long(), units])
    counts = torch.zeros((3, BINS), dtype=torch.int64, device=confidence.device)
    return counts.scatter_add_(1, bins.expand(3, -1), values)


def calibration_error(counts: np.ndarray) -> np.ndarray:
    """ECE in percent from counts (..., 3, BINS) -> (...); NaN without labelled pixels."""
    pixels, correct, units = np.moveaxis(np.asarray(counts, np.float64), -2, 0)
    gaps, total = np.abs(correct - units / _UNITS).sum(-1), pixels.sum(-1)
    return np.divide(100 * gaps, total, out=np.full(total.shape, np.nan), where=total > 0)


def reliability_table(counts: np.ndarray) -> list[dict[str, Any]]:
    """One row per bin from counts (3, BINS): `from`, `to`, `pixels`, and in percent `confidence` and `accuracy`.

    A bin without pixels has `None` for both.
    """
    return [
        {
            "from": k / BINS,
            "to": (k + 1) / BINS,
            "pixels": int(pixels),
            "confidence": 100 * float(units) / _UNITS / float(pixels) if pixels else None,
            "accuracy": 100 * float(correct) / float(pixels) if pixels else None,
        }
        for k, (pixels, correct, units) in enumerate(np.asarray(counts).T)
    ]
