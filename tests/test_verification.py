"""`--verify` of prepared and raw splits: each damage is found and named, the contact sheet shows the data."""

import dataclasses
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from raw_trees import labels, picture, save, write_cityscapes, write_fmb

from madm_utils import event_simulation
from madm_utils.arrow_writer import content_digest, row_digest
from madm_utils.cli import UserError
from madm_utils.contact_sheet import SHEET_WIDTH, class_palette, contact_sheet, make_sample
from madm_utils.conversion import PublishedStatistics, row_features
from madm_utils.events import EventSettings, EventWindow
from madm_utils.inspection import inspect_all
from madm_utils.label_spaces import CITYSCAPES_CLASSES, DELIVER_CLASSES, FMB_CLASSES, STREET_CLASSES, STREET_PALETTE
from madm_utils.prepared_data import Metadata
from madm_utils.raw_datasets import RAW_DATASETS, RawFile, find_files
from madm_utils.raw_files import RawTree
from madm_utils.verification import unusable_raw, verify_prepared, verify_raw
from madm_utils.verification_report import Report, print_report, write_report

CLASSES = ("road", "car", "sky")
HEIGHT, WIDTH = 4, 6


def encoded(array: np.ndarray, kind: str = "PNG") -> dict:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format=kind)
    return {"bytes": buffer.getvalue(), "path": None}


def good_rows(labelled: bool = True) -> list[dict]:
    """Three images `a.png`, `b.png`, `c.png`: label i holds i + 1 pixels of class 1, one of 255, else class 0."""
    rows = []
    for i, name in enumerate("abc"):
        row = {"file_name": f"{name}.png", "sequence": "", "frame": name, "condition": ""}
        row["image"] = encoded(picture(i, HEIGHT, WIDTH, 3))
        if labelled:
            row |= label_columns(label_with(i + 1))
        rows.append(row)
    return rows


def label_with(cars: int) -> np.ndarray:
    label = np.zeros(HEIGHT * WIDTH, np.uint8)
    label[:cars], label[-1] = 1, 255
    return label.reshape(HEIGHT, WIDTH)


def label_columns(label: np.ndarray) -> dict:
    counts = [int((label == c).sum()) for c in range(len(CLASSES))]
    return {
        "label": encoded(label),
        "class_pixel_counts": counts,
        "classes": [c for c in range(len(CLASSES)) if counts[c]],
    }


def write_split(folder: Path, rows: list[dict], without: tuple[str, ...] = (), **changes) -> Path:
    """A prepared split of `rows` with metadata that fits, but for `changes`; columns `without` are left out."""
    labelled = bool(rows) and "label" in rows[0]
    features = row_features(CLASSES, labelled, bool(rows) and "events" in rows[0])
    data = datasets.Dataset.from_list(rows, features=features) if rows else datasets.Dataset.from_dict(
        {name: [] for name in features}, features=features
    )  # fmt: skip
    data.remove_columns(list(without)).save_to_disk(str(folder), num_shards=1)
    statistics = [row["class_pixel_counts"] or [] for row in rows if labelled]
    counts = np.array([numbers if len(numbers) == len(CLASSES) else [21, 2, 0] for numbers in statistics])
    values = {
        "dataset": folder.parent.name,
        "split": folder.name,
        "class_names": CLASSES,
        "num_images": len(rows),
        "image_size": (HEIGHT, WIDTH),
        "class_pixel_counts": tuple(counts.sum(axis=0).tolist()) if labelled else None,
        "fingerprint": "f" * 32,
        "resized": False,
        "images_per_class": tuple((counts > 0).sum(axis=0).tolist()) if labelled else None,
        "content": content_digest(row_digest(row) for row in rows),
    }
    Metadata(**{**values, **changes}).save(folder)
    return folder


def status(report: Report, what: str) -> str:
    return next(check.status for check in report.checks if check.what == what)


# --- Prepared splits


def test_an_intact_split(tmp_path):
    folder = write_split(tmp_path / "streets/train", good_rows())
    report = verify_prepared(folder)
    assert report.ok and not report.notes and {check.status for check in report.checks} == {"ok"}
    assert (report.dataset, report.split, report.num_images, report.sizes) == ("streets", "train", 3, {"4x6": 3})
    # 24 pixels each: 1 + 2 + 3 of class 1, three times one ignored, the rest class 0.
    assert report.class_pixel_counts == [63, 6, 0] and report.images_per_class == [3, 3, 0]
    content = report.to_dict()
    assert content == json.loads(json.dumps(content)) and content["fingerprint"] == "f" * 32
    assert content["classes"][1] == {"id": 1, "name": "car", "pixels": 6, "share": 6 / 69, "images": 3}
    assert verify_prepared(write_split(tmp_path / "streets/target", good_rows(labelled=False))).to_dict()["ok"]


def cut(row: dict, column: str) -> dict:
    return {column: {"bytes": row[column]["bytes"][:45], "path": None}}


@pytest.mark.parametrize(
    ("change", "check", "message"),
    [
        (lambda row: cut(row, "image"), "images readable", r"^b.png: image or label does not decode \(image: "),
        (lambda row: cut(row, "label"), "labels readable", r"^b.png: image or label does not decode \(label: "),
        (lambda row: {"image": encoded(picture(1, 5, WIDTH))}, "image size",
         r"^b.png: image is \(5, 6\) \(height, width\), expected \(4, 6\)"),
        (lambda row: {"image": encoded(picture(1, HEIGHT, WIDTH, 4))}, "image mode", "^b.png: image has mode RGBA"),
        (lambda row: {"label": encoded(label_with(2)[:, :5])}, "label size",
         r"^b.png: label is \(4, 5\) in mode L, expected \(4, 6\) in mode L"),
        (lambda row: {"label": encoded(picture(1, HEIGHT, WIDTH, 3))}, "label size", "^b.png: label is .* mode RGB"),
        (lambda row: {"class_pixel_counts": [1, 2, 3]}, "pixel counts",
         r"^b.png: class_pixel_counts \[1, 2, 3\] do not fit the label, which has \[21, 2, 0\]"),
        (lambda row: {"class_pixel_counts": [21, 2]}, "pixel counts", r"class_pixel_counts are \[21, 2\], expected 3"),
        (lambda row: {"class_pixel_counts": None}, "pixel counts", "class_pixel_counts are None"),
        (lambda row: {"classes": [0]}, "pixel counts", r"^b.png: classes \[0\] do not fit"),
        (lambda row: {"file_name": "a.png"}, "file names", "file names occur more than once: a.png"),
    ],
)  # fmt: skip
def test_a_damaged_row_is_named(tmp_path, change, check, message):
    rows = good_rows()
    rows[1] |= change(rows[1])
    report = verify_prepared(write_split(tmp_path / "streets/train", rows))
    assert not report.ok and status(report, check) == "PROBLEM"
    assert has(report.problems, message), report.problems
    follows = {"label size"} if check == "image size" else set()
    assert {c.what for c in report.checks if c.status == "PROBLEM"} == {check} | follows


def has(lines: list[str], pattern: str) -> bool:
    return any(re.search(pattern, line) for line in lines)


def test_everything_wrong_is_collected(tmp_path):
    rows = good_rows()
    rows[0] |= cut(rows[0], "image")
    rows[1] |= label_columns(np.full((HEIGHT, WIDTH), 7, np.uint8))
    ids = label_with(1)
    ids[0, 1] = 9
    rows[2] |= label_columns(ids)
    report = verify_prepared(write_split(tmp_path / "streets/train", rows))
    assert has(report.problems, "^a.png: image or label does not decode")
    assert has(report.problems, r"^class ids \[7, 9\] outside the map in 2 labels, first b.png; expected 0..2 or 255")
    assert status(report, "class ids") == status(report, "images readable") == "PROBLEM"
    assert len(report.problems) == 2 and report.images_per_class == [2, 2, 0]


@pytest.mark.parametrize(
    ("changes", "check", "message"),
    [
        ({"num_images": 7}, "images", "streets train holds 3 images, its metadata.json says 7 images"),
        ({"image_size": (9, 9)}, "image size", r"a.png: image is \(4, 6\) .*expected \(9, 9\)"),
        ({"class_names": ("road",)}, "class ids", r"class ids \[1\] outside the map in 3 labels"),
        ({"class_names": ("car", "road", "sky")}, "columns", r"class names of the Arrow data are \['road', 'car', "),
        ({"class_pixel_counts": (1, 2, 3)}, "class statistics",
         r"class statistics in metadata.json are \[1, 2, 3\], the sum over the images is \[63, 6, 0\]"),
        ({"images_per_class": (1, 2, 3)}, "images per class", r"images per class .*is \[3, 3, 0\]"),
        ({"content": "0" * 64}, "content", "the images and labels are not those that were written"),
    ],
)  # fmt: skip
def test_wrong_metadata(tmp_path, changes, check, message):
    report = verify_prepared(write_split(tmp_path / "streets/train", good_rows(), **changes))
    assert status(report, check) == "PROBLEM" and has(report.problems, message), report.problems


def test_the_folder_says_which_dataset_it_is(tmp_path):
    folder = write_split(tmp_path / "data/streets/train", good_rows(), dataset="../../evil", split="../../../worse")
    report = verify_prepared(folder)
    assert (report.dataset, report.split) == ("streets", "train") and status(report, "dataset and split") == "PROBLEM"
    assert report.problems == [
        f"{folder} is the place of streets train, but its metadata.json says that it holds ../../evil "
        "../../../worse; was it copied or renamed? Move it back, or prepare it again"
    ]
    before = set(tmp_path.rglob("*"))
    write_report([report], folder.parent)
    assert set(tmp_path.rglob("*")) - before == {folder.parent / "report.json", folder.parent / "train.png"}


def test_a_split_copied_to_another_dataset(tmp_path):
    shutil.copytree(write_split(tmp_path / "fmb/train", good_rows(False)), tmp_path / "deliver/train")
    assert verify_prepared(tmp_path / "fmb/train").ok
    report = verify_prepared(tmp_path / "deliver/train")
    assert has(report.problems, r"train is the place of deliver train, but .* holds fmb train") and not report.ok
    assert has(report.notes, "deliver train holds 3 images, the published selection has 3983")


def test_a_relative_folder_has_the_same_names(tmp_path, monkeypatch):
    monkeypatch.chdir(write_split(tmp_path / "streets/train", good_rows()))
    report = verify_prepared(Path("."))
    assert report.ok and (report.dataset, report.split) == ("streets", "train")


def test_what_cannot_be_opened_is_reported_too(tmp_path):
    folder = write_split(tmp_path / "streets/train", good_rows())
    next(folder.glob("*.arrow")).unlink()
    assert has(verify_prepared(folder).problems, "train cannot be opened as an Arrow dataset")
    (folder / "metadata.json").write_text("{]")
    report = verify_prepared(folder)
    assert has(report.problems, "cannot be read as metadata") and (report.dataset, report.split) == (
        "streets",
        "train",
    )
    assert report.sheet is None and not report.ok and report.to_dict()["classes"] is None
    assert has(verify_prepared(write_split(tmp_path / "streets/empty", [])).problems, "empty holds no image")


def test_damaged_arrow_offsets_are_not_followed(tmp_path):
    rows = good_rows(labelled=False)
    folder = write_split(tmp_path / "streets/train", rows)
    ends = np.cumsum([0, *(len(row["image"]["bytes"]) for row in rows)]).astype("<i4")
    arrow = next(folder.glob("*.arrow"))
    content = arrow.read_bytes()
    assert content.count(ends.tobytes()) == 1
    arrow.write_bytes(content.replace(ends.tobytes(), np.array([0, -7, 10**9, 5], "<i4").tobytes()))
    assert has(verify_prepared(folder).problems, "train cannot be opened as an Arrow dataset .*offset")


def test_missing_columns(tmp_path):
    folder = write_split(tmp_path / "streets/train", good_rows(), without=("sequence", "class_pixel_counts"))
    report = verify_prepared(folder)
    assert has(report.problems, r"columns \['sequence', 'class_pixel_counts'\] are missing")
    assert report.class_pixel_counts == [63, 6, 0]  # counted from the labels
    folder = write_split(tmp_path / "streets/test", good_rows(), without=("image", "file_name"))
    assert has(verify_prepared(folder).problems, r"columns \['image', 'file_name'\] are missing")


def test_resized_labels_have_other_counts_but_no_other_classes(tmp_path):
    rows = good_rows()
    for row in rows:
        row["class_pixel_counts"], row["classes"] = [500, 60, 1], [0, 1, 2]
    assert verify_prepared(write_split(tmp_path / "streets/train", rows, resized=True)).ok
    assert not verify_prepared(write_split(tmp_path / "streets/native", rows)).ok
    rows[1]["class_pixel_counts"], rows[1]["classes"] = [500, 0, 1], [0, 2]
    report = verify_prepared(write_split(tmp_path / "streets/val", rows, resized=True))
    assert has(report.problems, "^b.png: class_pixel_counts .* do not fit the label") and len(report.problems) == 1


def test_duplicates_are_compared_by_their_pixels(tmp_path):
    rows = good_rows()
    rows[2] |= {key: rows[0][key] for key in ("label", "class_pixel_counts", "classes")}
    rows[2]["image"] = encoded(picture(0, HEIGHT, WIDTH, 3), "TIFF")
    report = verify_prepared(write_split(tmp_path / "streets/train", rows))
    assert report.ok and status(report, "duplicate frames") == "note" and report.duplicates == [["a.png", "c.png"]]
    assert report.notes == ["2 images show the same pixels: a.png, c.png"]
    rows[2] |= label_columns(label_with(3))
    report = verify_prepared(write_split(tmp_path / "streets/val", rows))
    assert status(report, "duplicate frames") == "PROBLEM"
    assert report.problems == ["a.png and c.png show the same pixels but have different labels; one of them is wrong"]


def test_constant_and_unlabelled_images(tmp_path):
    rows = good_rows()
    rows[1]["image"] = encoded(np.full((HEIGHT, WIDTH), 9, np.uint8))
    rows[1] |= label_columns(np.full((HEIGHT, WIDTH), 255, np.uint8))
    report = verify_prepared(write_split(tmp_path / "streets/train", rows))
    assert report.ok and report.notes == [
        "no labelled pixel in 1 of 3 images: b.png", "one value only in 1 of 3 images: b.png"
    ]  # fmt: skip
    rows[0]["image"] = rows[1]["image"]
    report = verify_prepared(write_split(tmp_path / "streets/val", rows))  # most of them: something went wrong
    assert report.problems == ["one value only in 2 of 3 images: a.png, b.png"] and not report.duplicates


def test_published_number_and_skipped_files(tmp_path):
    skipped = ({"file": "d.png", "reason": "truncated"},)
    report = verify_prepared(write_split(tmp_path / "fmb/train", good_rows(False), dataset="fmb", skipped=skipped))
    assert report.ok and status(report, "published images") == status(report, "skipped files") == "note"
    assert has(report.notes, "fmb train holds 3 images, the published selection has 1220")
    assert has(report.notes, r"^skipped: d.png \(truncated\)")


def test_events(tmp_path):
    rows = good_rows(labelled=False)
    for row in rows:
        row["events"] = encoded(np.linspace(-1, 1, 2 * HEIGHT * WIDTH, dtype=np.float32).reshape(-1, WIDTH), "TIFF")
    report = verify_prepared(write_split(tmp_path / "night/train", rows))
    assert report.ok and report.sheet is not None
    rows[0]["events"] = encoded(np.full((HEIGHT, WIDTH), np.nan, np.float32), "TIFF")
    rows[1]["events"] = encoded(np.zeros((HEIGHT + 1, WIDTH), np.float32), "TIFF")
    report = verify_prepared(write_split(tmp_path / "night/test", rows))
    assert has(report.problems, "^a.png: events hold values that are not finite")
    assert has(report.problems, r"^b.png: events are \(5, 6\) in mode F, expected a multiple of 4 x 6 in mode F")


def test_processes_find_the_same(tmp_path):
    rows = [{**row, "file_name": f"{i}{row['file_name']}"} for i in range(12) for row in good_rows()]
    rows[30] |= cut(rows[30], "image")
    folder = write_split(tmp_path / "streets/train", rows)
    one, two = verify_prepared(folder, 1), verify_prepared(folder, 2)
    assert one.to_dict() == two.to_dict() and has(two.problems, "^10a.png: image or label does not decode")
    assert np.array_equal(one.sheet, two.sheet) and len(one.duplicates) == 3


def test_a_worker_that_is_killed_is_a_message():
    with pytest.raises(UserError, match="a worker process was ended from outside.*--num_proc"):
        list(inspect_all(os._exit, [9] * 20, 2, "test"))


INTERRUPTED_TWICE = """
import os, signal, sys, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from madm_utils.inspection import Seen, inspect_all

SEEN = Path({folder!r})

def slow(item):
    (SEEN / str(item)).touch()
    time.sleep(0.1)
    return Seen(str(item))

shutdown = ProcessPoolExecutor.shutdown

def interrupted(self, *args, **kwargs):
    os.kill(os.getpid(), signal.SIGINT)  # the second Ctrl-C, while the first ends the workers
    shutdown(self, *args, **kwargs)

if __name__ == "__main__":
    ProcessPoolExecutor.shutdown = interrupted
    before = signal.getsignal(signal.SIGINT)
    found = inspect_all(slow, range(2000), 2, "slow")
    try:
        for seen in found:
            signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        before_stop = len(list(SEEN.iterdir()))
        found.close()
        further = len(list(SEEN.iterdir())) - before_stop
        assert further <= 8, further  # the one in hand of each worker; their tasks and those that wait hold 30 more
        assert signal.getsignal(signal.SIGINT) is before
        sys.exit(130)
"""


def test_interrupted_twice(tmp_path):
    (tmp_path / "seen").mkdir()
    script = tmp_path / "run.py"
    script.write_text(INTERRUPTED_TWICE.format(folder=str(tmp_path / "seen")))
    root = Path(__file__).parent.parent
    ended = subprocess.run(
        [sys.executable, script], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True,
        text=True, timeout=60,
        # A shell's background job ignores Ctrl-C and passes that on; the test may run in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert ended.returncode == 130 and "Traceback" not in ended.stderr, ended.stderr


# --- Raw splits


def raw_report(raw: Path, name: str, split: str, **options) -> Report:
    dataset = RAW_DATASETS[name]
    return verify_raw(dataset, split, find_files(dataset, split, RawTree.open(raw)), **options)


def test_an_intact_raw_split(tmp_path):
    write_cityscapes(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    report = raw_report(tmp_path, "cityscapes", "val", complete=False)
    assert report.ok and report.kind == "raw" and report.sizes == {"8x16": 1} and report.num_images == 1
    label_ids = labels(0, [*range(34), 255], 8, 16)
    assert report.class_pixel_counts[0] == (label_ids == 7).sum()  # road
    assert report.images_per_class[13] == int((label_ids == 26).any())  # car
    assert sorted(tmp_path.rglob("*")) == before and report.sheet is not None


def test_an_incomplete_download_is_a_problem(tmp_path):
    write_fmb(tmp_path)
    report = raw_report(tmp_path, "fmb", "train")
    assert report.problems == [
        "fmb train holds 2 images, the published selection has 1220; was everything downloaded and unpacked?"
    ]
    assert raw_report(tmp_path, "fmb", "train", complete=False).ok


def test_everything_wrong_with_raw_files(tmp_path):
    write_cityscapes(tmp_path)
    images, targets = (tmp_path / "Cityscapes" / part / "train" for part in ("leftImg8bit", "gtFine"))
    path = images / "aachen/aachen_000000_000019_leftImg8bit.png"
    path.write_bytes(path.read_bytes()[:-40])
    wrong_id = targets / "aachen/aachen_000001_000019_gtFine_labelIds.png"
    save(wrong_id, np.full((8, 16), 35))
    wrong_size = targets / "bochum/bochum_000000_000313_gtFine_labelIds.png"
    save(wrong_size, np.full((8, 15), 7))
    report = raw_report(tmp_path, "cityscapes", "train", complete=False)
    assert has(report.problems, f"^{path} cannot be read as an image")
    assert has(
        report.problems, rf"^class ids \[35\] outside the map in 1 label, first .*{wrong_id.name}; expected 0..33"
    )
    assert has(report.problems, f"^{wrong_size}: label is 15x8 pixels but its image is 16x8")
    assert len(report.problems) == 3 and report.sheet is None
    label = targets / "bochum/bochum_000000_000313_gtFine_labelIds.png"
    label.write_bytes(b"nothing")
    report = raw_report(tmp_path, "cityscapes", "train", complete=False)
    assert (
        has(report.problems, f"^{label} cannot be read as an image") and status(report, "labels readable") == "PROBLEM"
    )


def test_images_of_more_than_8_bits_need_a_range(tmp_path):
    write_fmb(tmp_path)
    Image.fromarray(np.arange(48, dtype=np.uint16).reshape(6, 8)).save(tmp_path / "FMB/train/Infrared/00001.png")
    report = raw_report(tmp_path, "fmb", "train", complete=False)
    assert has(report.problems, "00001.png: image mode I;16 .*--image_range")
    assert raw_report(tmp_path, "fmb", "train", complete=False, image_range=(0, 47)).ok


def test_raw_duplicates_and_missing_labels(tmp_path):
    write_fmb(tmp_path)
    shutil.copy(tmp_path / "FMB/train/Infrared/00001.png", tmp_path / "FMB/train/Infrared/00009.png")
    report = raw_report(tmp_path, "fmb", "train", complete=False)
    assert report.ok and report.duplicates == [["train/Infrared/00001.png", "train/Infrared/00009.png"]]
    fmb = RAW_DATASETS["fmb"]
    files = find_files(fmb, "test", RawTree.open(tmp_path))
    report = verify_raw(fmb, "test", [dataclasses.replace(files[0], label=None)], complete=False)
    assert has(report.problems, "00043.png lacks a label") and status(report, "labels") == "PROBLEM"
    assert has(verify_raw(fmb, "test", [], complete=False).problems, "fmb test holds no image")
    report = unusable_raw(fmb, "test", UserError("1 of 1 images\nlack a label"))
    assert report.problems == ["1 of 1 images lack a label"] and not report.ok


def test_published_statistics_of_raw_labels(tmp_path):
    write_fmb(tmp_path)
    wrong = PublishedStatistics("stats.json", {"00043": {1: 7}})
    report = raw_report(tmp_path, "fmb", "test", complete=False, statistics=wrong)
    assert has(report.problems, "^stats.json disagrees with .*00043.png")
    assert status(report, "published counts") == "PROBLEM"


def test_scratch_is_where_the_caller_says(tmp_path, monkeypatch):
    """Recordings in archives are unpacked below `scratch`, and nothing of them stays."""
    grid = np.stack(np.meshgrid(np.arange(640), np.arange(480)), axis=2).astype(np.float32)
    batch = tuple(np.array([3], kind) for kind in ("u4", "u2", "u2", "u1"))
    event_simulation.write_recording(tmp_path / "recording", [batch], 0, grid)
    with zipfile.ZipFile(tmp_path / "raw.zip", "w") as archive:
        for path in (tmp_path / "recording").iterdir():
            archive.write(path, path.name)
    tree = RawTree.open(tmp_path / "raw.zip")
    window = EventWindow(tree.files["events.h5"], tree.files["rectify_map.h5"], 0, 1000, EventSettings("count"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no temporary folder"))
    scratch = tmp_path / "work" / "scratch"
    report = verify_raw(RAW_DATASETS["dsec"], "train", [RawFile(window, "a.png")], complete=False, scratch=scratch)
    assert report.sizes == {"480x640": 1} and report.problems == [], report.problems
    assert list(scratch.iterdir()) == []


# --- What is written and shown


def test_report_files(tmp_path, capsys):
    rows = good_rows()
    rows[0] |= cut(rows[0], "image")
    train = verify_prepared(write_split(tmp_path / "streets/train", rows))
    test = verify_prepared(write_split(tmp_path / "streets/test", good_rows()))
    folder = tmp_path / "streets"
    assert write_report([test], folder) == [folder / "report.json", folder / "test.png"]
    assert json.loads((folder / "report.json").read_text())["ok"]
    write_report([train], folder)  # what was known about the other split stays
    content = json.loads((folder / "report.json").read_text())
    assert not content["ok"] and [(s["split"], s["ok"]) for s in content["splits"]] == [
        ("test", True),
        ("train", False),
    ]
    assert content["splits"][1]["problems"] == train.problems
    with Image.open(folder / "train.png") as sheet:
        assert sheet.width <= SHEET_WIDTH
    train.sheet = None
    write_report([train, dataclasses.replace(test, kind="raw")], folder)
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == [
        "raw_report.json", "raw_test.png", "report.json", "test.png"
    ]  # fmt: skip
    print_report(train)
    shown = capsys.readouterr().out
    assert re.search(r"images readable +all +1 wrong +PROBLEM", shown) and "1 problem:\n    a.png: image or" in shown
    assert re.search(r"1  car +6 +8.70 % +3\n", shown)


@pytest.mark.parametrize(("writer", "name", "file"), [(Path, "write_text", "report.json"),
                                                      (Image.Image, "save", "train.png")])  # fmt: skip
def test_a_full_disk_is_a_message(tmp_path, monkeypatch, writer, name, file):
    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, name, full)
    with pytest.raises(UserError, match=f"cannot write in {tmp_path} .*No space left.* make room"):
        write_report([Report("streets", "train", "prepared", sheet=flat((1, 2, 3)))], tmp_path)
    assert not (tmp_path / file).exists()


def test_only_the_first_problems_are_printed(capsys):
    print_report(Report("streets", "train", "raw", problems=[f"problem {i}" for i in range(25)]))
    shown = capsys.readouterr().out
    assert "problem 19" in shown and "problem 20" not in shown and "... and 5 more" in shown


def test_names_that_are_no_text_do_not_break_the_report(tmp_path, capsys):
    rows = good_rows()
    rows[0]["file_name"] = "two\nlines \u7530.png"
    rows[0] |= cut(rows[0], "image")
    report = verify_prepared(write_split(tmp_path / "streets/train", rows))
    print_report(report)
    assert "two lines \u7530.png: image or label does not decode" in capsys.readouterr().out
    assert write_report([report], tmp_path)


# --- Contact sheets


def flat(color, height=100, width=200) -> Image.Image:
    return Image.new("RGB", (width, height), color)


def rows_of(sheet: Image.Image, color: tuple[int, int, int]) -> np.ndarray:
    """Boxes (top, bottom, left, right) that `color` fills."""
    found = np.argwhere((np.asarray(sheet) == color).all(axis=2))
    return (*found[:, 0][[0, -1]], found[:, 1].min(), found[:, 1].max()) if len(found) else None


def test_sheet_shows_image_label_and_overlay_side_by_side():
    ids = np.zeros((100, 200), np.uint8)
    ids[:, 100:] = 1
    ids[80:] = 255
    sample = make_sample("a.png", flat((200, 100, 40)), Image.fromarray(ids))
    sheet = contact_sheet([sample], "streets train", "", ("road", "moon"), (0.25, 0.75))
    pixels = np.asarray(sheet)
    road, moon = class_palette(("road", "moon"))
    assert road == STREET_PALETTE["road"] and sheet.width <= SHEET_WIDTH
    top, _, left, right = rows_of(sheet, (200, 100, 40))  # the image, and where the overlay has nothing to lay over
    cell = (SHEET_WIDTH - 6) // 3 - 6
    assert left == 6 and (pixels[top : top + cell // 2, 6 : 6 + cell] == (200, 100, 40)).all()
    middle, low = top + cell // 8, top + int(cell / 2 * 0.9)
    label, overlay = 6 + cell + 6, 6 + 2 * (cell + 6)
    for start, expect in ((label, lambda c: c), (overlay, lambda c: (np.array([200, 100, 40]) + c) / 2)):
        for x, color in ((cell // 4, road), (3 * cell // 4, moon)):
            assert np.abs(pixels[middle, start + x] - expect(np.array(color))).max() <= 0.5
    assert tuple(pixels[low, label + 50]) == (0, 0, 0) and tuple(pixels[low, overlay + 50]) == (200, 100, 40)
    # The legend below shows both colours and black.
    legend = {tuple(color) for color in pixels[top + cell // 2 :].reshape(-1, 3)}
    assert {road, moon, (0, 0, 0)} <= legend
    plain = contact_sheet([sample], "streets train", "", ("road", "moon"))
    assert contact_sheet([sample], "streets train", "2 problems", ("road", "moon")).height > plain.height


def test_unknown_ids_are_white():
    ids = np.full((100, 200), 9, np.uint8)
    sheet = contact_sheet([make_sample("a", flat((9, 9, 9)), Image.fromarray(ids))], "t", "", ("road", "car"))
    top, *_ = rows_of(sheet, (9, 9, 9))
    assert (np.asarray(sheet)[top : top + 190, 410:780] == 255).all()


def test_sheet_of_unlabelled_images_has_four_columns():
    colors = [(40 * i, 255 - 40 * i, 7) for i in range(6)]
    sheet = contact_sheet([make_sample(f"{i}.png", flat(color)) for i, color in enumerate(colors)], "streets target")
    boxes = [rows_of(sheet, color) for color in colors]
    cell = (SHEET_WIDTH - 6) // 4 - 6
    assert [box[2] for box in boxes] == [6 + (i % 4) * (cell + 6) for i in range(6)]
    assert all(box[3] - box[2] == cell - 1 for box in boxes) and boxes[4][0] > boxes[0][1]
    tall = contact_sheet([make_sample("tall.png", flat((1, 2, 3), height=4000, width=2))], "t")
    assert tall.height < 600


def test_events_are_shown_around_grey():
    events = np.zeros((200, 200), np.float32)
    events[:50], events[100:150] = 0.25, 0.25  # two bins of 100 rows, equal: the upper half has events
    events[50:100] = -0.5
    sample = make_sample("a.png", flat((1, 2, 3)), events=Image.fromarray(events))
    assert tuple(sample.events[5, 5]) == (255, 255, 255) and tuple(sample.events[-5, 5]) == (0, 0, 0)
    sheet = contact_sheet([sample], "night")
    assert sheet.width == 2 * (6 + (SHEET_WIDTH - 6) // 4 - 6) + 6


@pytest.mark.parametrize(
    "names",
    [CITYSCAPES_CLASSES, DELIVER_CLASSES, FMB_CLASSES, STREET_CLASSES, ("person", "Pedestrian", "cars", "car"),
     tuple(f"class {i}" for i in range(254))],
)  # fmt: skip
def test_palettes_have_different_colors(names):
    palette = class_palette(names)
    assert len(set(palette)) == len(names) and not {(0, 0, 0), (255, 255, 255)} & set(palette)
    assert class_palette(names) == palette
    assert all(isinstance(value, int) and 0 <= value <= 255 for color in palette for value in color)


def test_classes_have_the_colors_people_know():
    assert class_palette(STREET_CLASSES) == tuple(STREET_PALETTE.values())
    cityscapes = dict(zip(CITYSCAPES_CLASSES, class_palette(CITYSCAPES_CLASSES), strict=True))
    assert cityscapes["traffic sign"] == (220, 220, 0) and cityscapes["bicycle"] == (119, 11, 32)
    deliver = dict(zip(DELIVER_CLASSES, class_palette(DELIVER_CLASSES), strict=True))
    assert deliver["Cars"] == (0, 0, 142) and deliver["Pedestrian"] == (220, 20, 60)
