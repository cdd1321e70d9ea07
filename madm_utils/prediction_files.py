"""Files of `predict_madm.py`: which images there are, what is written for each, and how a later run knows it is done.

The label image is written last. At its end, in a private chunk that viewers ignore, it has a mark: the digest of the
image it belongs to and the time of that file, the digest of model and settings, and the sizes of the other files. So
an image is done when its label image is there with the right mark, whoever wrote it, and nothing else has to be kept
or locked.
"""

import hashlib
import io
import json
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from madm_utils.cli import UserError
from madm_utils.storage import Entry, LocalStorage, Storage

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
SUMMARY_FILE, LEGEND_FILE = "summary.json", "legend.json"
Palette = Sequence[tuple[int, int, int]]

_KINDS = ("label", "color", "overlay", "confidence")
_FORMAT = 2
"""To be increased when the same image, model and settings come to give other files."""
_CHUNK = b"maDM"  # lower and upper case say: not needed to show the image, private, lost when the image is edited
_END = b"\0\0\0\0IEND\xaeB`\x82"
_TAIL = 1024
_CLOCKS = 60.0
"""Seconds for which an image must have been as it is when it was found, so that a change always shows in its time:
storages have clocks of their own, some of which tick coarsely."""
_ROWS = 256


@dataclass(frozen=True)
class Job:
    """An image to predict."""

    name: str
    """In the input folder."""
    output: str
    """Start of its files' names in the output folder, e.g. `sub/street`."""
    modified: float | None = None
    """Time of the image's last change; None when it does not tell one state of the image from another."""
    earlier: tuple[str, ...] = ()
    """Files of an earlier prediction that are there, the label image first."""


def plan_job(name: str, output: str, entry: Entry, there: Mapping[str, Entry]) -> Job:
    """What is to be done for an image that was found just before.

    Args:
        name, entry: the image.
        output: start of its files' names.
        there: what the output folder holds.
    """
    settled = entry.modified is not None and entry.modified + _CLOCKS < time.time()
    earlier = tuple(file for kind in _KINDS if (file := f"{output}_{kind}.png") in there)
    return Job(name, output, entry.modified if settled else None, earlier)


# --- which images ----------------------------------------------------------------------------------------------------


def plan_outputs(source: Storage, files: Iterable[str], target: Storage) -> dict[str, str]:
    """Map every image among `files` of `source` to the start of its outputs' names, e.g. `sub/street`.

    Predictions are no inputs: neither the output folder nor that of an earlier run is searched inside the input
    folder. Earlier runs are told of.

    Raises:
        UserError: no images, the output folder is the input folder, or two images would write the same files.
    """
    own = _inside(source, target)
    if own == "":
        raise UserError(
            f"--output_dir {target} is the input folder: the next run would take its predictions for images; "
            "give another folder (one inside the input folder will do)"
        )
    without = (f"{own}/",) if own else ()
    predicted = _prediction_folders(source, [name for name in files if not name.startswith(without)])
    if "" in predicted:
        raise UserError(f"--input {source} holds predictions ({SUMMARY_FILE}); give the folder of the images")
    if predicted:
        print(f"left out of --input: the predictions in {', '.join(map(source.address, predicted))}")
    without += tuple(f"{folder}/" for folder in predicted)
    outputs = {}
    for name in files:
        path = PurePosixPath(name.split("?")[0] if str(source).startswith("http") else name)
        if path.suffix.lower() in SUFFIXES and not name.startswith(without):
            outputs[name] = str(path.with_suffix(""))
    if not outputs:
        raise UserError(f"--input {source} holds no images; looked for {' '.join(SUFFIXES)} in it and its sub-folders")
    count = Counter(outputs.values())
    twice = [source.address(name) for name, output in outputs.items() if count[output] > 1]
    if twice:
        raise UserError(
            f"{', '.join(twice)} differ in their ending only, so their predictions would have the same names; rename "
            "them or predict them into separate folders"
        )
    return outputs


def _prediction_folders(source: Storage, files: Iterable[str]) -> list[str]:
    """Folders of `source`, "" being itself, to which a run has written its summary."""
    summaries = [name for name in files if name.rsplit("/", 1)[-1] == SUMMARY_FILE]
    return [name[: -len(SUMMARY_FILE)].rstrip("/") for name in summaries if _read_summary(source, name) is not None]


def _read_summary(folder: Storage, name: str) -> dict[str, Any] | None:
    """The summary of a run; None when the file is something else."""
    try:
        summary = json.loads(folder.read(name))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    ours = isinstance(summary, dict) and {"model_path", "skipped", "versions"} <= summary.keys()
    return summary if ours and isinstance(summary.get("settings"), dict) else None


def _inside(source: Storage, target: Storage) -> str | None:
    """Where in the folder `source` the folder `target` is: "" for the same folder, None for outside."""
    if isinstance(source, LocalStorage) != isinstance(target, LocalStorage):
        return None
    if isinstance(source, LocalStorage):
        inner, outer = target.root.resolve().as_posix(), source.root.resolve().as_posix()
    else:
        inner, outer = str(target), str(source)
    return inner[len(outer) :].strip("/") if f"{inner}/".startswith(f"{outer.rstrip('/')}/") else None


# --- what is done ----------------------------------------------------------------------------------------------------


def model_digest(folder: Path, weights: str) -> str:
    """Digest of what a model folder holds of a model; its configuration says which base model it has to have."""
    segmenter = "segmenter" if weights == "student" else "teacher"
    digest = hashlib.sha256()
    for pattern in ("madm_config.json", "*.safetensors", "unet/*", f"{segmenter}/*"):
        for path in sorted(folder.glob(pattern)):
            digest.update(f"{path.relative_to(folder).as_posix()}\n{path.stat().st_size}\n".encode())
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Digest of everything but the image that decides about its files."""
    text = json.dumps({**settings, "format": _FORMAT}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_same_settings(target: Storage, there: Mapping[str, Entry], settings: Mapping[str, Any]) -> None:
    """Refuse to add to predictions of another model or of other settings.

    Raises:
        UserError: `target` holds such, or a summary that is not ours.
    """
    if SUMMARY_FILE not in there:
        return
    summary = _read_summary(target, SUMMARY_FILE)
    if summary is None:
        raise UserError(f"{target.address(SUMMARY_FILE)} was not written by this script; give another --output_dir")
    before = summary["settings"]
    now = json.loads(json.dumps(settings))  # as they are after being read: tuples are lists
    names = [*now, *(name for name in before if name not in now)]
    differences = [
        f"{name}: {before.get(name)} -> {now.get(name)}" for name in names if before.get(name) != now.get(name)
    ]
    if differences:
        raise UserError(
            f"--output_dir {target} holds predictions of another model or of other settings "
            f"({'; '.join(differences)}): give another folder, or --overwrite to predict all images again"
        )


def is_done(
    output: str, run: str, source: Storage, name: str, entry: Entry, target: Storage, there: Mapping[str, Entry]
) -> bool:
    """Whether all files of an image are there, complete, and belong to it as it is, and to this model and settings.

    Args:
        output: start of their names.
        run: `settings_digest`.
        source, name, entry: the image.
        target, there: the output folder and what it holds.
    """
    label = there.get(f"{output}_label.png")
    if label is None:
        return False
    mark = read_mark(target.read(f"{output}_label.png", max(0, (label.size or 0) - _TAIL)))
    if mark is None or mark["run"] != run:
        return False
    for kind, size in mark["files"].items():
        other = there.get(f"{output}_{kind}.png")
        if other is None or other.size != size:
            return False
    if entry.size is not None and entry.size != mark["bytes"]:
        return False
    if entry.sha256 is not None:
        return entry.sha256 == mark["image"]
    if entry.size is not None and entry.modified is not None and entry.modified == mark["modified"]:
        return True
    try:
        return hashlib.sha256(source.read(name)).hexdigest() == mark["image"]
    except UserError:  # prediction will say so
        return False


def read_mark(end: bytes) -> dict[str, Any] | None:
    """The mark at the end of a complete label image; None when there is none."""
    at = end.rfind(_CHUNK)
    if at < 4 or not end.endswith(_END):
        return None
    content = end[at + 4 : at + 4 + int.from_bytes(end[at - 4 : at])]
    if end[at + 4 + len(content) :] != zlib.crc32(_CHUNK + content).to_bytes(4) + _END:
        return None
    return json.loads(content)


# --- what is written -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """An image that has been read."""

    pixels: "Image.Image"
    """8-bit RGB."""
    sha256: str
    """Of the file."""
    num_bytes: int
    """Of the file."""
    modified: float | None
    """Of the file; see `Job`."""


class _Named(io.BytesIO):
    """The content of a file, which messages of others shall call by its address."""

    def __init__(self, content: bytes, address: str):
        super().__init__(content)
        self.address = address

    def __repr__(self) -> str:
        return self.address


def read_picture(source: Storage, job: Job) -> Picture:
    """Read an image.

    Raises:
        UserError: it cannot be read, or its pixels have no defined scale.
    """
    from madm_utils.images import read_image

    where = source.address(job.name)
    content = source.read(job.name)
    if not content:
        raise UserError(f"{where}: cannot be read as an image (the file is empty)")
    pixels = read_image(_Named(content, where))
    return Picture(pixels, hashlib.sha256(content).hexdigest(), len(content), job.modified)


def prediction_files(
    output: str,
    run: str,
    picture: Picture,
    label_map: "np.ndarray",
    palette: Palette,
    overlay_alpha: float,
    confidence: "np.ndarray | None" = None,
) -> dict[str, bytes]:
    """The files of one image, in the order in which they are to be written.

    Args:
        output: start of their names.
        run: `settings_digest`.
        picture: the image.
        label_map: class ids, uint8 (H, W).
        palette: colour of each class.
        overlay_alpha: share of the colours in the overlay.
        confidence: probability of the predicted class, float32 (H, W); written as round(255 * p).
    """
    import numpy as np

    from madm_utils.visualization import colorize, overlay

    image = np.asarray(picture.pixels)
    color, blend, grey = np.empty_like(image), np.empty_like(image), np.empty_like(label_map)
    for top in range(0, len(image), _ROWS):  # floating point only for some rows at a time
        rows = slice(top, top + _ROWS)
        color[rows] = colorize(label_map[rows], palette)
        blend[rows] = overlay(image[rows], color[rows], overlay_alpha)
        if confidence is not None:
            grey[rows] = np.round(255 * confidence[rows])
    # An overlay hardly compresses: the default level takes five times as long for a tenth less.
    files = {"color": _png(color), "overlay": _png(blend, compress_level=1)}
    if confidence is not None:
        files["confidence"] = _png(grey)
    mark = {
        "image": picture.sha256,
        "bytes": picture.num_bytes,
        "modified": picture.modified,
        "run": run,
        "files": {kind: len(content) for kind, content in files.items()},
    }
    files["label"] = _png(label_map, json.dumps(mark).encode())
    return {f"{output}_{kind}.png": content for kind, content in files.items()}


def _png(pixels: "np.ndarray", mark: bytes = b"", **options: int) -> bytes:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    information = PngInfo()
    if mark:
        information.add(_CHUNK, mark, after_idat=True)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", pnginfo=information, **options)
    return file.getvalue()


def write_json(target: Storage, name: str, value: Mapping[Any, Any]) -> None:
    """Write `value` as a readable file."""
    target.write({name: (json.dumps(value, indent=2, default=str) + "\n").encode()})


def legend(class_names: Sequence[str], palette: Palette) -> dict[int, dict[str, Any]]:
    """Class id -> name and RGB colour."""
    return {
        k: {"name": name, "color": list(color)}
        for k, (name, color) in enumerate(zip(class_names, palette, strict=True))
    }
