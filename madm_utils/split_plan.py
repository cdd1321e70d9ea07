"""What a split is going to be: its items, how each becomes a row, and digests that tell equal work."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from madm_utils.conversion import PublishedStatistics, RawConversion, SceneConversion
from madm_utils.label_spaces import STREET_CLASSES
from madm_utils.raw_files import RawPath
from madm_utils.raw_search import RawDataset, RawFile
from madm_utils.transforms import Size

CHUNK_SIZES = (16, 64)
"""Fewest and most images of an Arrow file; in between a split becomes `CHUNKS` files. Every machine cuts it alike."""
CHUNKS = 48
CONVERSION = 1
"""Part of every fingerprint; to be increased when the same files and settings come to give other rows."""


@dataclass(frozen=True)
class SplitPlan:
    """A split that is to be written: what it is called, and how each of its items becomes a row."""

    dataset: str
    split: str
    class_names: tuple[str, ...]
    labelled: bool
    items: Sequence[Any]
    convert: Callable[[Any, Path], dict[str, Any]]
    """Picklable; (item, scratch folder) -> row, with `height` and `width` of the stored image."""
    identities: Sequence[Any]
    """What each item's row depends on beside `settings`, as JSON values that are equal on every machine."""
    stamps: Sequence[Any] = ()
    """Of each item, what changes on this machine when its files are written again; compared in work in progress."""
    settings: dict[str, Any] = field(default_factory=dict)
    resized: bool = False
    events: bool = False
    """Whether rows have an `events` column."""
    licence: dict[str, Any] | None = None

    @property
    def fingerprint(self) -> str:
        """Digest of all items and of how they are converted."""
        return json_digest(self.head(), list(self.identities))

    def chunks(self) -> list[range]:
        """Positions of the items of each chunk."""
        count = len(self.items)
        size = min(max(CHUNK_SIZES[0], -(-count // CHUNKS)), CHUNK_SIZES[1])
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def describe(self) -> dict[str, Any]:
        """What `publish_split` needs to know, as JSON values; it does without the raw files."""
        return {
            **self.head(),
            "labelled": self.labelled,
            "events": self.events,
            "resized": self.resized,
            "licence": self.licence,
            "fingerprint": self.fingerprint,
            "num_items": len(self.items),
            "chunks": [self.chunk_digest(chunk) for chunk in self.chunks()],
        }

    def chunk_digest(self, chunk: range) -> str:
        """Digest of the items of a chunk and of how they are converted."""
        return json_digest(self.head(), [self.identities[i] for i in chunk])

    def chunk_stamp(self, chunk: range) -> str:
        """Digest of the `stamps` of a chunk."""
        return json_digest([self.stamps[i] for i in chunk] if self.stamps else [])

    def head(self) -> dict[str, Any]:
        return {
            "dataset": self.dataset,
            "split": self.split,
            "class_names": list(self.class_names),
            "settings": self.settings,
            "conversion": CONVERSION,
        }


def plan_raw_split(
    dataset: RawDataset,
    split: str,
    files: Sequence[RawFile],
    stored_size: Size | None,
    settings: dict[str, Any],
    image_range: tuple[float, float] | None = None,
    published: PublishedStatistics | None = None,
) -> SplitPlan:
    """Plan the conversion of `files`, the selected ones of one split, to `stored_size` (native for `None`)."""
    labelled = any(file.label is not None for file in files)
    return SplitPlan(
        dataset.name,
        split,
        dataset.class_names,
        labelled,
        files,
        RawConversion(len(dataset.class_names), stored_size, image_range, published),
        [_identity(file) for file in files],
        [_stamp(file) for file in files],
        {**settings, "stored_size": None if stored_size is None else list(stored_size)},
        stored_size is not None,
        any(file.events is not None for file in files),
        None if dataset.licence is None else asdict(dataset.licence),
    )


def plan_synthetic_split(modality: str, split: str, labelled: bool, count: int, seed: int, side: int) -> SplitPlan:
    """Plan `count` procedural street scenes of `side` x `side` pixels; `seed` and `split` decide what they show."""
    from madm_utils.scenes import scene_seed

    items = [(index, scene_seed(seed, split, modality, index)) for index in range(count)]
    return SplitPlan(
        f"synthetic_{modality}",
        split,
        STREET_CLASSES,
        labelled,
        items,
        SceneConversion(split, modality, side, labelled),
        items,
        (),
        {"seed": seed, "resolution": side, "labelled": labelled},
    )


def _identity(file: RawFile) -> list[Any]:
    """What the row of a raw file depends on: names and sizes of the files, windows of events."""

    def of(source: Any) -> Any:
        return source.size if isinstance(source, RawPath) else source.identity()

    parts = [file.file_name, of(file.image)]
    if file.label is not None:
        parts += [file.label.name, file.label.size]
    if file.events is not None:
        parts.append(of(file.events))
    return parts


def _stamp(file: RawFile) -> list[int]:
    """When the files behind a raw file were last written, in nanoseconds."""
    sources = [file.image, file.label, file.events]
    sources += [source.rectify_map for source in sources if source is not None and not isinstance(source, RawPath)]
    paths = [source if isinstance(source, RawPath) else source.events for source in sources if source is not None]
    return [path.container.stat().st_mtime_ns for path in paths]


def json_digest(*parts: Any) -> str:
    """Short digest of JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
