"""Windows, augmented views and ensembles against slow references that keep everything at the size of the image."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from madm_utils import inference
from madm_utils.cli import UserError
from madm_utils.inference import InferenceSettings, Predictor, blending_weight, finite, resized_rows, window_starts

COLOURS = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 0, 9], [4, 4, 1]])


def by_pixel(images: torch.Tensor) -> torch.Tensor:
    """Logits that depend on a pixel's colour alone, whatever the window."""
    return torch.einsum("kc,bchw->bkhw", COLOURS, images)


def by_place(images: torch.Tensor) -> torch.Tensor:
    """Logits that also depend on the place in the input, as those of a real network do."""
    height, width = images.shape[-2:]
    slope = torch.linspace(-2, 2, width) * torch.linspace(-1, 1, height)[:, None]
    return by_pixel(images) + slope * torch.arange(4.0)[:, None, None]


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("size", [(64, 64), (130, 200), (64, 65), (30, 100), (7, 9), (200, 40)])
@pytest.mark.parametrize("stride", [None, 64, 17])
def test_windows_of_a_pixelwise_network_give_the_whole_image(size, stride):
    image = picture(*size)
    predict = Predictor([by_pixel], 64, "cpu", InferenceSettings(64, stride))
    [found] = predict([image], confidence=True, probabilities=True)
    expected = by_pixel(pixels(image))[0].softmax(0)
    torch.testing.assert_close(found.probabilities, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.confidence, expected.amax(0), atol=1e-6, rtol=0)
    assert found.label_map.dtype == torch.uint8 and found.label_map.shape == size
    assert (found.label_map == expected.argmax(0)).float().mean() > 0.999  # ties within rounding


def test_windows_are_blended_as_a_slow_reference_does():
    image = picture(150, 210)
    weight = blending_weight(64)
    total, weights = torch.zeros(4, 150, 210), torch.zeros(150, 210)
    for top in (0, 40, 80, 86):
        for left in (0, 40, 80, 120, 146):
            window = by_place(pixels(image)[..., top : top + 64, left : left + 64])[0].softmax(0)
            total[:, top : top + 64, left : left + 64] += weight * window
            weights[top : top + 64, left : left + 64] += weight
    [found] = Predictor([by_place], 64, "cpu", InferenceSettings(64, 40))([image], probabilities=True)
    torch.testing.assert_close(found.probabilities, total / weights, atol=1e-6, rtol=0)


def test_window_starts_by_hand():
    assert window_starts(64, 64, 48) == [0]
    assert window_starts(65, 64, 48) == [0, 1]
    assert window_starts(160, 64, 48) == [0, 48, 96]
    assert window_starts(161, 64, 48) == [0, 48, 96, 97]
    assert InferenceSettings(64).step() == 48 and InferenceSettings(64, 10).step() == 10


def test_blending_falls_off_smoothly_and_is_never_zero():
    weight = blending_weight(64)
    assert weight.min() > 0
    torch.testing.assert_close(weight, weight.flip(0))
    torch.testing.assert_close(weight, weight.T)
    middle = weight[32]
    assert (middle[1:33] >= middle[:32]).all() and middle[0] < 0.01 * middle[32]


def test_mirrored_views_and_scales_are_averaged():
    image = picture(100, 120)
    views = []
    for side in (192, 256, 320):
        inputs = pixels(image.resize((side, side), Image.Resampling.BILINEAR))
        for logits in (by_place(inputs), by_place(inputs.flip(-1)).flip(-1)):
            logits = F.interpolate(logits, size=(100, 120), mode="bilinear", align_corners=False)
            views.append(logits[0].softmax(0))
    settings = InferenceSettings.named(tta=("flip", "scales"))
    assert settings.input_sides(256) == [192, 256, 320]
    assert settings.input_sides(128) == [128, 192]  # 96 and 160 are rounded up
    [found] = Predictor([by_place], 256, "cpu", settings)([image], probabilities=True)
    torch.testing.assert_close(found.probabilities, torch.stack(views).mean(0), atol=1e-5, rtol=0)


def test_an_ensemble_averages_probabilities():
    image = picture(40, 50)
    predict = Predictor([by_pixel, lambda images: 3 * by_place(images)], 64, "cpu")
    [found] = predict([image], probabilities=True)
    alone = [
        Predictor([forward], 64, "cpu")([image], probabilities=True)[0].probabilities for forward in predict.forwards
    ]
    torch.testing.assert_close(found.probabilities, (alone[0] + alone[1]) / 2)


@pytest.mark.parametrize("size", [(64, 64), (64, 100), (100, 64), (33, 47), (1, 1), (500, 20)])
def test_rows_are_those_of_the_whole_interpolation(size):
    logits = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]
    # torch finds its source rows in float32, hence the tolerance
    torch.testing.assert_close(resized_rows(logits, size, 0, size[0]), expected, atol=5e-5, rtol=0)
    first = size[0] // 3
    assert torch.equal(resized_rows(logits, size, first, size[0]), resized_rows(logits, size, 0, size[0])[:, first:])
    assert size != (64, 64) or torch.equal(expected, logits)


def test_bands_do_not_show(monkeypatch):
    images = [picture(90, 70), picture(50, 64)]
    whole = Predictor([by_place], 64, "cpu")(images, confidence=True)
    monkeypatch.setattr(inference, "_BAND", 1000)
    for one, other in zip(whole, Predictor([by_place], 64, "cpu")(images, confidence=True), strict=True):
        assert torch.equal(one.label_map, other.label_map)
        torch.testing.assert_close(one.confidence, other.confidence)


def test_full_precision_runs_one_at_a_time_and_reduced_precision_in_batches():
    seen = []

    def forward(images):
        seen.append(len(images))
        return by_pixel(images)

    images = [picture(20, 30, k) for k in range(5)]
    predict = Predictor([forward], 64, "cpu", batch_size=2)
    predict(images)
    assert seen == [1] * 5
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        predict(images)
    Predictor([forward], 64, "cpu", batch_size=4, dtype=torch.bfloat16)(images)
    assert seen == [2, 2, 1, 4, 1]
    seen.clear()
    Predictor([forward], 64, "cpu", InferenceSettings(64), 3, torch.bfloat16)([picture(64, 200)])
    assert seen == [3, 1]  # windows from 0, 48, 96 and 136


def test_sizes_other_than_the_image_are_met_in_both_ways():
    image = picture(80, 100)
    for settings in (InferenceSettings(), InferenceSettings(64)):
        shares = []
        [found] = Predictor([by_pixel], 64, "cpu", settings)([image], sizes=[(160, 90)], progress=shares.append)
        assert found.label_map.shape == (160, 90) and found.confidence is None and found.probabilities is None
        assert sum(shares) == pytest.approx(1)


def test_memory_follows_the_window_not_the_image():
    """20 scores of 2.4 million pixels alone would be 192 MB."""
    code = """
import resource, torch
from PIL import Image
from madm_utils.inference import InferenceSettings, Predictor
forward = lambda images: images[:, :1] * torch.arange(20.)[:, None, None]
torch.set_num_threads(1)
both = [Predictor([forward], 64, "cpu", s) for s in (InferenceSettings(), InferenceSettings(128, 128))]
for predict in both:
    predict([Image.new("RGB", (256, 256))])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for predict in both:
    [found] = predict([Image.new("RGB", (800, 3000))], confidence=True)
    assert found.label_map.shape == (3000, 800)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # image 7 MB (as PIL and as array), labels 2, confidence 10; the rest are scores
    assert all(int(grown) < 140 for grown in run.stdout.split()), run.stdout


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 100}, "multiple of 64 pixels, got 100"),
        ({"window": 0}, "multiple of 64 pixels, got 0"),
        ({"stride": 32}, "stride of 32 means nothing without a window"),
        ({"window": 64, "stride": 65}, "stride must be from 1 to the window of 64 pixels, got 65"),
        ({"tta": ("turn",)}, "knows flip and scales, got 'turn'"),
    ],
)
def test_settings_that_do_not_work_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        InferenceSettings.named(**settings)


def test_nan_is_not_taken_for_a_prediction():
    with pytest.raises(UserError, match="not finite.*bf16"):
        finite(torch.tensor([0.0, float("nan")]))
    with pytest.raises(UserError, match="not finite"):
        Predictor([lambda images: by_pixel(images) / 0], 64, "cpu")([picture(9, 9)])
