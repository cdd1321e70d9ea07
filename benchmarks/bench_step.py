#!/usr/bin/env python
"""Seconds and memory of one training step and of one predicted image; prints a Markdown table.

    python benchmarks/bench_step.py                     # the rows of docs/benchmarks.md that fit this machine
    python benchmarks/bench_step.py --rows tiny-128-lora real-256-lora

Every row runs in a process of its own, so that its peak memory is its own (resident memory on CPU, allocated memory on
a GPU). Weights are random: speed does not depend on them. A training step is the real one: two student passes, the
teacher's pass, four losses, backward, clipping, AdamW, EMA.
"""

import argparse
import copy
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from madm_utils.cli import UserError, quiet_libraries, run


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
WIDTHS = {
    "tiny": {"projection_channels": 64, "bottleneck_channels": 32, "head_channels": 32},
    "real": {},
}


def build_model(row: Row):
    """A model with random weights: small widths (tiny) or those of Stable Diffusion 1.4 and the paper (real)."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig

    from madm_utils.base_model import BaseModelReference
    from madm_utils.feature_extractor import DiffusionFeatureExtractor
    from madm_utils.modeling_madm import LORA_TARGET_MODULES, MADMModel, segmenter_config
    from madm_utils.segmenter import Segmenter
    from madm_utils.tasks import TASKS

    real = row.size == "real"
    frozen = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(row.precision, torch.float32)
    vae_channels = (128, 256, 512, 512) if real else (16, 32, 32)
    vae = AutoencoderKL(
        block_out_channels=vae_channels,
        down_block_types=["DownEncoderBlock2D"] * len(vae_channels),
        up_block_types=["UpDecoderBlock2D"] * len(vae_channels),
        layers_per_block=2 if real else 1,
        norm_num_groups=32 if real else 8,
    ).to(frozen)
    unet = UNet2DConditionModel(
        block_out_channels=(320, 640, 1280, 1280) if real else (32, 64, 64, 64),
        cross_attention_dim=768 if real else 32,
        attention_head_dim=8 if real else 4,
        norm_num_groups=32 if real else 8,
    )
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    extractor = DiffusionFeatureExtractor(vae, unet, scheduler, row.resolution // 2 ** (len(vae_channels) - 1))
    task = TASKS["cityscapes_to_deliver_depth"]
    config = segmenter_config(extractor, task.num_classes, **WIDTHS[row.size])
    segmenter = Segmenter(**config, prompt_dim=unet.config.cross_attention_dim)
    if row.tuning == "lora":
        unet.requires_grad_(False).to(frozen)
        unet.add_adapter(LoraConfig(r=16, target_modules=list(LORA_TARGET_MODULES)), adapter_name=task.modality)
    model = MADMModel(extractor, segmenter, task, BaseModelReference("random"), row.resolution, row.tuning)
    model.set_trainable()
    return model


def training_step(row: Row, model, accelerator) -> Callable[[], None]:
    """A function that makes one optimiser step on random images, batch 1."""
    import torch

    import train_madm
    from madm_utils.args import parse_train_args, train_parser
    from madm_utils.ema import ema_decay, update_teacher
    from madm_utils.optimization import build_adamw, parameter_groups
    from madm_utils.pseudo_labels import palette_table

    flags = ["--task", model.task.name, "--data_dir", "-", "--output_dir", "-", "--unet_tuning", row.tuning]
    args, task = parse_train_args(train_parser(""), [*flags, "--pretrained_model_name_or_path", "-"])
    device = accelerator.device
    if row.size == "real":
        model.unet.enable_gradient_checkpointing()
    teacher = copy.deepcopy(model.segmenter).requires_grad_(False).to(device).train()
    groups = parameter_groups(model.train(), args.learning_rate, args.weight_decay)
    parameters = [p for group in groups for p in group["params"]]
    optimizer = build_adamw(groups, (args.adam_beta1, args.adam_beta2), args.adam_epsilon, use_8bit=False)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    palette = palette_table(task.palette, device)
    shape = (1, 3, row.resolution, row.resolution)
    batch = {
        "source_image": torch.randint(256, shape, dtype=torch.uint8, device=device),
        "target_image": torch.randint(256, shape, dtype=torch.uint8, device=device),
        "source_label": torch.randint(task.num_classes, (1, *shape[2:]), device=device),
    }
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        update_teacher(teacher, model.segmenter, ema_decay(count))
        draws = train_madm.draw(batch["source_label"], count, str(count), args)
        train_madm.adaptation_pass(prepared, teacher, batch, draws, args, palette, accelerator)
        accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


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
    model = build_model(row)
    result = {"row": name, "parameters": sum(p.numel() for p in model.parameters())}
    result["image_seconds"] = seconds(prediction(row, model, accelerator), repeats, synchronize)
    result["image_memory_gib"] = peak_gib(gpu)
    if row.train:
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        result["step_seconds"] = seconds(training_step(row, model, accelerator), repeats, synchronize)
        result["step_memory_gib"] = peak_gib(gpu)
    return result


def peak_gib(gpu: bool) -> float:
    """Peak memory so far: allocated on the GPU, resident on the CPU."""
    import torch

    return (
        torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    ) / 2**30


def machine() -> str:
    """The machine in words."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "CPU"
    )
    return f"{model}, {os.cpu_count()} cores, {platform.system()}"


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
        command = [sys.executable, __file__, "--measure", name, "--repeats", str(args.repeats)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(
                f"row {name} failed with exit code {done.returncode} (see above); leave it out with --rows"
            )
        r = json.loads(done.stdout.splitlines()[-1])
        step = f"{r['step_seconds']:.2f} | {r['step_memory_gib']:.1f}" if "step_seconds" in r else "- | -"
        image = f"{r['image_seconds']:.2f} | {r['image_memory_gib']:.1f}"
        print(f"| {name} | {r['parameters'] / 1e6:.1f} M | {step} | {image} |", flush=True)


if __name__ == "__main__":
    run(main)
