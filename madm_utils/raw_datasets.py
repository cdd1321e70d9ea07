"""Finding and pairing the files of the public datasets in their official folder layouts.

One `RawDataset` describes a dataset: its classes, where its images and labels lie, and how label files are decoded.
A further dataset is a further entry of `RAW_DATASETS`; the code below it reads only these descriptions.

Paths are templates relative to the dataset's folder. Their fields match one path component or a part of it, and an
image and a label belong together when all fields agree. `{sequence}` and `{condition}` are kept as columns of the
prepared data.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from madm_utils.cli import UserError
from madm_utils.label_spaces import (
    CITYSCAPES_CLASSES,
    DELIVER_CLASSES,
    FMB_CLASSES,
    STREET_CLASSES,
    cityscapes_train_ids,
    deliver_class_ids,
)


@dataclass(frozen=True)
class LabelFiles:
    """Label images of one kind: where they lie and what their pixel values mean."""

    template: str
    num_ids: int
    """The files hold ids 0..num_ids-1 and 255; anything else is an error."""
    convert: Callable[[np.ndarray], np.ndarray] | None = None
    """uint8 (H, W) ids of the file -> uint8 class ids with 255 = ignore; `None`: they are the same."""


@dataclass(frozen=True)
class RawSplit:
    """One split of a dataset in its official layout."""

    images: str
    labels: tuple[LabelFiles, ...] = ()
    """Alternatives, the preferred one first; empty: the split is used without labels and none are looked for."""
    stored_size: tuple[int, int] | None = None
    """(height, width) of the prepared images; `None`: native size."""
    first_frame: int = 0
    frame_step: int = 1
    """Of a numbered `{frame}`, the published selection: `first_frame` and every `frame_step`-th after it."""
    published_count: int | None = None
    """Images of the published selection; another number is worth a note, not an error."""
    optional: bool = False
    """Skipped when its images are not there, because neither training nor the published test needs it."""

    def label_endings(self) -> dict[str, LabelFiles]:
        """What the names of each kind of label file end in, e.g. `_gtFine_labelIds.png`."""
        return {files.template.split("}")[-1]: files for files in self.labels}


@dataclass(frozen=True)
class RawDataset:
    """One public dataset in its official layout."""

    name: str
    folder: str
    """Official name of the dataset's folder; any upper or lower case is accepted."""
    class_names: tuple[str, ...]
    splits: dict[str, RawSplit]


@dataclass(frozen=True)
class RawFile:
    """One image to prepare, with its label where the split has labels."""

    image: Path
    file_name: str
    """POSIX path of the image relative to the dataset's folder."""
    sequence: str = ""
    condition: str = ""
    label: Path | None = None
    label_files: LabelFiles | None = None


def _cityscapes(split: str, **options) -> RawSplit:
    labels = f"gtFine/{split}/{{sequence}}/{{frame}}_gtFine_"
    return RawSplit(
        f"leftImg8bit/{split}/{{sequence}}/{{frame}}_leftImg8bit.png",
        (
            LabelFiles(labels + "labelTrainIds.png", len(CITYSCAPES_CLASSES)),
            LabelFiles(labels + "labelIds.png", 34, cityscapes_train_ids),
        ),
        **options,
    )


RAW_DATASETS = {
    dataset.name: dataset
    for dataset in (
        RawDataset(
            "cityscapes",
            "Cityscapes",
            CITYSCAPES_CLASSES,
            {
                "train": _cityscapes("train", stored_size=(512, 1024), published_count=2975),
                "val": _cityscapes("val", published_count=500, optional=True),
            },
        ),
        RawDataset(
            "deliver",
            "DELIVER",
            DELIVER_CLASSES,
            {
                "train": RawSplit(
                    "depth/{condition}/train/{sequence}/{frame}_depth_front.png",
                    stored_size=(712, 712),
                    published_count=3983,
                ),
                "test": RawSplit(
                    "depth/{condition}/test/{sequence}/{frame}_depth_front.png",
                    (
                        LabelFiles(
                            "semantic/{condition}/test/{sequence}/{frame}_semantic_front.png",
                            len(DELIVER_CLASSES) + 1,
                            deliver_class_ids,
                        ),
                    ),
                    published_count=1897,
                ),
            },
        ),
        RawDataset(
            "fmb",
            "FMB",
            FMB_CLASSES,
            {
                "train": RawSplit("train/Infrared/{frame}.png", stored_size=(512, 683), published_count=1220),
                "test": RawSplit(
                    "test/Infrared/{frame}.png",
                    (LabelFiles("test/Label/{frame}.png", len(FMB_CLASSES)),),
                    published_count=280,
                ),
            },
        ),
        RawDataset(
            "dsec",
            "DSEC",
            STREET_CLASSES,
            {
                "train": RawSplit(
                    "69mask_train_edges/{sequence}/{frame}.png",
                    stored_size=(512, 768),
                    first_frame=2,
                    frame_step=2,
                    published_count=4037,
                ),
                "test": RawSplit(
                    "69mask_test_edges/{sequence}/{frame}.png",
                    # As the published file lists name them, then as the official archives unpack.
                    tuple(
                        LabelFiles(f"{folder}/{{frame}}.png", len(STREET_CLASSES))
                        for folder in (
                            "test_semantic_labels/{sequence}/11classes",
                            "test_semantic_labels/{sequence}/11classes/data",
                            "test/{sequence}/11classes/data",
                        )
                    ),
                    # No events precede the first label, so the published selection leaves frame 0 out.
                    first_frame=1,
                    published_count=2806,
                ),
            },
        ),
    )
}  # fmt: skip
"""Dataset name -> layout. Stored sizes are the published training sizes; the published selections are those of the
MADM file lists (DELIVER and FMB: every file; DSEC: see the frame numbers)."""


def find_root(dataset: RawDataset, raw_dir: Path, any_layout: bool = False) -> Path:
    """Return the folder of `dataset`: `raw_dir/<its folder, any case>`, or `raw_dir` itself.

    With `any_layout` (files are listed by name) `raw_dir` will do even if it does not look like the dataset.

    Raises:
        UserError: neither is there; the message lists what was looked for and what was found.
    """
    if not raw_dir.is_dir():
        raise UserError(f"raw folder {raw_dir} does not exist; --raw_dir is the folder that holds {dataset.folder}/")
    children = sorted(child for child in raw_dir.iterdir() if not child.name.startswith("."))
    for child in children:
        if child.is_dir() and child.name.lower() == dataset.folder.lower():
            return child
    anchor = next(iter(dataset.splits.values())).images.split("{")[0].rstrip("/")
    if any_layout or (raw_dir / anchor).is_dir():
        return raw_dir
    found = ", ".join(child.name for child in children[:20]) or "nothing"
    raise UserError(
        f"{dataset.name} not found under {raw_dir}: looked for folders {dataset.folder}/ (any case) and {anchor}/; "
        f"found {found}. Give --raw_dir the folder that holds the official {dataset.folder} tree."
    )


def find_files(dataset: RawDataset, split: str, root: Path) -> list[RawFile]:
    """Return the files of the published selection of one split, sorted by path and checked to be in pairs.

    Raises:
        UserError: no image at all (unless the split is optional: then the list is empty), an image without label,
            or a label without image.
    """
    spec = dataset.splits[split]
    images = _scan(root, spec.images, spec)
    if not images:
        if spec.optional:
            return []
        raise UserError(
            f"{dataset.name} {split} is empty: no image matches {root}/{_glob(spec.images)}"
            + (f" with frames {_selection(spec)}" if (spec.first_frame, spec.frame_step) != (0, 1) else "")
            + f". Is the {split} part of the dataset unpacked there?"
        )
    labels = {}
    for label_files in reversed(spec.labels):
        labels.update({key: (path, label_files) for key, path in _scan(root, label_files.template, spec).items()})
    if spec.labels:
        _check_pairs(dataset, split, root, images, labels)
    files = []
    for key, path in images.items():
        label, label_files = labels.get(key, (None, None))
        fields = dict(key)
        files.append(
            RawFile(
                path,
                path.relative_to(root).as_posix(),
                fields.get("sequence", ""),
                fields.get("condition", ""),
                label,
                label_files,
            )
        )
    return files


def match_listed_file(dataset: RawDataset, split: str, root: Path, image: Path, label: Path | None) -> RawFile:
    """Return the `RawFile` of an image (and label) that a file list names; its path need not fit the layout."""
    spec = dataset.splits[split]
    inside = image.is_relative_to(root)
    file_name = image.relative_to(root).as_posix() if inside else image.as_posix()
    fields = _fields(spec.images, file_name)
    label_files = None
    if label is not None:
        fitting = (files for end, files in spec.label_endings().items() if label.name.endswith(end))
        label_files = next(fitting, spec.labels[0])
    return RawFile(image, file_name, fields.get("sequence", ""), fields.get("condition", ""), label, label_files)


def _glob(template: str) -> str:
    return re.sub(r"\{\w+\}", "*", template)


def _fields(template: str, path: str) -> dict[str, str]:
    """Values of the template's fields in `path`, empty when it does not fit."""
    parts = re.split(r"\{(\w+)\}", template)
    pattern = "".join(f"(?P<{part}>[^/]+)" if i % 2 else re.escape(part) for i, part in enumerate(parts))
    match = re.fullmatch(pattern, path)
    return match.groupdict() if match else {}


def _selection(spec: RawSplit) -> str:
    return f"{spec.first_frame:06d}, {spec.first_frame + spec.frame_step:06d}, ..."


def _scan(root: Path, template: str, spec: RawSplit) -> dict[tuple[tuple[str, str], ...], Path]:
    """Files that match `template` and the frame selection of `spec`, by their sorted field values."""
    found = {}
    for path in sorted(root.glob(_glob(template))):
        fields = _fields(template, path.relative_to(root).as_posix())
        if path.name.startswith(".") or not fields:
            continue
        if (spec.first_frame, spec.frame_step) != (0, 1):
            if not fields["frame"].isdecimal():
                continue
            offset = int(fields["frame"]) - spec.first_frame
            if offset < 0 or offset % spec.frame_step:
                continue
        found[tuple(sorted(fields.items()))] = path
    return found


def _check_pairs(dataset: RawDataset, split: str, root: Path, images: dict, labels: dict) -> None:
    spec = dataset.splits[split]
    alone = [key for key in images if key not in labels]
    if alone:
        expected = " or ".join(str(root / files.template.format(**dict(alone[0]))) for files in spec.labels)
        raise UserError(
            f"{dataset.name} {split}: {len(alone)} of {len(images)} images lack a label, first {images[alone[0]]}; "
            f"expected {expected}. Add the missing labels or remove these images."
        )
    alone = [key for key in labels if key not in images]
    if alone:
        expected = root / spec.images.format(**dict(alone[0]))
        raise UserError(
            f"{dataset.name} {split}: {len(alone)} of {len(labels)} labels lack an image, "
            f"first {labels[alone[0]][0]}; expected {expected}. Add the missing images or remove these labels."
        )
