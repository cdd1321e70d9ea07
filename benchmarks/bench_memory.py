#!/usr/bin/env python
"""Peak memory of one training step, batch 1; prints Markdown tables.

    python benchmarks/bench_memory.py
    python benchmarks/bench_memory.py --rows lora-bf16-ckpt full-bf16-ckpt

With a GPU: what PyTorch allocated and reserved in the sizes of Stable Diffusion 1.4 and the paper, 512 pixels. Without
one: the resident memory of a scaled model on the CPU, measured; and for the real size the bytes of all tensors that
live at the same time, counted on tensors without memory (`count` says what that leaves out).

Every row runs in a process of its own, with random weights. The step is the real one of `train_madm.py`: two student
passes, the teacher's pass, four losses, backward, clipping, AdamW, EMA.
"""

import argparse
import copy
import json
import sys
import time
import warnings
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import (
    build_model,
    enable_checkpointing,
    in_own_process,
    machine,
    peak_gib,
    random_batch,
    training_settings,
    training_step,
)
from madm_utils.cli import quiet_libraries, run

GIB = 2**30
REAL = ("real", 512)
SCALED = ("scaled", 192)


@dataclass(frozen=True)
class Row:
    """One way to train."""

    tuning: str
    precision: str = "bf16"
    checkpointing: bool = True
    adam_8bit: bool = False
    quantization: str = "none"

    @property
    def name(self) -> str:
        parts = [self.tuning, {"no": "fp32"}.get(self.precision, self.precision)]
        parts += ["ckpt"] * self.checkpointing + ["adam8"] * self.adam_8bit
        return "-".join(parts + [self.quantization] * (self.quantization != "none"))

    @property
    def flags(self) -> list[str]:
        """Of `train_madm.py`, as far as the step itself reads them."""
        return ["--use_8bit_adam"] * self.adam_8bit


_ROWS = [
    Row(tuning, precision, checkpointing)
    for tuning in ("lora", "full")
    for precision in ("no", "bf16")
    for checkpointing in (False, True)
]
_ROWS += [Row("lora", "fp16"), Row("full", "fp16")]
_ROWS += [Row("lora", quantization="int8"), Row("lora", quantization="nf4")]
_ROWS += [Row("lora", adam_8bit=True), Row("full", adam_8bit=True)]
ROWS = {row.name: row for row in _ROWS}
GOALS = {"lora-bf16-ckpt": 12e9, "full-bf16-ckpt": 24e9}


# --- counted ---------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that are alive: `now`, and the `peak` since the start or the last `restart`."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def restart(self) -> None:
        self.peak = self.now

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def count(row: Row, size: str, resolution: int) -> dict[str, float]:
    """Bytes of one training step on a GPU, from the sizes of its tensors alone.

    The real step runs on tensors that have a shape and a type but no memory. Not in it: the CUDA context (about half a
    GiB), workspaces of the kernels, rounding and gaps of the allocator.

    Returns:
        `weights` (frozen ones and the teacher's included), `gradients`, `optimizer` (moments), `activations` (what the
        first branch keeps for backward, with the weights that autocast cast for it), `peak`.
    """
    from accelerate import Accelerator
    from torch._subclasses.fake_tensor import FakeTensorMode

    import train_madm
    from madm_utils.augmentations import label_classes
    from madm_utils.pseudo_labels import palette_table

    if row.precision == "fp16":
        row = replace(row, precision="bf16")  # as many bytes, and accelerate refuses fp16 on the CPU
    accelerator = Accelerator(cpu=True, mixed_precision=row.precision, device_placement=False)
    with torch.device("meta"):
        model = build_model(size, resolution, row.tuning, row.precision).train()
    saving = quantization_saving(model.unet, row.quantization)
    if row.checkpointing:
        enable_checkpointing(model)
    if row.precision != "no":
        _normalize_in_float32(model)
    args = training_settings(model, *row.flags)
    teacher = copy.deepcopy(model.segmenter).requires_grad_(False)
    batch = random_batch(model, torch.device("cpu"))
    draws = train_madm.draw(batch["source_label"], label_classes(batch["source_label"]), 1, "stream", args)
    activations = []
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, LiveBytes() as memory:
        for module in (model, teacher):
            module.to_empty(device="cpu")
        batch = {name: fake.from_tensor(tensor) for name, tensor in batch.items()}
        draws.mix_masks = fake.from_tensor(draws.mix_masks)
        palette = palette_table(model.task.palette)
        weights = memory.now
        hook = model.register_forward_hook(lambda *_: activations.append(memory.now - weights))
        train_madm.adaptation_pass(accelerator.prepare_model(model), teacher, batch, draws, args, palette, accelerator)
        hook.remove()
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = sum(p.grad.nbytes for p in trained)
    moments = sum(moment_bytes(p, row.adam_8bit) for p in trained)
    # AdamW of PyTorch, which works on all tensors at once on a GPU, makes one temporary copy of the second moments.
    temporary = 0 if row.adam_8bit else sum(4 * p.numel() for p in trained)
    return {
        "weights": weights - saving,
        "gradients": gradients,
        "optimizer": moments,
        "activations": activations[0],
        "peak": max(memory.peak, weights + gradients + temporary) + moments - saving,
    }


def _normalize_in_float32(model: nn.Module) -> None:
    """Group and layer norm under autocast as on a GPU, where they compute and return float32.

    Autocast on the CPU, with which we count, leaves them in half precision; convolutions, products and attention are
    the same in both.
    """
    for module in model.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def moment_bytes(parameter: torch.Tensor, adam_8bit: bool) -> int:
    """Both moments of AdamW: float32; or 8 bits and a float32 scale per 256, for tensors of at least 4096 elements."""
    number = parameter.numel()
    return 2 * number + 8 * -(-number // 256) if adam_8bit and number >= 4096 else 8 * number


def quantization_saving(unet: nn.Module, quantization: str) -> float:
    """Bytes that quantising the linear layers of a half-precision UNet saves: nf4 has a float32 scale per 64 weights,
    int8 one per row."""
    layers = [m for name, m in unet.named_modules() if isinstance(m, nn.Linear) and ".lora_" not in name]
    number, rows = sum(m.weight.numel() for m in layers), sum(m.out_features for m in layers)
    return {"none": 0.0, "nf4": number * (2 - 0.5 - 4 / 64), "int8": number - 4.0 * rows}[quantization]


# --- measured --------------------------------------------------------------------------------------------------------


def measure(row: Row, size: str, resolution: int) -> dict[str, float]:
    """GiB in this process before and at the peak of two training steps (the second has the optimiser's state)."""
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision=row.precision)
    gpu = accelerator.device.type == "cuda"
    torch.manual_seed(0)
    model = build_model(size, resolution, row.tuning, row.precision, row.quantization)
    if row.checkpointing:
        enable_checkpointing(model)
    step = training_step(model, training_settings(model, *row.flags), accelerator)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    before = peak_gib(gpu)
    for _ in range(2):
        step()
    result = {"before": before, "peak": peak_gib(gpu)}
    if gpu:
        result["reserved"] = torch.cuda.max_memory_reserved() / GIB
    return result


# --- tables ----------------------------------------------------------------------------------------------------------


def table(title: str, names: list[str], columns: dict[str, str], kind: str, unit: float) -> dict[str, float]:
    """Print one table, row by row as they are done; returns the last column."""
    print(f"**{title}**\n\n| row | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|", flush=True)
    last = {}
    for name in names:
        result = in_own_process(__file__, name, "--kind", kind)
        values = [result[key] / unit for key in columns.values()]
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in values)} |", flush=True)
        last[name] = values[-1]
    print()
    return last


def verdicts(peaks: dict[str, float], how: str) -> None:
    """Compare the goals' rows with the goals."""
    for name in GOALS.keys() & peaks.keys():
        used, goal = peaks[name] * GIB / 1e9, GOALS[name] / 1e9
        print(f"goal, {name} in {goal:.0f} GB: {'met' if used <= goal else 'MISSED'} ({used:.1f} GB {how})")


def main() -> None:
    """Print the tables for this machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="default: all that fit this machine")
    parser.add_argument("--measure", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=("gpu", "cpu", "counted"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    quiet_libraries()
    if args.measure:
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        function = {"gpu": measure, "cpu": measure, "counted": count}[args.kind]
        print(json.dumps(function(ROWS[args.measure], *(SCALED if args.kind == "cpu" else REAL))))
        return
    print(f"{machine()}; torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    names = args.rows or list(ROWS)
    if torch.cuda.is_available():
        columns = {"GiB before": "before", "peak GiB allocated": "peak", "peak GiB reserved": "reserved"}
        verdicts(table("Measured: real size, 512 pixels", names, columns, "gpu", 1), "measured")
        return
    plain = [name for name in names if ROWS[name].quantization == "none" and ROWS[name].precision != "fp16"]
    columns = {"GiB resident before": "before", "peak GiB resident": "peak"}
    table("Measured on the CPU: scaled model, 192 pixels", plain, columns, "cpu", 1)
    columns = {key: key for key in ("weights", "gradients", "optimizer", "activations", "peak")}
    title = "Counted, not measured: real size, 512 pixels, GiB on a GPU"
    verdicts(table(title, names, columns, "counted", GIB), "counted, not measured")


if __name__ == "__main__":
    run(main)
