#!/usr/bin/env python
"""Throughput per process of two training processes against one, on the CPU; prints a Markdown table and a verdict.

    python benchmarks/bench_scaling.py                    # LoRA and full; about 10 minutes, needs an idle machine
    python benchmarks/bench_scaling.py --rows full --threads 4

Runs the real `train_madm.py` on a small model and synthetic data: alone, then as two processes (gloo) with the same
number of threads and images each, in turns. The time per step is the median of what the training logs. Two processes
of one training wait for each other and exchange gradients; they also share memory and caches, which costs two
trainings that know nothing of each other as well: the last column.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import machine
from madm_utils.args import positive_int
from madm_utils.cli import UserError, quiet_libraries, run

ROOT = Path(__file__).parent.parent
GOAL = 0.9
LOGGING_STEPS = 3
ROWS = {
    "lora": ("--unet_tuning", "lora"),
    "full": ("--unet_tuning", "full"),
    "full-synchronised": ("--unet_tuning", "full", "--sync_batch_statistics"),
}
_SIZES = ("--resolution", 128, "--projection_channels", 64, "--bottleneck_channels", 32, "--head_channels", 32)


def prepare(folder: Path) -> None:
    """Write a small base model and synthetic data into `folder`."""
    import prepare_datasets
    from madm_utils.small_model import build_small_stable_diffusion

    build_small_stable_diffusion(folder / "base")
    numbers = ("--num_train", 4, "--num_test", 1, "--resolution", 128, "--num_proc", 1)
    with redirect_stdout(sys.stderr):
        prepare_datasets.main([str(a) for a in ("--dataset", "synthetic", "--output_dir", folder / "data", *numbers)])


def start(folder: Path, name: str, flags: Sequence[str], processes: int, args: argparse.Namespace) -> subprocess.Popen:
    """Start a training of `args.steps` steps with one pair of images per process; output goes to `folder/name.txt`."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes) if processes > 1 else ()
    paths = ("--data_dir", folder / "data", "--output_dir", folder / name)
    model = ("--task", "synthetic_to_depth", "--pretrained_model_name_or_path", folder / "base", *_SIZES)
    # Loader processes would take part of the other process's core.
    pace = ("--max_train_steps", args.steps, "--logging_steps", LOGGING_STEPS, "--dataloader_num_workers", 0)
    rest = ("--rare_class_min_pixels", 10, "--checkpointing_steps", 10**6, "--report_to", "none", *flags)
    command = [sys.executable, *launcher, ROOT / "train_madm.py", *paths, *model, *pace, *rest]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "ACCELERATE_USE_CPU": "1"}
    with (folder / f"{name}.txt").open("w") as output:
        return subprocess.Popen([str(a) for a in command], stdout=output, stderr=output, env=environment)


def seconds_per_step(folder: Path, name: str, training: subprocess.Popen) -> list[float]:
    """Wait for a training; seconds per step between its log entries, the first two left out (start, first step).

    Raises:
        UserError: it failed.
    """
    if training.wait():
        raise UserError(f"the training {name} failed:\n{(folder / f'{name}.txt').read_text()[-2000:]}")
    lines = (folder / name / "training_log.jsonl").read_text().splitlines()
    return [json.loads(line)["timing"]["seconds_per_step"] for line in lines[2:]]


def measure(folder: Path, row: str, args: argparse.Namespace) -> tuple[float, float, float]:
    """Median seconds per step of one process, of two processes, and of two trainings at once."""
    one, two, apart = [], [], []
    for turn in range(args.repeats):
        for parts, times, processes in ((("one",), one, 1), (("two",), two, 2), (("left", "right"), apart, 1)):
            names = [f"{row}-{turn}-{part}" for part in parts]
            trainings = {name: start(folder, name, ROWS[row], processes, args) for name in names}
            try:
                for name, training in trainings.items():
                    times += seconds_per_step(folder, name, training)
            finally:
                for training in trainings.values():
                    training.kill()
    return statistics.median(one), statistics.median(two), statistics.median(apart)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the rows, print the table and the verdict; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="what to measure [all]")
    parser.add_argument("--threads", type=positive_int, default=1, help="of each process [1]")
    parser.add_argument("--steps", type=positive_int, default=24, help="of each training, at least 9 [24]")
    parser.add_argument("--repeats", type=positive_int, default=2, help="trainings of each kind [2]")
    args = parser.parse_args(argv)
    if args.steps < 3 * LOGGING_STEPS:
        parser.error(f"--steps must be at least {3 * LOGGING_STEPS}, got {args.steps}")
    quiet_libraries()
    import torch

    if 2 * args.threads > (os.cpu_count() or 1):
        raise UserError(
            f"two processes with {args.threads} threads need {2 * args.threads} cores, this machine has "
            f"{os.cpu_count()}; give fewer --threads"
        )
    worst = 1.0
    with tempfile.TemporaryDirectory(prefix="bench-scaling-") as folder:
        prepare(Path(folder))
        print(f"{machine()}; torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; {args.threads} thread(s) each\n")
        print("| row | s / step, 1 process | s / step, 2 processes | throughput per process | of 2 trainings apart |")
        print("|---|---|---|---|---|", flush=True)
        for row in args.rows:
            one, two, apart = measure(Path(folder), row, args)
            print(f"| {row} | {one:.3f} | {two:.3f} | {one / two:.1%} | {one / apart:.1%} |", flush=True)
            worst = min(worst, one / two)
    print(
        f"\ngoal, at least {GOAL:.0%} of one process: {'met' if worst >= GOAL else 'MISSED'} (worst row {worst:.1%})"
    )
    return 0 if worst >= GOAL else 1


if __name__ == "__main__":
    run(main)
