"""The training and evaluation datasets: goldens through the whole chain, reproducible draws, refused inputs."""

import io
import json
import pickle
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from raw_trees import save, write_cityscapes, write_deliver
from torch.utils.data import DataLoader

import prepare_datasets
from madm_utils.cli import UserError
from madm_utils.datasets import AdaptationDataset, EvaluationDataset
from madm_utils.label_spaces import lookup_table
from madm_utils.prepared_data import open_split
from madm_utils.tasks import TASKS
from madm_utils.transforms import apply_crop, draw_crop

CASES = Path(__file__).parent / "fixtures" / "common" / "dataset_case"
DEPTH = TASKS["cityscapes_to_deliver_depth"]
KINDS = {
    "depth": ("cityscapes_to_deliver_depth", ["DELIVER_Depth_train", "DELIVER_Depth_test"]),
    "infrared": ("cityscapes_to_fmb_infrared", ["FMB_Infrared_train", "FMB_Infrared_test"]),
    "event": ("cityscapes_to_dsec_event", ["DSEC_Event_test"]),
}


def prepare(*argv: object) -> None:
    prepare_datasets.main([str(arg) for arg in (*argv, "--num_proc", 1)])


@pytest.fixture(scope="module")
def goldens(tmp_path_factory):
    """The golden pictures, prepared with the file lists that the published loader used."""
    data = tmp_path_factory.mktemp("goldens")
    for kind, (task, lists) in KINDS.items():
        files = [CASES / kind / f"Cityscapes_RGB_to_{name}.json" for name in lists]
        prepare("--task", task, "--raw_dir", CASES / kind, "--output_dir", data / kind, "--file_list", *files)
    return data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Cityscapes (3 training images) and DELIVER (2) prepared from tiny trees."""
    folder = tmp_path_factory.mktemp("tiny")
    write_cityscapes(folder / "raw")
    write_deliver(folder / "raw")
    prepare("--task", DEPTH.name, "--raw_dir", folder / "raw", "--output_dir", folder / "data")
    return folder / "data"


class Seeded(random.Random):
    """Skips the draw of the index pair, so that the golden's own seed decides the geometry."""

    seed_to_use = 0

    def __init__(self, _seed: str):
        super().__init__(self.seed_to_use)

    def randrange(self, *args: int) -> int:
        return 0 if args == (1,) else super().randrange(*args)


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("kind", ["depth", "infrared"])
def test_training_sample_equals_golden_from_raw_files_to_tensors(goldens, kind, seed, monkeypatch):
    monkeypatch.setattr(Seeded, "seed_to_use", seed)
    monkeypatch.setattr("madm_utils.datasets.random.Random", Seeded)
    dataset = AdaptationDataset(goldens / kind, TASKS[KINDS[kind][0]], 512, 1, 0, rare_class_sampling=False)
    sample, golden = dataset[0], np.load(CASES / kind / "golden_train.npz")
    assert sample["source_image"].dtype == sample["target_image"].dtype == torch.uint8
    assert sample["source_label"].dtype == torch.int64 and sample["source_image"].is_contiguous()
    np.testing.assert_array_equal(sample["source_image"][:, ::2, ::2], golden[f"source_rgb_s2_{seed}"])
    np.testing.assert_array_equal(sample["source_label"], golden[f"source_label_{seed}"][0])
    np.testing.assert_array_equal(sample["target_image"][:, ::2, ::2], golden[f"target_s2_{seed}"])


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_sample_equals_golden_from_raw_files_to_tensors(goldens, kind):
    task, golden = TASKS[KINDS[kind][0]], np.load(CASES / kind / "golden.npz")
    sample = EvaluationDataset(goldens / kind, task, "test", 512)[0]
    assert sample["image"].dtype == sample["label"].dtype == torch.uint8
    np.testing.assert_array_equal(sample["image"], golden["image"])
    np.testing.assert_array_equal(sample["label"], golden["label"][0])


def adaptation(data, num_samples=40, seed=5, resolution=64, min_pixels=4, **options):
    return AdaptationDataset(data, DEPTH, resolution, num_samples, seed, rare_class_min_pixels=min_pixels, **options)


def test_samples_depend_on_seed_and_index_only(data):
    dataset = adaptation(data)
    backwards = [dataset[k] for k in reversed(range(8))][::-1]
    again = pickle.loads(pickle.dumps(dataset))
    loaded = list(DataLoader(again, batch_size=2, num_workers=2, collate_fn=dataset.collate))
    longer = adaptation(data, num_samples=1000)
    for k in range(8):
        assert backwards[k].pop("corrupt") == []
        for key, value in backwards[k].items():
            assert torch.equal(value, loaded[k // 2][key][k % 2]) and torch.equal(value, longer[k][key])
    assert not torch.equal(adaptation(data, seed=6)[0]["source_image"], backwards[0]["source_image"])
    assert not torch.equal(backwards[1]["source_image"], backwards[0]["source_image"])
    with pytest.raises(IndexError):
        dataset[40]


def test_loading_is_cheap_to_start(data):
    assert len(pickle.dumps(adaptation(data))) < 50_000  # workers get paths, not pixels


def reference_pair(data, rng):
    """Without rare classes: index pair, then flip, x, y of the source, then of the target; and the source's number."""
    tree = data.parent / "raw"
    sources = sorted((tree / "Cityscapes/leftImg8bit/train").rglob("*.png"))
    targets = sorted((tree / "DELIVER/depth").glob("*/train/*/*.png"))
    pair = rng.randrange(len(sources) * len(targets))
    crops = []
    for path, width, height in ((sources[pair % 3], 1024, 512), (targets[pair % 2], 712, 712)):
        image = Image.open(path).convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        flip, left, top = rng.random() < 0.5, rng.randint(0, width - 512), rng.randint(0, height - 512)
        image = image.crop((left, top, left + 512, top + 512))
        crops.append(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image)
    return [np.asarray(crop) for crop in crops], pair % 3


def assert_equal_pair(sample, crops):
    for key, crop in zip(("source_image", "target_image"), crops, strict=True):
        np.testing.assert_array_equal(sample[key].permute(1, 2, 0), crop)


def test_source_crop_matches_an_independent_reference(data):
    dataset = adaptation(data, rare_class_sampling=False, resolution=512)
    for k in range(4):
        assert_equal_pair(dataset[k], reference_pair(data, random.Random(f"5-{k}"))[0])


def damage(data, folder, change, split="cityscapes/train"):
    """A copy of prepared data with `change(index, row)` applied to the undecoded rows of one split."""
    shutil.copytree(data, folder)
    rows, metadata = open_split(folder / split)
    rows = rows.map(lambda row, index: change(index, row), with_indices=True, keep_in_memory=True)
    shutil.rmtree(folder / split)
    for column in {"image", "label"} & set(rows.column_names):
        rows = rows.cast_column(column, datasets.Image())
    rows.save_to_disk(str(folder / split))
    metadata.save(folder / split)
    return folder


def png(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def first_image(cell):
    """Gives the first row's image another content."""
    return lambda index, row: {"image": cell(row)} if index == 0 else {}


DAMAGES = {
    "truncated": (lambda row: {"bytes": row["image"]["bytes"][:-40], "path": None}, "truncated|broken|not an image"),
    "zeros": (lambda row: {"bytes": bytes(100), "path": None}, "not an image"),
    "absent": (lambda row: None, "no bytes"),
    "other size": (
        lambda row: {"bytes": png(np.zeros((7, 9, 3), np.uint8)), "path": None},
        r"for an image of \(9, 7\)",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_corrupt_image_is_replaced_by_a_fixed_draw(kind, data, tmp_path):
    """The item comes from the stream of the second attempt, in every process; items without the image stay."""
    cell, reason = DAMAGES[kind]
    folder = damage(data, tmp_path / "data", first_image(cell))
    dataset = adaptation(folder, rare_class_sampling=False, resolution=512, num_samples=12)
    name = open_split(folder / "cityscapes/train")[0][0]["file_name"]
    loader = DataLoader(pickle.loads(pickle.dumps(dataset)), batch_size=4, num_workers=1, collate_fn=dataset.collate)
    batches, met = list(loader), 0
    for k in range(12):
        attempt = 0
        crops, index = reference_pair(data, random.Random(f"5-{k}"))
        while index == 0:
            attempt += 1
            crops, index = reference_pair(data, random.Random(f"5-{k}-{attempt}"))
        assert_equal_pair(dataset[k], crops)
        assert torch.equal(batches[k // 4]["source_image"][k % 4], dataset[k]["source_image"])
        corrupt = dataset[k]["corrupt"]
        assert len(corrupt) == (attempt > 0)
        if corrupt:
            assert re.fullmatch(rf"cityscapes/train {re.escape(name)} \(.*({reason}).*\)", corrupt[0])
            assert corrupt[0] in batches[k // 4]["corrupt"]
            met += 1
    assert met >= 2 and sum(len(batch["corrupt"]) for batch in batches) == met


def test_corrupt_labels_and_targets_are_replaced_too(data, tmp_path):
    def bad_label(index, row):
        return {"label": {"bytes": b"no png", "path": None}} if index == 1 else {}

    folder = damage(data, tmp_path / "a", bad_label)
    folder = damage(folder, tmp_path / "b", first_image(DAMAGES["zeros"][0]), "deliver/train")
    # Through rare-class sampling as well.
    dataset = adaptation(folder, num_samples=30)
    found = {name for k in range(30) for name in dataset[k]["corrupt"]}
    assert len(found) == 2
    assert {name.split(" ")[0] for name in found} == {"cityscapes/train", "deliver/train"}


def test_nothing_but_corrupt_images(data, tmp_path):
    """One message without a traceback, also from a loader process."""
    folder = damage(data, tmp_path / "data", lambda index, row: {"image": {"bytes": bytes(9), "path": None}})
    dataset = adaptation(folder)
    start = "^100 draws in a row met images that cannot be decoded; prepare the data again: cityscapes/train "
    with pytest.raises(UserError, match=start) as stop:
        next(iter(DataLoader(dataset, num_workers=1, collate_fn=dataset.collate)))
    assert str(stop.value).count("(not an image)") == 3 and "Traceback" not in str(stop.value)


def test_a_defect_is_not_taken_for_a_corrupt_image(data):
    dataset = adaptation(data)
    dataset._source = dataset._source.remove_columns("label")
    with pytest.raises(AttributeError):
        dataset[0]


def test_a_corrupt_evaluation_image_is_an_error(data, tmp_path):
    folder = damage(data, tmp_path / "data", first_image(DAMAGES["zeros"][0]), "deliver/test")
    dataset = EvaluationDataset(folder, DEPTH, "test", 64)
    assert dataset[1]["index"] == 1
    with pytest.raises(UserError, match=r"^cannot be decoded: deliver/test depth/.*png \(not an image\); prepare"):
        next(iter(DataLoader(dataset, num_workers=1, collate_fn=dataset.collate)))


def test_fingerprints_are_those_of_the_prepared_data(data):
    expected = {
        split: json.loads((data / split / "metadata.json").read_text())["fingerprint"]
        for split in ("cityscapes/train", "deliver/train")
    }
    assert adaptation(data).fingerprints == expected
    assert set(adaptation(data, target=False).fingerprints) == {"cityscapes/train"}


def test_rare_class_crops_are_drawn_again_until_they_show_enough(tmp_path):
    """One image whose class 11 (person) fills the right-most eighth: most crops miss it, kept crops do not."""
    root = write_cityscapes(tmp_path, splits=())
    image, label = np.zeros((512, 1024, 3), np.uint8), np.full((512, 1024), 7, np.uint8)
    label[:, 896:] = 24
    save(root / "leftImg8bit/train/a/a_0_0_leftImg8bit.png", image)
    save(root / "gtFine/train/a/a_0_0_gtFine_labelIds.png", label)
    prepare("--dataset", "cityscapes", "--raw_dir", tmp_path, "--output_dir", tmp_path / "data")
    person, options = 3, {"min_pixels": 100, "num_samples": 400, "target": False}

    def share_of_hits(dataset):
        return np.mean([int((dataset[k]["source_label"] == person).sum()) > 50 for k in range(400)])

    # At 64 x 128 the class fills columns 112..127: 16 of the 65 crop positions show it, each of 11 draws may hit.
    miss = 49 / 65
    assert share_of_hits(adaptation(tmp_path / "data", rare_class_sampling=False, **options)) < 1 - miss + 0.06
    dataset = adaptation(tmp_path / "data", **options)
    assert abs(share_of_hits(dataset) - (1 - miss**11)) < 0.04
    assert "target_image" not in dataset[0]

    for k in range(20):
        rng = random.Random(f"5-{k}")
        rng.randrange(1)
        assert dataset.sampler.draw(rng) == (11, 0)
        for _ in range(11):
            crop = draw_crop(rng, (64, 128), 64)
            if crop.left + 64 > 112:
                break
        expected = np.where(apply_crop(label[::8, ::8], crop, 64) == 24, person, 5)
        np.testing.assert_array_equal(dataset[k]["source_label"], expected)


def test_max_train_samples_and_other_resolutions(data):
    dataset = adaptation(data, max_train_samples=1, rare_class_sampling=False)
    assert len(dataset._source) == len(dataset._target) == 1
    assert dataset.source_size == (64, 128) and dataset.target_size == (89, 89)
    assert dataset[0]["target_image"].shape == (3, 64, 64)


def test_evaluation_protocols_and_collate(data):
    paper = EvaluationDataset(data, DEPTH, "test", 32, "paper")
    native = EvaluationDataset(data, DEPTH, "test", 32, "native")
    batch = native.collate([native[0], native[1]])
    assert batch["image"].shape == (2, 3, 32, 32) and batch["index"] == [0, 1]
    assert [tuple(label.shape) for label in batch["label"]] == [(10, 10), (10, 10)]
    assert paper[0]["label"].shape == (32, 32) and len(paper) == 2
    assert paper.file_name(1) == "depth/night/test/MAP_1_point2/045050_depth_front.png"
    red = np.array(Image.open(data.parent / "raw/DELIVER/semantic/cloud/test/MAP_1_point2/045050_semantic_front.png"))
    ids = np.where((red[..., 0] == 0) | (red[..., 0] == 255), 255, red[..., 0].astype(int) - 1)
    np.testing.assert_array_equal(native[0]["label"], lookup_table(DEPTH.target_label_map)[ids])


def test_missing_prepared_data_names_the_command(data, tmp_path):
    message = (
        r"cityscapes/train does not exist .*holds no split.* python prepare_datasets.py --task {} --raw_dir RAW_DIR"
    )
    with pytest.raises(UserError, match=message.format(DEPTH.name)):
        adaptation(tmp_path)
    with pytest.raises(UserError, match=r"holds the splits test, train\).*prepare_datasets.py"):
        EvaluationDataset(data, DEPTH, "val", 64)
    with pytest.raises(UserError, match=r"--task synthetic_to_depth --output_dir"):
        AdaptationDataset(tmp_path, TASKS["synthetic_to_depth"], 64, 1, 0)
    with pytest.raises(UserError, match=r"--task_config FILE --raw_dir"):
        AdaptationDataset(tmp_path, replace(DEPTH, name="mine"), 64, 1, 0)


def test_unlabelled_split_and_unknown_protocol_and_unmapped_classes(data):
    with pytest.raises(UserError, match="deliver/train holds images without labels"):
        EvaluationDataset(data, DEPTH, "train", 64)
    with pytest.raises(UserError, match="unknown protocol 'x'; protocols: paper, native"):
        EvaluationDataset(data, DEPTH, "test", 64, "x")
    with pytest.raises(UserError, match=r"source_label_map leaves class ids \[11, .*of dataset cityscapes \(person"):
        AdaptationDataset(data, replace(DEPTH, source_label_map=None), 64, 1, 0)
    with pytest.raises(UserError, match="lower --rare_class_min_pixels"):
        adaptation(data, min_pixels=3000)
