#!/usr/bin/env python
"""Where a training step would make the host wait for the device; prints a Markdown table.

    python benchmarks/count_syncs.py                                    # the published step
    python benchmarks/count_syncs.py --class_mix_scope image --train_batch_size 2 --gradient_accumulation_steps 2

A host that reads a tensor's value waits until the device has computed it, and the device then waits for the next
kernels. Counted in one real optimiser step of a tiny model, also on a CPU, where they cost nothing: operations whose
result depends on values (PyTorch's profiler), and calls that take values into Python or bring them from there. On a
GPU a second step runs in which PyTorch refuses to wait. Other flags are those of train_madm.py.
"""

import argparse
import sys
import traceback
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import build_model, machine, random_batch, training_settings
from madm_utils.cli import quiet_libraries, run

if TYPE_CHECKING:
    from accelerate import Accelerator

ROOT = Path(__file__).parent.parent
OPERATIONS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim",
              "unique_consecutive", "bincount", "equal")  # fmt: skip
METHODS = ("item", "tolist", "cpu", "numpy", "nonzero", "unique", "__bool__", "__int__", "__float__", "__index__",
           "__array__")  # fmt: skip
FUNCTIONS = ("tensor", "as_tensor", "from_numpy")
ALLOWED = {
    ("from_numpy", "class_masks"): "chosen classes, B x 256 bytes: on a GPU from pinned memory, without waiting",
    ("as_tensor", "clip_grad_norm_"): "a tensor of the device already",
    ("_local_scalar_dense", "_fused_adamw_"): "AdamW's step count, which on a GPU its kernel reads there",
}
"""Call, and the function or operation that makes it -> why it does not wait."""


def reads(step: Callable[[], None]) -> Counter[tuple[str, str]]:
    """What `step` reads from tensors, or takes to them from Python.

    Returns:
        (call or operation, place) -> how often. The place of a call is `file:function` of the code that makes it; that
        of an operation is the operation that it is part of.
    """
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    with counted_calls() as found, torch.profiler.profile(activities=activities) as profiler:
        step()
    for event in profiler.events():
        name = event.name.removeprefix("aten::")
        if name in OPERATIONS:
            while event.cpu_parent is not None and event.name in ("aten::_local_scalar_dense", "aten::item"):
                event = event.cpu_parent
            found[name, event.name.removeprefix("aten::")] += 1
    return found


@contextmanager
def counted_calls() -> Iterator[Counter[tuple[str, str]]]:
    """Count calls of `METHODS` and `FUNCTIONS` inside the block."""
    import torch

    calls: Counter[tuple[str, str]] = Counter()
    inside = False

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:  # a call that PyTorch makes to answer another one
                return original(*args, **kwargs)
            calls[name, _place()] += 1
            inside = True
            try:
                return original(*args, **kwargs)
            finally:
                inside = False

        return call

    owners = [(torch.Tensor, METHODS), (torch, FUNCTIONS)]
    patches = [patch.object(o, n, counting(n, getattr(o, n))) for o, names in owners for n in names]
    for one in patches:
        one.start()
    try:
        yield calls
    finally:
        for one in patches:
            one.stop()


def _place() -> str:
    """File and function of the innermost caller outside of PyTorch and this file."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if frame.filename != __file__ and "torch" not in path.parts:
            return f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name}:{frame.name}"
    return "torch"


def reason(read: tuple[str, str]) -> str | None:
    """Why a read does not wait, where `ALLOWED` says so."""
    call, place = read
    return ALLOWED.get((call, place.rsplit(":", 1)[-1]))


def real_step(args: Namespace, model: Any, accelerator: "Accelerator") -> Callable[[], None]:
    """One `train_madm.optimizer_step` after the other, on random images that are on the device already."""
    import copy

    import train_madm
    from madm_utils.augmentations import label_classes
    from madm_utils.distributed import LOCAL_BATCH
    from madm_utils.engines import OptimizerState
    from madm_utils.optimization import build_adamw, lr_scheduler, parameter_groups
    from madm_utils.pseudo_labels import palette_table

    teacher = copy.deepcopy(model.segmenter).requires_grad_(False).to(accelerator.device)
    teacher.train(args.teacher_mode == "train")
    groups = parameter_groups(model.train(), args.learning_rate, args.weight_decay)
    parameters = [p for group in groups for p in group["params"]]
    optimizer = build_adamw(groups, (args.adam_beta1, args.adam_beta2), args.adam_epsilon, args.use_8bit_adam)
    scheduler = lr_scheduler(args.lr_scheduler, optimizer, args.max_train_steps, args.lr_warmup_steps)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    batch = random_batch(model, accelerator.device, args.train_batch_size)
    classes = label_classes(batch["source_label"])
    state = train_madm.Run(
        "", args, model.task, prepared, teacher, optimizer, OptimizerState(optimizer, [parameters]), scheduler,
        parameters, None, palette_table(model.task.palette, accelerator.device), LOCAL_BATCH, {}, step=1,
    )  # fmt: skip
    batches = iter(lambda: {**batch, "corrupt": [], "source_classes": classes}, None)
    return lambda: train_madm.optimizer_step(state, batches, set(), accelerator) and None


def refusing_to_wait(step: Callable[[], None]) -> None:
    """Run `step`; on a GPU, RuntimeError where it waits for the device."""
    import torch

    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def main() -> int:
    """Print the table; exit code 1 when something waits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unet_tuning", choices=("lora", "full"), default="lora")
    known, flags = parser.parse_known_args()
    quiet_libraries()
    import torch

    from madm_utils.engines import TrainingAccelerator

    torch.manual_seed(0)
    model = build_model("tiny", 64, known.unet_tuning, "fp32")
    args = training_settings(model, *flags)
    accelerator = TrainingAccelerator(
        args.mixed_precision or "no", args.gradient_accumulation_steps, args.max_grad_norm
    )
    step = real_step(args, model, accelerator)
    step()  # what is made once
    found = reads(step)
    print(f"{machine()}; torch {torch.__version__}\n\n| what | where | times | waits |\n|---|---|---|---|")
    for read, count in sorted(found.items()):
        print(f"| {read[0]} | {read[1]} | {count} | {f'no: {reason(read)}' if reason(read) else 'yes'} |")
    if torch.cuda.is_available():
        refusing_to_wait(step)
        print("\na step on the GPU ran without waiting (torch.cuda.set_sync_debug_mode)")
    waiting = sum(count for read, count in found.items() if not reason(read))
    print(f"\nreads that wait, in one step: {waiting}")
    return int(waiting > 0)


if __name__ == "__main__":
    run(main)
