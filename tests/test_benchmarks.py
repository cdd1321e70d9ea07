"""What the benchmarks measure with: operations by hand, processes asked in turns, rows, verdicts."""

import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from benchmarks import bench_growth, bench_inference, bench_step
from benchmarks.measuring import SUITE, Worker, against_plain, count_flops, in_turns
from benchmarks.plain_step import Arrangement
from madm_utils.cli import UserError

# One side of a benchmark: calls take 1, 2, 3, ... seconds of its clock on plain's side, half of it on the other.
SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from benchmarks.measuring import serve

if "broken" in sys.argv:
    sys.exit(3)
seconds = 2.0 if "plain" in sys.argv else 1.0
times = iter(t for call in range(1, 9) for t in (10 * call, 10 * call + call * seconds))
print("libraries talk")
serve(lambda: print("so do calls"), lambda: {{"memory_gib": seconds}}, lambda: next(times))
"""


@pytest.fixture
def script(tmp_path) -> str:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(root=str(Path(__file__).parents[1])))
    return str(path)


def test_workers_are_asked_in_turns(script):
    """Median of the counted calls 2, 3 and 4; what a process prints besides does not disturb the answers."""
    with Worker(script, "ours") as ours, Worker(script, "plain") as plain:
        assert in_turns([ours, plain], 3) == [3.0, 6.0]
        assert ours.finish() == {"memory_gib": 1.0}


def test_against_plain(script):
    result = against_plain(script, "row", SUITE, 1)
    assert result["speed"] == 2.0
    assert result["memory"] == 0.5
    assert (result["seconds"], result["plain_seconds"], result["plain_memory_gib"]) == (2.0, 4.0, 2.0)


def test_a_process_that_fails(script):
    with Worker(script, "broken") as worker, pytest.raises(UserError, match="broken ended with exit code 3"):
        worker.seconds()


@pytest.mark.parametrize(
    ("layer", "shape", "multiply_adds"),
    [
        (nn.Linear(3, 5), (2, 3), 2 * 3 * 5),
        (nn.Conv2d(4, 8, 3, padding=1), (2, 4, 5, 6), 2 * 30 * 8 * 4 * 9),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 5, 6), 2 * 30 * 4 * 9),
        (nn.Conv2d(4, 8, 3, stride=2, groups=2), (1, 4, 5, 5), 4 * 8 * 2 * 9),
        (nn.ConvTranspose2d(4, 8, 2, stride=2, groups=2), (1, 4, 3, 3), 9 * 4 * 4 * 4),
    ],
)
def test_operations_by_hand(layer, shape, multiply_adds):
    """Forward, gradient of the input and gradient of the weight cost the same, two operations per multiply-add."""
    x = torch.randn(shape, requires_grad=True)
    assert count_flops(lambda: layer(x)) == 2 * multiply_adds
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * 2 * multiply_adds
    layer.requires_grad_(False)
    assert count_flops(lambda: layer(x).sum().backward()) == 2 * 2 * multiply_adds


def test_rows_by_machine():
    """Without a GPU no fp16, no real size at 512 pixels; bf16 only where it is fast. A GPU runs all of them."""
    for bench in (bench_step, bench_inference):
        rows = bench.ROWS
        assert all(row.by_default(gpu=True, bf16=True) for row in rows.values())
        on_cpu = {name for name, row in rows.items() if row.by_default(gpu=False, bf16=False)}
        assert all("fp32" in name and "real-512" not in name for name in on_cpu)
        with_bf16 = {name for name, row in rows.items() if row.by_default(gpu=False, bf16=True)}
        assert on_cpu < with_bf16 and not any("fp16" in name and "bf16" not in name for name in with_bf16)
    assert {"tiny-128-lora-fp32", "medium-256-full-fp32"} <= set(bench_step.ROWS)
    assert set(bench_step.PARTS) == {field.name for field in dataclasses.fields(Arrangement)}


def test_verdicts_of_steps(capsys):
    results = {
        "medium-256-full-fp32": {"speed": 1.5, "memory": 0.61},
        "real-512-full-fp16": {"speed": 1.99, "seconds": 0.1101},
        "real-512-full-bf16": {"fraction": 0.4},
        "real-512-full-bf16-compile": {"seconds": 0.0801},
    }
    bench_step.verdicts(results, gpu=False)
    found = [line.split(": ")[-1].split(" (")[0] for line in capsys.readouterr().out.splitlines()]
    assert found == ["met", "MISSED", "MISSED", "MISSED", "met", "MISSED"]


def test_verdicts_of_predictions(capsys):
    results = {"medium-256-b1-fp32": {"speed": 1.39, "memory": 0.6}, "real-512-b8-bf16": {"images": 50}}
    bench_inference.verdicts(results, gpu=False)
    lines = capsys.readouterr().out.splitlines()
    assert [" MISSED " in f" {line} " for line in lines] == [True, False, False]
    assert lines[2] == "goal, real size, at least 50 images per second: not measured (no GPU here)"
    bench_inference.verdicts(results, gpu=True)
    assert capsys.readouterr().out.endswith("images per second: met (50.0, real-512-b8-bf16)\n")


def test_what_grows():
    assert bench_growth.work("batch", 2, 128) == (128, 2)
    assert bench_growth.work("resolution", 2, 128) == (256, 1)
    assert bench_growth.work("test-set", 2, 128) == (128, 1)


@pytest.mark.parametrize("side", [SUITE, "plain"])
def test_calls_that_are_timed(side):
    """A step and a prediction of each side, as the benchmarks build them."""
    try:
        accelerator = Accelerator(cpu=True)
        bench_step.make_step(bench_step.Row("tiny", 64, "lora", "fp32"), side, accelerator)()
        bench_inference.make_prediction(bench_inference.Row("tiny", 64, 2, "fp32"), side, accelerator)()
    finally:
        AcceleratorState._reset_state(True)


def test_sigterm_goes_on_to_the_script(tmp_path):
    """And the caller ends with the signal's exit code."""
    script, ready, stopped = (tmp_path / name for name in ("script.py", "ready", "stopped"))
    script.write_text(
        "import pathlib, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: sys.exit(pathlib.Path({str(stopped)!r}).touch()))\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(600)"
    )
    caller = (
        "import sys; from pathlib import Path; from benchmarks.common import run_script, stop_scripts_on_sigterm; "
        "stop_scripts_on_sigterm(); run_script(Path(sys.argv[1]), sys.argv[2])"
    )
    root = Path(__file__).parents[1]
    process = subprocess.Popen([sys.executable, "-c", caller, tmp_path / "log.txt", script], cwd=root)
    wait_for(ready)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    wait_for(stopped)


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
