"""Parameter groups and learning-rate schedules."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

WARMUP_FRACTION = 500 / 184375
WARMUP_FACTOR = 0.067
STEP_FRACTIONS = (163889 / 184375, 177546 / 184375)
STEP_FACTORS = (1.0, 0.1, 0.01)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    head_lr_multiplier: float = 1.0,
    lora_lr_multiplier: float = 1.0,
) -> list[dict]:
    """AdamW groups over the trainable parameters of `model`.

    Parameters of normalisation layers and every parameter named `bias` are not decayed; learned prompts and gates
    are. Parameters below `segmenter` take `learning_rate * head_lr_multiplier`, those of a LoRA `learning_rate *
    lora_lr_multiplier`. Within a group the order is that of `named_parameters`; a group also carries `names`.
    """
    no_decay = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        if isinstance(module, _NORMS)
        for name, _ in module.named_parameters(recurse=False)
    }
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if name in no_decay or name.rsplit(".", 1)[-1] == "bias" else weight_decay
        lr = learning_rate
        if name.startswith("segmenter."):
            lr *= head_lr_multiplier
        elif ".lora_" in name:  # peft's lora_A and lora_B
            lr *= lora_lr_multiplier
        group = groups.setdefault((lr, decay), {"params": [], "names": [], "lr": lr, "weight_decay": decay})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def multistep_factor(max_steps: int, warmup_steps: int | None = None) -> Callable[[int], float]:
    """The published schedule: linear warm-up from 0.067, then drops to 0.1 and 0.01 at 88.9 % and 96.3 %.

    `warmup_steps` None means the published fraction of training, 500/184375 (27 of 10,000 steps). The drops are
    quantised to 1 / (2 * max_steps - 1), as the published code does.
    """
    warmup = WARMUP_FRACTION if warmup_steps is None else warmup_steps / max_steps
    updates = 2 * max_steps - 1
    milestones = [int(fraction * updates) for fraction in STEP_FRACTIONS]

    def factor(step: int) -> float:
        where = step / max_steps
        if where < warmup:
            return WARMUP_FACTOR + (1 - WARMUP_FACTOR) * where / warmup
        position = int((1 - 1e-6) * where * updates)
        return STEP_FACTORS[sum(position >= m for m in milestones)]

    return factor


def lr_scheduler(
    name: str, optimizer: torch.optim.Optimizer, max_steps: int, warmup_steps: int | None
) -> torch.optim.lr_scheduler.LambdaLR:
    """`multistep` is `multistep_factor`; the other names are those of diffusers."""
    if name == "multistep":
        return torch.optim.lr_scheduler.LambdaLR(optimizer, multistep_factor(max_steps, warmup_steps))
    from diffusers.optimization import get_scheduler

    return get_scheduler(name, optimizer, num_warmup_steps=warmup_steps or 0, num_training_steps=max_steps)


def build_adamw(groups: Iterable[dict], betas: tuple[float, float], eps: float, use_8bit: bool):
    """AdamW over `groups`, with 8-bit moments from bitsandbytes when asked."""
    groups = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    if not use_8bit:
        # One kernel for all tensors, on a CPU as well; under fp16 it skips a step without asking the host.
        return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, betas=betas, eps=eps)
