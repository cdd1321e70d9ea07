#!/usr/bin/env python
"""Seconds until something happens: `--help` of every script, and the first training step of the demo.

    python benchmarks/bench_startup.py

The demo's time is counted from its start, with the preparation of its data; it is stopped when both
trainings have made their first step.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import machine
from madm_utils.cli import UserError, quiet_libraries, run

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train_madm.py", "eval_madm.py", "predict_madm.py", "prepare_datasets.py", "convert_original_madm.py",
           "export_madm.py", "demo_app.py")  # fmt: skip
HELP_GOAL, STEP_GOAL = 2, 20


def help_seconds(script: str, repeats: int) -> float:
    """Median seconds of `script --help`."""
    seconds = []
    for _ in range(repeats):
        started = time.monotonic()
        subprocess.run([sys.executable, ROOT / script, "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.monotonic() - started)
    return sorted(seconds)[repeats // 2]


def first_step_seconds() -> dict[str, float]:
    """Seconds from the start of the demo to the start and to the first step of both trainings."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        waiting = {
            "trainings begin": out / "source_only.log",
            "first steps": out / "adapted" / "training_log.jsonl",
        }
        also = {"first steps": out / "source_only" / "training_log.jsonl"}
        started = time.monotonic()
        command = [sys.executable, ROOT / "recipes/demo.py", "--output_dir", out]
        demo = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        seconds = {}
        try:
            while len(seconds) < len(waiting):
                if demo.poll() is not None:
                    raise UserError(f"{command[1]} ended with exit code {demo.returncode} before its first step")
                for name, path in waiting.items():
                    # A log of a training is there before its first step is in it.
                    ready = all(
                        p.exists() and (p.suffix != ".jsonl" or p.stat().st_size) for p in (path, also.get(name, path))
                    )
                    if name not in seconds and ready:
                        seconds[name] = time.monotonic() - started
                time.sleep(0.05)
        finally:
            os.killpg(demo.pid, signal.SIGKILL)
            demo.wait()
    return seconds


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="calls of each --help [3]")
    args = parser.parse_args()
    quiet_libraries()
    print(f"{machine()}, {time.strftime('%Y-%m-%d')}\n\n| script | s to --help |\n|---|---|", flush=True)
    slowest = 0.0
    for script in SCRIPTS:
        seconds = help_seconds(script, args.repeats)
        slowest = max(slowest, seconds)
        print(f"| {script} | {seconds:.2f} |", flush=True)
    print(f"\ngoal, --help in {HELP_GOAL} s: {'met' if slowest <= HELP_GOAL else 'MISSED'} ({slowest:.2f} s)\n")
    print("| recipes/demo.py, seconds after its start | |\n|---|---|", flush=True)
    steps = first_step_seconds()
    for name, seconds in steps.items():
        print(f"| {name} | {seconds:.1f} |")
    print()
    starts = {"the demo starts": 0.0, "its trainings start": steps["trainings begin"]}
    for start, began in starts.items():
        seconds = steps["first steps"] - began
        met = "met" if seconds <= STEP_GOAL else "MISSED"
        print(f"goal, first steps {STEP_GOAL} s after {start}: {met} ({seconds:.1f} s)")


if __name__ == "__main__":
    run(main)
