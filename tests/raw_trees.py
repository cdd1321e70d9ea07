"""Tiny raw datasets in their official layouts, with pixel values that tests can predict."""

from pathlib import Path

import numpy as np
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
