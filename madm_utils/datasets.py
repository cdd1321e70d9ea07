"""What training and evaluation read: pairs of source and target crops, and labelled target images."""

import logging
import random
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate

from madm_utils.augmentations import label_classes
from madm_utils.cli import UserError
from madm_utils.label_spaces import IGNORE_INDEX, lookup_table
from madm_utils.prepared_data import Metadata, UndecodableImage, decode_image, open_split
from madm_utils.remote_data import DataError, RemoteFolder, list_folders, locate
from madm_utils.sampling import RareClassSampler, evenly_spaced
from madm_utils.split_rows import ParquetRows
from madm_utils.tasks import TASKS, LabelMap, Task
from madm_utils.transforms import Crop, apply_crop, draw_crop, resize_image, resize_label

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)
_MAX_ATTEMPTS = 100
"""Draws of one item before the data as a whole counts as unreadable."""
PROTOCOLS = ("paper", "native")


class CorruptDataError(DataError):
    """Images that cannot be decoded."""


class AdaptationDataset(Dataset):
    """Random training crops: a labelled source image and an unlabelled target image.

    Item `k` is a function of (seed, k) and the prepared data alone, whatever the number of workers or processes.
    Draws per item (MADM, section Data): index, [class and image of rare-class sampling], flip, x, y of the source,
    flip, x, y of the target. A rare-class crop that shows too little of its class is drawn again, flip included. When
    an image or label cannot be decoded, the item is drawn anew, from a stream of (seed, k, attempt).

    Items: `source_image` uint8 (3, R, R), `source_label` int64 (R, R) in task ids with 255 = ignore, with `target`
    also `target_image` uint8 (3, R, R), and `corrupt`, one `dataset/split file (reason)` per image that was replaced.

    Args:
        data_dir: prepared data, as `prepare_datasets.py` wrote or uploaded it: a folder, a dataset on the Hub, or an
            address of fsspec.
        resolution: side R of the crops; the images are resized to the sizes of the task scaled to it.
        num_samples: length of the dataset, e.g. steps x batch.
        max_train_samples: use at most this many source and target images, evenly spaced.
        target: `False` reads no target data (training on the source only).
        streaming: of data that are elsewhere, fetch images when they are drawn, instead of downloading all first.

    Raises:
        UserError: the data is not prepared, cannot be reached, does not fit the task, or offers nothing to rare-class
            sampling.
    """

    def __init__(
        self,
        data_dir: str | Path,
        task: Task,
        resolution: int,
        num_samples: int,
        seed: int,
        rare_class_sampling: bool = True,
        rare_class_temperature: float = 0.01,
        rare_class_min_pixels: int = 3000,
        max_train_samples: int | None = None,
        target: bool = True,
        streaming: bool = False,
    ):
        self.resolution, self.num_samples, self.seed = resolution, num_samples, seed
        self.source_size = task.scaled_size(task.source_size, resolution)
        self.target_size = task.scaled_size(task.target_size, resolution)
        root = locate(data_dir)
        source, metadata = open_task_split(root, task, task.source, "train", labelled=True, streaming=streaming)
        # Of the type of the result, so that looking up makes the only copy of a label.
        self._label_table = label_table(metadata, task, task.source_label_map, "source_label_map").astype(np.int64)
        warn_if_enlarged(metadata, self.source_size)
        source = source.select(evenly_spaced(len(source), max_train_samples))
        self.sampler = None
        if rare_class_sampling:
            counts = np.array(source["class_pixel_counts"][:], np.int64)
            self.sampler = RareClassSampler(counts, rare_class_temperature, rare_class_min_pixels)
        self._source = source.select_columns(["image", "label", "file_name"])
        self.fingerprints = {f"{task.source}/train": metadata.fingerprint}
        """Dataset and split -> digest of the files it was prepared from."""
        self._target = None
        if target:
            images, metadata = open_task_split(root, task, task.target, "train", labelled=False, streaming=streaming)
            warn_if_enlarged(metadata, self.target_size)
            self.fingerprints[f"{task.target}/train"] = metadata.fingerprint
            images = images.select(evenly_spaced(len(images), max_train_samples))
            self._target = images.select_columns(["image", "file_name"])
        self._names = (f"{task.source}/train", f"{task.target}/train")

    @property
    def num_source(self) -> int:
        """Labelled source images."""
        return len(self._source)

    @property
    def num_target(self) -> int:
        """Target images; 0 when training on the source only."""
        return 0 if self._target is None else len(self._target)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, k: int) -> dict[str, Any]:
        if not 0 <= k < self.num_samples:
            raise IndexError(f"sample {k} of {self.num_samples}")
        corrupt: list[str] = []
        for attempt in range(_MAX_ATTEMPTS):
            rng = random.Random(f"{self.seed}-{k}-{attempt}" if attempt else f"{self.seed}-{k}")
            try:
                return {**self._draw(rng), "corrupt": corrupt}
            except UndecodableImage as error:
                if str(error) not in corrupt:
                    corrupt.append(str(error))
        raise CorruptDataError(
            f"{_MAX_ATTEMPTS} draws in a row met images that cannot be decoded; prepare the data again: "
            f"{'; '.join(corrupt)}"
        )

    def _draw(self, rng: random.Random) -> dict[str, torch.Tensor]:
        pair = rng.randrange(self.num_source * max(1, self.num_target))
        image, label = self._source_crop(rng, pair % self.num_source)
        sample = {"source_image": _to_chw(image), "source_label": torch.from_numpy(label)}
        if self._target is not None:
            sample["target_image"] = _to_chw(self._target_crop(rng, pair % self.num_target))
        return sample

    def _source_crop(self, rng: random.Random, index: int) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (R, R, 3) image and int64 (R, R) label in task ids; rare-class sampling replaces `index`."""
        side, class_id = self.resolution, None
        if self.sampler is not None:
            class_id, index = self.sampler.draw(rng)
        image, label = _decode_row(self._source[index], self._names[0])
        image = resize_image(image, self.source_size)
        label = np.asarray(resize_label(label, self.source_size))
        crop = draw_crop(rng, self.source_size, side)
        if class_id is not None:
            for _ in range(self.sampler.max_crops):
                if self.sampler.accepts(apply_crop(label, crop, side), class_id):
                    break
                crop = draw_crop(rng, self.source_size, side)
        return _cropped(image, crop, side), np.take(self._label_table, apply_crop(label, crop, side))

    def _target_crop(self, rng: random.Random, index: int) -> np.ndarray:
        image, _ = _decode_row(self._target[index], self._names[1])
        crop = draw_crop(rng, self.target_size, self.resolution)
        return _cropped(resize_image(image, self.target_size), crop, self.resolution)

    @staticmethod
    def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Batch of samples: tensors stacked, `corrupt` as one list, and `source_classes` of `label_classes`.

        The latter is an array, which nobody moves to a device.
        """
        tensors = [{key: value for key, value in sample.items() if key != "corrupt"} for sample in samples]
        classes = label_classes(sample["source_label"] for sample in samples)
        corrupt = [name for sample in samples for name in sample["corrupt"]]
        return {**default_collate(tensors), "source_classes": classes, "corrupt": corrupt}


class EvaluationDataset(Dataset):
    """Labelled images of the target dataset, whole.

    Items: `image` uint8 (3, R, R), squeezed to `resolution`, or of the size stored, (3, h, w); `label` uint8 (h, w) in
    task ids with 255 = ignore, R x R by NEAREST for protocol "paper" (MADM, section Data) and native size for
    "native"; `index`; the texts `condition` and `sequence` of the prepared data.

    Args:
        data_dir, streaming: see `AdaptationDataset`.
        task: gives dataset and label map.
        split: e.g. `test`.
        resolution: side R of the images; `None` leaves them at the size stored.
        protocol: `paper` or `native`.

    Raises:
        UserError: unknown protocol, unprepared or unlabelled split, labels that do not fit the task, or, from an
            item, an image or label that cannot be decoded.
    """

    def __init__(
        self,
        data_dir: str | Path,
        task: Task,
        split: str,
        resolution: int | None,
        protocol: str = "paper",
        streaming: bool = False,
    ):
        if protocol not in PROTOCOLS:
            raise UserError(f"unknown protocol '{protocol}'; protocols: {', '.join(PROTOCOLS)}")
        if protocol == "paper" and resolution is None:
            raise UserError("protocol 'paper' scores whole images at the training resolution; use protocol 'native'")
        self.size = None if resolution is None else (resolution, resolution)
        self.protocol = protocol
        data, metadata = open_task_split(data_dir, task, task.target, split, labelled=True, streaming=streaming)
        self.fingerprint = metadata.content or metadata.fingerprint
        """Equal for equal images and labels."""
        self._label_table = label_table(metadata, task, task.target_label_map, "target_label_map")
        self._file_names, self._name = data["file_name"][:], f"{task.target}/{split}"
        self._data = data.select_columns(["image", "label", "file_name", "condition", "sequence"])

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._data[index]
        try:
            image, label = _decode_row(row, self._name)
        except UndecodableImage as error:
            raise CorruptDataError(f"cannot be decoded: {error}; prepare the data again") from None
        if self.size is not None:
            image = resize_image(image, self.size)
        if self.protocol == "paper":
            label = resize_label(label, self.size)
        return {
            "image": _to_chw(np.asarray(image)),
            "label": torch.from_numpy(np.take(self._label_table, np.asarray(label))),
            "index": index,
            "condition": row["condition"],
            "sequence": row["sequence"],
        }

    def file_name(self, index: int) -> str:
        """Path of image `index` inside the raw dataset."""
        return self._file_names[index]

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Batch of samples: `image` stacked to (B, 3, R, R) where the images have one size, all others as lists."""
        batch = {key: [sample[key] for sample in samples] for key in samples[0]}
        if self.size is not None:
            batch["image"] = torch.stack(batch["image"])
        return batch


def open_task_split(
    data_dir: str | Path | RemoteFolder,
    task: Task,
    dataset: str,
    split: str,
    labelled: bool,
    streaming: bool = False,
) -> tuple["datasets.Dataset | ParquetRows", Metadata]:
    """Open one prepared split of a task.

    Raises:
        UserError: it is missing (the message names the command that prepares it), empty, or lacks labels.
    """
    root = locate(data_dir)
    parent, folder = root / dataset, root / dataset / split
    there = list_folders(parent)
    if split not in there:
        found = f"{parent} holds the splits {', '.join(there)}" if there else f"{parent} holds no split"
        which = f"--task {task.name}" if task.name in TASKS else "--task_config FILE"
        raw = "" if dataset.startswith("synthetic_") else " --raw_dir RAW_DIR"
        local = isinstance(root, Path)
        where = shlex.quote(str(root)) if local else "DIR --push_to_hub --hub_dataset_id USER/NAME, or copy DIR there"
        raise UserError(
            f"prepared data {folder} does not exist ({found}). Prepare it: "
            f"python prepare_datasets.py {which}{raw} --output_dir {where}"
        )
    data, metadata = open_split(folder, streaming)
    if not len(data):
        raise UserError(f"{folder} holds no image; prepare it again")
    if labelled and not metadata.labelled:
        raise UserError(f"{folder} holds images without labels; a labelled split is needed here")
    return data, metadata


def warn_if_enlarged(metadata: Metadata, size: tuple[int, int]) -> None:
    """Say so when training asks for more pixels than are stored."""
    stored = metadata.image_size
    if stored is not None and (stored[0] < size[0] or stored[1] < size[1]):
        logger.warning(
            f"{metadata.dataset} {metadata.split} is stored at {stored[0]}x{stored[1]} and enlarged to "
            f"{size[0]}x{size[1]} for this --resolution"
        )


def label_table(metadata: Metadata, task: Task, label_map: LabelMap | None, field: str) -> np.ndarray:
    """uint8 table of 256 entries from the class ids of a prepared dataset to those of the task.

    Raises:
        UserError: the map leaves a class of the dataset outside the task's classes.
    """
    table = lookup_table(label_map)
    num_classes = len(metadata.class_names)
    outside = [i for i in range(num_classes) if task.num_classes <= table[i] < IGNORE_INDEX]
    if outside:
        raise UserError(
            f"task {task.name}: {field} leaves class ids {outside} of dataset {metadata.dataset} "
            f"({', '.join(metadata.class_names[i] for i in outside)}) outside the task's 0..{task.num_classes - 1}; "
            f"map them to a class or to {IGNORE_INDEX} (ignore)"
        )
    return table


def _decode_row(row: dict[str, Any], split: str) -> tuple[Image.Image, Image.Image | None]:
    """RGB image and, where the row has one, label of a row of the split `dataset/split`.

    Raises:
        UndecodableImage: one of them is damaged, or they do not fit together; names split and file.
    """
    try:
        image = decode_image(row["image"])
        image = image if image.mode == "RGB" else image.convert("RGB")
        label = decode_image(row["label"]) if "label" in row else None
        if label is not None and (label.size != image.size or label.mode != "L"):
            raise UndecodableImage(f"label of {label.size} in mode {label.mode} for an image of {image.size}")
    except UndecodableImage as error:
        raise UndecodableImage(f"{split} {row['file_name']} ({error})") from None
    return image, label


def _cropped(image: Image.Image, crop: Crop, side: int) -> np.ndarray:
    """uint8 (side, side, 3): `apply_crop` for an image of which no more than the crop becomes an array."""
    pixels = np.asarray(image.crop((crop.left, crop.top, crop.left + side, crop.top + side)))
    return apply_crop(pixels, Crop(crop.flip, 0, 0), side)


def _to_chw(image: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) array -> contiguous uint8 (3, H, W) tensor."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
