"""Pictures of single images of an evaluation, kept small until they are written: input, label, prediction, errors."""

import heapq
import io
import re
import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from madm_utils.label_spaces import IGNORE_INDEX
from madm_utils.tasks import Task
from madm_utils.transforms import resize_image
from madm_utils.visualization import colorize, picture_grid

MAX_SIDE = 640
"""Longer side of a picture in pixels; what is larger is reduced."""
NUM_WORST = 10
NOT_LABELLED, CORRECT, WRONG = (0, 0, 0), (225, 225, 225), (213, 94, 0)
"""Colours of an error map, told apart by their lightness alone."""
PICTURE_NAME = re.compile(r"(\d\d_)?\d{5}_.+\.png")
"""Of the files written by this suite among those of the user."""


@dataclass(frozen=True)
class Sample:
    """One image of an evaluation, compressed."""

    index: int
    file_name: str
    size: tuple[int, int]
    """Height and width of all three pictures."""
    image: bytes
    """WebP."""
    label: bytes
    """zlib of the uint8 class ids, row by row; 255 = ignore."""
    prediction: bytes
    """The same."""

    @classmethod
    def of(cls, index: int, file_name: str, image: Tensor, label: Tensor, prediction: Tensor) -> "Sample":
        """Compress image (3, H, W) uint8, label and prediction (h, w) class ids; all get the size of the label."""
        height, width = label.shape
        factor = min(1, MAX_SIDE / max(height, width))
        size = (max(1, round(height * factor)), max(1, round(width * factor)))
        file = io.BytesIO()
        pixels = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        resize_image(pixels, size).save(file, format="WEBP", quality=85)
        rows, columns = (
            ((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size, label.shape, strict=True)
        )
        maps = (ids.cpu().numpy().astype(np.uint8)[rows][:, columns] for ids in (label, prediction))
        return cls(index, file_name, size, file.getvalue(), *(zlib.compress(ids.tobytes()) for ids in maps))

    def pixels(self) -> np.ndarray:
        """The input, uint8 (H, W, 3)."""
        return np.asarray(Image.open(io.BytesIO(self.image)).convert("RGB"))

    def ids(self, compressed: bytes) -> np.ndarray:
        """Class ids of `label` or `prediction`, uint8 (H, W)."""
        return np.frombuffer(zlib.decompress(compressed), np.uint8).reshape(self.size)

    def picture_name(self) -> str:
        """Name of a picture file, in the order of the split."""
        return f"{self.index:05d}_{re.sub(r'[^A-Za-z0-9_-]+', '_', Path(self.file_name).stem)}.png"


class SampleKeeper:
    """Chooses while an evaluation runs: the images asked for, and those with the lowest IoU so far."""

    def __init__(self, wanted: Collection[int]):
        self._wanted = frozenset(wanted)
        self._kept: dict[int, Sample] = {}
        self._worst: list[tuple[float, int, Sample]] = []
        """Heap whose first entry is the best of the worst: IoU and index are negative."""

    def offer(self, iou: float, index: int, file_name: str, image: Tensor, label: Tensor, prediction: Tensor) -> None:
        """Look at an image: IoU (NaN: none of its pixels is labelled), and what `Sample.of` takes."""
        wanted = index in self._wanted
        key = (-iou, -index)
        worst = not np.isnan(iou) and (len(self._worst) < NUM_WORST or key > self._worst[0][:2])
        if not wanted and not worst:
            return
        sample = Sample.of(index, file_name, image, label, prediction)
        if wanted:
            self._kept[index] = sample
        if worst:
            heapq.heappush(self._worst, (*key, sample))
            if len(self._worst) > NUM_WORST:
                heapq.heappop(self._worst)

    def samples(self) -> dict[int, Sample]:
        """All that are kept, by index."""
        return self._kept | {sample.index: sample for _, _, sample in self._worst}


def sample_grid(sample: Sample, task: Task, title: str, errors: bool = False) -> Image.Image:
    """Input, label and prediction of an image side by side, with `errors` also where they differ."""
    label, prediction = sample.ids(sample.label), sample.ids(sample.prediction)
    pictures = [sample.pixels(), colorize(label, task.palette), colorize(prediction, task.palette)]
    legend = dict(zip(task.class_names, task.palette, strict=True)) | {"not labelled": NOT_LABELLED}
    captions = ["input", "label", "prediction"]
    if errors:
        pictures.append(error_map(label, prediction))
        captions.append("errors")
        legend |= {"correct": CORRECT, "wrong": WRONG}
    return picture_grid([pictures], captions, [title], legend)


def error_map(label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Class ids (H, W) of both -> uint8 (H, W, 3) in the three colours of this module."""
    state = np.where(label == prediction, 1, 2)
    state[label == IGNORE_INDEX] = 0
    return np.array([NOT_LABELLED, CORRECT, WRONG], np.uint8)[state]


def evenly_spread(num_images: int, count: int) -> set[int]:
    """`count` indices of 0..num_images - 1 with equal steps, first and last included; fewer when there are fewer."""
    return set(np.linspace(0, num_images - 1, min(count, num_images)).round().astype(int).tolist())


def save_grids(folder: Path, samples: Iterable[tuple[str, Sample]], task: Task, errors: bool = False) -> None:
    """Write one PNG per sample into the new folder `folder`; samples come with a line that says what they are.

    With `errors`, names begin with the place of the sample in the list, 01 to 99.
    """
    folder.mkdir()
    for place, (title, sample) in enumerate(samples, start=1):
        rank = f"{place:02d}_" if errors else ""
        with open(folder / f"{rank}{sample.picture_name()}", "wb") as file:
            sample_grid(sample, task, title, errors).save(file, format="PNG")
