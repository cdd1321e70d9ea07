"""`prepare_datasets.py --dataset synthetic`: prepared data, and raw layouts that every converter accepts."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest

import prepare_datasets
from madm_utils.cli import UserError

TASKS = ("cityscapes_to_deliver_depth", "cityscapes_to_fmb_infrared", "cityscapes_to_dsec_event")


def prepare(*argv: object) -> int:
    return prepare_datasets.main([str(arg) for arg in (*argv, "--num_proc", 1)])


def load(folder: Path):
    return datasets.load_from_disk(str(folder)), json.loads((folder / "metadata.json").read_text())


def test_synthetic_data_is_labelled_where_it_should_be_and_reproducible(tmp_path):
    options = ("--dataset", "synthetic", "--num_train", 2, "--num_test", 1, "--resolution", 64, "--verify")
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        prepare(*options, "--seed", seed, "--output_dir", tmp_path / name)
    for modality in ("rgb", "depth", "infrared", "event"):
        train, metadata = load(tmp_path / f"a/synthetic_{modality}/train")
        assert ("label" in train.column_names) == (modality == "rgb")
        assert len(train) == 2 and metadata["image_size"] == [64, 64]
        test, metadata = load(tmp_path / f"a/synthetic_{modality}/test")
        assert metadata["class_names"][0] == "sky" and len(test) == 1 and test[0]["label"].size == (64, 64)
        again, other = (load(tmp_path / f"{name}/synthetic_{modality}/test")[0] for name in "bc")
        np.testing.assert_array_equal(np.asarray(test[0]["image"]), np.asarray(again[0]["image"]))
        assert not np.array_equal(np.asarray(test[0]["image"]), np.asarray(other[0]["image"]))


def test_validation_scenes_and_labels_for_an_upper_bound(tmp_path):
    prepare("--dataset", "synthetic_depth", "--num_train", 1, "--num_test", 1, "--num_val", 2, "--resolution", 64,
            "--label_all", "--num_proc", 1, "--output_dir", tmp_path)  # fmt: skip
    splits = {name: load(tmp_path / f"synthetic_depth/{name}") for name in ("train", "val", "test")}
    assert {name: len(rows) for name, (rows, _) in splits.items()} == {"train": 1, "val": 2, "test": 1}
    assert all("label" in rows.column_names for rows, _ in splits.values())
    first = [np.asarray(rows[0]["image"]) for rows, _ in splits.values()]
    assert not any(np.array_equal(first[i], first[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    card = (tmp_path / "synthetic_depth/README.md").read_text()
    for others in (("--dataset", "cityscapes", "--raw_dir", tmp_path), ("--dataset", "synthetic", "--as_raw")):
        with pytest.raises(UserError, match="are for prepared synthetic scenes"):
            prepare(*others, "--label_all", "--output_dir", tmp_path / "other")
    assert all(flag in card for flag in ("--num_train 1", "--num_val 2", "--num_test 1", "--label_all"))


def test_synthetic_raw_layouts_go_through_every_converter(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "data"
    options = ("--dataset", "synthetic", "--as_raw", "--num_train", 2, "--num_test", 1, "--resolution", 96)
    prepare(*options, "--output_dir", raw)
    with pytest.raises(UserError, match="already there; add --overwrite"):
        prepare(*options, "--output_dir", raw)
    for dataset in ("cityscapes", "deliver", "fmb", "dsec"):
        prepare("--dataset", dataset, "--raw_dir", raw, "--output_dir", out, "--verify")
    listed = tmp_path / "listed"
    for task in TASKS:
        lists = sorted((raw / "file_lists").glob(f"{task}_*.json"))
        prepare("--task", task, "--raw_dir", raw, "--output_dir", listed, "--file_list", *lists)
    for split in ("cityscapes/train", "deliver/train", "deliver/test", "fmb/train", "dsec/test"):
        (found, metadata), (chosen, _) = load(out / split), load(listed / split)
        assert found["file_name"][:] == chosen["file_name"][:]
        assert metadata["num_images"] == (1 if split.endswith("test") else 2)
