#!/usr/bin/env python
"""Seconds and memory of one training step and of one predicted image; prints a Markdown table.

    python benchmarks/bench_step.py                     # the rows of docs/benchmarks.md that fit this machine
    python benchmarks/bench_step.py --rows tiny-128-lora real-256-lora

Every row runs in a process of its own, so that its peak memory is its own (resident memory on CPU, allocated memory on
a GPU). Weights are random: speed does not depend on them. A training step is the real one: two student passes, the
teacher's pass, four losses, backward, clipping, AdamW, EMA.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import (
    build_model,
    enable_checkpointing,
    in_own_process,
    machine,
    peak_gib,
    training_settings,
    training_step,
)
from madm_utils.cli import quiet_libraries, run


@dataclass(frozen=True)
class Row:
    """One configuration: widths, image side, UNet tuning, precision."""

    size: str
    resolution: int
    tuning: str
    precision: str = "no"
    train: bool = True
    gpu_only: bool = False


ROWS = {
    "tiny-128-lora": Row("tiny", 128, "lora"),
    "tiny-128-full": Row("tiny", 128, "full"),
    "real-256-lora": Row("real", 256, "lora"),
    "real-512-lora": Row("real", 512, "lora", train=False),
    "real-512-lora-bf16": Row("real", 512, "lora", "bf16", train=False),
    "real-512-lora-bf16-train": Row("real", 512, "lora", "bf16", gpu_only=True),
    "real-512-full-fp16-train": Row("real", 512, "full", "fp16", gpu_only=True),
}


def prediction(row: Row, model, accelerator) -> Callable[[], None]:
    """A function that segments one random image."""
    import torch

    model.to(accelerator.device).eval()
    image = torch.rand(1, 3, row.resolution, row.resolution, device=accelerator.device)

    def predict() -> None:
        with torch.no_grad(), accelerator.autocast():
            model(image).logits.argmax(dim=1)

    return predict


def seconds(function: Callable[[], None], repeats: int, synchronize: Callable[[], None]) -> float:
    """Median seconds of `repeats` calls after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[len(times[1:]) // 2]


def measure(name: str, repeats: int) -> dict:
    """Measure one row in this process."""
    quiet_libraries()
    import torch
    from accelerate import Accelerator

    row = ROWS[name]
    accelerator = Accelerator(mixed_precision=row.precision)
    gpu = accelerator.device.type == "cuda"
    synchronize = torch.cuda.synchronize if gpu else lambda: None
    torch.manual_seed(0)
    model = build_model(row.size, row.resolution, row.tuning, row.precision)
    result = {"row": name, "parameters": sum(p.numel() for p in model.parameters())}
    result["image_seconds"] = seconds(prediction(row, model, accelerator), repeats, synchronize)
    result["image_memory_gib"] = peak_gib(gpu)
    if row.train:
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        if row.size == "real":
            enable_checkpointing(model)
        step = training_step(model, training_settings(model), accelerator)
        result["step_seconds"] = seconds(step, repeats, synchronize)
        result["step_memory_gib"] = peak_gib(gpu)
    return result


def main() -> None:
    """Measure the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="default: all that fit this machine")
    parser.add_argument("--repeats", type=int, default=3, help="counted calls per row, after a first one [3]")
    parser.add_argument("--measure", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.repeats)))
        return
    quiet_libraries()
    import torch

    names = args.rows or [n for n, row in ROWS.items() if torch.cuda.is_available() or not row.gpu_only]
    print(f"{machine()}; torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    print("| row | parameters | s / training step | peak GiB | s / image | peak GiB |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in names:
        r = in_own_process(__file__, name, "--repeats", str(args.repeats))
        step = f"{r['step_seconds']:.2f} | {r['step_memory_gib']:.1f}" if "step_seconds" in r else "- | -"
        image = f"{r['image_seconds']:.2f} | {r['image_memory_gib']:.1f}"
        print(f"| {name} | {r['parameters'] / 1e6:.1f} M | {step} | {image} |", flush=True)


if __name__ == "__main__":
    run(main)
