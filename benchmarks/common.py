"""What the benchmarks share: models with random weights, the real training step, rows in processes of their own."""

import copy
import json
import os
import platform
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from madm_utils.cli import UserError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from benchmarks.plain_step import Arrangement
    from madm_utils.modeling_madm import MADMModel

ROOT = Path(__file__).resolve().parent.parent
# Widths of VAE and UNet, and the flags of train_madm.py about the head's.
_SMALL_DIFFUSION = {
    "vae": {"block_out_channels": (16, 32, 32), "layers_per_block": 1, "norm_num_groups": 8},
    "unet": {
        "block_out_channels": (32, 64, 64, 64),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    },
}
SIZES = {
    "tiny": _SMALL_DIFFUSION | {"head": {"projection_channels": 64, "bottleneck_channels": 32, "head_channels": 32}},
    # Head and UNet share the memory roughly as in the real size.
    "scaled": _SMALL_DIFFUSION
    | {"head": {"projection_channels": 128, "bottleneck_channels": 32, "head_channels": 64}},
    # Stable Diffusion 1.4 and the published head, all widths by four; as many channels per group and attention head.
    "medium": {
        "vae": {"block_out_channels": (32, 64, 128, 128), "layers_per_block": 2, "norm_num_groups": 8},
        "unet": {
            "block_out_channels": (80, 160, 320, 320),
            "cross_attention_dim": 192,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
        },
        "head": {"projection_channels": 128, "bottleneck_channels": 32, "head_channels": 64},
    },
    "real": {
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32},
        "unet": {
            "block_out_channels": (320, 640, 1280, 1280),
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
            "norm_num_groups": 32,
        },
        "head": {},
    },
}


def build_model(
    size: str,
    resolution: int,
    tuning: str,
    precision: str,
    quantization: str = "none",
    task_name: str = "cityscapes_to_deliver_depth",
) -> "MADMModel":
    """A model with random weights and the widths `SIZES[size]`; `precision` is fp16, bf16, or another for float32."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig

    from madm_utils.base_model import BaseModelReference, load_unet
    from madm_utils.feature_extractor import DiffusionFeatureExtractor
    from madm_utils.modeling_madm import LORA_TARGET_MODULES, MADMModel, segmenter_config
    from madm_utils.segmenter import Segmenter
    from madm_utils.tasks import TASKS

    widths = SIZES[size]
    frozen = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    levels = len(widths["vae"]["block_out_channels"])
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    vae = AutoencoderKL(**widths["vae"], **blocks).to(frozen)
    unet = UNet2DConditionModel(**widths["unet"])
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    task = TASKS[task_name]
    if tuning == "lora":
        unet.requires_grad_(False).to(frozen)
        if quantization != "none":
            with tempfile.TemporaryDirectory() as folder:
                unet.save_pretrained(Path(folder) / "unet")
                unet = load_unet(BaseModelReference(folder), frozen, quantization)
        unet.add_adapter(LoraConfig(r=32, target_modules=list(LORA_TARGET_MODULES)), adapter_name=task.modality)
    extractor = DiffusionFeatureExtractor(vae, unet, scheduler, resolution // 2 ** (levels - 1))
    config = segmenter_config(extractor, task.num_classes, **widths["head"])
    segmenter = Segmenter(**config, prompt_dim=unet.config.cross_attention_dim)
    model = MADMModel(extractor, segmenter, task, BaseModelReference("random"), resolution, tuning)
    model.set_trainable()
    return model


def training_settings(model: "MADMModel", *flags: str) -> Namespace:
    """The settings of `train_madm.py` for this model's task, with pseudo labels weighted as published, and `flags`."""
    from madm_utils.train_args import parse_train_args, train_parser

    required = ["--data_dir", "-", "--output_dir", "-", "--pretrained_model_name_or_path", "-"]
    published = ["--pseudo_label_weight", "batch", "--lplr_mask", "pseudo"]
    argv = ["--task", model.task.name, "--unet_tuning", model.unet_tuning, *required, *published, *flags]
    [(args, _)] = parse_train_args(train_parser(""), argv)
    return args


def random_batch(model: "MADMModel", device: "torch.device", batch_size: int = 1) -> dict[str, "torch.Tensor"]:
    """Source and target images with labels of the source, as a data loader gives them."""
    import torch

    shape = (batch_size, 3, model.resolution, model.resolution)
    return {
        "source_image": torch.randint(256, shape, dtype=torch.uint8, device=device),
        "target_image": torch.randint(256, shape, dtype=torch.uint8, device=device),
        "source_label": torch.randint(model.task.num_classes, (batch_size, *shape[2:]), device=device),
    }


def enable_checkpointing(model: "MADMModel") -> None:
    """What `--gradient_checkpointing` does."""
    model.unet.enable_gradient_checkpointing()
    model.segmenter.enable_gradient_checkpointing()


def training_step(
    model: "MADMModel", args: Namespace, accelerator: "Accelerator", batch_size: int = 1, compiled: bool = False
) -> Callable[[], None]:
    """A function that makes one optimiser step of the suite on random images."""
    import train_madm
    from madm_utils.augmentations import label_classes
    from madm_utils.draws import draw
    from madm_utils.ema import ema_decay, update_teacher
    from madm_utils.optimization import build_adamw, parameter_groups
    from madm_utils.pseudo_labels import palette_table

    teacher = copy.deepcopy(model.segmenter).requires_grad_(False).to(accelerator.device).train()
    groups = parameter_groups(model.train(), args.learning_rate, args.weight_decay)
    parameters = [p for group in groups for p in group["params"]]
    if compiled:
        from madm_utils.compilation import compile_model

        compile_model(model.extractor, [model.segmenter, teacher], accelerator.device)
    optimizer = build_adamw(groups, (args.adam_beta1, args.adam_beta2), args.adam_epsilon, args.use_8bit_adam)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    palette = palette_table(model.task.palette, accelerator.device)
    batch = random_batch(model, accelerator.device, batch_size)
    classes = label_classes(batch["source_label"])
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        update_teacher(teacher, model.segmenter, ema_decay(count))
        draws = draw(batch["source_label"], classes, count, str(count), args)
        train_madm.adaptation_pass(prepared, teacher, batch, draws, args, palette, accelerator)
        accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain_training_step(
    model: "MADMModel", args: Namespace, accelerator: "Accelerator", batch_size: int, arrangement: "Arrangement"
) -> Callable[[], None]:
    """A function that makes one optimiser step of an arrangement of `plain_step.py` on random images."""
    from benchmarks.plain_step import PlainTraining
    from madm_utils.augmentations import label_classes
    from madm_utils.draws import draw

    training = PlainTraining(model, args, accelerator, arrangement)
    batch = random_batch(model, accelerator.device, batch_size)
    classes = label_classes(batch["source_label"])

    def step() -> None:
        number = training.num_steps + 1
        training.step(batch, draw(batch["source_label"], classes, number, str(number), args))

    return step


def training_flops(size: str, resolution: int, tuning: str, batch_size: int = 1) -> int:
    """Operations of one plain training step, counted on tensors without memory; in a process with no other task."""
    import torch
    from accelerate import Accelerator

    from benchmarks.measuring import count_flops
    from benchmarks.plain_step import Arrangement, PlainTraining
    from madm_utils.augmentations import label_classes
    from madm_utils.draws import draw

    with torch.device("meta"):
        model = build_model(size, resolution, tuning, "fp32")
    args, accelerator = training_settings(model), Accelerator(cpu=True, device_placement=False)
    batch = random_batch(model, torch.device("cpu"), batch_size)
    draws = draw(batch["source_label"], label_classes(batch["source_label"]), 1, "stream", args)
    draws.mix_masks = draws.mix_masks.to("meta")
    batch = {name: tensor.to("meta") for name, tensor in batch.items()}
    # Palette images of PIL need values, and no operations that count.
    training = PlainTraining(model, args, accelerator, Arrangement(palette=True))
    return count_flops(lambda: training.adapt(batch, draws))


def prediction_flops(size: str, resolution: int, batch_size: int = 1) -> int:
    """Operations of one plain prediction, counted on tensors without memory."""
    import torch

    from benchmarks.measuring import count_flops
    from benchmarks.plain_step import predict

    with torch.device("meta"):
        model = build_model(size, resolution, "full", "fp32").eval()
        images = torch.empty(batch_size, 3, resolution, resolution)
    return count_flops(lambda: predict(model, images))


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


_running: set[subprocess.Popen] = set()
"""Processes of `run_script` that have not ended."""


def stop_scripts_on_sigterm() -> None:
    """From now on SIGTERM, which unlike Ctrl-C reaches one process alone, goes on to every script that runs."""

    def stop(signum: int, frame: object) -> None:
        for process in list(_running):
            process.terminate()
        sys.exit(128 + signum)

    signal.signal(signal.SIGTERM, stop)


def run_script(log: Path, *command: object, threads: int = 1) -> float:
    """Run a Python script from the root of the repository, its output appended to `log`; returns its CPU seconds.

    Raises:
        UserError: it failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, *map(str, command)]
    with log.open("a", encoding="utf-8") as output:
        output.write(f"$ {shlex.join(arguments)}\n")
        output.flush()
        process = subprocess.Popen(arguments, stdout=output, stderr=output, env=environment, cwd=ROOT)
        _running.add(process)
        # Not process.wait(): of a child that has been waited for, the system no longer tells the CPU time.
        _, status, usage = os.wait4(process.pid, 0)
    _running.discard(process)
    code = process.returncode = os.waitstatus_to_exitcode(status)
    if code:
        raise UserError(f"{Path(command[0]).name} ended with exit code {code}; see the end of {log}")
    return usage.ru_utime + usage.ru_stime


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Table of texts."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def in_own_process(script: str, name: str, *flags: str) -> dict:
    """Run `script --measure name` and return the JSON object of its last line.

    Raises:
        UserError: the process failed; its own message is on standard error.
    """
    command = [sys.executable, script, "--measure", name, *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"row {name} failed with exit code {done.returncode} (see above); leave it out with --rows")
    return json.loads(done.stdout.splitlines()[-1])
