"""What becomes of one raw image: a row of the prepared data, with its class statistics counted in the same pass."""

import io
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from madm_utils.cli import UserError
from madm_utils.label_spaces import STREET_CLASSES, check_label_ids, class_pixel_counts
from madm_utils.raw_files import RawPath
from madm_utils.raw_labels import read_image, read_label, to_8_bit
from madm_utils.raw_search import RawFile
from madm_utils.transforms import Size, resize_image, resize_label

if TYPE_CHECKING:
    import datasets

PNG_COMPRESSION = 3
"""zlib level of drawn scenes: about a third of the default's time, a few percent larger."""
_TIFF_HORIZONTAL_PREDICTOR = {317: 2}


@dataclass(frozen=True)
class PublishedStatistics:
    """DAFormer's `sample_class_stats.json`, as it comes with some copies of a dataset."""

    path: str
    counts: dict[str, dict[int, int]]
    """Name of a label file, as `_label_stem` gives it -> {class id: pixels}."""

    @classmethod
    def load(cls, path: RawPath) -> "PublishedStatistics":
        """Read the statistics.

        Raises:
            UserError: the file cannot be read or has another form.
        """
        try:
            counts = {
                _label_stem(entry["file"]): {int(key): int(n) for key, n in entry.items() if key != "file"}
                for entry in json.loads(path.read_bytes())
            }
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} cannot be read as class statistics ({error}); repair it or remove it") from None
        return cls(str(path), counts)

    def compare(self, file: RawFile, counts: np.ndarray) -> None:
        """Raise `UserError` unless the statistics say of the label of `file` what was counted, (num_classes,)."""
        counted = {class_id: count for class_id, count in enumerate(counts.tolist()) if count}
        found = self.counts.get(_label_stem(file.label.name))
        if found is None:
            raise UserError(
                f"{self.path} does not list {file.label} (as {_label_stem(file.label.name)}); it was made from other "
                "or fewer labels: remove it, or restore the labels"
            )
        if {key: count for key, count in found.items() if count} != counted:
            raise UserError(
                f"{self.path} disagrees with {file.label}: it says {found}, the label has {counted} (trainId: "
                "pixels). The labels changed since it was made: remove it, or restore the labels."
            )


@dataclass(frozen=True)
class RawConversion:
    """Row of one raw image, as one split of a dataset is stored; a picklable callable."""

    num_classes: int
    stored_size: Size | None
    """(height, width) in pixels, `None` for the native size."""
    image_range: tuple[float, float] | None = None
    """Of images with more than 8 bits: the values that become 0 and 255."""
    published: "PublishedStatistics | None" = None
    """Class statistics to compare with."""

    def __call__(self, file: RawFile, scratch: Path) -> dict[str, Any]:
        """Convert `file`; `scratch` is a folder for what has to be unpacked meanwhile.

        Raises:
            UserError: unreadable file, label of another size, class ids outside the dataset's map, or other class
                statistics than the published ones. The message names the file.
        """
        if isinstance(file.image, RawPath):
            opened = read_image(file.image)
            image = to_8_bit(opened, file.image, self.image_range)
        else:
            opened = image = file.image.load(scratch)
        stored = resize_image(image, self.stored_size or image.size[::-1])
        # Neither converted nor resized: the file's own bytes.
        kept = stored is opened and isinstance(file.image, RawPath) and opened.format == "PNG"
        row = {
            "file_name": file.file_name,
            "sequence": file.sequence,
            "frame": file.frame,
            "condition": file.condition,
            "image": _cell(file.image.read_bytes() if kept else _encode(stored, resized=stored is not image)),
            "height": stored.height,
            "width": stored.width,
        }
        if file.label is not None:
            label, pixels = read_label(file)
            if label.size != image.size:
                raise UserError(
                    f"{file.label}: label is {label.width}x{label.height} pixels but its image {file.image} is "
                    f"{image.width}x{image.height}; they must have the same size"
                )
            check_label_ids(pixels, self.num_classes, file.label)
            counts = pixels[: self.num_classes]
            if self.published is not None:
                self.published.compare(file, counts)
            row["label"] = _cell(self.store_label(label))
            row |= _statistics(counts)
        if file.events is not None:
            row["events"] = _cell(_encode(file.events.load_tensor(scratch), resized=True))
        return row

    def store_label(self, label: Image.Image) -> bytes:
        """The file that is stored for a label, class ids at native size."""
        stored = resize_label(label, self.stored_size or label.size[::-1])
        return _encode(stored, resized=stored is not label)


@dataclass(frozen=True)
class SceneConversion:
    """Row of one procedural street scene of `side` x `side` pixels; a picklable callable."""

    split: str
    modality: str
    side: int
    labelled: bool

    def __call__(self, item: tuple[int, int], scratch: Path) -> dict[str, Any]:
        """Draw the scene; `item` is (index, seed of the scene), `scratch` is not needed."""
        from madm_utils.scenes import render_scene

        index, seed = item
        image, label = render_scene(seed, self.modality, self.side, self.side)
        row = {
            "file_name": f"{self.split}/{index:06d}.png",
            "sequence": "",
            "frame": f"{index:06d}",
            "condition": "",
            "image": _cell(_encode(Image.fromarray(image))),
            "height": image.shape[0],
            "width": image.shape[1],
        }
        if self.labelled:
            row["label"] = _cell(_encode(Image.fromarray(label)))
            row |= _statistics(class_pixel_counts(label, len(STREET_CLASSES)))
        return row


def row_features(class_names: tuple[str, ...], labelled: bool, events: bool) -> "datasets.Features":
    """Columns of a prepared split and their types."""
    import datasets

    columns = {name: datasets.Value("string") for name in ("file_name", "sequence", "frame", "condition")}
    columns["image"] = datasets.Image()
    if labelled:
        columns["label"] = datasets.Image()
        columns["class_pixel_counts"] = datasets.List(datasets.Value("int64"))
        columns["classes"] = datasets.List(datasets.ClassLabel(names=list(class_names)))
    if events:
        columns["events"] = datasets.Image()
    return datasets.Features(columns)


def _label_stem(label: str) -> str:
    """What the names of all kinds of label files of one image share: without folders, the kind, and the file's type.

    DAFormer's statistics name the labelTrainIds that its tools make; GTA5's and SYNTHIA's own labels are `00001.png`.
    """
    stem = PurePosixPath(label.replace("\\", "/")).stem
    for kind in ("_labelTrainIds", "_labelIds", "_polygons"):
        stem = stem.removesuffix(kind)
    return stem


def _encode(image: Image.Image, resized: bool = False) -> bytes:
    """Losslessly, as small as PNG; what training reads (`resized`) in a form that decodes four times as fast."""
    buffer = io.BytesIO()
    if resized:
        predictor = {} if image.mode == "F" else {"tiffinfo": _TIFF_HORIZONTAL_PREDICTOR}
        image.save(buffer, format="TIFF", compression="zstd", **predictor)
    else:
        image.save(buffer, format="PNG", compress_level=PNG_COMPRESSION)
    return buffer.getvalue()


def _cell(encoded: bytes) -> dict[str, Any]:
    return {"bytes": encoded, "path": None}


def _statistics(counts: np.ndarray) -> dict[str, list[int]]:
    return {"class_pixel_counts": counts.tolist(), "classes": np.flatnonzero(counts).tolist()}
