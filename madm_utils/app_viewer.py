"""What the page of `demo_app.py` shows of an image and its predictions, in the form that `app_viewer.js` draws.

The browser gets the class ids and confidences themselves, not a picture of them: opacity, hidden classes, heat map and
differences are its own work, without asking the server again.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from madm_utils.visualization import Palette

DISPLAY_SIDE = 1280
"""Longest side in pixels of what is shown; downloads have the size of the image."""
VIEWER_HTML = '<div class="viewer" role="region" aria-label="Result"></div>'
VIEWER_CSS, VIEWER_JS = (
    Path(__file__).with_name(f"app_viewer.{kind}").read_text(encoding="utf-8") for kind in ("css", "js")
)


@dataclass(frozen=True)
class Segmentation:
    """One model's prediction for one image."""

    title: str
    """Who predicted: model and modality."""
    label_map: np.ndarray
    """Class ids, uint8 (H, W)."""
    confidence: np.ndarray
    """Probability of the predicted class, float32 (H, W) in [0, 1]."""
    class_names: Sequence[str]
    palette: Palette
    seconds: float
    """Time the model took."""


def message_value(message: str) -> dict[str, Any]:
    """The viewer with nothing but a message, e.g. why an image cannot be used."""
    return {"message": message, "image": None, "results": []}


def viewer_value(name: str, image: Image.Image, results: Sequence[Segmentation] = ()) -> dict[str, Any]:
    """The viewer with the RGB image of the file `name` and what one model or two see in it; JSON.

    Pictures are data URLs: `image` and the two of a result, `labels` (grey value = class id) and `confidence` (grey
    value = 255 times the probability), all of one size with at most `DISPLAY_SIDE` pixels per side. Shares are exact,
    from the whole label map.
    """
    scale = min(1.0, DISPLAY_SIDE / max(image.size))
    shown = tuple(max(1, round(side * scale)) for side in image.size)
    return {
        "message": None,
        "name": name,
        "image": _data_url(image.resize(shown, Image.Resampling.BOX), "WEBP", quality=90),
        "width": image.width,
        "height": image.height,
        "results": [_result(result, shown) for result in results],
        "agreement": _agreement(results) if len(results) == 2 else None,
    }


def _result(result: Segmentation, shown: tuple[int, int]) -> dict[str, Any]:
    counts = np.bincount(result.label_map.ravel(), minlength=len(result.class_names))
    confidence = np.round(255 * result.confidence).astype(np.uint8)
    labels, confidence = (
        Image.fromarray(grey).resize(shown, Image.Resampling.NEAREST) for grey in (result.label_map, confidence)
    )
    return {
        "title": result.title,
        "seconds": result.seconds,
        "confidence_mean": float(result.confidence.mean()),
        "classes": [
            {"name": name, "color": list(color), "share": float(count / result.label_map.size)}
            for name, color, count in zip(result.class_names, result.palette, counts, strict=True)
        ],
        "labels": _data_url(labels, "PNG"),
        "confidence": _data_url(confidence, "PNG"),
    }


def _agreement(results: Sequence[Segmentation]) -> float:
    """Share of the pixels to which both models give a class of the same name."""
    first, second = results
    if tuple(first.class_names) == tuple(second.class_names):
        return float(np.mean(first.label_map == second.label_map))
    # by ids of names, not by names: arrays of text would take many times the memory of the image
    ids = {name: k for k, name in enumerate({*first.class_names, *second.class_names})}
    same = [np.array([ids[name] for name in one.class_names], np.int16)[one.label_map] for one in results]
    return float(np.mean(same[0] == same[1]))


def _data_url(picture: Image.Image, kind: str, **options: Any) -> str:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
