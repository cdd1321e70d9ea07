#!/usr/bin/env python
"""Does doubling cost what the operations say? Prints a Markdown table and what is more than 15 % above it.

    python benchmarks/bench_growth.py                                # medium widths from 128 pixels on
    python benchmarks/bench_growth.py --size real --resolution 256   # for a GPU
    python benchmarks/bench_growth.py --rows processes

The test set (through the evaluation of eval_madm.py), the images of a batch and their side (through the training step)
are doubled one at a time, and the number of processes of a training (the real train_madm.py, gloo, one thread each, as
in bench_scaling.py). Cost is time, for processes time by their number. It may grow by less than the operations, which
are counted from the shapes: what costs the same for every size is then shared by more work.
"""

import argparse
import io
import json
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import bench_scaling
from benchmarks.common import (
    SIZES,
    build_model,
    in_own_process,
    prediction_flops,
    training_flops,
    training_settings,
    training_step,
)
from benchmarks.measuring import Worker, clock, heading, in_turns, serve
from madm_utils.args import formatter, positive_int
from madm_utils.cli import UserError, quiet_libraries, run
from madm_utils.cpu_memory import keep_freed_memory

if TYPE_CHECKING:
    from accelerate import Accelerator

ALLOWED = 0.15
NUM_IMAGES = 8
ROWS = {
    "test-set": f"test set, {NUM_IMAGES} to {2 * NUM_IMAGES} images",
    "batch": "batch of a training step, 1 to 2 pairs",
    "resolution": "side of the images of a training step",
    "processes": "processes of a training, 1 to 2",
}


# --- one side, in a process of its own -------------------------------------------------------------------------------


def work(row: str, factor: int, resolution: int) -> tuple[int, int]:
    """Side of the images and images per batch of a row whose quantity is multiplied by `factor`."""
    return resolution * factor if row == "resolution" else resolution, factor if row == "batch" else 1


def flops(row: str, factor: int, size: str, resolution: int) -> int:
    """Operations of one call of the row."""
    if row == "test-set":
        return prediction_flops(size, resolution) * NUM_IMAGES * factor
    side, batch_size = work(row, factor, resolution)
    return training_flops(size, side, "full", batch_size)


@contextmanager
def make_call(
    row: str, factor: int, size: str, resolution: int, accelerator: "Accelerator"
) -> Iterator[Callable[[], object]]:
    """A function that evaluates the test set once, or makes one training step."""
    import torch

    torch.manual_seed(0)
    if row != "test-set":
        side, batch_size = work(row, factor, resolution)
        model = build_model(size, side, "full", "fp32")
        yield training_step(model, training_settings(model), accelerator, batch_size)
        return

    import prepare_datasets
    from madm_utils.datasets import EvaluationDataset
    from madm_utils.evaluation import evaluate

    number = NUM_IMAGES * factor
    model = build_model(size, resolution, "full", "fp32", task_name="synthetic_to_depth").to(accelerator.device)
    with tempfile.TemporaryDirectory(prefix="bench-growth-") as folder:
        numbers = ("--num_train", 1, "--num_test", number, "--resolution", resolution, "--num_proc", 1)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            prepare_datasets.main([str(a) for a in ("--dataset", "synthetic", "--output_dir", folder, *numbers)])
        dataset = EvaluationDataset(folder, model.task, "test", resolution)
        yield lambda: evaluate(model, dataset, accelerator, disable=True)


def measure(row: str, factor: int, size: str, resolution: int, cpu_time: bool) -> None:
    """Make calls when asked."""
    quiet_libraries()
    from accelerate import Accelerator

    keep_freed_memory()
    accelerator = Accelerator()
    with make_call(row, factor, size, resolution, accelerator) as call:
        serve(call, dict, clock(accelerator.device.type, cpu_time))


# --- the table -------------------------------------------------------------------------------------------------------


def growth(row: str, repeats: int, *flags: str) -> tuple[float, float]:
    """By what factors time and operations grow."""
    counted = in_own_process(__file__, row, "--side", "flops", *flags)["flops"]
    with (
        Worker(__file__, "--measure", row, "--side", "1", *flags) as small,
        Worker(__file__, "--measure", row, "--side", "2", *flags) as large,
    ):
        seconds = in_turns([small, large], repeats)
    return seconds[1] / seconds[0], counted[1] / counted[0]


def growth_of_processes(repeats: int) -> tuple[float, float, str]:
    """As `growth`, and what the machine itself costs: two trainings that know nothing of each other."""
    if (os.cpu_count() or 1) < 2:
        raise UserError("two processes need two cores, this machine has one; leave the row processes out with --rows")
    with tempfile.TemporaryDirectory(prefix="bench-growth-") as folder:
        bench_scaling.prepare(Path(folder))
        one, two, apart = bench_scaling.measure(Path(folder), "full", Namespace(threads=1, steps=12, repeats=repeats))
    return 2 * two / one, 2.0, f"two trainings apart: {2 * apart / one:.2f}"


def table(args: argparse.Namespace) -> list[str]:
    """Print the table, row by row as they are done; returns what costs more than it should."""
    print("| doubled | cost, times | operations, times | deviation | |")
    print("|---|---|---|---|---|", flush=True)
    flags = ["--size", args.size, "--resolution", str(args.resolution), *["--cpu_time"] * args.cpu_time]
    above = []
    for row in args.rows:
        if row == "processes":
            cost, operations, note = growth_of_processes(args.repeats)
        else:
            (cost, operations), note = growth(row, args.repeats, *flags), ""
        deviation = cost / operations - 1
        if deviation > ALLOWED:
            above.append(f"{row} by {deviation:.0%}")
            note = f"ABOVE {note}"
        print(f"| {ROWS[row]} | {cost:.2f} | {operations:.2f} | {deviation:+.0%} | {note} |", flush=True)
    return above


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="what is doubled")
    parser.add_argument("--size", choices=tuple(SIZES), default="medium", help="widths of the model")
    parser.add_argument("--resolution", type=positive_int, default=128, help="side of the images before doubling")
    parser.add_argument("--repeats", type=positive_int, default=3, help="counted calls, after a first one")
    parser.add_argument(
        "--cpu_time", action="store_true", help="CPU seconds of all threads, for a machine that does other work too"
    )
    parser.add_argument("--measure", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=("1", "2", "flops"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the rows, print the table and the verdict; returns the exit code."""
    args = parse_args(argv)
    if args.side == "flops":
        print(json.dumps({"flops": [flops(args.measure, factor, args.size, args.resolution) for factor in (1, 2)]}))
        return 0
    if args.measure:
        measure(args.measure, int(args.side), args.size, args.resolution, args.cpu_time)
        return 0
    quiet_libraries()
    print(heading())
    above = table(args)
    print(f"\ngoal, at most {ALLOWED:.0%} above the operations: {'MISSED: ' + ', '.join(above) if above else 'met'}")
    return 1 if above else 0


if __name__ == "__main__":
    run(main)
