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
    matrix = np.asarray(confusion.cpu() if isinstance(confusion, torch.Tensor) else confusion).astype(np.float64)
    classes = len(class_names)
    if matrix.shape != (classes + 1, classes + 1):
        raise ValueError(f"confusion matrix has shape {matrix.shape}; {classes} classes need {(classes + 1,) * 2}")
    matrix = matrix[:classes, :classes]
    true_positive, labelled, predicted = matrix.diagonal(), matrix.sum(axis=0), matrix.sum(axis=1)
    seen = labelled > 0
    iou, acc = np.full(classes, np.nan), np.full(classes, np.nan)
    iou[seen] = 100 * true_positive[seen] / (labelled + predicted - true_positive)[seen]
    acc[seen] = 100 * true_positive[seen] / labelled[seen]
    result: dict[str, Any] = {"miou": None, "macc": None, "pacc": None, "fwiou": None}
    if seen.any():
        result = {
            "miou": float(iou[seen].sum() / np.count_nonzero(labelled + predicted)),
            "macc": float(acc[seen].mean()),
            "pacc": float(100 * true_positive.sum() / labelled.sum()),
            "fwiou": float((iou[seen] * labelled[seen]).sum() / labelled.sum()),
        }
    result["per_class"] = {
        name: {"iou": float(iou[k]), "acc": float(acc[k])} if seen[k] else {"iou": None, "acc": None}
        for k, name in enumerate(class_names)
    }
    return result


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
