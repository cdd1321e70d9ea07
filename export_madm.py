#!/usr/bin/env python
"""Write a trained model as one graph, ONNX or torch.export, that runs without this suite.

    pip install -r requirements-export.txt
    python export_madm.py --model_path outputs/depth --format onnx --output_dir exports/depth

The folder gets `model.onnx` (with `model.onnx.data` where the weights are large) or `model.pt2`, and `model.json`:
class names, palette, and how an image becomes the input. The LoRA is merged; the learned conditioning and the fixed
noise are constants. After writing, the file is loaded again and its logits are compared with PyTorch's.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from madm_utils.args import add_weights_arguments, formatter, positive_int
from madm_utils.cli import UserError, parse_early, run
from madm_utils.files import check_writable, publish_folder, writing

if TYPE_CHECKING:
    from madm_utils.export import ExportShape
    from madm_utils.modeling_madm import MADMModel

TOLERANCES = {"float32": 1e-3, "float16": 0.1}


def _batch_size(text: str) -> int | None:
    return None if text == "dynamic" else positive_int(text)


def _resolution(text: str) -> tuple[int, int] | str:
    if text == "dynamic":
        return text
    sides = [int(side) if side.isdecimal() else 0 for side in text.split("x")]
    sides = sides * 2 if len(sides) == 1 else sides
    if len(sides) != 2 or any(side < 64 or side % 64 for side in sides):
        raise argparse.ArgumentTypeError(f"'{text}': a side, HEIGHTxWIDTH (multiples of 64), or dynamic")
    return sides[0], sides[1]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    group = parser.add_argument_group("model")
    group.add_argument("--model_path", required=True, help="run folder, checkpoint folder, or id on the Hub")
    group.add_argument("--modality", help="which of the models of a run over several modalities")
    add_weights_arguments(group)
    group = parser.add_argument_group("graph")
    group.add_argument("--format", choices=("onnx", "torch_export"), required=True, help="what to write")
    group.add_argument(
        "--batch_size", type=_batch_size, default=1, metavar="N", help="images per call, or dynamic (1 to 63)"
    )
    group.add_argument(
        "--resolution", type=_resolution, metavar="N",
        help="side or HEIGHTxWIDTH in pixels, multiples of 64, or dynamic; default: as trained",
    )  # fmt: skip
    group.add_argument(
        "--max_resolution", type=_resolution, default=(2048, 2048), metavar="N",
        help="with --resolution dynamic: side or HEIGHTxWIDTH of the largest area of an image",
    )  # fmt: skip
    group.add_argument(
        "--dtype",
        choices=tuple(TOLERANCES),
        default="float32",
        help="of weights and arithmetic; in- and output float32",
    )
    group.add_argument("--opset", type=int, default=20, choices=range(18, 24), help="of ONNX")
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", required=True, type=Path, help="folder to write; new or empty")
    group.add_argument(
        "--tolerance", type=float, metavar="D",
        help="largest accepted difference of a logit from PyTorch; default 1e-3, for float16 0.1",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.tolerance is not None and not args.tolerance > 0:
        parser.error(f"--tolerance is a positive number, got {args.tolerance}")
    if args.max_resolution == "dynamic":
        parser.error("--max_resolution is a size, the largest that a dynamic resolution may have")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Export as the command line says."""
    args = parse_args(argv)
    check_writable(args.output_dir)
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        raise UserError(f"--output_dir {args.output_dir} already holds something; give another folder")

    from madm_utils import export

    export.check_packages(args.format)
    model = load_merged(args)
    size = (model.resolution, model.resolution) if args.resolution is None else args.resolution
    largest = args.max_resolution[0] * args.max_resolution[1]
    shape = export.ExportShape(args.batch_size, None if size == "dynamic" else size, largest)
    with writing(args.output_dir):
        publish_folder(args.output_dir, lambda folder: write_checked(model, shape, args, folder))
    megabytes = sum(path.stat().st_size for path in args.output_dir.iterdir()) / 1e6
    print(f"exported {args.model_path} ({args.weights}, {args.dtype}) to {args.output_dir}: {megabytes:.1f} MB")


def load_merged(args: argparse.Namespace) -> "MADMModel":
    """The model to export, its LoRA merged into the UNet."""
    import torch

    from madm_utils.merging import merge_lora
    from madm_utils.model_folder import adapter_folders
    from madm_utils.modeling_madm import MADMModel

    folders = adapter_folders(args.model_path)
    names = [name for name in folders if name]
    if args.modality and args.modality not in names:
        found = f"models of {', '.join(names)}" if names else "one model; leave the flag out"
        raise UserError(f"--modality {args.modality}: {args.model_path} holds {found}")
    if len(names) > 1 and not args.modality:
        raise UserError(f"{args.model_path} holds models of {', '.join(names)}; choose one with --modality")
    folder = folders[args.modality] if args.modality else next(iter(folders.values()), args.model_path)
    replaced = {"base": args.pretrained_model_name_or_path, "vae_decoder": args.vae_decoder}
    model = MADMModel.from_pretrained(folder, args.weights, **replaced)
    merge_lora(model)  # in float32, before the weights are rounded
    return model.to(getattr(torch, args.dtype))


def write_checked(model: "MADMModel", shape: "ExportShape", args: argparse.Namespace, folder: Path) -> None:
    """Write graph and description into `folder`, and compare the written file with PyTorch."""
    import torch

    from madm_utils import export

    path = folder / export.FILE_NAMES[args.format]
    export.write(export.trace(model, shape), path, args.format, args.opset)
    shapes = shape.check_shapes()
    difference = export.largest_difference(model, export.load(path, args.format), shapes)
    tolerance = args.tolerance or TOLERANCES[args.dtype]
    if not difference <= tolerance:
        raise UserError(
            f"the written graph's logits are up to {difference:.2g} off PyTorch's, more than --tolerance "
            f"{tolerance:g}; nothing was kept"
        )
    check = {"shapes": shapes, "largest_difference": difference, "tolerance": tolerance, "torch": torch.__version__}
    facts = export.description(model, shape, args.format, args.opset)
    text = json.dumps({**facts, "weights": args.weights, "dtype": args.dtype, "check": check}, indent=2)
    (folder / "model.json").write_text(text + "\n", encoding="utf-8")
    print(
        f"checked {path.name} against PyTorch at (batch, height, width) {', '.join(map(str, shapes))}: largest "
        f"difference of a logit {difference:.2g}, accepted up to {tolerance:g}"
    )


if __name__ == "__main__":
    parse_early(parse_args)
    run(main)
