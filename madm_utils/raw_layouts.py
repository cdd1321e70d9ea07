"""Synthetic street scenes written as the public datasets come from their publishers.

The folders, file names, sizes and label encodings are the official ones, so that every converter can be tried without
the datasets. The pictures are procedural (`madm_utils.scenes`) and hold nothing of the real datasets. Below `root`:

    Cityscapes/leftImg8bit/{train,val}/<city>/<city>_000000_000019_leftImg8bit.png
    Cityscapes/gtFine/{train,val}/<city>/<city>_000000_000019_gtFine_{labelIds,labelTrainIds}.png, _polygons.json
    DELIVER/{depth,img,hha,lidar,event}/<condition>/{train,test}/<scene>/045050_{depth,rgb,depth,lidar,event}_front.png
    DELIVER/semantic/<condition>/test/<scene>/045050_semantic_front.png
    FMB/{train,test}/{Infrared,Visible}/00043.png, FMB/test/Label/00043.png
    DSEC/69mask_{train,test}_edges/<sequence>/000002.png
    DSEC/test_semantic_labels/<sequence>/11classes/000001.png
    GTA5/{images,labels}/00001.png
    RAND_CITYSCAPES/RGB/0000000.png, RAND_CITYSCAPES/GT/LABELS/0000000.png     (SYNTHIA)
    Dark_Zurich/rgb_anon/{train,val}/night/<sequence>/<sequence>_frame_000001_rgb_anon.png
    Dark_Zurich/gt/val/night/<sequence>/<sequence>_frame_000001_gt_{labelIds,labelTrainIds}.png
    DSEC_recordings/DSEC/, DSEC_Night/                 see `madm_utils.event_simulation`
    file_lists/<task>_{train,test}.json

Target training labels are left out: no step of the method reads them.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from madm_utils.cli import UserError
from madm_utils.raw_layout_writers import (
    Frame,
    Paths,
    raw_class_ids,
    write_cityscapes,
    write_cityscapes_polygons,
    write_dark_zurich,
    write_deliver,
    write_deliver_modalities,
    write_dsec,
    write_fmb,
    write_gta5,
    write_synthia,
)
from madm_utils.tasks import TASKS

__all__ = ["ALL_LAYOUTS", "LAYOUTS", "RECORDINGS", "TASK_LAYOUTS", "raw_class_ids", "write_raw_layouts"]

CITYSCAPES_HEIGHT = 1024
"""Official height of Cityscapes; all datasets shrink by the same factor."""
SMALLEST_HEIGHT = 96


@dataclass(frozen=True)
class Layout:
    """How one dataset is written: official size (height, width), its labelled test split if any, one frame."""

    size: tuple[int, int]
    test_split: str | None
    write: Callable[[Frame], Paths]


LAYOUTS = {
    "cityscapes": Layout((CITYSCAPES_HEIGHT, 2048), "val", write_cityscapes),
    "deliver": Layout((1042, 1042), "test", write_deliver),
    "fmb": Layout((600, 800), "test", write_fmb),
    "dsec": Layout((440, 640), "test", write_dsec),
    "cityscapes_polygons": Layout((CITYSCAPES_HEIGHT, 2048), "val", write_cityscapes_polygons),
    "deliver_modalities": Layout((1042, 1042), "test", write_deliver_modalities),
    "gta5": Layout((1052, 1914), None, write_gta5),
    "synthia": Layout((760, 1280), None, write_synthia),
    "dark_zurich": Layout((1080, 1920), "val", write_dark_zurich),
}
RECORDINGS = {"dsec_events": "DSEC_recordings/DSEC", "dsec_night": "DSEC_Night"}
"""Layouts of raw event recordings, always at the size of the sensor, and their folders."""
MOST_RECORDED_FRAMES = 12
"""Frames of a recording: each takes about a second to simulate, and 200,000 events."""
TASK_LAYOUTS = ("cityscapes", "deliver", "fmb", "dsec")
"""What the published tasks need."""
ALL_LAYOUTS = (*LAYOUTS, *RECORDINGS)


def write_raw_layouts(
    root: Path,
    num_train: int,
    num_test: int,
    seed: int,
    height: int = 256,
    progress: bool = True,
    layouts: Sequence[str] = TASK_LAYOUTS,
) -> None:
    """Write raw datasets, and the file lists of the published tasks between them, below `root`.

    Args:
        root: folder to create; nothing is left of it when writing fails.
        num_train: training pictures of each dataset.
        num_test: test pictures (Cityscapes, Dark Zurich: val) of each dataset that has some.
        seed: the same seed writes the same bytes.
        height: of the Cityscapes pictures, 1024 is the official size; the other datasets shrink alike.
        progress: show a progress bar.
        layouts: some of `ALL_LAYOUTS`. `cityscapes_polygons` and `deliver_modalities` only add files to `cityscapes`
            and `deliver`.

    Raises:
        UserError: a number is out of range, `root` is a file or not empty, or it cannot be written.
    """
    root = Path(root).absolute()
    unknown = [name for name in layouts if name not in ALL_LAYOUTS]
    if unknown:
        raise UserError(f"unknown raw layouts {', '.join(unknown)}; there are {', '.join(ALL_LAYOUTS)}")
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
        _write_all(scratch, num_train, num_test, seed, height, progress, layouts)
        scratch.replace(root)
    except OSError as error:
        raise UserError(f"writing below {root} failed ({error.strerror}); nothing was kept") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_all(
    root: Path, num_train: int, num_test: int, seed: int, height: int, progress: bool, layouts: Sequence[str]
) -> None:
    jobs = [
        (name, split, index)
        for name in layouts
        if name in LAYOUTS
        for split, count in (("train", num_train), (LAYOUTS[name].test_split, num_test))
        if split is not None
        for index in range(count)
    ]
    written: dict[tuple[str, str], list[Paths]] = {}
    for name, split, index in tqdm(jobs, desc="synthetic raw layouts", unit="picture", disable=not progress):
        layout = LAYOUTS[name]
        size = tuple(round(side * height / CITYSCAPES_HEIGHT) for side in layout.size)
        paths = layout.write(Frame(root, split, index, seed, size))
        written.setdefault((name, split), []).append(paths)
    if set(layouts) & set(RECORDINGS):
        _write_recordings(root, num_train, num_test, seed, layouts)
    if "cityscapes" in layouts:
        _write_file_lists(root, written)


def _write_recordings(root: Path, num_train: int, num_test: int, seed: int, layouts: Sequence[str]) -> None:
    from madm_utils import event_simulation

    if "dsec_events" in layouts:
        # Of a training sequence every second frame is used, of a test sequence all, both without frame 0.
        num_frames = min(1 + max(2 * num_train, num_test), MOST_RECORDED_FRAMES)
        event_simulation.write_dsec_tree(root / RECORDINGS["dsec_events"], num_frames=num_frames, seed=seed)
    if "dsec_night" in layouts:
        event_simulation.write_dsec_night_tree(
            root / RECORDINGS["dsec_night"],
            num_frames=min(max(num_train, num_test), MOST_RECORDED_FRAMES),
            num_labels=num_test,
            seed=seed,
        )


def _write_file_lists(root: Path, written: Mapping[tuple[str, str], list[Paths]]) -> None:
    """JSON lists of the form that the published code reads, paths relative to `root`."""
    folder = root / "file_lists"
    folder.mkdir()
    source = sorted(written["cityscapes", "train"])
    source_lists = {"RGB": [image for image, _ in source], "label": [label for _, label in source]}
    for name, task in TASKS.items():
        if (task.source, "train") not in written or (task.target, "train") not in written:
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
