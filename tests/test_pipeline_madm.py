"""`MADMPipeline` on every kind of image, against the model called by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import RESOLUTION, write_model

from madm_utils import MADMPipeline
from madm_utils.cli import UserError
from madm_utils.pipeline_madm import finite, read_image, resize_logits
from madm_utils.tasks import TASKS

COMMON = Path(__file__).parent / "fixtures" / "common" / "dataset_case"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipe(folder):
    return MADMPipeline.from_pretrained(folder)


def random_pixels(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def test_label_map_equals_the_model_called_by_hand(pipe):
    pixels = random_pixels(50, 90, 3)
    small = np.asarray(Image.fromarray(pixels).resize((RESOLUTION, RESOLUTION), Image.Resampling.BILINEAR))
    images = torch.from_numpy(small.transpose(2, 0, 1).copy())[None].float() / 255
    with torch.no_grad():
        logits = pipe.model(images).logits
    logits = torch.nn.functional.interpolate(logits, size=(50, 90), mode="bilinear", align_corners=False)[0]

    output = pipe(pixels, return_confidence=True)
    assert output.label_maps[0].dtype == np.uint8 and output.label_maps[0].shape == (50, 90)
    np.testing.assert_array_equal(output.label_maps[0], logits.argmax(0).numpy())
    assert len(np.unique(output.label_maps[0])) > 1
    np.testing.assert_allclose(output.confidence[0], logits.softmax(0).max(0).values.numpy(), atol=1e-6)
    assert pipe(pixels).confidence is None


def test_one_or_many_paths_arrays_and_pictures_agree(pipe, tmp_path):
    pixels = random_pixels(40, 70, 3)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "image.png")
    alone = pipe(image).label_maps
    assert len(alone) == 1
    for label_map in pipe([pixels, tmp_path / "image.png", str(tmp_path / "image.png")]).label_maps:
        np.testing.assert_array_equal(label_map, alone[0])
    assert pipe([]).label_maps == []


def test_batches_keep_order_and_sizes(pipe):
    images = [random_pixels(20 + 30 * k, 100 - 10 * k, 3) for k in range(5)]
    together = pipe(images, batch_size=2).label_maps
    for image, label_map in zip(images, together, strict=True):
        assert label_map.shape == image.shape[:2]
        assert (label_map == pipe(image).label_maps[0]).mean() > 0.999  # rounding depends on the batch


def test_single_channel_is_repeated_and_alpha_dropped():
    gray, rgba = random_pixels(6, 5), random_pixels(6, 5, 4)
    for image in (gray, gray[..., None], Image.fromarray(gray)):
        np.testing.assert_array_equal(np.asarray(read_image(image)), np.repeat(gray[..., None], 3, axis=2))
    for image in (rgba, Image.fromarray(rgba)):
        np.testing.assert_array_equal(np.asarray(read_image(image)), rgba[..., :3])


def test_16_bits_are_scaled_linearly(tmp_path):
    values = np.array([[0, 128, 129, 257, 32896, 65535]], np.uint16)
    expected = [0, 0, 1, 1, 128, 255]  # round(value / 257)
    Image.fromarray(values).save(tmp_path / "depth.png")
    for image in (values, tmp_path / "depth.png", Image.fromarray(values.astype(np.int32))):
        result = np.asarray(read_image(image))
        assert result.shape == (1, 6, 3)
        np.testing.assert_array_equal(result[0, :, 0], expected)


def test_a_rotated_photo_keeps_its_stored_pixels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by a quarter turn
    Image.fromarray(random_pixels(10, 20, 3)).save(tmp_path / "photo.jpg", exif=exif)
    assert read_image(tmp_path / "photo.jpg").size == (20, 10)


@pytest.mark.parametrize("kind", ["depth", "infrared", "event"])
def test_preprocessing_equals_published(pipe, monkeypatch, kind):
    monkeypatch.setattr(pipe.model, "resolution", 512)
    images = pipe.preprocess([read_image(COMMON / kind / "a/b/c/img.png")])
    golden = np.load(COMMON / kind / "golden.npz")["image"]
    assert images.is_contiguous() and images.dtype == torch.float32
    assert np.abs(255 * images[0].numpy() - golden).max() <= 1 + 1e-4


def test_classes_weights_and_dtype(pipe, folder):
    task = TASKS["synthetic_to_depth"]
    assert (pipe.class_names, pipe.palette) == (task.class_names, task.palette)
    pixels = random_pixels(64, 64, 3)
    student = pipe(pixels).label_maps[0]
    teacher = MADMPipeline.from_pretrained(folder, weights="teacher", device="cpu")
    assert (teacher(pixels).label_maps[0] != student).any()
    half = MADMPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    assert next(half.model.parameters()).dtype == torch.bfloat16
    assert (half(pixels).label_maps[0] == student).mean() > 0.5


def test_lora_folder_predicts_too(tmp_path):
    pipe = MADMPipeline.from_pretrained(write_model(tmp_path, unet_tuning="lora"))
    assert pipe(random_pixels(30, 40, 3)).label_maps[0].shape == (30, 40)


def test_equal_size_leaves_logits_alone():
    logits = torch.randn(3, 16, 16)
    assert torch.equal(resize_logits(logits, (16, 16)), logits)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (random_pixels(4, 4, 2), r"uint8 and shape \(4, 4, 2\); expected uint8 or uint16"),
        (np.zeros((4, 4, 3), np.float32), r"dtype float32"),
        (np.zeros(7, np.uint8), r"shape \(7,\)"),
        (Image.fromarray(np.zeros((4, 4), np.float32)), "floating-point pixels"),
        (Image.fromarray(np.full((4, 4), 70000, np.int32)), r"32-bit pixels 70000\.\.70000"),
        ("nowhere.png", "nowhere.png: no such file"),
        (__file__, "cannot be read as an image"),
    ],
)
def test_unusable_images_are_named(image, message):
    with pytest.raises(UserError, match=message):
        read_image(image)


def test_nan_is_not_taken_for_a_prediction():
    with pytest.raises(UserError, match="not finite.*bf16"):
        finite(torch.tensor([0.0, float("nan")]))
