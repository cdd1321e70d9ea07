#!/usr/bin/env python
"""Kill a training again and again and show that the result is the uninterrupted one, bit for bit.

    python benchmarks/soak_resume.py --kills 25                  # about 8 minutes on two cores
    python benchmarks/soak_resume.py --kills 10 --processes 2 --tuning full

Trains a small model on synthetic data twice: once without interruption, once with SIGKILL to all processes of the run
at random instants (seeded): while it starts, inside a step, while it writes a checkpoint. After every kill it goes on
with `--resume_from_checkpoint latest`, or from the start while there is no checkpoint. Prints every kill and whether
final weights, last checkpoint and logged numbers are equal; exit code 1 if they are not.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from madm_utils.args import positive_int
from madm_utils.checkpointing import MARKER_NAME, list_checkpoints, read_marker
from madm_utils.cli import UserError, quiet_libraries, run

ROOT = Path(__file__).parent.parent
LOG_NAME = "training_log.jsonl"
_WIDTHS = ("--projection_channels", "32", "--bottleneck_channels", "32", "--head_channels", "16", "--rank", "4")
# A look at the run folder every half millisecond sees even a small checkpoint being written.
_POLL_SECONDS = 0.0005


@dataclass(frozen=True)
class Setup:
    """One training, on data and a base model in `folder` (see `prepare`)."""

    folder: Path
    steps: int
    processes: int = 1
    workers: int = 2
    accumulation: int = 1
    checkpointing_steps: int = 2
    tuning: str = "lora"
    more: tuple[str, ...] = ()
    """Further flags."""

    def flags(self, out: Path) -> list[str]:
        """Arguments of `train_madm.py`."""
        paths = ("--data_dir", self.folder / "data", "--output_dir", out)
        model = ("--pretrained_model_name_or_path", self.folder / "base", "--unet_tuning", self.tuning, *_WIDTHS)
        pace = ("--max_train_steps", self.steps, "--gradient_accumulation_steps", self.accumulation)
        saving = ("--checkpointing_steps", self.checkpointing_steps, "--checkpoints_total_limit", 3)
        flags = ("--task", "synthetic_to_depth", *paths, *model, *pace, *saving, "--logging_steps", 1)
        flags += ("--resolution", 64, "--rare_class_min_pixels", 10, "--dataloader_num_workers", self.workers)
        flags += ("--pseudo_label_threshold", 0.15)  # the teacher has a say from the first step on
        return [str(flag) for flag in (*flags, *self.more)]


def prepare(folder: Path, num_train: int = 3) -> None:
    """Write a small base model and `num_train` synthetic images per modality into `folder`."""
    import prepare_datasets
    from madm_utils.small_model import build_small_stable_diffusion

    build_small_stable_diffusion(folder / "base", (16, 32, 32, 32), (8, 16, 16), norm_groups=4)
    numbers = ("--num_train", num_train, "--num_test", 1, "--resolution", 96, "--num_proc", 1)
    prepare_datasets.main([str(a) for a in ("--dataset", "synthetic", "--output_dir", folder / "data", *numbers)])


# --- one start of the script -----------------------------------------------------------------------------------------


class Process(Protocol):
    """What is needed of `subprocess.Popen`."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self) -> int: ...


Start = Callable[[Setup, list[str], Path], list[Process]]
"""Starts `train_madm.py` with the given flags, its output appended to a file; the processes it has to wait for."""


def start_script(setup: Setup, flags: list[str], log: Path) -> list[Process]:
    """Start the script as a user does: with python, or for several processes with torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(setup.processes)]
    command = [sys.executable, *(launcher if setup.processes > 1 else []), str(ROOT / "train_madm.py"), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    with log.open("ab") as output:
        return [subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)]


class Life:
    """One start of the training, until it ends or is killed."""

    def __init__(self, setup: Setup, out: Path, more: Sequence[str] = (), start: Start = start_script):
        self.out, self.log = out, out.with_name(f"{out.name}.txt")
        self.resumed_at = newest_step(out)
        self.leftovers = {name for name, _ in unfinished(out)}
        resume = ("--resume_from_checkpoint", "latest") if self.resumed_at else ()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_bytes(b"")
        self.processes = start(setup, [*setup.flags(out), *resume, *more], self.log)

    def running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def step(self) -> int:
        """Last step that this start has logged; before the first one, the step it resumed at."""
        return max(logged_step(self.out), self.resumed_at) if self.begun() else self.resumed_at

    def begun(self) -> bool:
        """Whether this start makes steps already; then it has dropped the lines of later steps from the log."""
        return b"training:" in self.log.read_bytes()

    def saving(self) -> list[tuple[str, int]]:
        """Checkpoints that this start is writing, or deleting: temporary name and step."""
        return [(name, step) for name, step in unfinished(self.out) if name not in self.leftovers]

    def members(self) -> list[psutil.Process]:
        """All processes of the run: launcher, ranks, loader workers."""
        roots = [psutil.Process(process.pid) for process in self.processes if process.poll() is None]
        return [member for root in roots for member in (root, *root.children(recursive=True))]

    def kill(self, members: Sequence[psutil.Process] = ()) -> None:
        """SIGKILL to every process of the run, to the given ones first; returns when all are gone."""
        for member in members:
            _send(member, signal.SIGKILL)
        rest = self.members()
        for member in rest:
            _send(member, signal.SIGKILL)
        for process in self.processes:
            process.wait()
        while any(_alive(member) for member in (*members, *rest)):
            time.sleep(_POLL_SECONDS)

    def finish(self) -> None:
        """Wait for the end.

        Raises:
            UserError: the script failed; shows the end of its output.
        """
        codes = [process.wait() for process in self.processes]
        if any(codes):
            output = self.log.read_text(errors="replace")[-3000:]
            raise UserError(f"train_madm.py ended with exit code {codes}:\n{output}")


def _send(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:  # ended by itself meanwhile
        return


def _alive(process: psutil.Process) -> bool:
    """Whether it still does something; a dead one that nobody has asked for yet does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def newest_step(out: Path) -> int:
    """Step of the newest finished checkpoint, 0 without one."""
    checkpoints = list_checkpoints(out)
    return int(checkpoints[-1].name.removeprefix("checkpoint-")) if checkpoints else 0


def unfinished(out: Path) -> list[tuple[str, int]]:
    """Temporary checkpoint folders: name and step."""
    names = os.listdir(out) if out.is_dir() else []
    return [(name, int(match[1])) for name in names if (match := re.match(r"\.checkpoint-(\d+)\.tmp-", name))]


def logged_step(out: Path) -> int:
    """Step of the last complete line of the log, 0 without one."""
    try:
        *_, last, _ = (out / LOG_NAME).read_bytes().split(b"\n")
        return json.loads(last)["step"]
    except (FileNotFoundError, ValueError):
        return 0


# --- killing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """When to kill."""

    kind: str
    """`start`: after `fraction` of the time until the first step; `step`: `fraction` of a step after `step` was
    logged; `save`: `fraction` of 20 ms after a checkpoint of `step` or later began to be written."""
    step: int = 0
    fraction: float = 0.0


@dataclass(frozen=True)
class Pace:
    """Seconds until the first step, and per step."""

    start: float
    step: float


def random_moments(setup: Setup, kills: int, seed: int) -> list[Moment]:
    """Moments spread over the run, in order; the last one leaves some steps to be done."""
    rng = random.Random(seed)
    moments, step = [], 0
    for index in range(kills):
        step = rng.randint(step, max(step, setup.steps * (index + 1) // (kills + 1)))
        moments.append(Moment(rng.choices(("start", "step", "save"), (1, 3, 2))[0], step, rng.random()))
    return moments


def wait_for(life: Life, moment: Moment, pace: Pace) -> list[psutil.Process]:
    """Return at `moment`, with the processes that live then; none when the training ended before."""
    if moment.kind == "start":
        time.sleep(moment.fraction * pace.start)
        return life.members()
    while life.running() and (not life.begun() or life.step() < moment.step):
        time.sleep(0.01)
    members = life.members()  # listed before, because listing takes longer than writing a small checkpoint
    if moment.kind == "step":
        time.sleep(moment.fraction * pace.step)
    else:
        while members and not any(step >= moment.step for _, step in life.saving()):
            time.sleep(_POLL_SECONDS)
            if not _alive(members[0]):
                break
        time.sleep(moment.fraction * 0.02)
    return members if life.running() else []


def uninterrupted(setup: Setup, out: Path, start: Start = start_script) -> Pace:
    """Train to the end; returns how long it took."""
    started = time.monotonic()
    life = Life(setup, out, start=start)
    while life.running() and not logged_step(out):
        time.sleep(0.05)
    until_first_step = time.monotonic() - started
    life.finish()
    steps = time.monotonic() - started - until_first_step
    return Pace(until_first_step, steps / setup.steps)


def killed(setup: Setup, out: Path, moments: Sequence[Moment], pace: Pace, start: Start = start_script) -> list[str]:
    """Train to the end through a kill at every moment; returns, and prints, where each one hit."""
    hits = []
    for number, moment in enumerate(moments, start=1):
        life = Life(setup, out, start=start)
        members = wait_for(life, moment, pace)
        if not members:
            life.finish()
            print(f"kill {number:2}: too late, the training had ended", flush=True)
            break
        life.kill(members)
        hits.append(where(life))
        begun = f"from step {life.resumed_at}" if life.resumed_at else "from the start"
        print(f"kill {number:2}: {begun}, {hits[-1]}", flush=True)
    Life(setup, out, start=start).finish()
    return hits


def where(life: Life) -> str:
    """What a killed start of the training was doing."""
    if not life.begun():
        return "while starting"
    if left := life.saving():
        step = left[0][1]
        return f"while {'deleting' if step < newest_step(life.out) else 'writing'} checkpoint-{step}"
    return f"after step {life.step()}"


# --- comparing -------------------------------------------------------------------------------------------------------


def differences(first: Path, second: Path) -> list[str]:
    """What differs between two finished runs, bit for bit: trained model, last checkpoint, logged numbers."""
    found = []
    results, others = _result(first), _result(second)
    for name in sorted(results.keys() | others.keys()):
        if results.get(name) != others.get(name):
            found.append(f"{name} {'differs' if name in results and name in others else 'is in one run only'}")
    return found


def _result(out: Path) -> dict[str, object]:
    last = list_checkpoints(out)[-1]
    files = [path for path in last.rglob("*") if path.is_file() and path.name != MARKER_NAME]
    files += [path for path in out.rglob("*.safetensors") if not path.relative_to(out).parts[0].startswith("checkp")]
    marker = read_marker(last)
    result: dict[str, object] = {path.relative_to(out).as_posix(): path.read_bytes() for path in files}
    result[f"{last.name}/{MARKER_NAME}"] = {key: marker[key] for key in ("step", "state", "files")}
    for number, line in enumerate((out / LOG_NAME).read_text().splitlines(), start=1):
        values = json.loads(line)
        values.pop("timing", None)  # depends on the machine and the hour
        result[f"{LOG_NAME} line {number}"] = values
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Train twice and compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=positive_int, default=25, help="how often [25]")
    parser.add_argument("--steps", type=positive_int, help="optimiser steps [3 per kill, at least 20]")
    parser.add_argument("--processes", type=positive_int, default=1, help="of the training [1]")
    parser.add_argument("--workers", type=int, default=2, help="loader processes of each [2]")
    parser.add_argument("--accumulation", type=positive_int, default=2, help="passes per step [2]")
    parser.add_argument("--checkpointing_steps", type=positive_int, default=2, help="save every N steps [2]")
    parser.add_argument("--tuning", choices=("lora", "full"), default="lora", help="what is trained [lora]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [0]")
    args = parser.parse_args(argv)
    quiet_libraries()
    steps = args.steps or max(20, 3 * args.kills)
    with tempfile.TemporaryDirectory(prefix="soak-resume-") as folder:
        setup = Setup(
            Path(folder), steps, args.processes, args.workers, args.accumulation, args.checkpointing_steps, args.tuning
        )
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            prepare(setup.folder)
        started = time.monotonic()
        pace = uninterrupted(setup, setup.folder / "whole")
        print(f"uninterrupted: {steps} steps of {pace.step:.2f} s after {pace.start:.0f} s to start", flush=True)
        hits = killed(setup, setup.folder / "killed", random_moments(setup, args.kills, args.seed), pace)
        found = differences(setup.folder / "whole", setup.folder / "killed")
        minutes = (time.monotonic() - started) / 60
    for text in found:
        print(f"DIFFERENT: {text}")
    writing = sum("writing" in hit for hit in hits)
    print(
        f"{'FAILED' if found else 'PASSED'}: {len(hits)} kills ({writing} while writing a checkpoint), {steps} steps, "
        f"{args.processes} processes, {args.tuning}, seed {args.seed}: final weights, last checkpoint and log "
        f"{'differ' if found else 'are equal'}; {minutes:.0f} minutes"
    )
    return 1 if found else 0


if __name__ == "__main__":
    run(main)
