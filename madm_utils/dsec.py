"""Finding the event recordings of DSEC-Semantic and of CMDA's night sequences, and the windows that become pictures.

Recordings, timestamps, images and labels are separate downloads that users unpack side by side, so each is looked for
by the name of its sequence, at any depth below the dataset's root.
"""

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from madm_utils.cli import UserError
from madm_utils.event_recording import close_recording, open_recording
from madm_utils.events import EventSettings, EventWindow
from madm_utils.raw_descriptions import RawDataset, RawFile, RawOptions
from madm_utils.raw_files import RawPath, RawTree

DSEC_SEQUENCES = {
    "train": tuple(f"zurich_city_{name}" for name in ("00_a", "01_a", "02_a", "04_a", "05_a", "06_a", "07_a", "08_a")),
    "test": tuple(f"zurich_city_{name}" for name in ("13_a", "14_c", "15_a")),
}
"""Sequences of DSEC-Semantic."""
LABEL_ROWS = 440
"""Labels of DSEC-Semantic show rows 0 to 439 of the 480."""
NIGHT_LAST_TEST_FRAMES = {
    f"zurich_city_09_{letter}": frame for letter, frame in {"a": 797, "b": 149, "c": 581, "d": 743, "e": 365}.items()
}
"""Night sequence -> last frame that CMDA does not train on."""
FIRST_NIGHT_FRAME = 2

_SEQUENCE = r"(?:.*/)?(?P<sequence>zurich_city_\d\d_[a-z])/"
_RECORDING = {
    "events/left/events.h5": _SEQUENCE + r"events/left/events\.h5",
    "events/left/rectify_map.h5": _SEQUENCE + r"events/left/rectify_map\.h5",
}
_SEMANTIC = r"(?:semantic/(?:left/)?)?"
_SEMANTIC_TIMESTAMPS = _SEQUENCE + _SEMANTIC + r"(?:(?:11|19)classes/)?(?!exposure)[^/]*timestamps[^/]*\.txt"
_SEMANTIC_LABEL = _SEQUENCE + _SEMANTIC + r"{number}classes/(?:data/)?(?P<frame>\d+)\.png"
_NIGHT_FILES = _RECORDING | {"images/timestamps.txt": _SEQUENCE + r"(?:images/)?(?:\w+_image_)?timestamps\.txt"}
_NIGHT_INDEX = _SEQUENCE + r"(?:images/)?images_to_events_index\.txt"
_NIGHT_IMAGE = _SEQUENCE + r"warp_images/(?P<frame>\d+)\.png"
_NIGHT_LABEL = r"(?:.*/)?(?P<sequence>zurich_city_09_[a-e])_(?P<frame>\d+)_grey_gtFine_labelTrainIds\.png"


def find_dsec_events(dataset: RawDataset, split: str, tree: RawTree, root: str, options: RawOptions) -> list[RawFile]:
    """Return the published selection of DSEC-Semantic as windows of its recordings, with labels in the test split.

    The window of frame i ends at line i of the timestamps and begins at line i - 1, or as long before as the settings
    say. A split without any of its files gives an empty list.

    Raises:
        UserError: a sequence is there in part; the message lists what is missing, and what was looked for.
    """
    spec, settings = dataset.splits[split], options.events or EventSettings()
    sequences = _Sequences(dataset, split, tree, root, DSEC_SEQUENCES[split])
    sequences.look_for(_RECORDING | {"<sequence>_semantic_timestamps.txt": _SEMANTIC_TIMESTAMPS}, settings.rectify)
    number = len(dataset.class_names)
    if spec.labels:
        sequences.look_for_frames(f"{number}classes/data/*.png", _SEMANTIC_LABEL.format(number=number))
    files = []
    for sequence, found in sequences.complete().items():
        recording = found["events/left/events.h5"]
        timestamps = read_timestamps(tree.files[found["<sequence>_semantic_timestamps.txt"]])
        labels = sequences.frames.get(sequence, {})
        selected = [frame for frame in range(1, len(timestamps)) if spec.selects(f"{frame:06d}")]
        if spec.labels and [frame for frame in labels if spec.selects(f"{frame:06d}")] != selected:
            raise UserError(
                f"{tree.files[found['<sequence>_semantic_timestamps.txt']]} has {len(timestamps)} timestamps, but the "
                f"labels of {sequence} are {len(labels)}, from {min(labels)} to {max(labels)}; they must be the "
                "frames 0, 1, ... of the timestamps: copy both again"
            )
        for frame in selected:
            window = _window(tree, found, timestamps, frame, settings, LABEL_ROWS)
            files.append(
                RawFile(
                    window,
                    f"{recording.removeprefix(root).removesuffix('events.h5')}{frame:06d}.png",
                    sequence,
                    f"{frame:06d}",
                    spec.condition,
                    tree.files[labels[frame]] if spec.labels else None,
                    spec.labels[0] if spec.labels else None,
                )
            )
    return files


def find_dsec_night(dataset: RawDataset, split: str, tree: RawTree, root: str, options: RawOptions) -> list[RawFile]:
    """Return CMDA's selection of its night sequences: warped images, and the event tensors that belong to them.

    Of the frames from 2 on that have a warped image and an event index above 0, training takes those after
    `NIGHT_LAST_TEST_FRAMES` and the test those with a label. The events of frame i are those from the index of frame
    i - 1 to its own, or of a window of time if the settings say so. The index is `images_to_events_index.txt` where it
    is there, else it is computed; a recording in an archive is unpacked for that to the tree's scratch folder.

    Raises:
        UserError: as `find_dsec_events`, or an index file that does not fit the timestamps.
    """
    spec, settings = dataset.splits[split], options.events or EventSettings("voxel")
    sequences = _Sequences(dataset, split, tree, root, tuple(NIGHT_LAST_TEST_FRAMES))
    sequences.look_for(_NIGHT_FILES, settings.rectify)
    sequences.look_for_frames("warp_images/*.png", _NIGHT_IMAGE)
    index_files, labels = _single(tree, root, _NIGHT_INDEX), _by_frame(tree, root, _NIGHT_LABEL)
    if spec.labels and sequences.files and not labels:
        raise UserError(
            f"{dataset.name} {split}: no label <sequence>_<frame>_grey_gtFine_labelTrainIds.png below "
            f"{tree.raw_dir / root}; CMDA's authors share them as a download of their own. Found: {tree.describe()}"
            f"{tree.archives_note()}"
        )
    files = []
    for sequence, found in sequences.complete().items():
        timestamps = read_timestamps(tree.files[found["images/timestamps.txt"]])
        if sequence in index_files:
            index = read_event_index(tree.files[index_files[sequence]], len(timestamps))
        else:
            index = compute_event_index(tree.files[found["events/left/events.h5"]], tuple(timestamps), tree.scratch)
        images, own_labels = sequences.frames[sequence], labels.get(sequence, {})
        alone = [path for frame, path in own_labels.items() if frame not in images]
        if spec.labels and alone:
            raise UserError(f"{tree.files[alone[0]]} and {len(alone) - 1} more labels have no image in warp_images/")
        for frame, image in images.items():
            wanted = frame in own_labels if spec.labels else frame > NIGHT_LAST_TEST_FRAMES[sequence]
            if not (wanted and FIRST_NIGHT_FRAME <= frame < len(index) and index[frame] > 0):
                continue
            by_index = None if settings.window_ms else (index[frame - 1], index[frame])
            files.append(
                RawFile(
                    tree.files[image],
                    image.removeprefix(root),
                    sequence,
                    f"{frame:06d}",
                    spec.condition,
                    tree.files[own_labels[frame]] if spec.labels else None,
                    spec.labels[0] if spec.labels else None,
                    _window(tree, found, timestamps, frame, settings, None, by_index),
                )
            )
    return files


def read_timestamps(path: RawPath) -> list[int]:
    """Absolute microseconds, one per line, from first to last.

    Raises:
        UserError: a line is no whole number, or a time is not later than the one before it.
    """
    times = _read_numbers(path)
    for line, (earlier, later) in enumerate(pairwise(times), start=2):
        if later <= earlier:
            raise UserError(
                f"{path}: timestamps are out of order, line {line} ({later}) does not come after line {line - 1} "
                f"({earlier}); copy the file again"
            )
    return times


def read_event_index(path: RawPath, num_frames: int) -> list[int]:
    """CMDA's `images_to_events_index.txt`: last event of each frame, -1 outside the recording.

    Raises:
        UserError: another number of lines than frames, or numbers that fall.
    """
    index = _read_numbers(path)
    known = [number for number in index if number != -1]
    if len(index) != num_frames or known != sorted(known) or min(index) < -1:
        raise UserError(
            f"{path} has {len(index)} lines for {num_frames} timestamps, or its numbers fall; remove it, and the "
            "index is computed"
        )
    return index


@lru_cache(maxsize=len(NIGHT_LAST_TEST_FRAMES))
def compute_event_index(events: RawPath, timestamps: tuple[int, ...], scratch_in: Path | None = None) -> list[int]:
    """The numbers that `images_to_events_index.txt` holds, see `Recording.last_index`; both splits ask for them.

    A recording in an archive, which may have gigabytes, is unpacked below `scratch_in` meanwhile (`None`: the system's
    folder for temporary files).
    """
    if events.member is None:
        scratch_in = None  # nothing is unpacked
    elif scratch_in is not None:
        scratch_in.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="events-", dir=scratch_in) as scratch:
        try:
            recording = open_recording(events, None, Path(scratch))
            return [recording.last_index(time) for time in timestamps]
        finally:
            close_recording()


def _window(
    tree: RawTree,
    found: dict[str, str],
    timestamps: Sequence[int],
    frame: int,
    settings: EventSettings,
    height: int | None,
    event_range: tuple[int, int] | None = None,
) -> EventWindow:
    """The window that ends at the timestamp of `frame`."""
    end = timestamps[frame]
    start = timestamps[frame - 1] if settings.window_ms is None else end - round(settings.window_ms * 1000)
    rectify_map = tree.files[found["events/left/rectify_map.h5"]] if settings.rectify else None
    return EventWindow(
        tree.files[found["events/left/events.h5"]], rectify_map, start, end, settings, height, event_range
    )


@dataclass
class _Sequences:
    """What is there of the sequences of a split; nothing at all of a sequence is no mistake, a part of it is."""

    dataset: RawDataset
    split: str
    tree: RawTree
    root: str
    names: tuple[str, ...]
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    """Sequence -> what was looked for -> path."""
    frames: dict[str, dict[int, str]] = field(default_factory=dict)
    """Sequence -> frame -> path, of what `look_for_frames` looked for, sorted."""
    wanted: list[str] = field(default_factory=list)

    def look_for(self, patterns: dict[str, str], rectify: bool) -> None:
        """Look for files that every sequence has once; the rectification map only if it is needed."""
        for name, pattern in patterns.items():
            if rectify or not name.endswith("rectify_map.h5"):
                self.wanted.append(name)
                for sequence, path in _single(self.tree, self.root, pattern).items():
                    self.files.setdefault(sequence, {})[name] = path

    def look_for_frames(self, name: str, pattern: str) -> None:
        """Look for numbered files, at least one per sequence."""
        self.wanted.append(name)
        self.frames = _by_frame(self.tree, self.root, pattern)
        for sequence, frames in self.frames.items():
            self.files.setdefault(sequence, {})[name] = next(iter(frames.values()))

    def complete(self) -> dict[str, dict[str, str]]:
        """Sequences of the split that are there, with their files."""
        there = {name: self.files[name] for name in self.names if name in self.files}
        missing = {sequence: [name for name in self.wanted if name not in found] for sequence, found in there.items()}
        if any(missing.values()):
            places = "; ".join(f"{sequence}: {', '.join(names)}" for sequence, names in missing.items() if names)
            raise UserError(
                f"{self.dataset.name} {self.split} is incomplete below {self.tree.raw_dir / self.root}. Missing from "
                f"folders <sequence>/ at any depth: {places}. Found: {self._found(there)}"
                f"{self.tree.archives_note()}"
            )
        return there

    def _found(self, there: dict[str, dict[str, str]]) -> str:
        paths = [path.removeprefix(self.root) for found in there.values() for path in found.values()]
        return ", ".join(paths[:8]) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")


def _matches(tree: RawTree, root: str, pattern: str) -> dict[tuple[str, ...], list[str]]:
    """Groups of the pattern -> paths below `root` that fit it."""
    compiled, found = re.compile(re.escape(root) + pattern), {}
    for path in tree.files:
        match = compiled.fullmatch(path)
        if match:
            found.setdefault(tuple(match.groups()), []).append(path)
    return found


def _choose(tree: RawTree, paths: list[str]) -> str:
    """The one of several files to use: on disk before in an archive, and any of copies, which are equally large."""
    on_disk = [path for path in paths if tree.files[path].member is None]
    chosen = on_disk or paths
    if len({tree.files[path].size for path in chosen}) > 1:
        places = " and ".join(str(tree.files[path]) for path in chosen)
        raise UserError(f"it is ambiguous which file to use: {places}; move the one you do not mean out of --raw_dir")
    if chosen[0] in tree.conflicts:
        first, second = tree.conflicts[chosen[0]]
        raise UserError(
            f"{first} and {second} are different files under the same name; move one of the archives out of --raw_dir"
        )
    return chosen[0]


def _single(tree: RawTree, root: str, pattern: str) -> dict[str, str]:
    """Sequence -> path. Of several files those with `semantic` in their name count."""
    found = {}
    for (sequence,), paths in _matches(tree, root, pattern).items():
        semantic = [path for path in paths if "semantic" in path.rpartition("/")[2]]
        found[sequence] = _choose(tree, semantic or paths)
    return found


def _by_frame(tree: RawTree, root: str, pattern: str) -> dict[str, dict[int, str]]:
    """Sequence -> frame -> path, sorted."""
    found: dict[str, dict[int, str]] = {}
    for (sequence, frame), paths in _matches(tree, root, pattern).items():
        found.setdefault(sequence, {})[int(frame)] = _choose(tree, paths)
    return {sequence: dict(sorted(frames.items())) for sequence, frames in sorted(found.items())}


def _read_numbers(path: RawPath) -> list[int]:
    lines = path.read_bytes().decode("utf-8", errors="replace").split()
    try:
        return [int(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{path} must hold one whole number per line ({error}); copy the file again") from None
