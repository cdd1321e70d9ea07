#!/usr/bin/env python
"""Turn raw datasets, unpacked or still in their archives, into the Arrow data that training and evaluation read.

Source and target of a published task, from `raw/Cityscapes`, `raw/DELIVER.zip`, ...:
    python prepare_datasets.py --task cityscapes_to_deliver_depth --raw_dir raw --output_dir data

Procedural street scenes, no download needed:
    python prepare_datasets.py --dataset synthetic --output_dir data

Your own images, unlabelled, and labelled ones for the test:
    python prepare_datasets.py --dataset folder --name my_sensor --images photos --output_dir data
    python prepare_datasets.py --dataset folder --name my_sensor --split test --images test/images \\
        --labels test/labels --label_map classes.yaml --output_dir data

Check data, raw or prepared: a table, report.json, and a picture per split:
    python prepare_datasets.py --task cityscapes_to_deliver_depth --raw_dir raw --output_dir data --verify raw
    python prepare_datasets.py --task cityscapes_to_deliver_depth --output_dir data --verify

On many machines, e.g. as a SLURM array of 8 jobs, and then once:
    python prepare_datasets.py --dataset cityscapes --raw_dir raw --output_dir data --shard $SLURM_ARRAY_TASK_ID/8
    python prepare_datasets.py --dataset cityscapes --output_dir data --merge

A command that was interrupted goes on where it stopped when it is given again.
"""

import argparse
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from madm_utils import cli
from madm_utils.arrow_writer import (
    check_chunks,
    check_complete,
    check_replaceable,
    collect_chunks,
    planned_splits,
    publish_split,
    write_chunks,
)
from madm_utils.cli import UserError
from madm_utils.conversion import PublishedStatistics, RawConversion
from madm_utils.file_lists import find_listed_files, read_file_lists
from madm_utils.files import check_writable, replace_folder, writing
from madm_utils.prepare_args import (
    SYNTHETIC_DATASETS,
    event_settings,
    on_error,
    parse_prepare_args,
    stored_size,
)
from madm_utils.prepared_data import Metadata
from madm_utils.raw_datasets import RAW_DATASETS
from madm_utils.raw_files import RawPath, RawTree
from madm_utils.raw_folder import find_folder_files
from madm_utils.raw_search import RawDataset, RawFile, RawOptions, find_files
from madm_utils.sampling import evenly_spaced
from madm_utils.split_plan import SplitPlan, plan_raw_split, plan_synthetic_split
from madm_utils.tasks import TASKS

if TYPE_CHECKING:
    from madm_utils.verification_report import Report

RARE_CLASS_MIN_PIXELS = 3000
"""Published threshold of rare-class sampling, for the summary only."""


STATISTICS_FILE = "sample_class_stats.json"
"""DAFormer's class statistics; compared with what is counted, if they lie in a dataset's root."""


UNPACKED = ".unpacked"
"""Folder below --output_dir for the decompressed copies of compressed tar archives, while the command runs."""


@dataclass(frozen=True)
class RawSplitFiles:
    """One split of a raw dataset: what it is, and its files, found and paired."""

    dataset: RawDataset
    split: str
    files: list[RawFile]
    statistics: PublishedStatistics | None = None


def find_raw_splits(
    args: argparse.Namespace, on_problem: Callable[[RawDataset, str, UserError], None] | None = None
) -> list[RawSplitFiles]:
    """The raw datasets of the command, split by split, source first. Writes nothing.

    What is wrong with a split is raised, or told to `on_problem` where that is given.
    """
    if args.dataset == "folder":
        if args.images is None:
            raise UserError("--dataset folder needs --images, a folder or archive of images")
        scratch = args.output_dir / UNPACKED
        dataset, files = find_folder_files(args.name, args.images, args.labels, args.label_map, args.split, scratch)
        return [RawSplitFiles(dataset, args.split, files)]
    names = [name for name in args.names if name in RAW_DATASETS]
    if not names:
        return []
    if args.raw_dir is None:
        raise UserError(f"--raw_dir is needed: the folder that holds {', '.join(names)} as downloaded")
    lists = read_file_lists(args.file_list)
    tree = without_output(RawTree.open(args.raw_dir, args.output_dir / UNPACKED), args.output_dir)
    options = RawOptions(events=event_settings(args))
    found = []
    for name in names:
        dataset = RAW_DATASETS[name]
        role = "source" if name in {task.source for task in TASKS.values()} else "target"
        for split in dataset.splits:
            if lists and (role, split) not in lists:
                continue
            try:
                if lists:
                    files = find_listed_files(dataset, split, tree, lists[role, split])
                else:
                    files = find_files(dataset, split, tree, options)
            except UserError as error:
                if on_problem is None:
                    raise
                on_problem(dataset, split, error)
                continue
            if files:
                statistics = find_statistics(tree, files) if split == "train" else None
                found.append(RawSplitFiles(dataset, split, files, statistics))
    if not found and on_problem is None:
        raise UserError(f"the file lists name no split of {', '.join(names)}; which dataset are they for?")
    return found


def without_output(tree: RawTree, output_dir: Path) -> RawTree:
    """`tree` without what lies below `output_dir`: prepared data in a raw folder are not raw data."""
    inside = output_dir.absolute()
    if not inside.is_relative_to(tree.raw_dir.absolute()) or inside == tree.raw_dir.absolute():
        return tree
    prefix = inside.relative_to(tree.raw_dir.absolute()).as_posix() + "/"
    return replace(tree, files={path: file for path, file in tree.files.items() if not path.startswith(prefix)})


def find_statistics(tree: RawTree, files: list[RawFile]) -> PublishedStatistics | None:
    """Published class statistics in the root of labelled `files`, `None` if there are none."""
    for path, found in tree.files.items():
        root = path.removesuffix(STATISTICS_FILE)
        if root != path and root + files[0].file_name in tree.files and files[0].label is not None:
            return PublishedStatistics.load(found)
    return None


def event_settings_of(file: RawFile) -> dict[str, Any] | None:
    """How the picture or the tensor of a file is made from events, `None` if it is not."""
    window = file.events if file.events is not None else file.image
    return None if isinstance(window, RawPath) else asdict(window.settings)


def make_plans(args: argparse.Namespace) -> list[SplitPlan]:
    """What is to be written, split by split; writes nothing."""
    plans = []
    for name in args.names:
        if name in SYNTHETIC_DATASETS:
            modality = name.removeprefix("synthetic_")
            for split, count in (("train", args.num_train), ("val", args.num_val), ("test", args.num_test)):
                if not count:
                    continue
                labelled = split != "train" or modality == "rgb" or args.label_all
                count = min(count, args.max_samples or count)
                plans.append(plan_synthetic_split(modality, split, labelled, count, args.seed, args.resolution))
    for found in find_raw_splits(args):
        size = stored_size(args, found.dataset.name, found.dataset.splits[found.split])
        files = [found.files[i] for i in evenly_spaced(len(found.files), args.max_samples)]
        # The source of a task is the same data whatever range the target's images have.
        image_range = args.image_range if args.dataset or found.dataset.name != args.names[0] else None
        settings = {
            "image_range": image_range,
            "events": event_settings_of(files[0]),
            "label_map": args.label_map and hashlib.sha256(args.label_map.read_bytes()).hexdigest(),
        }
        plans.append(plan_raw_split(found.dataset, found.split, files, size, settings, image_range, found.statistics))
    return plans


def skip_prepared(plans: list[SplitPlan], args: argparse.Namespace) -> list[SplitPlan]:
    """Return the plans still to be written; what is prepared already from the same files is kept.

    Raises:
        UserError: splits are there that were made from other files or with other settings, without `--overwrite`.
    """
    todo = []
    for plan in plans:
        folder = args.output_dir / plan.dataset / plan.split
        check_replaceable(folder)
        if args.overwrite or not folder.exists():
            todo.append(plan)
        elif Metadata.load(folder).source == plan.fingerprint:
            print(f"{plan.dataset} {plan.split}: already prepared from the same files, kept")
        else:
            raise UserError(
                f"{folder} already holds prepared data, made from other files or with other settings; add --overwrite "
                "to replace it, choose another --output_dir, or check what is there with --verify and no --raw_dir"
            )
    return todo


def prepare(plans: list[SplitPlan], args: argparse.Namespace) -> None:
    """Write every plan, and only when all are complete give them their names."""
    check_writable(args.output_dir)
    splits = [f"{plan.dataset}/{plan.split}" for plan in plans]
    for plan in plans:
        write_chunks(plan, args.output_dir, args.num_proc, args.shard, on_error(args), args.overwrite, splits)
        if isinstance(plan.convert, RawConversion) and plan.convert.published:
            print(f"{plan.dataset} {plan.split}: class statistics agree with {plan.convert.published.path}")
    if args.shard.count > 1:
        print(f"share {args.shard} is done; when all are: the same command with --merge in place of --shard")
        return
    for plan in plans:
        publish_split(args.output_dir, plan.dataset, plan.split)


def merge(args: argparse.Namespace) -> list[Path]:
    """`--merge`: join the shares of every split that the command had, check their content, and publish them."""
    check_writable(args.output_dir)
    places = [args.output_dir, *args.merge]
    planned = dict.fromkeys(split for place in places for name in args.names for split in planned_splits(place, name))
    if not planned:
        where = ", ".join(str(place / name) for place in places for name in args.names)
        raise UserError(f"nothing to merge: no share of --shard in {where}")
    splits = [tuple(split.split("/")) for split in planned if split.split("/")[0] in args.names]
    for dataset, split in splits:
        final = args.output_dir / dataset / split
        check_replaceable(final)
        if final.exists() and not args.overwrite:
            raise UserError(f"{final} already holds prepared data; add --overwrite to replace it")
        collect_chunks(args.merge, args.output_dir, dataset, split)
        check_chunks(args.output_dir, dataset, split)
    for dataset, split in splits:
        check_complete(args.output_dir, dataset, split)
    for dataset, split in splits:
        publish_split(args.output_dir, dataset, split, args.max_errors)
    return [args.output_dir / dataset / split for dataset, split in splits]


def prepared_folders(args: argparse.Namespace) -> list[Path]:
    """Folders of the splits that are prepared already, of every dataset that the command names.

    Raises:
        UserError: a dataset has none.
    """
    folders = []
    for name in args.names:
        splits = sorted(folder for folder in (args.output_dir / name).glob("[!.]*") if folder.is_dir())
        if not splits:
            raise UserError(
                f"nothing to verify: {args.output_dir / name} holds no prepared data; prepare it with --raw_dir"
            )
        folders += splits
    return folders


def write_raw_scenes(args: argparse.Namespace) -> None:
    """`--as_raw`: draw the scenes in the official layouts under `--output_dir`."""
    from madm_utils.raw_layouts import ALL_LAYOUTS, TASK_LAYOUTS, write_raw_layouts

    there = [
        str(args.output_dir / name)
        for name in dict.fromkeys(dataset.folder for dataset in RAW_DATASETS.values())
        if (args.output_dir / name).exists()
    ]
    if there and not args.overwrite:
        raise UserError(
            f"{', '.join(there)} already there; add --overwrite to replace, or choose another --output_dir"
        )
    check_writable(args.output_dir)
    temporary = args.output_dir / f".raw.tmp-{os.getpid()}"
    try:
        layouts = ALL_LAYOUTS if args.as_raw == "all" else TASK_LAYOUTS
        write_raw_layouts(temporary, args.num_train, args.num_test, args.seed, args.resolution, layouts=layouts)
        folders = sorted(temporary.iterdir())
        there = [str(args.output_dir / folder.name) for folder in folders if (args.output_dir / folder.name).exists()]
        if there and not args.overwrite:
            raise UserError(f"{', '.join(there)} already there; add --overwrite to replace, or choose another folder")
        for folder in folders:
            replace_folder(folder, args.output_dir / folder.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"wrote {', '.join(folder.name for folder in folders)} under {args.output_dir}")


def verify_raw_files(args: argparse.Namespace) -> list["Report"]:
    """`--verify raw`: read every raw file, as preparing would, without writing anything."""
    from madm_utils.verification import unusable_raw, verify_raw

    broken = []
    found = find_raw_splits(args, lambda *problem: broken.append(unusable_raw(*problem)))
    return broken + [
        verify_raw(
            one.dataset,
            one.split,
            one.files,
            args.num_proc,
            image_range=args.image_range,
            complete=not args.file_list,
            statistics=one.statistics,
            scratch=args.output_dir / UNPACKED,
        )
        for one in found
    ]


def show(reports: list["Report"], output_dir: Path) -> int:
    """Print and write what a verification found; return the exit code."""
    from madm_utils.verification_report import print_report, write_report

    for report in reports:
        print_report(report)
    print()
    for name in dict.fromkeys(report.dataset for report in reports):
        for path in write_report([report for report in reports if report.dataset == name], output_dir / name):
            print(f"wrote {path}")
    problems = sum(len(report.problems) for report in reports)
    print(f"{problems} problems found" if problems else "verified: no problem found")
    return 1 if problems else 0


def push(args: argparse.Namespace) -> None:
    """`--push_to_hub`: upload every prepared split of the command's datasets."""
    from madm_utils.dataset_upload import push_prepared

    address = push_prepared(
        args.output_dir,
        args.names,
        args.hub_dataset_id,
        private=not args.hub_public_repo,
        redistribution_permitted=args.redistribution_permitted,
        token=args.hub_token,
    )
    print(f"uploaded {', '.join(args.names)} to {address}")


def print_summary(folders: list[Path]) -> None:
    """Print the prepared splits, class frequencies, and the rare classes of a labelled training split."""
    import numpy as np

    from madm_utils.prepared_data import open_split

    loaded = [Metadata.load(folder) for folder in folders]
    print(f"\n{'dataset':20} {'split':6} {'images':>7} {'labelled':>8}  {'height x width':14}  published")
    for data in loaded:
        size = "x".join(map(str, data.image_size)) if data.image_size else "mixed"
        known = RAW_DATASETS.get(data.dataset)
        published = known.splits[data.split].published_count if known else None
        print(
            f"{data.dataset:20} {data.split:6} {data.num_images:7} {'yes' if data.labelled else 'no':>8}  {size:14}  "
            f"{published or '-'}" + (f"  ({len(data.skipped)} skipped)" if data.skipped else "")
        )
    for folder, data in zip(folders, loaded, strict=True):
        if not data.labelled:
            continue
        counts = np.array(data.class_pixel_counts)
        total = max(counts.sum(), 1)
        print(f"\n{data.dataset} {data.split}: share of the labelled pixels")
        frequencies = [f"{name} {100 * n / total:.2f} %" for name, n in zip(data.class_names, counts, strict=True)]
        for start in range(0, len(frequencies), 6):
            print("  " + ", ".join(frequencies[start : start + 6]))
        if data.split == "train" and counts.any():
            per_image = np.array(open_split(folder)[0]["class_pixel_counts"][:])
            print("  rarest first, which rare-class sampling prefers:")
            for c in [c for c in np.argsort(counts, kind="stable") if counts[c]][:5]:
                images, enough = (per_image[:, c] > 0).sum(), (per_image[:, c] > RARE_CLASS_MIN_PIXELS).sum()
                print(f"    {data.class_names[c]}: in {images} images, {enough} with > {RARE_CLASS_MIN_PIXELS} pixels")


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare, verify, describe and upload what the command line asks for."""
    args = parse_prepare_args(__doc__, argv)
    try:
        with writing(args.output_dir):
            return run(args)
    except KeyboardInterrupt:
        print("interrupted; finished shards are kept, and the same command goes on from there", file=sys.stderr)
        return 130
    finally:
        if args.shard.count == 1:  # further shares read the decompressed archives, too
            shutil.rmtree(args.output_dir / UNPACKED, ignore_errors=True)


def run(args: argparse.Namespace) -> int:
    """What `main` does with the parsed command line; returns the exit code."""
    if args.as_raw:
        write_raw_scenes(args)
        return 0
    if args.verify == "raw":
        check_writable(args.output_dir)
        return show(verify_raw_files(args), args.output_dir)
    drawn = set(args.names) <= set(SYNTHETIC_DATASETS)
    if args.merge is not None:
        folders = merge(args)
    elif (args.verify or args.push_to_hub) and not (args.raw_dir or args.images or args.overwrite or drawn):
        folders = prepared_folders(args)
    else:
        plans = make_plans(args)
        if args.push_to_hub and not args.redistribution_permitted:
            from madm_utils.dataset_upload import check_licence

            for plan in plans:
                check_licence(plan.dataset, plan.licence)
        prepare(skip_prepared(plans, args), args)
        if args.shard.count > 1:
            return 0
        folders = [args.output_dir / plan.dataset / plan.split for plan in plans]
    if args.verify:
        from madm_utils.verification import verify_prepared

        code = show([verify_prepared(folder, args.num_proc) for folder in folders], args.output_dir)
        if code:
            return code
    from madm_utils.dataset_card import write_dataset_card

    for name in dict.fromkeys(folder.parent.name for folder in folders):
        write_dataset_card(args.output_dir / name)
    print_summary(folders)
    if args.push_to_hub:
        push(args)
    return 0


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
