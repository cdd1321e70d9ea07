"""Writers of `raw_layouts`: one synthetic scene in the folders, file names and label encodings of each dataset."""

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from madm_utils.label_spaces import (
    CITYSCAPES_CLASSES,
    CITYSCAPES_LABEL_IDS,
    CITYSCAPES_LABEL_NAMES,
    IGNORE_INDEX,
    STREET_CLASSES,
    STREET_CLASSES_WITHOUT_WALL_AND_FENCE,
    STREET_PALETTE,
    SYNTHIA_CLASS_IDS,
)
from madm_utils.scenes import render_scene, scene_seed
from madm_utils.tasks import TASKS

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
NIGHT_SEQUENCES = ("GOPR0345", "GOPR0356")
OTHER_SCENES = {"gta5": 1 << 20, "synthia": 2 << 20, "dark_zurich": 3 << 20}
"""First scene of the datasets that would otherwise show the scenes of Cityscapes."""
NIGHT_BRIGHTNESS = 0.3
LIDAR_SHARE = 0.05
"""Share of the pixels that a lidar sees."""
SYNTHIA_LACKS = ("terrain", "truck", "train")
POLYGON_GRID = 128
"""Rows of the grid on which the outlines of classes are traced."""


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


def _save(picture: np.ndarray | Image.Image, root: Path, relative: str) -> str:
    path = root / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(path, compress_level=3)
    return relative


def write_cityscapes(frame: Frame) -> Paths:
    """RGB picture, labelIds and labelTrainIds; a thin rim is out of the region of interest, as in the originals."""
    stem = _city_stem(frame)
    image, train_ids = _city_scene(frame)
    train_ids = np.where(_inside(frame), train_ids, np.uint8(IGNORE_INDEX))
    _save(train_ids, frame.root, f"Cityscapes/gtFine/{stem}_gtFine_labelTrainIds.png")
    return (
        _save(image, frame.root, f"Cityscapes/leftImg8bit/{stem}_leftImg8bit.png"),
        _save(_label_ids(train_ids), frame.root, f"Cityscapes/gtFine/{stem}_gtFine_labelIds.png"),
    )


def write_cityscapes_polygons(frame: Frame) -> Paths:
    """Outlines of the regions in the labels of `write_cityscapes`, to about the next grid point, large ones first."""
    _, train_ids = _city_scene(frame)
    label_ids = _label_ids(np.where(_inside(frame), train_ids, np.uint8(IGNORE_INDEX)))
    height, width = frame.size
    whole = [[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]]
    objects = [{"label": CITYSCAPES_LABEL_NAMES[OUT_OF_ROI], "polygon": whole}]
    objects += [
        {"label": CITYSCAPES_LABEL_NAMES[label_id], "polygon": outline}
        for label_id, outline in trace_regions(label_ids)
        if label_id != OUT_OF_ROI
    ]
    content = {"imgHeight": height, "imgWidth": width, "objects": objects}
    relative = f"Cityscapes/gtFine/{_city_stem(frame)}_gtFine_polygons.json"
    path = frame.root / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return f"Cityscapes/leftImg8bit/{_city_stem(frame)}_leftImg8bit.png", relative


def trace_regions(ids: np.ndarray) -> list[tuple[int, list[list[int]]]]:
    """Outer outlines [[x, y], ...] of the connected regions of each id of (H, W), the largest region first.

    Holes are left out: what lies in them is smaller, comes later, and is drawn over them.
    """
    from contourpy import FillType, contour_generator

    height, width = ids.shape
    step = max(1, height // POLYGON_GRID)
    coarse = ids[step // 2 :: step, step // 2 :: step]
    regions = []
    for value in np.unique(coarse).tolist():
        mask = np.pad((coarse == value).astype(np.float32), 1)
        traced = contour_generator(z=mask, fill_type=FillType.OuterOffset).filled(0.5, 2)
        for points, offsets in zip(*traced, strict=True):
            outline = (points[: offsets[1] - 1] - 0.5) * step  # the last point repeats the first
            x, y = outline.clip(0, (width - 1, height - 1)).round().astype(int).T
            area = abs(np.sum(x * np.roll(y, 1) - y * np.roll(x, 1))) / 2
            regions.append((area, value, np.stack([x, y], axis=1).tolist()))
    return [(value, outline) for _, value, outline in sorted(regions, key=lambda region: -region[0])]


def write_gta5(frame: Frame) -> Paths:
    """RGB picture, and labelIds as a palette PNG."""
    name = f"{frame.index + 1:05d}.png"
    image, train_ids = _city_scene(frame, OTHER_SCENES["gta5"])
    label = Image.fromarray(_label_ids(train_ids))
    label.putpalette([value for color in _palette() for value in color])
    return (
        _save(image, frame.root, f"GTA5/images/{name}"),
        _save(label, frame.root, f"GTA5/labels/{name}"),
    )


def write_synthia(frame: Frame) -> Paths:
    """RGB picture; 16-bit label with the class in the red channel and something else in the green one."""
    name = f"{frame.index:07d}.png"
    occurring = tuple(c for c in range(len(CITYSCAPES_CLASSES)) if CITYSCAPES_CLASSES[c] not in SYNTHIA_LACKS)
    image, train_ids = _city_scene(frame, OTHER_SCENES["synthia"], occurring)
    table = np.zeros(256, np.uint16)
    for class_id, train_id in SYNTHIA_CLASS_IDS.items():
        table[train_id] = class_id
    label = np.zeros((*frame.size, 3), np.uint16)
    label[..., 0] = table[train_ids]
    label[..., 1] = np.arange(frame.size[1])
    path = frame.root / f"RAND_CITYSCAPES/GT/LABELS/{name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_16_bit_png(label))
    return _save(image, frame.root, f"RAND_CITYSCAPES/RGB/{name}"), f"RAND_CITYSCAPES/GT/LABELS/{name}"


def write_dark_zurich(frame: Frame) -> Paths:
    """Dark picture; labelTrainIds and labelIds in val."""
    number, sequence = divmod(frame.index, len(NIGHT_SEQUENCES))
    name = NIGHT_SEQUENCES[sequence]
    stem = f"{frame.split}/night/{name}/{name}_frame_{number + 1:06d}"
    image, train_ids = _city_scene(frame, OTHER_SCENES["dark_zurich"])
    dark = (image * NIGHT_BRIGHTNESS).astype(np.uint8)
    image_path = _save(dark, frame.root, f"Dark_Zurich/rgb_anon/{stem}_rgb_anon.png")
    if frame.split == "train":
        return image_path, None
    _save(_label_ids(train_ids), frame.root, f"Dark_Zurich/gt/{stem}_gt_labelIds.png")
    return image_path, _save(train_ids, frame.root, f"Dark_Zurich/gt/{stem}_gt_labelTrainIds.png")


def write_deliver(frame: Frame) -> Paths:
    """Single-channel depth; labels are RGBA with class id + 1 in the red channel."""
    stem = _deliver_stem(frame)
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


def write_deliver_modalities(frame: Frame) -> Paths:
    """The scenes of `write_deliver` as RGB, events, a few points of lidar, and depth in three channels (HHA)."""
    stem = _deliver_stem(frame)
    depth, _ = frame.render("depth")
    points = np.random.default_rng(frame.scene_seed("depth")).random(frame.size) < LIDAR_SHARE
    height_above_ground = np.linspace(255, 0, frame.size[0], dtype=np.uint8)[:, None].repeat(frame.size[1], axis=1)
    hha = np.stack([depth[..., 0], height_above_ground, 255 - depth[..., 0]], axis=2)
    _save(depth * points[..., None], frame.root, f"DELIVER/lidar/{stem}_lidar_front.png")
    _save(hha, frame.root, f"DELIVER/hha/{stem}_depth_front.png")
    _save(frame.render("event", paired_with="depth")[0], frame.root, f"DELIVER/event/{stem}_event_front.png")
    return _save(frame.render("rgb", paired_with="depth")[0], frame.root, f"DELIVER/img/{stem}_rgb_front.png"), None


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


def _deliver_stem(frame: Frame) -> str:
    number, condition = divmod(frame.index, len(CONDITIONS))
    scene, shot = divmod(number, FRAMES_PER_SCENE_FOLDER)
    case = ADVERSE_CASES[(scene + condition) % len(ADVERSE_CASES)]
    point = scene + (102 if frame.split == "train" else 502)
    folder = f"{CONDITIONS[condition]}/{frame.split}/MAP_{10 + scene % 3}_point{point}{case}"
    return f"{folder}/{45050 + 10 * shot:06d}"


def _city_stem(frame: Frame) -> str:
    cities = TRAIN_CITIES if frame.split == "train" else VAL_CITIES
    number, city = divmod(frame.index, len(cities))
    return f"{frame.split}/{cities[city]}/{cities[city]}_{number:06d}_000019"


def _city_scene(
    frame: Frame, first_scene: int = 0, occurring: tuple[int, ...] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Picture and Cityscapes trainIds, of which only `occurring` are used (`None`: all)."""
    shown = replace(frame, index=first_scene + frame.index)
    image, label = shown.render("rgb")
    class_map = TASKS["cityscapes_to_deliver_depth"].source_label_map
    class_map = {raw: street for raw, street in class_map.items() if occurring is None or raw in occurring}
    table = raw_class_ids(class_map, STREET_CLASSES, np.random.default_rng(shown.scene_seed("rgb")))
    return image, table[label]


def _inside(frame: Frame) -> np.ndarray:
    """Region of interest: all but a thin rim, (H, W) bool."""
    rim = max(1, frame.size[0] // 200)
    inside = np.zeros(frame.size, bool)
    inside[rim:-rim, rim:-rim] = True
    return inside


def _label_ids(train_ids: np.ndarray) -> np.ndarray:
    """Cityscapes trainIds -> labelIds; what is ignored is out of the region of interest."""
    table = np.full(256, OUT_OF_ROI, np.uint8)
    for label_id, train_id in CITYSCAPES_LABEL_IDS.items():
        table[train_id] = label_id
    return table[train_ids]


def _palette() -> list[tuple[int, int, int]]:
    """Colour of every Cityscapes labelId; classes that the street scenes lack are black."""
    return [STREET_PALETTE.get(name, (0, 0, 0)) for name in CITYSCAPES_LABEL_NAMES]


def encode_16_bit_png(pixels: np.ndarray) -> bytes:
    """PNG of uint16 (H, W, 3), which Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    lines = pixels.astype(">u2").reshape(height, -1).view(np.uint8)
    unfiltered = np.pad(lines, ((0, 0), (1, 0))).tobytes()  # each line begins with its filter: none
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(unfiltered, 1)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)
