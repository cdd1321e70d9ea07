"""The dataset card of prepared data: read back as the Hub reads it, true to the metadata, safe with any name."""

import dataclasses
import re

import pytest
from huggingface_hub import DatasetCard

from madm_utils.arrow_writer import OnError, Share, publish_split, write_chunks
from madm_utils.cli import UserError
from madm_utils.dataset_card import CardSplit, dataset_card, modality_of, write_dataset_card
from madm_utils.prepare_args import parse_prepare_args
from madm_utils.prepared_data import Metadata
from madm_utils.raw_datasets import RAW_DATASETS
from madm_utils.split_plan import plan_synthetic_split
from madm_utils.verification import verify_prepared
from madm_utils.verification_report import write_report

COLUMNS = ("file_name", "sequence", "frame", "condition", "image")
LABELLED = (*COLUMNS, "label", "class_pixel_counts", "classes")


def split_of(name: str, split: str, labelled: bool, /, **changes) -> CardSplit:
    """A split of a public dataset whose class i has i pixels in i images."""
    dataset = RAW_DATASETS[name]
    counts = tuple(range(len(dataset.class_names))) if labelled else None
    metadata = Metadata(
        name,
        split,
        dataset.class_names,
        dataset.splits[split].published_count,
        dataset.splits[split].stored_size,
        counts,
        "f" * 32,
        dataset.splits[split].stored_size is not None,
        counts,
        {"image_range": None, "stored_size": dataset.splits[split].stored_size},
        (),
        "c" * 64,
        dataclasses.asdict(dataset.licence),
    )
    metadata = dataclasses.replace(metadata, **changes)
    return CardSplit(metadata, LABELLED if labelled else COLUMNS, 12_345_678)


def commands_in(card: DatasetCard) -> list[str]:
    return re.findall(r"^python (prepare_datasets\.py .*)$", card.text, re.MULTILINE)


def test_card_beside_prepared_splits(tmp_path):
    for split, labelled in (("train", False), ("test", True)):
        plan = plan_synthetic_split("depth", split, labelled, 3, 5, 64)
        write_chunks(plan, tmp_path, 1, Share(), OnError())
        publish_split(tmp_path, plan.dataset, split)
    folder = tmp_path / "synthetic_depth"
    path = write_dataset_card(folder)
    assert path == folder / "README.md" and "Contact sheet" not in path.read_text()
    write_report([verify_prepared(folder / "test")], folder)
    card = DatasetCard.load(write_dataset_card(folder))
    assert card.data.license == "apache-2.0" and card.data.size_categories == "n<1K"
    assert card.data.task_categories == ["image-segmentation"] and "depth" in card.data.tags
    test = Metadata.load(folder / "test")
    share = 100 * test.class_pixel_counts[0] / sum(test.class_pixel_counts)
    assert f"| 0 | sky | {share:.2f} % ({test.images_per_class[0]}) |" in card.text
    assert "| test | 3 | 64x64 | native | yes |" in card.text and "![Contact sheet](test.png)" in card.text
    assert test.fingerprint in card.text and test.content in card.text and str(tmp_path) not in card.text
    assert commands_in(card) == [
        "prepare_datasets.py --dataset synthetic --num_train 3 --num_test 3 --resolution 64 --seed 5 --output_dir data"
    ]
    assert 'datasets.load_from_disk("data/synthetic_depth/test")' in card.text
    assert "train_madm.py --task synthetic_to_depth --data_dir data" in card.text
    with pytest.raises(UserError, match="holds no prepared split"):
        write_dataset_card(tmp_path)
    (folder / "test/dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="test is not a complete Arrow dataset"):
        write_dataset_card(folder)


def test_licence_and_numbers_of_a_public_dataset():
    skipped = tuple({"file": f"{i}.png", "reason": "truncated"} for i in range(12))
    test = split_of("deliver_event", "test", True, num_images=1885, skipped=skipped, image_size=None)
    card = dataset_card([split_of("deliver_event", "train", False), test])
    assert (card.data.license, card.data.license_link) == ("other", "https://github.com/jamycheung/DELIVER")
    assert "**Not to be passed on.**" in card.text and "Event images of DELIVER, 25 classes." in card.text
    assert "| train | 3983 | 712x712 | resized for training | no | 12.3 MB |" in card.text
    assert "| test | 1885 | several | native | yes |" in card.text
    assert "- test: 1885 of the 1897 images of the published split." in card.text
    assert "9.png and 2 more." in card.text and "10.png" not in card.text
    assert "| 24 | Truck | 8.00 % (24) |" in card.text  # 24 of 0 + 1 + ... + 24 = 300 pixels
    assert "CVPR 2023" in card.text and "--task_config task.yaml" in card.text
    assert modality_of("deliver_event") == "event" and modality_of("my_sensor") == ""


def test_several_datasets_on_the_hub():
    splits = [split_of("cityscapes", "train", True), split_of("fmb", "train", False), split_of("fmb", "test", True)]
    card = dataset_card(splits, "user/street", {"configs": [{"config_name": "fmb"}], "license": "unknown"})
    assert card.data.configs == [{"config_name": "fmb"}] and card.data.license == "unknown"
    assert card.data.pretty_name == "cityscapes, fmb" and {"rgb", "infrared"} <= set(card.data.tags)
    assert "\n## cityscapes\n" in card.text and "\n### Classes\n" in card.text
    assert 'datasets.load_dataset("user/street", "cityscapes", split="train")' in card.text
    assert "train_madm.py --task cityscapes_to_fmb_infrared --data_dir user/street" in card.text


@pytest.mark.parametrize(
    ("name", "changes", "flags"),
    [
        ("deliver_event", {}, "--dataset deliver --modality event"),
        ("fmb_visible", {}, "--dataset fmb --modality visible"),
        ("dsec_19", {}, "--dataset dsec --label_classes 19"),
        ("gta5", {"settings": {"stored_size": None}}, "--dataset gta5 --store_resolution native"),
        ("fmb", {"settings": {"stored_size": [256, 384], "image_range": [0, 4095.5]}},
         "--dataset fmb --store_resolution 256x384 --image_range 0 4095.5"),
        ("dsec", {"settings": {"events": {"representation": "voxel", "bins": 3, "clip": None, "rectify": False}}},
         "--dataset dsec --event_representation voxel --event_bins 3 --no-event_rectify"),
    ],
)  # fmt: skip
def test_the_command_makes_this_dataset(name, changes, flags):
    card = dataset_card([split_of(name, "train", name == "gta5", **changes)])
    (command,) = commands_in(card)
    assert command == f"prepare_datasets.py {flags} --raw_dir raw --output_dir data"
    args = parse_prepare_args("", command.split()[1:])
    assert args.names == [name]


def test_own_data():
    licence = {"summary": "Your own data.", "url": "", "redistribution": True}
    split = split_of("fmb", "test", True, dataset="my_sensor", licence=licence)
    card = dataset_card([split])
    assert card.data.license == "unknown" and "Not to be passed on" not in card.text
    (command,) = commands_in(card)
    assert command.startswith("prepare_datasets.py --dataset folder --name my_sensor --split test --images images")
    assert parse_prepare_args("", command.split()[1:]).names == ["my_sensor"]
    by_hand = dataset_card([split_of("fmb", "train", False, dataset="my_sensor", settings={}, licence=None)])
    assert not commands_in(by_hand) and "Not stated; ask the owners" in by_hand.text


def test_names_from_users_break_neither_yaml_nor_markdown(tmp_path):
    evil = 'x"\n---\nlicense: mit\n# Big | [a](b) <img src=x> `code` {{ 7 * 7 }} \\'
    skipped = ({"file": evil, "reason": ""},)
    split = split_of(
        "fmb", "test", True, dataset=evil, split=evil, skipped=skipped, class_names=(evil, *"bcdefghijklmno"),
        settings={evil: evil, "stored_size": None}, licence=None,
    )  # fmt: skip
    (tmp_path / "README.md").write_text(str(dataset_card([split])), encoding="utf-8")
    card = DatasetCard.load(tmp_path / "README.md")
    assert card.data.license == "unknown" and card.data.pretty_name == " ".join(evil.split())
    assert "\n# Big" not in card.text and "{{ 7 \\* 7 }}" in card.text
    shown = re.sub(r"^```.*?^```", "", card.text, flags=re.MULTILINE | re.DOTALL)
    assert "<img" not in re.sub(r"\\<", "", shown) and "[a](" not in re.sub(r"\\\[", "", shown)
    rows = [line for line in shown.splitlines() if line.startswith("| 0 |")]
    assert len(rows) == 1 and len(re.findall(r"(?<!\\)\|", rows[0])) == 4
    compile(re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1], "card", "exec")
