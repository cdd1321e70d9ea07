"""The published JSON file lists: which images and labels make up the splits of a task.

A training list is `{"source_data": {"RGB": [...], "label": [...]}, "target_data": {"second_modality": [...]}}`, a
test list `{"target_data": {"second_modality": [...], "label": [...]}}`; image i belongs to label i.
"""

import json
from pathlib import Path, PurePosixPath

from madm_utils.cli import UserError
from madm_utils.raw_datasets import RAW_DATASETS
from madm_utils.raw_descriptions import RawDataset, RawFile
from madm_utils.raw_files import RawTree
from madm_utils.raw_search import find_root, match_listed_file

_FORM = (
    'expected {"source_data": {"RGB": [...], "label": [...]}, "target_data": {"second_modality": [...]}} '
    '(training) or {"target_data": {"second_modality": [...], "label": [...]}} (test)'
)

ListedPaths = list[tuple[str, str | None]]


def read_file_lists(paths: list[Path]) -> dict[tuple[str, str], ListedPaths]:
    """Read file lists into `{("source" or "target", "train" or "test"): [(image, label or None), ...]}`.

    Raises:
        UserError: a file that cannot be read, has another form, or lists a split a second time.
    """
    splits: dict[tuple[str, str], ListedPaths] = {}
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"file list {path} cannot be read ({error}); {_FORM}") from None
        if not isinstance(content, dict) or "target_data" not in content:
            raise UserError(f"file list {path} has another form; {_FORM}")
        training = "source_data" in content
        listed = {("target", "train" if training else "test"): _pairs(content, "target_data", path, not training)}
        if training:
            listed["source", "train"] = _pairs(content, "source_data", path, True)
        for key, pairs in listed.items():
            if key in splits:
                raise UserError(f"file list {path} lists the {key[1]} split a second time; give one list per split")
            splits[key] = pairs
    return splits


def find_listed_files(dataset: RawDataset, split: str, tree: RawTree, pairs: ListedPaths) -> list[RawFile]:
    """Resolve listed paths against the raw folder, or the dataset's folder in it.

    Where a listed label is missing, another kind of label file of the same image will do: the Cityscapes download has
    labelIds, while lists may name the labelTrainIds that are made from them.

    Raises:
        UserError: nothing is listed, or a listed file does not exist.
    """
    if not pairs:
        raise UserError(f"{dataset.name} {split} is empty: the file list names no image for it")

    root = find_root(dataset, tree, any_layout=True)
    endings = dataset.splits[split].label_endings()
    others = {other.folder.lower() for other in RAW_DATASETS.values()} - {dataset.folder.lower()}

    def resolve(listed: str) -> str:
        kinds = [listed.removesuffix(end) + other for end in endings if listed.endswith(end) for other in endings]
        for kind in (listed, *kinds):
            path = PurePosixPath(kind.replace("\\", "/"))
            if path.is_relative_to(tree.raw_dir.as_posix()):  # a list may name the files of this disk
                path = path.relative_to(tree.raw_dir.as_posix())
            inside = PurePosixPath(*path.parts[1:])  # the list may spell the dataset's folder in another case
            for found in (str(path), f"{root}{path}", f"{root}{inside}"):
                if found in tree.files:
                    foreign = path.parts[0].lower() in others
                    if foreign or not found.startswith(root):
                        raise UserError(
                            f"{dataset.name} {split}: the file list names {listed}, which is not {dataset.name}'s but "
                            "another dataset's; give the list of this task"
                        )
                    return found
        raise UserError(
            f"{dataset.name} {split}: the file list names {listed}, which is neither under {tree.raw_dir} nor "
            f"{tree.raw_dir / root}. Paths are relative to --raw_dir or to the dataset's folder; is the dataset "
            f"complete?{tree.archives_note()}"
        )

    return [
        match_listed_file(dataset, split, tree, root, resolve(image), resolve(label) if label else None)
        for image, label in pairs
    ]


def _pairs(content: dict, part: str, path: Path, labelled: bool) -> ListedPaths:
    lists = content[part] if isinstance(content[part], dict) else {}
    images = lists.get("RGB" if part == "source_data" else "second_modality")
    labels = lists.get("label") if labelled else None
    for values in (images, *([labels] if labelled else [])):
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise UserError(f"file list {path} has another form in {part}; {_FORM}")
    if labelled and len(images) != len(labels):
        raise UserError(
            f"file list {path}: {part} lists {len(images)} images but {len(labels)} labels; each image needs its label"
        )
    return list(zip(images, labels if labelled else [None] * len(images), strict=True))
