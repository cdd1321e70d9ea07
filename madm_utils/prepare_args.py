"""Command line of `prepare_datasets.py`: flags, and the choices that they stand for."""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

from madm_utils.args import formatter, non_negative_int, positive_float, positive_int
from madm_utils.arrow_writer import OnError, Share
from madm_utils.cli import UserError
from madm_utils.events import REPRESENTATIONS, EventSettings
from madm_utils.raw_datasets import RAW_DATASETS, dataset_name
from madm_utils.raw_descriptions import RawSplit
from madm_utils.tasks import TASKS, load_task
from madm_utils.transforms import Size

SYNTHETIC_DATASETS = ("synthetic_rgb", "synthetic_depth", "synthetic_infrared", "synthetic_event")


def parse_prepare_args(description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line and check that its flags fit together.

    Beside the flags, the result has `names`: the prepared datasets it asks for, source first.

    Raises:
        UserError: unknown task or dataset, or flags that do not fit together.
    """
    args = _parser(description).parse_args(argv)
    args.names = _names(args)
    _check(args)
    return args


def stored_size(args: argparse.Namespace, dataset: str, spec: RawSplit) -> Size | None:
    """(height, width) at which a split is stored, `None` for its native size.

    Only what training reads is resized: evaluation compares with the labels at their native size.

    Raises:
        UserError: a size was asked for that the dataset cannot have.
    """
    if args.store_resolution == "native" or not spec.trained:
        return None
    if args.store_resolution == "train":
        return spec.stored_size
    if spec.fixed_size:
        raise UserError(
            f"--store_resolution: {dataset} has tensors of the images' size beside them and is stored at its native "
            "size; leave the flag out"
        )
    return args.store_resolution


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False)
    what = parser.add_argument_group("what to prepare (give one)")
    what.add_argument("--task", help=f"source and target of a task: {', '.join(TASKS)}")
    what.add_argument("--task_config", type=Path, help="JSON or YAML file of your own task between known datasets")
    what.add_argument(
        "--dataset",
        help=f"one dataset: {', '.join(RAW_DATASETS)}; synthetic (drawn scenes, all four modalities); or folder "
        "(your own images)",
    )
    what.add_argument(
        "--modality",
        help="of --dataset deliver: depth, event, lidar, hha or rgb; of fmb: infrared or visible (default: the first)",
    )
    what.add_argument(
        "--label_classes", type=int, choices=(11, 19), help="of --dataset dsec: which of its label sets (default: 11)"
    )
    where = parser.add_argument_group("where")
    where.add_argument(
        "--raw_dir",
        type=Path,
        help="folder that holds the datasets as downloaded, unpacked or as zip and tar archives; the dataset may lie "
        "one or two levels deeper",
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
    own = parser.add_argument_group("your own data (--dataset folder)")
    own.add_argument("--name", help="name of the prepared dataset, e.g. my_sensor")
    own.add_argument("--split", default="train", help="split to write: train, val, test, ...")
    own.add_argument("--images", type=Path, help="folder or archive of images")
    own.add_argument("--labels", type=Path, help="folder or archive of label images with the same names")
    own.add_argument("--label_map", type=Path, help="JSON or YAML file: what the pixel values of the labels mean")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--store_resolution",
        type=_resolution,
        default="train",
        metavar="train|native|HxW",
        help="size of the stored training images and labels: the size that training crops from (read fastest), as "
        "they are, or e.g. 256x512; evaluation data always stay native",
    )
    how.add_argument(
        "--image_range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="of images with more than 8 bits, e.g. 16-bit depth: the values that become 0 and 255",
    )
    how.add_argument(
        "--num_proc", type=positive_int, default=os.cpu_count() or 1, help="processes; default: every core"
    )
    how.add_argument(
        "--max_samples", type=positive_int, help="at most this many images per split, evenly spaced (default: all)"
    )
    how.add_argument(
        "--on_error",
        choices=("fail", "skip"),
        default="fail",
        help="an image or label that cannot be used: stop and name it, or leave it out and record it",
    )
    how.add_argument(
        "--max_errors", type=non_negative_int, default=10, help="with --on_error skip: stop after more than these"
    )
    how.add_argument(
        "--verify",
        nargs="?",
        const="prepared",
        choices=("prepared", "raw"),
        help="check everything, print a table, write report.json and a contact sheet per split: of the prepared data "
        "(prepared now, or there already), or of the raw files without preparing them",
    )
    how.add_argument("--overwrite", action="store_true", help="replace what --output_dir holds of these datasets")
    many = parser.add_argument_group("many machines")
    many.add_argument(
        "--shard",
        type=_share,
        default=Share(),
        metavar="I/N",
        help="prepare only share I of N (1/N ... N/N), e.g. one per job of a SLURM array; then --merge",
    )
    many.add_argument(
        "--merge",
        type=Path,
        nargs="*",
        metavar="DIR",
        help="join and verify the shares in --output_dir, and in the --output_dir DIR of further machines",
    )
    _add_events(parser.add_argument_group("pictures of raw events (dsec, dsec_night)"))
    hub = parser.add_argument_group("Hub")
    hub.add_argument("--push_to_hub", action="store_true", help="upload the prepared data as parquet, private")
    hub.add_argument("--hub_dataset_id", help="dataset repository, e.g. user/street-data")
    hub.add_argument("--hub_public_repo", action="store_true", help="create the repository as public")
    hub.add_argument("--hub_token", help="default: the token of `hf auth login`")
    hub.add_argument(
        "--redistribution_permitted",
        action="store_true",
        help="you confirm that you may upload data whose licence forbids passing it on",
    )
    synthetic = parser.add_argument_group("synthetic data")
    synthetic.add_argument("--num_train", type=positive_int, default=400, help="training scenes per modality")
    synthetic.add_argument("--num_test", type=positive_int, default=60, help="test scenes per modality")
    synthetic.add_argument(
        "--num_val", type=non_negative_int, default=0,
        help="validation scenes per modality, to choose settings without the test scenes",
    )  # fmt: skip
    synthetic.add_argument(
        "--label_all", action="store_true",
        help="label target training scenes too, for a supervised upper bound; adaptation never reads these labels",
    )  # fmt: skip
    synthetic.add_argument("--resolution", type=positive_int, default=128, help="height of a scene in pixels")
    synthetic.add_argument("--seed", type=int, default=0, help="the same seed draws the same scenes")
    synthetic.add_argument(
        "--as_raw",
        nargs="?",
        const="tasks",
        choices=("tasks", "all"),
        help="write official raw layouts instead: those of the published tasks, or all, with event recordings (slow)",
    )
    return parser


def _add_events(group) -> None:
    group.add_argument(
        "--event_representation",
        choices=REPRESENTATIONS,
        help="make pictures from events.h5: edge (active pixels on black, closest to MADM's own), count, polarity, "
        "or voxel (CMDA). Default: ready-made edge pictures where they are there, else edge",
    )
    group.add_argument(
        "--event_window_ms",
        type=positive_float,
        help="length of the time window that ends at a frame (default: since the frame before)",
    )
    group.add_argument(
        "--event_clip", type=positive_float, help="events per pixel that count as full (default: by representation)"
    )
    group.add_argument("--event_bins", type=positive_int, help="time bins of voxel (default: 1)")
    group.add_argument(
        "--event_rectify",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="move events to where rectify_map.h5 says (default: yes)",
    )


def _names(args: argparse.Namespace) -> list[str]:
    """Names of the prepared datasets that the command asks for, source first."""
    if sum(value is not None for value in (args.task, args.task_config, args.dataset)) != 1:
        raise UserError("give exactly one of --task NAME, --task_config FILE and --dataset NAME")
    if args.dataset is None:
        if args.modality or args.label_classes:
            raise UserError("--modality and --label_classes belong to --dataset; a task names its datasets")
        task = load_task(args.task, args.task_config)
        names = list(dict.fromkeys((task.source, task.target)))
        # A task on one's own images: --dataset folder prepares those.
        names = [name for name in names if name in (*RAW_DATASETS, *SYNTHETIC_DATASETS)] or names
    elif args.dataset == "synthetic":
        names = list(SYNTHETIC_DATASETS)
    elif args.dataset == "folder":
        if not args.name or not re.fullmatch(r"[A-Za-z0-9_-]+", args.name):
            raise UserError(f"--dataset folder needs --name, made of letters, digits, _ and -; got {args.name!r}")
        if args.name in (*RAW_DATASETS, *SYNTHETIC_DATASETS):
            raise UserError(f"--name {args.name} is the name of a known dataset; choose another")
        return [args.name]
    elif args.dataset in SYNTHETIC_DATASETS:
        names = [args.dataset]
    else:
        if args.dataset not in {entry for d in RAW_DATASETS.values() for entry in (d.name, d.base)}:
            raise UserError(
                f"unknown dataset '{args.dataset}'; known: {', '.join((*RAW_DATASETS, *SYNTHETIC_DATASETS))}, "
                "synthetic for all of the last four, and folder for your own images"
            )
        names = [dataset_name(args.dataset, args.modality, args.label_classes)]
    unknown = [name for name in names if name not in (*RAW_DATASETS, *SYNTHETIC_DATASETS)]
    if unknown:
        raise UserError(
            f"{', '.join(unknown)}: no known dataset; prepare your own images with --dataset folder --name NAME"
        )
    return names


def _check(args: argparse.Namespace) -> None:
    """Flags that do not fit together."""
    if args.resolution < 32:
        raise UserError(f"--resolution must be at least 32, got {args.resolution}")
    if args.as_raw and args.dataset != "synthetic":
        raise UserError("--as_raw draws raw layouts of synthetic scenes; use it with --dataset synthetic")
    if (args.num_val or args.label_all) and (args.as_raw or not set(args.names) & set(SYNTHETIC_DATASETS)):
        raise UserError("--num_val and --label_all are for prepared synthetic scenes; leave them out here")
    if args.file_list and not set(args.names) & set(RAW_DATASETS):
        raise UserError("--file_list selects files of the raw datasets; synthetic data and folders have none")
    if args.dataset != "folder":
        given = [flag for flag in ("name", "images", "labels", "label_map") if getattr(args, flag) is not None]
        if given:
            raise UserError(f"--{given[0]} describes your own data; use it with --dataset folder")
    if args.image_range and not args.image_range[0] < args.image_range[1]:
        raise UserError("--image_range LOW HIGH needs LOW below HIGH, got {} {}".format(*args.image_range))
    if args.merge is not None and args.shard.count > 1:
        raise UserError("--merge joins what --shard has made; give one of them")
    if args.verify == "raw" and set(args.names) & set(SYNTHETIC_DATASETS):
        raise UserError("--verify raw reads raw files; drawn scenes have none, check them with --verify")
    if args.shard.count > 1 and (args.verify or args.push_to_hub):
        raise UserError("--verify and --push_to_hub need the whole dataset; give them with --merge")
    if args.push_to_hub and not args.hub_dataset_id:
        raise UserError("--push_to_hub needs --hub_dataset_id, e.g. user/street-data")
    if event_settings(args) and not any(name.startswith("dsec") for name in args.names):
        raise UserError("--event_... flags make pictures of the raw events of dsec and dsec_night")


def event_settings(args: argparse.Namespace) -> EventSettings | None:
    """Settings of the pictures made from raw events, `None` when no flag asks for them."""
    flags = {
        "representation": args.event_representation,
        "window_ms": args.event_window_ms,
        "clip": args.event_clip,
        "bins": args.event_bins,
        "rectify": args.event_rectify,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    if given and args.dataset == "dsec_night":
        given.setdefault("representation", "voxel")  # its events are a tensor beside the image, as CMDA has them
    return EventSettings(**given) if given else None


def on_error(args: argparse.Namespace) -> OnError:
    """What to do about images that cannot be used."""
    return OnError(args.on_error == "skip", args.max_errors)


def _resolution(text: str) -> str | Size:
    if text in ("train", "native"):
        return text
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not match or min(int(side) for side in match.groups()) < 1:
        raise argparse.ArgumentTypeError(f"expected train, native or HEIGHTxWIDTH, e.g. 512x1024, got {text}")
    return int(match[1]), int(match[2])


def _share(text: str) -> Share:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 1 to N, e.g. 3/8, got {text}")
    return Share(int(match[1]), int(match[2]))
