"""Finding and pairing the files of a dataset in its official folder layout, wherever below the raw folder it lies.

Paths are templates relative to the dataset's root. Their fields match one path component or a part of it (`{number}`:
digits only), and an image and a label belong together when all fields agree. `{sequence}`, `{frame}` (or `{number}`)
and `{condition}` are kept as columns of the prepared data.

The root may be the raw folder itself, or lie one or two levels below it; a folder with the dataset's own name is
preferred, and files on disk are preferred to archives. Images and labels may have different roots, because archives
are often unpacked into a folder each.
"""

import re

from madm_utils.cli import UserError
from madm_utils.raw_descriptions import PUBLISHED, LabelFiles, RawDataset, RawFile, RawOptions, RawSplit
from madm_utils.raw_files import RawPath, RawTree

ROOT_DEPTH = 2
"""How many folders below the raw folder a dataset's root may lie."""


def find_files(dataset: RawDataset, split: str, tree: RawTree, options: RawOptions = PUBLISHED) -> list[RawFile]:
    """Return the files of the published selection of one split, sorted by path and checked to be in pairs.

    An archive that cannot be used is no mistake, unless files are missing that it may hold.

    Raises:
        UserError: the dataset is not there or in several places, the split has no image (unless it is optional: then
            the list is empty), an image has no label, or a label no image; a split of an event dataset has ready-made
            pictures and another only recordings; or fewer images than published are there, and an archive in the
            dataset's folder cannot be used.
    """
    spec = dataset.splits[split]
    roots = _scan(tree, spec.images, spec) if spec.images else {}
    files = []
    root = ""
    if dataset.find and (options.events is not None or not roots):
        root = find_root(dataset, tree, any_layout=True)
        files = dataset.find(dataset, split, tree, root, options)
        if files and options.events is None:
            _check_mixture(dataset, split, tree)
    elif roots:
        root = _choose_root(dataset, tree, roots, spec.images)
        files = _pair(dataset, split, tree, root, roots[root])
    if not files and not spec.optional:
        raise _empty(dataset, split, tree, options) if _all_roots(dataset, tree) else _not_found(dataset, tree)
    if not files:  # of an optional split
        root = min(_all_roots(dataset, tree), default="")
    if spec.published_count is None or len(files) < spec.published_count:
        tree.check_archives(root)
    _check_conflicts(tree, files)
    return files


def find_root(dataset: RawDataset, tree: RawTree, any_layout: bool = False) -> str:
    """Return where in `tree` the root of `dataset` lies: the empty string, or a path that ends in `/`.

    With `any_layout` the folder only needs the dataset's name, and if there is none it is the raw folder.

    Raises:
        UserError: it is nowhere, or in several places; the message lists what was looked for and what was found.
    """
    if any_layout:
        return _named_folder(dataset, tree)
    roots = _all_roots(dataset, tree)
    if not roots:
        raise _not_found(dataset, tree)
    return _choose_root(dataset, tree, roots, next(iter(dataset.splits.values())).images)


def find_labels(
    dataset: RawDataset, split: str, tree: RawTree, root: str
) -> dict[tuple[tuple[str, str], ...], tuple[RawPath, LabelFiles]]:
    """Labels of a split by their sorted template fields, e.g. `(("frame", "000001"), ("sequence", "a"))`.

    Of several kinds of label files for one image the preferred one counts. They lie below `root`; if there are none
    at all, they may lie at another place that could be the dataset's root, as long as there is only one.
    """
    spec = dataset.splits[split]
    kinds = [(files, _scan(tree, files.template, spec)) for files in reversed(spec.labels)]
    kinds = [(files, roots) for files, roots in kinds if roots]
    elsewhere = not any(root in roots for _, roots in kinds)
    labels: dict = {}
    for files, roots in kinds:
        place = _choose_root(dataset, tree, roots, files.template) if elsewhere else root
        labels.update({key: (tree.files[path], files) for key, path in roots.get(place, {}).items()})
    return labels


def match_listed_file(
    dataset: RawDataset, split: str, tree: RawTree, root: str, image: str, label: str | None
) -> RawFile:
    """Return the `RawFile` of an image (and label) of `tree` that a file list names; it need not fit the layout."""
    spec = dataset.splits[split]
    file_name = image.removeprefix(root)
    match = re.fullmatch(_pattern(spec.images), file_name)
    label_files = None
    if label is not None:
        fitting = (files for end, files in spec.label_endings().items() if label.endswith(end))
        label_files = next(fitting, spec.labels[0])
    fields = match.groupdict() if match else {}
    return _raw_file(tree, spec, image, file_name, fields, tree.files[label] if label else None, label_files)


def _glob(template: str) -> str:
    return re.sub(r"\{\w+\}", "*", template)


def _pattern(template: str) -> str:
    parts = re.split(r"\{(\w+)\}", template)
    expressions = {"number": r"\d+"}
    return "".join(
        f"(?P<{part}>{expressions.get(part, '[^/]+')})" if i % 2 else re.escape(part) for i, part in enumerate(parts)
    )


_ALL = RawSplit("")
_Fields = tuple[tuple[str, str], ...]


def _scan(tree: RawTree, template: str, spec: RawSplit = _ALL) -> dict[str, dict[_Fields, str]]:
    """Files that match `template` below any root and the frame selection: root -> {sorted fields: path}."""
    pattern = re.compile(rf"(?P<root_>(?:[^/]+/){{0,{ROOT_DEPTH}}}){_pattern(template)}")
    ending = template.rpartition("}")[2]
    found: dict[str, dict[_Fields, str]] = {}
    for path in tree.files:
        match = pattern.fullmatch(path) if path.endswith(ending) else None
        if match:
            fields = match.groupdict()
            root = fields.pop("root_")
            if spec.selects(fields.get("frame", "")):
                found.setdefault(root, {})[tuple(sorted(fields.items()))] = path
    return found


def _all_roots(dataset: RawDataset, tree: RawTree) -> dict[str, dict[_Fields, str]]:
    """Every place where any file of the dataset matches."""
    found: dict[str, dict[_Fields, str]] = {}
    for template in (*(spec.images for spec in dataset.splits.values()), *dataset.landmarks):
        for root, matches in _scan(tree, template).items() if template else ():
            found.setdefault(root, {}).update(matches)
    return found


def _named_folder(dataset: RawDataset, tree: RawTree) -> str:
    """The least deep folder of the dataset's name, with any of its landmarks if it has some; else the raw folder."""
    named = set()
    for path in tree.files:
        folders = path.split("/")[:-1][:ROOT_DEPTH]
        for depth, folder in enumerate(folders, start=1):
            if _is_named(dataset, folder):
                named.add("/".join(folders[:depth]) + "/")
    endings = tuple(template.rpartition("}")[2] for template in dataset.landmarks)
    known = {root for root in named if any(path.startswith(root) and path.endswith(endings) for path in tree.files)}
    return min(known or named, key=lambda root: (root.count("/"), root), default="")


def _empty(dataset: RawDataset, split: str, tree: RawTree, options: RawOptions) -> UserError:
    spec, place = dataset.splits[split], tree.raw_dir / min(_all_roots(dataset, tree))
    expected = [f"{place}/{_glob(template)}" for template in dataset.landmarks]
    if spec.images and options.events is None:
        selected = (spec.first_frame, spec.frame_step) != (0, 1)
        frames = f" with frames {spec.first_frame:06d}, {spec.first_frame + spec.frame_step:06d}, ..."
        expected.insert(0, f"{place}/{_glob(spec.images)}" + frames * selected)
    return UserError(
        f"{dataset.name} {split} is empty: no image matches {' or '.join(expected)}. Is the {split} part of the "
        f"dataset there?{tree.archives_note()}"
    )


def _check_mixture(dataset: RawDataset, split: str, tree: RawTree) -> None:
    """Refuse recordings for one split beside ready-made pictures for another: they would not look alike."""
    for other, spec in dataset.splits.items():
        if other != split and spec.images and _scan(tree, spec.images, spec):
            raise UserError(
                f"{dataset.name} {other} has ready-made pictures ({_glob(spec.images)}) but {split} only recordings, "
                f"which would give other pictures. Add {_glob(dataset.splits[split].images)}, or give "
                "--event_representation, and both are made from recordings"
            )


def _not_found(dataset: RawDataset, tree: RawTree) -> UserError:
    first = next(iter(dataset.splits.values())).images.split("{")[0]
    places = ", ".join([first] * bool(first) + [_glob(template) for template in dataset.landmarks])
    return UserError(
        f"{dataset.name} not found under {tree.raw_dir}: looked for folders {dataset.folder}/ (any case, up to "
        f"{ROOT_DEPTH} levels deep) and {places}; found {tree.describe()}. Give --raw_dir the folder that holds the "
        f"official {dataset.folder} tree or its archives. {dataset.download}{tree.archives_note()}"
    )


def _choose_root(dataset: RawDataset, tree: RawTree, roots: dict[str, dict], template: str) -> str:
    """The one root to use: of the dataset's name before others, with files on disk before archives."""
    named = [root for root in roots if any(_is_named(dataset, part) for part in root.split("/"))]
    if "" in roots and _is_named(dataset, tree.raw_dir.resolve().name):
        named.append("")
    chosen = named or list(roots)
    on_disk = [root for root in chosen if any(tree.files[path].member is None for path in roots[root].values())]
    chosen = on_disk or chosen
    if len(chosen) > 1:
        places = " and ".join(str(tree.raw_dir / root) for root in sorted(chosen))
        raise UserError(
            f"{dataset.name} is ambiguous: {_glob(template)} is found below {places}. Give --raw_dir the one you "
            "mean, or put the parts into one folder"
        )
    return chosen[0]


def _is_named(dataset: RawDataset, folder: str) -> bool:
    def plain(name: str) -> str:
        return re.sub(r"[-_ ]", "", name.lower())

    return plain(folder) in {plain(name) for name in (dataset.folder, *dataset.other_folders)}


def _pair(dataset: RawDataset, split: str, tree: RawTree, root: str, images: dict[_Fields, str]) -> list[RawFile]:
    spec = dataset.splits[split]
    labels = find_labels(dataset, split, tree, root)
    if spec.labels:
        _check_pairs(dataset, split, tree, root, images, labels)
    files = []
    for key, path in sorted(images.items(), key=lambda item: item[1]):
        label, label_files = labels.get(key, (None, None))
        files.append(_raw_file(tree, spec, path, path.removeprefix(root), dict(key), label, label_files))
    return files


def _raw_file(
    tree: RawTree, spec: RawSplit, image: str, file_name: str, fields: dict[str, str], label: RawPath | None,
    label_files: LabelFiles | None,
) -> RawFile:  # fmt: skip
    frame = fields.get("frame", fields.get("number", ""))
    condition = fields.get("condition", spec.condition)
    return RawFile(tree.files[image], file_name, fields.get("sequence", ""), frame, condition, label, label_files)


def _check_pairs(dataset: RawDataset, split: str, tree: RawTree, root: str, images: dict, labels: dict) -> None:
    spec = dataset.splits[split]
    alone = [key for key in images if key not in labels]
    if alone:
        expected = " or ".join(
            str(tree.raw_dir / root / files.template.format(**dict(alone[0]))) for files in spec.labels
        )
        raise UserError(
            f"{dataset.name} {split}: {len(alone)} of {len(images)} images lack a label, first "
            f"{tree.files[images[alone[0]]]}; expected {expected}. Add the missing labels or remove these images."
            f"{tree.archives_note()}"
        )
    alone = [key for key in labels if key not in images]
    if alone:
        expected = tree.raw_dir / root / spec.images.format(**dict(alone[0]))
        raise UserError(
            f"{dataset.name} {split}: {len(alone)} of {len(labels)} labels lack an image, "
            f"first {labels[alone[0]][0]}; expected {expected}. Add the missing images or remove these labels."
            f"{tree.archives_note()}"
        )


def _check_conflicts(tree: RawTree, files: list[RawFile]) -> None:
    conflicts = dict(tree.conflicts.values())
    for file in files:
        for used in (file.image, file.label):
            if used in conflicts:
                raise UserError(
                    f"{used} and {conflicts[used]} are different files under the same name; move one of the archives "
                    "out of --raw_dir"
                )
