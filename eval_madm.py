#!/usr/bin/env python
"""Evaluate trained models on the labelled target split of their task, and compare them.

    python eval_madm.py --model_path outputs/depth --data_dir data --output_dir outputs/depth/evaluation
    python eval_madm.py --model_path outputs/source_only outputs/depth --data_dir data --output_dir outputs/comparison

Several processes give exactly the numbers of one:

    accelerate launch --config_file accelerate_configs/multi_gpu.yaml eval_madm.py ...

Two protocols: `paper` is the published one, image and label at the training resolution (512x512). `native` brings the
scores to each label's own size before the class is chosen, so that every labelled pixel counts; with it, `--window`
slides over the image at its own size.

The output folder gets

    metrics.json           scores with confidence intervals, per class and per condition, boundary IoU, calibration,
                           confusion matrix (K x K, rows prediction, columns label)
    confusion_matrix.csv   the same matrix with class names, and the ignored pixels in a last column
    confusion_matrix.png   the same in percent of the labelled pixels of each class
    pictures/              input, label and prediction of images spread evenly over the split
    worst/                 the ten images with the lowest IoU, with a map of the errors
    report.html            all of it in one page that opens without a network

With several models each has such a folder, named like its row, and beside them are comparison.md, .csv and .json and a
report.html that shows their predictions side by side. Nothing is written unless everything completes. An earlier
evaluation in the same folder is replaced.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from madm_utils.args import (
    add_data_arguments,
    add_inference_arguments,
    add_task_arguments,
    check_inference_arguments,
    formatter,
    inference_settings,
    non_negative_int,
    positive_int,
)
from madm_utils.cli import UserError, run
from madm_utils.files import check_writable
from madm_utils.tasks import Task, load_task

if TYPE_CHECKING:
    from accelerate import Accelerator

    from madm_utils.comparison import Evaluation
    from madm_utils.datasets import EvaluationDataset
    from madm_utils.evaluated_models import EvaluatedModel
    from madm_utils.inference import InferenceSettings

# What decides the numbers of an evaluation: a task that differs here is another task.
TASK_FIELDS = ("name", "target", "class_names", "palette", "target_label_map")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add_inference_arguments(parser, "several are compared, the first is what the others are compared with")
    group = parser.add_argument_group("several models")
    group.add_argument("--names", nargs="+", default=(), metavar="NAME", help="of the models; default: of their paths")
    group.add_argument(
        "--classes", nargs="+", default=(), metavar="CLASS",
        help="IoU of these classes only, and the mean of their IoUs with its interval; default: all",
    )  # fmt: skip
    group.add_argument("--ensemble", action="store_true", help="evaluate all of them as one: mean probabilities")
    add_task_arguments(parser, "check that the models are of this task")
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
    group.add_argument(
        "--num_pictures", type=non_negative_int, default=8, metavar="N",
        help="images spread over the split that are kept as pictures, beside the ten worst",
    )  # fmt: skip
    group.add_argument(
        "--update_model_card", action="store_true",
        help="also write the scores into the README.md of --model_path; of one model only",
    )  # fmt: skip
    args = parser.parse_args(argv)
    check_inference_arguments(parser, args)
    if args.task and args.task_config:
        parser.error("give --task or --task_config, not both")
    if args.update_model_card and args.max_samples:
        parser.error("--update_model_card needs the whole split: leave --max_samples out")
    if args.update_model_card and len(args.model_path) > 1:
        parser.error("--update_model_card writes into the card of one model; give one --model_path")
    if args.update_model_card and (args.merge_lora or args.quantize_unet):
        parser.error("--update_model_card writes the model's exact scores: leave --merge_lora, --quantize_unet out")
    if args.window and args.protocol == "paper":
        parser.error(
            "--window needs --protocol native: the published protocol scores the whole image, stretched to the "
            "training resolution, so there is nothing for a window to slide over"
        )
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says."""
    args = parse_args(argv)
    check_writable(args.output_dir)
    if args.update_model_card and not (Path(args.model_path[0]) / "run.json").is_file():
        raise UserError(
            f"--update_model_card needs the local --output_dir of a finished training, with its run.json; got "
            f"--model_path {args.model_path[0]}"
        )
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # On the CPU every process computes with all cores (below); waiting threads must sleep, not spin.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded
    expected = load_task(args.task, args.task_config) if args.task or args.task_config else None
    settings = inference_settings(args)

    import torch

    from madm_utils.evaluation_files import check_places, write_results
    from madm_utils.pipeline_madm import inference_accelerator

    accelerator = inference_accelerator(args.mixed_precision)
    if accelerator.device.type == "cpu":
        # Launchers give each of several processes a single thread. Sums in another order move logits by 1e-5, which
        # flips a pixel now and then: one and several processes would disagree.
        torch.set_num_threads(args.num_cpu_threads or available_cores())
    models = checked_models(args, expected)
    check_places(args.output_dir, models)
    datasets = [open_dataset(model, args) for model in models]
    if len(models) > 1:
        # Hours may pass until the last one is needed; damaged weights are found now.
        for model in models:
            model.load(args.weights, args.pretrained_model_name_or_path, args.vae_decoder)
    evaluations: list[Evaluation] = []
    for number, (model, dataset) in enumerate(zip(models, datasets, strict=True), start=1):
        # What was worst for the models before is worth seeing of this one too.
        also = {index for e in evaluations if e.data == dataset.fingerprint for index in e.measurement.samples}
        text = f"evaluate {model.name} ({number}/{len(models)})" if len(models) > 1 else "evaluate"
        evaluations.append(evaluate_model(model, dataset, also, accelerator, settings, args, text))
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    write_results(args.output_dir, evaluations, args.classes)
    print_results(evaluations, args)
    if args.update_model_card:
        from madm_utils.model_card import update_model_card

        update_model_card(Path(args.model_path[0]), evaluations[0].metrics)
        print(f"model card: {Path(args.model_path[0]) / 'README.md'}")


def checked_models(args: argparse.Namespace, expected: Task | None) -> "list[EvaluatedModel]":
    """The models of the command line, which fit together and to what is asked of them."""
    from madm_utils.approximations import check_lora
    from madm_utils.comparison import check_classes
    from madm_utils.evaluated_models import find_models
    from madm_utils.model_folder import replaced_decoders

    models = find_models(args.model_path, args.names, args.ensemble)
    folders = [folder for model in models for folder in model.folders]
    if args.merge_lora:
        check_lora(folders)
    replaced_decoders(folders, args.vae_decoder)
    for model in models:
        if expected is not None:
            check_task(model.task, expected, " ".join(model.paths))
    if args.classes:
        if len(models) == 1:
            raise UserError("--classes chooses what is compared; give several models with --model_path")
        check_classes(models, args.classes)
    if args.update_model_card and len(models) > 1:
        raise UserError(
            f"--update_model_card writes into the card of one model, and {args.model_path[0]} holds several: "
            f"{', '.join(model.name for model in models)}; give the folder of one"
        )
    return models


def open_dataset(model: "EvaluatedModel", args: argparse.Namespace) -> "EvaluationDataset":
    """The labelled target split of the model's task."""
    from madm_utils.datasets import EvaluationDataset

    resolution = None if args.window else model.resolution
    return EvaluationDataset(args.data_dir, model.task, args.split, resolution, args.protocol, args.streaming)


def evaluate_model(
    model: "EvaluatedModel",
    dataset: "EvaluationDataset",
    also: set[int],
    accelerator: "Accelerator",
    settings: "InferenceSettings",
    args: argparse.Namespace,
    text: str,
) -> "Evaluation":
    """Load a model and measure it on its images. Collective.

    Args:
        also: images whose pictures are kept beside `--num_pictures` and the worst ones.
        text: before the progress bar.
    """
    from madm_utils.approximations import approximate
    from madm_utils.comparison import Evaluation
    from madm_utils.compilation import compile_model
    from madm_utils.hub import versions
    from madm_utils.inference import Predictor
    from madm_utils.measurement import measure, metrics_of
    from madm_utils.sample_pictures import evenly_spread

    num_images = min(len(dataset), args.max_samples or len(dataset))
    spread = evenly_spread(num_images, args.num_pictures)
    networks = model.load(args.weights, args.pretrained_model_name_or_path, args.vae_decoder)
    networks = [network.to(accelerator.device) for network in networks]
    for network in networks:
        approximate(network, args.merge_lora, args.quantize_unet)
        if args.compile:
            compile_model(network.extractor, [network.segmenter], accelerator.device)
    forwards = [lambda images, network=network: network(images).logits for network in networks]
    predictor = Predictor(forwards, model.resolution, accelerator.device, settings, args.batch_size)
    measurement = measure(
        predictor, model.task.num_classes, dataset, accelerator, spread | also, batch_size=args.batch_size,
        num_images=num_images, num_workers=args.dataloader_num_workers, desc=text,
    )  # fmt: skip
    if not measurement.confusion[:-1, :-1].any():
        raise UserError(
            f"the labels of {model.task.target}/{args.split} hold no class of task {model.task.name}; check the "
            "target_label_map of the task, or give a split whose labels have its classes"
        )
    metrics = {
        "task": model.task.name,
        "split": args.split,
        "protocol": args.protocol,
        "num_images": num_images,
        **metrics_of(measurement, model.task.class_names),
        "model": model.paths[0] if len(model.paths) == 1 else list(model.paths),
        "settings": {
            "weights": args.weights, "resolution": model.resolution, "mixed_precision": args.mixed_precision,
            "window": args.window, "stride": settings.step() if args.window else None, "tta": list(args.tta),
            "compile": args.compile, "merge_lora": args.merge_lora, "quantize_unet": args.quantize_unet,
            **model.built_in_approximations(),
        },
        "versions": versions(),
    }  # fmt: skip
    return Evaluation(model, measurement, metrics, dataset.fingerprint, frozenset(spread))


def print_results(evaluations: "Sequence[Evaluation]", args: argparse.Namespace) -> None:
    """The table for the screen."""
    from madm_utils.comparison import aligned, approximations, compare, condition_tables, to_text, with_interval
    from madm_utils.metrics import format_scores

    first = evaluations[0].metrics
    settings = f"{args.split} split, protocol {args.protocol}, {first['num_images']} images, {args.weights}"
    approximate = approximations(first["settings"])
    settings += f" ({approximate})" if approximate else ""
    if len(evaluations) > 1:
        print(f"{len(evaluations)} models, {args.split} split, protocol {args.protocol}, {args.weights}, in %\n")
        print(to_text(compare(evaluations, args.classes)))
    else:
        intervals = first["confidence_intervals"]
        print(f"{first['task']}, {settings}, in %\n{format_scores(first)}")
        print(
            f"mIoU {with_interval(first['miou'], intervals['miou'])} with its {intervals['level']:g} % interval, "
            f"boundary IoU {with_interval(first['boundary_iou']['miou'], intervals['boundary_iou'])}, "
            f"ECE {with_interval(first['calibration']['ece'], intervals['ece'])}"
        )
        for title, table in condition_tables(compare(evaluations)).items():
            print(f"\n{title}\n{aligned(table)}")
    print(f"results: {args.output_dir}; open {args.output_dir / 'report.html'}")


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


if __name__ == "__main__":
    run(main)
