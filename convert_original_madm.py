#!/usr/bin/env python
"""Convert a checkpoint of the published MADM code (.pth) into a model folder of this suite.

    python convert_original_madm.py --task cityscapes_to_deliver_depth --checkpoint_path model_final.pth \\
        --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 --output_dir models/madm-depth

The file is read as plain tensors; every key and shape is checked, and the widths come from the tensors themselves.
The result holds the tuned UNet, student and teacher, and refers to the base model for the frozen parts.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from madm_utils import cli
from madm_utils.args import add_task_arguments, formatter
from madm_utils.cli import UserError
from madm_utils.files import check_writable
from madm_utils.tasks import load_task


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the conversion."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add_task_arguments(parser)
    parser.add_argument("--checkpoint_path", required=True, help="published .pth file")
    parser.add_argument(
        "--pretrained_model_name_or_path", required=True,
        help="the Stable Diffusion it was trained on (published: CompVis/stable-diffusion-v1-4): Hub id or folder",
    )  # fmt: skip
    parser.add_argument("--revision", help="revision of the base model on the Hub")
    parser.add_argument("--variant", help="weight variant of the base model")
    parser.add_argument("--output_dir", required=True, help="model folder to write")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Convert as the command line says."""
    args = parse_args(argv)
    task = load_task(args.task, args.task_config)
    output_dir = Path(args.output_dir)
    check_writable(output_dir)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise UserError(f"--output_dir {output_dir} already holds something; give another folder or delete this one")

    from madm_utils.base_model import BaseModelReference
    from madm_utils.files import publish_folder
    from madm_utils.original_checkpoint import convert, read_checkpoint

    state, iteration = read_checkpoint(args.checkpoint_path)
    base = BaseModelReference(args.pretrained_model_name_or_path, args.revision, args.variant)
    converted = convert(state, task, base, args.checkpoint_path)
    publish_folder(output_dir, lambda folder: converted.model.save_pretrained(folder, converted.teacher))
    print(f"converted {args.checkpoint_path} (task {task.name}, iteration {iteration}) to {output_dir}")


if __name__ == "__main__":
    cli.run(main)
