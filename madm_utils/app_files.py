"""What visitors of the page send, and what they take away."""

import shutil
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from madm_utils.app_viewer import Segmentation
from madm_utils.cli import UserError
from madm_utils.images import read_image
from madm_utils.visualization import colorize

MAX_MEGAPIXELS = 50
CACHE_AGE = 3600
"""Seconds after which uploads and results are deleted from the disk."""
RESULT = "result-"
"""How the names of folders with results begin."""
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "PPM")
"""Formats of which Pillow decodes pixels itself; others may call programs of the system."""


def read_upload(path: str | None) -> Image.Image:
    """The image that somebody uploaded, as 8-bit RGB.

    Raises:
        UserError: none chosen, deleted meanwhile, empty, too large, of another format, damaged, or without a defined
            scale. The message names the file but not where it lies.
    """
    if path is None:
        raise UserError("Choose an image first: drop a file or press one of the examples.")
    name = Path(path).name
    try:
        size = Path(path).stat().st_size
    except FileNotFoundError:
        raise UserError(f"{name} was deleted after an hour; choose it again.") from None
    if not size:
        raise UserError(f"{name} is empty (0 bytes).")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as opened:
                megapixels = opened.width * opened.height / 1e6
    except Image.DecompressionBombError:
        megapixels = float("inf")
    except Exception:  # damaged headers raise many types
        raise UserError(f"{name} is no image that can be read; use {', '.join(FORMATS)}.") from None
    if megapixels > MAX_MEGAPIXELS:
        raise UserError(f"{name} has more than {MAX_MEGAPIXELS} megapixels; make it smaller or cut a part out.")
    try:
        return read_image(path)
    except UserError as error:
        raise UserError(str(error).replace(path, name)) from None


def write_downloads(path: str, results: Sequence[Segmentation], cache: str) -> list[str]:
    """Write label and colour PNG of each result for the image uploaded as `path`, at its size.

    Returns:
        The files, in a new folder below `cache`; those of two results are told apart by A and B.
    """
    _delete_old_results(cache)
    folder = Path(tempfile.mkdtemp(prefix=RESULT, dir=cache))
    files = []
    for letter, result in zip("AB", results, strict=False):
        stem = f"{Path(path).stem}_{letter}" if len(results) > 1 else Path(path).stem
        pictures = {"label": result.label_map, "color": colorize(result.label_map, result.palette)}
        for kind, pixels in pictures.items():
            files.append(str(folder / f"{stem}_{kind}.png"))
            Image.fromarray(pixels).save(files[-1])
    return files


def _delete_old_results(cache: str) -> None:
    """Delete those that gradio leaves: it deletes what it sent out, which the result of a cancelled run never was."""
    oldest = time.time() - CACHE_AGE
    for folder in Path(cache).glob(f"{RESULT}*"):
        if folder.stat().st_mtime < oldest:
            shutil.rmtree(folder, ignore_errors=True)  # gradio's own clean-up may be at work in it
