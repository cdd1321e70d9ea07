"""Flags and argparse types that the scripts share."""

import argparse
import math
from typing import TYPE_CHECKING

from madm_utils.cli import UserError
from madm_utils.tasks import TASKS

if TYPE_CHECKING:
    from madm_utils.inference import InferenceSettings


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows every default, and keeps the line breaks of the description."""

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = action.help or ""
        if action.default not in (None, argparse.SUPPRESS, False, ()) and "%(default)" not in shown:
            shown += " [%(default)s]"
        return shown


def _positive(kind: type, zero: bool = False):
    def parse(text: str):
        value = kind(text)
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            raise argparse.ArgumentTypeError(f"expected a {'non-negative' if zero else 'positive'} number, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


positive_int, positive_float = _positive(int), _positive(float)
non_negative_int, non_negative_float = _positive(int, zero=True), _positive(float, zero=True)


def fraction(text: str) -> float:
    """argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text}")
    return value


def below_one(text: str) -> float:
    """argparse type: a number from 0 to below 1."""
    value = fraction(text)
    if value == 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, got {text}")
    return value


def seed(text: str) -> int:
    """argparse type: a seed that Python, NumPy and torch all take."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to {2**32 - 1}, got {text}")
    return value


def preempt_signal(text: str) -> str:
    """argparse type: the name of a signal that clusters send before they end a job, without `SIG`."""
    name = text.upper().removeprefix("SIG")
    if name not in ("HUP", "USR1", "USR2"):
        raise argparse.ArgumentTypeError(f"expected HUP, USR1 or USR2, got {text}")
    return name


def check_precision(mixed_precision: str, has_gpu: bool) -> None:
    """Raise `UserError` for fp16 without a GPU, which accelerate would run in float32 or fail in the first step."""
    if mixed_precision == "fp16" and not has_gpu:
        raise UserError("--mixed_precision fp16 needs a GPU, found none; use bf16 or no")


def formatter(prog: str) -> argparse.HelpFormatter:
    """Help formatter of all scripts."""
    return _HelpFormatter(prog, max_help_position=32, width=110)


def add_task_arguments(
    parser: argparse.ArgumentParser, purpose: str = "what to adapt to what", several: bool = False
) -> None:
    """`--task` and `--task_config`, shared by all scripts; with `several` both may be given more than once."""
    group = parser.add_argument_group("task")
    action, note = ("append", "; repeat for one LoRA per modality on a shared base") if several else ("store", "")
    group.add_argument("--task", metavar="NAME", action=action, help=f"{purpose}: {', '.join(TASKS)}{note}")
    group.add_argument(
        "--task_config", metavar="FILE", action=action, help="your own task, JSON or YAML (docs/tasks.md)"
    )


def add_inference_arguments(parser: argparse.ArgumentParser, several: str) -> None:
    """Which trained models and how to run them, shared by evaluation and prediction.

    Args:
        parser: gets the flags.
        several: what happens with more than one model, for the help text.
    """
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model_path", required=True, nargs="+", metavar="PATH",
        help=f"run folder, checkpoint folder, or id on the Hub; {several}",
    )  # fmt: skip
    add_weights_arguments(group)
    group.add_argument(
        "--batch_size", type=positive_int, default=1,
        help="images per forward pass and process in fp16 and bf16; full precision takes one at a time, so that the"
        " results are the same to the last pixel",
    )  # fmt: skip
    group.add_argument(
        "--mixed_precision", choices=("no", "fp16", "bf16"), default="no", help="autocast; published: fp16"
    )
    add_compile_argument(group)
    group = parser.add_argument_group("approximations (docs/inference.md)")
    group.add_argument(
        "--merge_lora", action="store_true", help="add the LoRA to the UNet's weights: equal but for rounding, faster"
    )
    group.add_argument(
        "--quantize_unet", choices=("int8", "fp8"),
        help="store the UNet's weights in 8 bits, its LoRA merged first: int8 its linear layers (bitsandbytes), fp8"
        " all but the norms; default: as they are",
    )  # fmt: skip
    group = parser.add_argument_group("any resolution and better scores")
    group.add_argument(
        "--window", type=positive_int, metavar="PIXELS",
        help="slide a square window of this side (a multiple of 64) over the image at its own size; default: stretch"
        " the whole image to the training resolution, as published",
    )  # fmt: skip
    group.add_argument(
        "--stride", type=positive_int, metavar="PIXELS", help="from window to window; default: 3/4 of the window"
    )
    group.add_argument(
        "--tta", type=test_time_augmentations, default=(), metavar="LIST",
        help="test-time augmentation, averaged: `flip` (mirrored too, 2 times the work), `scales` (0.75, 1 and 1.25"
        " times the size, 3 times the work), or `flip,scales`",
    )  # fmt: skip


def add_compile_argument(group) -> None:
    """`--compile`, shared by training, evaluation and prediction."""
    group.add_argument(
        "--compile", action="store_true",
        help="torch.compile the blocks of UNet, VAE and head: minutes at the start, faster from then on; needs a C++"
        " compiler (CPU) or Triton (GPU); equal but for rounding",
    )  # fmt: skip


def check_inference_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End in `parser.error` where flags of `add_inference_arguments` do not go together."""
    if args.compile and args.quantize_unet == "fp8":
        parser.error(
            "--compile cannot compile a UNet that is cast layer by layer: leave --compile or --quantize_unet fp8 out"
        )


def add_weights_arguments(group) -> None:
    """Flags that say which weights of a trained model are used, and on which base."""
    group.add_argument(
        "--weights", choices=("student", "teacher"), default="student",
        help="which segmenter; the published choice is the student",
    )  # fmt: skip
    group.add_argument(
        "--pretrained_model_name_or_path", metavar="BASE",
        help="base model in place of the one stored with the model, e.g. when its folder has moved",
    )  # fmt: skip
    group.add_argument(
        "--vae_decoder", metavar="PATH_OR_ID",
        help="of models with a small decoder: where it is, in place of what is stored with the model",
    )  # fmt: skip


def inference_settings(args: argparse.Namespace) -> "InferenceSettings":
    """What the flags of `add_inference_arguments` say about windows and augmented views.

    Raises:
        UserError: see `InferenceSettings`.
    """
    from madm_utils.inference import InferenceSettings

    return InferenceSettings.named(args.window, args.stride, args.tta)


def test_time_augmentations(text: str) -> tuple[str, ...]:
    """argparse type: `flip`, `scales` or both, separated by a comma."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names or set(names) - {"flip", "scales"}:
        raise argparse.ArgumentTypeError(f"expected flip, scales or flip,scales, got {text!r}")
    return names


def add_data_arguments(group) -> None:
    """Flags that say where the prepared data are."""
    group.add_argument(
        "--data_dir", required=True,
        help="prepared data: --output_dir of prepare_datasets.py, a dataset on the Hub (user/name), or an address that"
        " fsspec reads (hf://datasets/user/name@revision, s3://...)",
    )  # fmt: skip
    group.add_argument(
        "--streaming", action="store_true",
        help="data elsewhere: fetch images when they are needed, keep no copy on the disk; the results are the same",
    )  # fmt: skip
