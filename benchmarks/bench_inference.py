#!/usr/bin/env python
"""Images per second of a model, as a ratio to the plain arrangement of the method; prints a Markdown table.

    python benchmarks/bench_inference.py                             # the rows that fit this machine
    python benchmarks/bench_inference.py --rows medium-256-b1-fp32 real-512-b1-fp32 --repeats 1

From images on the device to label maps, by batch, resolution, precision and compilation, with random weights. Plain
(`plain_step.py`) computes the same numbers in the straightforward way. Both run in processes of their own, in turns;
memory is the peak of the whole process (resident on CPU, allocated on a GPU).

Rows at 512 pixels of the real size run by default on a GPU only: on a CPU an image takes minutes. Rows in bf16 run by
default where bf16 matrices are multiplied at least as fast as float32 ones, compiled ones where a compiler is there;
their first call, which is not counted, takes minutes.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import build_model, peak_gib
from benchmarks.measuring import SUITE, against_plain, clock, goal, heading, is_bf16_fast, serve, unmeasured
from madm_utils.args import formatter, positive_int
from madm_utils.cli import quiet_libraries, run
from madm_utils.cpu_memory import keep_freed_memory

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Row:
    """One configuration: widths, image side, images per batch, precision."""

    size: str
    resolution: int
    batch_size: int
    precision: str
    compiled: bool = False
    gpu_only: bool = False

    @property
    def name(self) -> str:
        return f"{self.size}-{self.resolution}-b{self.batch_size}-{self.precision}" + "-compile" * self.compiled

    def by_default(self, gpu: bool, bf16: bool) -> bool:
        """Whether the row is run when none are named, on a machine with a GPU, with fast bf16."""
        slow = (self.size == "real" and self.resolution > 256) or (self.precision == "bf16" and not bf16)
        no_compiler = self.compiled and shutil.which(os.environ.get("CXX", "g++")) is None
        return gpu or not (self.gpu_only or slow or no_compiler)


_ROWS = [Row("tiny", 128, batch_size, "fp32") for batch_size in (1, 4)]
_ROWS += [Row("medium", 256, batch_size, "fp32") for batch_size in (1, 4)]
_ROWS += [Row("medium", 512, 1, "fp32"), Row("medium", 256, 1, "bf16"), Row("medium", 256, 1, "fp32", compiled=True)]
_ROWS += [Row("real", 256, 1, "fp32"), Row("real", 512, 1, "fp32"), Row("real", 512, 1, "bf16")]
_ROWS += [Row("real", 512, batch_size, "bf16", gpu_only=True) for batch_size in (4, 8)]
_ROWS += [Row("real", 512, 1, "fp16", gpu_only=True)]
_ROWS += [Row("real", 512, batch_size, "bf16", compiled=True, gpu_only=True) for batch_size in (1, 8)]
ROWS = {row.name: row for row in _ROWS}


def make_prediction(row: Row, side: str, accelerator: "Accelerator") -> Callable[[], None]:
    """A function that segments a batch of random images, with the suite or plain."""
    import torch

    from benchmarks.plain_step import predict

    torch.manual_seed(0)
    model = build_model(row.size, row.resolution, "full", row.precision).requires_grad_(False)
    model.to(accelerator.device).eval()
    if side == SUITE:
        keep_freed_memory()
    if side == SUITE and row.compiled:
        from madm_utils.compilation import compile_model

        compile_model(model.extractor, [model.segmenter], accelerator.device)
    images = torch.rand(row.batch_size, 3, row.resolution, row.resolution, device=accelerator.device)

    def call() -> None:
        with torch.no_grad(), accelerator.autocast():
            logits = model(images).logits if side == SUITE else predict(model, images)
            logits.argmax(dim=1)

    return call


def measure(row: Row, side: str, cpu_time: bool) -> None:
    """Segment when asked; at the end say the peak memory."""
    quiet_libraries()
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="no" if row.precision == "fp32" else row.precision)
    kind = accelerator.device.type
    call = make_prediction(row, side, accelerator)
    serve(call, lambda: {"memory_gib": peak_gib(kind == "cuda")}, clock(kind, cpu_time))


def table(names: Sequence[str], repeats: int, *flags: str) -> dict[str, dict]:
    """Print the suite against plain, row by row as they are done; returns what was measured."""
    print("| row | images / s | ms / image | peak GiB | plain ms / image | plain GiB | speed | memory |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    results = {}
    for name in names:
        r = results[name] = against_plain(__file__, name, SUITE, repeats, *flags)
        r["images"] = ROWS[name].batch_size / r["seconds"]
        plain_milliseconds = r["plain_seconds"] * 1e3 / ROWS[name].batch_size
        print(
            f"| {name} | {r['images']:.3g} | {1e3 / r['images']:.0f} | {r['memory_gib']:.2f} "
            f"| {plain_milliseconds:.0f} | {r['plain_memory_gib']:.2f} | {r['speed']:.2f} | {r['memory']:.0%} |",
            flush=True,
        )
    print()
    return results


def verdicts(results: dict[str, dict], gpu: bool) -> None:
    """Compare what was measured with the goals."""
    for name, result in results.items():
        if name.startswith("medium-") and name.endswith("-b1-fp32") and not gpu:
            speed, memory = result["speed"], result["memory"]
            goal(f"{name} at least 1.4 times as fast as plain", speed >= 1.4, f"{speed:.2f}")
            goal(f"{name} in at most 60 % of plain's memory", memory <= 0.6, f"{memory:.0%}")
    what = "real size, at least 50 images per second"
    real = {name: r["images"] for name, r in results.items() if name.startswith("real-512-")}
    if not gpu:
        unmeasured(what)
    elif real:
        best = max(real, key=real.get)
        goal(what, real[best] >= 50, f"{real[best]:.1f}, {best}")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"{', '.join(ROWS)} [all that fit this machine]"
    )
    parser.add_argument("--repeats", type=positive_int, default=3, help="counted batches, after a first one")
    parser.add_argument(
        "--cpu_time", action="store_true", help="CPU seconds of all threads, for a machine that does other work too"
    )
    parser.add_argument("--measure", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=(SUITE, "plain"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the rows, print the table and the verdict."""
    args = parse_args(argv)
    if args.measure:
        measure(ROWS[args.measure], args.side, args.cpu_time)
        return
    quiet_libraries()
    import torch

    gpu, bf16 = torch.cuda.is_available(), is_bf16_fast()
    names = args.rows or [name for name, row in ROWS.items() if row.by_default(gpu, bf16)]
    print(heading())
    verdicts(table(names, args.repeats, *["--cpu_time"] * args.cpu_time), gpu)


if __name__ == "__main__":
    run(main)
