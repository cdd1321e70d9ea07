#!/usr/bin/env python
"""Turn raw datasets in their official folder layouts into the Arrow data that training and evaluation read.

Source and target of a published task, from `raw/Cityscapes`, `raw/DELIVER`, ...:
    python prepare_datasets.py --task cityscapes_to_deliver_depth --raw_dir raw --output_dir data

Procedural street scenes, no download needed:
    python prepare_datasets.py --dataset synthetic --output_dir data

The same scenes as four raw datasets in their official layouts:
    python prepare_datasets.py --dataset synthetic --as_raw --output_dir raw

Check prepared data that is already there:
    python prepare_datasets.py --task cityscapes_to_deliver_depth --output_dir data --verify
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from madm_utils import cli
from madm_utils.args import formatter, positive_int
from madm_utils.cli import UserError
from madm_utils.file_lists import ListedPaths, find_listed_files, read_file_lists
from madm_utils.raw_datasets import RAW_DATASETS, find_files, find_root
from madm_utils.sampling import evenly_spaced
from madm_utils.tasks import TASKS, load_task

SYNTHETIC_DATASETS = ("synthetic_rgb", "synthetic_depth", "synthetic_infrared", "synthetic_event")
RARE_CLASS_MIN_PIXELS = 3000
"""Published threshold of rare-class sampling, for the summary only."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    what = parser.add_argument_group("what to prepare (give one)")
    what.add_argument("--task", help=f"source and target of a task: {', '.join(TASKS)}")
    what.add_argument("--task_config", type=Path, help="JSON or YAML file of your own task between known datasets")
    what.add_argument("--dataset", help=f"one dataset: {', '.join(RAW_DATASETS)}, or synthetic (all four modalities)")
    where = parser.add_argument_group("where")
    where.add_argument(
        "--raw_dir", type=Path, help="folder that holds the official folders Cityscapes/, DELIVER/, FMB/, DSEC/"
    )
    where.add_argument("--output_dir", type=Path, required=True, help="prepared data; --data_dir of the other scripts")
    where.add_argument(
        "--file_list",
        type=Path,
        nargs="+",
        default=[],
        help="one or two published JSON file lists (training, test); only the splits they list are prepared. "
        "Their paths are relative to --raw_dir or to the dataset's folder",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--num_proc", type=positive_int, default=os.cpu_count() or 1, help="processes; default: every core"
    )
    how.add_argument(
        "--max_samples", type=positive_int, help="at most this many images per split, evenly spaced (default: all)"
    )
    how.add_argument(
        "--verify",
        action="store_true",
        help="re-read the prepared data and check it; what is prepared already is only checked",
    )
    how.add_argument("--overwrite", action="store_true", help="replace splits that --output_dir holds already")
    synthetic = parser.add_argument_group("synthetic data")
    synthetic.add_argument("--num_train", type=positive_int, default=400, help="training scenes per modality")
    synthetic.add_argument("--num_test", type=positive_int, default=60, help="test scenes per modality")
    synthetic.add_argument("--resolution", type=positive_int, default=128, help="height of a scene in pixels")
    synthetic.add_argument("--seed", type=int, default=0, help="the same seed draws the same scenes")
    synthetic.add_argument("--as_raw", action="store_true", help="write the four official raw layouts instead")
    return parser.parse_args(argv)


def choose_datasets(args: argparse.Namespace) -> list[str]:
    """Names of the prepared datasets that the command asks for, source first.

    Raises:
        UserError: unknown task or dataset, or flags that do not fit together.
    """
    if sum(value is not None for value in (args.task, args.task_config, args.dataset)) != 1:
        raise UserError("give exactly one of --task NAME, --task_config FILE and --dataset NAME")
    known = (*RAW_DATASETS, *SYNTHETIC_DATASETS)
    if args.dataset == "synthetic":
        names = list(SYNTHETIC_DATASETS)
    elif args.dataset is not None:
        names = [args.dataset]
    else:
        task = load_task(args.task, args.task_config)
        names = list(dict.fromkeys((task.source, task.target)))
    for name in names:
        if name not in known:
            raise UserError(
                f"unknown dataset '{name}'; known: {', '.join(known)}, and synthetic for all of the last four"
            )
    if args.resolution < 32:
        raise UserError(f"--resolution must be at least 32, got {args.resolution}")
    if args.as_raw and args.dataset != "synthetic":
        raise UserError("--as_raw draws raw layouts of synthetic scenes; use it with --dataset synthetic")
    if args.file_list and not set(names) & set(RAW_DATASETS):
        raise UserError("--file_list selects files of the raw datasets; synthetic data has none")
    return names


def plan_dataset(name: str, args: argparse.Namespace, lists: dict[tuple[str, str], ListedPaths]) -> list:
    """The splits of one dataset as `SplitPlan`s, after finding and pairing its files; writes nothing."""
    from madm_utils.arrow_writer import plan_raw_split, plan_synthetic_split

    if name in SYNTHETIC_DATASETS:
        counts = {"train": args.num_train, "test": args.num_test}
        modality = name.removeprefix("synthetic_")
        return [
            plan_synthetic_split(
                modality, split, split == "test" or modality == "rgb",
                min(count, args.max_samples or count), args.seed, args.resolution,
            )
            for split, count in counts.items()
        ]  # fmt: skip
    dataset = RAW_DATASETS[name]
    if args.raw_dir is None:
        raise UserError(f"--raw_dir is needed: the folder that holds the official {dataset.folder} tree")
    role = "source" if name in {task.source for task in TASKS.values()} else "target"
    root = find_root(dataset, args.raw_dir, any_layout=bool(lists))
    plans = []
    for split in dataset.splits:
        if not lists:
            files = find_files(dataset, split, root)
        elif (role, split) in lists:
            files = find_listed_files(dataset, split, args.raw_dir, root, lists[role, split])
        else:
            continue
        if files:
            selected = [files[i] for i in evenly_spaced(len(files), args.max_samples)]
            plans.append(plan_raw_split(name, split, root, selected))
    return plans


def skip_prepared(plans: list, args: argparse.Namespace) -> list:
    """Return the plans still to be written.

    A source dataset that an earlier task has prepared from the same files is kept, unless everything is there;
    with `--verify` whatever is there is kept and checked.

    Raises:
        UserError: splits are there already and neither `--overwrite` nor the above holds.
    """
    from madm_utils.prepared_data import Metadata, verify_split

    there = [] if args.overwrite else [p for p in plans if (args.output_dir / p.dataset / p.split).exists()]
    for plan in there:
        folder = args.output_dir / plan.dataset / plan.split
        if args.verify:
            verify_split(folder)
        elif len(there) == len(plans) or Metadata.load(folder).fingerprint != plan.fingerprint:
            raise UserError(
                f"{folder} already holds prepared data; add --overwrite to replace it, choose another --output_dir, "
                "or add --verify to check what is there"
            )
        else:
            print(f"{plan.dataset} {plan.split}: already prepared from the same files, kept")
    return [plan for plan in plans if plan not in there]


def verify_prepared(names: list[str], output_dir: Path) -> list[Path]:
    """Check every prepared split of the datasets `names`; return their folders."""
    from madm_utils.prepared_data import verify_split

    folders = []
    for name in names:
        splits = sorted(folder for folder in (output_dir / name).glob("[!.]*") if folder.is_dir())
        if not splits:
            raise UserError(
                f"nothing to verify: {output_dir / name} holds no prepared data; prepare it with --raw_dir"
            )
        folders += splits
    for folder in folders:
        verify_split(folder)
    return folders


@contextmanager
def staging(output_dir: Path) -> Iterator[Path]:
    """Yield a temporary folder inside `output_dir`; afterwards it is gone, and so is an `output_dir` left empty."""
    existing = next(folder for folder in (output_dir, *output_dir.parents) if folder.exists())
    if not existing.is_dir():
        raise UserError(f"--output_dir {output_dir}: {existing} is a file; choose another folder")
    temporary = output_dir / f".prepare.tmp-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be written ({error.strerror})") from None
    try:
        yield temporary
    except OSError as error:
        raise UserError(f"writing below {output_dir} failed ({error}); nothing was kept") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in (output_dir, *output_dir.parents):
            if folder == existing or any(folder.iterdir()):
                break
            folder.rmdir()


def publish(staged: Path, final: Path) -> None:
    """Rename the complete folder `staged` to `final`; a folder it replaces is moved to `staged.replaced` first."""
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        final.rename(staged.with_name(staged.name + ".replaced"))
    staged.rename(final)


def prepare(plans: list, args: argparse.Namespace) -> None:
    """Write every plan, verify if asked, and only then rename the results into place."""
    from madm_utils.arrow_writer import check_published_statistics, write_split
    from madm_utils.prepared_data import verify_split

    with staging(args.output_dir) as temporary:
        for plan in plans:
            folder = temporary / plan.dataset / plan.split
            write_split(plan, folder, temporary / "cache", args.num_proc)
            shutil.rmtree(temporary / "cache")
            statistics = check_published_statistics(plan, folder)
            if statistics:
                print(f"{plan.dataset} {plan.split}: class statistics agree with {statistics}")
            if args.verify:
                verify_split(folder)
        for plan in plans:
            publish(temporary / plan.dataset / plan.split, args.output_dir / plan.dataset / plan.split)


def write_raw_scenes(args: argparse.Namespace) -> None:
    """`--as_raw`: draw the scenes as Cityscapes/, DELIVER/, FMB/ and DSEC/ trees under `--output_dir`."""
    from madm_utils.raw_layouts import write_raw_layouts

    folders = [args.output_dir / dataset.folder for dataset in RAW_DATASETS.values()]
    there = [str(folder) for folder in folders if folder.exists()]
    if there and not args.overwrite:
        raise UserError(
            f"{', '.join(there)} already there; add --overwrite to replace, or choose another --output_dir"
        )
    with staging(args.output_dir) as temporary:
        write_raw_layouts(temporary / "raw", args.num_train, args.num_test, args.seed, args.resolution)
        folders = sorted((temporary / "raw").iterdir())
        for folder in folders:
            publish(folder, args.output_dir / folder.name)
    print(f"wrote {', '.join(folder.name for folder in folders)} under {args.output_dir}")


def print_summary(folders: list[Path]) -> None:
    """Print the prepared splits, class frequencies, and the rare classes of a labelled training split."""
    import numpy as np

    from madm_utils.prepared_data import Metadata, open_split

    loaded = [Metadata.load(folder) for folder in folders]
    print(f"\n{'dataset':20} {'split':6} {'images':>7} {'labelled':>8}  {'height x width':14}  published")
    for data in loaded:
        size = "x".join(map(str, data.image_size)) if data.image_size else "mixed"
        known = RAW_DATASETS.get(data.dataset)
        published = known.splits[data.split].published_count if known else None
        print(
            f"{data.dataset:20} {data.split:6} {data.num_images:7} {'yes' if data.labelled else 'no':>8}  {size:14}  "
            f"{published or '-'}"
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
    """Prepare, verify and summarise what the command line asks for."""
    args = parse_args(argv)
    names = choose_datasets(args)
    if args.as_raw:
        write_raw_scenes(args)
        return 0
    if args.verify and not args.overwrite and args.raw_dir is None and set(names) & set(RAW_DATASETS):
        folders = verify_prepared(names, args.output_dir)
    else:
        lists = read_file_lists(args.file_list)
        plans = [plan for name in names for plan in plan_dataset(name, args, lists)]
        if not plans:
            raise UserError(f"the file lists name no split of {', '.join(names)}; which dataset are they for?")
        prepare(skip_prepared(plans, args), args)
        folders = [args.output_dir / plan.dataset / plan.split for plan in plans]
    print_summary(folders)
    if args.verify:
        print("\nverified: every image decodes, and sizes, label ids and class statistics fit")
    return 0


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
