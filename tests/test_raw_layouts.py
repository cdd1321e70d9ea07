"""Raw layouts of synthetic scenes beyond those of the published tasks: found and decoded as the real datasets."""

import numpy as np
import png
import pytest
from PIL import Image

from madm_utils.cli import UserError
from madm_utils.label_spaces import CITYSCAPES_CLASSES, STREET_CLASSES, lookup_table
from madm_utils.raw_datasets import RAW_DATASETS, find_files
from madm_utils.raw_files import RawTree
from madm_utils.raw_labels import decode_label, polygon_ids, read_image
from madm_utils.raw_layout_writers import OTHER_SCENES, encode_16_bit_png, trace_regions
from madm_utils.raw_layouts import LAYOUTS, write_raw_layouts
from madm_utils.scenes import render_scene, scene_seed
from madm_utils.tasks import TASKS

HEIGHT, SEED = 96, 3


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts") / "raw"
    write_raw_layouts(root, 2, 1, SEED, HEIGHT, progress=False, layouts=tuple(LAYOUTS))
    return RawTree.open(root)


def street(train_ids: np.ndarray) -> np.ndarray:
    """Cityscapes trainIds -> the 11 street classes."""
    return lookup_table(TASKS["cityscapes_to_deliver_depth"].source_label_map)[train_ids]


def drawn(dataset: str, split: str, index: int, size: tuple[int, int]) -> np.ndarray:
    """The scene's own label."""
    return render_scene(scene_seed(SEED, split, "rgb", OTHER_SCENES[dataset] + index), "rgb", *size)[1]


@pytest.mark.parametrize(
    ("dataset", "split", "size"),
    [("gta5", "train", (99, 179)), ("synthia", "train", (71, 120)), ("dark_zurich", "val", (101, 180))],
)
def test_labels_map_back_to_the_scene(tree, dataset, split, size):
    files = find_files(RAW_DATASETS[dataset], split, tree)
    assert len(files) == (2 if split == "train" else 1)
    for index, file in enumerate(files):
        label = decode_label(file)
        assert label.shape == read_image(file.image).size[::-1] == size
        np.testing.assert_array_equal(street(label), drawn(dataset, split, index, size))
        if dataset == "synthia":
            assert not set(np.unique(label)) & {CITYSCAPES_CLASSES.index(c) for c in ("terrain", "truck", "train")}


def test_encodings_are_those_of_the_owners(tree):
    with Image.open(tree.files["GTA5/labels/00001.png"].container) as label:
        assert label.mode == "P" and label.getpalette()[3 * 7 : 3 * 8] == [128, 64, 128]  # road
    info = png.Reader(bytes=tree.files["RAND_CITYSCAPES/GT/LABELS/0000000.png"].read_bytes()).read()[3]
    assert info["bitdepth"] == 16 and info["planes"] == 3
    assert len(find_files(RAW_DATASETS["dark_zurich"], "train", tree)) == 2


def test_modalities_of_deliver_show_one_scene(tree):
    files = {
        name: find_files(RAW_DATASETS[name], "test", tree)[0]
        for name in ("deliver", "deliver_rgb", "deliver_event", "deliver_lidar", "deliver_hha")
    }
    labels = [decode_label(file) for file in files.values()]
    assert all(np.array_equal(label, labels[0]) for label in labels)
    seed = scene_seed(SEED, "test", "depth", 0)
    pixels = {name: np.asarray(read_image(file.image)) for name, file in files.items()}
    depth = pixels["deliver"]
    np.testing.assert_array_equal(pixels["deliver_rgb"], render_scene(seed, "rgb", *depth.shape)[0])
    np.testing.assert_array_equal(pixels["deliver_event"], render_scene(seed, "event", *depth.shape)[0])
    np.testing.assert_array_equal(pixels["deliver_hha"][..., 0], depth)
    seen = pixels["deliver_lidar"][..., 0] > 0
    assert 0.02 < seen.mean() < 0.08
    np.testing.assert_array_equal(pixels["deliver_lidar"][seen][:, 0], depth[seen])


def test_polygons_give_roughly_the_labels(tree):
    for file in find_files(RAW_DATASETS["cityscapes"], "train", tree):
        name = file.file_name.replace("leftImg8bit/", "gtFine/")
        polygons = tree.files["Cityscapes/" + name.replace("_leftImg8bit.png", "_gtFine_polygons.json")]
        exact, traced = decode_label(file), np.asarray(polygon_ids(polygons))
        assert exact.shape == traced.shape and (exact == traced).mean() > 0.93
        assert (traced[0] == 255).all()


def test_traced_regions_of_a_nested_picture():
    ids = np.zeros((40, 60), np.uint8)
    ids[10:30, 10:40] = 7
    ids[15:20, 20:30] = 0
    regions = trace_regions(ids)
    assert [value for value, _ in regions] == [0, 7, 0]  # the outside, the block, what lies in it
    x, y = np.array(regions[1][1]).T
    assert (x.min(), x.max(), y.min(), y.max()) == (10, 40, 10, 30)


def test_16_bit_png_is_what_pypng_reads():
    pixels = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), np.uint16)
    width, height, rows, info = png.Reader(bytes=encode_16_bit_png(pixels)).read()
    assert (width, height, info["bitdepth"]) == (7, 5, 16)
    np.testing.assert_array_equal(np.array([list(row) for row in rows]).reshape(5, 7, 3), pixels)


def test_recordings_are_written_and_found(tmp_path):
    write_raw_layouts(tmp_path / "raw", 1, 1, SEED, HEIGHT, progress=False, layouts=("dsec_events", "dsec_night"))
    tree = RawTree.open(tmp_path / "raw")
    for name, splits in (("dsec", {"train": 1, "test": 2}), ("dsec_19", {"train": 1, "test": 2}),
                         ("dsec_night", {"train": 2, "test": 2})):  # fmt: skip
        for split, count in splits.items():
            files = find_files(RAW_DATASETS[name], split, tree)
            assert len(files) == count
            assert (files[0].label is None) == (split == "train") and (files[0].events is None) == (
                name != "dsec_night"
            )
            if split == "test":
                ids = decode_label(files[0])
                assert len(np.unique(ids)) > 5 and ids.max() < (len(STREET_CLASSES) if name == "dsec" else 19)


def test_unknown_layout(tmp_path):
    with pytest.raises(UserError, match="unknown raw layouts kitti; there are cityscapes, deliver, fmb, dsec, "):
        write_raw_layouts(tmp_path / "raw", 1, 1, 0, layouts=("cityscapes", "kitti"))
    assert list(tmp_path.iterdir()) == []
