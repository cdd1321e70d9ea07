"""Raw recordings of DSEC-Semantic and CMDA's night sequences: which frames, which events, from any layout."""

import re
import zipfile
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from madm_utils.cli import UserError
from madm_utils.dsec import compute_event_index, find_dsec_events, find_dsec_night, read_event_index, read_timestamps
from madm_utils.event_recording import close_recording
from madm_utils.event_simulation import FIRST_TIMESTAMP_US, FRAME_US, write_dsec_night_tree, write_dsec_tree
from madm_utils.events import EventSettings
from madm_utils.raw_datasets import RAW_DATASETS
from madm_utils.raw_descriptions import PUBLISHED, RawOptions
from madm_utils.raw_files import RawPath, RawTree

DSEC, DSEC_19, NIGHT = (RAW_DATASETS[name] for name in ("dsec", "dsec_19", "dsec_night"))
TRAIN, TEST = "zurich_city_00_a", "zurich_city_13_a"


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """`DSEC` with frames 0 to 4, `DSEC_Night` with two frames on each side of the threshold of sequence b."""
    root = tmp_path_factory.mktemp("raw")
    write_dsec_tree(root / "DSEC", num_frames=5)
    write_dsec_night_tree(root / "DSEC_Night", ("b",), num_frames=2, num_labels=1)
    return root


@pytest.fixture
def tree(raw) -> RawTree:
    """The tree anew: tests remove files from it or give them other paths."""
    yield RawTree.open(raw)
    close_recording()


def renamed(tree: RawTree, pattern: str, replacement: str) -> RawTree:
    """The tree with files at other paths."""
    return RawTree(tree.raw_dir, {re.sub(pattern, replacement, path): file for path, file in tree.files.items()})


def without(tree: RawTree, part: str) -> RawTree:
    return RawTree(tree.raw_dir, {path: file for path, file in tree.files.items() if part not in path})


def edited(tree: RawTree, ending: str, path: Path, text: str) -> RawTree:
    """The tree with another file in the place of the one that ends in `ending`."""
    path.write_text(text)
    found = {old: RawPath.on_disk(path) if old.endswith(ending) else file for old, file in tree.files.items()}
    return RawTree(tree.raw_dir, found)


def dsec(tree: RawTree, split: str = "test", options: RawOptions = PUBLISHED, dataset=DSEC, root="DSEC/"):
    return find_dsec_events(dataset, split, tree, root, options)


def night(tree: RawTree, split: str = "test", options: RawOptions = PUBLISHED, root="DSEC_Night/"):
    return find_dsec_night(NIGHT, split, tree, root, options)


def pictures(files, scratch: Path) -> list[bytes]:
    return [file.image.load(scratch).tobytes() for file in files]


def test_published_selection_of_dsec(tree, tmp_path):
    """Training: even frames from 2; test: all from 1, with labels; windows from timestamp to timestamp, 440 rows."""
    train, test = dsec(tree, "train"), dsec(tree)
    assert [file.frame for file in train] == ["000002", "000004"]
    assert [file.frame for file in test] == ["000001", "000002", "000003", "000004"]
    assert {file.sequence for file in train} == {TRAIN} and {file.sequence for file in test} == {TEST}
    assert train[0].file_name == f"train/{TRAIN}/events/left/000002.png" and train[0].label is None
    for file in (*train, *test):
        end = FIRST_TIMESTAMP_US + int(file.frame) * FRAME_US
        assert (file.image.start_us, file.image.end_us, file.image.height) == (end - FRAME_US, end, 440)
    with h5py.File(test[1].image.events.container) as h5:
        t = h5["events/t"][:].astype(int) + h5["t_offset"][()]
    inside = np.sum((t >= test[1].image.start_us) & (t < test[1].image.end_us))
    picture = test[1].image.load(tmp_path)
    assert picture.info["num_events"] == inside > 10_000 and picture.size == (640, 440) and picture.mode == "L"


@pytest.mark.parametrize(("dataset", "folder", "classes"), [(DSEC, "11classes", 11), (DSEC_19, "19classes", 19)])
def test_labels_of_dsec(tree, dataset, folder, classes):
    file = dsec(tree, dataset=dataset)[2]
    assert str(file.label).endswith(f"{TEST}/{folder}/data/000003.png")
    assert file.label_files.num_ids == classes
    assert Image.open(file.label.container).size == (640, 440)


def test_settings_of_dsec(tree, tmp_path):
    settings = EventSettings("count", window_ms=12.5, rectify=False)
    file = dsec(without(tree, "rectify_map"), options=RawOptions(events=settings))[0]
    assert file.image.end_us - file.image.start_us == 12_500
    assert file.image.rectify_map is None and file.image.settings == settings
    assert file.image.load(tmp_path).info["num_events"] > 0


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        ("/(train|test)/", "/"),
        ("/(train|test)/(.*)/events/", r"/\1_events/\2/events/"),
        ("/(train|test)/(.*classes)", r"/\1_semantic_segmentation/\1/\2"),
        ("(zurich_city_.._.)/(11|19)classes/data", r"\1/semantic/left/\2classes"),
        ("/test/(.*classes)/data", r"/test_semantic_labels/\1"),
        ("(zurich_city_.._.)/[^/]*_timestamps.txt", r"\1/semantic/timestamps.txt"),
        ("(zurich_city_.._.)/([^/]*_timestamps.txt)", r"\1/11classes/\2"),
    ],
)
def test_layouts_of_dsec(tree, pattern, replacement):
    moved = renamed(tree, pattern, replacement)
    assert moved.files.keys() != tree.files.keys()
    for split in ("train", "test"):
        expected = [(file.image, file.frame, file.label) for file in dsec(tree, split)]
        assert [(file.image, file.frame, file.label) for file in dsec(moved, split)] == expected


def test_other_timestamps_and_sequences_are_left_alone(tree, raw):
    """Exposures, image timestamps, the other camera, sequences of other tasks and copies of a label do not disturb."""
    other = tree.files[f"DSEC/test/{TEST}/{TEST}_semantic_timestamps.txt"]
    label = tree.files[f"DSEC/test/{TEST}/11classes/data/000002.png"]
    tree.files.update(
        {
            f"DSEC/test/{TEST}/images/timestamps.txt": other,
            f"DSEC/test/{TEST}/exposure_timestamps_left.txt": other,
            f"DSEC/test/{TEST}/{TEST}_image_timestamps.txt": replace(other, size=1),
            f"DSEC/test/{TEST}/events/right/events.h5": other,
            "DSEC/test/zurich_city_12_a/events/left/events.h5": other,
            f"DSEC/test_semantic_labels/{TEST}/11classes/000002.png": label,
        }
    )
    assert dsec(tree) == dsec(RawTree.open(raw))


def test_from_an_archive(raw, tree, tmp_path):
    """The same file names and pictures; the label and the timestamps are read in place."""
    with zipfile.ZipFile(tmp_path / "DSEC.zip", "w") as archive:
        for path, file in tree.files.items():
            if path.startswith("DSEC/"):
                archive.write(file.container, path)
    packed = dsec(RawTree.open(tmp_path / "DSEC.zip"))
    assert [file.file_name for file in packed] == [file.file_name for file in dsec(tree)]
    assert pictures(packed[:2], tmp_path) == pictures(dsec(tree)[:2], tmp_path)
    assert packed[0].label.read_bytes() == dsec(tree)[0].label.read_bytes()


def test_what_is_missing_of_dsec_is_said_at_once(tree):
    broken = without(without(tree, "rectify_map"), "semantic_timestamps")
    with pytest.raises(UserError) as error:
        dsec(broken)
    assert f"Missing from folders <sequence>/ at any depth: {TEST}: events/left/rectify_map.h5, <sequence>_sem" in str(
        error.value
    )
    assert f"Found: test/{TEST}/events/left/events.h5, test/{TEST}/11classes/data/000000.png" in str(error.value)
    with pytest.raises(UserError, match=f"{TEST}: 11classes/data/"):
        dsec(without(tree, "11classes"))
    assert dsec(without(tree, TEST)) == []


def test_labels_must_fit_the_timestamps(tree):
    with pytest.raises(UserError, match="has 5 timestamps, but the labels of zurich_city_13_a are 4, from 0 to 4"):
        dsec(without(tree, "11classes/data/000002"))


def test_two_different_recordings_are_ambiguous(tree):
    tree.files["DSEC/old/zurich_city_13_a/events/left/events.h5"] = tree.files[
        "DSEC/train/zurich_city_00_a/events/left/events.h5"
    ]
    with pytest.raises(UserError, match="ambiguous which file to use: .*events.h5 and .*events.h5; move the one"):
        dsec(tree)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\n2\n2\n", r"out of order, line 3 \(2\) does not come after line 2 \(2\)"),
        ("1\n2.5\n", "must hold one whole number per line .*'2.5'"),
    ],
)
def test_timestamps_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "timestamps.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_timestamps(RawPath.on_disk(tmp_path / "timestamps.txt"))


def test_selection_of_the_night(tree):
    """b: frames after 149 train; the test is what has a label. Frames 146 and 152 lie outside the recording."""
    train, test = night(tree, "train"), night(tree)
    images = [path[-10:-4] for path in tree.files if "warp_images" in path]
    assert images == ["000146", "000148", "000149", "000150", "000151", "000152"]
    assert [file.frame for file in train] == ["000150", "000151"] and [file.frame for file in test] == ["000149"]
    assert test[0].file_name == "zurich_city_09_b/warp_images/000149.png" and test[0].condition == "night"
    assert test[0].label.name == "zurich_city_09_b_000149_grey_gtFine_labelTrainIds.png" and train[0].label is None
    assert Image.open(test[0].label.container).size == Image.open(test[0].image.container).size == (640, 480)
    # A label makes a frame one of the test, wherever it is, but not one without events.
    assert [file.frame for file in night(renamed(tree, "_000149_grey", "_000150_grey"))] == ["000150"]
    assert night(renamed(tree, "_000149_grey", "_000146_grey")) == []


def slow_index(path: Path, timestamps: list[int]) -> list[int]:
    """Last event at or before each time; -1 before the first and after the last millisecond of the recording."""
    with h5py.File(path) as h5:
        times, offset = h5["events/t"][:].tolist(), int(h5["t_offset"][()])
    result = []
    for time in timestamps:
        before = [i for i, t in enumerate(times) if t + offset <= time]
        after_the_end = (time - offset) // 1000 > times[-1] // 1000
        result.append(-1 if after_the_end or not before else before[-1])
    return result


def test_event_index_of_the_night(tree, tmp_path):
    """Computed as the published file; both ends belong to the window; a file that is there is used."""
    events = tree.files["DSEC_Night/zurich_city_09_b/events/left/events.h5"]
    timestamps = read_timestamps(tree.files["DSEC_Night/zurich_city_09_b/images/timestamps.txt"])
    index = compute_event_index(events, tuple(timestamps))
    tail = slow_index(events.container, timestamps[145:])
    assert index == [-1] * 145 + tail and [number > 0 for number in tail] == [False] * 2 + [True] * 5 + [False]
    file = night(tree)[0]
    assert file.events.event_range == (index[148], index[149])
    tensor = file.events.load_tensor(tmp_path)
    assert tensor.mode == "F" and tensor.size == (640, 480)
    assert tensor.info["num_events"] == index[149] - index[148] + 1
    name = "DSEC_Night/zurich_city_09_b/images/images_to_events_index.txt"
    (tmp_path / "index.txt").write_text("".join(f"{number}\n" for number in index))
    tree.files[name] = RawPath.on_disk(tmp_path / "index.txt")
    assert night(tree)[0] == file
    shifted = [number + 5 if number > 0 else number for number in index]
    (tmp_path / "index.txt").write_text("".join(f"{number}\n" for number in shifted))
    tree.files[name] = RawPath.on_disk(tmp_path / "index.txt")
    with pytest.raises(UserError, match="the index file belongs to another recording: remove it"):
        night(tree)[0].events.load_tensor(tmp_path)


@pytest.mark.parametrize("text", ["1\n2\n", "3\n2\n1\n", "-2\n0\n1\n"])
def test_event_index_that_cannot_be_used(tmp_path, text):
    (tmp_path / "index.txt").write_text(text)
    with pytest.raises(UserError, match=r"lines for 3 timestamps, or its numbers fall; remove it"):
        read_event_index(RawPath.on_disk(tmp_path / "index.txt"), 3)


def test_settings_of_the_night(tree):
    assert night(tree)[0].events.settings == EventSettings("voxel")
    window = night(tree, options=RawOptions(events=EventSettings("voxel", window_ms=20, bins=5)))[0].events
    assert window.event_range is None and window.end_us - window.start_us == 20_000


def test_night_from_an_archive(tree, tmp_path):
    with zipfile.ZipFile(tmp_path / "night.zip", "w") as archive:
        for path, file in tree.files.items():
            if path.startswith("DSEC_Night/"):
                archive.write(file.container, path)
    packed, loose = night(RawTree.open(tmp_path / "night.zip"), "train"), night(tree, "train")
    assert [file.file_name for file in packed] == [file.file_name for file in loose]
    tensors = [file.events.load_tensor(tmp_path / "scratch").tobytes() for file in (packed[1], loose[1])]
    assert tensors[0] == tensors[1]


def test_index_of_a_recording_in_an_archive_is_computed_beside_the_output(tree, tmp_path, monkeypatch):
    """Recordings have gigabytes; the system's folder for temporary files is not used."""
    name = "DSEC_Night/zurich_city_09_b/events/left/events.h5"
    timestamps = tuple(read_timestamps(tree.files["DSEC_Night/zurich_city_09_b/images/timestamps.txt"]))
    with zipfile.ZipFile(tmp_path / "night.zip", "w") as archive:
        archive.write(tree.files[name].container, name)
    packed = RawTree.open(tmp_path / "night.zip", tmp_path / "out/unpacked")
    expected = compute_event_index(tree.files[name], timestamps, tmp_path / "never")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    assert compute_event_index(packed.files[name], timestamps, packed.scratch) == expected
    assert list(packed.scratch.iterdir()) == [] and not (tmp_path / "never").exists()


def test_what_is_missing_of_the_night_is_said_at_once(tree):
    with pytest.raises(UserError, match="zurich_city_09_b: images/timestamps.txt, warp_images/"):
        night(without(without(tree, "/timestamps.txt"), "warp_images"))
    with pytest.raises(UserError, match=r"000149_grey.*and 0 more labels have no image in warp_images/"):
        night(without(tree, "warp_images/000149"))
    with pytest.raises(UserError, match="no label <sequence>_<frame>_grey_gtFine.*Found: DSEC, DSEC_Night"):
        night(without(tree, "_grey_"))
    assert night(without(tree, "zurich_city_09")) == []
