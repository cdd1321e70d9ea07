#!/usr/bin/env python
"""Evaluate a trained model on the labelled target split of its task.

    python eval_madm.py --model_path outputs/depth --data_dir data --output_dir outputs/depth/evaluation

Several processes give exactly the numbers of one:

    accelerate launch --config_file accelerate_configs/multi_gpu.yaml eval_madm.py ...

Two protocols: `paper` is the published one, image and label at the training resolution (512x512). `native` brings the
logits to each label's own size before the class is chosen, so that every labelled pixel counts.

The output folder gets

    metrics.json           scores, per-class IoU and accuracy, confusion matrix (K x K, rows prediction, columns label)
    confusion_matrix.csv   the same matrix with class names, and the ignored pixels in a last column
    confusion_matrix.png   the same in percent of the labelled pixels of each class
    pictures/              input, label and prediction of images spread evenly over the split

and nothing unless the evaluation completes. An earlier evaluation in the same folder is replaced.
"""

import argparse
import csv
import io
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from madm_utils.args import (
    add_data_arguments,
    add_inference_arguments,
    add_task_arguments,
    formatter,
    non_negative_int,
    positive_int,
)
from madm_utils.cli import UserError, run
from madm_utils.files import check_writable
from madm_utils.hub import versions
from madm_utils.model_card import update_model_card
from madm_utils.tasks import Task, load_task

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from madm_utils.datasets import EvaluationDataset
    from madm_utils.modeling_madm import MADMModel

# What decides the numbers of an evaluation: a task that differs here is another task.
TASK_FIELDS = ("name", "target", "class_names", "palette", "target_label_map")
PICTURE_NAME = re.compile(r"\d{5}_.+\.png")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add_inference_arguments(parser)
    add_task_arguments(parser, "check that the model is of this task")
    group = parser.add_argument_group("data")
    add_data_arguments(group)
    group.add_argument("--split", default="test", help="labelled split of the target dataset")
    group.add_argument(
        "--protocol", choices=("paper", "native"), default="paper",
        help="labels at the training resolution, or at their own size",
    )  # fmt: skip
    group.add_argument("--max_samples", type=positive_int, metavar="N", help="only the first N images; default: all")
    group.add_argument("--dataloader_num_workers", type=non_negative_int, default=2, help="loader processes")
    group.add_argument(
        "--num_cpu_threads", type=positive_int, metavar="N",
        help="per process, where there is no GPU; rounding depends on it; default: all cores",
    )  # fmt: skip
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", required=True, type=Path, help="folder for the results")
    group.add_argument("--num_pictures", type=non_negative_int, default=8, metavar="N", help="sample pictures")
    group.add_argument(
        "--update_model_card", action="store_true", help="also write the scores into the README.md of --model_path"
    )
    args = parser.parse_args(argv)
    if args.task and args.task_config:
        parser.error("give --task or --task_config, not both")
    if args.update_model_card and args.max_samples:
        parser.error("--update_model_card needs the whole split: leave --max_samples out")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says."""
    args = parse_args(argv)
    check_writable(args.output_dir)
    if args.update_model_card and not (Path(args.model_path) / "run.json").is_file():
        raise UserError(
            f"--update_model_card needs the local --output_dir of a finished training, with its run.json; got "
            f"--model_path {args.model_path}"
        )
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # On the CPU every process computes with all cores (below); waiting threads must sleep, not spin.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded
    expected = load_task(args.task, args.task_config) if args.task or args.task_config else None

    import torch

    from madm_utils.datasets import EvaluationDataset
    from madm_utils.metrics import format_scores, scores
    from madm_utils.modeling_madm import MADMModel
    from madm_utils.pipeline_madm import inference_accelerator

    accelerator = inference_accelerator(args.mixed_precision)
    if accelerator.device.type == "cpu":
        # Launchers give each of several processes a single thread. Sums in another order move logits by 1e-5, which
        # flips a pixel now and then: one and several processes would disagree.
        torch.set_num_threads(args.num_cpu_threads or available_cores())
    model = MADMModel.from_pretrained(
        args.model_path, weights=args.weights, base=args.pretrained_model_name_or_path
    ).to(accelerator.device)
    if expected is not None:
        check_task(model.task, expected, args.model_path)
    dataset = EvaluationDataset(args.data_dir, model.task, args.split, model.resolution, args.protocol, args.streaming)
    num_images = min(len(dataset), args.max_samples or len(dataset))
    confusion, pictures = evaluate_with_pictures(model, dataset, accelerator, num_images, args)
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    result = scores(confusion, model.task.class_names)
    classes = model.task.num_classes
    report = {
        "task": model.task.name,
        "split": args.split,
        "protocol": args.protocol,
        "num_images": num_images,
        **result,
        "confusion_matrix": confusion[:classes, :classes].tolist(),
        "class_names": list(model.task.class_names),
        "model": str(args.model_path),
        "settings": {
            "weights": args.weights, "resolution": model.resolution, "mixed_precision": args.mixed_precision,
        },
        "versions": versions(),
    }  # fmt: skip
    write_results(args.output_dir, report, confusion, pictures)
    settings = f"{args.split} split, protocol {args.protocol}, {num_images} images, {args.weights}"
    print(f"{model.task.name}, {settings}, in %\n{format_scores(result)}\nresults: {args.output_dir}")
    if args.update_model_card:
        update_model_card(Path(args.model_path), report)
        print(f"model card: {Path(args.model_path) / 'README.md'}")


def evaluate_with_pictures(
    model: "MADMModel",
    dataset: "EvaluationDataset",
    accelerator: "Accelerator",
    num_images: int,
    args: argparse.Namespace,
) -> tuple[np.ndarray, dict[str, bytes]]:
    """Confusion matrix (K+1, K+1) over all processes, and sample pictures as PNG by file name. Collective."""
    from accelerate.utils import gather_object

    from madm_utils.evaluation import evaluate

    shown = set(np.linspace(0, num_images - 1, min(args.num_pictures, num_images)).round().astype(int).tolist())
    mine: dict[str, bytes] = {}

    def draw(index: int, image: "torch.Tensor", label: "torch.Tensor", prediction: "torch.Tensor") -> None:
        if index in shown:
            name = dataset.file_name(index)
            key = f"{index:05d}_{re.sub(r'[^A-Za-z0-9_-]+', '_', Path(name).stem)}.png"
            mine[key] = picture(image, label, prediction, model.task, name)

    workers = args.dataloader_num_workers
    confusion = evaluate(model, dataset, accelerator, args.batch_size, num_images, workers, seen=draw)
    return confusion, {name: png for part in gather_object([mine]) for name, png in part.items()}


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_task(of_model: Task, expected: Task, model_path: str) -> None:
    """Refuse a model that was trained for another task than the one asked for."""
    different = [name for name in TASK_FIELDS if getattr(of_model, name) != getattr(expected, name)]
    if different:
        raise UserError(
            f"{model_path} is a checkpoint of another task: it was trained for '{of_model.name}', expected "
            f"'{expected.name}' (different: {', '.join(different)}). Leave --task and --task_config out to "
            "evaluate it on its own task, or give a model of the expected one."
        )


def picture(image: "torch.Tensor", label: "torch.Tensor", pred: "torch.Tensor", task: Task, name: str) -> bytes:
    """PNG of input, label and prediction side by side; image (3, R, R) uint8, label and pred (h, w) class ids."""
    from PIL import Image

    from madm_utils.visualization import colorize, picture_grid

    height, width = label.shape
    pixels = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).resize((width, height))
    colors = [colorize(ids.cpu().numpy().astype(np.uint8), task.palette) for ids in (label, pred)]
    legend = dict(zip(task.class_names, task.palette, strict=True)) | {"not labelled": (0, 0, 0)}
    grid = picture_grid([[np.asarray(pixels), *colors]], ["input", "label", "prediction"], [name], legend)
    buffer = io.BytesIO()
    grid.save(buffer, format="PNG")
    return buffer.getvalue()


def write_results(output_dir: Path, report: dict[str, Any], confusion: np.ndarray, pictures: dict[str, bytes]) -> None:
    """Write all files into a temporary folder, then move them over those of an earlier evaluation, metrics last."""
    from madm_utils.visualization import save_confusion_plot

    earlier = (output_dir / "metrics.json").exists()
    staging = output_dir / f".evaluation.tmp-{os.getpid()}"
    try:
        staging.mkdir(parents=True)
        with open(staging / "confusion_matrix.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["prediction \\ label", *report["class_names"], "ignored"])
            rows = zip(report["class_names"], confusion[:-1].tolist(), strict=True)
            writer.writerows([name, *counts] for name, counts in rows)
        save_confusion_plot(confusion, report["class_names"], staging / "confusion_matrix.png")
        for name, data in pictures.items():
            (staging / name).write_bytes(data)
        (staging / "metrics.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")

        (output_dir / "pictures").mkdir(exist_ok=True)
        if earlier:  # otherwise what lies there is not ours
            for old in (output_dir / "pictures").iterdir():
                if PICTURE_NAME.fullmatch(old.name) and old.name not in pictures:
                    old.unlink()
        for name in pictures:
            os.replace(staging / name, output_dir / "pictures" / name)
        for name in ("confusion_matrix.csv", "confusion_matrix.png", "metrics.json"):
            os.replace(staging / name, output_dir / name)
    except OSError as error:
        raise UserError(f"cannot write the results to {output_dir} ({error}); give another --output_dir") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


if __name__ == "__main__":
    run(main)
