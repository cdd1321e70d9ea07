"""Resize, crop and flip; equality with the published loader is in `test_reference_parity.py`."""

import random

import numpy as np
from PIL import Image

from madm_utils.transforms import Crop, apply_crop, draw_crop, resize_image, resize_label


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
