"""Every public dataset in its official layout: found wherever it lies, paired, and decoded to the right pixels.

Labels are decoded a second time by pypng and one look-up per pixel, with class names instead of our tables where the
owners give names; polygons by cityscapesscripts, the owners' own program.
"""

import io
import pickle
import shutil
from dataclasses import replace

import numpy as np
import png
import pytest
from cityscapesscripts.helpers.annotation import Annotation
from cityscapesscripts.helpers.labels import id2label
from cityscapesscripts.helpers.labels import labels as cityscapes_labels
from cityscapesscripts.preparation.json2labelImg import createLabelImage
from PIL import Image
from raw_trees import (
    POLYGONS,
    labels,
    picture,
    save,
    tar_tree,
    write_cityscapes,
    write_cityscapes_polygons,
    write_dark_zurich,
    write_deliver,
    write_deliver_modality,
    write_dsec,
    write_dsec_19,
    write_fmb,
    write_fmb_visible,
    write_gta5,
    write_polygons,
    write_synthia,
    zip_tree,
)

from madm_utils import label_spaces
from madm_utils.cli import UserError
from madm_utils.events import EventSettings
from madm_utils.file_lists import find_listed_files
from madm_utils.raw_datasets import RAW_DATASETS, RawOptions, dataset_name, find_files, find_root
from madm_utils.raw_files import RawPath, RawTree
from madm_utils.raw_labels import decode_label, read_image, to_8_bit

SYNTHIA_NAMES = (
    "void", "sky", "building", "road", "sidewalk", "fence", "vegetation", "pole", "car", "traffic sign", "person",
    "bicycle", "motorcycle", "parking slot", "road work", "traffic light", "terrain", "rider", "truck", "bus", "train",
    "wall", "lane marking",
)  # fmt: skip
"""Classes of SYNTHIA as its owners list them."""


def first_channel(file: RawPath) -> list[list[int]]:
    """Palette index, red or only channel of every pixel, all 16 bits of it."""
    _, _, rows, info = png.Reader(bytes=file.read_bytes()).read()
    return [list(row)[:: info["planes"]] for row in rows]


def slowly(file: RawPath, class_id) -> np.ndarray:
    return np.array([[class_id(value) for value in row] for row in first_channel(file)])


def from_label_id(value: int) -> int:
    train_id = id2label[value].trainId if value in id2label else 255
    return train_id if 0 <= train_id < 19 else 255


def from_synthia(value: int) -> int:
    name = SYNTHIA_NAMES[value]
    return label_spaces.CITYSCAPES_CLASSES.index(name) if name in label_spaces.CITYSCAPES_CLASSES else 255


def same(value: int) -> int:
    return value


def json2label(file: RawPath) -> np.ndarray:
    """Pixels as cityscapesscripts draws them."""
    annotation = Annotation()
    annotation.fromJsonText(file.read_bytes().decode())
    return np.asarray(createLabelImage(annotation, "trainIds"))


CITIES = {
    "train": ["aachen/aachen_000000_000019", "aachen/aachen_000001_000019", "bochum/bochum_000000_000313"],
    "val": ["lindau/lindau_000000_000019"],
}


def cities(split):
    return [
        (f"leftImg8bit/{split}/{name}_leftImg8bit.png", *name.split("/"), "") for name in CITIES[split]
    ]  # fmt: skip


def deliver(folder, ending):
    row = "{}/{}/{}/{}/045050_{}_front.png"
    return {
        split: [
            (row.format(folder, condition, split, scene, ending), scene, "045050", condition)
            for condition in conditions
        ]
        for split, scene, conditions in (
            ("train", "MAP_1_point1", ("cloud", "night")),
            ("val", "MAP_1_point3", ("fog",)),
            ("test", "MAP_1_point2", ("cloud", "night")),
        )
    }


def fmb(folder):
    numbers = {"train": ("00001", "00003"), "test": ("00043",)}
    return {split: [(f"{split}/{folder}/{n}.png", "", n, "") for n in numbers[split]] for split in numbers}


def dsec():
    chosen = {"train": ("zurich_city_00_a", "000002", "000004"), "test": ("zurich_city_13_a", "000001", "000002")}
    return {
        split: [(f"69mask_{split}_edges/{sequence}/{n}.png", sequence, n, "") for n in frames]
        for split, (sequence, *frames) in chosen.items()
    }


def night(split, *frames):
    return [
        (f"rgb_anon/{split}/night/{s}/{s}_frame_{n}_rgb_anon.png", s, f"{s}_frame_{n}", "night") for s, n in frames
    ]


def numbered(folder, *numbers):
    return {"train": [(f"{folder}/{number}.png", "", number, "") for number in numbers]}


def from_deliver(value: int) -> int:
    return 255 if value in (0, 255) else value - 1


EXPECTED = {
    "cityscapes": (write_cityscapes, {s: cities(s) for s in CITIES}, lambda file: slowly(file, from_label_id)),
    "cityscapes from trainIds": (
        lambda raw: write_cityscapes(raw, suffix="labelTrainIds"),
        {s: cities(s) for s in CITIES},
        lambda file: slowly(file, same),
    ),
    "cityscapes from polygons": (write_cityscapes_polygons, {s: cities(s) for s in CITIES}, json2label),
    "fmb": (write_fmb, fmb("Infrared"), lambda file: slowly(file, same)),
    "fmb_visible": (write_fmb_visible, fmb("Visible"), lambda file: slowly(file, same)),
    "dsec": (write_dsec, dsec(), lambda file: slowly(file, same)),
    "dsec_19": (write_dsec_19, dsec(), lambda file: slowly(file, same)),
    "dark_zurich": (
        write_dark_zurich,
        {
            "train": night("train", ("GOPR0345", "000001"), ("GOPR0346", "000002")),
            "val": night("val", ("GOPR0356", "000003")),
            "test": night("test", ("GOPR0364", "000004")),
        },
        lambda file: slowly(file, same),
    ),
    "gta5": (write_gta5, numbered("images", "00001", "00002"), lambda file: slowly(file, from_label_id)),
    "synthia": (write_synthia, numbered("RGB", "0000000", "0000001"), lambda file: slowly(file, from_synthia)),
    **{
        name: (
            lambda raw, folder=folder, ending=ending: write_deliver_modality(raw, folder, ending),
            deliver(folder, ending),
            lambda file: slowly(file, from_deliver),
        )
        for name, folder, ending in (
            ("deliver_event", "event", "event"),
            ("deliver_lidar", "lidar", "lidar"),
            ("deliver_hha", "hha", "depth"),
            ("deliver_rgb", "img", "rgb"),
        )
    },
    "deliver": (
        write_deliver,
        {**deliver("depth", "depth"), "val": []},
        lambda file: slowly(file, from_deliver),
    ),
}
UNLABELLED = {("dark_zurich", "train"), ("dark_zurich", "test")}


def is_labelled(name, split):
    return (split != "train" or name in ("cityscapes", "gta5", "synthia")) and (name, split) not in UNLABELLED


def found(name, split, tree):
    return find_files(RAW_DATASETS[name], split, tree)


@pytest.mark.parametrize("case", EXPECTED)
def test_files_and_pixels(tmp_path, case):
    """Selection, columns and label pixels, the same from the folder, a zip, a tar, and two levels down."""
    write, splits, slow = EXPECTED[case]
    name = case.partition(" ")[0]
    root = write(tmp_path / "folder")
    zip_tree(root, tmp_path / "zip/any.zip")
    tar_tree(root, tmp_path / "tar/some/any.tar")
    shutil.copytree(root, tmp_path / "deep/downloads" / root.name.upper())
    trees = [RawTree.open(tmp_path / kind) for kind in ("folder", "zip", "tar", "deep")]
    trees += [RawTree.open(root), RawTree.open(tmp_path / "zip/any.zip")]
    assert set(splits) == set(RAW_DATASETS[name].splits)
    for split, rows in splits.items():
        files, *others = [found(name, split, tree) for tree in trees]
        assert [(f.file_name, f.sequence, f.frame, f.condition) for f in files] == rows
        for other in others:
            assert [f.file_name for f in other] == [f.file_name for f in files]
            for file, same_file in zip(files, pickle.loads(pickle.dumps(other)), strict=True):
                assert same_file.image.read_bytes() == file.image.read_bytes()
                if is_labelled(name, split):
                    np.testing.assert_array_equal(decode_label(same_file), decode_label(file))
        for file in files:
            assert (file.label is not None) == is_labelled(name, split)
            if file.label is not None:
                ids = decode_label(file)
                assert ids.dtype == np.uint8 and ids.shape == read_image(file.image).size[::-1]
                np.testing.assert_array_equal(ids, slow(file.label))
                assert ids[ids != 255].max() < len(RAW_DATASETS[name].class_names)


def test_every_dataset_is_described():
    for name, dataset in RAW_DATASETS.items():
        assert dataset.name == name and dataset.folder and dataset.download.endswith(".")
        assert dataset.licence.summary.endswith(".") and dataset.licence.url.startswith("https://")
        assert next(iter(dataset.splits)) == "train" and not dataset.splits["train"].optional
        assert (len(dataset.class_names), dataset.licence.redistribution) == (
            {"dsec": 11, "fmb": 15, "fmb_visible": 15}.get(name, 25 if name.startswith("deliver") else 19), False
        )  # fmt: skip
    sizes = {name: dataset.splits["train"].stored_size for name, dataset in RAW_DATASETS.items()}
    assert sizes["gta5"] == (704, 1280) and sizes["synthia"] is None and sizes["dark_zurich"] == (540, 960)
    assert {sizes[name] for name in sizes if name.startswith("deliver")} == {(712, 712)}
    assert RAW_DATASETS["deliver"].splits["val"].published_count == 2005


def test_what_training_reads():
    """Splits named train, and no other; the pictures of the night cannot be resized, as their events are not."""
    for name, dataset in RAW_DATASETS.items():
        for split, spec in dataset.splits.items():
            assert spec.trained == (split == "train") and spec.fixed_size == (name == "dsec_night")


def test_label_names_are_those_of_cityscapes():
    names = {label.id: label.name for label in cityscapes_labels if label.id >= 0}
    assert dict(enumerate(label_spaces.CITYSCAPES_LABEL_NAMES)) == names
    assert {i: t.trainId for i, t in id2label.items() if 0 <= t.trainId < 19} == label_spaces.CITYSCAPES_LABEL_IDS


def test_names_of_modalities_and_label_sets():
    assert dataset_name("deliver") == dataset_name("deliver", "depth") == "deliver"
    assert [dataset_name("deliver", m) for m in ("event", "lidar", "hha", "rgb")] == [
        "deliver_event", "deliver_lidar", "deliver_hha", "deliver_rgb"
    ]  # fmt: skip
    assert dataset_name("deliver_event", "event") == "deliver_event"
    assert dataset_name("fmb", "visible") == "fmb_visible" and dataset_name("fmb", None, 15) == "fmb"
    assert dataset_name("dsec", None, 19) == dataset_name("dsec_19") == "dsec_19"
    with pytest.raises(UserError, match="deliver has no modality 'x'; there is depth with 25 classes, event with 25"):
        dataset_name("deliver", "x")
    with pytest.raises(UserError, match="dsec has no modality 'event' with 12 classes; there is event with 11"):
        dataset_name("dsec", "event", 12)
    with pytest.raises(UserError, match="unknown dataset 'x'; known: cityscapes, deliver, "):
        dataset_name("x")


# --- Where datasets lie


def file_names(name, split, raw):
    return [file.file_name for file in found(name, split, RawTree.open(raw))]


def test_the_two_archives_of_cityscapes_side_by_side(tmp_path):
    root = write_cityscapes(tmp_path / "folder")
    expected = file_names("cityscapes", "train", root)
    for place in (tmp_path / "plain", tmp_path / "named/cityscapes"):
        zip_tree(root / "leftImg8bit", place / "leftImg8bit_trainvaltest.zip")
        zip_tree(root / "gtFine", place / "gtFine_trainvaltest.zip")
    for raw in (tmp_path / "plain", tmp_path / "named", tmp_path / "named/cityscapes"):
        assert file_names("cityscapes", "train", raw) == expected


def test_each_archive_unpacked_into_a_folder_of_its_own(tmp_path):
    root = write_cityscapes(tmp_path / "folder")
    expected = file_names("cityscapes", "train", root)
    for part in ("leftImg8bit", "gtFine"):
        (tmp_path / f"raw/{part}_trainvaltest").mkdir(parents=True)
        (root / part).rename(tmp_path / f"raw/{part}_trainvaltest/{part}")
    assert file_names("cityscapes", "train", tmp_path / "raw") == expected


def test_images_on_disk_and_labels_in_an_archive(tmp_path):
    root = write_cityscapes(tmp_path)
    zip_tree(root / "gtFine", tmp_path / "gtFine_trainvaltest.zip")
    zip_tree(root / "leftImg8bit", tmp_path / "leftImg8bit_trainvaltest.zip")  # unpacked, but kept
    shutil.rmtree(root / "gtFine")
    files = found("cityscapes", "val", RawTree.open(tmp_path))
    assert files[0].image.member is None and files[0].label.container.name == "gtFine_trainvaltest.zip"


def test_the_folder_of_the_name_is_preferred(tmp_path):
    write_fmb(tmp_path)
    shutil.copytree(tmp_path / "FMB", tmp_path / "another")
    save(tmp_path / "another/train/Infrared/00099.png", picture(0, 6, 8))
    assert "train/Infrared/00099.png" not in file_names("fmb", "train", tmp_path)
    assert find_root(RAW_DATASETS["fmb"], RawTree.open(tmp_path)) == "FMB/"
    assert find_root(RAW_DATASETS["fmb"], RawTree.open(tmp_path / "FMB")) == ""


def test_two_places_are_ambiguous(tmp_path):
    write_fmb(tmp_path)
    shutil.copytree(tmp_path / "FMB", tmp_path / "old/fmb")
    with pytest.raises(UserError, match=r"fmb is ambiguous: train/Infrared/\*.png is .* .*FMB and .*old/fmb"):
        file_names("fmb", "train", tmp_path)
    (tmp_path / "FMB").rename(tmp_path / "new")
    (tmp_path / "old/fmb").rename(tmp_path / "old/copy")
    with pytest.raises(UserError, match="below .*new and .*old/copy. Give --raw_dir the one you mean, or put"):
        file_names("fmb", "train", tmp_path)


def test_deeper_than_two_levels_is_not_found(tmp_path):
    write_fmb(tmp_path / "one/two")
    assert file_names("fmb", "train", tmp_path / "one")
    with pytest.raises(UserError, match=r"fmb not found under .*: looked for folders FMB/ \(any case, up to 2 levels "
                       r"deep\) and train/Infrared/; found one. Give --raw_dir .* FMB is linked to"):  # fmt: skip
        file_names("fmb", "train", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="synthia not found .*; found nothing. .*has to be unpacked"):
        file_names("synthia", "train", tmp_path / "empty")


def test_two_archives_with_different_files_of_one_name(tmp_path):
    root = write_fmb(tmp_path / "folder")
    zip_tree(root, tmp_path / "raw/FMB.zip")
    save(root / "test/Infrared/00043.png", picture(0, 60, 80))
    zip_tree(root, tmp_path / "raw/FMB (1).zip")
    assert file_names("fmb", "train", tmp_path / "raw")
    with pytest.raises(UserError, match=r"\(1\).zip!FMB/test/Infrared/00043.png and .*FMB.zip!.*png are different"):
        file_names("fmb", "test", tmp_path / "raw")


def test_empty_split_and_optional_split(tmp_path):
    root = write_deliver(tmp_path)
    shutil.rmtree(root / "depth/cloud/test")
    shutil.rmtree(root / "depth/night/test")
    with pytest.raises(UserError, match=r"deliver test is empty: no image matches .*DELIVER/depth/\*/test/\*/\*_d"):
        file_names("deliver", "test", tmp_path)
    assert file_names("deliver", "val", tmp_path) == []


def test_frames_that_are_not_selected(tmp_path):
    root = write_dsec(tmp_path)
    for path in (root / "69mask_train_edges").rglob("*.png"):
        if path.name > "000001.png":
            path.unlink()
    save(root / "69mask_train_edges/zurich_city_00_a/mean.png", picture(0, 11, 16))
    with pytest.raises(UserError, match=r"dsec train is empty: .*_train_edges/\*/\*.png with frames 000002, 000004"):
        file_names("dsec", "train", tmp_path)


def test_pairs(tmp_path):
    root = write_gta5(tmp_path)
    (root / "labels/00002.png").rename(root / "labels/00003.png")
    with pytest.raises(UserError, match=r"gta5 train: 1 of 2 images lack a label, first .*images/00002.png; expected "
                       r".*GTA5/labels/00002.png. Add the missing"):  # fmt: skip
        file_names("gta5", "train", tmp_path)
    shutil.copy(root / "labels/00003.png", root / "labels/00002.png")
    with pytest.raises(UserError, match=r"1 of 3 labels lack an image, first .*00003.png; expected .*images/00003"):
        file_names("gta5", "train", tmp_path)
    shutil.rmtree(root / "labels")
    with pytest.raises(UserError, match="2 of 2 images lack a label"):
        file_names("gta5", "train", tmp_path)


# --- Archives that cannot be used


def test_a_damaged_archive_elsewhere_does_not_matter(tmp_path):
    """Neither beside the dataset's folder nor in another dataset's, but in its own it may hold files of it."""
    root = write_gta5(tmp_path)
    for name in ("FMB.zip", "other/evil.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"damaged")
    assert len(file_names("gta5", "train", tmp_path)) == 2
    (root / "07_images.zip").write_bytes(b"damaged")
    with pytest.raises(UserError, match="^[^ ]*GTA5/07_images.zip cannot be read as an archive"):
        file_names("gta5", "train", tmp_path)
    with pytest.raises(UserError, match=r"fmb not found .* What is missing may be in .*: [^ ]*FMB.zip cannot be read"):
        file_names("fmb", "train", tmp_path)
    (root / "labels/00002.png").unlink()
    with pytest.raises(UserError, match="1 of 2 images lack a label.* What is missing may be in .*07_images.zip"):
        file_names("gta5", "train", tmp_path)


def test_a_damaged_archive_beside_everything_that_is_published(tmp_path, monkeypatch):
    root = write_gta5(tmp_path)
    (root / "copy.zip").write_bytes(b"damaged")
    train = replace(RAW_DATASETS["gta5"].splits["train"], published_count=2)
    complete = replace(RAW_DATASETS["gta5"], splits={"train": train})
    assert len(find_files(complete, "train", RawTree.open(tmp_path))) == 2


def test_an_optional_split_in_a_damaged_archive(tmp_path):
    root = write_deliver(tmp_path)
    assert file_names("deliver", "val", tmp_path) == []
    (root / "val.zip").write_bytes(b"damaged")
    with pytest.raises(UserError, match="val.zip cannot be read as an archive"):
        file_names("deliver", "val", tmp_path)


# --- Recordings in place of ready-made pictures


def write_recordings(root, split="train", sequence="zurich_city_00_a"):
    """Names of a recording and its timestamps; what the search does not read is empty."""
    folder = root / split / sequence
    for name in ("events/left/events.h5", "events/left/rectify_map.h5"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    times = "".join(f"{50_000 * i}\n" for i in range(1, 8))
    (folder / f"{sequence}_semantic_timestamps.txt").write_text(times)


def test_ready_made_pictures_or_recordings(tmp_path):
    root = write_dsec(tmp_path)
    write_recordings(root)
    tree, settings = RawTree.open(tmp_path), EventSettings()
    edges = find_files(RAW_DATASETS["dsec"], "train", tree)
    chosen = find_files(RAW_DATASETS["dsec"], "train", tree, RawOptions(events=settings))
    assert [file.image.name for file in edges] == ["000002.png", "000004.png"]
    assert [file.frame for file in chosen] == ["000002", "000004", "000006"]
    assert all(file.image.settings == settings for file in chosen)
    shutil.rmtree(root / "69mask_train_edges")
    with pytest.raises(UserError, match=r"dsec test has ready-made pictures \(69mask_test_edges/\*/\*.png\) but train "
                       "only recordings, .* Add 69mask_train_edges/.*, or give --event_representation"):  # fmt: skip
        find_files(RAW_DATASETS["dsec"], "train", RawTree.open(tmp_path))
    again = find_files(RAW_DATASETS["dsec"], "train", RawTree.open(tmp_path), RawOptions(events=settings))
    shutil.rmtree(root / "69mask_test_edges")
    fallback = find_files(RAW_DATASETS["dsec"], "train", RawTree.open(tmp_path))
    assert [file.file_name for file in fallback] == [file.file_name for file in chosen]
    assert [file.file_name for file in again] == [file.file_name for file in chosen]


def test_recordings_that_are_not_there(tmp_path):
    write_fmb(tmp_path)
    with pytest.raises(UserError, match=r"dsec not found .* 69mask_train_edges/, \*/events/left/events.h5; found FMB"):
        file_names("dsec", "train", tmp_path)
    with pytest.raises(UserError, match=r"dsec_night not found .* DSEC_Night/ .* and \*/warp_images/\*.png, "):
        file_names("dsec_night", "train", tmp_path)
    root = write_dsec(tmp_path)
    options = RawOptions(events=EventSettings())
    with pytest.raises(UserError, match=r"dsec train is empty: .* matches [^ ]*DSEC/\*/events/left/events.h5\. Is"):
        find_files(RAW_DATASETS["dsec"], "train", RawTree.open(tmp_path), options)
    # A folder of the name that holds no recording is not in the way of one that does.
    write_recordings(tmp_path / "download/DSEC")
    assert len(find_files(RAW_DATASETS["dsec"], "train", RawTree.open(tmp_path), options)) == 3
    assert root.is_dir()


# --- File lists


def test_file_lists_name_members_of_archives(tmp_path):
    root = write_cityscapes(tmp_path / "folder")
    zip_tree(root, tmp_path / "raw/cityscapes.zip")
    stem = "train/bochum/bochum_000000_000313"
    pair = (f"leftImg8bit/{stem}_leftImg8bit.png", f"gtFine/{stem}_gtFine_labelTrainIds.png")
    tree = RawTree.open(tmp_path / "raw")
    for listed in (pair, tuple(f"CityScapes/{name}" for name in pair)):
        (file,) = find_listed_files(RAW_DATASETS["cityscapes"], "train", tree, [listed])
        assert (file.file_name, file.sequence, file.frame) == (pair[0], "bochum", "bochum_000000_000313")
        np.testing.assert_array_equal(decode_label(file), slowly(file.label, from_label_id))
    folder = RawTree.open(tmp_path / "folder")
    absolute = tuple(f"{root}/{name}" for name in pair)
    (file,) = find_listed_files(RAW_DATASETS["cityscapes"], "train", folder, [absolute])
    assert file.file_name == pair[0]
    with pytest.raises(UserError, match="names a.png, which is neither under .*raw nor .*raw/Cityscapes. Paths are"):
        find_listed_files(RAW_DATASETS["cityscapes"], "train", tree, [("a.png", None)])
    with pytest.raises(UserError, match="train is empty: the file list names no image"):
        find_listed_files(RAW_DATASETS["cityscapes"], "train", tree, [])
    write_fmb(tmp_path / "folder")
    with pytest.raises(UserError, match="names FMB/train/Infrared/00001.png, which is not cityscapes's but another"):
        find_listed_files(
            RAW_DATASETS["cityscapes"], "train", RawTree.open(tmp_path / "folder"),
            [("FMB/train/Infrared/00001.png", None)],
        )  # fmt: skip


# --- Labels


def test_random_polygons_equal_cityscapesscripts(tmp_path):
    rng = np.random.default_rng(0)
    names = [label.name for label in cityscapes_labels] + ["cargroup", "bicyclegroup", "license plategroup"]
    for case in range(20):
        objects = [
            {
                "label": str(rng.choice(names)),
                "deleted": int(rng.random() < 0.1),
                "polygon": rng.integers(-5, 45, (rng.integers(2, 9), 2)).tolist()
                if case % 2
                else rng.uniform(-5, 45, (rng.integers(2, 9), 2)).tolist(),
            }
            for _ in range(30)
        ]
        path = write_polygons(tmp_path / "x_gtFine_polygons.json", objects, (40, 50))
        drawn = RAW_DATASETS["cityscapes"].splits["train"].labels[2].decode(RawPath.on_disk(path))
        np.testing.assert_array_equal(drawn, json2label(RawPath.on_disk(path)))


def test_polygons_by_hand(tmp_path):
    """Some pixels of `POLYGONS`, which were worked out on paper."""
    path = write_polygons(tmp_path / "x.json", POLYGONS)
    drawn = np.asarray(RAW_DATASETS["cityscapes"].splits["train"].labels[2].decode(RawPath.on_disk(path)))
    assert drawn.shape == (8, 16)
    assert drawn[4, 3] == 13  # car, where the licence plate lies
    assert drawn[5, 2] == 0 and drawn[3, 8] == 255  # road; nothing was drawn here, the building is deleted
    assert drawn[3, 10] == 11  # a group of persons
    assert (drawn[2:6, 12] == 5).all() and (drawn[:, 13:] == 255).all()  # a line is drawn; polegroup and rim are void


def test_preferred_kind_of_label_and_mixtures(tmp_path):
    root = write_cityscapes(tmp_path, splits=("train",))
    write_cityscapes(tmp_path, splits=("train",), suffix="labelTrainIds")
    (root / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelTrainIds.png").unlink()
    kinds = [file.label.name.rsplit("_", 1)[1] for file in found("cityscapes", "train", RawTree.open(tmp_path))]
    assert kinds == ["labelIds.png", "labelTrainIds.png", "labelTrainIds.png"]


def decode(name, split, raw):
    return [decode_label(file) for file in found(name, split, RawTree.open(raw))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{]", r"polygons.json cannot be read as Cityscapes polygons \(JSONDecodeError: .*\); copy it again"),
        ('{"imgHeight": 8}', r"\(KeyError: 'imgWidth'\)"),
        ('{"imgHeight": 8, "imgWidth": 9, "objects": [{"label": "car", "polygon": 3}]}', "TypeError"),
        (
            '{"imgHeight": 8, "imgWidth": 9, "objects": [{"label": "car", "polygon": [[1, 1]]}]}',
            "at least 2 coordinates",
        ),
        ('{"imgHeight": 99999, "imgWidth": 99999, "objects": []}', "imgWidth x imgHeight is 99999x99999"),
        (
            '{"imgHeight": 8, "imgWidth": 9, "objects": [{"label": "boat", "polygon": [[1, 1], [2, 2], [1, 2]]}]}',
            r"polygons have labels \['boat'\], which Cityscapes does not know",
        ),
    ],
)
def test_wrong_polygon_files(tmp_path, content, message):
    root = write_cityscapes_polygons(tmp_path)
    (root / "gtFine/val/lindau/lindau_000000_000019_gtFine_polygons.json").write_text(content)
    with pytest.raises(UserError, match=message):
        decode("cityscapes", "val", tmp_path)


@pytest.mark.parametrize(
    ("name", "write", "split", "path", "mode", "message"),
    [
        ("cityscapes", write_cityscapes, "val", "gtFine/val/lindau/lindau_000000_000019_gtFine_labelIds.png", "RGBA",
         "label has mode RGBA; expected a single channel of 8-bit class ids. Is this the picture of the colours"),
        ("fmb", write_fmb, "test", "test/Label/00043.png", "RGB", "label has mode RGB; expected a single channel"),
        ("fmb", write_fmb, "test", "test/Label/00043.png", "P", "mode P; expected .* may have been renumbered"),
        ("gta5", write_gta5, "train", "labels/00001.png", "RGB", "mode RGB; expected a palette PNG whose index is"),
        ("deliver", write_deliver, "test", "semantic/cloud/test/MAP_1_point2/045050_semantic_front.png", "P",
         "label has mode P; expected RGB or RGBA with the class id in red"),
        ("synthia", write_synthia, "train", "GT/LABELS/0000001.png", "RGB",
         "0000001.png: label has mode RGB with 8 bits; expected the published PNG with 16-bit channels"),
    ],
)  # fmt: skip
def test_labels_of_another_kind(tmp_path, name, write, split, path, mode, message):
    root = write(tmp_path)
    Image.open(root / path).convert(mode).save(root / path)
    with pytest.raises(UserError, match=message):
        decode(name, split, tmp_path)


def test_labels_of_more_bits(tmp_path):
    root = write_fmb(tmp_path)
    ids = labels(0, [*range(15)], 6, 8)
    Image.fromarray(ids.astype(np.uint16)).save(root / "test/Label/00043.png")
    np.testing.assert_array_equal(decode("fmb", "test", tmp_path)[0], ids)
    Image.fromarray(ids.astype(np.uint16) + 300).save(root / "test/Label/00043.png")
    with pytest.raises(UserError, match=r"00043.png: label holds values 300..314; expected 8-bit class ids"):
        decode("fmb", "test", tmp_path)


@pytest.mark.parametrize(
    ("name", "write", "split", "bad"),
    [("cityscapes", write_cityscapes, "val", 34), ("fmb", write_fmb, "test", 15), ("dsec", write_dsec, "test", 11),
     ("dsec_19", write_dsec_19, "test", 19), ("dark_zurich", write_dark_zurich, "val", 19),
     ("deliver", write_deliver, "test", 26), ("gta5", write_gta5, "train", 35)],
)  # fmt: skip
def test_unknown_ids(tmp_path, name, write, split, bad):
    write(tmp_path)
    file = found(name, split, RawTree.open(tmp_path))[0]
    with Image.open(file.label.container) as label:
        pixels, palette = np.array(label), label.getpalette()
    pixels[0, 0] = bad
    changed = Image.fromarray(pixels)
    if palette:
        changed.putpalette(palette)
    changed.save(file.label.container)
    with pytest.raises(UserError, match=rf"{file.label.name}: label holds class ids \[{bad}\] outside the map"):
        decode(name, split, tmp_path)


def test_synthia_id_outside_the_map(tmp_path):
    root = write_synthia(tmp_path)
    with open(root / "GT/LABELS/0000000.png", "wb") as file:
        png.Writer(10, 6, greyscale=False, bitdepth=16).write(file, np.full((6, 30), 23, np.uint16))
    with pytest.raises(UserError, match=r"0000000.png: label holds class ids \[23\]"):
        decode("synthia", "train", tmp_path)


def test_damaged_label(tmp_path):
    root = write_synthia(tmp_path)
    path = root / "GT/LABELS/0000000.png"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"0000000.png cannot be read as an image \(.*\); the file is damaged"):
        decode("synthia", "train", tmp_path)
    path.write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"0000000.png cannot be read as an image \(not an image\)"):
        decode("synthia", "train", tmp_path)


# --- Images of more than 8 bits


def reopened(array: np.ndarray, kind: str = "PNG") -> Image.Image:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return Image.open(buffer)


def test_8_bit_pictures_keep_their_values():
    grey, colors = picture(0, 4, 5), picture(1, 4, 5, 3)
    for image in (Image.fromarray(grey), Image.fromarray(colors)):
        assert to_8_bit(image, "x.png") is image
    alpha = np.dstack([colors, grey])
    np.testing.assert_array_equal(np.asarray(to_8_bit(Image.fromarray(alpha), "x.png")), colors)
    np.testing.assert_array_equal(np.asarray(to_8_bit(Image.fromarray(alpha[..., 2:]), "x.png")), colors[..., 2])
    palette = Image.fromarray(grey % 4)
    palette.putpalette([value for i in range(4) for value in (i, 10 * i, 20 * i)])
    np.testing.assert_array_equal(np.asarray(to_8_bit(palette, "x.png"))[..., 1], 10 * (grey % 4))
    assert to_8_bit(Image.fromarray(grey > 100), "x.png").mode == "L"


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_wide_pictures_are_scaled(dtype):
    image = reopened(np.array([[0, 1000, 2000, 3000, 4000, 1004]], dtype), "TIFF")
    # (v - 1000) / 2000 * 255: 127.5 is rounded to the even 128, 0.51 to 1; what lies outside is cut off.
    scaled = to_8_bit(image, "x.tif", (1000, 3000))
    assert np.asarray(scaled).tolist() == [[0, 0, 128, 255, 255, 1]] and scaled.mode == "L"
    with pytest.raises(UserError, match=r"x.tif: image mode .* has more than 8 bits \(values 0..4000\) .* give "
                       r"--image_range LOW HIGH, the values that become 0 and 255"):  # fmt: skip
        to_8_bit(image, "x.tif")
    with pytest.raises(UserError, match="--image_range LOW HIGH needs LOW below HIGH, got 5 5"):
        to_8_bit(image, "x.tif", (5, 5))


def test_what_is_not_a_number_and_unknown_modes():
    image = Image.fromarray(np.array([[np.nan, np.inf, -np.inf, 1]], np.float32))
    assert np.asarray(to_8_bit(image, "x.tif", (0, 2))).tolist() == [[0, 255, 0, 128]]
    with pytest.raises(UserError, match="x.jpg: image mode CMYK is not supported; expected 8-bit grey or RGB"):
        to_8_bit(Image.new("CMYK", (2, 2)), "x.jpg")
