"""Procedural scenes and their raw layouts: deterministic, complete, and readable by the converters' own rules.

Class frequencies of 300 scenes of 128 x 128 pixels (`scene_seed(0, "train", "rgb", 0..299)`), in percent of the
pixels / of the scenes that show at least 20 pixels of it:

    sky      24.8 / 100   building  15.0 / 100   fence       1.4 / 90   person     1.8 / 100  pole  4.0 / 100
    road     36.7 / 100   sidewalk   2.8 / 100   vegetation  5.8 / 100  car        4.9 / 100  wall  0.9 / 87
    traffic sign 2.0 / 100
"""

import itertools
import json
import re

import numpy as np
import pytest
from PIL import Image

from madm_utils.cli import UserError
from madm_utils.label_spaces import (
    IGNORE_INDEX,
    STREET_CLASSES,
    cityscapes_train_ids,
    deliver_class_ids,
    lookup_table,
)
from madm_utils.raw_layouts import raw_class_ids, write_raw_layouts
from madm_utils.scene_canvas import Camera, Canvas
from madm_utils.scenes import MODALITIES, SPLITS, render_scene, scene_seed
from madm_utils.tasks import TASKS

HEIGHT, NUM_TRAIN, NUM_TEST, SEED = 128, 11, 4, 5
SIZES = {"rgb": (128, 256), "depth": (130, 130), "infrared": (75, 100), "event": (55, 80)}
DEPTH_TASK, INFRARED_TASK, EVENT_TASK = (
    TASKS[f"cityscapes_to_{name}"] for name in ("deliver_depth", "fmb_infrared", "dsec_event")
)


@pytest.fixture(scope="module")
def raw_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw") / "synthetic"
    write_raw_layouts(root, NUM_TRAIN, NUM_TEST, SEED, HEIGHT, progress=False)
    return root


def read(path):
    return np.asarray(Image.open(path))


def street_label(split, modality, index):
    return render_scene(scene_seed(SEED, split, modality, index), modality, *SIZES[modality])[1]


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("size", [(128, 128), (48, 160)])
def test_a_scene_is_a_function_of_its_seed(modality, size):
    image, label = render_scene(7, modality, *size)
    again, label_again = render_scene(7, modality, *size)
    other, _ = render_scene(8, modality, *size)
    assert image.shape == (*size, 3) and image.dtype == np.uint8
    assert label.shape == size and label.dtype == np.uint8 and label.max() < len(STREET_CLASSES)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(label, label_again)
    assert np.any(image != other)


def test_all_modalities_share_the_label_and_only_rgb_has_colour():
    drawn = {modality: render_scene(3, modality) for modality in MODALITIES}
    for image, label in drawn.values():
        np.testing.assert_array_equal(label, drawn["rgb"][1])
        assert image.std() > 10
    for first, second in itertools.combinations(MODALITIES, 2):
        assert np.any(drawn[first][0] != drawn[second][0])
    assert [m for m in MODALITIES if np.ptp(drawn[m][0], axis=2).max() > 0] == ["rgb"]


def test_a_larger_picture_shows_the_same_scene():
    _, small = render_scene(11, "depth", 64, 64)
    _, large = render_scene(11, "depth", 192, 192)
    # Pixel (r, c) of the small picture has its centre in pixel (3r + 1, 3c + 1) of the large one.
    assert (large[1::3, 1::3] == small).mean() > 0.97


def test_a_wider_picture_sees_more_to_the_sides():
    _, square = render_scene(12, "depth", 96, 96)
    _, wide = render_scene(12, "depth", 96, 192)
    np.testing.assert_array_equal(wide[:, 48:144], square)


def test_projection_of_known_points():
    camera = Camera(focal=100, center_x=64, horizon_y=60, height_m=1.5)
    assert camera.column(2, 10) == 84
    assert camera.row(0, 10) == 75
    canvas = Canvas(camera, 128, 128, np.random.default_rng(0))
    sign = canvas.front(1, 2, 2, 3, 10)
    assert (sign.rows, sign.cols) == (slice(45, 55), slice(74, 84))
    wall = canvas.side(-4, 8, 16, 0, 1.5)
    # At 8 m the wall stands at column 14 and its foot at row 78.75; at 16 m at column 39 and row 69.4.
    assert wall.cols == slice(14, 39) and wall.rows.start == 60 and wall.rows.stop == 79
    assert wall.inside[:, 0].sum() == 19 and wall.inside[:, -1].sum() == 10
    ground = canvas.ground()
    assert ground.v[75 - ground.rows.start, 0] == pytest.approx(150 / 15.5)


def test_every_class_occurs_often_enough_to_be_learnt():
    labels = np.stack([render_scene(scene_seed(0, "train", "rgb", i), "depth")[1] for i in range(60)])
    counts = np.stack([np.bincount(label.ravel(), minlength=len(STREET_CLASSES)) for label in labels])
    share_of_pixels = counts.sum(0) / counts.sum()
    share_of_scenes = (counts >= 20).mean(0)
    for name, pixels, scenes in zip(STREET_CLASSES, share_of_pixels, share_of_scenes, strict=True):
        assert pixels >= 0.005, name
        assert scenes >= 0.4, name


def test_sensors_see_what_they_should():
    ids = {name: index for index, name in enumerate(STREET_CLASSES)}
    values = {modality: {name: [] for name in STREET_CLASSES} for modality in MODALITIES}
    for seed, modality in itertools.product(range(12), MODALITIES):
        image, label = render_scene(seed, modality)
        for name, index in ids.items():
            values[modality][name].extend(image[label == index].mean(axis=1))
    mean = {m: {name: np.mean(v) for name, v in by_class.items()} for m, by_class in values.items()}
    assert mean["depth"]["sky"] > 240 > mean["depth"]["building"] > mean["depth"]["road"]
    assert max(mean["infrared"], key=mean["infrared"].get) == "person"
    assert min(mean["infrared"], key=mean["infrared"].get) == "sky"
    assert mean["event"]["sky"] < 20 and mean["event"]["road"] < mean["event"]["car"]
    assert np.mean(np.concatenate(list(values["event"].values())) == 0) > 0.6


def test_scene_seeds_never_meet():
    seeds = [
        scene_seed(seed, split, modality, index)
        for seed in (0, 1, 2**32 - 1)
        for split in SPLITS
        for modality in MODALITIES
        for index in (0, 1, 2, 2**24 - 1)
    ]
    assert len(set(seeds)) == len(seeds) and max(seeds) < 2**63


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: render_scene(0, "lidar"), "unknown modality 'lidar'; modalities: rgb, depth, infrared, event"),
        (lambda: render_scene(0, "rgb", 64, 16), "a scene of 64x16 pixels is too small; both sides need at least 32"),
        (lambda: scene_seed(0, "dev", "rgb", 0), "no scenes for split 'dev'"),
        (lambda: scene_seed(-1, "train", "rgb", 0), "seed -1 is out of range; expected 0 to 4294967295"),
        (lambda: scene_seed(0, "train", "rgb", 2**24), "scene index 16777216 is out of range"),
    ],
)
def test_wrong_scene_arguments(call, message):
    with pytest.raises(UserError, match=re.escape(message)):
        call()


def test_trees_have_the_official_names(raw_root):
    patterns = {
        r"Cityscapes/leftImg8bit/train/(aachen|bochum|zurich)/\1_\d{6}_000019_leftImg8bit\.png": NUM_TRAIN,
        r"Cityscapes/leftImg8bit/val/(frankfurt|lindau|munster)/\1_\d{6}_000019_leftImg8bit\.png": NUM_TEST,
        r"Cityscapes/gtFine/train/(\w+)/\1_\d{6}_000019_gtFine_label(Ids|TrainIds)\.png": 2 * NUM_TRAIN,
        r"Cityscapes/gtFine/val/(\w+)/\1_\d{6}_000019_gtFine_label(Ids|TrainIds)\.png": 2 * NUM_TEST,
        r"DELIVER/depth/(cloud|fog|night|rain|sun)/train/MAP_\d+_point\d+(_\w+)?/\d{6}_depth_front\.png": NUM_TRAIN,
        r"DELIVER/depth/(cloud|fog|night|rain|sun)/test/MAP_\d+_point\d+(_\w+)?/\d{6}_depth_front\.png": NUM_TEST,
        r"DELIVER/semantic/(\w+)/test/MAP_\d+_point\d+(_\w+)?/\d{6}_semantic_front\.png": NUM_TEST,
        r"FMB/train/(Infrared|Visible)/\d{5}\.png": 2 * NUM_TRAIN,
        r"FMB/test/(Infrared|Visible|Label)/\d{5}\.png": 3 * NUM_TEST,
        r"DSEC/69mask_train_edges/zurich_city_0\d_a/\d{5}[02468]\.png": NUM_TRAIN,
        r"DSEC/69mask_test_edges/zurich_city_1[345]_[ac]/\d{6}\.png": NUM_TEST,
        r"DSEC/test_semantic_labels/zurich_city_1[345]_[ac]/11classes/\d{6}\.png": NUM_TEST,
        r"file_lists/cityscapes_to_\w+_(train|test)\.json": 6,
    }
    files = [path.relative_to(raw_root).as_posix() for path in raw_root.rglob("*") if path.is_file()]
    for pattern, count in patterns.items():
        assert sum(re.fullmatch(pattern, name) is not None for name in files) == count, pattern
    assert len(files) == sum(patterns.values())
    for example in (
        "Cityscapes/leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png",
        "DELIVER/depth/cloud/train/MAP_10_point102/045050_depth_front.png",
        "DELIVER/depth/fog/test/MAP_10_point502_motionblur/045050_depth_front.png",
        "FMB/test/Label/00043.png",
        "DSEC/69mask_train_edges/zurich_city_00_a/000002.png",
        "DSEC/test_semantic_labels/zurich_city_13_a/11classes/000001.png",
    ):
        assert example in files
    numbers = [
        {path.name for path in (raw_root / "FMB" / split / "Infrared").iterdir()} for split in ("train", "test")
    ]
    assert not numbers[0] & numbers[1]
    assert [path.name for path in raw_root.parent.iterdir()] == [raw_root.name]


def test_pictures_have_official_proportions_and_modes(raw_root):
    expected = {
        "Cityscapes/leftImg8bit": ("RGB", "rgb"),
        "Cityscapes/gtFine": ("L", "rgb"),
        "DELIVER/depth": ("L", "depth"),
        "DELIVER/semantic": ("RGBA", "depth"),
        "FMB/train/Infrared": ("RGB", "infrared"),
        "FMB/test/Label": ("L", "infrared"),
        "DSEC/69mask_test_edges": ("RGB", "event"),
        "DSEC/test_semantic_labels": ("L", "event"),
    }
    for folder, (mode, modality) in expected.items():
        for path in (raw_root / folder).rglob("*.png"):
            with Image.open(path) as picture:
                assert picture.mode == mode and picture.size[::-1] == SIZES[modality], path


def test_cityscapes_ids_map_back_to_the_street(raw_root):
    seen = set()
    for split, cities, count in (
        ("train", ("aachen", "bochum", "zurich"), NUM_TRAIN),
        ("val", ("frankfurt", "lindau", "munster"), NUM_TEST),
    ):
        for index in range(count):
            city = cities[index % 3]
            stem = raw_root / f"Cityscapes/gtFine/{split}/{city}/{city}_{index // 3:06d}_000019_gtFine"
            train_ids, label_ids = (read(f"{stem}_{kind}.png") for kind in ("labelTrainIds", "labelIds"))
            np.testing.assert_array_equal(cityscapes_train_ids(label_ids), train_ids)
            street = street_label(split, "rgb", index)
            mapped = lookup_table(DEPTH_TASK.source_label_map)[train_ids]
            void = train_ids == IGNORE_INDEX
            np.testing.assert_array_equal(mapped[~void], street[~void])
            assert void[0].all() and void[:, -1].all() and not void[1:-1, 1:-1].any()
            seen |= set(np.unique(train_ids[~void]).tolist())
    assert len(seen) > len(STREET_CLASSES), "several raw classes stand for one street class"


def test_deliver_ids_map_back_to_the_street(raw_root):
    for index, (condition, case) in enumerate(
        [("cloud", ""), ("fog", "_motionblur"), ("night", "_overexposure"), ("rain", "_underexposure")]
    ):
        pixels = read(raw_root / f"DELIVER/semantic/{condition}/test/MAP_10_point502{case}/045050_semantic_front.png")
        class_ids = deliver_class_ids(pixels[..., 0])
        assert class_ids.max() < 25
        mapped = lookup_table(DEPTH_TASK.target_label_map)[class_ids]
        np.testing.assert_array_equal(mapped, street_label("test", "depth", index))


def test_fmb_ids_map_back_to_the_street_without_wall_and_fence(raw_root):
    for index in range(NUM_TEST):
        label = read(raw_root / f"FMB/test/Label/{43 + 5 * index:05d}.png")
        assert label.max() <= 14
        expected = lookup_table(TASKS["synthetic_to_infrared"].target_label_map)[
            street_label("test", "infrared", index)
        ]
        np.testing.assert_array_equal(lookup_table(INFRARED_TASK.target_label_map)[label], expected)


def test_dsec_labels_are_the_street(raw_root):
    assert EVENT_TASK.target_label_map is None
    label = read(raw_root / "DSEC/test_semantic_labels/zurich_city_14_c/11classes/000001.png")
    np.testing.assert_array_equal(label, street_label("test", "event", 1))


def test_file_lists_name_existing_files_in_pairs(raw_root):
    for task in (DEPTH_TASK, INFRARED_TASK, EVENT_TASK):
        train, test = (
            json.loads((raw_root / f"file_lists/{task.name}_{split}.json").read_text()) for split in ("train", "test")
        )
        source, target, tested = train["source_data"], train["target_data"], test["target_data"]
        assert len(source["RGB"]) == len(source["label"]) == len(target["second_modality"]) == NUM_TRAIN
        assert len(tested["second_modality"]) == len(tested["label"]) == NUM_TEST
        for image, label in zip(source["RGB"], source["label"], strict=True):
            assert image.rsplit("/", 1)[1].replace("leftImg8bit", "gtFine_labelIds") == label.rsplit("/", 1)[1]
        for name in (*source["RGB"], *source["label"], *target["second_modality"], *tested["second_modality"],
                     *tested["label"]):  # fmt: skip
            assert (raw_root / name).is_file(), name


def test_the_same_seed_writes_the_same_bytes(raw_root, tmp_path):
    for name, seed in (("same", SEED), ("other", SEED + 1)):
        write_raw_layouts(tmp_path / name, 1, 1, seed, HEIGHT, progress=False)
    pictures = [path.relative_to(tmp_path / "same") for path in (tmp_path / "same").rglob("*.png")]
    assert len(pictures) == 17
    for name in pictures:
        assert (tmp_path / "same" / name).read_bytes() == (raw_root / name).read_bytes(), name
        assert (tmp_path / "other" / name).read_bytes() != (raw_root / name).read_bytes(), name


def test_raw_class_ids_choose_among_several():
    tables = [raw_class_ids({3: 8, 5: 8, 7: 0}, STREET_CLASSES, np.random.default_rng(s)) for s in range(20)]
    assert {int(table[8]) for table in tables} == {3, 5}
    assert {int(table[0]) for table in tables} == {7}
    assert {int(table[1]) for table in tables} == {IGNORE_INDEX}


@pytest.mark.parametrize(("field", "value"), [("num_train", 0), ("num_test", 0), ("height", 64)])
def test_raw_layouts_refuse_numbers_that_are_too_small(field, value, tmp_path):
    numbers = {"num_train": 1, "num_test": 1, "height": 128, field: value}
    with pytest.raises(UserError, match=rf"need {field} of at least \d+, got {value}"):
        write_raw_layouts(tmp_path / "raw", seed=0, progress=False, **numbers)
    assert list(tmp_path.iterdir()) == []


def test_raw_layouts_refuse_a_folder_in_use(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="raw exists and is not an empty folder"):
        write_raw_layouts(tmp_path / "raw", 1, 1, 0, HEIGHT, progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="inside cannot be created"):
        write_raw_layouts(tmp_path / "file" / "inside", 1, 1, 0, HEIGHT, progress=False)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "notes.txt", "raw"]


def test_raw_layouts_leave_nothing_after_a_failure(tmp_path):
    with pytest.raises(UserError, match="seed -1 is out of range"):
        write_raw_layouts(tmp_path / "raw", 1, 1, -1, HEIGHT, progress=False)
    assert list(tmp_path.iterdir()) == []
