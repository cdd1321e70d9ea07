"""Rows of raw images: labels mapped and counted in one go, published statistics, and pictures that are turned."""

import io
import json

import numpy as np
import pytest
from PIL import ExifTags, Image
from raw_trees import labels, picture, save, write_cityscapes, write_deliver, write_fmb, write_gta5, write_synthia

from madm_utils.cli import UserError
from madm_utils.conversion import PublishedStatistics, RawConversion
from madm_utils.raw_datasets import RAW_DATASETS, LabelFiles, RawFile, find_files
from madm_utils.raw_files import RawPath, RawTree
from madm_utils.raw_labels import decode_label, read_image, read_label


def first_file(name: str, split: str, raw) -> RawFile:
    return find_files(RAW_DATASETS[name], split, RawTree.open(raw))[0]


@pytest.mark.parametrize(
    ("name", "split", "write"),
    [
        ("cityscapes", "train", write_cityscapes),
        ("deliver", "test", write_deliver),
        ("fmb", "test", write_fmb),
        ("gta5", "train", write_gta5),
        ("synthia", "train", write_synthia),
    ],
)
def test_numbers_of_pixels_are_those_of_the_label(tmp_path, name, split, write):
    """Counted in the mapped pixels one class at a time; the stored label has the same pixels."""
    write(tmp_path)
    file, num_classes = first_file(name, split, tmp_path), len(RAW_DATASETS[name].class_names)
    label, pixels = read_label(file)
    ids = np.array(label)
    assert label.mode == "L" and ids.dtype == np.uint8 and (ids != 255).any()
    np.testing.assert_array_equal(pixels, [(ids == i).sum() for i in range(256)])
    np.testing.assert_array_equal(decode_label(file), ids)
    row = RawConversion(num_classes, None)(file, tmp_path)
    counts = [int((ids == c).sum()) for c in range(num_classes)]
    assert row["class_pixel_counts"] == counts and row["classes"] == [c for c in range(num_classes) if counts[c]]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(row["label"]["bytes"]))), ids)
    half = RawConversion(num_classes, (4, 6))(file, tmp_path)
    resized = Image.fromarray(ids).resize((6, 4), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(half["label"]["bytes"]))), np.asarray(resized))
    assert half["class_pixel_counts"] == counts


def test_class_ids_beyond_the_classes_and_sizes_that_differ(tmp_path):
    image = RawPath.on_disk(save(tmp_path / "image.png", picture(0, 5, 6, 3)))
    label = RawPath.on_disk(save(tmp_path / "label.png", labels(0, [0, 7], 5, 6)))
    file = RawFile(image, "image.png", label=label, label_files=LabelFiles("", 8))
    assert sum(RawConversion(8, None)(file, tmp_path)["class_pixel_counts"]) == 30
    with pytest.raises(
        UserError, match=r"label.png: label holds class ids \[7\] outside the map; expected 0..6 or 255"
    ):
        RawConversion(7, None)(file, tmp_path)
    save(tmp_path / "label.png", labels(0, [0, 7], 4, 6))
    file = RawFile(image, "image.png", label=RawPath.on_disk(label.container), label_files=LabelFiles("", 8))
    with pytest.raises(UserError, match="label.png: label is 6x4 pixels but its image .*image.png is 6x5"):
        RawConversion(8, None)(file, tmp_path)


@pytest.mark.parametrize("name", ["0", "x/00001.png", "a/00001_labelTrainIds.png", "b\\\\00001_labelIds.png"])
def test_statistics_know_labels_by_what_their_kinds_share(tmp_path, name):
    """GTA5's label is 00001.png, and DAFormer's tools list 00001_labelTrainIds.png."""
    write_gta5(tmp_path)
    file = first_file("gta5", "train", tmp_path)
    ids = decode_label(file)
    counts = {str(c): int((ids == c).sum()) for c in range(19)}
    path = tmp_path / "sample_class_stats.json"
    path.write_text(json.dumps([{"file": name, **counts}]))
    statistics = PublishedStatistics.load(RawPath.on_disk(path))
    numbers = read_label(file)[1][:19]
    if name == "0":
        with pytest.raises(UserError, match=r"stats.json does not list .*labels/00001.png \(as 00001\); it was made"):
            statistics.compare(file, numbers)
        return
    statistics.compare(file, numbers)
    numbers[3] += 1
    with pytest.raises(UserError, match=r"stats.json disagrees with .*labels/00001.png: it says \{.*, the label has"):
        statistics.compare(file, numbers)


@pytest.mark.parametrize("suffix", ["labelIds", "labelTrainIds"])
def test_statistics_of_cityscapes(tmp_path, suffix):
    write_cityscapes(tmp_path, suffix=suffix)
    file = first_file("cityscapes", "train", tmp_path)
    pixels = read_label(file)[1][:19]
    counts = {str(c): int(n) for c, n in enumerate(pixels)}
    for listed in ("labelTrainIds.png", "polygons.json"):
        path = tmp_path / "stats.json"
        path.write_text(json.dumps([{"file": f"gtFine/aachen_000000_000019_gtFine_{listed}", **counts}]))
        PublishedStatistics.load(RawPath.on_disk(path)).compare(file, pixels)


# --- Orientation


def photo(path, orientation: int, kind: str) -> RawPath:
    """A picture of 16x24 pixels whose upper half is red."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :, 0] = 255
    Image.fromarray(pixels).save(path, format=kind, exif=exif)
    return RawPath.on_disk(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_photos_are_turned_as_viewers_show_them(tmp_path, kind):
    """6: the upper side is shown on the right. The stored picture is turned, and turned once."""
    file = photo(tmp_path / "photo", 6, kind)
    image = read_image(file)
    assert image.size == (16, 24)
    red = np.asarray(image.convert("RGB"))[..., 0].mean(axis=0)
    assert (red[9:] > 200).all() and (red[:7] < 50).all()
    row = RawConversion(2, None)(RawFile(file, "photo"), tmp_path)
    stored = Image.open(io.BytesIO(row["image"]["bytes"]))
    assert (row["height"], row["width"]) == (24, 16) and stored.getexif().get(ExifTags.Base.Orientation, 1) == 1
    np.testing.assert_array_equal(np.asarray(stored), np.asarray(image.convert("RGB")))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_upright_photos_stay_as_they_are(tmp_path):
    file = photo(tmp_path / "photo.png", 1, "PNG")
    row = RawConversion(2, None)(RawFile(file, "photo.png"), tmp_path)
    assert row["image"]["bytes"] == file.read_bytes()
    broken = tmp_path / "broken.jpg"
    Image.fromarray(picture(0, 16, 24, 3)).save(broken, exif=b"Exif\0\0MM\0*nonsense")
    assert read_image(RawPath.on_disk(broken)).size == (24, 16)
