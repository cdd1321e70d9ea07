#!/usr/bin/env python
"""Exported graphs: size on the disk and speed on the CPU against PyTorch.

    OMP_NUM_THREADS=1 python benchmarks/bench_export.py

Prints a Markdown table: the model in PyTorch as it is trained (eager), and the files that `export_madm.py` writes,
loaded again. Random weights, float32, batch 1, one fixed size. Everything runs in one thread; times are CPU time,
that of an image is the best of `--repeats` calls after one that is not counted. The last column is the largest
difference of a logit from PyTorch.
Rows whose packages are missing are left out.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import SIZES, build_model, machine
from madm_utils.args import formatter, positive_int
from madm_utils.cli import UserError, run

if TYPE_CHECKING:
    from torch import Tensor


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--size", choices=tuple(SIZES), default="scaled", help="widths of the model")
    parser.add_argument("--resolution", type=positive_int, default=128, help="side of the images in pixels")
    parser.add_argument("--repeats", type=positive_int, default=5, help="timed calls; the best counts")
    return parser.parse_args(argv)


def milliseconds(graph: "Callable[[Tensor], Tensor]", images: "Tensor", repeats: int) -> float:
    """Best CPU time of a call, after one that is not counted."""
    graph(images)
    times = []
    for _ in range(repeats):
        start = time.process_time()
        graph(images)
        times.append(time.process_time() - start)
    return 1000 * min(times)


def installed(package: str) -> str:
    """`package version`, or that it is missing."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} missing"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all formats and print the table."""
    args = parse_args(argv)
    import torch

    from madm_utils import export
    from madm_utils.merging import merge_lora

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_model(args.size, args.resolution, "lora", "no").eval().requires_grad_(False)
    merge_lora(model)
    shape = export.ExportShape(1, (args.resolution, args.resolution), 0)
    images = torch.rand(1, 3, args.resolution, args.resolution)

    def eager(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(images).logits

    used = ", ".join(installed(name) for name in ("torch", "onnxruntime"))
    print(f"{machine()}, one thread; {used}; {time.strftime('%Y-%m-%d')}; `{args.size}` model, ", end="")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {args.resolution} pixels\n")
    print("| engine | MB on the disk | s to export | ms / image | largest difference |\n|---|---|---|---|---|")
    weights = sum(tensor.nbytes for tensor in model.state_dict().values()) / 1e6
    print(
        f"| PyTorch eager | {weights:.1f} (weights) | | {milliseconds(eager, images, args.repeats):.0f} | |",
        flush=True,
    )
    for format, engine in (("torch_export", "torch.export"), ("onnx", "onnxruntime")):
        try:
            export.check_packages(format)
        except UserError as error:
            print(error, file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / export.FILE_NAMES[format]
            start = time.process_time()
            export.write(export.trace(model, shape), path, format, opset=20)
            seconds = time.process_time() - start
            megabytes = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6
            graph = export.load(path, format)
            speed = milliseconds(graph, images, args.repeats)
            worst = export.largest_difference(model, graph, shape.check_shapes())
        print(f"| {engine} | {megabytes:.1f} | {seconds:.0f} | {speed:.0f} | {worst:.1e} |", flush=True)


if __name__ == "__main__":
    run(main)
