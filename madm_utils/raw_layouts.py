"""Synthetic street scenes written as Cityscapes, DELIVER, FMB and DSEC-Semantic come from their publishers.

The folders, file names, sizes and label encodings are the official ones, so that every converter can be tried without
the datasets. The pictures are procedural (`madm_utils.scenes`) and hold nothing of the real datasets. Below `root`:

    Cityscapes/leftImg8bit/{train,val}/<city>/<city>_000000_000019_leftImg8bit.png
    Cityscapes/gtFine/{train,val}/<city>/<city>_000000_000019_gtFine_{labelIds,labelTrainIds}.png
    DELIVER/depth/<condition>/{train,test}/<scene>/045050_depth_front.png
    DELIVER/semantic/<condition>/test/<scene>/045050_semantic_front.png
    FMB/{train,test}/{Infrared,Visible}/00043.png, FMB/test/Label/00043.png
    DSEC/69mask_{train,test}_edges/<sequence>/000002.png
    DSEC/test_semantic_labels/<sequence>/11classes/000001.png
    file_lists/<task>_{train,test}.json

Target training labels are left out: no step of the method reads them.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from madm_utils.cli import UserError
from madm_utils.label_spaces import (
    CITYSCAPES_LABEL_IDS,
    IGNORE_INDEX,
    STREET_CLASSES,
    STREET_CLASSES_WITHOUT_WALL_AND_FENCE,
)
from madm_utils.scenes import render_scene, scene_seed
from madm_utils.tasks import TASKS

CITYSCAPES_HEIGHT = 1024
"""Official height of Cityscapes; all datasets shrink by the same factor."""
SMALLEST_HEIGHT = 96
OUT_OF_ROI = 3
"""Cityscapes labelId of the rim of a picture, which has no trainId."""
FMB_BACKGROUND = 0

TRAIN_CITIES = ("aachen", "bochum", "zurich")
VAL_CITIES = ("frankfurt", "lindau", "munster")
CONDITIONS = ("cloud", "fog", "night", "rain", "sun")
ADVERSE_CASES = ("", "_motionblur", "_overexposure", "_underexposure", "_lidarjitter", "_eventlowres")
FRAMES_PER_SCENE_FOLDER = 10
DSEC_TRAIN_SEQUENCES = tuple(f"zurich_city_{name}" for name in ("00_a", "01_a", "02_a"))
DSEC_TEST_SEQUENCES = tuple(f"zurich_city_{name}" for name in ("13_a", "14_c", "15_a"))


@dataclass(frozen=True)
class Frame:
    """One picture to write: its split, its number in the split, and size (height, width)."""

    root: Path
    split: str
    index: int
    seed: int
    size: tuple[int, int]

    def render(self, modality: str, paired_with: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Picture and street label; `paired_with` shows the scene of another modality instead of an own one."""
        return render_scene(self.scene_seed(paired_with or modality), modality, *self.size)

    def scene_seed(self, modality: str) -> int:
        return scene_seed(self.seed, self.split, modality, self.index)


Paths = tuple[str, str | None]
"""Picture and label file relative to the root; no label for target training pictures."""


def raw_class_ids(class_map: Mapping[int, int], classes: tuple[str, ...], rng: np.random.Generator) -> np.ndarray:
    """Invert a task's class map into a table street id -> raw id, (256,) uint8.

    Where several raw classes fall together (a car may be a truck), `rng` chooses one, so that all of them occur over
    many pictures. Street classes that no raw class maps to become 255.
    """
    table = np.full(256, IGNORE_INDEX, np.uint8)
    for street_id, name in enumerate(STREET_CLASSES):
        candidates = [raw for raw, task_id in class_map.items() if name in classes and task_id == classes.index(name)]
        if candidates:
            table[street_id] = rng.choice(candidates)
    return table


def _save(picture: np.ndarray, root: Path, relative: str) -> str:
    path = root / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, compress_level=3)
    return relative


def write_cityscapes(frame: Frame) -> Paths:
    """RGB picture, labelIds and labelTrainIds; a thin rim is out of the region of interest, as in the originals."""
    cities = TRAIN_CITIES if frame.split == "train" else VAL_CITIES
    number, city = divmod(frame.index, len(cities))
    stem = f"{frame.split}/{cities[city]}/{cities[city]}_{number:06d}_000019"
    image, label = frame.render("rgb")
    class_map = TASKS["cityscapes_to_deliver_depth"].source_label_map
    train_ids = raw_class_ids(class_map, STREET_CLASSES, np.random.default_rng(frame.scene_seed("rgb")))[label]
    rim = max(1, frame.size[0] // 200)
    inside = np.zeros(label.shape, bool)
    inside[rim:-rim, rim:-rim] = True
    train_ids = np.where(inside, train_ids, np.uint8(IGNORE_INDEX))
    to_label_id = np.full(256, OUT_OF_ROI, np.uint8)
    for label_id, train_id in CITYSCAPES_LABEL_IDS.items():
        to_label_id[train_id] = label_id
    _save(train_ids, frame.root, f"Cityscapes/gtFine/{stem}_gtFine_labelTrainIds.png")
    return (
        _save(image, frame.root, f"Cityscapes/leftImg8bit/{stem}_leftImg8bit.png"),
        _save(to_label_id[train_ids], frame.root, f"Cityscapes/gtFine/{stem}_gtFine_labelIds.png"),
    )


def write_deliver(frame: Frame) -> Paths:
    """Single-channel depth; labels are RGBA with class id + 1 in the red channel."""
    number, condition = divmod(frame.index, len(CONDITIONS))
    scene, shot = divmod(number, FRAMES_PER_SCENE_FOLDER)
    case = ADVERSE_CASES[(scene + condition) % len(ADVERSE_CASES)]
    point = scene + (102 if frame.split == "train" else 502)
    folder = f"{CONDITIONS[condition]}/{frame.split}/MAP_{10 + scene % 3}_point{point}{case}"
    stem = f"{folder}/{45050 + 10 * shot:06d}"
    image, label = frame.render("depth")
    image_path = _save(image[..., 0], frame.root, f"DELIVER/depth/{stem}_depth_front.png")
    if frame.split == "train":
        return image_path, None
    class_map = TASKS["cityscapes_to_deliver_depth"].target_label_map
    table = raw_class_ids(class_map, STREET_CLASSES, np.random.default_rng(frame.scene_seed("depth")))
    pixels = np.zeros((*frame.size, 4), np.uint8)
    pixels[..., 0] = table[label] + np.uint8(1)
    pixels[..., 3] = 255
    return image_path, _save(pixels, frame.root, f"DELIVER/semantic/{stem}_semantic_front.png")


def write_fmb(frame: Frame) -> Paths:
    """Registered infrared and visible pictures; labels 0..14, street classes that FMB lacks are background."""
    # Test numbers are 43, 48, 53, ...; training takes those in between, so that no number is in both.
    quotient, remainder = divmod(frame.index, 4)
    number = 43 + 5 * frame.index if frame.split == "test" else 5 * quotient + (1, 2, 4, 5)[remainder]
    name = f"{number:05d}.png"
    image, label = frame.render("infrared")
    visible, _ = frame.render("rgb", paired_with="infrared")
    _save(visible, frame.root, f"FMB/{frame.split}/Visible/{name}")
    image_path = _save(image, frame.root, f"FMB/{frame.split}/Infrared/{name}")
    if frame.split == "train":
        return image_path, None
    class_map = TASKS["cityscapes_to_fmb_infrared"].target_label_map
    rng = np.random.default_rng(frame.scene_seed("infrared"))
    table = raw_class_ids(class_map, STREET_CLASSES_WITHOUT_WALL_AND_FENCE, rng)
    table = np.where(table == IGNORE_INDEX, np.uint8(FMB_BACKGROUND), table)
    return image_path, _save(table[label], frame.root, f"FMB/test/Label/{name}")


def write_dsec(frame: Frame) -> Paths:
    """Event edge pictures: even frames for training, every frame from 1 on for the test; labels in 11 classes."""
    sequences = DSEC_TRAIN_SEQUENCES if frame.split == "train" else DSEC_TEST_SEQUENCES
    number, sequence = divmod(frame.index, len(sequences))
    name = f"{2 * number + 2 if frame.split == 'train' else number + 1:06d}.png"
    image, label = frame.render("event")
    image_path = _save(image, frame.root, f"DSEC/69mask_{frame.split}_edges/{sequences[sequence]}/{name}")
    if frame.split == "train":
        return image_path, None
    folder = f"DSEC/test_semantic_labels/{sequences[sequence]}/11classes"
    return image_path, _save(label, frame.root, f"{folder}/{name}")


@dataclass(frozen=True)
class Layout:
    """How one dataset is written: official size (height, width), its labelled test split, one frame."""

    size: tuple[int, int]
    test_split: str
    write: Callable[[Frame], Paths]


LAYOUTS = {
    "cityscapes": Layout((CITYSCAPES_HEIGHT, 2048), "val", write_cityscapes),
    "deliver": Layout((1042, 1042), "test", write_deliver),
    "fmb": Layout((600, 800), "test", write_fmb),
    "dsec": Layout((440, 640), "test", write_dsec),
}


def write_raw_layouts(
    root: Path, num_train: int, num_test: int, seed: int, height: int = 256, progress: bool = True
) -> None:
    """Write all four datasets and the file lists of the three published tasks below `root`.

    Args:
        root: folder to create; nothing is left of it when writing fails.
        num_train: training pictures of each dataset.
        num_test: test pictures (Cityscapes: val) of each dataset.
        seed: the same seed writes the same bytes.
        height: of the Cityscapes pictures, 1024 is the official size; the other datasets shrink alike.
        progress: show a progress bar.

    Raises:
        UserError: a number is out of range, `root` is a file or not empty, or it cannot be written.
    """
    root = Path(root).absolute()
    limits = (("num_train", num_train, 1), ("num_test", num_test, 1), ("height", height, SMALLEST_HEIGHT))
    for name, value, least in limits:
        if value < least:
            raise UserError(f"synthetic raw layouts need {name} of at least {least}, got {value}")
    scratch = root.with_name(f".{root.name}.tmp-{os.getpid()}")
    try:
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise UserError(f"{root} exists and is not an empty folder; choose another one or remove it first")
        scratch.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{root} cannot be created ({error.strerror}); choose a folder you can write to") from None
    try:
        _write_all(scratch, num_train, num_test, seed, height, progress)
        scratch.replace(root)
    except OSError as error:
        raise UserError(f"writing below {root} failed ({error.strerror}); nothing was kept") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_all(root: Path, num_train: int, num_test: int, seed: int, height: int, progress: bool) -> None:
    jobs = [
        (name, split, index)
        for name, layout in LAYOUTS.items()
        for split, count in (("train", num_train), (layout.test_split, num_test))
        for index in range(count)
    ]
    written: dict[tuple[str, str], list[Paths]] = {}
    for name, split, index in tqdm(jobs, desc="synthetic raw layouts", unit="picture", disable=not progress):
        layout = LAYOUTS[name]
        size = tuple(round(side * height / CITYSCAPES_HEIGHT) for side in layout.size)
        paths = layout.write(Frame(root, split, index, seed, size))
        written.setdefault((name, split), []).append(paths)
    _write_file_lists(root, written)


def _write_file_lists(root: Path, written: Mapping[tuple[str, str], list[Paths]]) -> None:
    """JSON lists of the form that the published code reads, paths relative to `root`."""
    folder = root / "file_lists"
    folder.mkdir()
    source = sorted(written["cityscapes", "train"])
    source_lists = {"RGB": [image for image, _ in source], "label": [label for _, label in source]}
    for name, task in TASKS.items():
        if task.source not in LAYOUTS:
            continue
        train = {"second_modality": sorted(image for image, _ in written[task.target, "train"])}
        test = sorted(written[task.target, LAYOUTS[task.target].test_split])
        test_lists = {"second_modality": [image for image, _ in test], "label": [label for _, label in test]}
        for split, content in (
            ("train", {"source_data": source_lists, "target_data": train}),
            ("test", {"target_data": test_lists}),
        ):
            text = json.dumps(content, indent=1) + "\n"
            (folder / f"{name}_{split}.json").write_text(text, encoding="utf-8")
