"""Pictures for people: coloured labels, overlays, captioned grids with a class legend, confusion-matrix plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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
) -> Image.Image:
    """Arrange pictures in a grid on white paper.

    Args:
        rows: pictures per row, uint8 (H, W, 3) or (H, W); all of the size of the first after scaling to its width.
        captions: one text above each column.
        row_captions: one text above each row.
        legend: class name -> RGB, drawn below the grid in as many lines as it needs.
        cell_width: width of every picture in pixels; default: that of the first picture, at least 128. Pictures
            keep their aspect ratio and are scaled without inventing colours (nearest).

    Raises:
        ValueError: no pictures, rows of different lengths, or a wrong number of captions.
    """
    columns = len(rows[0]) if rows else 0
    if not columns or any(len(row) != columns for row in rows):
        raise ValueError(f"a grid needs rows of one length, got {[len(row) for row in rows]} pictures")
    if captions and len(captions) != columns or row_captions and len(row_captions) != len(rows):
        raise ValueError(
            f"got {len(captions)} captions for {columns} columns and {len(row_captions)} for {len(rows)} rows"
        )
    width = cell_width or max(128, rows[0][0].shape[1])
    cells = [[_scaled(picture, width) for picture in row] for row in rows]
    font = ImageFont.load_default(size=max(11, min(24, width // 12)))
    line = round(1.5 * font.size)
    heights = [max(cell.height for cell in row) + (line if row_captions else 0) for row in cells]
    grid_width = columns * width + (columns + 1) * _MARGIN
    top = _MARGIN + (line if captions else 0)
    items = _legend_lines(legend or {}, font, grid_width)
    total = top + sum(heights) + len(rows) * _MARGIN + len(items) * line
    canvas = Image.new("RGB", (grid_width, total), _PAPER)
    draw = ImageDraw.Draw(canvas)
    lefts = [_MARGIN + k * (width + _MARGIN) for k in range(columns)]
    for left, caption in zip(lefts, captions, strict=False):
        draw.text((left + width / 2, top - line / 2), _fitted(caption, font, width), _INK, font, anchor="mm")
    for k, row in enumerate(cells):
        y = top + sum(heights[:k]) + k * _MARGIN
        if row_captions:
            text = _fitted(row_captions[k], font, grid_width - 2 * _MARGIN)
            draw.text((_MARGIN, y + line / 2), text, _INK, font, anchor="lm")
            y += line
        for left, cell in zip(lefts, row, strict=True):
            canvas.paste(cell, (left, y))
    _draw_legend(draw, items, font, total - len(items) * line, line)
    return canvas


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
