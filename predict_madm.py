#!/usr/bin/env python
"""Segment an image, or every image in a folder and its sub-folders, with a trained model.

    python predict_madm.py --model_path outputs/depth --input photos --output_dir predictions

For each `sub/street.png` the output folder gets, in the size of the input,

    sub/street_label.png     class ids, 8 bit
    sub/street_color.png     the colours of the classes
    sub/street_overlay.png   the colours over the image

and once `legend.json`: class id -> name and colour. An image that cannot be read is reported, the others are still
done, and the exit code is 1.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from madm_utils.args import add_inference_arguments, formatter, fraction
from madm_utils.cli import UserError, run
from madm_utils.files import check_writable, replacing

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add_inference_arguments(parser)
    group = parser.add_argument_group("input and output")
    group.add_argument(
        "--input", required=True, type=Path, metavar="FILE_OR_DIR",
        help=f"an image, or a folder that is searched for {' '.join(SUFFIXES)}",
    )  # fmt: skip
    group.add_argument("--output_dir", required=True, type=Path, help="folder for the predictions")
    group.add_argument(
        "--overlay_alpha", type=fraction, default=0.5, metavar="A", help="share of the colour in the overlay, 0..1"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Predict as the command line says; returns the exit code."""
    args = parse_args(argv)
    outputs = plan_outputs(args.input, args.output_dir)

    from tqdm import tqdm

    from madm_utils.pipeline_madm import MADMPipeline, inference_accelerator, read_image

    accelerator = inference_accelerator(args.mixed_precision)
    pipe = MADMPipeline.from_pretrained(
        args.model_path,
        weights=args.weights,
        device=accelerator.device,
        base=args.pretrained_model_name_or_path,
    )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    files = list(outputs)
    with tqdm(total=len(files), desc="predict", unit="image") as progress:
        for start in range(0, len(files), args.batch_size):
            batch: dict[Path, Image.Image] = {}
            for file in files[start : start + args.batch_size]:
                try:
                    batch[file] = read_image(file)
                except UserError as error:
                    failed.append(str(error))
                    progress.write(f"error: {error}", file=sys.stderr)
            with accelerator.autocast():
                label_maps = pipe(list(batch.values()), batch_size=args.batch_size).label_maps
            for (file, image), label_map in zip(batch.items(), label_maps, strict=True):
                write_prediction(outputs[file], image, label_map, pipe.palette, args.overlay_alpha)
            progress.update(min(args.batch_size, len(files) - start))
    write_legend(args.output_dir / "legend.json", pipe.class_names, pipe.palette)
    print(f"{len(files) - len(failed)} of {len(files)} images predicted: {args.output_dir}")
    if failed:
        print(f"{len(failed)} failed:", *failed, sep="\n  ", file=sys.stderr)
    return 1 if failed else 0


def plan_outputs(source: Path, output_dir: Path) -> dict[Path, Path]:
    """Map every input image to its output path without the ending, e.g. `predictions/sub/street`.

    Earlier predictions are no inputs: an output folder inside the input folder is not searched.

    Raises:
        UserError: no such input, no images, an output folder that cannot be used, or two inputs that would write the
            same files.
    """
    check_writable(output_dir)
    if source.is_file():
        return {source: output_dir / source.stem}
    if not source.is_dir():
        raise UserError(f"--input {source}: no such file or folder")
    own = output_dir.resolve()
    if own == source.resolve():
        raise UserError(
            f"--output_dir {output_dir} is the input folder: the next run would take its predictions for images; "
            "give another folder (one inside the input folder will do)"
        )
    files = sorted(
        path for path in source.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
        and own not in path.resolve().parents
    )  # fmt: skip
    if not files:
        raise UserError(f"--input {source} holds no images; looked for {' '.join(SUFFIXES)} in it and its sub-folders")
    outputs = {path: output_dir / path.relative_to(source).with_suffix("") for path in files}
    count = Counter(outputs.values())
    twice = [str(path) for path, output in outputs.items() if count[output] > 1]
    if twice:
        raise UserError(
            f"{', '.join(twice)} differ in their ending only, so their predictions would have the same names; rename "
            "them or predict them into separate folders"
        )
    return outputs


def write_prediction(
    output: Path,
    image: "Image.Image",
    label_map: "np.ndarray",
    palette: tuple[tuple[int, int, int], ...],
    overlay_alpha: float,
) -> None:
    """Write the three pictures of one image, `output` being their common path without the ending."""
    import numpy as np
    from PIL import Image

    from madm_utils.visualization import colorize, overlay

    color = colorize(label_map, palette)
    pictures = {"label": label_map, "color": color, "overlay": overlay(np.asarray(image), color, overlay_alpha)}
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for kind, pixels in pictures.items():
            with replacing(output.with_name(f"{output.name}_{kind}.png")) as temporary:
                Image.fromarray(pixels).save(temporary, format="PNG")
    except OSError as error:
        raise UserError(f"cannot write to {output.parent} ({error}); free some space or give another folder") from None


def write_legend(path: Path, class_names: tuple[str, ...], palette: tuple[tuple[int, int, int], ...]) -> None:
    """Write class id -> name and RGB colour as JSON."""
    legend = {
        k: {"name": name, "color": list(color)}
        for k, (name, color) in enumerate(zip(class_names, palette, strict=True))
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(legend, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
