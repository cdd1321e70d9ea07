"""Label spaces of the datasets, their colours, and the integer maps between them.

Everything here is data or a pure function on NumPy arrays; nothing is particular to one adaptation method.
"""

from collections.abc import Mapping

import numpy as np

from madm_utils.cli import UserError

IGNORE_INDEX = 255

CITYSCAPES_CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
"""The 19 Cityscapes training classes; the position is the trainId."""

CITYSCAPES_LABEL_IDS = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9,
    23: 10, 24: 11, 25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18,
}  # fmt: skip
"""Cityscapes labelId -> trainId; every labelId that is not listed is ignored."""

CITYSCAPES_LABEL_NAMES = (
    "unlabeled", "ego vehicle", "rectification border", "out of roi", "static", "dynamic", "ground", "road",
    "sidewalk", "parking", "rail track", "building", "wall", "fence", "guard rail", "bridge", "tunnel", "pole",
    "polegroup", "traffic light", "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car", "truck",
    "bus", "caravan", "trailer", "train", "motorcycle", "bicycle",
)  # fmt: skip
"""All Cityscapes labels; the position is the labelId. "license plate" has the id -1 and is never drawn."""

GTA5_NUM_LABEL_IDS = 35
"""GTA5 uses Cityscapes' labelIds, and 34 for licence plates, which are ignored."""

SYNTHIA_NUM_IDS = 23
SYNTHIA_CLASS_IDS = {
    3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 16: 9,
    1: 10, 10: 11, 17: 12, 8: 13, 18: 14, 19: 15, 20: 16, 12: 17, 11: 18,
}  # fmt: skip
"""SYNTHIA class -> Cityscapes trainId (DAFormer); every class that is not listed is ignored. Terrain, truck and train
do not occur in SYNTHIA-RAND-CITYSCAPES, which leaves the 16 classes of its benchmark."""

DELIVER_CLASSES = (
    "Building", "Fence", "Other", "Pedestrian", "Pole", "RoadLine", "Road", "SideWalk", "Vegetation", "Cars", "Wall",
    "TrafficSign", "Sky", "Ground", "Bridge", "RailTrack", "GroundRail", "TrafficLight", "Static", "Dynamic", "Water",
    "Terrain", "TwoWheeler", "Bus", "Truck",
)  # fmt: skip
"""The 25 DELIVER classes, after `deliver_class_ids`."""

FMB_CLASSES = (
    "background", "road", "sidewalk", "building", "lamp", "sign", "vegetation", "sky", "person", "car", "truck", "bus",
    "motorcycle", "bicycle", "pole",
)  # fmt: skip

STREET_CLASSES = (
    "sky", "building", "fence", "person", "pole", "road", "sidewalk", "vegetation", "car", "wall", "traffic sign",
)  # fmt: skip
"""The 11 classes shared by Cityscapes, DELIVER and DSEC-Semantic (MADM, label space of depth and event)."""

STREET_CLASSES_WITHOUT_WALL_AND_FENCE = tuple(name for name in STREET_CLASSES if name not in ("fence", "wall"))
"""The 9 classes shared by Cityscapes and FMB (MADM, label space of infrared)."""

STREET_PALETTE = {
    "sky": (70, 130, 180),
    "building": (70, 70, 70),
    "fence": (190, 153, 153),
    "person": (220, 20, 60),
    "pole": (153, 153, 153),
    "road": (128, 64, 128),
    "sidewalk": (244, 35, 232),
    "vegetation": (107, 142, 35),
    "car": (0, 0, 142),
    "wall": (102, 102, 156),
    "traffic sign": (250, 170, 30),
}
"""Class name -> RGB. These colours are also what label palette and latent regression regresses to."""


def lookup_table(label_map: Mapping[int, int] | None) -> np.ndarray:
    """Return the uint8 table of 256 entries for `label_map`; ids that are not listed keep their value.

    `lookup_table(m)[label]` maps a uint8 label. Every look-up reads the original id, so `{0: 1, 1: 2}` does not chain.
    """
    table = np.arange(256, dtype=np.uint8)
    for source, target in (label_map or {}).items():
        table[source] = target
    return table


def deliver_class_ids(label: np.ndarray) -> np.ndarray:
    """DELIVER's own rule, red channel (H, W) uint8 -> class id: `id - 1`, and both 0 and 255 become 255."""
    return np.where(label == IGNORE_INDEX, label, label - np.uint8(1))


def cityscapes_train_ids(label_ids: np.ndarray) -> np.ndarray:
    """Cityscapes (or GTA5) labelIds (uint8) -> trainIds, void classes -> 255."""
    return _listed_only(CITYSCAPES_LABEL_IDS)[label_ids]


def synthia_train_ids(class_ids: np.ndarray) -> np.ndarray:
    """SYNTHIA classes (uint8) -> Cityscapes trainIds, void classes -> 255."""
    return _listed_only(SYNTHIA_CLASS_IDS)[class_ids]


def _listed_only(label_map: Mapping[int, int]) -> np.ndarray:
    table = np.full(256, IGNORE_INDEX, np.uint8)
    for source, target in label_map.items():
        table[source] = target
    return table


def check_label_ids(pixels: np.ndarray, num_classes: int, path: object) -> None:
    """Raise `UserError` for a label with an id outside `0..num_classes-1` and 255; the message names `path`.

    `pixels` (256,) is how many pixels have each id.
    """
    unknown = [i for i in np.flatnonzero(pixels).tolist() if i >= num_classes and i != IGNORE_INDEX]
    if unknown:
        raise UserError(
            f"{path}: label holds class ids {unknown} outside the map; expected 0..{num_classes - 1} or "
            f"{IGNORE_INDEX} (ignore). Check that this is the right label file and that its ids were converted."
        )


def class_pixel_counts(label: np.ndarray, num_classes: int) -> np.ndarray:
    """Pixels per class of one label image, (num_classes,) int64; ignored pixels are not counted."""
    return np.bincount(label.ravel(), minlength=256)[:num_classes].astype(np.int64)
