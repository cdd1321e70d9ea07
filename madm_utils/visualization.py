"""Pictures for people: coloured labels, overlays, captioned grids with a class legend, confusion-matrix plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from madm_utils.tasks import Task

if TYPE_CHECKING:
    from torch import Tensor

Palette = Sequence[Sequence[int]]

_MARGIN = 6
_INK, _PAPER = (20, 20, 20), (255, 255, 255)


def colorize(label: np.ndarray, palette: Palette) -> np.ndarray:
    """Colour class ids: (H, W) uint8 -> (H, W, 3) uint8. 255 (ignore) and every id without a colour are black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    return table[label]


def overlay(image: np.ndarray, color: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """Blend a colour label over its image, both (H, W, 3) uint8; `alpha` in [0, 1] is the share of the colour."""
    blend = (1.0 - alpha) * image + alpha * color.astype(np.float32)
    return np.round(blend).astype(np.uint8)


def picture_grid(
    rows: Sequence[Sequence[np.ndarray]],
    captions: Sequence[str] = (),
    row_captions: Sequence[str] = (),
    legend: Mapping[str, Sequence[int]] | None = None,
    cell_width: int | None = None,
    cell_captions: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """Arrange pictures in a grid on white paper.

    Args:
        rows: pictures per row, uint8 (H, W, 3) or (H, W), all scaled to one width; a shorter row ends in paper.
        captions: one text above each column.
        row_captions: one text above each row.
        legend: class name -> RGB, drawn below the grid in as many lines as it needs.
        cell_width: width of every picture in pixels; default: that of the first picture, at least 128. Pictures
            keep their aspect ratio and are scaled without inventing colours (nearest).
        cell_captions: one text above each picture, in the form of `rows`.

    Raises:
        ValueError: no pictures, or a wrong number of captions.
    """
    columns = _check_grid(rows, captions, row_captions, cell_captions)
    width = cell_width or max(128, next(row[0] for row in rows if len(row)).shape[1])
    cells = [[_scaled(picture, width) for picture in row] for row in rows]
    font = ImageFont.load_default(size=max(11, min(24, width // 12)))
    line = round(1.5 * font.size)
    text_height = (bool(row_captions) + bool(cell_captions)) * line
    heights = [max((cell.height for cell in row), default=0) + text_height for row in cells]
    grid_width = columns * width + (columns + 1) * _MARGIN
    top = _MARGIN + (line if captions else 0)
    items = _legend_lines(legend or {}, font, grid_width)
    total = top + sum(heights) + len(rows) * _MARGIN + len(items) * line
    canvas = Image.new("RGB", (grid_width, total), _PAPER)
    draw = ImageDraw.Draw(canvas)
    lefts = [_MARGIN + k * (width + _MARGIN) for k in range(columns)]

    def write_above(texts: Sequence[str], y: int) -> None:
        for left, text in zip(lefts, texts, strict=False):
            draw.text((left + width / 2, y - line / 2), _fitted(text, font, width), _INK, font, anchor="mm")

    write_above(captions, top)
    for k, row in enumerate(cells):
        y = top + sum(heights[:k]) + k * _MARGIN
        if row_captions:
            text = _fitted(row_captions[k], font, grid_width - 2 * _MARGIN)
            draw.text((_MARGIN, y + line / 2), text, _INK, font, anchor="lm")
            y += line
        if cell_captions:
            y += line
            write_above(cell_captions[k], y)
        for left, cell in zip(lefts, row, strict=False):
            canvas.paste(cell, (left, y))
    _draw_legend(draw, items, font, total - len(items) * line, line)
    return canvas


def _check_grid(
    rows: Sequence[Sequence], captions: Sequence, row_captions: Sequence, cell_captions: Sequence[Sequence]
) -> int:
    """Number of columns; raises `ValueError` where the arguments of `picture_grid` do not go together."""
    sizes = [len(row) for row in rows]
    columns = max(sizes, default=0)
    if not columns:
        raise ValueError("a grid needs at least one picture")
    if captions and len(captions) != columns or row_captions and len(row_captions) != len(rows):
        raise ValueError(
            f"got {len(captions)} captions for {columns} columns and {len(row_captions)} for {len(rows)} rows"
        )
    if cell_captions and [len(row) for row in cell_captions] != sizes:
        raise ValueError(f"got captions for {[len(row) for row in cell_captions]} pictures per row of {sizes}")
    return columns


# Rows of `training_grid`: key in the pictures of a training pass -> caption.
_SOURCE_ROW = {
    "source": "source image",
    "source_logits": "prediction",
    "source_label": "label",
    "source_decoded": "decoded label latent",
    "source_palette": "palette image (LPLR)",
}
_TARGET_ROW = {
    "target": "target image",
    "pseudo_label": "teacher label",
    "mixed": "mixed image",
    "mixed_logits": "prediction",
    "mixed_label": "mixed label",
    "decoded": "decoded label latent",
    "mixed_palette": "palette image (LPLR)",
}


def training_grid(pictures: Mapping[str, "Tensor | int"], task: Task, cell_width: int = 256) -> Image.Image:
    """Show what went into the first pair of a training batch and what came out, MADM's parts at work.

    First row: source image, prediction, label. Second row: target image, the teacher's label of it, and the
    mixed image with prediction and label. Both end with the label latent, decoded, and the palette image whose latent
    it regresses to (LPLR). What is absent is left out.

    Args:
        pictures: tensors of a batch; images `source`, `target`, `mixed` (B, 3, H, W) in [0, 1]; in [-1, 1] the decoded
            label latents `source_decoded`, `decoded` and palette images `source_palette`, `mixed_palette`; class ids
            `source_label`, `pseudo_label`, `mixed_label` (B, H, W); logits `source_logits`, `mixed_logits`
            (B, K, H, W). `teacher_timestep`, an int, and the mean of `pseudo_label_weight` (B, H, W) are written
            beside them. Other keys are not shown.
        task: gives the colours.
        cell_width: of one picture in pixels.
    """
    titles = (f"source: {task.source}", f"target: {task.target}{_teacher_caption(pictures)}")
    rows, captions, row_captions = [], [], []
    for row, title in zip((_SOURCE_ROW, _TARGET_ROW), titles, strict=True):
        there = [key for key in row if key in pictures]
        if there:
            rows.append([_shown(key, pictures[key][0], task.palette) for key in there])
            captions.append([row[key] for key in there])
            row_captions.append(title)
    legend = dict(zip(task.class_names, task.palette, strict=True)) | {"not labelled": (0, 0, 0)}
    return picture_grid(rows, (), row_captions, legend, cell_width, captions)


def _teacher_caption(pictures: Mapping[str, "Tensor | int"]) -> str:
    """How noisy the teacher's input was and how much its label of the first image counts."""
    text = ""
    if "teacher_timestep" in pictures:
        timestep = pictures["teacher_timestep"]
        text += f"; teacher at diffusion step {timestep}{' (DPLG)' if timestep else ''}"
    if "pseudo_label_weight" in pictures:
        text += f"; pseudo-label weight {float(pictures['pseudo_label_weight'][0].mean()):.3f}"
    return text


def _shown(key: str, value: "Tensor", palette: Palette) -> np.ndarray:
    """One entry of the pictures of a training pass as uint8 (H, W, 3)."""
    if key.endswith("_logits"):
        value = value.argmax(0)
    if value.ndim == 2:
        return colorize(value.cpu().numpy().astype(np.uint8), palette)
    value = value.float()
    if "decoded" in key or "palette" in key:
        value = value / 2 + 0.5
    return (value.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def _scaled(picture: np.ndarray, width: int) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(picture)).convert("RGB")
    if image.width == width:
        return image
    # Enlarging or shrinking a label by interpolation would show colours of classes that are not there.
    return image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.NEAREST)


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """`text`, cut in its middle where it is wider than `width` pixels."""
    kept = len(text)
    fitted = text
    while font.getlength(fitted) > width and kept > 2:
        kept -= 1
        fitted = f"{text[: (kept + 1) // 2]}...{text[len(text) - kept // 2 :]}"
    return fitted


def _legend_lines(
    legend: Mapping[str, Sequence[int]], font: ImageFont.FreeTypeFont, width: int
) -> list[list[tuple[int, str, tuple[int, ...]]]]:
    """Break the legend into lines of (left, name, colour) that fit into `width` pixels."""
    lines: list[list[tuple[int, str, tuple[int, ...]]]] = []
    left = width
    for name, color in legend.items():
        needed = round(1.4 * font.size + font.getlength(name) + font.size)
        if left + needed > width - _MARGIN:
            lines.append([])
            left = _MARGIN
        lines[-1].append((left, name, tuple(color)))
        left += needed
    return lines


def _draw_legend(draw: ImageDraw.ImageDraw, items: list, font: ImageFont.FreeTypeFont, top: int, line: int) -> None:
    for k, entries in enumerate(items):
        middle = top + k * line + line // 2 - _MARGIN // 2
        for left, name, color in entries:
            half = font.size // 2
            draw.rectangle((left, middle - half, left + 2 * half, middle + half), fill=color, outline=_INK)
            draw.text((left + 1.4 * font.size, middle), name, _INK, font, anchor="lm")


def save_confusion_plot(confusion: np.ndarray, class_names: Sequence[str], path: str | Path) -> None:
    """Plot a (K+1, K+1) confusion matrix (rows predictions, columns labels) as PNG.

    Every column is normalised to 100 % of the labelled pixels of its class, so that the diagonal shows the class
    accuracies; ignored pixels are left out, and the column of a class without labelled pixels is grey.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # heavy, and needed at the end of an evaluation only
    from matplotlib.figure import Figure

    classes = len(class_names)
    counts = np.asarray(confusion, np.float64)[:classes, :classes]
    labelled = counts.sum(axis=0, keepdims=True)
    percent = np.divide(100 * counts, labelled, out=np.full_like(counts, np.nan), where=labelled > 0)
    side = 2.5 + 0.5 * classes
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor("0.88")  # shows through where a class has no labelled pixels
    shown = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(classes), class_names, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(classes), class_names)
    axes.set_xlabel("label")
    axes.set_ylabel("prediction")
    axes.set_title("% of the labelled pixels of each class (columns sum to 100)", fontsize=10)
    for row, column in zip(*np.nonzero(percent >= 0.5), strict=True):
        value = percent[row, column]
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8,
                  color="white" if value > 55 else "black")  # fmt: skip
    figure.colorbar(shown, ax=axes, shrink=0.8)
    figure.savefig(path, format="png", dpi=120)
