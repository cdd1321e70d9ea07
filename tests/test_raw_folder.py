"""`--dataset folder`: anyone's own pictures and masks, paired by name, decoded by a label map file."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from raw_trees import labels, picture, save, tar_tree, zip_tree

from madm_utils.cli import UserError
from madm_utils.raw_folder import LabelMap, find_folder_files
from madm_utils.raw_labels import decode_label

IDS = [0, 7, 24, 25, 26, 255]
CLASS_OF_ID = {7: 0, 24: 2, 25: 2, 26: 1, 0: 255, 255: 255}
MAP = {
    "class_names": ["road", "car", "person"],
    "ids": {7: "road", 26: "car", 24: "person", 25: 2},
    "ignore": [0],
}
COLORS = {"road": [128, 64, 128], "car": [[0, 0, 142], [0, 0, 70]], "person": [220, 20, 60]}
CLASS_OF_COLOR = {(128, 64, 128): 0, (0, 0, 142): 1, (0, 0, 70): 1, (220, 20, 60): 2, (0, 0, 0): 255}


@pytest.fixture
def own(tmp_path):
    """Three pictures in two sequences, as PNG and JPEG, with masks of ids."""
    for i, name in enumerate(("site1/a.png", "site1/b.jpg", "c.JPEG")):
        save(tmp_path / "images" / name, picture(i, 5, 6, 3))
        save(tmp_path / "labels" / Path(name).with_suffix(".png"), labels(i, IDS, 5, 6))
    (tmp_path / "images/notes.txt").touch()
    return tmp_path


def label_map(folder: Path, **changes) -> Path:
    path = folder / "map.json"
    path.write_text(json.dumps({**MAP, **changes}))
    return path


def load(own: Path, split: str = "train", images: str = "images", masks: str = "labels", **changes):
    return find_folder_files("thermal", own / images, own / masks, label_map(own, **changes), split)


def mapped(ids: np.ndarray) -> np.ndarray:
    return np.array([[CLASS_OF_ID[int(value)] for value in row] for row in ids])


def test_own_pictures_and_masks(own):
    dataset, files = load(own, "test")
    assert (dataset.name, dataset.class_names, list(dataset.splits)) == (
        "thermal",
        tuple(MAP["class_names"]),
        ["test"],
    )
    assert dataset.splits["test"].stored_size is None and dataset.licence.redistribution
    assert [(f.file_name, f.sequence, f.frame) for f in files] == [
        ("c.JPEG", "", "c"), ("site1/a.png", "site1", "a"), ("site1/b.jpg", "site1", "b")
    ]  # fmt: skip
    for file, seed in zip(files, (2, 0, 1), strict=True):
        decoded = decode_label(file)
        assert decoded.dtype == np.uint8
        np.testing.assert_array_equal(decoded, mapped(labels(seed, IDS, 5, 6)))


def test_archives_with_and_without_a_folder_at_the_top(own):
    expected = [f.file_name for f in load(own)[1]]
    zip_tree(own / "images", own / "images.zip")
    tar_tree(own / "labels", own / "masks.tar")
    zip_tree(own / "labels", own / "bare.zip", own / "labels")
    for images in ("images", "images.zip"):
        for masks in ("labels", "masks.tar", "bare.zip"):
            _, files = load(own, images=images, masks=masks)
            assert [f.file_name for f in files] == expected, (images, masks)
            assert [f.sequence for f in files] == ["", "site1", "site1"]
            np.testing.assert_array_equal(decode_label(files[1]), mapped(labels(0, IDS, 5, 6)))


def test_compressed_tar_of_pictures(own):
    tar_tree(own / "images", own / "images.tar.xz", "w:xz")
    _, files = find_folder_files("thermal", own / "images.tar.xz", scratch=own / "scratch")
    assert [f.file_name for f in files] == ["c.JPEG", "site1/a.png", "site1/b.jpg"]
    assert files[1].image.read_bytes() == (own / "images/site1/a.png").read_bytes()


def test_target_without_labels(own):
    dataset, files = find_folder_files("thermal", own / "images")
    assert len(files) == 3 and dataset.class_names == () and dataset.splits["train"].labels == ()
    assert {file.label for file in files} == {None}


def test_endings_tell_images_and_masks_apart(own):
    for i in range(2):
        save(own / f"mixed/{i}_rgb.png", picture(i, 5, 6, 3))
        save(own / f"mixed/{i}_mask.png", labels(i, IDS, 5, 6))
    _, files = load(own, images="mixed", masks="mixed", image_ending="_rgb", label_ending="_mask")
    assert [(f.file_name, f.frame, f.label.name) for f in files] == [
        ("0_rgb.png", "0", "0_mask.png"), ("1_rgb.png", "1", "1_mask.png")
    ]  # fmt: skip


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_masks_painted_in_colours(own, mode):
    colors = np.array(list(CLASS_OF_COLOR), np.uint8)
    for i, path in enumerate(sorted((own / "labels").rglob("*.png"))):
        index = labels(i, list(range(len(colors))), 5, 6)
        if mode == "P":
            label = Image.fromarray(index)
            label.putpalette(colors.tobytes())
        else:
            label = Image.fromarray(colors[index]).convert(mode)
        label.save(path)
    fields = {"class_names": MAP["class_names"], "colors": COLORS, "ignore": [[0, 0, 0]]}
    (own / "map.yaml").write_text(json.dumps(fields))

    def files():
        return find_folder_files("thermal", own / "images", own / "labels", own / "map.yaml")[1]

    for file in files():
        with Image.open(file.label.container) as label:
            pixels = np.array(label.convert("RGB"))
        expected = [[CLASS_OF_COLOR[tuple(int(v) for v in color)] for color in row] for row in pixels]
        np.testing.assert_array_equal(decode_label(file), expected)
    pixels[0, 0] = (1, 2, 3)
    save(file.label.container, pixels)
    with pytest.raises(UserError, match=r"b.png: label holds colors \[\[1, 2, 3\]\], which .*map.yaml does not list; "
                       r"add them to 'colors' or 'ignore', or set 'other: ignore'"):  # fmt: skip
        decode_label(files()[-1])
    save(file.label.container, np.zeros((5, 6)))
    with pytest.raises(UserError, match="label has mode L; .*map.yaml describes masks painted in colours"):
        decode_label(files()[-1])


def test_class_ids_without_a_map_of_ids(own):
    for path in (own / "labels").rglob("*.png"):
        save(path, labels(0, [0, 1, 2, 255], 5, 6))
    (own / "map.yaml").write_text("class_names: [road, car, person]\n")
    _, files = find_folder_files("thermal", own / "images", own / "labels", own / "map.yaml")
    np.testing.assert_array_equal(decode_label(files[0]), labels(0, [0, 1, 2, 255], 5, 6))


@pytest.mark.parametrize("save_as", ["palette", "16 bit", "32 bit"])
def test_palette_and_wide_masks(own, save_as):
    ids = labels(3, [7, 26], 5, 6)
    path = own / "labels/c.png"
    if save_as == "palette":
        label = Image.fromarray(ids)
        label.putpalette([9] * 300)
        label.save(path)
        _, files = load(own)
        expected = mapped(ids)
    else:
        wide = np.where(ids == 7, 40_000, 26)
        path.unlink()
        Image.fromarray(wide.astype(np.uint16 if save_as == "16 bit" else np.int32)).save(path.with_suffix(".tif"))
        _, files = load(own, ids={40_000: "person", 26: 1, 7: 0, 24: 2, 25: 2})
        expected = np.where(ids == 7, 2, 1)
    np.testing.assert_array_equal(decode_label(files[0]), expected)


def test_ids_that_are_not_listed(own):
    _, files = load(own, ignore=[], ids={7: "road", 26: "car"})
    with pytest.raises(UserError, match=r"a.png: label holds ids \[0, 24, 25\], which .*map.json does not list; add "
                       r"them to 'ids' or 'ignore', or set 'other: ignore'"):  # fmt: skip
        decode_label(files[1])
    _, files = load(own, ignore=[], ids={7: "road", 26: "car"}, other="ignore")
    expected = np.where(np.isin(mapped(labels(0, IDS, 5, 6)), (0, 1)), mapped(labels(0, IDS, 5, 6)), 255)
    np.testing.assert_array_equal(decode_label(files[1]), expected)


def test_masks_of_another_kind(own):
    Image.new("RGB", (6, 5)).save(own / "labels/c.png")
    with pytest.raises(UserError, match="c.png: label has mode RGB; expected one .* give 'colors' in .*map.json"):
        decode_label(load(own)[1][0])
    Image.fromarray(np.full((5, 6), 70_000, np.int32)).save(own / "labels/c.tif")
    (own / "labels/c.png").unlink()
    with pytest.raises(UserError, match=r"c.tif: label holds values 70000..70000; expected 0..65535"):
        decode_label(load(own)[1][0])


# --- Mistakes


def test_pictures_that_do_not_pair(own):
    (own / "labels/c.png").rename(own / "labels/d.png")
    with pytest.raises(UserError, match=r"1 of 3 images lack a label, first .*images/c.JPEG; expected .*labels/c.\* . "
                       r"If the names end differently, give 'image_ending'"):  # fmt: skip
        load(own)
    save(own / "labels/c.png", picture(0, 5, 6))
    with pytest.raises(UserError, match=r"1 of 4 labels lack an image, first .*labels/d.png; expected .*images/d"):
        load(own)
    save(own / "images/site1/b.bmp", picture(0, 5, 6))
    with pytest.raises(UserError, match=r"images/site1/b.bmp and .*images/site1/b.jpg differ only in their type"):
        load(own)


def test_what_cannot_be_used(own):
    (own / "labels/c.png").rename(own / "labels/c.jpg")
    with pytest.raises(UserError, match="labels/c.jpg: JPEG changes the values of masks"):
        load(own)
    (own / "none").mkdir()
    (own / "none/film.mp4").touch()
    with pytest.raises(UserError, match=r"none holds no picture \(\*.png, .*\); found film.mp4"):
        find_folder_files("thermal", own / "none")
    with pytest.raises(UserError, match="labels needs --label_map FILE, which says what the masks mean"):
        find_folder_files("thermal", own / "images", own / "labels")
    for name in ("a/b", "cityscapes", "synthetic_rgb", ""):
        with pytest.raises(UserError, match=f"'{name}' cannot be the name of own data"):
            find_folder_files(name, own / "images")
    with pytest.raises(UserError, match="'../x' cannot be the name of a split"):
        find_folder_files("thermal", own / "images", split="../x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{]", r"label map .*map.yaml cannot be read \(.*\); give a JSON or YAML file"),
        ("[road]", "holds list; expected an object with class_names"),
        (
            "classes: [a]",
            r"unknown fields \['classes'\]; a label map has .*class_names is a list of 1",
        ),
        ("class_names: [a, a]", r"class_names is a list of 1 to 254 different names, got \['a', 'a'\]"),
        ("class_names: [a, 1]", r"different names, got \['a', 1\]"),
        ("{class_names: [a], ids: {1: a}, colors: {a: [1, 2, 3]}}", "give either ids or colors"),
        ("{class_names: [a], ids: [1]}", r"ids is an object \{id: class\}, got \[1\]"),
        ("{class_names: [a], ids: {1: b}}", "'b' is no class name or position 0..0"),
        ("{class_names: [a], ids: {1: 1}}", "1 is no class name or position 0..0"),
        ("{class_names: [a], ids: {70000: a, x: a, -1: a}}", "numbers 0..65535, got 70000; .* got 'x'; .* got -1"),
        ("{class_names: [a], ids: {1: a}, ignore: [1]}", "id 1 is both in ids and in ignore"),
        ("{class_names: [a], ids: {1: a}, ignore: 3}", "ignore is a list, got 3"),
        ("{class_names: [a], other: skip}", "other is error or ignore, got 'skip'"),
        ("{class_names: [a], label_ending: 3}", r"image_ending and label_ending are texts, got \['', 3\]"),
        ("{class_names: [a], colors: [1]}", r"colors is an object \{class: color\}, got \[1\]"),
        (
            "{class_names: [a], colors: {a: [1, 2]}}",
            r"a color is \[red, green, blue\] .* 0..255, got \[1, 2\]",
        ),
        ("{class_names: [a], colors: {a: [1, 2, 256]}}", r"got \[1, 2, 256\]"),
        ("{class_names: [a, b], colors: {a: [1, 2, 3], b: [1, 2, 3]}}", r"color \[1, 2, 3\] is listed twice"),
    ],
)
def test_wrong_label_maps(tmp_path, text, message):
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        LabelMap.load(tmp_path / "map.yaml")


def test_label_map_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="label map .*none.yaml cannot be read"):
        LabelMap.load(tmp_path / "none.yaml")


def test_a_damaged_archive_among_own_pictures(own):
    (own / "images/more.zip").write_bytes(b"damaged")
    with pytest.raises(UserError, match="more.zip cannot be read as an archive"):
        load(own)


def test_names_that_are_not_utf_8(own):
    (own / "images/caf\udce9.png").touch()
    with pytest.raises(UserError, match=r"the name of caf\\udce9.png in .*images is not UTF-8; rename it"):
        load(own)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_only_the_split_train_is_trained(own, split):
    dataset, _ = load(own, split)
    assert dataset.splits[split].trained == (split == "train") and not dataset.splits[split].fixed_size
