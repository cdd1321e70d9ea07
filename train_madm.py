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

Several modalities in one run, one LoRA each on a shared base: repeat `--task`. Go on after an interruption with the
same command and `--resume_from_checkpoint latest` (docs/training.md).
"""

import copy
import logging
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals

from madm_utils import cli
from madm_utils.cli import UserError
from madm_utils.train_args import parse_train_args, train_parser

# Parsed before the heavy imports, so that `--help` and mistakes on the command line answer at once.
if __name__ == "__main__":
    cli.parse_early(lambda: parse_train_args(train_parser(__doc__), None))

import torch
import torch.distributed as dist
from accelerate import Accelerator, skip_first_batches
from accelerate.logging import get_logger
from accelerate.utils import gather_object, set_seed
from torch import Tensor

from madm_utils.augmentations import mix
from madm_utils.base_model import BaseModelReference, base_fingerprint
from madm_utils.checkpointing import (
    check_resume,
    list_checkpoints,
    load_training_state,
    read_marker,
    remove_unfinished,
)
from madm_utils.compilation import compile_model
from madm_utils.datasets import AdaptationDataset
from madm_utils.distributed import LOCAL_BATCH, BatchScope, host_group, share_statistics, synchronize_statistics
from madm_utils.draws import Draws, draw
from madm_utils.ema import copy_buffers, ema_decay, update_teacher
from madm_utils.engines import OptimizerState, build_accelerator
from madm_utils.evaluation import check_validation_split, validate
from madm_utils.files import writing
from madm_utils.hub import HubUpload
from madm_utils.interruption import StopSignals, ignore_stop_signals
from madm_utils.losses import latent_regression_loss, pixel_cross_entropy
from madm_utils.modeling_madm import MADMModel
from madm_utils.optimization import build_adamw, lr_scheduler, parameter_groups
from madm_utils.pseudo_labels import (
    confident_fraction,
    palette_image,
    palette_table,
    pseudo_label,
    valid_mask,
)
from madm_utils.run_folder import (
    check_output_dir,
    public_settings,
    record,
    run_record,
    save_checkpoint,
    save_final_model,
    write_record,
)
from madm_utils.segmenter import Segmenter
from madm_utils.small_decoder import decoder_fingerprint
from madm_utils.tasks import Task
from madm_utils.tracking import TrainingLog, banner, check_tracker, summary

logger = get_logger(__name__)


# --- the method ------------------------------------------------------------------------------------------------------


def adaptation_pass(
    model: torch.nn.Module,
    teacher: Segmenter | None,
    batch: dict[str, Tensor],
    draws: Draws,
    args: Namespace,
    palette: Tensor,
    accelerator: Accelerator,
    across: BatchScope = LOCAL_BATCH,
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
        across: processes that share the batch in what is decided for it as a whole.

    Returns:
        Scalars to log, and images and labels to look at; all detached.
    """
    student: MADMModel = accelerator.unwrap_model(model)
    label = batch["source_label"]
    pictures = {"source": batch["source_image"].float() / 255}
    if teacher is not None:
        pictures["target"] = batch["target_image"].float() / 255
        # Class mix: source pixels of half of the classes pasted onto the target, then strongly augmented.
        pictures["mixed"] = draws.augment(mix(draws.mix_masks, pictures["source"], pictures["target"]))
    images = {name: image * 2 - 1 for name, image in pictures.items()}
    if args.lplr_loss != "none":
        images["source_palette"] = pictures["source_palette"] = palette_image(label, palette)
    # All that the VAE can know now, in one call and before any activations live.
    with accelerator.autocast():
        latents = student.extractor.encode(torch.cat(list(images.values()))).chunk(len(images))
    latents = dict(zip(images, latents, strict=True))

    if teacher is None:
        scalars, shown = source_branch(model, label, latents, args, accelerator, across)
        return scalars, pictures | shown
    # The last branch alone makes the step, and under DDP alone synchronises: the forward pass decides that.
    with accelerator.no_sync(model):
        scalars, shown = source_branch(model, label, latents, args, accelerator, across)
    mixed_scalars, mixed_shown = mixed_branch(
        model, teacher, label, latents, draws, args, palette, accelerator, across
    )
    return scalars | mixed_scalars, pictures | shown | mixed_shown


def source_branch(
    model: torch.nn.Module,
    label: Tensor,
    latents: dict[str, Tensor],
    args: Namespace,
    accelerator: Accelerator,
    across: BatchScope,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Supervised: cross entropy on the source, and regression of its label's palette image in latent space (LPLR)."""
    with accelerator.autocast():
        output = model(latents=latents["source"])
    losses = {"source_loss": pixel_cross_entropy(output.logits, label, None, args.loss_average, across)}
    shown = {"source_label": label, "source_logits": output.logits.detach()}
    if args.lplr_loss != "none":
        shown["source_decoded"] = output.decoded
        losses["lplr_source_loss"] = args.lplr_weight[0] * latent_regression_loss(
            output.label_latent, latents["source_palette"], valid_mask(label), args.loss_average, across
        )
    accelerator.backward(sum(losses.values()))
    return {name: loss.detach() for name, loss in losses.items()}, shown


def mixed_branch(
    model: torch.nn.Module,
    teacher: Segmenter,
    source_label: Tensor,
    latents: dict[str, Tensor],
    draws: Draws,
    args: Namespace,
    palette: Tensor,
    accelerator: Accelerator,
    across: BatchScope,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Self-training: the student learns source pixels pasted on the target, and the teacher's labels of the rest."""
    student: MADMModel = accelerator.unwrap_model(model)
    # Teacher pass on the clean target: its latent carries more noise early in training (DPLG).
    with torch.no_grad(), accelerator.autocast():
        teacher_logits = student(latents=latents["target"], timestep=draws.teacher_timestep, segmenter=teacher).logits
    threshold = args.pseudo_label_threshold
    label, weight, probability = pseudo_label(teacher_logits, threshold, args.pseudo_label_weight, across)
    mixed_label = mix(draws.mix_masks, source_label, label)
    mixed_weight = mix(draws.mix_masks, torch.ones_like(weight), weight)
    shown = {"pseudo_label": label, "mixed_label": mixed_label, "pseudo_label_weight": weight}
    if args.lplr_loss == "both":
        shown["mixed_palette"] = palette_image(mixed_label, palette)
        with accelerator.autocast():
            label_latent = student.extractor.encode(shown["mixed_palette"])

    # The student's pass comes last, so that its activations live beside nobody else's.
    with accelerator.autocast():
        output = model(latents=latents["mixed"])
    shown |= {"mixed_logits": output.logits.detach(), "teacher_logits": teacher_logits}
    if args.lplr_loss != "none":  # else nothing teaches it to show anything
        shown["decoded"] = output.decoded
    losses = {"target_loss": pixel_cross_entropy(output.logits, mixed_label, mixed_weight, args.loss_average, across)}
    if args.lplr_loss == "both":
        region = valid_mask(mixed_label) * (weight if args.lplr_mask == "pseudo" else mixed_weight)[:, None]
        losses["lplr_target_loss"] = args.lplr_weight[1] * latent_regression_loss(
            output.label_latent, label_latent, region, args.loss_average, across
        )
    total = sum(losses.values())
    if args.train_unet_output_layers and args.lplr_loss == "source":
        # DDP waits for a gradient of every trainable tensor in the synchronising branch; these have none here.
        total = total + 0.0 * output.label_latent.sum()
    accelerator.backward(total)

    scalars = {name: loss.detach() for name, loss in losses.items()} | {"pseudo_label_weight": weight.mean()}
    scalars["confident_fraction"] = confident_fraction(label, probability, threshold, teacher_logits.shape[1])
    return scalars, shown


@dataclass
class Run:
    """The training of one task. Runs of several tasks share VAE and UNet; nothing that one trains is the other's."""

    name: str
    """'' for the only task, otherwise its modality; also the sub-folder of everything it writes."""
    args: Namespace
    task: Task
    model: torch.nn.Module
    teacher: Segmenter | None
    optimizer: torch.optim.Optimizer
    optimizer_state: OptimizerState
    scheduler: torch.optim.lr_scheduler.LRScheduler
    parameters: list[torch.nn.Parameter]
    batches: torch.utils.data.DataLoader
    palette: Tensor
    scope: BatchScope
    fingerprints: dict[str, str]
    """Of the prepared data and the base model."""
    step: int = 0
    scores: dict | None = None
    """Of the newest validation."""


@dataclass
class State:
    """What a whole run counts besides the state of its tasks; stored in every checkpoint."""

    best: dict[str, dict] = field(default_factory=dict)
    """Task -> step and score of the best validation."""
    corrupt_samples: list[str] = field(default_factory=list)
    """Images that could not be decoded, of all processes."""
    unscored: list[str] = field(default_factory=list)
    """Tasks whose validation of the newest step came to no score, e.g. because it was stopped."""


def optimizer_step(run: Run, batches: Iterator, corrupt: set[str], accelerator: Accelerator) -> tuple[dict, dict]:
    """One optimiser step of one task; returns scalars to log and the pictures of the last pass."""
    args, student = run.args, accelerator.unwrap_model(run.model)
    # The teacher follows the student's previous step (mean teacher); at step 0 it is still its copy.
    if run.teacher is not None and run.step > 0:
        update_teacher(run.teacher, student.segmenter, ema_decay(run.step, args.ema_decay))
        if args.teacher_mode == "eval":
            copy_buffers(run.teacher, student.segmenter)
            share_statistics(run.teacher, accelerator)  # every process has its own, a checkpoint holds one

    for index in range(args.gradient_accumulation_steps):
        batch = next(batches)
        corrupt.update(batch.pop("corrupt"))
        classes = batch.pop("source_classes")
        stream = f"{args.seed}-{run.scope.number}-{run.step}-{index}"
        with accelerator.accumulate(run.model):
            draws = draw(batch["source_label"], classes, run.step, stream, args, run.scope)
            scalars, pictures = adaptation_pass(
                run.model, run.teacher, batch, draws, args, run.palette, accelerator, run.scope
            )
            if accelerator.sync_gradients:
                gradient_norm = accelerator.clip_grad_norm_(run.parameters, args.max_grad_norm)
            run.optimizer.step()
            run.optimizer.zero_grad()
    if run.teacher is not None:
        scalars["teacher_timestep"] = pictures["teacher_timestep"] = draws.teacher_timestep
    scalars["gradient_norm"] = gradient_norm
    scalars["learning_rate"] = run.scheduler.get_last_lr()[0]
    run.scheduler.step()
    run.step += 1
    return scalars, pictures


def train(
    runs: list[Run],
    state: State,
    log: TrainingLog,
    stop: StopSignals,
    upload: HubUpload | None,
    accelerator: Accelerator,
) -> int:
    """Optimiser steps up to `max_train_steps`, the tasks taking turns, with logs, pictures and checkpoints.

    Returns:
        0 when done, or the number of the signal that asked to stop; the checkpoint of the last step is then written.
    """
    args = runs[0].args
    done = runs[0].step * args.gradient_accumulation_steps
    streams = [log.loader.timed(skip_first_batches(run.batches, done)) for run in runs]
    corrupt = set(state.corrupt_samples)
    for run in runs if runs[0].step < args.max_train_steps else ():
        if run.name in state.unscored:  # made up for, so that no score is missing from the curve
            look(run, {}, state, log, stop, accelerator)
    while runs[0].step < args.max_train_steps:
        state.unscored = []
        for run, batches in zip(runs, streams, strict=True):
            scalars, pictures = optimizer_step(run, batches, corrupt, accelerator)
            last = run.step == args.max_train_steps
            if run.step % args.logging_steps == 0 or run.step == 1 or last:
                log.scalars(run.step, scalars, run.name, run.task.class_names)
            if (args.validation_steps and run.step % args.validation_steps == 0) or last:
                with log.loader.pause():
                    look(run, pictures, state, log, stop, accelerator)
            del scalars, pictures  # not while the next step needs the memory
        log.advance()

        step, signal = runs[0].step, agree(stop.received or 0, corrupt, state, args, accelerator)
        stopping = signal and step < args.max_train_steps
        if stopping or step % args.checkpointing_steps == 0 or step == args.max_train_steps:
            with log.loader.pause():
                save_checkpoint(runs, state, upload, accelerator)
        if stopping:
            return signal
    return 0


def look(
    run: Run,
    pictures: dict[str, Tensor | int],
    state: State,
    log: TrainingLog,
    stop: StopSignals,
    accelerator: Accelerator,
) -> None:
    """Pictures of the last pass and, where asked for, the score on a labelled split."""
    if run.args.validation_steps and pictures:
        log.pictures(run.step, pictures, run.task, run.name)
    if not run.args.validate_on:
        return
    run.scores = validate(run, run.args.validate_on, accelerator, stop=lambda: stop.received is not None)
    if run.scores is None:
        state.unscored.append(run.name)
    else:
        log.validation(run.step, run.scores, run.name)
        best = state.best.get(run.name)
        if best is None or best["split"] != run.args.validate_on or run.scores["miou"] > best["miou"]:
            state.best[run.name] = {"step": run.step, "split": run.args.validate_on, "miou": run.scores["miou"]}


def agree(signal: int, corrupt: set[str], state: State, args: Namespace, accelerator: Accelerator) -> int:
    """Let every process know what one of them met: a signal to stop, images that cannot be decoded.

    Returns:
        The signal to stop for, 0 for none; the same on all processes.

    Raises:
        UserError: more than `--max_corrupt_samples` images cannot be decoded; on all processes.
    """
    new = len(corrupt) > len(state.corrupt_samples)
    if accelerator.num_processes > 1:
        met = torch.tensor([signal, new])  # in host memory: nobody waits for a device
        dist.all_reduce(met, dist.ReduceOp.MAX, host_group())
        signal, new = met.tolist()
    if new:
        found = set(gather_object(sorted(corrupt)))
        for name in sorted(found - set(state.corrupt_samples)):
            logger.warning(f"cannot decode {name}; another image takes its place")
        corrupt |= found
        state.corrupt_samples = sorted(found)
        if len(found) > args.max_corrupt_samples:
            raise UserError(
                f"{len(found)} images cannot be decoded, --max_corrupt_samples allows {args.max_corrupt_samples}; "
                f"prepare the data again or raise it: {'; '.join(state.corrupt_samples)}"
            )
    return signal


# --- building --------------------------------------------------------------------------------------------------------


def build(settings: list[tuple[Namespace, Task]], checkpoint: Path | None, accelerator: Accelerator) -> list[Run]:
    """The run of every task, prepared for this machine; restored from `checkpoint` where given."""
    runs: list[Run] = []
    for args, task in settings:
        name = task.modality if len(settings) > 1 else ""
        shared = accelerator.unwrap_model(runs[0].model) if runs else None
        runs.append(build_run(name, args, task, shared, checkpoint, accelerator))
    return runs


def build_run(
    name: str, args: Namespace, task: Task, shared: MADMModel | None, checkpoint: Path | None, accelerator: Accelerator
) -> Run:
    """Data, student, teacher and optimiser of one task; VAE and UNet are those of `shared` where given."""
    set_seed(args.seed)  # the same initial weights on every process, and whatever other tasks the run has
    loader = build_loader(args, task, accelerator)
    model = build_model(args, task, shared, accelerator)
    scope = BatchScope.of(accelerator, args.sync_batch_statistics)
    synchronize_statistics(model.segmenter, scope)
    teacher = None
    if not args.source_only:
        teacher = copy.deepcopy(model.segmenter).requires_grad_(False).to(accelerator.device)
        teacher.train(args.teacher_mode == "train")

    # Named before `prepare`, which may change `requires_grad`, wrap the module, or put shards in place of parameters.
    groups = parameter_groups(
        model, args.learning_rate, args.weight_decay, args.head_lr_multiplier, args.lora_lr_multiplier
    )
    optimizer = build_adamw(groups, (args.adam_beta1, args.adam_beta2), args.adam_epsilon, args.use_8bit_adam)
    scheduler = lr_scheduler(args.lr_scheduler, optimizer, args.max_train_steps, args.lr_warmup_steps)
    base = base_fingerprint(model.extractor.vae, model.unet, model.extractor.scheduler)
    fingerprints = loader.dataset.fingerprints | {"base model": base}
    if args.vae_decoder:
        fingerprints["VAE decoder"] = decoder_fingerprint(model.extractor.vae_decoder)
    if checkpoint:
        now = run_record(args, task, fingerprints, accelerator)
        check_resume(checkpoint, name, now, model.config(), logger)
        model.restore(checkpoint / name, teacher)
    if args.compile:
        compile_model(model.extractor, [s for s in (model.segmenter, teacher) if s is not None], accelerator.device)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    prepared = dict(accelerator.unwrap_model(model).named_parameters())
    trained = [[prepared[name] for name in group["names"]] for group in groups]
    optimizer_state = OptimizerState(optimizer, trained)
    palette = palette_table(task.palette, accelerator.device)
    run = Run(
        name, args, task, model, teacher, optimizer, optimizer_state, scheduler, sum(trained, []), loader, palette,
        scope, fingerprints,
    )  # fmt: skip
    if checkpoint:
        run.step = load_training_state(checkpoint / name, optimizer_state, scheduler, accelerator.scaler)
        logger.info(f"resumed {checkpoint / name} at step {run.step}")
    return run


def build_loader(args: Namespace, task: Task, accelerator: Accelerator) -> torch.utils.data.DataLoader:
    """Batches in their order; a sample depends on its number alone, so neither workers nor resuming change it."""
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
        streaming=args.streaming,
    )
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=args.train_batch_size,
        num_workers=args.dataloader_num_workers,
        # Twice as many as PyTorch's: an image that is drawn again, or fetched from elsewhere, must not stop the step.
        prefetch_factor=4 if args.dataloader_num_workers else None,
        collate_fn=AdaptationDataset.collate,
        worker_init_fn=ignore_stop_signals,
        pin_memory=accelerator.device.type == "cuda",
    )


def build_model(args: Namespace, task: Task, shared: MADMModel | None, accelerator: Accelerator) -> MADMModel:
    """The student on its base model, in training mode."""
    model = MADMModel.from_base(
        BaseModelReference(args.pretrained_model_name_or_path, args.revision, args.variant),
        task,
        args.resolution,
        unet_tuning=args.unet_tuning,
        rank=args.rank,
        lora_alpha=args.lora_alpha,
        lora_layers=args.lora_layers,
        train_unet_output_layers=args.train_unet_output_layers,
        noise_in_latent_dtype=args.noise_in_latent_dtype,
        frozen_dtype={"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32),
        quantize_base=args.quantize_base,
        vae_decoder=args.vae_decoder,
        shared=shared,
        projection_channels=args.projection_channels,
        bottleneck_channels=args.bottleneck_channels,
        head_channels=args.head_channels,
        head_resolution=args.head_resolution,
    ).train()
    if args.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
        model.segmenter.enable_gradient_checkpointing()
    return model


# --- running ---------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit code."""
    settings = parse_train_args(train_parser(__doc__), argv)
    args = settings[0][0]  # what holds for the whole run is the same in all of them
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO, stream=sys.stdout)
    check_tracker(args.report_to)
    checkpoint = check_output_dir(args)
    accelerator = build_accelerator(args, len(settings))
    runs = build(settings, checkpoint, accelerator)
    state = State(**read_marker(checkpoint)["state"]) if checkpoint else State()
    for run in runs if args.validate_on else ():
        check_validation_split(run, args.validate_on)
    if args.dry_run:
        banner(runs, args, accelerator)
        logger.info("dry run: everything is there and fits together; nothing was written")
        return 0
    upload = None
    if args.push_to_hub and accelerator.is_main_process:
        names = [run.name for run in runs]
        upload = HubUpload(
            args.hub_model_id, args.hub_private_repo, args.hub_token, args.output_dir, args.hub_strategy, names
        )
        repo_id = upload.start()
        for own, _ in settings:
            own.hub_model_id = repo_id  # with the owner's name, for the card
    output_dir = Path(args.output_dir)
    accelerator.wait_for_everyone()
    with writing(output_dir):
        if accelerator.is_main_process:
            remove_unfinished(output_dir)
            for run in runs:
                write_record(output_dir / run.name, record(run, accelerator))
        pairs = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps * len(runs)
        log = TrainingLog(
            output_dir, accelerator, public_settings(args), args.max_train_steps, runs[0].step, pairs,
            args.report_to, args.logging_dir,
        )  # fmt: skip
    banner(runs, args, accelerator)
    try:
        with StopSignals(args.preempt_signal) as stop:
            signal = train(runs, state, log, stop, upload, accelerator)
            if not signal:
                if log.first_step == args.max_train_steps:  # resumed at its end: nothing was trained and looked at
                    for run in runs:
                        look(run, {}, state, log, stop, accelerator)
                log.close()
                save_final_model(runs, accelerator)
                summary(runs, log, state, accelerator)
        log.close()
        accelerator.end_training()
        if signal:
            logger.info(stopped(signal, runs[0].step, output_dir))
        elif upload is not None and stop.received:
            logger.warning(f"told to stop before the upload; the model is complete: {upload.final_command()}")
        elif upload is not None:
            print(f"uploaded to {upload.finish()}")
    finally:
        log.close()
        if upload is not None:
            upload.close()
    return 128 + signal if signal else 0


def stopped(signal: int, step: int, output_dir: Path) -> str:
    """What to say when a signal has ended the training."""
    checkpoints = list_checkpoints(output_dir)
    message = f"stopped by {Signals(signal).name} after step {step}"
    if not checkpoints:
        return f"{message}; no checkpoint could be written, start again"
    return f"{message}; go on from {checkpoints[-1].name} with the same command and --resume_from_checkpoint latest"


if __name__ == "__main__":
    cli.run(main)
