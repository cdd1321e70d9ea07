"""Command line of `train_madm.py`: one place per flag, with its default, unit and published value.

Defaults are layered: built-in default < the task's hyper-parameters < an explicit flag.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from madm_utils.args import (
    add_compile_argument,
    add_data_arguments,
    add_task_arguments,
    below_one,
    formatter,
    fraction,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    preempt_signal,
    seed,
)
from madm_utils.cli import UserError
from madm_utils.tasks import Task, load_task

SCHEDULERS = ("multistep", "constant", "constant_with_warmup", "linear", "cosine", "polynomial")


def train_parser(description: str) -> argparse.ArgumentParser:
    """The parser of `train_madm.py`, with built-in defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False)
    add_task_arguments(parser, several=True)
    _add_data(parser.add_argument_group("data"))
    _add_model(parser.add_argument_group("model"))
    _add_training(parser.add_argument_group("optimisation"))
    _add_method(parser.add_argument_group("method (defaults as published; see docs/fidelity.md)"))
    _add_run(parser.add_argument_group("run, checkpoints and logging"))
    _add_hub(parser.add_argument_group("Hub"))
    return parser


def _comma_separated(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"expected names with commas between them, got '{text}'")
    return names


def _add_data(group) -> None:
    add_data_arguments(group)
    group.add_argument("--max_train_samples", type=positive_int, help="use N images of each domain, evenly spaced")
    group.add_argument("--dataloader_num_workers", type=non_negative_int, default=2, help="loader processes")
    group.add_argument(
        "--rare_class_sampling", action=argparse.BooleanOptionalAction, default=True,
        help="draw source images by rare class (DAFormer); published: on",
    )  # fmt: skip
    group.add_argument(
        "--max_corrupt_samples", type=non_negative_int, default=10,
        help="replace up to N images that cannot be decoded, then stop and list them",
    )  # fmt: skip
    group.add_argument("--rare_class_temperature", type=positive_float, default=0.01, help="of the class softmax")
    group.add_argument(
        "--rare_class_min_pixels", type=non_negative_int, default=3000,
        help="an image is a candidate for a class with more pixels than this; its crop needs half",
    )  # fmt: skip


def _add_model(group) -> None:
    group.add_argument(
        "--pretrained_model_name_or_path", required=True,
        help="Stable Diffusion 1.x/2.x in diffusers layout: Hub id or folder",
    )  # fmt: skip
    group.add_argument("--revision", help="revision of the base model on the Hub")
    group.add_argument("--variant", help="weight variant of the base model, e.g. fp16")
    group.add_argument("--resolution", type=positive_int, help="side of the crops, a multiple of 64; default: task's")
    group.add_argument(
        "--unet_tuning", choices=("lora", "full"), default="lora", help="train a LoRA or the whole UNet (published)"
    )
    group.add_argument(
        "--quantize_base", choices=("nf4", "int8", "none"), default="none",
        help="store the frozen UNet under a LoRA in 4 or 8 bits (bitsandbytes, needs a GPU)",
    )  # fmt: skip
    group.add_argument("--rank", type=positive_int, default=32, help="rank of the LoRA")
    group.add_argument("--lora_alpha", type=positive_int, help="alpha of the LoRA; default: the rank")
    group.add_argument(
        "--lora_layers", type=_comma_separated, metavar="NAME,NAME",
        help="layers of the UNet that the LoRA changes, by the ends of their names;"
        " default: all in its blocks. to_k,to_q,to_v,to_out.0 are those of its attention",
    )  # fmt: skip
    group.add_argument(
        "--train_unet_output_layers", action="store_true",
        help="with --unet_tuning full, also train conv_norm_out and conv_out, which the published code freezes",
    )  # fmt: skip
    group.add_argument("--projection_channels", type=positive_int, default=512, help="of UNet features; / 4 for RGB")
    group.add_argument("--bottleneck_channels", type=positive_int, default=128, help="inside the projections")
    group.add_argument("--head_channels", type=positive_int, default=256, help="width of the DAFormer head")
    group.add_argument(
        "--head_resolution", type=int, choices=(1, 2, 4), default=1,
        help="approximation: the head and the projection of the decoded image work at 1/N of the image; published: 1",
    )  # fmt: skip
    group.add_argument(
        "--vae_decoder", metavar="PATH_OR_ID",
        help="approximation: decode label latents with this small AutoencoderTiny, e.g. madebyollin/taesd; published:"
        " the base model's own decoder",
    )  # fmt: skip


def _add_training(group) -> None:
    group.add_argument("--train_batch_size", type=positive_int, default=1, help="image pairs per process and pass")
    group.add_argument("--gradient_accumulation_steps", type=positive_int, default=1, help="passes per step")
    group.add_argument("--max_train_steps", type=positive_int, default=10000, help="optimiser steps")
    group.add_argument("--learning_rate", type=positive_float, default=5e-6, help="peak, see the multipliers")
    group.add_argument(
        "--head_lr_multiplier", type=positive_float, default=1.0,
        help="learning rate of conditioning, projections and head relative to --learning_rate; published: 1",
    )  # fmt: skip
    group.add_argument(
        "--lora_lr_multiplier", type=positive_float, default=10.0,
        help="learning rate of the LoRA relative to --learning_rate, which is one for the whole UNet",
    )  # fmt: skip
    group.add_argument(
        "--lr_scheduler", choices=SCHEDULERS, default="multistep",
        help="multistep: warm-up, then x0.1 at 88.9%% and x0.01 at 96.3%% (published)",
    )  # fmt: skip
    group.add_argument(
        "--lr_warmup_steps",
        type=non_negative_int,
        help="default: 0.27%% of the steps for multistep (published), 0 for others",
    )
    group.add_argument("--weight_decay", type=non_negative_float, default=0.05, help="none on norms and biases")
    group.add_argument("--adam_beta1", type=below_one, default=0.9, help="AdamW")
    group.add_argument("--adam_beta2", type=below_one, default=0.999, help="AdamW")
    group.add_argument("--adam_epsilon", type=positive_float, default=1e-8, help="AdamW")
    group.add_argument("--max_grad_norm", type=positive_float, default=0.01, help="clip the joint gradient norm")
    group.add_argument(
        "--mixed_precision", choices=("no", "fp16", "bf16"),
        help="bf16 advised, fp16 published; default: of the accelerate config",
    )  # fmt: skip
    group.add_argument("--gradient_checkpointing", action="store_true", help="recompute UNet and head, saves memory")
    add_compile_argument(group)
    group.add_argument("--use_8bit_adam", action="store_true", help="8-bit moments of bitsandbytes")
    group.add_argument(
        "--sync_batch_statistics", action="store_true",
        help="BatchNorm, pseudo-label weight and class mix over the batch of all processes; published: of each",
    )  # fmt: skip
    group.add_argument("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and later")


def _add_method(group) -> None:
    group.add_argument("--source_only", action="store_true", help="no adaptation: supervised losses on source only")
    group.add_argument(
        "--dplg_timestep", type=non_negative_int, nargs="+", default=[60, 61],
        help="noise level of the teacher at step 0: T, or LOW HIGH to draw from (both included); 0 turns DPLG off",
    )  # fmt: skip
    group.add_argument("--dplg_end_step", type=non_negative_int, default=5000, help="the noise has decayed to 0 here")
    group.add_argument(
        "--lplr_loss", choices=("source", "both", "none"), default="both", help="latent regression on which images"
    )
    group.add_argument(
        "--lplr_weight", type=non_negative_float, nargs="+", default=[1.0, 1.0],
        help="weight of latent regression: one number, or SOURCE MIXED",
    )  # fmt: skip
    group.add_argument("--pseudo_label_threshold", type=fraction, default=0.968, help="of a confident pixel")
    group.add_argument(
        "--pseudo_label_weight", choices=("batch", "image", "pixel"), default="batch",
        help="weight pseudo labels by the confident fraction of the local batch (published) or image, or per pixel",
    )  # fmt: skip
    group.add_argument("--ema_decay", type=fraction, default=0.999, help="of the mean teacher, after its ramp")
    group.add_argument(
        "--teacher_mode", choices=("train", "eval"), default="train",
        help="train: batch statistics and dropout in the teacher (published); eval: neither",
    )  # fmt: skip
    group.add_argument(
        "--class_mix_scope", choices=("batch", "image"), default="batch",
        help="classes to choose from: whole local batch with 255 (published), or each image's own without",
    )  # fmt: skip
    group.add_argument(
        "--lplr_mask", choices=("pseudo", "mixed"), default="pseudo",
        help="weight of latent regression on mixed images: pseudo-label weight everywhere (published), or 1 on pasted"
        " source pixels",
    )  # fmt: skip
    group.add_argument(
        "--loss_average", choices=("all", "valid"), default="all",
        help="average losses over all pixels, ignored ones included (published), or over labelled ones",
    )  # fmt: skip
    group.add_argument("--color_jitter_probability", type=fraction, default=0.8, help="of the mixed images")
    group.add_argument("--blur_probability", type=fraction, default=0.5, help="of the mixed images")
    group.add_argument(
        "--noise_in_latent_dtype", action="store_true",
        help="round the noise level to the precision of the latents, as published under fp16 (sigma +7%% at t=0)",
    )  # fmt: skip


def _add_run(group) -> None:
    group.add_argument("--output_dir", required=True, help="run folder: checkpoints, logs, final model")
    group.add_argument("--seed", type=seed, default=42, help="of every random draw")
    group.add_argument("--dry_run", action="store_true", help="build everything, print the plan, stop before step 1")
    group.add_argument("--checkpointing_steps", type=positive_int, default=1000, help="save every N steps")
    group.add_argument("--checkpoints_total_limit", type=positive_int, help="keep only the newest N checkpoints")
    group.add_argument(
        "--resume_from_checkpoint", metavar="PATH",
        help="checkpoint folder, 'latest', or 'latest-valid' to pass over damaged ones",
    )  # fmt: skip
    group.add_argument(
        "--preempt_signal", metavar="NAME", type=preempt_signal,
        help="besides TERM and INT, save and stop on this signal, e.g. USR1 (sbatch --signal=USR1@120)",
    )  # fmt: skip
    group.add_argument("--validation_steps", type=positive_int, help="write a picture of the batch every N steps")
    group.add_argument(
        "--validate_on", metavar="SPLIT",
        help="score on this labelled target split every --validation_steps and at the end; choosing by it is no longer"
        " unsupervised",
    )  # fmt: skip
    group.add_argument("--logging_steps", type=positive_int, default=10, help="log losses every N steps")
    group.add_argument("--report_to", default="tensorboard", help="tensorboard, wandb, ... of accelerate, or none")
    group.add_argument("--logging_dir", default="logs", help="of the trackers, inside --output_dir")


def _add_hub(group) -> None:
    group.add_argument("--push_to_hub", action="store_true", help="upload the final model")
    group.add_argument("--hub_model_id", help="repository; default: the name of --output_dir")
    group.add_argument("--hub_private_repo", action="store_true", help="create the repository as private")
    group.add_argument(
        "--hub_strategy", choices=("end", "every_checkpoint"), default="end",
        help="upload the final model only, or every checkpoint too, in the background",
    )  # fmt: skip
    group.add_argument("--hub_token", help="default: the token of `hf auth login`")


# With several tasks these hold for the whole run; the others may differ by each task's hyper-parameters.
_RUN_WIDE = ("revision", "variant", "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "seed",
             "unet_tuning", "quantize_base", "mixed_precision", "gradient_checkpointing", "compile",
             "sync_batch_statistics", "source_only", "max_corrupt_samples", "checkpointing_steps",
             "checkpoints_total_limit", "preempt_signal", "validation_steps", "validate_on", "logging_steps",
             "report_to", "logging_dir")  # fmt: skip


def parse_train_args(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> list[tuple[argparse.Namespace, Task]]:
    """Parse, merge with each task's hyper-parameters, and validate: the settings of every task of the run.

    Raises:
        UserError: a task is unknown, its hyper-parameters are no flags, or the tasks do not go together. Other
            mistakes end in `parser.error`.
    """
    first, _ = parser.parse_known_args(argv)
    chosen = [(name, None) for name in first.task or ()] + [(None, config) for config in first.task_config or ()]
    runs = []
    for name, config in chosen or [(None, None)]:
        task = load_task(name, config)
        own = task_defaults(parser, task)
        built_in = {name: parser.get_default(name) for name in own}
        parser.set_defaults(**own)
        args = parser.parse_args(argv)
        parser.set_defaults(**built_in)  # not the defaults of the next task
        args.task, args.task_config = name, config
        _validate(parser, args, task)
        runs.append((args, task))
    _check_tasks(parser, runs)
    return runs


def _check_tasks(parser: argparse.ArgumentParser, runs: list[tuple[argparse.Namespace, Task]]) -> None:
    """Several tasks share a frozen UNet, a clock and an adapter name per modality."""
    if len(runs) == 1:
        return
    if runs[0][0].unet_tuning != "lora":
        parser.error("several tasks in one run need --unet_tuning lora: they share one frozen UNet")
    modalities = [task.modality for _, task in runs]
    if len(set(modalities)) < len(modalities):
        parser.error(f"several tasks in one run need different modalities, got {', '.join(modalities)}")
    for name in _RUN_WIDE:
        values = [getattr(args, name) for args, _ in runs]
        if any(value != values[0] for value in values):
            parser.error(f"the tasks of one run disagree about --{name} ({values}); give the flag")


def task_defaults(parser: argparse.ArgumentParser, task: Task) -> dict[str, Any]:
    """The task's hyper-parameters, checked the way the command line checks the flags."""
    actions = {action.dest: action for action in parser._actions}
    defaults = {}
    for name, value in task.hyperparameters.items():
        action = actions.get(name)
        if action is None or name in ("help", "task", "task_config"):
            raise UserError(f"task {task.name}: hyperparameters: '{name}' is no flag of train_madm.py")
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise UserError(f"task {task.name}: hyperparameters: {name} is a switch: true or false, got {value!r}")
            defaults[name] = value
            continue
        values = value if isinstance(value, (list, tuple)) else [value]
        if not values or (len(values) > 1 and action.nargs != "+"):
            expected = "one value" if action.nargs != "+" else "at least one value"
            raise UserError(f"task {task.name}: hyperparameters: {name} takes {expected}, got {value!r}")
        try:
            checked = [(action.type or str)(str(v)) for v in values]
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise UserError(f"task {task.name}: hyperparameters: {name}: {error}") from None
        if action.choices and any(v not in action.choices for v in checked):
            raise UserError(f"task {task.name}: hyperparameters: {name}: {value} is none of {list(action.choices)}")
        defaults[name] = checked if action.nargs == "+" else checked[0]
    return defaults


def _validate(parser: argparse.ArgumentParser, args: argparse.Namespace, task: Task) -> None:
    args.resolution = args.resolution or task.resolution
    if args.resolution % 64:
        parser.error(f"--resolution must be a multiple of 64, got {args.resolution}")
    if Path(args.logging_dir).is_absolute() or ".." in Path(args.logging_dir).parts:
        parser.error(f"--logging_dir is a folder inside --output_dir, got {args.logging_dir}")
    if len(args.dplg_timestep) > 2 or args.dplg_timestep[0] > args.dplg_timestep[-1]:
        parser.error(f"--dplg_timestep takes T or LOW HIGH, got {args.dplg_timestep}")
    if max(args.dplg_timestep) > 999:
        parser.error(f"--dplg_timestep is a diffusion step from 0 to 999, got {max(args.dplg_timestep)}")
    if len(args.lplr_weight) > 2:
        parser.error(f"--lplr_weight takes one number, or SOURCE MIXED, got {args.lplr_weight}")
    args.lplr_weight = [args.lplr_weight[0], args.lplr_weight[-1]]
    for name in ("projection_channels", "bottleneck_channels"):
        if getattr(args, name) % 32:
            parser.error(f"--{name} must be a multiple of 32 (GroupNorm has 32 groups), got {getattr(args, name)}")
    if args.projection_channels % 128 and args.projection_channels > 128:
        parser.error(f"--projection_channels above 128 must be a multiple of 128, got {args.projection_channels}")
    if args.unet_tuning == "full" and args.quantize_base != "none":
        parser.error("--quantize_base needs --unet_tuning lora: a quantised UNet cannot be trained")
    if args.compile and args.quantize_base != "none":
        parser.error("--compile cannot compile the layers of --quantize_base; leave one of them out")
    if args.compile and args.sync_batch_statistics:
        parser.error(
            "--compile cannot compile what --sync_batch_statistics sends between the processes; leave one out"
        )
    if args.unet_tuning == "lora" and args.train_unet_output_layers:
        parser.error("--train_unet_output_layers needs --unet_tuning full")
    if args.train_unet_output_layers and args.lplr_loss == "none":
        parser.error("--train_unet_output_layers needs latent regression: without it these layers get no gradient")
