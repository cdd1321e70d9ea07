#!/usr/bin/env python
"""Data: how fast raw files become Arrow, Arrow becomes training samples, and raw events become pictures.

    OMP_NUM_THREADS=1 python benchmarks/bench_data.py

Prints Markdown tables. Everything runs in one thread and is timed in CPU seconds, best of `--repeats`, so the
figures are per core.

- Preparation, on a synthetic Cityscapes tree at the official 2048x1024: labels from labelIds with class statistics,
  against cityscapesscripts' conversion of the polygons and a separate pass that counts the classes (as DAFormer's
  tools do). The row with images has no counterpart in that baseline; it is what `prepare_datasets.py` does in all.
- Loading: the source samples of training at 512 pixels (image and label, crop, flip, tensor), from the prepared Arrow
  data, against decoding and resizing the raw 2048x1024 PNG files in the loop; and the memory of the process while
  2,000 training samples (source and target) are drawn.
- Events: DSEC-like `events.h5` to edge pictures of 50 ms, reading and rectification included.
"""

import argparse
import contextlib
import io
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import machine
from madm_utils import cli
from madm_utils.args import formatter, positive_int

TASK = "cityscapes_to_deliver_depth"
NOISE = 3
"""Standard deviation of the noise added to drawn pictures: without it they compress much better than photographs."""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="tables to print")
    parser.add_argument("--images", type=positive_int, default=6, help="pictures of the synthetic tree")
    parser.add_argument("--samples", type=positive_int, default=2000, help="samples of the memory test")
    parser.add_argument("--events", type=positive_int, default=40_000_000, help="events of the recording")
    parser.add_argument("--repeats", type=positive_int, default=5, help="timed repetitions; the best counts")
    return parser.parse_args()


def cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    """Best CPU time of `work` over `repeats` calls, after one that is not counted."""
    work()
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def draw_raw_tree(folder: Path, count: int) -> Path:
    """`count` Cityscapes and DELIVER training pictures of official size below `folder`, noisy as photographs are."""
    import numpy as np
    from PIL import Image

    from madm_utils.raw_layouts import write_raw_layouts

    root = folder / "raw"
    write_raw_layouts(root, count, 1, 0, 1024, layouts=("cityscapes", "cityscapes_polygons", "deliver"))
    rng = np.random.default_rng(0)
    for path in sorted(root.glob("Cityscapes/leftImg8bit/train/*/*.png")) + sorted(
        root.glob("DELIVER/depth/*/train/*/*")
    ):
        pixels = np.asarray(Image.open(path))
        noisy = np.clip(pixels + rng.normal(0, NOISE, pixels.shape).round(), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(path, compress_level=6)
    return root


def bench_preparation(folder: Path, args: argparse.Namespace) -> None:
    """Table of images per second and core, raw to prepared."""
    from dataclasses import replace

    import numpy as np
    from cityscapesscripts.helpers.labels import trainId2label
    from cityscapesscripts.preparation.json2labelImg import json2labelImg
    from PIL import Image

    from madm_utils.raw_datasets import RAW_DATASETS, RawOptions, find_files
    from madm_utils.raw_files import RawTree
    from madm_utils.raw_labels import read_label
    from madm_utils.split_plan import plan_raw_split

    root = draw_raw_tree(folder, args.images)
    polygons = sorted(root.glob("Cityscapes/gtFine/train/*/*_polygons.json"))
    for path in root.glob("Cityscapes/gtFine/*/*/*_labelTrainIds.png"):
        path.unlink()
    dataset = RAW_DATASETS["cityscapes"]
    files = find_files(dataset, "train", RawTree.open(root), RawOptions())
    written = [folder / f"{i}_labelTrainIds.png" for i in range(len(polygons))]

    def polygon_conversion() -> None:
        for source, target in zip(polygons, written, strict=True):
            json2labelImg(str(source), str(target), "trainIds")

    def statistics_pass() -> None:
        for path in written:
            label = np.asarray(Image.open(path))
            {class_id: int((label == class_id).sum()) for class_id in trainId2label if 0 <= class_id < 19}

    def own_labels() -> None:
        for file in files:
            read_label(file)

    def own_stored_labels() -> None:
        for file in files:
            plan.convert.store_label(read_label(file)[0])

    plan = plan_raw_split(dataset, "train", files, dataset.splits["train"].stored_size, {})
    native = replace(plan.convert, stored_size=None)
    scratch = folder / "scratch"
    rows = {
        "polygons with cityscapesscripts": polygon_conversion,
        "and a separate pass for the statistics": lambda: (polygon_conversion(), statistics_pass()),
        "labelIds with statistics": own_labels,
        "labelIds with statistics, resized and stored": own_stored_labels,
        "labelIds and images, resized and stored": lambda: [plan.convert(file, scratch) for file in files],
        "labelIds and images, native size": lambda: [native(file, scratch) for file in files],
    }
    print("\n| preparation | images / s / core | against polygons and pass |\n|---|---|---|")
    rates = {name: len(files) / cpu_seconds(work, args.repeats) for name, work in rows.items()}
    for name, rate in rates.items():
        print(f"| {name} | {rate:.1f} | {rate / rates['and a separate pass for the statistics']:.1f} |")


def bench_loading(folder: Path, args: argparse.Namespace) -> None:
    """Table of source samples per second and core, and of the memory over many samples."""
    import numpy as np
    import psutil
    from PIL import Image

    import prepare_datasets
    from madm_utils.datasets import AdaptationDataset
    from madm_utils.label_spaces import cityscapes_train_ids
    from madm_utils.tasks import TASKS
    from madm_utils.transforms import apply_crop, draw_crop, resize_image, resize_label

    root = draw_raw_tree(folder, args.images)
    flags = ["--task", TASK, "--raw_dir", str(root), "--output_dir", str(folder / "data"), "--num_proc", "1"]
    with contextlib.redirect_stdout(io.StringIO()):
        prepare_datasets.main(flags)
    task = TASKS[TASK]
    images = sorted(root.glob("Cityscapes/leftImg8bit/train/*/*.png"))
    labels = [
        Path(str(path).replace("leftImg8bit", "gtFine", 1).replace("leftImg8bit", "gtFine_labelIds"))
        for path in images
    ]

    def raw_samples() -> None:
        rng = random.Random(0)
        for image_path, label_path in zip(images, labels, strict=True):
            image = np.asarray(resize_image(Image.open(image_path).convert("RGB"), task.source_size))
            label = np.asarray(resize_label(Image.open(label_path), task.source_size))
            crop = draw_crop(rng, task.source_size, 512)
            np.ascontiguousarray(apply_crop(image, crop, 512).transpose(2, 0, 1))
            cityscapes_train_ids(apply_crop(label, crop, 512)).astype(np.int64)

    # Without rare-class sampling, which would cut several crops of one image.
    options = {
        "rare_class_sampling": False,
        "num_samples": max(args.samples, len(images)),
        "seed": 0,
        "resolution": 512,
    }
    source = AdaptationDataset(folder / "data", task, target=False, **options)
    rows = {
        "raw PNG, decoded and resized in the loop": raw_samples,
        "prepared Arrow data": lambda: [source[k] for k in range(len(images))],
    }
    rates = {name: len(images) / cpu_seconds(work, args.repeats) for name, work in rows.items()}
    print("\n| loading | samples / s / core | ratio |\n|---|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.1f} | {rate / next(iter(rates.values())):.1f} |")
    pairs = AdaptationDataset(folder / "data", task, **options)
    process = psutil.Process()
    resident = {}
    for k in range(args.samples):
        pairs[k]
        if k + 1 in (args.samples // 10, args.samples):
            resident[k + 1] = process.memory_info().rss / 2**20
    print("\n| training samples drawn | resident MiB |\n|---|---|")
    for count, size in resident.items():
        print(f"| {count} | {size:.0f} |")


def bench_events(folder: Path, args: argparse.Namespace) -> None:
    """Table of events per second and core, `events.h5` to picture."""
    from madm_utils.event_recording import close_recording
    from madm_utils.event_simulation import FIRST_TIMESTAMP_US, FRAME_US, write_long_recording
    from madm_utils.events import REPRESENTATIONS, EventSettings, EventWindow
    from madm_utils.raw_files import RawPath

    length_us = write_long_recording(folder, args.events, seed=0)
    recording, rectify_map = (RawPath.on_disk(folder / name) for name in ("events.h5", "rectify_map.h5"))
    starts = range(FIRST_TIMESTAMP_US, FIRST_TIMESTAMP_US + length_us, FRAME_US)

    def pictures(representation: str) -> int:
        settings = EventSettings(representation)
        windows = (EventWindow(recording, rectify_map, s, s + FRAME_US, settings, 440) for s in starts)
        return sum(window.load(folder).info["num_events"] for window in windows)

    print("\n| events.h5 to pictures of 50 ms | million events / s / core |\n|---|---|")
    for representation in REPRESENTATIONS:
        count = pictures(representation)
        seconds = cpu_seconds(lambda chosen=representation: pictures(chosen), args.repeats)
        print(f"| {representation} | {count / seconds / 1e6:.1f} |")
    close_recording()


PARTS = {"preparation": bench_preparation, "loading": bench_loading, "events": bench_events}


def main() -> int:
    """Print the tables that were asked for."""
    args = parse_args()
    cli.quiet_libraries()
    print(f"{machine()}, one thread")
    for name in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[name](Path(folder), args)
    return 0


if __name__ == "__main__":
    cli.run(main)
