"""Clocks, operation counts and peaks: how the benchmarks compare two ways of computing the same.

Speed is a ratio in one run. Each of the two sides is a `Worker`, a process of its own, so that its peak memory is its
own; they are asked in turns, so that whatever else the machine does hits both.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING

from madm_utils.cli import UserError

if TYPE_CHECKING:
    import torch

SUITE = "suite"
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
MATRIX_SIDES = (512, 1024, 2048, 4096, 8192, 16384)
_ANSWER = "answer: "
LONG_ENOUGH = 0.1
"""Seconds of a matrix product from which on larger ones are not faster."""


# --- processes -------------------------------------------------------------------------------------------------------


class Worker:
    """A benchmark script in a process of its own, which makes one timed call whenever it is asked (see `serve`).

    Args:
        script: file of the script.
        flags: of its command line, in which it is told what to measure.
    """

    def __init__(self, script: str, *flags: str):
        self.flags = flags
        self._process = subprocess.Popen(
            [sys.executable, script, *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def seconds(self) -> float:
        """Time of one call."""
        try:
            print(file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # the answer says what that means
        return self._answer()

    def finish(self) -> dict:
        """What the process says at its end."""
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        return self._answer()

    def _answer(self):
        for line in self._process.stdout:
            if line.startswith(_ANSWER):
                return json.loads(line.removeprefix(_ANSWER))
            sys.stderr.write(line)  # of a library
        code = self._process.wait()
        raise UserError(f"{' '.join(self.flags)} ended with exit code {code} (see above); leave this row out")


def serve(call: Callable[[], None], finish: Callable[[], dict], clock: Callable[[], float]) -> None:
    """The side of the process: time a call for every line of standard input, and answer `finish()` at its end."""
    for _ in sys.stdin:
        started = clock()
        call()
        print(f"{_ANSWER}{json.dumps(clock() - started)}", flush=True)
    print(f"{_ANSWER}{json.dumps(finish())}", flush=True)


def in_turns(workers: Sequence[Worker], repeats: int) -> list[float]:
    """Median seconds of each worker over `repeats` rounds, after one that is not counted."""
    rounds = [[worker.seconds() for worker in workers] for _ in range(repeats + 1)]
    return [statistics.median(times) for times in zip(*rounds[1:], strict=True)]


def against_plain(script: str, name: str, side: str, repeats: int, *flags: str) -> dict:
    """Measure `side` of a row and plain in turns.

    Args:
        script: the benchmark, which serves one side of a row with `--measure ROW --side SIDE`.
        name: of the row.
        side: `SUITE`, or another that the script knows.
        repeats: counted calls of each.
        flags: further ones of the script.

    Returns:
        What the process of `side` says at its end, among it `memory_gib`; `seconds` per call; both of plain as
        `plain_...`; `speed`, how many times as fast as plain `side` is, and `memory`, its part of plain's.
    """
    with (
        Worker(script, "--measure", name, "--side", side, *flags) as ours,
        Worker(script, "--measure", name, "--side", "plain", *flags) as plain,
    ):
        seconds, plain_seconds = in_turns([ours, plain], repeats)
        result, plain_memory = ours.finish(), plain.finish()["memory_gib"]
    result |= {"seconds": seconds, "plain_seconds": plain_seconds, "plain_memory_gib": plain_memory}
    return result | {"speed": plain_seconds / seconds, "memory": result["memory_gib"] / plain_memory}


def clock(device_type: str, cpu_time: bool = False) -> Callable[[], float]:
    """A clock in seconds that waits for the device; `cpu_time`: of all threads of this process, whatever else runs."""
    import torch

    wall = time.process_time if cpu_time else time.perf_counter

    def now() -> float:
        if device_type == "cuda":
            torch.cuda.synchronize()
        return wall()

    return now


# --- what the machine can do, and what the work is -------------------------------------------------------------------


def matrix_peak(device: "torch.device", dtype: "torch.dtype", clock: Callable[[], float]) -> float:
    """Floating point operations per second of the best of several square matrix products.

    float32 on a GPU may use TF32, as its convolutions do by default.
    """
    import torch

    torch.set_float32_matmul_precision("high")
    best = 0.0
    for side in MATRIX_SIDES:
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in "lr")
        times = []
        for _ in range(6):
            started = clock()
            left @ right
            times.append(clock() - started)
        best = max(best, 2 * side**3 / min(times[1:]))
        if min(times[1:]) > LONG_ENOUGH:
            break
    return best


def is_bf16_fast() -> bool:
    """Whether the device multiplies bf16 matrices at least as fast as float32 ones; some CPUs only emulate bf16."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    now = clock(device.type)
    return matrix_peak(device, torch.bfloat16, now) >= matrix_peak(device, torch.float32, now)


def count_flops(function: Callable[[], object]) -> int:
    """Operations (two per multiply-add) of matrix products, convolutions and attention in a call of `function`."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def convolution_backward(
        grad_out_shape, x_shape, weight_shape, _bias, _stride, _padding, _dilation, transposed, _output_padding,
        _groups, output_mask, out_shape=None, **_,
    ) -> int:  # fmt: skip
        # torch's formula takes every output channel to depend on every input channel, also between groups, which makes
        # the gradient of a depthwise weight too expensive by the number of channels. True for any groups: both
        # gradients, of the input and of the weight, take as many multiply-adds as the forward pass, which are one per
        # element of the weight (out, in / groups, ...) and position of the output (of the input, where transposed).
        positions = x_shape if transposed else grad_out_shape
        multiply_adds = positions[0] * prod(positions[2:]) * prod(weight_shape)
        return 2 * multiply_adds * sum(output_mask[:2])

    custom = {torch.ops.aten.convolution_backward: convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=custom) as counter:
        function()
    return counter.get_total_flops()


def heading() -> str:
    """Machine, versions and day, for the line above the tables."""
    import torch

    from benchmarks.common import machine

    threads = torch.get_num_threads()
    return f"{machine()}, {threads} threads; torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n"


def goal(what: str, met: bool, value: str) -> None:
    """Print one line of the verdict."""
    print(f"goal, {what}: {'met' if met else 'MISSED'} ({value})")


def unmeasured(what: str) -> None:
    """Print the line of a goal for a GPU where there is none."""
    print(f"goal, {what}: not measured (no GPU here)")
