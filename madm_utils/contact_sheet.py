"""Contact sheets: some pictures of a split beside their labels, because people look; and a colour for every class."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from madm_utils.label_spaces import IGNORE_INDEX, STREET_PALETTE
from madm_utils.visualization import Palette, colorize, overlay, picture_grid

SHEET_WIDTH = 1200
"""Pixels; a sheet is never wider."""
LABELLED_SAMPLES, UNLABELLED_SAMPLES = 6, 16
_UNLABELLED_COLUMNS = 4
_MAX_ASPECT = 1.5
"""Height of a cell over its width; a taller picture is shown smaller, between margins."""
_MARGIN = 6
_PAPER = (255, 255, 255)
_OUTSIDE = (255, 255, 255)
"""Colour of ids that no class has."""
_TITLE_SIZE, _VERDICT_SIZE = 28, 22

CITYSCAPES_PALETTE = {
    "road": (128, 64, 128), "sidewalk": (244, 35, 232), "building": (70, 70, 70), "wall": (102, 102, 156),
    "fence": (190, 153, 153), "pole": (153, 153, 153), "traffic light": (250, 170, 30), "traffic sign": (220, 220, 0),
    "vegetation": (107, 142, 35), "terrain": (152, 251, 152), "sky": (70, 130, 180), "person": (220, 20, 60),
    "rider": (255, 0, 0), "car": (0, 0, 142), "truck": (0, 0, 70), "bus": (0, 60, 100), "train": (0, 80, 100),
    "motorcycle": (0, 0, 230), "bicycle": (119, 11, 32),
}  # fmt: skip
"""Class name -> RGB, the owners' colours (cityscapesScripts, `helpers/labels.py`)."""
_SAME_CLASS = {"pedestrian": "person"}


@dataclass(frozen=True)
class Sample:
    """One image of a contact sheet, already at the width of its cell."""

    file_name: str
    image: np.ndarray
    """uint8 (h, w, 3)."""
    label: np.ndarray | None = None
    """uint8 (h, w) class ids."""
    events: np.ndarray | None = None
    """uint8 (h, w, 3): darker where negative events outweigh, brighter where positive ones do."""


def class_palette(class_names: Sequence[str]) -> tuple[tuple[int, int, int], ...]:
    """One RGB colour per class, all different, none near black or white; equal names give equal colours.

    The shared street classes have the colours of the built-in tasks, other names that Cityscapes has (in any case,
    singular or plural) those of Cityscapes. Each further class gets the colour farthest from all before it.
    """
    known = STREET_PALETTE if set(class_names) <= set(STREET_PALETTE) else CITYSCAPES_PALETTE
    by_name = {_plain(name): color for name, color in known.items()}
    wanted = [by_name.get(_plain(name)) for name in class_names]
    chosen: list[tuple[int, int, int] | None] = [
        color if color not in wanted[:k] else None for k, color in enumerate(wanted)
    ]
    levels = np.linspace(0, 255, 9).astype(int)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    taken = [(0, 0, 0), _OUTSIDE, *(color for color in chosen if color)]
    distance = np.min([_distance(candidates, color) for color in taken], axis=0)
    for k, color in enumerate(chosen):
        if color is None:
            best = int(distance.argmax())
            chosen[k] = tuple(int(value) for value in candidates[best])
            distance = np.minimum(distance, _distance(candidates, chosen[k]))
    return tuple(chosen)


def _plain(name: str) -> str:
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return _SAME_CLASS.get(plain, plain).rstrip("s")


def _distance(colors: np.ndarray, color: Sequence[int]) -> np.ndarray:
    """How different `colors` (N, 3) look from `color`: "redmean", a weighted RGB distance close to perception."""
    red = (colors[:, 0] + color[0]) / 2
    weights = np.stack([2 + red / 256, np.full_like(red, 4), 2 + (255 - red) / 256], axis=1)
    return (weights * (colors - np.asarray(color)) ** 2).sum(axis=1)


def make_sample(
    file_name: str, image: Image.Image, label: Image.Image | None = None, events: Image.Image | None = None
) -> Sample:
    """Shrink what was decoded to the size in which a sheet shows it.

    Args:
        file_name: written above the picture.
        image: 8-bit grey or RGB.
        label: 8-bit class ids, of any size.
        events: mode F, one or more (height of `image`, width) bins below each other.
    """
    width = _cell_width(_UNLABELLED_COLUMNS if label is None else 3 + (events is not None))
    return Sample(
        file_name,
        _fitted(image.convert("RGB"), width, _PAPER, Image.Resampling.LANCZOS),
        None if label is None else _fitted(label, width, IGNORE_INDEX, Image.Resampling.NEAREST),
        None if events is None else _fitted(_shown_events(events, image.height), width, _PAPER, Image.Resampling.BOX),
    )


def _cell_width(columns: int) -> int:
    return (SHEET_WIDTH - _MARGIN) // columns - _MARGIN


def _fitted(image: Image.Image, width: int, margin: int | tuple[int, ...], resampling: Image.Resampling) -> np.ndarray:
    """Scale to `width`, or to the height a cell may have, then with margins at the sides."""
    scale = min(width / image.width, _MAX_ASPECT * width / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    scaled = image.resize(size, resampling)
    if size[0] == width:
        return np.asarray(scaled)
    cell = Image.new(image.mode, (width, size[1]), margin)
    cell.paste(scaled, ((width - size[0]) // 2, 0))
    return np.asarray(cell)


def _shown_events(events: Image.Image, height: int) -> Image.Image:
    values = np.nan_to_num(np.asarray(events, np.float32), posinf=0, neginf=0)
    bins = values.reshape(-1, height, values.shape[1]) if values.shape[0] % height == 0 else values[None]
    total = bins.sum(axis=0)
    largest = np.abs(total).max() or 1.0
    return Image.fromarray(np.round(127.5 + 127.5 * total / largest).astype(np.uint8)).convert("RGB")


def contact_sheet(
    samples: Sequence[Sample],
    title: str,
    verdict: str = "",
    class_names: Sequence[str] = (),
    class_shares: Sequence[float] | None = None,
) -> Image.Image:
    """Draw `samples`: a row of image, label in class colours and overlay each; without labels, four images a row.

    Args:
        samples: what `make_sample` returned, all with labels or all without.
        title: first line of the sheet.
        verdict: second line, red where it is not empty.
        class_names: by class id; the legend below the pictures.
        class_shares: of each class in the labelled pixels of the whole split, 0..1; added to the legend.
    """
    width = samples[0].image.shape[1]
    if samples[0].label is None:
        cells = [(sample.image, sample.file_name) for sample in samples]
        if samples[0].events is not None:
            cells = [
                cell for sample, cell in zip(samples, cells, strict=True) for cell in (cell, (sample.events, "events"))
            ]
        rows = [cells[start : start + _UNLABELLED_COLUMNS] for start in range(0, len(cells), _UNLABELLED_COLUMNS)]
        pictures, names = ([[cell[k] for cell in row] for row in rows] for k in (0, 1))
        grid = picture_grid(pictures, cell_width=width, cell_captions=names)
    else:
        palette = class_palette(class_names)
        pictures = [_row(sample, palette) for sample in samples]
        captions = ("image", *(["events"] if samples[0].events is not None else []), "label", "overlay")
        legend = _legend(samples, class_names, class_shares)
        grid = picture_grid(pictures, captions, [sample.file_name for sample in samples], legend, width)
    return _with_header(grid, title, verdict)


def _row(sample: Sample, palette: Palette) -> list[np.ndarray]:
    events = [] if sample.events is None else [sample.events]
    color = _colored(sample.label, palette)
    # Where nothing is labelled, the overlay shows the image as it is instead of a darker one.
    blended = np.where((sample.label == IGNORE_INDEX)[..., None], sample.image, overlay(sample.image, color))
    return [sample.image, *events, color, blended]


def _outside(label: np.ndarray, num_classes: int) -> np.ndarray:
    """Where `label` holds an id that is neither a class nor ignored."""
    return (label >= num_classes) & (label != IGNORE_INDEX)


def _colored(label: np.ndarray, palette: Palette) -> np.ndarray:
    color = colorize(label, palette)
    color[_outside(label, len(palette))] = _OUTSIDE
    return color


def _legend(
    samples: Sequence[Sample], class_names: Sequence[str], class_shares: Sequence[float] | None
) -> dict[str, Sequence[int]]:
    legend = {}
    for class_id, (name, color) in enumerate(zip(class_names, class_palette(class_names), strict=True)):
        share = ""
        if class_shares is not None:
            share = f"  {100 * class_shares[class_id]:.2f} %" if class_shares[class_id] else "  absent"
        legend[f"{class_id} {name}{share}"] = color
    legend["not labelled"] = (0, 0, 0)
    if any(_outside(sample.label, len(class_names)).any() for sample in samples):
        legend["outside the map"] = _OUTSIDE
    return legend


def _with_header(grid: Image.Image, title: str, verdict: str) -> Image.Image:
    """Put one or two lines of text above `grid`, and paper below it."""
    lines = [(title, _TITLE_SIZE, (20, 20, 20)), *([(verdict, _VERDICT_SIZE, (190, 0, 0))] if verdict else [])]
    height = _MARGIN + sum(round(1.5 * size) for _, size, _ in lines)
    sheet = Image.new("RGB", (grid.width, height + grid.height + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for text, size, color in lines:
        draw.text((_MARGIN, top), text, color, ImageFont.load_default(size))
        top += round(1.5 * size)
    sheet.paste(grid, (0, height))
    return sheet
