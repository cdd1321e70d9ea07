"""Boundary IoU, calibration error (torchmetrics: `test_metrics.py`) and bootstrap against slow references."""

import numpy as np
import pytest
import torch
from test_metrics import random_maps

from madm_utils.bootstrap import interval, paired_difference, resampled_sums
from madm_utils.boundary_iou import band_pixels, boundary_counts, near_outline
from madm_utils.calibration import calibration_counts, calibration_error, reliability_table
from madm_utils.metrics import class_counts, class_iou, confusion_matrix, count_scores, mean_scores, scores

# --- boundary IoU ----------------------------------------------------------------------------------------------------


def slow_band(mask: np.ndarray, distance: int) -> np.ndarray:
    """A mask without what is left of it after `distance` erosions by 3 x 3, the outside being empty (the authors')."""
    eroded = mask
    for _ in range(distance):
        padded = np.pad(eroded, 1)
        height, width = mask.shape
        shifted = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
        eroded = np.logical_and.reduce(shifted)
    return mask & ~eroded


@pytest.mark.parametrize(("distance", "seed"), [(1, 0), (2, 1), (5, 2)])
def test_boundary_counts_equal_erosions_of_each_class(distance, seed):
    generator = torch.Generator().manual_seed(seed)
    blobs = torch.rand((2, 4, 5, 6), generator=generator)
    prediction, label = torch.nn.functional.interpolate(blobs, (31, 44), mode="bilinear").argmax(1).to(torch.uint8)
    label[3:9, 20:40] = 255
    counts = boundary_counts(prediction, label, 4, distance).numpy()

    prediction, label = prediction.numpy().copy(), label.numpy()
    prediction[label == 255] = 255
    for k in range(4):
        bands = [slow_band(ids == k, distance) for ids in (label, prediction)]
        assert counts[:, k].tolist() == [(bands[0] & bands[1]).sum(), bands[0].sum(), bands[1].sum()]
    assert counts[0].sum() > 100


def test_boundary_iou_by_hand():
    label = torch.zeros((9, 9), dtype=torch.uint8)
    label[2:7, 2:7] = 1  # a square of 25 pixels, 16 of them on its outline
    prediction = torch.zeros_like(label)
    prediction[2:7, 3:8] = 1  # moved by one
    counts = boundary_counts(prediction, label, 3, distance=1)
    # The outlines share their upper and lower sides without the ends: 2 x 4 pixels. The right side of the label, 3
    # more pixels, is inside of the prediction, and the left side of the prediction inside of the label.
    assert counts[:, 1].tolist() == [8, 16, 16]
    result = count_scores(counts.numpy(), ["ground", "square", "absent"])
    assert result["per_class"]["square"]["iou"] == pytest.approx(100 * 8 / 24)
    assert result["per_class"]["absent"]["iou"] is None
    square = count_scores(class_counts(confusion_matrix(prediction, label, 3)), ["ground", "square", "absent"])
    assert square["per_class"]["square"]["iou"] == pytest.approx(100 * 20 / 30)


def test_band_is_two_percent_of_the_diagonal_and_at_least_a_pixel():
    assert band_pixels(512, 512) == 14
    assert band_pixels(1042, 1042) == 29
    assert band_pixels(10, 10) == 1
    label = torch.zeros((100, 100), dtype=torch.uint8)
    assert boundary_counts(label, label, 1)[1, 0] == 100**2 - 94**2  # d = 3, along the edge of the image


def test_a_band_wider_than_the_image_is_all_of_it():
    ids = torch.tensor([[0, 1, 255]], dtype=torch.uint8)
    assert near_outline(ids, 4).tolist() == [[True, True, False]]


def test_predictions_on_ignored_pixels_do_not_count():
    label = torch.full((20, 20), 255, dtype=torch.uint8)
    label[:10] = 0
    one = boundary_counts(torch.zeros_like(label), label, 2)
    prediction = torch.zeros_like(label)
    prediction[10:] = 1
    assert torch.equal(boundary_counts(prediction, label, 2), one)
    assert count_scores(one.numpy(), ["a", "b"])["miou"] == 100


# --- calibration -----------------------------------------------------------------------------------------------------


def test_calibration_by_hand():
    confidence = torch.tensor([[1.0, 0.9, 0.63, 0.63, 0.05]])
    prediction = torch.tensor([[0, 0, 1, 1, 1]])
    label = torch.tensor([[0, 0, 1, 0, 255]])
    counts = calibration_counts(confidence, prediction, label).numpy()
    # Bins (0.60, 0.67] with one of two right, (0.87, 0.93] and (0.93, 1] with one right each.
    assert counts[0].tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 1, 1]
    assert counts[1].tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 1]
    assert calibration_error(counts) == pytest.approx(100 * (abs(1 - 1.26) + abs(1 - 0.9) + 0) / 4, abs=1e-4)
    table = reliability_table(counts)
    assert table[14] == {"from": 14 / 15, "to": 1.0, "pixels": 1, "confidence": 100.0, "accuracy": 100.0}
    assert table[0]["pixels"] == 0 and table[0]["accuracy"] is None


def test_no_labelled_pixel_is_no_calibration_error():
    nothing = calibration_counts(torch.ones(2, 2), torch.zeros(2, 2), torch.full((2, 2), 255)).numpy()
    assert np.isnan(calibration_error(nothing))


# --- counts and bootstrap --------------------------------------------------------------------------------------------


def per_image_counts(num_images: int = 12, seed: int = 0) -> np.ndarray:
    pred, label = random_maps(5, seed, (num_images, 9, 11))
    return np.stack([class_counts(confusion_matrix(p, g, 5)) for p, g in zip(pred, label, strict=True)])


def test_counts_hold_all_that_the_scores_need():
    pred, label = random_maps(6, seed=3)
    confusion = confusion_matrix(pred, label, 6)
    names = list("abcdef")
    assert count_scores(class_counts(confusion), names) == scores(confusion, names)
    batch = np.stack([class_counts(confusion), np.zeros((3, 6), np.int64)])
    assert {key: values[0] for key, values in mean_scores(batch).items()} == {
        key: value for key, value in scores(confusion, names).items() if key != "per_class"
    }
    assert all(np.isnan(values[1]) for values in mean_scores(batch).values())
    assert np.isnan(class_iou(batch)[1]).all()


def test_resampled_sums_equal_a_loop_over_the_same_draws():
    counts = per_image_counts()
    draws = np.random.default_rng(7).multinomial(12, np.full(12, 1 / 12), 20)
    expected = [sum(times * image for times, image in zip(row, counts, strict=True)) for row in draws]
    np.testing.assert_array_equal(resampled_sums(counts, 20, seed=7), expected)
    for draws_at_once in (1, 36, 239):  # one, three and nineteen resamples of 12 images at a time
        np.testing.assert_array_equal(resampled_sums(counts, 20, seed=7, draws_at_once=draws_at_once), expected)
    assert draws.sum(1).tolist() == [12] * 20


def test_interval_holds_the_score_and_shrinks_with_more_images():
    few, many = per_image_counts(12), per_image_counts(300, seed=1)
    widths = []
    for counts in (few, many):
        low, high = interval(mean_scores(resampled_sums(counts))["miou"])
        assert low < mean_scores(counts.sum(0))["miou"] < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 3  # 25 times the images: about a fifth
    same = np.repeat(few[:1], 8, axis=0)
    low, high = interval(mean_scores(resampled_sums(same))["miou"])
    assert low == pytest.approx(high)
    assert interval(np.array([np.nan, np.nan])) is None


def test_interval_covers_as_often_as_it_says():
    """About 95 % of the intervals of a mean hold the true one; of 30 exponential numbers somewhat fewer, ~92 %."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        sample = np.round(1000 * rng.exponential(size=(30, 1))).astype(np.int64)
        low, high = interval(resampled_sums(sample, 200)[:, 0] / 30)
        hits += low < 1000 < high
    assert 0.86 < hits / 200 < 0.98


def test_difference_of_models_is_paired():
    first = per_image_counts(40)
    assert paired_difference(lambda c: mean_scores(c)["miou"], first, first) == {
        "difference": 0.0, "interval": [0.0, 0.0],
    }  # fmt: skip
    other = first.copy()
    other[:, 0] -= np.minimum(other[:, 0], 1)  # one pixel per class and image less is right
    result = paired_difference(lambda c: mean_scores(c)["miou"], first, other)
    low, high = result["interval"]
    assert low <= result["difference"] <= high < 0
    own = interval(mean_scores(resampled_sums(first))["miou"])
    assert high - low < (own[1] - own[0]) / 2
