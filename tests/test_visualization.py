"""Colours, blends, grid geometry and the confusion-matrix plot, checked pixel by pixel."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from madm_utils.tasks import TASKS
from madm_utils.visualization import colorize, overlay, picture_grid, save_confusion_plot, training_grid

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


def test_rows_may_be_short_and_every_picture_has_its_caption():
    rows = [[flat((255, 0, 0))], [flat((0, 255, 0)), flat((0, 0, 255))]]
    plain = np.asarray(picture_grid(rows))
    assert (plain[6:46, 134:] == 255).all() and (plain[52:92, 140:268] == (0, 0, 255)).all()
    full = np.asarray(picture_grid(rows, cell_captions=[["one"], ["two", "three"]]))
    line = (full.shape[0] - plain.shape[0]) // 2  # of text above each row
    assert line > 10
    for k, top in enumerate((6, 6 + line + 46)):
        text = full[top : top + line] < 128
        assert text[:, 6:134].any() and text[:, 140:].any() == (k == 1)
        assert (full[top + line : top + line + 40, 6:134] == rows[k][0]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": []}, "at least one picture"),
        ({"rows": [[]]}, "at least one picture"),
        ({"captions": ["a", "b"]}, "got 2 captions for 1 columns"),
        ({"row_captions": ["a", "b"]}, "2 for 1 rows"),
        ({"cell_captions": [["a", "b"]]}, r"got captions for \[2\] pictures per row of \[1\]"),
    ],
)
def test_grid_refuses_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        picture_grid(**{"rows": [[flat(0)]], **arguments})


def pictures_of_a_step(side: int = 16) -> dict:
    """What a training pass hands on: every image and label of one colour, the second of the batch of another."""
    task = TASKS["synthetic_to_depth"]

    def image(value: float) -> torch.Tensor:
        return torch.stack([torch.full((3, side, side), value), torch.full((3, side, side), 0.11)])

    def label(class_id: int) -> torch.Tensor:
        return torch.stack([torch.full((side, side), class_id), torch.full((side, side), 9)])

    def logits(class_id: int) -> torch.Tensor:
        return torch.nn.functional.one_hot(label(class_id), task.num_classes).permute(0, 3, 1, 2).float()

    return {
        "source": image(0.2), "source_logits": logits(1), "source_label": label(2), "source_decoded": image(3.0),
        "source_palette": image(-0.5), "target": image(0.4), "pseudo_label": label(3), "mixed": image(0.6),
        "mixed_logits": logits(4), "mixed_label": label(255), "decoded": image(0.0), "mixed_palette": image(-1.0),
        "teacher_timestep": 57, "pseudo_label_weight": torch.full((2, side, side), 0.25),
    }  # fmt: skip


def cells(grid: Image.Image, columns: int, rows: int, width: int) -> list[list[tuple]]:
    """Colour of every cell that is filled with one; None of the others."""
    pixels, found = np.asarray(grid), []
    line = round(1.5 * max(11, min(24, width // 12)))
    for row in range(rows):
        top = 6 + (row + 1) * 2 * line + row * (width + 6)
        found.append([])
        for column in range(columns):
            left = 6 + column * (width + 6)
            cell = pixels[top : top + width, left : left + width].reshape(-1, 3)
            found[-1].append(tuple(map(int, cell[0])) if (cell == cell[0]).all() else None)
    return found


def test_training_grid_shows_each_picture_in_its_place():
    task, paper = TASKS["synthetic_to_depth"], (255, 255, 255)
    grid = training_grid(pictures_of_a_step(), task, cell_width=128)
    grey = {value: (round(255 * value),) * 3 for value in (0.2, 0.4, 0.6)}
    assert cells(grid, 7, 2, 128) == [
        [grey[0.2], task.palette[1], task.palette[2], (255,) * 3, (64,) * 3, paper, paper],
        [grey[0.4], task.palette[3], grey[0.6], task.palette[4], (0,) * 3, (128,) * 3, (0,) * 3],
    ]


def test_training_grid_shows_what_there_is():
    task, everything = TASKS["synthetic_to_depth"], pictures_of_a_step()
    source = {key: everything[key] for key in ("source", "source_logits", "source_label")}
    grid = training_grid(source, task, cell_width=128)
    assert grid.width == 3 * 128 + 4 * 6
    assert cells(grid, 3, 1, 128) == [[(51,) * 3, task.palette[1], task.palette[2]]]
    everything.pop("mixed_palette")
    assert training_grid(everything, task, cell_width=128).width == 6 * 128 + 7 * 6


def test_the_teacher_is_described_beside_its_row():
    """Another timestep or weight changes the text above the second row, and nothing else."""
    task, one = TASKS["synthetic_to_depth"], pictures_of_a_step()
    before = np.asarray(training_grid(one, task))
    for change in ({"teacher_timestep": 3}, {"pseudo_label_weight": torch.full((2, 16, 16), 0.75)}):
        after = np.asarray(training_grid(one | change, task))
        top = 6 + 2 * round(1.5 * 21) + 256 + 6
        rows = np.nonzero((before != after).any(axis=(1, 2)))[0]
        assert len(rows) and top <= rows.min() and rows.max() < top + round(1.5 * 21)


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
