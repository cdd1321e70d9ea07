"""Colours, blends, grid geometry and the confusion-matrix plot, checked pixel by pixel."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from madm_utils.visualization import colorize, overlay, picture_grid, save_confusion_plot

PALETTE = [(10, 20, 30), (200, 0, 50)]


def flat(color, height=40, width=128):
    return np.full((height, width, 3), color, np.uint8)


def test_colorize_paints_classes_and_leaves_the_rest_black():
    label = np.array([[0, 1], [255, 7]], np.uint8)
    expected = [[[10, 20, 30], [200, 0, 50]], [[0, 0, 0], [0, 0, 0]]]
    result = colorize(label, PALETTE)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, expected)


def test_overlay_by_hand():
    image, color = flat((100, 200, 255), 1, 1), flat((0, 255, 255), 1, 1)
    np.testing.assert_array_equal(overlay(image, color, 0.25)[0, 0], [75, 214, 255])
    np.testing.assert_array_equal(overlay(image, color, 0.0), image)
    np.testing.assert_array_equal(overlay(image, color, 1.0), color)


def test_grid_places_every_picture():
    colors = [[(255, 0, 0), (0, 255, 0), (0, 0, 255)], [(255, 255, 0), (0, 255, 255), (255, 0, 255)]]
    grid = np.asarray(picture_grid([[flat(color) for color in row] for row in colors]))
    assert grid.shape == (2 * 40 + 3 * 6, 3 * 128 + 4 * 6, 3)
    for r, row in enumerate(colors):
        for c, color in enumerate(row):
            y, x = 6 + r * 46, 6 + c * 134
            assert (grid[y : y + 40, x : x + 128] == color).all()
    assert (grid[:6] == 255).all() and (grid[:, :6] == 255).all()


def test_grid_scales_to_one_width_without_new_colors():
    label = colorize(np.arange(32, dtype=np.uint8).reshape(4, 8) % 2, PALETTE)
    grid = np.asarray(picture_grid([[flat((0, 0, 0)), label]]))
    cell = grid[6:70, 140:268]  # 8 x 4 pixels become 128 x 64
    assert {tuple(c) for c in cell.reshape(-1, 3)} == {tuple(c) for c in PALETTE}


def test_grid_takes_single_channel_pictures_of_any_height():
    grid = picture_grid([[np.full((10, 128), 77, np.uint8)], [np.full((50, 128), 99, np.uint8)]])
    pixels = np.asarray(grid)
    assert pixels.shape[0] == 10 + 50 + 3 * 6
    assert tuple(pixels[10, 50]) == (77, 77, 77) and tuple(pixels[40, 50]) == (99, 99, 99)


def test_captions_and_legend_are_drawn_and_nothing_is_lost_at_the_edge():
    pictures = [[flat((9, 9, 9)), flat((9, 9, 9))]]
    plain = picture_grid(pictures)
    legend = {f"a rather long class name {k}": (k, 255 - k, 7) for k in range(9)}
    full = picture_grid(pictures, ["input", "a caption far too long for such a narrow column"], ["x" * 400], legend)
    assert full.width == plain.width and full.height > plain.height + 9 * 10
    pixels = np.asarray(full)
    for color in legend.values():
        assert (pixels == color).all(axis=2).sum() > 50
    assert (pixels[:, -6:] == 255).all()  # no text runs over the right margin


@pytest.mark.parametrize(
    "arguments",
    [{"rows": []}, {"rows": [[flat(0)], []]}, {"captions": ["a", "b"]}, {"row_captions": ["a", "b"]}],
)
def test_grid_refuses_what_does_not_fit(arguments):
    with pytest.raises(ValueError, match="rows of one length|captions for"):
        picture_grid(**{"rows": [[flat(0)]], **arguments})


def test_confusion_plot_is_normalised_by_label(tmp_path):
    # Class "b" has no labelled pixels; half of "a" is predicted as "b".
    save_confusion_plot(np.array([[1, 0, 5], [1, 0, 0], [0, 0, 0]]), ["a", "b"], tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as plot:
        pixels = np.asarray(plot.convert("RGB"))
    from matplotlib import colormaps

    half = np.round(255 * np.array(colormaps["Blues"](0.5)[:3]))
    grey = np.array([224, 224, 224])
    for color in (half, grey):
        area = (np.abs(pixels - color).max(axis=2) <= 2).sum()
        assert area > 0.1 * pixels.shape[0] * pixels.shape[1]


def test_import_is_quick_and_silent():
    code = (
        "import sys, madm_utils, madm_utils.visualization\n"
        "print(madm_utils.__version__, sorted({'torch', 'diffusers', 'matplotlib', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("0.1.0 []\n", "")
