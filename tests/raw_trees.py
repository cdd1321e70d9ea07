"""Tiny raw datasets in their official layouts, with pixel values that tests can predict."""

import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import png
from PIL import Image

CITY_FRAMES = {
    "train": ("aachen/aachen_000000_000019", "aachen/aachen_000001_000019", "bochum/bochum_000000_000313"),
    "val": ("lindau/lindau_000000_000019",),
}
CITY_SIZE = (8, 16)


def save(path: Path, array: np.ndarray) -> Path:
    """Write `array` (uint8) as PNG, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path, format="PNG")
    return path


def picture(seed: int, *shape: int) -> np.ndarray:
    """Random uint8 pixels."""
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def labels(seed: int, ids: list[int], *shape: int) -> np.ndarray:
    """Random uint8 pixels out of `ids`."""
    return np.random.default_rng(seed).choice(np.array(ids, np.uint8), shape)


def write_cityscapes(raw: Path, splits=("train", "val"), suffix: str = "labelIds") -> Path:
    """Cityscapes with every labelId (or trainId) in its labels."""
    root, ids = raw / "Cityscapes", [*range(34), 255] if suffix == "labelIds" else [*range(19), 255]
    for split in splits:
        for i, frame in enumerate(CITY_FRAMES[split]):
            save(root / "leftImg8bit" / split / f"{frame}_leftImg8bit.png", picture(i, *CITY_SIZE, 3))
            save(root / "gtFine" / split / f"{frame}_gtFine_{suffix}.png", labels(i, ids, *CITY_SIZE))
    return root


def write_deliver(raw: Path) -> Path:
    """DELIVER depth, one training and one test image in two conditions; its label is RGBA with the id in red."""
    root = raw / "DELIVER"
    for i, condition in enumerate(("cloud", "night")):
        save(root / f"depth/{condition}/train/MAP_1_point1/045050_depth_front.png", picture(i, 10, 10))
        save(root / f"depth/{condition}/test/MAP_1_point2/045050_depth_front.png", picture(9 + i, 10, 10))
        label = np.full((10, 10, 4), 77, np.uint8)
        label[..., 0] = labels(i, [*range(26), 255], 10, 10)
        save(root / f"semantic/{condition}/test/MAP_1_point2/045050_semantic_front.png", label)
    return root


def write_fmb(raw: Path) -> Path:
    """FMB infrared, two training images and one test image."""
    root = raw / "FMB"
    for i, name in enumerate(("00001", "00003")):
        save(root / f"train/Infrared/{name}.png", picture(i, 6, 8, 3))
    save(root / "test/Infrared/00043.png", picture(5, 6, 8, 3))
    save(root / "test/Label/00043.png", labels(5, [*range(15)], 6, 8))
    return root


def write_dsec(raw: Path) -> Path:
    """DSEC edges: training frames 0..5, test frames 1..2, and a test label 0 that has no events."""
    root = raw / "DSEC"
    for frame in range(6):
        save(root / f"69mask_train_edges/zurich_city_00_a/{frame:06d}.png", picture(frame, 11, 16, 3))
    for frame in range(3):
        if frame:
            save(root / f"69mask_test_edges/zurich_city_13_a/{frame:06d}.png", picture(frame, 11, 16, 3))
        label = labels(frame, [*range(11), 255], 11, 16)
        save(root / f"test_semantic_labels/zurich_city_13_a/11classes/{frame:06d}.png", label)
    return root


POLYGONS = [
    {"label": "road", "polygon": [[0, 4], [15, 4], [15, 7], [0, 7]]},
    {"label": "sky", "polygon": [[-3, -2], [20, -2], [20.4, 2.6], [-3, 1]]},  # leaves the picture, and has fractions
    {"label": "car", "polygon": [[2, 3], [6, 3], [4, 6]]},
    {"label": "license plate", "polygon": [[3, 3], [5, 3], [5, 5], [3, 5]]},  # negative id: shows what lies beneath
    {"label": "building", "deleted": 1, "polygon": [[0, 0], [15, 0], [15, 7]]},
    {"label": "persongroup", "polygon": [[9, 2], [11, 2], [11, 6], [9, 6]]},
    {"label": "polegroup", "polygon": [[13, 0], [14, 0], [14, 7], [13, 7]]},  # a label of its own, without trainId
    {"label": "pole", "polygon": [[12, 1], [12, 6]]},  # a line
    {"label": "dynamic", "polygon": [[0, 5], [1, 5], [1, 6]]},
    {"label": "ego vehicle", "polygon": [[5, 6], [10, 6], [10, 7], [5, 7]]},
    {"label": "out of roi", "polygon": [[0, 0], [15, 0], [15, 7], [0, 7], [0, 6], [14, 6], [14, 1], [1, 1]]},
]


def write_polygons(path: Path, objects: list[dict], size: tuple[int, int] = CITY_SIZE) -> Path:
    """A Cityscapes polygon file; `size` is (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"imgHeight": size[0], "imgWidth": size[1], "objects": objects}))
    return path


def write_cityscapes_polygons(raw: Path) -> Path:
    """Cityscapes with polygons only."""
    root = write_cityscapes(raw)
    for path in list((root / "gtFine").rglob("*_labelIds.png")):
        write_polygons(path.with_name(path.name.replace("labelIds.png", "polygons.json")), POLYGONS)
        path.unlink()
    return root


def write_deliver_modality(raw: Path, folder: str, ending: str) -> Path:
    """DELIVER with one more modality beside depth, and a labelled val split."""
    root = write_deliver(raw)
    for path in list((root / "depth").rglob("*.png")):
        name = path.name.replace("depth_front", f"{ending}_front")
        save(root / folder / path.relative_to(root / "depth").with_name(name), picture(len(name), 10, 10, 3))
    label = np.full((10, 10, 3), 77, np.uint8)
    label[..., 0] = labels(3, [*range(26), 255], 10, 10)
    save(root / folder / f"fog/val/MAP_1_point3/045050_{ending}_front.png", picture(7, 10, 10, 3))
    save(root / "semantic/fog/val/MAP_1_point3/045050_semantic_front.png", label)
    return root


def write_fmb_visible(raw: Path) -> Path:
    """FMB with visible pictures beside the infrared ones."""
    root = write_fmb(raw)
    for path in list(root.rglob("Infrared/*.png")):
        save(path.parents[1] / "Visible" / path.name, picture(int(path.stem), 6, 8, 3))
    return root


def write_dsec_19(raw: Path) -> Path:
    """DSEC edges with 19-class labels beside those of 11 classes."""
    root = write_dsec(raw)
    for frame in range(3):
        label = labels(frame, [*range(19), 255], 11, 16)
        save(root / f"test_semantic_labels/zurich_city_13_a/19classes/{frame:06d}.png", label)
    return root


def write_dark_zurich(raw: Path) -> Path:
    """Dark Zurich: two night images to train with, day images that are not used, one labelled and one test image."""
    root = raw / "Dark_Zurich"
    for split, sequence, number in (("train", "GOPR0345", 1), ("train", "GOPR0346", 2), ("val", "GOPR0356", 3),
                                    ("test", "GOPR0364", 4)):  # fmt: skip
        stem = f"{split}/night/{sequence}/{sequence}_frame_{number:06d}"
        save(root / f"rgb_anon/{stem}_rgb_anon.png", picture(number, 9, 16, 3))
        if split == "val":
            save(root / f"gt/{stem}_gt_labelTrainIds.png", labels(number, [*range(19), 255], 9, 16))
            save(root / f"gt/{stem}_gt_labelColor.png", picture(number, 9, 16, 3))
    save(root / "rgb_anon/train/day/GOPR0100/GOPR0100_frame_000001_rgb_anon.png", picture(9, 9, 16, 3))
    return root


def write_gta5(raw: Path) -> Path:
    """GTA5: palette labels with every id, and the trainId copies that other tools leave beside them."""
    root = raw / "GTA5"
    for number in (1, 2):
        save(root / f"images/{number:05d}.png", picture(number, 7, 12, 3))
        label = Image.fromarray(labels(number, [*range(35)], 7, 12))
        label.putpalette([255 - i // 3 for i in range(35 * 3)])
        (root / "labels").mkdir(exist_ok=True)
        label.save(root / f"labels/{number:05d}.png")
        save(root / f"labels/{number:05d}_labelTrainIds.png", picture(number, 7, 12))
    return root


def write_synthia(raw: Path) -> Path:
    """SYNTHIA: 16-bit labels, the class in red and an instance in green, which may need both bytes."""
    root = raw / "RAND_CITYSCAPES"
    (root / "GT/LABELS").mkdir(parents=True)
    for number in (0, 1):
        save(root / f"RGB/{number:07d}.png", picture(number, 6, 10, 3))
        label = np.random.default_rng(number).integers(0, 5000, (6, 10, 3), np.uint16)
        label[..., 0] = labels(number, [*range(23)], 6, 10)
        with open(root / f"GT/LABELS/{number:07d}.png", "wb") as file:
            png.Writer(10, 6, greyscale=False, bitdepth=16).write(file, label.reshape(6, -1))
    return root


def zip_tree(folder: Path, archive: Path, below: Path | None = None) -> Path:
    """Zip the files of `folder`, with names relative to `below` (`None`: its parent)."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(below or folder.parent))
    return archive


def tar_tree(folder: Path, archive: Path, mode: str = "w") -> Path:
    """Tar the files of `folder`, with names that begin with its own; `mode` as for `tarfile.open`."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, mode) as file:
        file.add(folder, folder.name)
    return archive
