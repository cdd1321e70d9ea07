"""The published evaluation metric: one confusion matrix over the whole test set, and the scores computed from it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from madm_utils.cli import UserError
from madm_utils.label_spaces import IGNORE_INDEX


def confusion_matrix(pred: torch.Tensor, label: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Count pixels by predicted and labelled class.

    Args:
        pred: class ids, 0..num_classes-1, any integer dtype and shape.
        label: class ids of the same shape, 0..num_classes-1 or 255 (ignore).
        num_classes: K.

    Returns:
        int64 (K+1, K+1) on the device of the inputs; rows are predictions, columns are labels. The last column counts
        the ignored pixels. The last row is always zero: it keeps the layout of the published evaluator. Matrices of
        several images or processes are summed.

    Raises:
        UserError: an id that is not in the allowed range.
        ValueError: `pred` and `label` have different shapes.
    """
    if pred.shape != label.shape:
        raise ValueError(f"prediction has shape {tuple(pred.shape)}, label has {tuple(label.shape)}; expected equal")
    pred, label = pred.long(), label.long()
    ignored = label == IGNORE_INDEX
    _check_ids(label[~ignored], num_classes, "label", f" or {IGNORE_INDEX} (ignore)")
    _check_ids(pred, num_classes, "prediction", "")
    size = num_classes + 1
    # `bincount` without weights is deterministic on every device.
    cells = pred * size + label.masked_fill(ignored, num_classes)
    return torch.bincount(cells.flatten(), minlength=size * size).reshape(size, size)


def _check_ids(ids: torch.Tensor, num_classes: int, what: str, also: str) -> None:
    outside = (ids < 0) | (ids >= num_classes)
    if outside.any():
        raise UserError(
            f"{what} holds class ids {ids[outside].unique().tolist()}; expected 0..{num_classes - 1}{also}. "
            "Check that the data and the label map belong to this task."
        )


def class_counts(confusion: torch.Tensor | np.ndarray) -> np.ndarray:
    """Pixels per class from a (K+1, K+1) confusion matrix: int64 (3, K), rows correct, labelled, predicted.

    Ignored pixels are left out of all three. Every score here is a function of these counts, and they add up over
    images, so that an image needs 3 x K numbers instead of its matrix.
    """
    matrix = np.asarray(confusion.cpu() if isinstance(confusion, torch.Tensor) else confusion)[:-1, :-1]
    return np.stack([matrix.diagonal(), matrix.sum(axis=0), matrix.sum(axis=1)]).astype(np.int64)


def class_iou(counts: np.ndarray) -> np.ndarray:
    """IoU in percent per class from counts (..., 3, K) -> (..., K); NaN for a class without labelled pixels."""
    correct, labelled, predicted = np.moveaxis(np.asarray(counts, np.float64), -2, 0)
    return 100 * _ratio(correct, np.where(labelled > 0, labelled + predicted - correct, 0))


def mean_scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """`miou`, `macc`, `pacc` and `fwiou` (see `scores`) of counts (..., 3, K), each (...); NaN without labels."""
    correct, labelled, predicted = np.moveaxis(np.asarray(counts, np.float64), -2, 0)
    iou, accuracy = np.nan_to_num(class_iou(counts)), np.nan_to_num(100 * _ratio(correct, labelled))
    total = labelled.sum(-1)
    seen = np.where(total > 0, np.count_nonzero(labelled + predicted, -1), 0)
    return {
        "miou": _ratio(iou.sum(-1), seen),
        "macc": _ratio(accuracy.sum(-1), np.count_nonzero(labelled, -1)),
        "pacc": 100 * _ratio(correct.sum(-1), total),
        "fwiou": _ratio((iou * labelled).sum(-1), total),
    }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where the whole is 0."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def scores(confusion: torch.Tensor | np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Compute the published scores, in percent, from the (K+1, K+1) matrix of `confusion_matrix`.

    With tp, gt (labelled pixels) and pr (predicted pixels) per class, ignored pixels left out of both:

    - `per_class[name]["iou"]` = tp / (gt + pr - tp) and `["acc"]` = tp / gt; `None` for a class without labelled
      pixels.
    - `miou`: sum of the IoUs / number of classes with gt + pr > 0. A class that is predicted but never labelled has
      no IoU of its own, yet counts as 0 here; a class absent from both is left out.
    - `macc`: mean of the accuracies of labelled classes. `pacc`: correct / labelled pixels. `fwiou`: IoUs weighted by
      the share of labelled pixels.

    Without any labelled pixel all of them are `None`.
    """
    size = (len(class_names) + 1,) * 2
    if tuple(confusion.shape) != size:
        raise ValueError(f"confusion matrix has shape {confusion.shape}; {len(class_names)} classes need {size}")
    return count_scores(class_counts(confusion), class_names)


def count_scores(counts: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """`scores` from counts (3, K) of `class_counts`."""
    result: dict[str, Any] = {name: defined(value) for name, value in mean_scores(counts).items()}
    accuracy = 100 * _ratio(counts[0], counts[1])
    result["per_class"] = {
        name: {"iou": defined(iou), "acc": defined(acc)}
        for name, iou, acc in zip(class_names, class_iou(counts), accuracy, strict=True)
    }
    return result


def defined(value: float) -> float | None:
    """`value` as JSON has it: `None` for NaN."""
    return None if np.isnan(value) else float(value)


def format_scores(result: dict[str, Any]) -> str:
    """Lay the dict of `scores` out as a table for the screen, one line per class, percent."""

    def cell(value: float | None) -> str:
        return f"{'-' if value is None else f'{value:.2f}':>8}"

    width = max(len("class"), *(len(name) for name in result["per_class"]))
    lines = [f"{'class':<{width}}{'IoU':>8}{'acc':>8}"]
    lines += [f"{name:<{width}}{cell(row['iou'])}{cell(row['acc'])}" for name, row in result["per_class"].items()]
    names = {"miou": "mIoU", "macc": "mAcc", "pacc": "pAcc", "fwiou": "fwIoU"}
    lines += ["", "  ".join(f"{names[key]}{cell(result[key])}" for key in names)]
    return "\n".join(lines)
