"""The prepared data: one Arrow dataset per split with a `metadata.json` beside it, opened here.

    DIR/<dataset>/<split>/
      data-*.arrow, dataset_info.json, state.json    readable with `datasets.load_from_disk`
      metadata.json                                  `Metadata`

Columns: `file_name`, `sequence`, `frame`, `condition` (text), `image`, and in labelled splits `label` (8-bit, in the
dataset's own class ids, 255 = ignore), `class_pixel_counts` (one number per class, counted at native resolution) and
`classes` (ids of the classes in the image; the column's type holds their names). Images that were resized are
losslessly compressed TIFF, the others PNG. `events` is a further picture of float32 values where a dataset has images
and events.
"""

import dataclasses
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

from madm_utils.cli import UserError
from madm_utils.remote_data import DataError, RemoteFolder
from madm_utils.split_rows import ParquetRows, open_rows

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
    """Digest of `source` and `content`: equal data have equal fingerprints, whatever machine made them."""
    resized: bool
    """Whether images and labels are stored at another size than the native one."""
    images_per_class: tuple[int, ...] | None = None
    """Images that show each class, `None` without labels."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What was asked for: `store_resolution`, and e.g. how pictures were made of events."""
    skipped: tuple[dict[str, str], ...] = ()
    """`{"file", "reason"}` of every image that `--on_error skip` left out."""
    content: str = ""
    """SHA-256 over the bytes of all images and labels, in order; equal data have equal content."""
    licence: dict[str, Any] | None = None
    """`{"summary", "url", "redistribution"}` of the dataset's owners, `None` for drawn data and one's own."""
    source: str = ""
    """Digest of the selected files, their sizes, and the settings of the conversion."""

    @property
    def labelled(self) -> bool:
        return self.class_pixel_counts is not None

    def save(self, folder: Path) -> None:
        """Write `metadata.json` into `folder`."""
        (folder / METADATA_FILE).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path | RemoteFolder) -> "Metadata":
        """Read `metadata.json` of a prepared split.

        Raises:
            UserError: the file is missing or has another form.
        """
        try:
            if isinstance(folder, RemoteFolder):
                text = folder.read_text(METADATA_FILE)
            else:
                text = (folder / METADATA_FILE).read_text(encoding="utf-8")
            values = json.loads(text)
            for key in ("class_names", "image_size", "class_pixel_counts", "images_per_class", "skipped"):
                if values.get(key) is not None:
                    values[key] = tuple(values[key])
            return cls(**values)
        except DataError:  # says already what is wrong with the place
            raise
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{folder / METADATA_FILE} cannot be read as metadata of prepared data ({error}); prepare it again"
            ) from None


def open_split(
    folder: Path | RemoteFolder, streaming: bool = False
) -> tuple["datasets.Dataset | ParquetRows", Metadata]:
    """Open a prepared split, here or elsewhere (`remote_data`); image columns give undecoded `{"bytes", "path"}`.

    Args:
        folder: of the split.
        streaming: fetch rows of a remote split when they are asked for, instead of downloading all of it first.

    Raises:
        UserError: the folder is not a prepared split, or its files and metadata do not fit together.
    """
    metadata = Metadata.load(folder)
    try:
        cache_name = f"{metadata.dataset}-{metadata.split}-{(metadata.content or metadata.fingerprint)[:16]}"
        data = open_rows(folder, cache_name, streaming)
    except UserError:
        raise
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
    return data if isinstance(data, ParquetRows) else undecoded(data), metadata


def undecoded(data: "datasets.Dataset") -> "datasets.Dataset":
    """The same dataset with image columns as undecoded `{"bytes", "path"}`."""
    import datasets

    for name, feature in data.features.items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
    return data


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
