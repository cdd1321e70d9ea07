#!/usr/bin/env python
"""Train MADM: adapt a segmentation model from labelled RGB to a modality without labels (arXiv 2410.21708).

A small run on a laptop, after `python prepare_datasets.py --dataset synthetic --output_dir data`:

    python train_madm.py --task synthetic_to_depth --data_dir data \\
        --pretrained_model_name_or_path BASE --output_dir outputs/depth --max_train_steps 200

The published recipe, on two GPUs (recipes/cityscapes_to_deliver_depth.sh):

    accelerate launch --config_file accelerate_configs/multi_gpu.yaml train_madm.py \\
        --task cityscapes_to_deliver_depth --data_dir data \\
        --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 \\
        --unet_tuning full --mixed_precision fp16 --noise_in_latent_dtype --output_dir outputs/depth

Go on after an interruption with the same command and `--resume_from_checkpoint latest`.
"""

import copy
import json
import logging
import os
import random
import shutil
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from madm_utils import cli
from madm_utils.args import check_precision, parse_train_args, train_parser
from madm_utils.cli import UserError

# Parsed before the heavy imports, so that `--help` and mistakes on the command line answer at once.
if __name__ == "__main__":
    cli.parse_early(lambda: parse_train_args(train_parser(__doc__), None))

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.logging import get_logger
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, set_seed
from torch import Tensor
from tqdm import tqdm

from madm_utils.augmentations import class_mix_masks, mix, strong_augment
from madm_utils.base_model import BaseModelReference
from madm_utils.checkpointing import (
    check_resume,
    list_checkpoints,
    load_training_state,
    publish_folder,
    remove_unfinished,
    resolve_checkpoint,
    rotate_checkpoints,
    save_training_state,
)
from madm_utils.datasets import AdaptationDataset
from madm_utils.ema import copy_buffers, ema_decay, update_teacher
from madm_utils.files import check_writable, replacing
from madm_utils.hub import push_to_hub, versions, write_model_card
from madm_utils.losses import latent_regression_loss, pixel_cross_entropy
from madm_utils.modeling_madm import CONFIG_NAME, MADMModel
from madm_utils.optimization import build_adamw, lr_scheduler, parameter_groups
from madm_utils.pseudo_labels import dplg_timestep, palette_image, palette_table, pseudo_label, valid_mask
from madm_utils.segmenter import Segmenter
from madm_utils.tasks import Task
from madm_utils.visualization import colorize, picture_grid

logger = get_logger(__name__)


# --- the method ------------------------------------------------------------------------------------------------------


@dataclass
class Draws:
    """Every random choice of one pass over a batch, except dropout (torch's global generator)."""

    teacher_timestep: int
    mix_masks: Tensor
    """(B, H, W) bool, True where the source pixel is pasted."""
    augment: Callable[[Tensor], Tensor]
    """Strong augmentation of the mixed images (B, 3, H, W) in [0, 1]."""


def draw(source_label: Tensor, step: int, stream: str, args: Namespace) -> Draws:
    """Make the draws of one pass. They depend on `stream` (seed, process, step, pass) alone, so a resumed run repeats
    them without any stored generator."""
    rng = random.Random(stream)
    torch.manual_seed(rng.getrandbits(63))
    timestep = dplg_timestep(step, args.dplg_timestep, args.dplg_end_step, rng)
    masks = class_mix_masks(source_label, np.random.default_rng(rng.getrandbits(63)), args.class_mix_scope)

    def augment(images: Tensor) -> Tensor:
        return strong_augment(images, rng, args.color_jitter_probability, args.blur_probability)

    return Draws(timestep, masks, augment)


def adaptation_pass(
    model: torch.nn.Module,
    teacher: Segmenter | None,
    batch: dict[str, Tensor],
    draws: Draws,
    args: Namespace,
    palette: Tensor,
    accelerator: Accelerator,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One pass of MADM over a batch: four losses, gradients accumulated in the model.

    Each branch is back-propagated at once, so that only one branch's activations live (and a LoRA adapter could be
    switched between the branches without losing gradients).

    Args:
        model: the student, as `accelerator.prepare` returns it.
        teacher: the mean teacher's segmenter; None trains on the source only.
        batch: `source_image`, `target_image` uint8 (B, 3, H, W); `source_label` int64 (B, H, W).
        draws: the random choices.
        args: settings of the method.
        palette: colours of the classes, from `palette_table`.
        accelerator: for precision, gradient scaling and synchronisation.

    Returns:
        Scalars to log, and images and labels to look at; all detached.
    """
    if teacher is None:
        return source_branch(model, batch, args, palette, accelerator)
    # Under DDP the last branch alone synchronises; the forward pass decides that, so it is inside too.
    with accelerator.no_sync(model):
        scalars, pictures = source_branch(model, batch, args, palette, accelerator)
    mixed_scalars, mixed_pictures = mixed_branch(model, teacher, batch, draws, args, palette, accelerator)
    return scalars | mixed_scalars, pictures | mixed_pictures


def source_branch(
    model: torch.nn.Module, batch: dict[str, Tensor], args: Namespace, palette: Tensor, accelerator: Accelerator
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Supervised: cross entropy on the source, and regression of its label's palette image in latent space (LPLR)."""
    student: MADMModel = accelerator.unwrap_model(model)
    source, source_label = batch["source_image"].float() / 255, batch["source_label"]

    output = model(source)
    losses = {"source_loss": pixel_cross_entropy(output.logits, source_label, average=args.loss_average)}
    if args.lplr_loss != "none":
        with accelerator.autocast():
            label_latent = student.extractor.encode(palette_image(source_label, palette))
        losses["lplr_source_loss"] = args.lplr_weight[0] * latent_regression_loss(
            output.label_latent, label_latent, valid_mask(source_label), args.loss_average
        )
    accelerator.backward(sum(losses.values()))

    pictures = {"source": source, "source_label": source_label, "source_logits": output.logits.detach()}
    return {name: loss.detach() for name, loss in losses.items()}, pictures


def mixed_branch(
    model: torch.nn.Module,
    teacher: Segmenter,
    batch: dict[str, Tensor],
    draws: Draws,
    args: Namespace,
    palette: Tensor,
    accelerator: Accelerator,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Self-training: the student learns source pixels pasted on the target, and the teacher's labels of the rest."""
    student: MADMModel = accelerator.unwrap_model(model)
    source, source_label = batch["source_image"].float() / 255, batch["source_label"]
    target = batch["target_image"].float() / 255

    # Class mix: source pixels of half of the classes pasted onto the target, then strongly augmented.
    mixed = draws.augment(mix(draws.mix_masks, source, target))

    # Mixed pass of the student.
    output = model(mixed)

    # Teacher pass on the clean target: its latent carries more noise early in training (DPLG).
    with torch.no_grad(), accelerator.autocast():
        teacher_logits = student(target, draws.teacher_timestep, segmenter=teacher).logits
    label, weight, _ = pseudo_label(teacher_logits, args.pseudo_label_threshold, args.pseudo_label_weight)
    mixed_label = mix(draws.mix_masks, source_label, label)
    mixed_weight = mix(draws.mix_masks, torch.ones_like(weight), weight)

    losses = {"target_loss": pixel_cross_entropy(output.logits, mixed_label, mixed_weight, args.loss_average)}
    if args.lplr_loss == "both":
        with accelerator.autocast():
            label_latent = student.extractor.encode(palette_image(mixed_label, palette))
        region = valid_mask(mixed_label) * (weight if args.lplr_mask == "pseudo" else mixed_weight)[:, None]
        losses["lplr_target_loss"] = args.lplr_weight[1] * latent_regression_loss(
            output.label_latent, label_latent, region, args.loss_average
        )
    total = sum(losses.values())
    if args.train_unet_output_layers and args.lplr_loss == "source":
        # DDP waits for a gradient of every trainable tensor in the synchronising branch; these have none here.
        total = total + 0.0 * output.label_latent.sum()
    accelerator.backward(total)

    pictures = {"target": target, "pseudo_label": label, "mixed": mixed, "mixed_label": mixed_label}
    pictures |= {"decoded": output.decoded, "teacher_logits": teacher_logits, "mixed_logits": output.logits.detach()}
    scalars = {name: loss.detach() for name, loss in losses.items()}
    return scalars | {"pseudo_label_weight": weight.mean()}, pictures


@dataclass
class Run:
    """Everything that a training run consists of."""

    model: torch.nn.Module
    teacher: Segmenter | None
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    parameters: list[torch.nn.Parameter]
    batches: torch.utils.data.DataLoader
    step: int = 0


def train(run: Run, args: Namespace, task: Task, accelerator: Accelerator) -> None:
    """Optimiser steps from `run.step` to `args.max_train_steps`, with logs, pictures and checkpoints."""
    student: MADMModel = accelerator.unwrap_model(run.model)
    palette = palette_table(task.palette, accelerator.device)
    batches = iter(skip_first_batches(run.batches, run.step * args.gradient_accumulation_steps))
    progress = tqdm(
        total=args.max_train_steps, initial=run.step, desc="training", unit="step",
        disable=not accelerator.is_main_process,
    )  # fmt: skip
    while run.step < args.max_train_steps:
        # The teacher follows the student's previous step (mean teacher); at step 0 it is still its copy.
        if run.teacher is not None and run.step > 0:
            update_teacher(run.teacher, student.segmenter, ema_decay(run.step, args.ema_decay))
            if args.teacher_mode == "eval":
                copy_buffers(run.teacher, student.segmenter)

        for index in range(args.gradient_accumulation_steps):
            batch = next(batches)
            stream = f"{args.seed}-{accelerator.process_index}-{run.step}-{index}"
            with accelerator.accumulate(run.model):
                draws = draw(batch["source_label"], run.step, stream, args)
                scalars, pictures = adaptation_pass(run.model, run.teacher, batch, draws, args, palette, accelerator)
                if accelerator.sync_gradients:
                    gradient_norm = accelerator.clip_grad_norm_(run.parameters, args.max_grad_norm)
                run.optimizer.step()
                run.optimizer.zero_grad()
        scalars |= {"gradient_norm": gradient_norm, "teacher_timestep": draws.teacher_timestep}
        scalars["learning_rate"] = run.scheduler.get_last_lr()[0]
        run.scheduler.step()
        run.step += 1

        progress.update()
        last = run.step == args.max_train_steps
        if run.step % args.logging_steps == 0 or run.step == 1 or last:
            log_scalars(scalars, run.step, progress, accelerator)
        if args.validation_steps and (run.step % args.validation_steps == 0 or last):
            log_pictures(pictures, run.step, args, task, accelerator)
        if run.step % args.checkpointing_steps == 0:
            save_checkpoint(run, args, accelerator)
    progress.close()


# --- building --------------------------------------------------------------------------------------------------------


def build(args: Namespace, task: Task, accelerator: Accelerator) -> Run:
    """Data, student, teacher and optimiser, prepared for this machine; restored when resuming."""
    passes = args.max_train_steps * args.gradient_accumulation_steps
    dataset = AdaptationDataset(
        args.data_dir,
        task,
        args.resolution,
        num_samples=passes * args.train_batch_size * accelerator.num_processes,
        seed=args.seed,
        rare_class_sampling=args.rare_class_sampling,
        rare_class_temperature=args.rare_class_temperature,
        rare_class_min_pixels=args.rare_class_min_pixels,
        max_train_samples=args.max_train_samples,
        target=not args.source_only,
    )
    # A sample depends on its number alone, so the order is fixed here and neither workers nor resuming change it.
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=args.train_batch_size,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    base = BaseModelReference(args.pretrained_model_name_or_path, args.revision, args.variant)
    frozen_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    model = MADMModel.from_base(
        base,
        task,
        args.resolution,
        unet_tuning=args.unet_tuning,
        rank=args.rank,
        lora_alpha=args.lora_alpha,
        train_unet_output_layers=args.train_unet_output_layers,
        noise_in_latent_dtype=args.noise_in_latent_dtype,
        frozen_dtype=frozen_dtype,
        projection_channels=args.projection_channels,
        bottleneck_channels=args.bottleneck_channels,
        head_channels=args.head_channels,
    ).train()
    if args.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    teacher = None
    if not args.source_only:
        teacher = copy.deepcopy(model.segmenter).requires_grad_(False).to(accelerator.device)
        teacher.train(args.teacher_mode == "train")

    # Named before `prepare`, which may change `requires_grad` or wrap the module.
    groups = parameter_groups(model, args.learning_rate, args.weight_decay, args.head_lr_multiplier)
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = build_adamw(groups, (args.adam_beta1, args.adam_beta2), args.adam_epsilon, args.use_8bit_adam)
    scheduler = lr_scheduler(args.lr_scheduler, optimizer, args.max_train_steps, args.lr_warmup_steps)
    checkpoint = None
    if args.resume_from_checkpoint:
        checkpoint = resolve_checkpoint(Path(args.output_dir), args.resume_from_checkpoint)
        check_resume(checkpoint, run_record(args, task, accelerator), model.config(), logger)
        model.restore(checkpoint, teacher)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    run = Run(model, teacher, optimizer, scheduler, parameters, loader)
    if checkpoint:
        run.step = load_training_state(checkpoint, optimizer, scheduler, accelerator.scaler)
        logger.info(f"resumed {checkpoint} at step {run.step}")
    return run


# --- saving and logging ----------------------------------------------------------------------------------------------


def save_checkpoint(run: Run, args: Namespace, accelerator: Accelerator) -> None:
    """Publish `checkpoint-{step}`, then delete old ones. Call it on every rank; the main one writes."""
    if accelerator.is_main_process:
        output_dir = Path(args.output_dir)

        def write(folder: Path) -> None:
            accelerator.unwrap_model(run.model).save_pretrained(folder, run.teacher)
            save_training_state(folder, run.step, run.optimizer, run.scheduler, accelerator.scaler)

        newest = output_dir / f"checkpoint-{run.step}"
        publish_folder(newest, write)
        rotate_checkpoints(newest, args.checkpoints_total_limit)
    accelerator.wait_for_everyone()


def save_final_model(run: Run, args: Namespace, task: Task, accelerator: Accelerator) -> None:
    """Write the trained model at the top of the run folder, each part moved there once it is complete."""
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    output_dir = Path(args.output_dir)
    model: MADMModel = accelerator.unwrap_model(run.model)
    staging = output_dir / f".final.tmp-{os.getpid()}"
    model.save_pretrained(staging, run.teacher)
    # The configuration goes first and comes last: a folder that has it has everything.
    (output_dir / CONFIG_NAME).unlink(missing_ok=True)
    for path in sorted(staging.iterdir(), key=lambda path: path.suffix == ".json"):
        if (output_dir / path.name).is_dir():
            shutil.rmtree(output_dir / path.name)
        path.replace(output_dir / path.name)
    staging.rmdir()
    write_model_card(output_dir, task, args.pretrained_model_name_or_path, vars(args))
    print(f"trained model: {output_dir}")


def log_scalars(scalars: dict, step: int, progress: tqdm, accelerator: Accelerator) -> None:
    """Log the mean over the processes; one transfer from the device."""
    values = torch.stack([torch.as_tensor(v, device=accelerator.device).float().mean() for v in scalars.values()])
    values = dict(zip(scalars, accelerator.reduce(values, "mean").tolist(), strict=True))
    accelerator.log({f"train/{name}": value for name, value in values.items()}, step=step)
    shown = {name.removesuffix("_loss"): f"{v:.3f}" for name, v in values.items() if name.endswith("_loss")}
    progress.set_postfix(shown | {"lr": f"{values['learning_rate']:.1e}"})


def log_pictures(
    pictures: dict[str, Tensor], step: int, args: Namespace, task: Task, accelerator: Accelerator
) -> None:
    """Write `validation/step-{step}.png`: what went into the first pair of the batch and what came out."""
    if not accelerator.is_main_process:
        return

    def shown(name: str) -> np.ndarray:
        value = pictures[name][0]
        if name.endswith("_logits"):
            value = value.argmax(dim=0)
        if value.dim() == 2:
            return colorize(value.cpu().numpy().astype(np.uint8), task.palette)
        value = value.float() / 2 + 0.5 if name == "decoded" else value
        return (value.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()

    names = [name for name in pictures if name != "teacher_logits"]
    captions = [name.replace("_", " ").replace("logits", "prediction") for name in names]
    legend = dict(zip(task.class_names, task.palette, strict=True))
    grid = picture_grid([[shown(name) for name in names]], captions, legend=legend, cell_width=256)
    folder = Path(args.output_dir) / "validation"
    folder.mkdir(exist_ok=True)
    grid.save(folder / f"step-{step}.png")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"validation": np.asarray(grid)[None]}, step=step, dataformats="NHWC")


def check_output_dir(args: Namespace) -> None:
    """Refuse a folder that holds another run or cannot be written, before anything is loaded."""
    output_dir = Path(args.output_dir)
    check_writable(output_dir)
    checkpoints = list_checkpoints(output_dir)
    # A run that ended before its first checkpoint left a record and logs, nothing to lose.
    holds_run = (output_dir / CONFIG_NAME).exists() or bool(checkpoints)
    if args.resume_from_checkpoint:
        checkpoint = resolve_checkpoint(output_dir, args.resume_from_checkpoint)
        if holds_run and checkpoint.parent != output_dir.resolve():
            raise UserError(
                f"--output_dir {output_dir} already holds a run, and {checkpoint} belongs to another one; give a new "
                "--output_dir to branch off from that checkpoint"
            )
    elif holds_run:
        go_on = ", or go on with it: --resume_from_checkpoint latest" if checkpoints else ""
        raise UserError(
            f"--output_dir {output_dir} already holds a run; give another folder, or delete this one{go_on}"
        )


def check_tracker(name: str) -> None:
    """Refuse a tracker that does not exist or is not installed: accelerate would drop the latter and log nothing."""
    known = sorted(LOGGER_TYPE_TO_CLASS)
    if name != "none" and name not in known:
        raise UserError(f"--report_to {name} is unknown; one of {', '.join(known)}, or none")
    if name != "none" and name not in map(str, get_available_trackers()):
        raise UserError(f"--report_to {name} is not installed: pip install {name}, or use tensorboard or none")


def write_record(args: Namespace, task: Task, accelerator: Accelerator) -> None:
    """Write `run.json`, and remove what killed processes left half-written."""
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    remove_unfinished(output_dir)
    with replacing(output_dir / "run.json") as temporary:
        record = run_record(args, task, accelerator)
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def run_record(args: Namespace, task: Task, accelerator: Accelerator) -> dict:
    """What `run.json` holds: the merged settings, the task, and the versions."""
    return {
        "settings": public_settings(args),
        "task": task.to_dict(),
        "mixed_precision": accelerator.mixed_precision,
        "num_processes": accelerator.num_processes,
        "versions": versions(),
    }


def public_settings(args: Namespace) -> dict:
    """The settings without the token."""
    return {key: value for key, value in vars(args).items() if key != "hub_token"}


def start_trackers(args: Namespace, accelerator: Accelerator) -> None:
    """Hand the settings to the trackers, in the scalar form they accept."""
    plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in public_settings(args).items()}
    accelerator.init_trackers("madm", config=plain)


def banner(run: Run, args: Namespace, task: Task, accelerator: Accelerator) -> None:
    """Log what is about to be trained."""
    trainable = sum(p.numel() for p in run.parameters)
    pairs = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    logger.info(f"***** {'source-only' if args.source_only else 'MADM'} training: {task.name} *****")
    logger.info(f"  {run.batches.dataset.num_source} source and {run.batches.dataset.num_target} target images")
    logger.info(f"  steps {run.step} to {args.max_train_steps}, {pairs} pairs of {args.resolution} pixels per step")
    logger.info(f"  UNet tuning {args.unet_tuning}, {trainable:,} trainable parameters")
    logger.info(f"  {accelerator.num_processes} x {accelerator.device.type}, precision {accelerator.mixed_precision}")


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    args, task = parse_train_args(train_parser(__doc__), argv)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO, stream=sys.stdout)
    has_gpu = torch.accelerator.is_available()
    # `accelerate launch` hands its config's precision on through the environment.
    check_precision(args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), has_gpu)
    check_tracker(args.report_to)
    check_output_dir(args)
    # `forward_sync_buffers`, its successor, would still copy BatchNorm statistics between the processes at the start.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    accelerator = Accelerator(
        # Without it, several processes on a machine without GPU would not form a group, and each write the results.
        cpu=not has_gpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, str(Path(args.output_dir) / args.logging_dir)),
        # BatchNorm statistics stay per process, as published; synchronised gradients are views of DDP's buckets.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    set_seed(args.seed)  # the same initial weights on every process
    run = build(args, task, accelerator)
    write_record(args, task, accelerator)
    if args.report_to != "none":
        start_trackers(args, accelerator)
    banner(run, args, task, accelerator)
    started = time.monotonic()
    train(run, args, task, accelerator)
    save_final_model(run, args, task, accelerator)
    logger.info(f"done in {time.monotonic() - started:.0f} s")
    accelerator.end_training()
    if args.push_to_hub and accelerator.is_main_process:
        print(f"uploaded to {push_to_hub(Path(args.output_dir), args.hub_model_id, args.hub_token)}")


if __name__ == "__main__":
    cli.run(main)
