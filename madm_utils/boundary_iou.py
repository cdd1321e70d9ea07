"""Boundary IoU: IoU of the pixels near the outlines of label and prediction (Cheng et al. 2021, arXiv 2103.16562).

IoU hardly sees the outline of a large object. Boundary IoU of a class counts, of its pixels in the label and of those
in the prediction, the ones that are at most d pixels inside the outline.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from madm_utils.label_spaces import IGNORE_INDEX

BAND_WIDTH = 0.02
"""d as a share of the image's diagonal, the default of the authors."""


def band_pixels(height: int, width: int) -> int:
    """d in pixels, at least 1."""
    return max(1, round(BAND_WIDTH * math.hypot(height, width)))


def boundary_counts(prediction: Tensor, label: Tensor, num_classes: int, distance: int | None = None) -> Tensor:
    """Pixels near outlines per class, in the form of `metrics.class_counts`, whose scores apply.

    Ignored pixels are like the outside of the image, in label and prediction: they count nowhere, and where they begin
    is an outline, as the edge of the image is for the authors.

    Args:
        prediction: uint8 (H, W) class ids.
        label: uint8 (H, W) class ids, or 255 = ignore.
        num_classes: K.
        distance: d; default: `band_pixels` of this image.

    Returns:
        int64 (3, K) on the device of the inputs: pixels of a class in the bands of both, of the label, of the
        prediction. They add up over images.
    """
    distance = band_pixels(*label.shape) if distance is None else distance
    prediction = torch.where(label == IGNORE_INDEX, label, prediction.to(label.dtype))
    of_label, of_prediction = (near_outline(ids, distance) for ids in (label, prediction))
    both = of_label & of_prediction & (label == prediction)
    pairs = ((label, both), (label, of_label), (prediction, of_prediction))
    return torch.stack([torch.bincount(ids[where].long(), minlength=num_classes) for ids, where in pairs])


def near_outline(ids: Tensor, distance: int) -> Tensor:
    """Pixels of classes with another class, an ignored pixel or the outside at most `distance` away; bool (H, W).

    Away means along rows and columns each (a square, as `distance` erosions by 3 x 3 have it). A pixel is near an
    outline exactly if its square holds a value that is larger or smaller: two filters for all classes together.

    Args:
        ids: uint8 (H, W), 255 = ignore.
        distance: in pixels, at least 1.
    """
    # 255 is larger than every class id, so what lies outside is found by the maximum.
    padded = F.pad(ids, (distance,) * 4, value=IGNORE_INDEX)
    window = 2 * distance + 1
    differs = _running(torch.maximum, padded, window) != ids
    differs |= _running(torch.minimum, padded, window) != ids
    return differs & (ids != IGNORE_INDEX)


def _running(operation, values: Tensor, window: int) -> Tensor:
    """Maximum or minimum over squares of `window` pixels that lie inside `values`; sides shrink by `window` - 1.

    Windows of doubled length are made of two overlapping ones, which takes log2(window) passes per direction.
    """
    for dim in (0, 1):
        length = 1
        while length < window:
            step = min(length, window - length)
            size = values.shape[dim] - step
            values = operation(values.narrow(dim, 0, size), values.narrow(dim, step, size))
            length += step
    return values
