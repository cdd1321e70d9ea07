"""Dataset card of prepared data: `README.md` with Hub metadata, rendered from `dataset_card_template.md`.

Everything in it comes from the metadata of the splits, so that the same card can be written again wherever they are.
Names may come from users' files: they are escaped, and hold no line breaks, before they reach Markdown or YAML.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from madm_utils.cli import UserError
from madm_utils.files import replacing
from madm_utils.prepared_data import Metadata
from madm_utils.raw_datasets import RAW_DATASETS
from madm_utils.tasks import TASKS

if TYPE_CHECKING:
    from huggingface_hub import DatasetCard

CARD_FILE = "README.md"
_TEMPLATE = Path(__file__).with_name("dataset_card_template.md")
_SYNTHETIC = "synthetic_"
_SHOWN_SKIPS = 10
_COLUMNS = {
    "image": "8-bit grey or RGB picture",
    "label": "8-bit class ids at the size of the image, 255 = ignore",
    "events": "float32 picture of the events, time bins below each other",
    "class_pixel_counts": "labelled pixels per class at native resolution, by class id",
    "classes": "ids of the classes in the image; the type of the column holds their names",
    "file_name": "path of the image in the raw dataset",
    "sequence": "drive, scene or city, empty if there is none",
    "frame": "name of the frame in its sequence",
    "condition": "weather or time of day, empty if there is none",
}
_DSEC = (
    "M. Gehrig et al., DSEC: A Stereo Event Camera Dataset for Driving Scenarios, IEEE Robotics and Automation "
    "Letters 2021; labels: "
)
_CITATIONS = {
    "cityscapes": "M. Cordts et al., The Cityscapes Dataset for Semantic Urban Scene Understanding, CVPR 2016.",
    "deliver": "J. Zhang et al., Delivering Arbitrary-Modal Semantic Segmentation, CVPR 2023.",
    "fmb": "J. Liu et al., Multi-interactive Feature Learning and a Full-time Multi-modality Benchmark for Image "
    "Fusion and Segmentation, ICCV 2023.",
    "dsec": _DSEC + "Z. Sun et al., ESS: Learning Event-based Semantic Segmentation from Still Images, ECCV 2022.",
    "dsec_night": _DSEC + "R. Xia et al., CMDA: Cross-Modality Domain Adaptation for Nighttime Semantic Segmentation, "
    "ICCV 2023.",
    "dark_zurich": "C. Sakaridis et al., Guided Curriculum Model Adaptation and Uncertainty-Aware Evaluation for "
    "Semantic Nighttime Image Segmentation, ICCV 2019.",
    "gta5": "S. R. Richter et al., Playing for Data: Ground Truth from Computer Games, ECCV 2016.",
    "synthia": "G. Ros et al., The SYNTHIA Dataset: A Large Collection of Synthetic Images for Semantic Segmentation "
    "of Urban Scenes, CVPR 2016.",
}
"""By the name of the public dataset."""


@dataclass(frozen=True)
class CardSplit:
    """What a card says about one prepared split."""

    metadata: Metadata
    columns: tuple[str, ...]
    num_bytes: int
    """Of its Arrow files."""
    sheet: str = ""
    """File name of its contact sheet, beside the card."""

    @classmethod
    def read(cls, folder: Path) -> "CardSplit":
        """Describe the prepared split in `folder`.

        Raises:
            UserError: its metadata cannot be read.
        """
        metadata = Metadata.load(folder)
        try:
            info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
            columns = tuple(info["features"])
            num_bytes = sum(path.stat().st_size for path in folder.glob("*.arrow"))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{folder} is not a complete Arrow dataset ({error}); prepare it again") from None
        sheet = folder.with_name(f"{folder.name}.png")
        return cls(metadata, columns, num_bytes, sheet.name if sheet.exists() else "")


def write_dataset_card(folder: Path) -> Path:
    """Write `README.md` into `folder`, `DIR/<dataset>`, about the prepared splits in it; return its path.

    Raises:
        UserError: there is no split, or one that is not complete.
    """
    splits = [path.parent for path in folder.glob("[!.]*/metadata.json")]
    splits.sort(key=lambda split: (split.name != "train", split.name))
    if not splits:
        raise UserError(f"{folder} holds no prepared split; give DIR/<dataset> of prepare_datasets.py")
    card = dataset_card([CardSplit.read(split) for split in splits])
    with replacing(folder / CARD_FILE) as temporary:
        temporary.write_text(str(card), encoding="utf-8")
    return folder / CARD_FILE


def dataset_card(
    splits: Sequence[CardSplit], hub_id: str | None = None, extra: Mapping[str, Any] | None = None
) -> "DatasetCard":
    """Render the card of one or more prepared datasets.

    Args:
        splits: all splits of all datasets, in the order in which the card shows them.
        hub_id: of the repository that the card is for, `user/name`, with one configuration per dataset; `None`: the
            card lies in a local folder.
        extra: further metadata fields, e.g. `configs`; they replace those made here.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    by_name: dict[str, list[CardSplit]] = {}
    for split in splits:
        by_name.setdefault(split.metadata.dataset, []).append(split)
    several = len(by_name) > 1
    columns = {name for split in splits for name in split.columns}
    training, commands = _training(list(by_name), hub_id)
    return DatasetCard.from_template(
        DatasetCardData(**{**_metadata(by_name), **(extra or {})}),
        template_path=str(_TEMPLATE),
        title=", ".join(map(_text, by_name)),
        several=several,
        pictures=[quote(split.sheet) for split in splits if split.sheet and hub_id is None],
        h="###" if several else "##",
        datasets=[_described(name, of_one) for name, of_one in by_name.items()],
        columns=[(name, text) for name, text in _COLUMNS.items() if name in columns],
        columns_labelled=_shown_split(splits).metadata.labelled and "classes" in _shown_split(splits).columns,
        loading=_loading(_shown_split(splits).metadata, hub_id),
        training=training,
        training_commands=commands,
    )


def modality_of(name: str) -> str:
    """Modality of the images of a prepared dataset, empty where it is not known."""
    if name in RAW_DATASETS:
        return RAW_DATASETS[name].modality
    return name.removeprefix(_SYNTHETIC) if name.startswith(_SYNTHETIC) else ""


def _shown_split(splits: Sequence[CardSplit]) -> CardSplit:
    """The split that the example loads: a labelled one if there is one."""
    return next((split for split in splits if split.metadata.labelled), splits[0])


def _metadata(by_name: Mapping[str, Sequence[CardSplit]]) -> dict[str, Any]:
    """Hub metadata."""
    images = sum(split.metadata.num_images for splits in by_name.values() for split in splits)
    licences = [splits[0].metadata.licence or {} for splits in by_name.values()]
    drawn = all(name.startswith(_SYNTHETIC) for name in by_name)
    urls = {licence.get("url") for licence in licences}
    if drawn:
        terms = {"license": "apache-2.0"}
    elif len(urls) == 1 and any(urls):
        terms = {"license": "other", "license_name": "terms-of-the-owners", "license_link": urls.pop()}
    else:
        terms = {"license": "other" if any(urls) else "unknown"}
    modalities = [modality for modality in dict.fromkeys(map(modality_of, by_name)) if modality]
    return {
        "pretty_name": ", ".join(map(_one_line, by_name)),
        **terms,
        "task_categories": ["image-segmentation"],
        "size_categories": _size_category(images),
        "tags": ["madm", "semantic-segmentation", "domain-adaptation", *modalities],
    }


def _size_category(images: int) -> str:
    for limit, text in ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")):
        if images < limit:
            return text
    return "n>1M"


def _described(name: str, splits: Sequence[CardSplit]) -> dict[str, Any]:
    """What the template needs to know about one dataset."""
    first = splits[0].metadata
    licence = first.licence or {}
    summary = licence.get("summary", "Drawn by the MADM suite, free to use." if name.startswith(_SYNTHETIC) else "")
    known = RAW_DATASETS.get(name)
    return {
        "name": _text(name),
        "about": _about(name, first),
        "licence": _text(summary or "Not stated; ask the owners of the data."),
        "url": licence.get("url") or "",
        "forbidden": not licence.get("redistribution", True),
        "splits": [_split_row(split) for split in splits],
        "notes": [note for split in splits for note in _notes(split.metadata)],
        "labelled": [_text(split.metadata.split) for split in splits if split.metadata.labelled],
        "classes": _class_rows([split.metadata for split in splits if split.metadata.labelled]),
        "commands": [_one_line(command) for command in _commands(name, [split.metadata for split in splits])],
        "citation": _CITATIONS.get(known.base or name if known else name, ""),
    }


def _about(name: str, metadata: Metadata) -> str:
    modality, known = modality_of(name), RAW_DATASETS.get(name)
    what = f"{modality.capitalize() if modality != 'rgb' else 'RGB'} images" if modality else "Images"
    classes = f", {len(metadata.class_names)} classes" if metadata.class_names else ""
    if known:
        return f"{what} of {_text(known.folder)}{classes}. {_text(known.download)}"
    if name.startswith(_SYNTHETIC):
        return f"{what} of procedural street scenes{classes}; no real picture is in them."
    return f"{what} of one's own{classes}."


def _split_row(split: CardSplit) -> dict[str, Any]:
    metadata = split.metadata
    settings = [f"{key} {json.dumps(value)}" for key, value in metadata.settings.items() if value is not None]
    return {
        "name": _text(metadata.split),
        "images": metadata.num_images,
        "size": "x".join(map(str, metadata.image_size)) if metadata.image_size else "several",
        "stored": "resized for training" if metadata.resized else "native",
        "labels": "yes" if metadata.labelled else "no",
        "bytes": _bytes(split.num_bytes),
        "settings": _text("; ".join(settings)) or "defaults",
        "fingerprint": _text(metadata.fingerprint),
        "content": _text(metadata.content) or "-",
    }


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB" if number < 1000 else f"{number:.0f} GB"


def _notes(metadata: Metadata) -> list[str]:
    """What a reader of the numbers should know."""
    notes = []
    known = RAW_DATASETS.get(metadata.dataset)
    published = known.splits[metadata.split].published_count if known and metadata.split in known.splits else None
    if published not in (None, metadata.num_images):
        notes.append(
            f"{_text(metadata.split)}: {metadata.num_images} of the {published} images of the published split."
        )
    if metadata.skipped:
        names = ", ".join(_text(entry["file"]) for entry in metadata.skipped[:_SHOWN_SKIPS])
        more = f" and {len(metadata.skipped) - _SHOWN_SKIPS} more" if len(metadata.skipped) > _SHOWN_SKIPS else ""
        notes.append(f"{_text(metadata.split)}: left out as unusable, {len(metadata.skipped)} in all: {names}{more}.")
    return notes


def _class_rows(labelled: Sequence[Metadata]) -> list[dict[str, Any]]:
    """One row per class; a cell per labelled split."""
    if not labelled:
        return []
    rows = []
    for class_id, name in enumerate(labelled[0].class_names):
        cells = []
        for metadata in labelled:
            share = metadata.class_pixel_counts[class_id] / max(1, sum(metadata.class_pixel_counts))
            images = "" if metadata.images_per_class is None else f" ({metadata.images_per_class[class_id]})"
            cells.append(f"{100 * share:.2f} %{images}")
        rows.append({"id": class_id, "name": _text(name), "cells": cells})
    return rows


def _commands(name: str, splits: Sequence[Metadata]) -> list[str]:
    """Command lines that make these splits, places on the machine left out."""
    known = RAW_DATASETS.get(name)
    settings = splits[0].settings
    if name.startswith(_SYNTHETIC):
        counts = [f"--num_{data.split} {data.num_images}" for data in splits if data.split in ("train", "val", "test")]
        chosen = [f"--{key} {settings[key]}" for key in ("resolution", "seed") if key in settings]
        beyond_need = name != f"{_SYNTHETIC}rgb" and any(data.labelled for data in splits if data.split == "train")
        chosen += ["--label_all"] * beyond_need
        return [" ".join(["python prepare_datasets.py --dataset synthetic", *counts, *chosen, "--output_dir data"])]
    if known is None:
        return [_own_command(name, data) for data in splits if "stored_size" in data.settings]
    plain = RAW_DATASETS[known.base or name]
    flags = [f"--dataset {plain.name}"]
    flags += [f"--modality {known.modality}"] if known.modality != plain.modality else []
    flags += [f"--label_classes {len(known.class_names)}"] if known.class_names != plain.class_names else []
    for data in splits:
        spec = known.splits.get(data.split)
        if spec and spec.stored_size and "stored_size" in data.settings:
            flags += _stored_flag(data.settings["stored_size"], spec.stored_size)
    return [
        " ".join(["python prepare_datasets.py", *flags, *_shared_flags(settings), "--raw_dir raw --output_dir data"])
    ]


def _own_command(name: str, metadata: Metadata) -> str:
    flags = [f"--dataset folder --name {shlex.quote(name)} --split {shlex.quote(metadata.split)} --images images"]
    flags += ["--labels labels --label_map label_map.yaml"] if metadata.labelled else []
    flags += _stored_flag(metadata.settings["stored_size"], None)
    return " ".join(["python prepare_datasets.py", *flags, *_shared_flags(metadata.settings), "--output_dir data"])


def _stored_flag(stored: Sequence[int] | None, default: Sequence[int] | None) -> list[str]:
    if (stored and tuple(stored)) == (default and tuple(default)):
        return []
    return [f"--store_resolution {'native' if stored is None else 'x'.join(map(str, stored))}"]


def _shared_flags(settings: Mapping[str, Any]) -> list[str]:
    flags = []
    if settings.get("image_range"):
        flags.append("--image_range " + " ".join(f"{value:g}" for value in settings["image_range"]))
    for key, value in (settings.get("events") or {}).items():
        if isinstance(value, bool):
            flags.append(f"--{'' if value else 'no-'}event_{key}")
        elif value is not None:
            flags.append(f"--event_{key} {shlex.quote(str(value))}")
    return flags


def _loading(metadata: Metadata, hub_id: str | None) -> list[str]:
    """Python lines that open one split as `data`."""
    if hub_id is None:
        return [f"data = datasets.load_from_disk({json.dumps(f'data/{metadata.dataset}/{metadata.split}')})"]
    arguments = f"{json.dumps(hub_id)}, {json.dumps(metadata.dataset)}, split={json.dumps(metadata.split)}"
    return [f"data = datasets.load_dataset({arguments})"]


def _training(names: Sequence[str], hub_id: str | None) -> tuple[str, list[str]]:
    """A sentence, and commands, of the built-in tasks that these datasets are for."""
    tasks = [task for task in TASKS.values() if task.source in names or task.target in names]
    place = hub_id or "data"
    if not tasks:
        command = f"python train_madm.py --task_config task.yaml --data_dir {shlex.quote(place)}"
        return "Train on it with a task of your own (`docs/tasks.md` of the suite):", [command]
    alone = [task for task in tasks if {task.source, task.target} - set(names)]
    rest = "; the other dataset of a task has to be prepared in the same place" if alone else ""
    commands = [f"python train_madm.py --task {task.name} --data_dir {shlex.quote(place)}" for task in tasks]
    return f"Train with the suite{rest}:", commands


def _one_line(text: str) -> str:
    return " ".join(str(text).split())


def _text(text: str) -> str:
    """`text` in one line, shown by Markdown as it is, in table cells too."""
    line = _one_line(text).encode("utf-8", "backslashreplace").decode("utf-8")
    return re.sub(r"[\\`*\[\]<>|#~$&!]|(?<!\w)_|_(?!\w)", r"\\\g<0>", line)
