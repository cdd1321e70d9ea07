#!/usr/bin/env python
"""Segment an image, or every image in a folder and its sub-folders, with a trained model or several.

    python predict_madm.py --model_path outputs/depth --input photos --output_dir predictions
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml predict_madm.py ...

With `accelerate launch` every process, on one machine or many, takes a share of the images.

For each `sub/street.png` the output folder gets, in the size of the input,

    sub/street_label.png        class ids, 8 bit
    sub/street_color.png        the colours of the classes
    sub/street_overlay.png      the colours over the image
    sub/street_confidence.png   with --save_confidence: probability of the predicted class, 255 is 1

and once `legend.json` (class id -> name and colour) and `summary.json` (counts, failures and why, settings, versions).
Folders may be local, on the Hub (hf://datasets/user/name/folder), or anything that fsspec reads and writes (s3://...).

Images that are done already, with the same model and settings, are skipped: after an interruption, give the same
command again. An image that cannot be read is reported, the others are still done, and the exit code is 1.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from madm_utils.args import (
    add_inference_arguments,
    check_inference_arguments,
    formatter,
    fraction,
    inference_settings,
)
from madm_utils.cli import UserError, run
from madm_utils.interruption import StopSignals
from madm_utils.prediction_files import (
    LEGEND_FILE,
    SUFFIXES,
    SUMMARY_FILE,
    Job,
    Picture,
    check_same_settings,
    is_done,
    legend,
    model_digest,
    plan_job,
    plan_outputs,
    prediction_files,
    settings_digest,
    write_json,
)
from madm_utils.prediction_report import Processes, Report
from madm_utils.prediction_streams import MAX_PIXELS, Writer, read_ahead
from madm_utils.storage import HubStorage, Storage, open_input, open_output, open_storage

if TYPE_CHECKING:
    from madm_utils.inference import Prediction, Predictor

CHECKS_AT_ONCE = 16


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add_inference_arguments(parser, "several are an ensemble: their probabilities are averaged")
    group = parser.add_argument_group("input and output")
    group.add_argument(
        "--input", required=True, metavar="FILE_OR_DIR",
        help=f"an image, or a folder that is searched for {' '.join(SUFFIXES)}; local, hf://datasets/user/name/folder,"
        " or another address that fsspec reads; a web address (https://) is one image",
    )  # fmt: skip
    group.add_argument(
        "--output_dir",
        required=True,
        help="folder for the predictions, local or such an address; it may be inside the input",
    )
    group.add_argument("--overwrite", action="store_true", help="predict all images, also those that are done already")
    group.add_argument(
        "--overlay_alpha", type=fraction, default=0.5, metavar="A", help="share of the colour in the overlay, 0..1"
    )
    group.add_argument(
        "--save_confidence", action="store_true",
        help="write the probability of the predicted class, too: 8-bit grey, round(255 * p)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    check_inference_arguments(parser, args)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Predict as the command line says; returns the exit code."""
    args = parse_args(argv)
    if "://" not in args.input and not Path(args.input).exists():
        raise UserError(f"--input {args.input}: no such file or folder")

    from PIL import Image

    from madm_utils.pipeline_madm import inference_accelerator

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice its limit is an error, which is reported
    accelerator = inference_accelerator(args.mixed_precision)
    processes = Processes(accelerator)
    target = open_output(args.output_dir, processes.count)
    plan = processes.from_main(lambda: make_plan(args, target))
    report = Report()
    if plan.jobs:
        predictor, class_names, palette = load(args, plan.decoders, accelerator.device)
        if processes.is_main:
            write_json(target, LEGEND_FILE, legend(class_names, palette))
            write_summary(target, plan, args, {"status": "running"})
        with accelerator.autocast():
            report = predict(plan, args, target, predictor, palette, processes)
        report = processes.gather(report)
    elif processes.is_main and plan.legend:
        write_json(target, LEGEND_FILE, plan.legend)
    # The report of the main process has it all. Another code would make a launcher end that process at once.
    code = 0
    if processes.is_main or report.missing:
        code = report.tell(plan.skipped, str(target), processes.name() if report.missing else "")
    if processes.is_main:
        try:
            write_summary(target, plan, args, report.as_dict())
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = code or 1
    processes.leave()
    return code


# --- plan ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is to be done, the same in all processes."""

    source: str
    """Folder of the images."""
    jobs: list[Job]
    skipped: int
    """Images that are done already."""
    settings: dict[str, Any]
    """All that decides about the result, beside the image."""
    digest: str
    """Of `settings`."""
    legend: dict[int, dict[str, Any]]
    """What is missing though all images are done; else empty."""
    decoders: list[str | None]
    """See `replaced_decoders`."""


def make_plan(args: argparse.Namespace, target: Storage) -> Plan:
    """Find the images, and which of them are done.

    Raises:
        UserError: no such input, no images, no model, or an output folder that cannot be used.
    """
    from madm_utils.approximations import check_lora
    from madm_utils.model_folder import replaced_decoders

    if isinstance(target, HubStorage):
        target.check_writable()
    source, files = open_input(args.input, "--input")
    outputs = plan_outputs(source, files, target)
    folders = model_folders(args)
    if args.merge_lora:
        check_lora(folders)
    decoders = replaced_decoders(folders, args.vae_decoder)
    settings = describe_settings(args, folders)
    there = target.files()
    if not args.overwrite:
        check_same_settings(target, there, settings)
    digest = settings_digest(settings)

    def done(name: str) -> bool:
        return is_done(outputs[name], digest, source, name, files[name], target, there)

    skip: set[str] = set()
    if not args.overwrite:
        with ThreadPoolExecutor(CHECKS_AT_ONCE) as pool:
            skip = {name for name, known in zip(outputs, pool.map(done, outputs), strict=True) if known}
    jobs = [plan_job(name, outputs[name], files[name], there) for name in outputs if name not in skip]
    missing = {} if jobs or LEGEND_FILE in there else read_legend(folders[0])
    return Plan(str(source), jobs, len(skip), settings, digest, missing, decoders)


def read_legend(folder: Path) -> dict[int, dict[str, Any]]:
    """The legend of a model that has predicted before, without loading it."""
    from madm_utils.model_folder import CONFIG_NAME
    from madm_utils.tasks import task_from_dict

    path = folder / CONFIG_NAME
    task = task_from_dict(json.loads(path.read_text(encoding="utf-8"))["task"], where=str(path))
    return legend(task.class_names, task.palette)


def model_folders(args: argparse.Namespace) -> list[Path]:
    """Where the files of the models are, one model in each folder."""
    from madm_utils.base_model import local_folder
    from madm_utils.model_folder import CONFIG_NAME, adapter_folders

    found = []
    for path in args.model_path:
        folders = adapter_folders(path)
        if len(folders) > 1:
            raise UserError(
                f"--model_path {path} holds models for {', '.join(folders)}; give one of them: "
                f"{', '.join(map(str, folders.values()))}"
            )
        found.append(next(iter(folders.values()), None) or local_folder(path, expected=CONFIG_NAME))
    return found


def describe_settings(args: argparse.Namespace, folders: Sequence[Path]) -> dict[str, Any]:
    """All that decides about the result of an image.

    The number of processes does not. --compile and the kind of device do not beyond rounding. Nor does where base
    model and small decoder lie: the models know which ones these have to be. Approximations that are off are left out,
    so that predictions of versions that had none go on.
    """
    from madm_utils.model_folder import built_in_approximations

    settings = inference_settings(args)
    built_in = [built_in_approximations(folder) for folder in folders]
    exact = {"head_resolution": 1, "vae_decoder": None}
    approximations = {
        "merge_lora": args.merge_lora,
        "quantize_unet": args.quantize_unet,
        "built_in_approximations": built_in if any(one != exact for one in built_in) else None,
    }
    return {
        "models": [model_digest(folder, args.weights) for folder in folders],
        "weights": args.weights,
        "mixed_precision": args.mixed_precision,
        "window": settings.window,
        "stride": settings.stride,
        "flip": settings.flip,
        "scales": settings.scales,
        "overlay_alpha": args.overlay_alpha,
        "save_confidence": args.save_confidence,
        **{name: value for name, value in approximations.items() if value},
    }


# --- prediction ------------------------------------------------------------------------------------------------------


def load(
    args: argparse.Namespace, decoders: Sequence[str | None], device: Any
) -> tuple["Predictor", Sequence[str], Sequence[tuple[int, int, int]]]:
    """Load the model, or the ensemble; returns the predictor, the names and the colours of the classes.

    Args:
        args: the command line.
        decoders: per model, see `replaced_decoders`.
        device: where to run.
    """
    from madm_utils.compilation import compile_model
    from madm_utils.pipeline_madm import MADMPipeline

    options = {"device": device, "base": args.pretrained_model_name_or_path}
    pipes = [
        MADMPipeline.from_pretrained(path, args.weights, vae_decoder=decoder, **options)
        for path, decoder in zip(args.model_path, decoders, strict=True)
    ]
    for pipe in pipes:
        if args.merge_lora:
            pipe.merge_lora()
        if args.quantize_unet:
            pipe.quantize_unet(args.quantize_unet)
        if args.compile:
            compile_model(pipe.extractor, [pipe.segmenter], device)
    first, *others = pipes
    return first.predictor(inference_settings(args), others, args.batch_size), first.class_names, first.palette


def predict(
    plan: Plan,
    args: argparse.Namespace,
    target: Storage,
    predictor: "Predictor",
    palette: Sequence[tuple[int, int, int]],
    processes: Processes,
) -> Report:
    """Predict this process's share of the images until it is done, or a signal or the output folder ends it."""
    from tqdm import tqdm

    jobs = plan.jobs[processes.index :: processes.count]  # interleaved: neighbours tend to be of one size
    report = Report(planned=len(jobs))
    name = f"predict ({processes.name()})" if processes.count > 1 else "predict"
    threads = processes.threads()
    with (
        StopSignals() as stop,
        ThreadPoolExecutor(threads) as readers,
        tqdm(total=len(jobs), desc=name, unit="image", disable=not processes.is_main) as progress,
        Writer(target, threads, report, progress) as writer,
    ):
        source = open_storage(plan.source, "--input")
        with closing(read_ahead(source, jobs, readers, args.batch_size + threads)) as ahead:
            pictures = takewhile(lambda _: not (stop.received or report.stopped), ahead)
            for batch in batches(pictures, args.batch_size, writer):
                for job, picture, prediction in segment(predictor, batch, args.save_confidence, source, writer):
                    label_map = prediction.label_map.cpu().numpy()
                    confidence = prediction.confidence.cpu().numpy() if args.save_confidence else None
                    make = partial(
                        prediction_files, job.output, plan.digest, picture, label_map, palette, args.overlay_alpha,
                        confidence,
                    )  # fmt: skip
                    writer.write(job, label_map.size, make)
        report.interrupted = stop.received or 0
    return report


def batches(
    pictures: Iterable[tuple[Job, Picture | UserError]], size: int, writer: Writer
) -> Iterator[list[tuple[Job, Picture]]]:
    """Readable images, `size` at a time, fewer when they are large."""
    batch: list[tuple[Job, Picture]] = []
    num_pixels = 0
    for job, picture in pictures:
        if isinstance(picture, UserError):
            writer.fail(job, str(picture))
            continue
        more = picture.pixels.width * picture.pixels.height
        if batch and num_pixels + more > MAX_PIXELS:
            yield batch
            batch, num_pixels = [], 0
        batch.append((job, picture))
        num_pixels += more
        if len(batch) == size:
            yield batch
            batch, num_pixels = [], 0
    if batch:
        yield batch


def segment(
    predictor: "Predictor", batch: list[tuple[Job, Picture]], confidence: bool, source: Storage, writer: Writer
) -> Iterator[tuple[Job, Picture, "Prediction"]]:
    """Predictions of a batch; when it fails, each image alone, so that one does not take the others with it.

    Raises:
        CompileError: no image is to blame for that.
    """
    from madm_utils.compilation import CompileError

    try:
        predictions = predictor([picture.pixels for _, picture in batch], confidence=confidence)
    except CompileError:
        raise
    except (UserError, MemoryError, RuntimeError) as error:
        if not isinstance(error, UserError) and not is_out_of_memory(error):
            raise
        reason = str(error) if isinstance(error, UserError) else ""
    else:
        for (job, picture), prediction in zip(batch, predictions, strict=True):
            yield job, picture, prediction
        return
    # Outside of the `except` block: while the error is known, so is its traceback, which holds the batch's tensors.
    if len(batch) > 1:
        for one in batch:
            yield from segment(predictor, [one], confidence, source, writer)
        return
    ((job, picture),) = batch
    size = f"{picture.pixels.width}x{picture.pixels.height}"
    reason = reason or f"{size} pixels do not fit into memory; --window bounds it"
    writer.fail(job, f"{source.address(job.name)}: {reason}")


def is_out_of_memory(error: Exception) -> bool:
    """Whether a network failed for lack of memory; on a processor torch has no type of its own for that."""
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or should_reduce_batch_size(error)


# --- summary ---------------------------------------------------------------------------------------------------------


def write_summary(target: Storage, plan: Plan, args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write what was done, and how."""
    from madm_utils.hub import versions

    summary = {
        **result,
        "images": len(plan.jobs) + plan.skipped,
        "skipped": plan.skipped,
        "input": args.input,
        "model_path": args.model_path,
        "settings": plan.settings,
        "versions": versions(),
    }
    write_json(target, SUMMARY_FILE, summary)
    target.flush()


if __name__ == "__main__":
    run(main)
