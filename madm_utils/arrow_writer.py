"""Conversion of raw or drawn images to the prepared Arrow data, with class statistics counted in the same pass."""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from madm_utils.cli import UserError
from madm_utils.label_spaces import STREET_CLASSES, check_label_ids, class_pixel_counts
from madm_utils.prepared_data import Metadata
from madm_utils.raw_datasets import RAW_DATASETS, RawFile
from madm_utils.transforms import resize_image, resize_label

PNG_COMPRESSION = 3
"""zlib level of the PNG files written: about a third of the default's time, a few percent larger."""
ROWS_IN_MEMORY = 16
"""Rows a writing process holds before they go to disk; a native Cityscapes image is about 2.5 MB."""
STATISTICS_FILE = "sample_class_stats.json"
IMAGES_PER_PROCESS = 16
"""No further process is started for fewer images than this."""


@dataclass(frozen=True)
class SplitPlan:
    """A split that is to be written: what it is called, and how each of its items becomes a row."""

    dataset: str
    split: str
    class_names: tuple[str, ...]
    labelled: bool
    items: Sequence[Any]
    convert: Callable[[Any], dict[str, Any]]
    """Picklable; item -> row, with `height` and `width` of the stored image."""
    fingerprint: str
    resized: bool = False
    root: Path | None = None
    """Raw folder of the dataset; `None` for drawn images."""


def plan_raw_split(dataset: str, split: str, root: Path, files: Sequence[RawFile]) -> SplitPlan:
    """Plan the conversion of `files`, found in the dataset's folder `root`, as they are stored for this split."""
    spec = RAW_DATASETS[dataset].splits[split]
    class_names = RAW_DATASETS[dataset].class_names
    identity = [[f.file_name, f.image.stat().st_size, *([f.label.name] if f.label else [])] for f in files]
    return SplitPlan(
        dataset,
        split,
        class_names,
        bool(spec.labels),
        files,
        partial(convert_raw_file, num_classes=len(class_names), stored_size=spec.stored_size),
        _digest(dataset, split, class_names, spec.stored_size, identity),
        spec.stored_size is not None,
        root,
    )


def plan_synthetic_split(modality: str, split: str, labelled: bool, count: int, seed: int, side: int) -> SplitPlan:
    """Plan `count` procedural street scenes of `side` x `side` pixels; `seed` and `split` decide what they show."""
    from madm_utils.scenes import scene_seed

    return SplitPlan(
        f"synthetic_{modality}",
        split,
        STREET_CLASSES,
        labelled,
        [(index, scene_seed(seed, split, modality, index)) for index in range(count)],
        partial(convert_scene, split=split, modality=modality, side=side, labelled=labelled),
        _digest(modality, split, labelled, count, seed, side),
    )


def write_split(plan: SplitPlan, folder: Path, cache_dir: Path, num_proc: int = 1) -> Metadata:
    """Convert every item of `plan` and write the split into `folder`; intermediate files go to `cache_dir`.

    Rows are streamed to disk, so memory does not grow with the number of images.

    Raises:
        UserError: an image or label that cannot be used; the message names the file.
    """
    import datasets

    columns = {name: datasets.Value("string") for name in ("file_name", "sequence", "condition")}
    columns["image"] = datasets.Image()
    if plan.labelled:
        columns["label"] = datasets.Image()
        columns["class_pixel_counts"] = datasets.List(datasets.Value("int64"))
    sizes = {name: datasets.Value("int32") for name in ("height", "width")}
    cache_dir.mkdir(parents=True, exist_ok=True)
    num_proc = min(num_proc, -(-len(plan.items) // IMAGES_PER_PROCESS))
    rows = datasets.Dataset.from_dict({"index": range(len(plan.items))}).map(
        _convert_indexed,
        fn_kwargs={"items": plan.items, "convert": plan.convert},
        remove_columns="index",
        features=datasets.Features({**columns, **sizes}),
        cache_file_name=str(cache_dir / f"{plan.dataset}-{plan.split}.arrow"),
        load_from_cache_file=False,
        writer_batch_size=ROWS_IN_MEMORY,
        num_proc=num_proc if num_proc > 1 else None,
        # Given, because computing it would pickle and hash every item; it also makes the state file reproducible.
        new_fingerprint=plan.fingerprint,
        desc=f"{plan.dataset} {plan.split}",
    )
    stored_sizes = set(zip(rows["height"][:], rows["width"][:], strict=True))
    totals = np.sum(rows["class_pixel_counts"][:], axis=0).tolist() if plan.labelled else None
    rows.remove_columns(list(sizes)).save_to_disk(str(folder))
    metadata = Metadata(
        plan.dataset,
        plan.split,
        plan.class_names,
        len(rows),
        stored_sizes.pop() if len(stored_sizes) == 1 else None,
        tuple(totals) if plan.labelled else None,
        plan.fingerprint,
        plan.resized,
    )
    metadata.save(folder)
    return metadata


def convert_raw_file(file: RawFile, num_classes: int, stored_size: tuple[int, int] | None) -> dict[str, Any]:
    """Row of one raw image: 8-bit grey or RGB at `stored_size` (native for `None`), with its label if it has one.

    Raises:
        UserError: unreadable file, label of another size, or class ids outside the dataset's map.
    """
    image = _to_8_bit(_read(file.image), file.image)
    stored = resize_image(image, stored_size or image.size[::-1])
    kept = stored is image and image.format == "PNG"  # neither converted nor resized: keep the file as it is
    row = {
        "file_name": file.file_name,
        "sequence": file.sequence,
        "condition": file.condition,
        "image": {"bytes": file.image.read_bytes() if kept else encode_png(stored), "path": None},
        "height": stored.height,
        "width": stored.width,
    }
    if file.label is not None:
        raw = _read(file.label)
        if raw.size != image.size:
            raise UserError(
                f"{file.label}: label is {raw.width}x{raw.height} pixels but its image {file.image} is "
                f"{image.width}x{image.height}; they must have the same size"
            )
        ids = _label_ids(raw, file.label)
        check_label_ids(ids, file.label_files.num_ids, file.label)
        label = file.label_files.convert(ids) if file.label_files.convert else ids
        row["label"] = {"bytes": encode_png(resize_label(Image.fromarray(label), stored.size[::-1])), "path": None}
        row["class_pixel_counts"] = class_pixel_counts(label, num_classes)
    return row


def convert_scene(item: tuple[int, int], split: str, modality: str, side: int, labelled: bool) -> dict[str, Any]:
    """Row of one procedural scene; `item` is (index, seed of the scene)."""
    from madm_utils.scenes import render_scene

    index, seed = item
    image, label = render_scene(seed, modality, side, side)
    row = {
        "file_name": f"{split}/{index:06d}.png",
        "sequence": "",
        "condition": "",
        "image": {"bytes": encode_png(Image.fromarray(image)), "path": None},
        "height": image.shape[0],
        "width": image.shape[1],
    }
    if labelled:
        row["label"] = {"bytes": encode_png(Image.fromarray(label)), "path": None}
        row["class_pixel_counts"] = class_pixel_counts(label, len(STREET_CLASSES))
    return row


def check_published_statistics(plan: SplitPlan, folder: Path) -> Path | None:
    """Compare the counts of the split in `folder` with DAFormer's statistics in the raw folder, if they are there.

    Label files are matched by name, labelIds with their labelTrainIds version. Entries of other files are ignored.

    Returns:
        The file that agrees, `None` if there was nothing to compare.

    Raises:
        UserError: the file cannot be read, or it differs; the message names the first file that does.
    """
    path = plan.root / STATISTICS_FILE if plan.root and plan.labelled and plan.split == "train" else None
    if path is None or not path.is_file():
        return None
    import datasets

    def base_name(label: str) -> str:
        return label.replace("\\", "/").rsplit("/", 1)[-1].replace("_labelIds", "_labelTrainIds")

    try:
        published = {
            base_name(entry["file"]): {int(key): int(count) for key, count in entry.items() if key != "file"}
            for entry in json.loads(path.read_text(encoding="utf-8"))
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as class statistics ({error}); repair it or remove it") from None
    rows = datasets.load_from_disk(str(folder))["class_pixel_counts"]
    for file, counts in zip(plan.items, rows, strict=True):
        counted = {class_id: count for class_id, count in enumerate(counts) if count}
        found = published.get(base_name(file.label.name))
        if found is None or {key: count for key, count in found.items() if count} != counted:
            raise UserError(
                f"{path} disagrees with {file.label}: it says {'nothing' if found is None else found}, the label has "
                f"{counted} (trainId: pixels). The labels changed since it was made: remove it, or restore the labels."
            )
    return path


def encode_png(image: Image.Image) -> bytes:
    """Encode losslessly as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=PNG_COMPRESSION)
    return buffer.getvalue()


def _convert_indexed(row: dict[str, int], items: Sequence[Any], convert: Callable) -> dict[str, Any]:
    return convert(items[row["index"]])


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _read(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
        return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path} cannot be read as an image ({error}); the file is damaged or not an image: copy it again"
        ) from None


def _to_8_bit(image: Image.Image, path: Path) -> Image.Image:
    """Grey stays grey, everything else becomes RGB; alpha is dropped."""
    if image.mode in ("L", "RGB"):
        return image
    if image.mode in ("1", "LA"):
        return image.convert("L")
    if image.mode in ("P", "RGBA"):
        return image.convert("RGB")
    raise UserError(
        f"{path}: image mode {image.mode} is not supported; expected 8-bit grey or RGB (with or without alpha)"
    )


def _label_ids(label: Image.Image, path: Path) -> np.ndarray:
    """uint8 (H, W) ids of a label image: its only channel, or the red one."""
    values = np.asarray(label)
    ids = values[..., 0] if values.ndim == 3 else values
    if ids.dtype != np.uint8:
        if ids.min() < 0 or ids.max() > 255:
            raise UserError(f"{path}: label holds values {ids.min()}..{ids.max()}; expected 8-bit class ids")
        ids = ids.astype(np.uint8)
    return ids
