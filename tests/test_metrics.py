"""The metric equals hand-computed tables and torchmetrics (the published evaluator: `test_reference_parity.py`)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from madm_utils.calibration import BINS, calibration_counts, calibration_error
from madm_utils.cli import UserError
from madm_utils.label_spaces import STREET_CLASSES, STREET_CLASSES_WITHOUT_WALL_AND_FENCE
from madm_utils.metrics import confusion_matrix, format_scores, scores

CLASS_NAMES = {"depth": STREET_CLASSES, "infrared": STREET_CLASSES_WITHOUT_WALL_AND_FENCE}
COMMON = Path(__file__).parent / "fixtures" / "common"


def random_maps(num_classes: int, seed: int, shape=(4, 17, 23)):
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, num_classes, shape, generator=generator)
    pred = torch.where(
        torch.rand(shape, generator=generator) < 0.7,
        label,
        torch.randint(0, num_classes, shape, generator=generator),
    )
    label[torch.rand(shape, generator=generator) < 0.1] = 255
    return pred, label


def test_matrix_and_scores_by_hand():
    label = torch.tensor([[0, 0, 0, 0], [1, 1, 255, 255]], dtype=torch.uint8)
    pred = torch.tensor([[0, 0, 0, 1], [1, 2, 3, 0]], dtype=torch.uint8)
    confusion = confusion_matrix(pred, label, num_classes=5)
    expected = np.zeros((6, 6), np.int64)
    expected[0, 0], expected[1, 0], expected[1, 1], expected[2, 1] = 3, 1, 1, 1
    expected[3, 5] = expected[0, 5] = 1  # predictions on ignored pixels
    np.testing.assert_array_equal(confusion.numpy(), expected)

    result = scores(confusion, ["a", "b", "predicted only", "on ignored only", "absent"])
    none = {"iou": None, "acc": None}
    assert result["per_class"] == {
        "a": {"iou": 75.0, "acc": 75.0},  # 3 / (4 + 3 - 3)
        "b": {"iou": pytest.approx(100 / 3), "acc": 50.0},  # 1 / (2 + 2 - 1)
        "predicted only": none,
        "on ignored only": none,
        "absent": none,
    }
    # "predicted only" counts as 0 of three classes; predictions on ignored pixels do not bring a class in.
    assert result["miou"] == pytest.approx((75 + 100 / 3) / 3)
    assert result["macc"] == pytest.approx((75 + 50) / 2)
    assert result["pacc"] == pytest.approx(100 * 4 / 6)
    assert result["fwiou"] == pytest.approx((75 * 4 + 100 / 3 * 2) / 6)


def test_matrix_equals_slow_loop():
    pred, label = random_maps(7, seed=0, shape=(5, 6))
    expected = np.zeros((8, 8), np.int64)
    for p, g in zip(pred.flatten().tolist(), label.flatten().tolist(), strict=True):
        expected[p, 7 if g == 255 else g] += 1
    np.testing.assert_array_equal(confusion_matrix(pred, label, 7).numpy(), expected)


def test_equals_torchmetrics_when_every_class_occurs():
    # torchmetrics writes to the terminal's settings at import, so it is imported here only.
    from torchmetrics.functional import classification as oracle

    names = [f"class {k}" for k in range(9)]
    pred, label = random_maps(9, seed=1)
    confusion = confusion_matrix(pred, label, 9)
    expected = oracle.multiclass_confusion_matrix(pred, label, 9, ignore_index=255)  # rows are labels there
    assert torch.equal(confusion[:9, :9], expected.T)
    result = scores(confusion, names)
    iou = 100 * oracle.multiclass_jaccard_index(pred, label, 9, average=None, ignore_index=255)
    acc = 100 * oracle.multiclass_accuracy(pred, label, 9, average=None, ignore_index=255)
    np.testing.assert_allclose([result["per_class"][n]["iou"] for n in names], iou, atol=1e-4)
    np.testing.assert_allclose([result["per_class"][n]["acc"] for n in names], acc, atol=1e-4)
    assert result["miou"] == pytest.approx(float(iou.mean()), abs=1e-4)
    assert result["macc"] == pytest.approx(float(acc.mean()), abs=1e-4)


def test_calibration_error_equals_torchmetrics():
    from torchmetrics.functional.classification import multiclass_calibration_error

    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn((3, 6, 20, 30), generator=generator)
    label = torch.randint(0, 6, (3, 20, 30), generator=generator)
    label[torch.rand(label.shape, generator=generator) < 0.2] = 255
    confidence, prediction = logits.softmax(1).max(1)
    counts = sum(calibration_counts(*maps) for maps in zip(confidence, prediction, label, strict=True))
    valid = label != 255
    rows = logits.movedim(1, -1)[valid].softmax(-1)
    expected = multiclass_calibration_error(rows, label[valid], 6, n_bins=BINS, norm="l1")
    assert calibration_error(counts.numpy()) == pytest.approx(100 * float(expected), abs=1e-4)
    assert counts[0].sum() == valid.sum() and counts[1].sum() == (prediction == label)[valid].sum()


def test_matrices_of_parts_sum_to_the_whole():
    pred, label = random_maps(11, seed=2)
    parts = sum(confusion_matrix(p, g, 11) for p, g in zip(pred, label, strict=True))
    assert torch.equal(parts, confusion_matrix(pred, label, 11))


def test_254_classes_do_not_overflow_uint8():
    ids = torch.arange(254, dtype=torch.uint8)
    assert torch.equal(confusion_matrix(ids, ids, 254)[:254, :254], torch.eye(254, dtype=torch.int64))


def test_everything_ignored_is_undefined_not_an_error():
    label = torch.full((2, 2), 255, dtype=torch.uint8)
    result = scores(confusion_matrix(torch.zeros_like(label), label, 2), ["a", "b"])
    assert [result[key] for key in ("miou", "macc", "pacc", "fwiou")] == [None] * 4
    assert result["per_class"]["a"] == {"iou": None, "acc": None}
    assert "mIoU       -" in format_scores(result)


@pytest.mark.parametrize("bad", [3, 254, -1])
def test_label_outside_the_classes_is_refused(bad):
    label = torch.tensor([0, 1, bad])
    with pytest.raises(UserError, match=rf"label holds class ids \[{bad}\]; expected 0\.\.2 or 255"):
        confusion_matrix(torch.zeros(3, dtype=torch.int64), label, 3)


def test_prediction_outside_the_classes_is_refused():
    with pytest.raises(UserError, match=r"prediction holds class ids \[255\]; expected 0\.\.2\."):
        confusion_matrix(torch.tensor([255]), torch.tensor([0]), 3)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"prediction has shape \(2, 3\), label has \(3, 2\)"):
        confusion_matrix(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match="3 classes need"):
        scores(np.zeros((3, 3), np.int64), ["a", "b", "c"])


def test_table_has_a_line_per_class():
    result = scores(np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]]), ["sky", "traffic sign"])
    assert format_scores(result).splitlines() == [
        "class            IoU     acc",
        "sky            75.00  100.00",
        "traffic sign   80.00   80.00",
        "",
        "mIoU   77.50  mAcc   90.00  pAcc   87.50  fwIoU   78.12",
    ]
