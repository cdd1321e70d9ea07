"""Every dataset from an archive to prepared data: each pixel and column against slow rules typed from the owners' and
the papers' specifications, and the published selections against the descriptions in the code.

The slow rules share nothing with the code under test: a dictionary per pixel value, Pillow's filters at the published
size, pypng for 16 bits, cityscapesscripts for polygons, and a loop over single events.
"""

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import h5py
import hdf5plugin  # noqa: F401  recordings are compressed with Blosc
import numpy as np
import png
import pytest
from cityscapesscripts.helpers.annotation import Annotation
from cityscapesscripts.preparation.json2labelImg import createLabelImage
from PIL import Image
from test_events import slow_tensor

import prepare_datasets
from madm_utils.dsec import DSEC_SEQUENCES, FIRST_NIGHT_FRAME, NIGHT_LAST_TEST_FRAMES
from madm_utils.event_recording import close_recording
from madm_utils.events import EventSettings
from madm_utils.label_spaces import CITYSCAPES_LABEL_IDS, SYNTHIA_CLASS_IDS
from madm_utils.raw_datasets import RAW_DATASETS
from madm_utils.raw_layouts import LAYOUTS, RECORDINGS, write_raw_layouts

HEIGHT, SEED = 96, 11

# --- Typed from the specifications

TRAIN_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13,
             27: 14, 28: 15, 31: 16, 32: 17, 33: 18}  # fmt: skip
SYNTHIA_IDS = {3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 16: 9, 1: 10, 10: 11, 17: 12, 8: 13, 18: 14,
               19: 15, 20: 16, 12: 17, 11: 18}  # fmt: skip
OWN_CLASSES = ("ground", "other")
OWN_IDS = {1: 0, 2: 0, 3: 1, 6: 1}
"""Of `--dataset folder`: FMB's road, sidewalk, building and vegetation as two classes."""
STORED_SIZES = {
    "cityscapes": (512, 1024), "deliver": (712, 712), "fmb": (512, 683), "dsec": (512, 768),
    "dark_zurich": (540, 960), "gta5": (704, 1280), "synthia": None, "dsec_night": None,
}  # fmt: skip
"""(height, width) of training data, `None`: native. What is evaluated is always native."""
PUBLISHED_COUNTS = {
    ("cityscapes", "train"): 2975, ("cityscapes", "val"): 500,
    ("deliver", "train"): 3983, ("deliver", "val"): 2005, ("deliver", "test"): 1897,
    ("fmb", "train"): 1220, ("fmb", "test"): 280,
    ("dsec", "train"): 4037, ("dsec", "test"): 2806,
    ("dsec_night", "train"): 1692, ("dsec_night", "test"): 150,
    ("gta5", "train"): 24966, ("synthia", "train"): 9400,
}  # fmt: skip
DSEC_FRAMES = {
    "train": {"00_a": 469, "01_a": 340, "02_a": 117, "04_a": 350, "05_a": 876, "06_a": 761, "07_a": 731, "08_a": 393},
    "test": {"13_a": 378, "14_c": 1190, "15_a": 1238},
}
"""Frames of MADM's selection: of training sequences 2, 4, 6, ..., of test sequences 1, 2, 3, ..."""
NIGHT_FRAMES_AFTER = {"a": 797, "b": 149, "c": 581, "d": 743, "e": 365}


def test_published_counts():
    assert {key: RAW_DATASETS[key[0]].splits[key[1]].published_count for key in PUBLISHED_COUNTS} == PUBLISHED_COUNTS
    for name, entry in RAW_DATASETS.items():  # modalities and label sets show the same frames
        for split, spec in entry.splits.items():
            base = RAW_DATASETS[entry.base or name].splits[split]
            assert spec.published_count == base.published_count and spec.stored_size == base.stored_size


def test_stored_sizes():
    assert {name: RAW_DATASETS[name].splits["train"].stored_size for name in STORED_SIZES} == STORED_SIZES
    evaluated = {split.stored_size for d in RAW_DATASETS.values() for n, split in d.splits.items() if n != "train"}
    assert evaluated == {None}


def test_id_maps():
    assert CITYSCAPES_LABEL_IDS == TRAIN_IDS and SYNTHIA_CLASS_IDS == SYNTHIA_IDS


def test_selection_of_dsec():
    for split, frames in DSEC_FRAMES.items():
        assert DSEC_SEQUENCES[split] == tuple(f"zurich_city_{name}" for name in frames)
        first, step = {"train": (2, 2), "test": (1, 1)}[split]
        for name in ("dsec", "dsec_19"):
            spec = RAW_DATASETS[name].splits[split]
            selected = [
                sum(spec.selects(f"{frame:06d}") for frame in range(first + step * (number - 1) + 1))
                for number in frames.values()
            ]
            assert selected == list(frames.values()) and sum(selected) == spec.published_count


def test_selection_of_the_night_sequences():
    assert NIGHT_LAST_TEST_FRAMES == {f"zurich_city_09_{letter}": n for letter, n in NIGHT_FRAMES_AFTER.items()}
    assert FIRST_NIGHT_FRAME == 2


# --- Slow rules


def mapped(values: np.ndarray, table: dict[int, int]) -> np.ndarray:
    """Look up each pixel; what is not listed is ignored."""
    return np.array([[table.get(value, 255) for value in line] for line in values.tolist()], np.uint8)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def label_ids(path: Path) -> np.ndarray:
    return mapped(pixels(path), TRAIN_IDS)


def deliver(path: Path) -> np.ndarray:
    return mapped(pixels(path)[..., 0], {red: red - 1 for red in range(1, 255)})


def synthia(path: Path) -> np.ndarray:
    _, _, lines, info = png.Reader(filename=str(path)).read()
    assert info["bitdepth"] == 16
    return mapped(np.array([list(line)[::3] for line in lines]), SYNTHIA_IDS)


def polygons(path: Path) -> np.ndarray:
    annotation = Annotation()
    annotation.fromJsonFile(str(path))
    return np.asarray(createLabelImage(annotation, "trainIds"))


def own(path: Path) -> np.ndarray:
    return mapped(pixels(path), OWN_IDS)


@dataclass(frozen=True)
class Case:
    """One split: the flags that prepare it, its raw files, and what is known of them."""

    name: str
    split: str
    images: str
    columns: Callable[[tuple[str, ...]], tuple[str, str, str]]
    """Parts of an image's path -> sequence, frame, condition."""
    label: Callable[[Path], np.ndarray] | None = None
    label_path: Callable[[str], str] | None = None
    num_classes: int = 19
    flags: tuple[str, ...] = ()
    archives: str = "archives"
    """The folder of archives that it is made from."""

    @property
    def dataset(self) -> str:
        return self.name.split("_polygons")[0]

    def size(self) -> tuple[int, int] | None:
        base = next((name for name in STORED_SIZES if self.name.startswith(name)), None)
        return STORED_SIZES[base] if base and self.split == "train" else None


def city(split: str, kind: str, rule: Callable, **options) -> Case:
    return Case(
        "cityscapes" + options.pop("suffix", ""), split, f"Cityscapes/leftImg8bit/{split}/*/*.png",
        lambda parts: (parts[-2], parts[-1].removesuffix("_leftImg8bit.png"), ""), rule,
        lambda path: path.replace("leftImg8bit/", "gtFine/").replace("leftImg8bit.png", f"gtFine_{kind}"),
        flags=("--dataset", "cityscapes"), **options,
    )  # fmt: skip


def deliver_case(split: str, name: str, folder: str, ending: str, *flags: str) -> Case:
    labelled = split == "test"
    return Case(
        name, split, f"DELIVER/{folder}/*/{split}/*/*.png",
        lambda parts: (parts[-2], parts[-1].removesuffix(f"_{ending}_front.png"), parts[2]),
        deliver if labelled else None,
        lambda path: path.replace(f"/{folder}/", "/semantic/").replace(f"{ending}_front", "semantic_front"),
        25, flags=("--dataset", "deliver", *flags),
    )  # fmt: skip


def fmb_case(split: str, name: str, folder: str, *flags: str) -> Case:
    return Case(
        name, split, f"FMB/{split}/{folder}/*.png", lambda parts: ("", parts[-1].removesuffix(".png"), ""),
        pixels if split == "test" else None, lambda path: path.replace(f"/{folder}/", "/Label/"), 15,
        flags=("--dataset", "fmb", *flags),
    )  # fmt: skip


def dsec_case(split: str) -> Case:
    return Case(
        "dsec", split, f"DSEC/69mask_{split}_edges/*/*.png",
        lambda parts: (parts[-2], parts[-1].removesuffix(".png"), ""), pixels if split == "test" else None,
        lambda path: path.replace("69mask_test_edges", "test_semantic_labels").replace("_a/", "_a/11classes/")
        .replace("_c/", "_c/11classes/"),
        11, flags=("--dataset", "dsec"),
    )  # fmt: skip


def dark_zurich_case(split: str) -> Case:
    return Case(
        "dark_zurich", split, f"Dark_Zurich/rgb_anon/{split}/night/*/*.png",
        lambda parts: (parts[-2], parts[-1].removesuffix("_rgb_anon.png"), "night"),
        label_ids if split == "val" else None,
        lambda path: path.replace("/rgb_anon/", "/gt/").replace("_rgb_anon.png", "_gt_labelIds.png"),
        flags=("--dataset", "dark_zurich"),
    )  # fmt: skip


def number(parts: tuple[str, ...]) -> tuple[str, str, str]:
    return "", parts[-1].removesuffix(".png"), ""


CASES = [
    city("train", "labelIds.png", label_ids),
    city("val", "labelIds.png", label_ids),
    city("train", "polygons.json", polygons, suffix="_polygons", archives="polygons"),
    city("val", "polygons.json", polygons, suffix="_polygons", archives="polygons"),
    *(
        deliver_case(split, *variant)
        for variant in (
            ("deliver", "depth", "depth"),
            ("deliver_event", "event", "event", "--modality", "event"),
            ("deliver_lidar", "lidar", "lidar", "--modality", "lidar"),
            ("deliver_hha", "hha", "depth", "--modality", "hha"),
            ("deliver_rgb", "img", "rgb", "--modality", "rgb"),
        )
        for split in ("train", "test")
    ),
    *(fmb_case(split, "fmb", "Infrared") for split in ("train", "test")),
    *(fmb_case(split, "fmb_visible", "Visible", "--modality", "visible") for split in ("train", "test")),
    *(dsec_case(split) for split in ("train", "test")),
    *(dark_zurich_case(split) for split in ("train", "val")),
    Case("gta5", "train", "GTA5/images/*.png", number, label_ids,
         lambda path: path.replace("/images/", "/labels/"), flags=("--dataset", "gta5")),
    Case("synthia", "train", "RAND_CITYSCAPES/RGB/*.png", number, synthia,
         lambda path: path.replace("/RGB/", "/GT/LABELS/"), flags=("--dataset", "synthia")),
    Case("mine", "val", "FMB/test/Visible/*.png", lambda parts: ("", "", ""), own,
         lambda path: path.replace("/Visible/", "/Label/"), 2),
]  # fmt: skip


# --- From archives to rows


def archive(folder: Path, path: Path, keep: Callable[[str], bool] = lambda name: True) -> Path:
    """Zip `folder`, with its own name, without the files that `keep` refuses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        for member in sorted(folder.rglob("*")):
            if member.is_file() and keep(member.name):
                file.write(member, member.relative_to(folder.parent).as_posix())
    return path


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """`plain`: all layouts as files; `archives`: a zip of each, labels as labelIds; `polygons`: without label PNGs;
    `recordings`: raw events only."""
    root = tmp_path_factory.mktemp("all")
    write_raw_layouts(root / "plain", 2, 1, SEED, HEIGHT, progress=False, layouts=tuple(LAYOUTS))
    write_raw_layouts(root / "events", 1, 1, SEED, HEIGHT, progress=False, layouts=tuple(RECORDINGS))
    for folder in (root / "plain").iterdir():
        if folder.name != "file_lists":
            archive(folder, root / f"archives/{folder.name}.zip", lambda name: "labelTrainIds" not in name)
    archive(
        root / "plain/Cityscapes", root / "polygons/Cityscapes.zip",
        lambda name: name.endswith(("leftImg8bit.png", "polygons.json")),
    )  # fmt: skip
    archive(root / "events/DSEC_recordings/DSEC", root / "recordings/DSEC.zip")
    archive(root / "events/DSEC_Night", root / "recordings/DSEC_Night.zip")
    yield root
    close_recording()


def prepare(*argv: object) -> None:
    assert prepare_datasets.main([str(arg) for arg in (*argv, "--num_proc", 1)]) == 0


def prepared(raw: Path, case: Case):
    """Rows and metadata of a split; its dataset is prepared when it is first asked for."""
    out = raw / f"prepared_{case.archives}"
    folder = out / case.dataset / case.split
    if not folder.exists():
        flags = ["--raw_dir", raw / case.archives, *case.flags]
        if case.name == "mine":
            label_map = raw / "map.json"
            label_map.write_text(json.dumps({"class_names": OWN_CLASSES, "ids": OWN_IDS, "other": "ignore"}))
            flags = ["--dataset", "folder", "--name", "mine", "--split", "val", "--label_map", label_map]
            for what, part in (("--images", "Visible"), ("--labels", "Label")):
                flags += [what, archive(raw / "plain/FMB/test" / part, raw / f"mine/{part}.zip")]
        prepare(*flags, "--output_dir", out)
    return datasets.load_from_disk(str(folder)), json.loads((folder / "metadata.json").read_text())


def resized(image: Image.Image, size: tuple[int, int] | None, resample: Image.Resampling) -> np.ndarray:
    return np.asarray(image if size is None else image.resize(size[::-1], resample))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.split}")
def test_every_pixel(raw, case):
    data, metadata = prepared(raw, case)
    plain = raw / "plain"
    paths = sorted(path.relative_to(plain).as_posix() for path in plain.glob(case.images))
    assert len(data) == len(paths) == metadata["num_images"] == (2 if case.split == "train" else 1)
    assert ("label" in data.column_names) == (case.label is not None)
    total, seen = np.zeros(case.num_classes, int), set()
    for row, path in zip(data, paths, strict=True):
        assert path.endswith(row["file_name"])
        expected = case.columns(Path(path).parts)
        assert (row["sequence"], row["frame"], row["condition"]) == expected or case.name == "mine"
        with Image.open(plain / path) as image:
            assert row["image"].mode == image.mode
            np.testing.assert_array_equal(row["image"], resized(image, case.size(), Image.Resampling.BILINEAR))
        if case.label is None:
            continue
        label = case.label(plain / case.label_path(path))
        counts = [int((label == class_id).sum()) for class_id in range(case.num_classes)]
        assert row["class_pixel_counts"] == counts and sum(counts) + int((label == 255).sum()) == label.size
        assert row["classes"] == [class_id for class_id, count in enumerate(counts) if count]
        nearest = resized(Image.fromarray(label), case.size(), Image.Resampling.NEAREST)
        np.testing.assert_array_equal(row["label"], nearest)
        total += counts
        seen |= set(row["classes"])
    if case.label is not None:
        assert metadata["class_pixel_counts"] == total.tolist() and len(seen) >= 2


# --- Recordings


def events_of(folder: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """All events of a recording, with absolute times, and its rectification map."""
    with h5py.File(folder / "events.h5") as file:
        columns = {name: file[f"events/{name}"][:] for name in "txyp"}
        columns["t"] = columns["t"].astype(np.int64) + int(file["t_offset"][()])
    with h5py.File(folder / "rectify_map.h5") as file:
        return columns, file["rectify_map"][:]


def slow(columns: dict[str, np.ndarray], chosen: np.ndarray, rectify_map: np.ndarray, kind: str) -> np.ndarray:
    events = list(zip(*(columns[name][chosen].tolist() for name in "txyp"), strict=True))
    assert len(events) > 1000
    return slow_tensor(events, rectify_map, EventSettings(kind))[0]


def test_edges_of_dsec_recordings(raw):
    out, plain = raw / "prepared_recordings", raw / "events/DSEC_recordings/DSEC"
    for classes in (11, 19):
        prepare(
            "--dataset", "dsec", "--label_classes", classes, "--raw_dir", raw / "recordings", "--output_dir", out
        )  # fmt: skip
    for split, letters, frames in (("train", "00_a", [2]), ("test", "13_a", [1, 2])):
        sequence = f"zurich_city_{letters}"
        folder = plain / split / sequence
        columns, rectify_map = events_of(folder / "events/left")
        times = [int(line) for line in (folder / f"{sequence}_semantic_timestamps.txt").read_text().split()]
        rows, rows_19 = (datasets.load_from_disk(str(out / name / split)) for name in ("dsec", "dsec_19"))
        assert rows["frame"][:] == rows_19["frame"][:] == [f"{frame:06d}" for frame in frames]
        assert set(rows["sequence"][:]) == {sequence}
        for frame, row, row_19 in zip(frames, rows, rows_19, strict=True):
            chosen = (columns["t"] >= times[frame - 1]) & (columns["t"] < times[frame])
            edges = Image.fromarray((slow(columns, chosen, rectify_map, "edge")[:440] * 255).astype(np.uint8))
            size = STORED_SIZES["dsec"] if split == "train" else None
            expected = resized(edges, size, Image.Resampling.BILINEAR)
            np.testing.assert_array_equal(row["image"], expected)
            np.testing.assert_array_equal(row_19["image"], expected)
            for classes, stored in ((11, row), (19, row_19)) if split == "test" else ():
                label = pixels(folder / f"{classes}classes/data/{frame:06d}.png")
                np.testing.assert_array_equal(stored["label"], label)
                assert stored["class_pixel_counts"] == [int((label == c).sum()) for c in range(classes)]


def test_images_and_tensors_of_the_night_recordings(raw):
    out, plain = raw / "prepared_recordings", raw / "events/DSEC_Night"
    prepare("--dataset", "dsec_night", "--raw_dir", raw / "recordings", "--output_dir", out)
    for split, offset in (("train", 1), ("test", 0)):
        rows = datasets.load_from_disk(str(out / "dsec_night" / split))
        frames = [NIGHT_FRAMES_AFTER[letter] + offset for letter in "ab"]
        assert rows["frame"][:] == [f"{frame:06d}" for frame in frames]
        assert rows["condition"][:] == ["night"] * 2
        for letter, frame, row in zip("ab", frames, rows, strict=True):
            folder = plain / f"zurich_city_09_{letter}"
            assert row["sequence"] == folder.name
            np.testing.assert_array_equal(row["image"], pixels(folder / f"warp_images/{frame:06d}.png"))
            columns, rectify_map = events_of(folder / "events/left")
            times = [int(line) for line in (folder / "images/timestamps.txt").read_text().split()]
            # The last event at or before each of the two times; both belong to the window.
            first, last = (int(np.flatnonzero(columns["t"] <= times[i])[-1]) for i in (frame - 1, frame))
            if (split, letter) == ("train", "a"):  # a loop over single events takes a second
                expected = slow(columns, np.arange(first, last + 1), rectify_map, "voxel")
                np.testing.assert_allclose(np.asarray(row["events"]), expected, atol=5e-6)
            if split == "test":
                label = pixels(folder / f"labels/{folder.name}_{frame:06d}_grey_gtFine_labelTrainIds.png")
                np.testing.assert_array_equal(row["label"], label)
                assert row["class_pixel_counts"] == [int((label == c).sum()) for c in range(19)]
