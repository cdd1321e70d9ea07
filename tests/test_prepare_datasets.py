"""`prepare_datasets.py` on tiny official layouts: what it writes, and one message for each mistake."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from raw_trees import labels, picture, save, write_cityscapes, write_deliver, write_dsec, write_fmb

import prepare_datasets
from madm_utils.cli import UserError
from madm_utils.label_spaces import CITYSCAPES_LABEL_IDS

SCRIPT = Path(prepare_datasets.__file__)
DELIVER_TASK = "cityscapes_to_deliver_depth"


def prepare(*argv: object) -> int:
    return prepare_datasets.main([str(arg) for arg in (*argv, "--num_proc", 1)])


def load(folder: Path):
    return datasets.load_from_disk(str(folder)), json.loads((folder / "metadata.json").read_text())


@pytest.fixture
def raw(tmp_path):
    """A raw folder with all four datasets."""
    for write in (write_cityscapes, write_deliver, write_fmb, write_dsec):
        write(tmp_path / "raw")
    return tmp_path / "raw"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "data"


def results(out: Path) -> list[Path]:
    """Files in the output folder, without those of work in progress."""
    return sorted(path for path in out.rglob("*") if path.is_file() and ".partial" not in str(path))


def fails(out: Path, match: str, *argv: object) -> None:
    """The command is refused with this message, and what was prepared before is as it was."""
    before = results(out)
    with pytest.raises(UserError, match=match):
        prepare("--output_dir", out, *argv)
    assert results(out) == before


def test_cityscapes_columns_sizes_and_statistics(raw, out):
    assert prepare("--dataset", "cityscapes", "--raw_dir", raw, "--output_dir", out) == 0
    data, metadata = load(out / "cityscapes/train")
    assert data.column_names == [
        "file_name", "sequence", "frame", "condition", "image", "label", "class_pixel_counts", "classes"
    ]  # fmt: skip
    assert data["file_name"][:][0] == "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png"
    assert data["sequence"][:] == ["aachen", "aachen", "bochum"]
    native = labels(1, [*range(34), 255], 8, 16)
    train_ids = np.array([[CITYSCAPES_LABEL_IDS.get(int(v), 255) for v in line] for line in native], np.uint8)
    counts = [int((train_ids == c).sum()) for c in range(19)]
    row = data[1]
    assert row["class_pixel_counts"] == counts  # native pixels, although the label is stored at 512 x 1024
    expected = Image.fromarray(picture(1, 8, 16, 3)).resize((1024, 512), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(np.asarray(row["image"]), np.asarray(expected))
    expected = Image.fromarray(train_ids).resize((1024, 512), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(np.asarray(row["label"]), np.asarray(expected))
    assert row["label"].mode == "L" and row["label"].format == "TIFF"
    assert metadata["image_size"] == [512, 1024] and metadata["num_images"] == 3
    assert metadata["class_pixel_counts"] == np.sum(data["class_pixel_counts"][:], axis=0).tolist()

    val, metadata = load(out / "cityscapes/val")
    assert metadata["image_size"] == [8, 16] and len(val) == 1
    np.testing.assert_array_equal(np.asarray(val[0]["image"]), picture(0, 8, 16, 3))


def test_label_train_ids_are_taken_as_they_are(tmp_path, out):
    root = write_cityscapes(tmp_path, splits=("train",), suffix="labelTrainIds")
    prepare("--dataset", "cityscapes", "--raw_dir", root, "--output_dir", out)  # the dataset's folder itself will do
    data, _ = load(out / "cityscapes/train")
    native = labels(2, [*range(19), 255], 8, 16)
    assert data[2]["class_pixel_counts"] == [int((native == c).sum()) for c in range(19)]
    assert not (out / "cityscapes/val").exists()


def test_task_prepares_source_and_target_and_labels_only_the_test_split(raw, out):
    (raw / "DELIVER").rename(raw / "deliver")
    prepare("--task", DELIVER_TASK, "--raw_dir", raw, "--output_dir", out)
    train, metadata = load(out / "deliver/train")
    assert "label" not in train.column_names and metadata["class_pixel_counts"] is None
    assert train[0]["image"].size == (712, 712) and train[0]["image"].mode == "L"
    assert train["condition"][:] == ["cloud", "night"] and set(train["sequence"][:]) == {"MAP_1_point1"}
    test, metadata = load(out / "deliver/test")
    red = labels(0, [*range(26), 255], 10, 10).astype(int)
    expected = np.where((red == 0) | (red == 255), 255, red - 1)
    np.testing.assert_array_equal(np.asarray(test[0]["label"]), expected)
    assert test[0]["class_pixel_counts"] == [int((expected == c).sum()) for c in range(25)]
    assert sorted(p.name for p in out.iterdir()) == ["cityscapes", "deliver"]


@pytest.mark.parametrize(
    "folder", ["test_semantic_labels/zurich_city_13_a/11classes/data", "test/zurich_city_13_a/11classes/data"]
)
def test_dsec_labels_as_the_official_archives_unpack(raw, out, folder):
    old, new = raw / "DSEC/test_semantic_labels/zurich_city_13_a/11classes", raw / "DSEC" / folder
    files = list(old.iterdir())
    new.mkdir(parents=True)
    for path in files:
        path.rename(new / path.name)
    prepare("--dataset", "dsec", "--raw_dir", raw, "--output_dir", out)
    assert len(load(out / "dsec/test")[0]) == 2


def test_dsec_and_fmb_selections(raw, out):
    prepare("--dataset", "dsec", "--raw_dir", raw, "--output_dir", out)
    train, test = load(out / "dsec/train")[0], load(out / "dsec/test")[0]
    assert [name[-10:] for name in train["file_name"][:]] == ["000002.png", "000004.png"]
    assert [name[-10:] for name in test["file_name"][:]] == ["000001.png", "000002.png"]
    assert train[0]["image"].size == (768, 512)
    np.testing.assert_array_equal(np.asarray(test[0]["label"]), labels(1, [*range(11), 255], 11, 16))
    prepare("--dataset", "fmb", "--raw_dir", raw, "--output_dir", out)
    assert load(out / "fmb/train")[0][0]["image"].size == (683, 512)
    np.testing.assert_array_equal(np.asarray(load(out / "fmb/test")[0][0]["label"]), labels(5, [*range(15)], 6, 8))


def test_file_lists_choose_the_files(raw, out, tmp_path):
    train = {
        "source_data": {
            "RGB": ["Cityscapes/leftImg8bit/train/bochum/bochum_000000_000313_leftImg8bit.png"],
            "label": ["Cityscapes/gtFine/train/bochum/bochum_000000_000313_gtFine_labelTrainIds.png"],
        },
        "target_data": {"second_modality": ["depth/night/train/MAP_1_point1/045050_depth_front.png"]},
    }
    (tmp_path / "train.json").write_text(json.dumps(train))
    prepare("--task", DELIVER_TASK, "--raw_dir", raw, "--output_dir", out, "--file_list", tmp_path / "train.json")
    source, _ = load(out / "cityscapes/train")
    native = labels(2, [*range(34), 255], 8, 16)
    assert source["sequence"][:] == ["bochum"] and source[0]["class_pixel_counts"][0] == (native == 7).sum()
    assert load(out / "deliver/train")[0]["condition"][:] == ["night"]
    assert not (out / "deliver/test").exists()

    (tmp_path / "test.json").write_text(json.dumps({"target_data": {"second_modality": ["a.png"], "label": []}}))
    lists = ("--task", DELIVER_TASK, "--raw_dir", raw, "--file_list")
    fails(out, "1 images but 0 labels", *lists, tmp_path / "test.json")
    (tmp_path / "test.json").write_text(
        json.dumps({"target_data": {"second_modality": ["a.png"], "label": ["b.png"]}})
    )
    fails(out, "names a.png, which is neither under", *lists, tmp_path / "test.json")
    (tmp_path / "test.json").write_text("{]")
    fails(out, r"test.json cannot be read .*; expected \{", *lists, tmp_path / "test.json")
    fails(out, "none.json cannot be read", *lists, tmp_path / "none.json")


def test_what_is_prepared_from_the_same_files_is_kept_and_other_settings_need_overwrite(raw, out, capsys):
    prepare("--task", DELIVER_TASK, "--raw_dir", raw, "--output_dir", out)
    prepare("--task", "cityscapes_to_fmb_infrared", "--raw_dir", raw, "--output_dir", out)
    assert "cityscapes train: already prepared from the same files, kept" in capsys.readouterr().out
    assert prepare("--task", DELIVER_TASK, "--raw_dir", raw, "--output_dir", out) == 0
    assert capsys.readouterr().out.count("already prepared from the same files, kept") == 4
    fails(out, "already holds prepared data, made from other files or with other settings; add --overwrite",
          "--task", DELIVER_TASK, "--raw_dir", raw, "--store_resolution", "native")  # fmt: skip
    (raw / "FMB/train/Infrared/00003.png").unlink()
    prepare("--dataset", "fmb", "--raw_dir", raw, "--output_dir", out, "--overwrite")
    assert len(load(out / "fmb/train")[0]) == 1
    assert sorted(p.name for p in (out / "fmb").iterdir()) == ["README.md", "test", "train"]


def test_max_samples_is_spread_over_the_split(raw, out):
    prepare("--dataset", "deliver", "--raw_dir", raw, "--output_dir", out, "--max_samples", 1)
    assert [len(load(out / "deliver" / split)[0]) for split in ("train", "test")] == [1, 1]


def test_processes_give_the_same_rows_and_pass_errors_on(tmp_path, out):
    root = tmp_path / "FMB"
    for i in range(40):
        save(root / f"train/Infrared/{i:05d}.png", np.full((6, 8), i))
    save(root / "test/Infrared/00001.png", picture(0, 6, 8))
    save(root / "test/Label/00001.png", labels(0, [1], 6, 8))
    command = ["--dataset", "fmb", "--raw_dir", str(tmp_path), "--output_dir", str(out), "--num_proc", "2"]
    assert prepare_datasets.main(command) == 0
    data, _ = load(out / "fmb/train")
    assert [np.asarray(image)[0, 0] for image in data["image"]] == list(range(40))
    (root / "train/Infrared/00030.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"00030.png cannot be read as an image"):
        prepare_datasets.main([*command, "--overwrite"])
    assert len(load(out / "fmb/train")[0]) == 40 and [p.name for p in out.iterdir()] == ["fmb"]


def test_published_statistics_are_compared(raw, out, capsys):
    command = ("--dataset", "cityscapes", "--raw_dir", raw, "--output_dir", out)
    entries = []
    for i, name in enumerate(("aachen_000000_000019", "aachen_000001_000019", "bochum_000000_000313")):
        ids = labels(i, [*range(34), 255], 8, 16)
        counts = {str(t): int((ids == label_id).sum()) for label_id, t in CITYSCAPES_LABEL_IDS.items()}
        entries.append({**{k: v for k, v in counts.items() if v}, "file": f"x/{name}_gtFine_labelTrainIds.png"})
    statistics = raw / "Cityscapes/sample_class_stats.json"
    statistics.write_text(json.dumps(entries))
    prepare(*command)
    assert f"class statistics agree with {statistics}" in capsys.readouterr().out
    entries[1]["3"] = 10**6
    statistics.write_text(json.dumps(entries))
    shutil.rmtree(out)
    fails(out, r"disagrees with .*aachen_000001_000019_gtFine_labelIds.png", *command[:4])


# --- Verification (tests/test_verification.py has the checks one by one)


def test_verify_checks_what_is_there(raw, out, capsys):
    command = ("--dataset", "deliver", "--raw_dir", raw, "--output_dir", out, "--verify")
    prepare(*command)
    prepare(*command)
    prepare(*command[:2], *command[4:])
    assert capsys.readouterr().out.count("verified") == 3
    fails(out, "nothing to verify: .*fmb holds no prepared data", "--dataset", "fmb", "--verify")


def test_verify_ends_with_1_and_writes_what_it_found(raw, out, capsys):
    prepare("--dataset", "deliver", "--raw_dir", raw, "--output_dir", out)
    path = out / "deliver/test/metadata.json"
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps({**metadata, "image_size": [9, 9], "class_pixel_counts": [1] * 25}))
    assert prepare("--dataset", "deliver", "--output_dir", out, "--verify") == 1
    printed = capsys.readouterr().out
    assert "10x10" in printed and "9x9" in printed and "problems found" in printed
    report = json.loads((out / "deliver/report.json").read_text())
    assert any(split["problems"] for split in report["splits"])
    path.write_text(json.dumps({**metadata, "surprise": 1}))
    assert prepare("--dataset", "deliver", "--output_dir", out, "--verify") == 1
    assert "cannot be read as metadata" in capsys.readouterr().out


def test_verify_raw_reads_everything_and_prepares_nothing(raw, out, capsys):
    (raw / "FMB/train/Infrared/00003.png").write_bytes(b"not an image")
    assert prepare("--dataset", "fmb", "--raw_dir", raw, "--output_dir", out, "--verify", "raw") == 1
    assert "00003.png cannot be read as an image" in capsys.readouterr().out
    assert {path.name for path in results(out)} == {"raw_report.json", "raw_train.png", "raw_test.png"}


# --- Mistakes


def test_missing_raw_folder_says_what_was_looked_for_and_found(raw, out):
    fails(out, "nowhere does not exist", "--dataset", "fmb", "--raw_dir", raw / "nowhere")
    shutil.rmtree(raw / "FMB")
    fails(out, r"looked for folders FMB/ .* and train/Infrared/; found Cityscapes, DELIVER, DSEC",
          "--task", "cityscapes_to_fmb_infrared", "--raw_dir", raw)  # fmt: skip
    fails(out, "--raw_dir is needed", "--dataset", "fmb")


def test_empty_split(raw, out):
    shutil.rmtree(raw / "DELIVER/depth/cloud/test")
    shutil.rmtree(raw / "DELIVER/depth/night/test")
    fails(out, r"deliver test is empty: no image matches .*depth/\*/test", "--dataset", "deliver", "--raw_dir", raw)
    for path in (raw / "DSEC/69mask_train_edges").rglob("*.png"):
        if path.name > "000001.png":
            path.unlink()
    fails(out, "dsec train is empty: .*with frames 000002, 000004", "--dataset", "dsec", "--raw_dir", raw)


def test_image_without_label_and_label_without_image(raw, out):
    label = raw / "FMB/test/Label/00043.png"
    label.rename(label.with_name("00044.png"))
    fails(out, r"1 of 1 images lack a label, first .*Infrared/00043.png; expected .*Label/00043.png",
          "--dataset", "fmb", "--raw_dir", raw)  # fmt: skip
    shutil.copy(label.with_name("00044.png"), label)
    fails(out, r"1 of 2 labels lack an image, first .*Label/00044.png; expected .*Infrared/00044.png",
          "--dataset", "fmb", "--raw_dir", raw)  # fmt: skip


def test_label_of_another_size(raw, out):
    save(raw / "FMB/test/Label/00043.png", labels(0, [1], 6, 9))
    fails(out, r"Label/00043.png: label is 9x6 pixels but its image .* is 8x6", "--dataset", "fmb", "--raw_dir", raw)


@pytest.mark.parametrize(
    ("dataset", "path", "bad"),
    [
        ("cityscapes", "Cityscapes/gtFine/train/aachen/aachen_000001_000019_gtFine_labelIds.png", 34),
        ("deliver", "DELIVER/semantic/cloud/test/MAP_1_point2/045050_semantic_front.png", 26),
        ("fmb", "FMB/test/Label/00043.png", 15),
        ("dsec", "DSEC/test_semantic_labels/zurich_city_13_a/11classes/000001.png", 11),
    ],
)
def test_class_id_outside_the_map(raw, out, dataset, path, bad):
    label = np.array(Image.open(raw / path))
    label[0, 0] = bad
    save(raw / path, label)
    message = rf"{path}: label holds class ids \[{bad}\] outside the map"
    fails(out, message, "--dataset", dataset, "--raw_dir", raw)


def test_truncated_image_and_unsupported_mode(raw, out):
    path = raw / "Cityscapes/leftImg8bit/train/bochum/bochum_000000_000313_leftImg8bit.png"
    path.write_bytes(path.read_bytes()[:-40])
    fails(out, "bochum_000000_000313_leftImg8bit.png cannot be read as an image",
          "--task", DELIVER_TASK, "--raw_dir", raw)  # fmt: skip
    Image.fromarray(np.zeros((10, 10), np.uint16)).save(
        raw / "DELIVER/depth/cloud/train/MAP_1_point1/045050_depth_front.png"
    )
    fails(
        out, "image mode I;16 has more than 8 bits .*--image_range LOW HIGH", "--dataset", "deliver", "--raw_dir", raw
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--task", "x"), "unknown task 'x'; tasks: cityscapes_to"),
        (("--dataset", "x"), "unknown dataset 'x'; known: cityscapes, deliver"),
        ((), "give exactly one of --task"),
        (("--dataset", "synthetic", "--resolution", "16"), "--resolution must be at least 32, got 16"),
        (("--dataset", "fmb", "--as_raw"), "--as_raw draws raw layouts"),
        (("--dataset", "synthetic", "--file_list", "x"), "--file_list selects files of the raw datasets"),
    ],
)
def test_wrong_use(out, argv, message):
    fails(out, message, *argv)


def test_output_inside_a_file(raw, tmp_path):
    (tmp_path / "file").touch()
    fails(tmp_path / "file/data", "file is a file; give a folder", "--dataset", "fmb", "--raw_dir", raw)


def test_script_exits_with_2_and_one_message(tmp_path):
    command = [sys.executable, str(SCRIPT), "--dataset", "fmb", "--raw_dir", str(tmp_path), "--output_dir"]
    done = subprocess.run([*command, str(tmp_path / "data")], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: fmb not found under")
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "data").exists()
