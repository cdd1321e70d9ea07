"""Decoding the images and labels of raw files: each published encoding, and one message for each that does not fit."""

import io
import json
import struct
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageOps, UnidentifiedImageError

from madm_utils.cli import UserError
from madm_utils.label_spaces import CITYSCAPES_LABEL_IDS, CITYSCAPES_LABEL_NAMES, IGNORE_INDEX, check_label_ids
from madm_utils.raw_files import RawPath

if TYPE_CHECKING:
    from madm_utils.raw_descriptions import RawFile

UNDRAWN_LABEL = "license plate"
"""Cityscapes label of id -1: its polygons are left out and show what lies beneath."""
MAX_LABEL_PIXELS = 1 << 28
_WIDE_MODES = ("I;16", "I;16B", "I;16L", "I", "F")


def read_image(path: RawPath) -> Image.Image:
    """Read and decode a picture as it is, but upright: turned as its EXIF orientation says, as viewers do.

    Raises:
        UserError: it is damaged or not an image.
    """
    image = _load(_open_image(path), path)
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except (ValueError, SyntaxError, TypeError, struct.error):  # damaged EXIF data; viewers leave them out
        return image


def to_8_bit(image: Image.Image, path: RawPath | str, image_range: tuple[float, float] | None = None) -> Image.Image:
    """Return an 8-bit picture: grey stays grey, everything else becomes RGB; alpha is dropped.

    Args:
        image: any mode of up to 8 bits, or single-channel with more.
        path: names the file in messages.
        image_range: values of an image with more than 8 bits that become 0 and 255; those between are spread evenly
            and rounded, those outside cut off, and what is not a number becomes 0. Other images do not need it.

    Raises:
        UserError: more than 8 bits without `image_range`, or a mode that is not supported.
    """
    if image.mode in ("L", "RGB"):
        return image
    if image.mode in ("1", "LA"):
        return image.convert("L")
    if image.mode in ("P", "RGBA"):
        return image.convert("RGB")
    if image.mode not in _WIDE_MODES:
        raise UserError(
            f"{path}: image mode {image.mode} is not supported; expected 8-bit grey or RGB (with or without alpha)"
        )
    values = np.asarray(image)
    if image_range is None:
        raise UserError(
            f"{path}: image mode {image.mode} has more than 8 bits (values {values.min():g}..{values.max():g}) and is "
            "not supported without a range; expected 8-bit, or give --image_range LOW HIGH, the values that become 0 "
            "and 255"
        )
    low, high = image_range
    if not low < high:
        raise UserError(f"--image_range LOW HIGH needs LOW below HIGH, got {low:g} {high:g}")
    share = np.clip((values.astype(np.float64) - low) / (high - low), 0, 1)
    return Image.fromarray(np.rint(np.nan_to_num(share) * 255).astype(np.uint8))


def read_label(file: "RawFile") -> tuple[Image.Image, np.ndarray]:
    """Return the class ids of the label of `file` as a picture of mode L, 255 = ignore, and how often each occurs.

    The second is (256,) int64. The pixels are gone through once for the numbers, which also show unknown ids, and
    once to map them.

    Raises:
        UserError: the label cannot be read, is encoded in another way than the dataset's, or holds unknown ids.
    """
    label_files = file.label_files
    ids = label_files.decode(file.label)
    pixels = np.array(ids.histogram(), np.int64)
    check_label_ids(pixels, label_files.num_ids, file.label)
    if label_files.class_ids is None:
        return ids, pixels
    mapped = np.zeros_like(pixels)
    np.add.at(mapped, np.array(label_files.class_ids), pixels)
    return ids.point(label_files.class_ids), mapped


def decode_label(file: "RawFile") -> np.ndarray:
    """Return the class ids of the label of `file` as `read_label`, uint8 (H, W)."""
    return np.asarray(read_label(file)[0])


def single_channel_ids(path: RawPath) -> Image.Image:
    """Ids of a single-channel label; one of 16 or 32 bits will do if its values fit into 8."""
    label = read_image(path)
    if label.mode == "L":
        return label
    if label.mode == "1" or label.mode in _WIDE_MODES[:-1]:
        return Image.fromarray(_as_uint8(np.asarray(label), path))
    raise UserError(f"{path}: label has mode {label.mode}; expected a single channel of 8-bit class ids{_hint(label)}")


def palette_ids(path: RawPath) -> Image.Image:
    """Ids of a palette label, whose index is the id whatever its colours, or of a single-channel one."""
    label = read_image(path)
    if label.mode in ("P", "L"):
        return label if label.mode == "L" else label.point(range(256), "L")
    raise UserError(f"{path}: label has mode {label.mode}; expected a palette PNG whose index is the class id")


def red_channel_ids(path: RawPath) -> Image.Image:
    """Ids in the red channel of an RGB or RGBA label, or the only channel."""
    label = read_image(path)
    if label.mode not in ("RGB", "RGBA", "L"):
        raise UserError(f"{path}: label has mode {label.mode}; expected RGB or RGBA with the class id in red")
    return label.getchannel(0)


def red_16_bit_ids(path: RawPath) -> Image.Image:
    """Ids of a PNG with three channels of 16 bits: the low byte of the red channel.

    Pillow decodes such files to 8 bits by keeping the high bytes; asked for the other byte order, the low ones.
    """
    label = _open_image(path)
    if label.format != "PNG" or not label.tile or label.tile[0].args != "RGB;16B":
        raise UserError(
            f"{path}: label has mode {label.mode} with 8 bits; expected the published PNG with 16-bit channels. "
            "Was it saved again by a program that keeps only 8 bits? Copy the original"
        )
    label.tile = [label.tile[0]._replace(args="RGB;16L")]
    return _load(label, path).getchannel(0)


def polygon_ids(path: RawPath) -> Image.Image:
    """Draw a Cityscapes polygon file as trainIds, exactly as cityscapesscripts' json2labelImg does.

    Polygons are drawn in their order over 255; deleted ones and those of negative labelId are left out; a trailing
    `group` of an unknown label is dropped.
    """
    try:
        content = json.loads(path.read_bytes())
        width, height = int(content["imgWidth"]), int(content["imgHeight"])
        if not 0 < width * height <= MAX_LABEL_PIXELS:
            raise ValueError(f"imgWidth x imgHeight is {width}x{height}")
        picture = Image.new("L", (width, height), IGNORE_INDEX)
        draw = ImageDraw.Draw(picture)
        unknown = set()
        for item in content["objects"]:
            name = item["label"]
            if name.endswith("group") and name not in _TRAIN_ID_OF_NAME:
                name = name.removesuffix("group")
            if item.get("deleted") or name == UNDRAWN_LABEL:
                continue
            if name in _TRAIN_ID_OF_NAME:
                draw.polygon([(x, y) for x, y in item["polygon"]], fill=_TRAIN_ID_OF_NAME[name])
            else:
                unknown.add(item["label"])
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read as Cityscapes polygons ({type(error).__name__}: {error}); copy it again"
        ) from None
    if unknown:
        raise UserError(f"{path}: polygons have labels {sorted(unknown)}, which Cityscapes does not know")
    return picture


_TRAIN_ID_OF_NAME = {
    name: CITYSCAPES_LABEL_IDS.get(label_id, IGNORE_INDEX) for label_id, name in enumerate(CITYSCAPES_LABEL_NAMES)
}


def _open_image(path: RawPath) -> Image.Image:
    try:
        return Image.open(io.BytesIO(path.read_bytes()))
    except UnidentifiedImageError:  # its own message holds an address
        raise _unreadable(path, "not an image") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from None


def _load(image: Image.Image, path: RawPath) -> Image.Image:
    try:
        image.load()
        return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: RawPath, reason: object) -> UserError:
    return UserError(
        f"{path} cannot be read as an image ({reason}); the file is damaged or not an image: copy it again"
    )


def _as_uint8(ids: np.ndarray, path: RawPath) -> np.ndarray:
    if ids.dtype != np.uint8:
        if ids.min() < 0 or ids.max() > 255:
            raise UserError(f"{path}: label holds values {ids.min()}..{ids.max()}; expected 8-bit class ids")
        ids = ids.astype(np.uint8)
    return ids


def _hint(label: Image.Image) -> str:
    if label.mode == "P":
        return ". In a palette picture the ids may have been renumbered when it was saved again"
    return ". Is this the picture of the colours instead of the ids?" if label.mode in ("RGB", "RGBA") else ""
