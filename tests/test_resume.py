"""Interrupted trainings end as uninterrupted ones, bit for bit: killed, asked to stop, without room, with damage.

The script runs for real; most starts are forked from a process that has its libraries imported (`fork_server`).
"""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import datasets
import pytest
from fork_server import shared_server

from benchmarks.soak_resume import (
    Life,
    Moment,
    Pace,
    Setup,
    differences,
    killed,
    logged_step,
    newest_step,
    prepare,
    random_moments,
    uninterrupted,
)
from madm_utils.checkpointing import list_checkpoints, read_marker
from madm_utils.cli import UserError
from madm_utils.prepared_data import open_split

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture(scope="module")
def server():
    return shared_server()


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """Ten steps of two passes over three images: the data is seen several times."""
    folder = tmp_path_factory.mktemp("setup")
    prepare(folder)
    return Setup(folder, steps=10, accumulation=2)


@pytest.fixture(scope="module")
def whole(setup):
    """The uninterrupted run, started as a user does; its folder, and the pace of forked starts."""
    out = setup.folder / "whole"
    pace = uninterrupted(setup, out)
    return out, Pace(start=2.0, step=pace.step)


def tail(life):
    return life.log.read_text()[-3000:]


# --- kills -----------------------------------------------------------------------------------------------------------


def test_killed_while_starting_in_a_step_and_while_saving(setup, whole, server, tmp_path):
    out, pace = whole
    rng = random.Random(7)
    moments = [Moment("start", 0, rng.random())]
    moments += [Moment(kind, step, rng.random()) for kind, step in (("step", 0), ("step", 3), ("step", 7))]
    moments.insert(3, Moment("save", 5, 0.0))
    hits = killed(setup, tmp_path / "out", moments, pace, server.start)
    assert len(hits) == 5 and hits[3] == "while writing checkpoint-6", hits
    assert differences(out, tmp_path / "out") == []
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-6", "checkpoint-8", "checkpoint-10"]
    assert not list((tmp_path / "out").glob(".*"))


def test_two_processes_full_tuning_and_corrupt_images(setup, server, tmp_path):
    """Also what was found to be corrupt is state; every process replaces images the same way, and the statistics of a
    teacher in evaluation mode, of which a checkpoint holds one set, are the same everywhere."""
    damage_image(setup.folder, tmp_path, "synthetic_depth/train")
    pair = replace(setup, folder=tmp_path, steps=6, processes=2, accumulation=1, workers=1, tuning="full")
    pair = replace(pair, more=("--teacher_mode", "eval", "--validate_on", "test"))
    pace = uninterrupted(pair, tmp_path / "whole", server.start)
    # A signal to one process alone stops both after the same step, and no one waits for ever.
    life = Life(pair, tmp_path / "killed", start=server.start)
    while life.running() and life.step() == 0:
        time.sleep(0.01)
    os.kill(life.processes[1].pid, signal.SIGTERM)
    assert [process.wait() for process in life.processes] == [143, 143], tail(life)
    assert newest_step(tmp_path / "killed") < 4
    hits = killed(pair, tmp_path / "killed", [Moment("step", 4, 0.5)], replace(pace, start=2.0), server.start)
    assert len(hits) == 1 and differences(tmp_path / "whole", tmp_path / "killed") == []
    last = read_marker(tmp_path / "killed/checkpoint-6")
    assert last["records"][""]["num_processes"] == 2
    assert len(last["state"]["corrupt_samples"]) == 1
    assert "synthetic_depth/train" in last["state"]["corrupt_samples"][0]


def test_a_launcher_hands_the_signal_on(setup, tmp_path):
    """SIGTERM to torchrun, as a user stops it: the processes save the step that they are in."""
    pair = replace(setup, processes=2, steps=100, accumulation=1, workers=0)
    life = Life(pair, tmp_path / "out")
    while life.running() and life.step() == 0:
        time.sleep(0.01)
    life.processes[0].send_signal(signal.SIGTERM)
    assert life.processes[0].wait() != 0
    stopped = re.search(r"stopped by SIGTERM after step (\d+); go on from checkpoint-(\d+) with", tail(life))
    assert stopped and stopped[1] == stopped[2] == str(newest_step(tmp_path / "out")), tail(life)


def test_differences_are_found(whole, tmp_path):
    """The comparison would see one changed bit of a weight or a number."""
    out, _ = whole
    assert differences(out, out) == []
    for name in ("segmenter/diffusion_pytorch_model.safetensors", "checkpoint-10/training_state.safetensors"):
        shutil.copytree(out, tmp_path / "out")
        content = bytearray((tmp_path / "out" / name).read_bytes())
        content[-1] ^= 1
        (tmp_path / "out" / name).write_bytes(content)
        assert differences(out, tmp_path / "out") == [f"{name} differs"]
        shutil.rmtree(tmp_path / "out")
    shutil.copytree(out, tmp_path / "out")
    lines = (out / "training_log.jsonl").read_text().splitlines()
    lines[4] = re.sub(r'"source_loss": (\d)', r'"source_loss": 1\1', lines[4])
    (tmp_path / "out/training_log.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    assert differences(out, tmp_path / "out") == [
        "training_log.jsonl line 10 is in one run only", "training_log.jsonl line 5 differs",
    ]  # fmt: skip


def test_moments_are_seeded_and_leave_steps_to_be_done(setup):
    moments = random_moments(replace(setup, steps=75), 25, seed=3)
    assert moments == random_moments(replace(setup, steps=75), 25, seed=3) != random_moments(setup, 25, seed=4)
    assert [m.step for m in moments] == sorted(m.step for m in moments) and moments[-1].step <= 73
    assert {m.kind for m in moments} == {"start", "step", "save"}


# --- signals, no room ------------------------------------------------------------------------------------------------


def test_signals_and_a_full_disk(setup, whole, server, tmp_path):
    """A stop saves within one step and says how to go on; a checkpoint that finds no room is left out."""
    out = tmp_path / "out"
    for number, flags in (
        (signal.SIGTERM, ()),
        (signal.SIGINT, ()),
        (signal.SIGUSR1, ("--preempt_signal", "USR1")),
    ):
        life = Life(setup, out, flags, start=server.start)
        while life.running() and life.step() == life.resumed_at:
            time.sleep(0.01)
        for member in life.members():  # as Ctrl-C and a cluster do: loader processes get it too
            member.send_signal(number)
        seen = logged_step(out)
        assert [process.wait() for process in life.processes] == [128 + number], tail(life)
        stopped = re.search(
            rf"stopped by {number.name} after step (\d+); go on .*--resume_from_checkpoint latest", tail(life)
        )
        assert seen <= int(stopped[1]) <= seen + 1 and newest_step(out) == int(stopped[1])
        assert "Traceback" not in tail(life)

    life = Life(setup, out, start=server.start)
    before = newest_step(out)
    limit = life.processes[0].pid, resource.RLIMIT_FSIZE
    resource.prlimit(*limit, (100_000, resource.RLIM_INFINITY))  # larger files do not fit
    while life.running() and "could not be written" not in life.log.read_text():
        time.sleep(0.01)
    resource.prlimit(*limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    life.finish()
    warning = re.search(
        r"checkpoint-(\d+) could not be written \((.*)\); the next one is tried .*kept: (.*)", life.log.read_text()
    )
    assert int(warning[1]) > before and "File too large" in warning[2] and f"checkpoint-{before}" in warning[3]
    assert newest_step(out) == 10 and not (out / f"checkpoint-{warning[1]}").exists()
    assert differences(whole[0], out) == []


STOPPED_WHILE_VALIDATING = """
import signal, sys
import train_madm
validate, met = train_madm.validate, []
def stopped(*args, **options):
    if not met:
        met.append(signal.raise_signal(signal.SIGTERM))
    return validate(*args, **options)
train_madm.validate = stopped
sys.exit(train_madm.main(sys.argv[1:]))
"""


def test_stopped_while_validating(setup, server, tmp_path):
    """The score that was not reached is made up for: curve, best step and model are those of an uninterrupted run."""
    setup = replace(setup, steps=3, more=("--validation_steps", "2", "--validate_on", "test"))
    assert end(setup, tmp_path / "whole", server)[0] == 0
    command = [sys.executable, "-c", STOPPED_WHILE_VALIDATING, *setup.flags(tmp_path / "out")]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}  # as the others
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=one_thread)
    assert done.returncode == 143 and "stopped by SIGTERM after step 2" in done.stdout, done.stderr
    assert read_marker(tmp_path / "out/checkpoint-2")["state"]["unscored"] == [""]
    assert '"validation"' not in (tmp_path / "out/training_log.jsonl").read_text()
    assert end(setup, tmp_path / "out", server)[0] == 0
    assert differences(tmp_path / "whole", tmp_path / "out") == []


STOP_SIGNALS = """
import os, signal, sys, time
from madm_utils.interruption import StopSignals
with StopSignals("USR1") as stop:
    signals = [getattr(signal, name) for name in sys.argv[2:]]
    os.kill(os.getpid(), signals[0])
    print(stop.received, flush=True)
    time.sleep(float(sys.argv[1]))
    for number in signals[1:]:
        os.kill(os.getpid(), number)
    print("alive", stop.received, flush=True)
os.kill(os.getpid(), signals[0])
print("still alive")
"""


@pytest.mark.parametrize(
    ("arguments", "lines", "code"),
    [
        # A launcher repeats what the group got: one request. Afterwards the signal has its usual effect.
        (("0", "SIGTERM", "SIGTERM"), ["15", "alive 15"], -15),
        (("0", "SIGUSR1", "SIGTERM"), ["10", "alive 10"], -10),
        # Later, it is meant: at once.
        (("1.1", "SIGTERM", "SIGTERM"), ["15"], -15),
        (("1.1", "SIGUSR1", "SIGUSR1"), ["10"], -10),
        (("1.1", "SIGTERM", "SIGUSR1"), ["15", "alive 15"], -15),
    ],
)
def test_stop_signals(arguments, lines, code):
    done = subprocess.run([sys.executable, "-c", STOP_SIGNALS, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split("\n")[:-1] == lines and done.returncode == code, done.stderr


# --- damage ----------------------------------------------------------------------------------------------------------


def end(setup, out, server, *flags):
    """Run to the end; exit code and output."""
    life = Life(setup, out, flags, start=server.start)
    return life.processes[0].wait(), life.log.read_text()


def test_truncated_newest_checkpoint(setup, whole, server, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    os.truncate(out / "checkpoint-10/training_state.safetensors", 5000)
    code, output = end(setup, out, server)
    assert code == 2 and "Traceback" not in output
    assert "checkpoint-10 is damaged: training_state.safetensors: 5000 bytes instead of" in output
    assert "--resume_from_checkpoint latest-valid goes on" in output
    code, output = end(setup, out, server, "--resume_from_checkpoint", "latest-valid")
    assert code == 0 and "resuming from checkpoint-8, passing over damaged" in output, output[-3000:]
    assert differences(whole[0], out) == []


def damage_image(source, folder, split):
    """A copy of prepared data and base model in which the first image of a split is no image."""
    shutil.copytree(source / "data", folder / "data")
    shutil.copytree(source / "base", folder / "base")
    rows, metadata = open_split(folder / "data" / split)
    rows = rows.map(
        lambda row, index: {"image": {"bytes": b"x", "path": None}} if index == 0 else {},
        with_indices=True, keep_in_memory=True,
    )  # fmt: skip
    shutil.rmtree(folder / "data" / split)
    for column in {"image", "label"} & set(rows.column_names):
        rows = rows.cast_column(column, datasets.Image())
    rows.save_to_disk(str(folder / "data" / split))
    metadata.save(folder / "data" / split)


def test_too_many_corrupt_images(setup, server, tmp_path):
    """Reported, replaced, and at the limit listed."""
    damage_image(setup.folder, tmp_path, "synthetic_rgb/train")
    setup = replace(setup, folder=tmp_path, steps=3)
    code, output = end(setup, tmp_path / "a", server, "--max_corrupt_samples", "1")
    assert code == 0 and output.count("cannot decode synthetic_rgb/train") == 1, output[-3000:]
    assert "(not an image); another image takes its place" in output
    code, output = end(setup, tmp_path / "b", server, "--max_corrupt_samples", "0")
    assert code == 2 and "Traceback" not in output
    assert re.search(
        r"error: 1 images cannot be decoded.*--max_corrupt_samples.*synthetic_rgb/train .*not an image", output
    )


def test_other_data_under_the_same_path(setup, whole, server, tmp_path):
    """Prepared again from other files, the run would go on with other samples: refused."""
    shutil.copytree(setup.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("whole*"))
    path = tmp_path / "copy/data/synthetic_rgb/train/metadata.json"
    path.write_text(re.sub(r'"fingerprint": "\w+"', '"fingerprint": "other"', path.read_text()))
    shutil.copytree(whole[0], tmp_path / "out")
    code, output = end(replace(setup, folder=tmp_path / "copy"), tmp_path / "out", server)
    assert code == 2 and re.search(r"other settings \(data synthetic_rgb/train: \w+ -> other\)", output), output[
        -3000:
    ]


def test_a_failing_training_is_reported(setup, server, tmp_path):
    """The harness does not take a crash for an end."""
    life = Life(setup, tmp_path / "out", ("--resolution", "100"), start=server.start)
    with pytest.raises(UserError, match=r"ended with exit code \[2\]"):
        life.finish()
