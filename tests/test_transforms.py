"""Preprocessing equals the published loader: random draws, resize, crop, flip, label map."""

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from madm_utils.label_spaces import apply_label_map, deliver_class_ids
from madm_utils.tasks import TASKS
from madm_utils.transforms import Crop, apply_crop, draw_crop, resize_image, resize_label

CASES = Path(__file__).parent / "fixtures" / "common" / "dataset_case"
TASK_OF = {
    "depth": TASKS["cityscapes_to_deliver_depth"],
    "infrared": TASKS["cityscapes_to_fmb_infrared"],
    "event": TASKS["cityscapes_to_dsec_event"],
}


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("kind", ["depth", "infrared"])
def test_training_sample_equals_published_loader(kind, seed):
    task, folder = TASK_OF[kind], CASES / kind
    golden = np.load(folder / "golden_train.npz")
    rng = random.Random(seed)
    source, target = (draw_crop(rng, size, 512) for size in (task.source_size, task.target_size))
    assert [*source, *target] == golden[f"params_{seed}"].tolist()

    image = np.asarray(resize_image(Image.open(folder / "src.png").convert("RGB"), task.source_size))
    label = np.asarray(resize_label(Image.open(folder / "src_lab.png"), task.source_size))
    other = np.asarray(resize_image(Image.open(folder / "a/b/c/img.png").convert("RGB"), task.target_size))
    np.testing.assert_array_equal(
        apply_crop(image, source, 512).transpose(2, 0, 1)[:, ::2, ::2], golden[f"source_rgb_s2_{seed}"]
    )
    np.testing.assert_array_equal(
        apply_label_map(apply_crop(label, source, 512), task.source_label_map), golden[f"source_label_{seed}"][0]
    )
    np.testing.assert_array_equal(
        apply_crop(other, target, 512).transpose(2, 0, 1)[:, ::2, ::2], golden[f"target_s2_{seed}"]
    )


@pytest.mark.parametrize("kind", TASK_OF)
def test_test_sample_equals_published_loader(kind):
    golden = np.load(CASES / kind / "golden.npz")
    image = resize_image(Image.open(CASES / kind / "a/b/c/img.png").convert("RGB"), (512, 512))
    np.testing.assert_array_equal(np.asarray(image).transpose(2, 0, 1), golden["image"])
    label = np.asarray(resize_label(Image.open(CASES / kind / "a/b/c/lab.png"), (512, 512)))
    ids = deliver_class_ids(label[..., 0]) if kind == "depth" else label
    np.testing.assert_array_equal(apply_label_map(ids, TASK_OF[kind].target_label_map), golden["label"][0])


def test_crop_is_cut_before_it_is_mirrored():
    array = np.arange(12).reshape(3, 4)
    assert apply_crop(array, Crop(False, 1, 1), 2).tolist() == [[5, 6], [9, 10]]
    assert apply_crop(array, Crop(True, 1, 1), 2).tolist() == [[6, 5], [10, 9]]


def test_crops_reach_every_border_and_flip_half_of_the_time():
    rng = random.Random(1)
    crops = [draw_crop(rng, (6, 8), 4) for _ in range(2000)]
    assert {crop.left for crop in crops} == {0, 1, 2, 3, 4} and {crop.top for crop in crops} == {0, 1, 2}
    assert 900 < sum(crop.flip for crop in crops) < 1100
    assert draw_crop(rng, (4, 4), 4)[1:] == (0, 0)


def test_fitting_images_are_not_resized():
    image = Image.new("RGB", (8, 6))
    assert resize_image(image, (6, 8)) is image and resize_label(image, (6, 8)) is image
    assert resize_image(image, (3, 8)).size == (8, 3)
