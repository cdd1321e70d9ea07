#!/usr/bin/env python
"""Speed and memory of a training step, as a ratio to the plain arrangement of the method; prints Markdown tables.

    python benchmarks/bench_step.py                                  # the rows that fit this machine
    python benchmarks/bench_step.py --rows tiny-128-lora-fp32 real-256-lora-fp32 --optimisations_of none
    python benchmarks/bench_step.py --rows --optimisations_of medium-512-full-fp32

A step is a whole one of `train_madm.py` on one pair of images, with random weights, on which speed does not depend:
two student passes, the teacher's pass, four losses, backward, clipping, AdamW, EMA. Plain (`plain_step.py`) computes
the same numbers in the straightforward way. Both run in processes of their own, in turns; memory is the peak of the
whole process (resident on CPU, allocated on a GPU).

GFLOP/s are useful ones: the operations of *plain*, counted from its shapes, by the time of the suite's step. So saving
operations counts as speed, and computing some twice (recomputed activations) does not. The peak they are compared with
is the best of several matrix products in the row's precision, measured in the process that made the steps.

Rows of the real size run by default on a GPU only: they need 25 GB, and on a CPU minutes per step. So do compiled
ones, whose first step takes minutes. Rows in bf16 run by default where bf16 matrices are multiplied at least as fast
as float32 ones.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import (
    build_model,
    in_own_process,
    peak_gib,
    plain_training_step,
    training_flops,
    training_settings,
    training_step,
)
from benchmarks.measuring import (
    PRECISIONS,
    SUITE,
    against_plain,
    clock,
    goal,
    heading,
    is_bf16_fast,
    matrix_peak,
    serve,
    unmeasured,
)
from madm_utils.args import formatter, positive_int
from madm_utils.cli import quiet_libraries, run
from madm_utils.cpu_memory import keep_freed_memory

if TYPE_CHECKING:
    from accelerate import Accelerator

PARTS = {
    "head": "head level by level",
    "vae": "one VAE call for four images",
    "palette": "palette by table",
    "confidence": "confidence from max and logsumexp",
    "backward": "backward per branch",
    "ema": "EMA of all parameters together",
    "optimizer": "fused AdamW",
}
"""Rows of the second table: fields of `plain_step.Arrangement` and what they are."""
KEPT_MEMORY = "kept_memory"
"""One more row: plain in a process that keeps freed memory, which is not a matter of arrangement."""


@dataclass(frozen=True)
class Row:
    """One configuration: widths, image side, UNet tuning, precision."""

    size: str
    resolution: int
    tuning: str
    precision: str
    compiled: bool = False
    gpu_only: bool = False

    @property
    def name(self) -> str:
        return f"{self.size}-{self.resolution}-{self.tuning}-{self.precision}" + "-compile" * self.compiled

    def by_default(self, gpu: bool, bf16: bool) -> bool:
        """Whether the row is run when none are named, on a machine with a GPU, with fast bf16."""
        slow = self.size == "real" or self.resolution > 256 or self.compiled or (self.precision == "bf16" and not bf16)
        return gpu or not (self.gpu_only or slow)


_ROWS = [
    Row(size, resolution, tuning, precision)
    for size, resolution in (("tiny", 128), ("medium", 256))
    for tuning in ("lora", "full")
    for precision in ("fp32", "bf16")
]
_ROWS += [Row("medium", 512, tuning, "fp32") for tuning in ("lora", "full")]
_ROWS += [Row("medium", 256, "full", "fp32", compiled=True)]
_ROWS += [Row("real", 256, "lora", "fp32")]
_ROWS += [
    Row("real", 512, "lora", "bf16", gpu_only=True),
    Row("real", 512, "full", "bf16", gpu_only=True),
    Row("real", 512, "full", "fp16", gpu_only=True),
    Row("real", 512, "lora", "bf16", compiled=True, gpu_only=True),
    Row("real", 512, "full", "bf16", compiled=True, gpu_only=True),
]
ROWS = {row.name: row for row in _ROWS}


# --- one side, in a process of its own -------------------------------------------------------------------------------


def make_step(row: Row, side: str, accelerator: "Accelerator") -> Callable[[], None]:
    """A function that makes one step of the suite, of plain, or of plain with one part of the suite."""
    import torch

    torch.manual_seed(0)
    model = build_model(row.size, row.resolution, row.tuning, row.precision)
    settings = training_settings(model)
    if side in (SUITE, KEPT_MEMORY):
        keep_freed_memory()
    if side == SUITE:
        return training_step(model, settings, accelerator, compiled=row.compiled)
    from benchmarks.plain_step import ARRANGEMENTS, PLAIN

    return plain_training_step(model, settings, accelerator, 1, ARRANGEMENTS.get(side, PLAIN))


def measure(row: Row, side: str, cpu_time: bool) -> None:
    """Make steps when asked; at the end say the peak memory, and the machine's matrix peak."""
    quiet_libraries()
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="no" if row.precision == "fp32" else row.precision)
    device = accelerator.device
    dtype = getattr(torch, PRECISIONS[row.precision])
    now = clock(device.type, cpu_time)

    def finish() -> dict:
        result = {"memory_gib": peak_gib(device.type == "cuda")}
        if side == SUITE:
            result["matrix_peak"] = matrix_peak(device, dtype, now)
        return result

    serve(make_step(row, side, accelerator), finish, now)


# --- tables ----------------------------------------------------------------------------------------------------------


def step_table(names: Sequence[str], repeats: int, *flags: str) -> dict[str, dict]:
    """Print the suite against plain, row by row as they are done; returns what was measured."""
    print("**Training step: the suite, and how many times as fast as plain it is**\n")
    print(
        "| row | ms / step | images / s | GFLOP/s | of the matrix peak | peak GiB | plain ms | plain GiB | speed "
        "| memory |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    results, flops = {}, {}
    for name in names:
        row = ROWS[name]
        work = (row.size, row.resolution, row.tuning)
        if work not in flops:
            flops[work] = in_own_process(__file__, name, "--side", "flops")["flops"]
        r = against_plain(__file__, name, SUITE, repeats, *flags)
        rate = flops[work] / r["seconds"]
        r["fraction"] = rate / r["matrix_peak"]
        results[name] = r
        # A pair is two images.
        print(
            f"| {name} | {r['seconds'] * 1e3:.0f} | {2 / r['seconds']:.3g} | {rate / 1e9:.3g} | {r['fraction']:.0%} "
            f"| {r['memory_gib']:.2f} | {r['plain_seconds'] * 1e3:.0f} | {r['plain_memory_gib']:.2f} "
            f"| {r['speed']:.2f} | {r['memory']:.0%} |",
            flush=True,
        )
    print()
    return results


def optimisation_table(name: str, repeats: int, *flags: str) -> None:
    """Print plain with one part of the suite at a time, and the suite, each against plain beside it."""
    print(f"**{name}: plain with one part of the suite at a time**\n")
    print("| plain with | ms / step | plain ms | speed | peak GiB | memory |")
    print("|---|---|---|---|---|---|", flush=True)
    for side, what in (PARTS | {KEPT_MEMORY: "freed memory kept (CPU)", SUITE: "the suite"}).items():
        r = against_plain(__file__, name, side, repeats, *flags)
        print(
            f"| {what} | {r['seconds'] * 1e3:.0f} | {r['plain_seconds'] * 1e3:.0f} | {r['speed']:.2f} "
            f"| {r['memory_gib']:.2f} | {r['memory']:.0%} |",
            flush=True,
        )
    print()


def verdicts(results: dict[str, dict], gpu: bool) -> None:
    """Compare what was measured with the goals."""
    full = results.get("real-512-full-fp16")
    half, compiled = results.get("real-512-full-bf16"), results.get("real-512-full-bf16-compile")
    for name, result in results.items():
        if name.startswith("medium-") and name.endswith("-fp32") and not gpu:
            speed, memory = result["speed"], result["memory"]
            goal(f"{name} at least 1.5 times as fast as plain", speed >= 1.5, f"{speed:.2f}")
            goal(f"{name} in at most 60 % of plain's memory", memory <= 0.6, f"{memory:.0%}")
    goals = (
        (full, "real size, fp16, at least 2 times as fast as plain", lambda r: (r["speed"] >= 2, f"{r['speed']:.2f}")),
        (full, "real size, fp16, at most 110 ms per step", lambda r: _within(r, 110)),
        (half, "real size, bf16, at least 40 % of the matrix peak",
         lambda r: (r["fraction"] >= 0.4, f"{r['fraction']:.0%}")),
        (compiled, "real size, bf16, compiled, at most 80 ms per step", lambda r: _within(r, 80)),
    )  # fmt: skip
    for result, what, judge in goals:
        if result:
            goal(what, *judge(result))
        elif not gpu:
            unmeasured(what)


def _within(result: dict, milliseconds: float) -> tuple[bool, str]:
    took = result["seconds"] * 1e3
    return took <= milliseconds, f"{took:.0f} ms"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument(
        "--rows", nargs="*", choices=ROWS, metavar="ROW",
        help=f"of the first table: {', '.join(ROWS)} [all that fit this machine]",
    )  # fmt: skip
    parser.add_argument(
        "--optimisations_of",
        choices=(*ROWS, "none"),
        default="medium-256-full-fp32",
        metavar="ROW",
        help="row of the second table, or none",
    )
    parser.add_argument("--repeats", type=positive_int, default=3, help="counted steps, after a first one")
    parser.add_argument(
        "--cpu_time", action="store_true", help="CPU seconds of all threads, for a machine that does other work too"
    )
    parser.add_argument("--measure", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=(SUITE, "plain", "flops", KEPT_MEMORY, *PARTS), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the rows, print the tables and the verdict."""
    args = parse_args(argv)
    if args.side == "flops":
        row = ROWS[args.measure]
        print(json.dumps({"flops": training_flops(row.size, row.resolution, row.tuning)}))
        return
    if args.measure:
        measure(ROWS[args.measure], args.side, args.cpu_time)
        return
    quiet_libraries()
    import torch

    gpu, bf16 = torch.cuda.is_available(), is_bf16_fast()
    names = [name for name, row in ROWS.items() if row.by_default(gpu, bf16)] if args.rows is None else args.rows
    flags = ["--cpu_time"] * args.cpu_time
    print(heading())
    results = step_table(names, args.repeats, *flags) if names else {}
    if args.optimisations_of != "none":
        optimisation_table(args.optimisations_of, args.repeats, *flags)
    verdicts(results, gpu)


if __name__ == "__main__":
    run(main)
