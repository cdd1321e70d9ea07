"""Looking at every image of a split, in worker processes: what it is, and what is wrong with it."""

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from madm_utils.arrow_writer import row_digest
from madm_utils.cli import UserError
from madm_utils.contact_sheet import Sample, make_sample
from madm_utils.conversion import PublishedStatistics
from madm_utils.label_spaces import IGNORE_INDEX
from madm_utils.prepared_data import Metadata, UndecodableImage, decode_image
from madm_utils.raw_datasets import RawFile
from madm_utils.raw_files import RawPath
from madm_utils.raw_labels import decode_label, read_image, to_8_bit
from madm_utils.workers import stopped, worker_pool, worker_state

if TYPE_CHECKING:
    import datasets

IMAGES_PER_TASK = 8
"""Images a worker process takes at a time."""


@dataclass
class Seen:
    """What one image showed; small, because it travels between processes."""

    file_name: str
    problems: list[tuple[str, str]] = field(default_factory=list)
    """(check, what is wrong)."""
    size: tuple[int, int] | None = None
    """(height, width), `None` when the image does not decode."""
    mode: str = ""
    digest: bytes = b""
    label_digest: bytes = b""
    constant: bool = False
    """Every pixel of the image has the same value."""
    unlabelled: bool = False
    """The label holds nothing but ignored pixels."""
    unknown_ids: tuple[int, ...] = ()
    """Ids in the label that its dataset does not have."""
    unknown_in: str = ""
    """The file that holds them, where it is not `file_name`."""
    row_digest: str = ""
    """Of the encoded bytes, as `Metadata.content` counts them."""
    counts: tuple[int, ...] | None = None
    """Labelled pixels per class at native resolution."""
    sample: Sample | None = None


def one_line(text: object) -> str:
    """Printable on any screen: no line breaks, no bytes of file names that are not text."""
    return " ".join(str(text).split()).encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass(frozen=True)
class PreparedRows:
    """Looks at one row of a prepared split; callable with its index, picklable."""

    data: "datasets.Dataset"
    metadata: Metadata
    labelled: bool
    sampled: frozenset[int]

    def __call__(self, index: int) -> Seen:
        row = self.data[index]
        seen = Seen(one_line(row.get("file_name") or f"image {index}"), row_digest=_row_digest(row))
        stored = row.get("class_pixel_counts")
        if self.labelled and stored and None not in stored and len(stored) == len(self.metadata.class_names):
            seen.counts = tuple(stored)
        image = self._decoded(seen, row["image"], "image")
        if image is None:
            return seen
        _look_at(seen, image)
        if self.metadata.image_size not in (None, seen.size):
            self._add(seen, "sizes", f"image is {seen.size} (height, width), expected {self.metadata.image_size}")
        label = self._label(seen, image, row) if self.labelled else None
        events = self._events(seen, row["events"]) if "events" in row else None
        if image.mode not in ("L", "RGB"):
            self._add(seen, "modes", f"image has mode {image.mode}, expected 8-bit grey (L) or RGB")
        elif index in self.sampled and (label or not self.labelled) and (events or "events" not in row):
            seen.sample = make_sample(seen.file_name, image, label, events)
        return seen

    def _label(self, seen: Seen, image: Image.Image, row: dict[str, Any]) -> Image.Image | None:
        label = self._decoded(seen, row["label"], "label")
        if label is None:
            return None
        if label.size != image.size or label.mode != "L":
            found = f"{label.size[::-1]} in mode {label.mode}"
            self._add(seen, "label size", f"label is {found}, expected {seen.size} in mode L")
            return None
        pixels = np.array(label.histogram())
        _look_at_label(seen, label.tobytes(), pixels, len(self.metadata.class_names))
        self._compare_counts(seen, pixels[: len(self.metadata.class_names)], row)
        return label

    def _compare_counts(self, seen: Seen, counted: np.ndarray, row: dict[str, Any]) -> None:
        """Compare what was counted in the label, (num_classes,), with the columns that say so."""
        if seen.counts is None:
            if "class_pixel_counts" in row:
                stored = row["class_pixel_counts"]
                self._add(seen, "counts", f"class_pixel_counts are {stored}, expected {len(counted)} numbers")
            seen.counts = tuple(counted.tolist())
            return
        stored, classes = np.array(seen.counts), row.get("classes")
        # A label that was made smaller or larger has other counts than the native one, but no class that one lacks.
        agree = not np.any(counted[stored == 0]) if self.metadata.resized else np.array_equal(stored, counted)
        if not agree:
            text = f"class_pixel_counts {stored.tolist()} do not fit the label, which has {counted.tolist()}"
            self._add(seen, "counts", text)
        elif classes is not None and sorted(classes) != np.flatnonzero(stored).tolist():
            self._add(seen, "counts", f"classes {classes} do not fit class_pixel_counts {stored.tolist()}")

    def _events(self, seen: Seen, cell: dict | None) -> Image.Image | None:
        events = self._decoded(seen, cell, "events")
        if events is None:
            return None
        height, width = seen.size
        if events.mode != "F" or events.width != width or events.height % height:
            expected = f"a multiple of {height} x {width} in mode F"
            self._add(seen, "events", f"events are {events.size[::-1]} in mode {events.mode}, expected {expected}")
            return None
        if not np.isfinite(np.asarray(events)).all():
            self._add(seen, "events", "events hold values that are not finite numbers")
        return events

    def _decoded(self, seen: Seen, cell: dict | None, what: str) -> Image.Image | None:
        try:
            return decode_image(cell)
        except UndecodableImage as error:
            self._add(seen, what, f"image or label does not decode ({what}: {error})")
        except Exception as error:  # damaged bytes raise whatever the decoder stumbles over
            self._add(seen, what, f"image or label does not decode ({what}: {type(error).__name__} {error})")
        return None

    @staticmethod
    def _add(seen: Seen, check: str, text: str) -> None:
        seen.problems.append((check, one_line(f"{seen.file_name}: {text}; prepare it again")))


@dataclass(frozen=True)
class RawImages:
    """Looks at one raw file; callable with (index, file), picklable."""

    class_names: tuple[str, ...]
    labelled: bool
    image_range: tuple[float, float] | None
    statistics: PublishedStatistics | None
    scratch: Path
    sampled: frozenset[int]

    def __call__(self, item: tuple[int, RawFile]) -> Seen:
        index, file = item
        seen = Seen(one_line(file.file_name))
        try:
            if isinstance(file.image, RawPath):
                image = to_8_bit(read_image(file.image), file.image, self.image_range)
            else:
                image = file.image.load(self.scratch)
            events = None if file.events is None else file.events.load_tensor(self.scratch)
        except UserError as error:
            seen.problems.append(("image", one_line(error)))
            return seen
        _look_at(seen, image)
        label = self._label(seen, file) if self.labelled else None
        if index in self.sampled and (label or not self.labelled):
            seen.sample = make_sample(seen.file_name, image, label, events)
        return seen

    def _label(self, seen: Seen, file: RawFile) -> Image.Image | None:
        if file.label is None:
            seen.problems.append(("pairs", one_line(f"{file.image} lacks a label")))
            return None
        try:
            ids = decode_label(file)
        except UserError as error:
            seen.unknown_ids, seen.unknown_in = _unknown_ids(file), one_line(file.label)
            if not seen.unknown_ids:
                seen.problems.append(("label", one_line(error)))
            return None
        height, width = seen.size
        if ids.shape != seen.size:
            text = f"{file.label}: label is {ids.shape[1]}x{ids.shape[0]} pixels but its image is {width}x{height}"
            seen.problems.append(("label size", one_line(text)))
            return None
        label = Image.fromarray(ids)
        pixels = np.array(label.histogram())
        _look_at_label(seen, ids.tobytes(), pixels, len(self.class_names))
        counts = pixels[: len(self.class_names)]
        seen.counts = tuple(counts.tolist())
        try:
            if self.statistics:
                self.statistics.compare(file, counts)
        except UserError as error:
            seen.problems.append(("statistics", one_line(error)))
        return label


def _unknown_ids(file: RawFile) -> tuple[int, ...]:
    """Ids of a label file outside its own map; none when it cannot be read at all."""
    try:
        ids = np.unique(file.label_files.decode(file.label))
    except UserError:
        return ()
    return tuple(int(i) for i in ids if i >= file.label_files.num_ids and i != IGNORE_INDEX)


def _row_digest(row: dict[str, Any]) -> str:
    """Digest of the row's bytes; empty where there are none."""
    try:
        return row_digest(row)
    except TypeError:
        return ""


def _look_at(seen: Seen, image: Image.Image) -> None:
    seen.size, seen.mode = image.size[::-1], image.mode
    bands = image.getextrema()
    seen.constant = all(low == high for low, high in (bands if isinstance(bands[0], tuple) else (bands,)))
    seen.digest = hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).digest()[:16]


def _look_at_label(seen: Seen, label: bytes, pixels: np.ndarray, num_classes: int) -> None:
    seen.label_digest = hashlib.sha256(label).digest()[:16]
    seen.unknown_ids = tuple(int(i) for i in np.flatnonzero(pixels) if i >= num_classes and i != IGNORE_INDEX)
    seen.unlabelled = pixels[IGNORE_INDEX] == pixels.sum()


# --- All images


def inspect_all(
    inspect: Callable[[Any], Seen], items: Sequence, num_proc: int, title: str
) -> Generator[Seen, None, None]:
    """Yield `inspect(item)` of all `items` in order, under a progress bar. Closing it ends the worker processes."""
    from tqdm import tqdm

    tasks = [items[start : start + IMAGES_PER_TASK] for start in range(0, len(items), IMAGES_PER_TASK)]
    with tqdm(total=len(items), desc=title, unit=" images") as bar:
        for results in _mapped(inspect, tasks, min(num_proc, len(tasks))):
            bar.update(len(results))
            yield from results


def _mapped(inspect: Callable[[Any], Seen], tasks: Sequence[Sequence], num_proc: int) -> Iterator[list[Seen]]:
    if num_proc < 2:
        yield from ([inspect(item) for item in task] for task in tasks)
        return
    waiting = deque()
    with worker_pool(num_proc, inspect) as pool:
        for task in tasks:
            waiting.append(pool.submit(_work, task))
            if len(waiting) > 2 * num_proc:  # few enough that memory does not grow with the split
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _work(task: Sequence) -> list[Seen]:
    """Look at the items of a task; what is left of it when the main process stops is missed by nobody."""
    inspect, found = worker_state(), []
    for item in task:
        if stopped():
            break
        found.append(inspect(item))
    return found
