"""Every form in which users hand over pictures, against the 8-bit RGB that has to come out."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from madm_utils.cli import UserError
from madm_utils.images import read_image, split_images


def random_pixels(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def test_single_channel_is_repeated_and_alpha_dropped():
    gray, rgba = random_pixels(6, 5), random_pixels(6, 5, 4)
    for image in (gray, gray[..., None], Image.fromarray(gray), torch.from_numpy(gray), torch.from_numpy(gray[None])):
        np.testing.assert_array_equal(np.asarray(read_image(image)), np.repeat(gray[..., None], 3, axis=2))
    for image in (rgba, Image.fromarray(rgba), torch.from_numpy(rgba.transpose(2, 0, 1))):
        np.testing.assert_array_equal(np.asarray(read_image(image)), rgba[..., :3])


def test_16_bits_are_scaled_linearly(tmp_path):
    values = np.array([[0, 128, 129, 257, 32896, 65535]], np.uint16)
    expected = [0, 0, 1, 1, 128, 255]  # round(value / 257)
    Image.fromarray(values).save(tmp_path / "depth.png")
    tensor = torch.from_numpy(values)
    for image in (values, tensor, tmp_path / "depth.png", Image.fromarray(values.astype(np.int32))):
        result = np.asarray(read_image(image))
        assert result.shape == (1, 6, 3)
        np.testing.assert_array_equal(result[0, :, 0], expected)


def test_floating_point_from_0_to_1_is_scaled_to_8_bits(tmp_path):
    values = np.array([[0.0, 0.25, 1.0]], np.float32)  # 0.25 * 255 = 63.75
    Image.fromarray(values).save(tmp_path / "depth.tiff")
    tensor = torch.from_numpy(values)
    for image in (values, values.astype(np.float64), tensor, tensor.bfloat16(), tmp_path / "depth.tiff"):
        np.testing.assert_array_equal(np.asarray(read_image(image))[0, :, 0], [0, 64, 255])


def test_a_rotated_photo_keeps_its_stored_pixels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by a quarter turn
    Image.fromarray(random_pixels(10, 20, 3)).save(tmp_path / "photo.jpg", exif=exif)
    assert read_image(tmp_path / "photo.jpg").size == (20, 10)


def test_large_images_are_read_without_a_warning_and_larger_ones_refused(tmp_path, monkeypatch):
    Image.new("L", (40, 30)).save(tmp_path / "large.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        assert read_image(tmp_path / "large.png").size == (40, 30)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
        with pytest.raises(UserError, match=r"large\.png: cannot be read.*1200 pixels"):
            read_image(tmp_path / "large.png")


def test_batches_are_split_into_images():
    assert [part.shape for part in split_images(np.zeros((2, 5, 4, 3)))] == [(5, 4, 3)] * 2
    assert [part.shape for part in split_images(torch.zeros(2, 3, 5, 4))] == [(3, 5, 4)] * 2
    assert [part.shape for part in split_images(np.zeros((5, 4, 3)))] == [(5, 4, 3)]
    assert split_images("a.png") == ["a.png"] and split_images(("a.png", Path("b"))) == ["a.png", Path("b")]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (random_pixels(4, 4, 2), r"uint8 and shape \(4, 4, 2\); expected uint8, uint16 or floating point"),
        (np.zeros((4, 4, 3), np.int64), "dtype int64"),
        (np.zeros(7, np.uint8), r"shape \(7,\)"),
        (np.zeros((0, 4), np.uint8), r"shape \(0, 4\)"),
        (torch.zeros(5, 4, 3, dtype=torch.uint8), r"image tensor has dtype uint8 and shape \(5, 4, 3\)"),
        (np.array([[0.5, np.nan, np.inf]], np.float32), "image array: 2 values are not finite"),
        (np.array([[0.0, 80.5]], np.float32), r"from 0 to 80\.5, whose scale is not known"),
        (Image.fromarray(np.full((4, 4), -3, np.float32)), "image: floating-point values from -3 to -3"),
        (Image.fromarray(np.full((4, 4), 70000, np.int32)), r"32-bit pixels 70000\.\.70000"),
        ("nowhere.png", "nowhere.png: no such file"),
        (__file__, "cannot be read as an image"),
    ],
)
def test_unusable_images_are_named(image, message):
    with pytest.raises(UserError, match=message):
        read_image(image)


def test_damaged_files_are_named(tmp_path):
    Image.fromarray(random_pixels(30, 30, 3)).save(tmp_path / "good.png")
    data = (tmp_path / "good.png").read_bytes()
    for content in (b"", data[: len(data) // 2]):
        (tmp_path / "bad.png").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.png: cannot be read as an image"):
            read_image(tmp_path / "bad.png")
