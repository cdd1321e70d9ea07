"""The prepared data: one Arrow dataset per split with a `metadata.json` beside it, opened and verified here.

    DIR/<dataset>/<split>/
      data-*.arrow, dataset_info.json, state.json    readable with `datasets.load_from_disk`
      metadata.json                                  `Metadata`

Columns: `image` (PNG), `file_name`, `sequence`, `condition`, and in labelled splits `label` (8-bit PNG in the
dataset's own class ids, 255 = ignore) and `class_pixel_counts` (one number per class, counted at native resolution).
"""

import dataclasses
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

from madm_utils.cli import UserError
from madm_utils.label_spaces import check_label_ids, class_pixel_counts

if TYPE_CHECKING:
    import datasets

METADATA_FILE = "metadata.json"


class UndecodableImage(ValueError):
    """An image or label whose bytes are damaged; the message is a short reason, equal in every process."""


@dataclass(frozen=True)
class Metadata:
    """What a prepared split holds."""

    dataset: str
    split: str
    class_names: tuple[str, ...]
    num_images: int
    image_size: tuple[int, int] | None
    """(height, width) of every image, `None` when sizes differ."""
    class_pixel_counts: tuple[int, ...] | None
    """Total per class at native resolution, `None` without labels."""
    fingerprint: str
    """Digest of the selected files, their sizes, and how they were converted."""
    resized: bool
    """Whether images and labels are stored at another size than the native one."""

    @property
    def labelled(self) -> bool:
        return self.class_pixel_counts is not None

    def save(self, folder: Path) -> None:
        """Write `metadata.json` into `folder`."""
        (folder / METADATA_FILE).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Metadata":
        """Read `metadata.json` of a prepared split.

        Raises:
            UserError: the file is missing or has another form.
        """
        path = folder / METADATA_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            for key in ("class_names", "image_size", "class_pixel_counts"):
                values[key] = None if values[key] is None else tuple(values[key])
            return cls(**values)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path} cannot be read as metadata of prepared data ({error}); prepare it again"
            ) from None


def open_split(folder: Path) -> tuple["datasets.Dataset", Metadata]:
    """Open a prepared split, memory-mapped; image columns give undecoded `{"bytes", "path"}`.

    Raises:
        UserError: the folder is not a prepared split, or Arrow files and metadata do not fit together.
    """
    import datasets

    metadata = Metadata.load(folder)
    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:  # missing files, broken JSON and broken Arrow streams all raise types of their own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder} cannot be opened as an Arrow dataset ({reason}); prepare it again") from None
    images = ["image", "label"] if metadata.labelled else ["image"]
    expected = {*images, "file_name", "sequence", "condition", *(["class_pixel_counts"] if metadata.labelled else [])}
    if not expected <= set(data.column_names) or len(data) != metadata.num_images:
        raise UserError(
            f"{folder} holds {len(data)} images with columns {sorted(data.column_names)}; its {METADATA_FILE} says "
            f"{metadata.num_images} images with columns {sorted(expected)}. Prepare it again."
        )
    for column in images:
        data = data.cast_column(column, datasets.Image(decode=False))
    return data, metadata


def decode_image(value: dict | None) -> Image.Image:
    """Decode an `image` or `label` cell, as `open_split` gives it, without conversion.

    Raises:
        UndecodableImage: the bytes are absent or damaged.
    """
    if value is None or value["bytes"] is None:
        raise UndecodableImage("no bytes")
    try:
        image = Image.open(io.BytesIO(value["bytes"]))
        image.load()
    except UnidentifiedImageError:  # its own message holds an address
        raise UndecodableImage("not an image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UndecodableImage(" ".join(str(error).split())) from None
    return image


def verify_split(folder: Path) -> Metadata:
    """Re-read a whole prepared split: counts, decodable images, sizes, label ids, class statistics.

    Raises:
        UserError: naming the first thing that is wrong and its image.
    """
    from tqdm import tqdm

    data, metadata = open_split(folder)
    if not len(data):
        raise UserError(f"{folder} holds no image; prepare it again")
    totals = np.zeros(len(metadata.class_names), np.int64)
    for row in tqdm(data, desc=f"verify {metadata.dataset} {metadata.split}", unit="image"):
        totals += _verify_row(row, metadata, f"{folder}: {row['file_name']}")
    if metadata.labelled and totals.tolist() != list(metadata.class_pixel_counts):
        raise UserError(
            f"{folder}: class statistics in {METADATA_FILE} are {list(metadata.class_pixel_counts)}, the sum over the "
            f"images is {totals.tolist()}; prepare it again"
        )
    return metadata


def _verify_row(row: dict, metadata: Metadata, where: str) -> np.ndarray | int:
    """Check one image; return its stored class pixel counts (0 without label)."""
    try:
        image = decode_image(row["image"])
        label = decode_image(row["label"]) if metadata.labelled else None
    except UndecodableImage as error:
        raise UserError(f"{where}: image or label does not decode ({error}); prepare it again") from None
    size = image.size[::-1]
    if metadata.image_size not in (None, size):
        raise UserError(f"{where}: image is {size} (height, width), expected {metadata.image_size}; prepare it again")
    if label is None:
        return 0
    if label.size != image.size or label.mode != "L":
        raise UserError(
            f"{where}: label is {label.size[::-1]} in mode {label.mode}, expected {size} in mode L; prepare it again"
        )
    ids, stored = np.asarray(label), np.asarray(row["class_pixel_counts"], np.int64)
    check_label_ids(ids, len(metadata.class_names), where)
    counted = class_pixel_counts(ids, len(metadata.class_names))
    # A label that was made smaller or larger has other counts than the native one, but no class the native one lacks.
    agree = not np.any(counted[stored == 0]) if metadata.resized else np.array_equal(counted, stored)
    if not agree:
        raise UserError(
            f"{where}: class_pixel_counts {stored.tolist()} do not fit the label, which has {counted.tolist()}; "
            "prepare it again"
        )
    return stored
