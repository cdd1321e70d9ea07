"""Anyone's own pictures and masks as a dataset: `--dataset folder`.

Pictures lie in one folder (or archive), masks in another. A picture and its mask have the same path but for the type:
`images/site1/0001.jpg` belongs to `labels/site1/0001.png`; `site1` becomes the sequence. Pictures without labels, as
the target of an adaptation needs them, do with the first folder.

What the masks mean is said in a JSON or YAML file:

    class_names: [road, car, person]     # position = class id of the prepared data
    ids: {7: road, 26: car, 24: person, 25: person}     # value in the mask -> class, by name or position
    ignore: [0]                          # values of pixels that count for nothing; 255 always is one, unless in ids
    other: error                         # values that are not listed: error (the default), or ignore
    image_ending: _rgb                   # what names end in, before the file's type, if images and labels differ:
    label_ending: _mask                  # here x_rgb.jpg belongs to x_mask.png

For masks painted in colours, `colors` takes the place of `ids`: `colors: {road: [128, 64, 128], car: [[0, 0, 142],
[0, 0, 70]]}`, and `ignore` lists colours. With neither, a mask holds the class ids themselves. Masks of ids have one
channel of up to 16 bits, or a palette whose index is the id.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from madm_utils.cli import UserError
from madm_utils.label_spaces import IGNORE_INDEX
from madm_utils.raw_datasets import RAW_DATASETS
from madm_utils.raw_descriptions import LabelFiles, Licence, RawDataset, RawFile, RawSplit
from madm_utils.raw_files import RawPath, RawTree
from madm_utils.raw_labels import read_image

IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
LOSSY_TYPES = (".jpg", ".jpeg")
MAX_CLASSES = 254
_UNKNOWN = 254
_MAX_ID = 65535
_OWN_DATA = Licence("Your own data; whether it may be passed on is for you to know.", "", redistribution=True)

Color = tuple[int, int, int]


@dataclass(frozen=True)
class LabelMap:
    """What the values of masks mean, as read from a label map file."""

    path: Path
    class_names: tuple[str, ...]
    ids: tuple[tuple[int, int], ...] | None = None
    """(value in the mask, class id or 255); `None`: masks are painted in `colors`."""
    colors: tuple[tuple[Color, int], ...] = ()
    """((red, green, blue), class id or 255)."""
    ignore_other: bool = False
    image_ending: str = ""
    label_ending: str = ""

    @classmethod
    def load(cls, path: Path) -> "LabelMap":
        """Read a label map file, see the module.

        Raises:
            UserError: it cannot be read or does not describe a label map; the message names everything that is wrong.
        """
        import yaml  # JSON is YAML, so one reader serves both; imported here to keep start-up quick

        try:
            fields = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"label map {path} cannot be read ({reason}); give a JSON or YAML file") from None
        if not isinstance(fields, dict):
            raise UserError(f"label map {path} holds {type(fields).__name__}; expected an object with class_names")
        return _Reader(path, fields).label_map()

    def decode(self, path: RawPath) -> Image.Image:
        """Class ids of a mask as a picture of mode L, 255 = ignore.

        Raises:
            UserError: the mask cannot be read, is of another kind, or has values that are not listed.
        """
        label = read_image(path)
        if self.ids is None:
            if label.mode not in ("RGB", "RGBA", "P"):
                raise UserError(f"{path}: label has mode {label.mode}; {self.path} describes masks painted in colours")
            values = np.asarray(label.convert("RGB")).astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
        elif label.mode in ("1", "L", "P", "I;16", "I;16B", "I"):
            values = np.asarray(label).astype(np.int32)
            if values.min() < 0 or values.max() > _MAX_ID:
                raise UserError(f"{path}: label holds values {values.min()}..{values.max()}; expected 0..{_MAX_ID}")
        else:
            raise UserError(
                f"{path}: label has mode {label.mode}; expected one channel (or a palette) of class ids. For masks "
                f"painted in colours give 'colors' in {self.path}"
            )
        class_ids = _table(self)[values]
        if not self.ignore_other and (unknown := class_ids == _UNKNOWN).any():
            raise UserError(
                f"{path}: label holds {self._describe(np.unique(values[unknown]))}, which {self.path} does not list; "
                f"add them to '{'colors' if self.ids is None else 'ids'}' or 'ignore', or set 'other: ignore'"
            )
        return Image.fromarray(class_ids)

    def _describe(self, values: np.ndarray) -> str:
        more = ", ..." if len(values) > 10 else ""
        if self.ids is None:
            return f"colors {[[int(v) >> 16, int(v) >> 8 & 255, int(v) & 255] for v in values[:10]]}{more}"
        return f"ids {values[:10].tolist()}{more}"


def find_folder_files(
    name: str,
    images: Path,
    labels: Path | None = None,
    label_map: Path | None = None,
    split: str = "train",
    scratch: Path | None = None,
) -> tuple[RawDataset, list[RawFile]]:
    """Describe own pictures (and masks) as a dataset, and return its files sorted by path.

    Args:
        name: of the prepared data; letters, digits, _ and -.
        images: folder or archive of pictures.
        labels: folder or archive of masks; `None`: the pictures are used without.
        label_map: see the module; needed with `labels`.
        split: what the pictures are for.
        scratch: as for `RawTree.open`.

    Raises:
        UserError: no picture, two of the same name, a picture without mask or a mask without picture, masks that
            cannot be exact, a wrong label map, or a name that is taken.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in RAW_DATASETS or name.startswith("synthetic"):
        raise UserError(
            f"'{name}' cannot be the name of own data; use letters, digits, _ and -, and no name of a known dataset"
        )
    if not re.fullmatch(r"[A-Za-z0-9_-]+", split):
        raise UserError(f"'{split}' cannot be the name of a split; use train, val, test or another plain word")
    if labels is not None and label_map is None:
        raise UserError(f"--labels {labels} needs --label_map FILE, which says what the masks mean")
    mapping = LabelMap.load(label_map) if label_map is not None else LabelMap(Path(), ())
    pictures = _pictures(images, mapping.image_ending, scratch)
    label_files = LabelFiles("", max(len(mapping.class_names), 1), decode=mapping.decode)
    masks: dict[str, RawPath] = {}
    if labels is not None:
        masks = _pictures(labels, mapping.label_ending, scratch, LOSSY_TYPES)
        pictures, masks = _pair(pictures, masks, images, labels)
    files = []
    for key, (file_name, picture) in pictures.items():
        sequence, _, frame = key.rpartition("/")
        mask = masks[key][1] if key in masks else None
        files.append(RawFile(picture, file_name, sequence, frame, "", mask, label_files if mask else None))
    spec = RawSplit("", (label_files,) if masks else (), trained=split == "train")
    dataset = RawDataset(name, images.name, mapping.class_names, {split: spec}, _OWN_DATA, "", base="folder")
    return dataset, sorted(files, key=lambda file: file.file_name)


def _pictures(
    folder: Path, ending: str, scratch: Path | None, refused: tuple[str, ...] = ()
) -> dict[str, tuple[str, RawPath]]:
    """Path without ending and type -> (path, file) of every picture below `folder`."""
    tree = RawTree.open(folder, scratch)
    tree.check_archives("")
    found: dict[str, tuple[str, RawPath]] = {}
    for path, file in tree.files.items():
        stem, kind = str(PurePosixPath(path).with_suffix("")), PurePosixPath(path).suffix.lower()
        if kind not in IMAGE_TYPES or not stem.endswith(ending):
            continue
        if kind in refused:
            raise UserError(f"{file}: JPEG changes the values of masks; give labels as PNG, BMP, TIFF or WebP")
        key = stem.removesuffix(ending)
        if key in found:
            raise UserError(f"{found[key][1]} and {file} differ only in their type; keep one of them")
        found[key] = (path, file)
    if not found:
        kinds = ", ".join(f"*{ending}{kind}" for kind in IMAGE_TYPES)
        raise UserError(f"{folder} holds no picture ({kinds}); found {tree.describe()}")
    in_own_folder = folder.is_file() and all(key.startswith(f"{folder.name.partition('.')[0]}/") for key in found)
    return _without_top(found) if in_own_folder else found


def _pair(pictures: dict, masks: dict, images: Path, labels: Path) -> tuple[dict, dict]:
    """Both by the same keys. Archives often hold a folder of their own at the top; it is left out if that helps."""
    variants = ((p, m) for p in (pictures, _without_top(pictures)) for m in (masks, _without_top(masks)))
    pictures, masks = next(((p, m) for p, m in variants if p.keys() & m.keys()), (pictures, masks))
    for what, other, some, more, folder in (
        ("images", "label", pictures, masks, labels), ("labels", "image", masks, pictures, images)
    ):  # fmt: skip
        alone = [key for key in some if key not in more]
        if alone:
            raise UserError(
                f"{len(alone)} of {len(some)} {what} lack {'an' if other == 'image' else 'a'} {other}, first "
                f"{some[alone[0]][1]}; expected {folder}/{alone[0]}.* . If the names end differently, give "
                "'image_ending' and 'label_ending' in the label map"
            )
    return pictures, masks


def _without_top(files: dict[str, tuple[str, RawPath]]) -> dict[str, tuple[str, RawPath]]:
    """The same without the folder that all of them lie in, if there is one."""
    tops = {key.partition("/")[0] for key in files}
    if len(tops) > 1 or any("/" not in key for key in files):
        return files
    return {key.partition("/")[2]: (path.partition("/")[2], file) for key, (path, file) in files.items()}


@lru_cache(maxsize=2)
def _table(label_map: LabelMap) -> np.ndarray:
    """Value of a mask (for colours red * 65536 + green * 256 + blue) -> class id, uint8."""
    size = 1 << 24 if label_map.ids is None else _MAX_ID + 1
    table = np.full(size, IGNORE_INDEX if label_map.ignore_other else _UNKNOWN, np.uint8)
    if label_map.ids is None:
        for (red, green, blue), class_id in label_map.colors:
            table[red << 16 | green << 8 | blue] = class_id
    else:
        table[IGNORE_INDEX] = IGNORE_INDEX
        for value, class_id in label_map.ids:
            table[value] = class_id
    return table


class _Reader:
    """Checks the fields of a label map file and collects what is wrong."""

    KNOWN = ("class_names", "ids", "colors", "ignore", "other", "image_ending", "label_ending")

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self.path, self.fields = path, fields
        self.problems: list[str] = []
        self.class_names: tuple[str, ...] = ()

    def label_map(self) -> LabelMap:
        """The label map, or a `UserError` with every problem."""
        fields = self.fields
        unknown = sorted(str(key) for key in fields if key not in self.KNOWN)
        if unknown:
            self.problems.append(f"unknown fields {unknown}; a label map has {', '.join(self.KNOWN)}")
        names = fields.get("class_names")
        if isinstance(names, list) and all(isinstance(name, str) and name for name in names):
            self.class_names = tuple(names)
        if not 1 <= len(self.class_names) <= MAX_CLASSES or len(set(self.class_names)) != len(self.class_names):
            self.problems.append(f"class_names is a list of 1 to {MAX_CLASSES} different names, got {names!r}")
        if "ids" in fields and "colors" in fields:
            self.problems.append("give either ids or colors")
        if fields.get("other", "error") not in ("error", "ignore"):
            self.problems.append(f"other is error or ignore, got {fields['other']!r}")
        endings = [fields.get(key, "") for key in ("image_ending", "label_ending")]
        if not all(isinstance(ending, str) for ending in endings):
            self.problems.append(f"image_ending and label_ending are texts, got {endings}")
        colors = self._colors() if "colors" in fields else ()
        ids = None if "colors" in fields else self._ids()
        if self.problems:
            raise UserError(f"label map {self.path}: " + "; ".join(self.problems))
        return LabelMap(self.path, self.class_names, ids, colors, fields.get("other") == "ignore", *endings)

    def _ids(self) -> tuple[tuple[int, int], ...]:
        listed = self.fields.get("ids", {i: i for i in range(len(self.class_names))})
        if not isinstance(listed, dict):
            self.problems.append(f"ids is an object {{id: class}}, got {listed!r}")
            listed = {}
        pairs = {self._id(key): self._class_id(value) for key, value in listed.items()}
        for key in self._ignored():
            if self._id(key) in pairs:
                self.problems.append(f"id {key} is both in ids and in ignore")
            pairs[self._id(key)] = IGNORE_INDEX
        return tuple(pairs.items())

    def _colors(self) -> tuple[tuple[Color, int], ...]:
        listed = self.fields["colors"]
        if not isinstance(listed, dict):
            self.problems.append(f"colors is an object {{class: color}}, got {listed!r}")
            listed = {}
        pairs: dict[Color, int] = {}
        entries = [(self._class_id(name), color) for name, value in listed.items() for color in self._several(value)]
        for class_id, color in [*entries, *((IGNORE_INDEX, color) for color in self._ignored())]:
            color = self._color(color)
            if pairs.setdefault(color, class_id) != class_id:
                self.problems.append(f"color {list(color)} is listed twice")
        return tuple(pairs.items())

    def _ignored(self) -> list:
        listed = self.fields.get("ignore") or []
        if not isinstance(listed, list):
            self.problems.append(f"ignore is a list, got {listed!r}")
            return []
        return listed

    def _several(self, value: Any) -> list:
        return value if isinstance(value, list) and value and isinstance(value[0], list) else [value]

    def _id(self, key: Any) -> int:
        try:
            value = int(key)
        except (TypeError, ValueError):
            value = -1
        if not 0 <= value <= _MAX_ID or isinstance(key, float | bool):
            self.problems.append(f"ids are whole numbers 0..{_MAX_ID}, got {key!r}")
        return value

    def _class_id(self, value: Any) -> int:
        if isinstance(value, str) and value in self.class_names:
            return self.class_names.index(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(self.class_names):
            return value
        self.problems.append(f"{value!r} is no class name or position 0..{len(self.class_names) - 1}")
        return IGNORE_INDEX

    def _color(self, value: Any) -> Color:
        if (
            isinstance(value, list)
            and len(value) == 3
            and all(isinstance(part, int) and not isinstance(part, bool) and 0 <= part <= 255 for part in value)
        ):
            return tuple(value)
        self.problems.append(f"a color is [red, green, blue] with values 0..255, got {value!r}")
        return (0, 0, 0)
