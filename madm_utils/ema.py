"""Mean teacher: exponential moving average of parameters with DAFormer's ramp."""

import torch
from torch import nn

from madm_utils.engines import whole


def ema_decay(step: int, max_decay: float = 0.999) -> float:
    """Decay of the update at `step` >= 1: `min(1 - 1 / (step + 1), max_decay)`; 1/2, 2/3, 3/4, ..."""
    return min(1.0 - 1.0 / (step + 1), max_decay)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """`teacher <- decay * teacher + (1 - decay) * student`, in place.

    Parameters only: the teacher's BatchNorm buffers come from its own forward passes. The student may be sharded (then
    every process has to call), the teacher is whole.
    """
    shadow = [p.data for p in teacher.parameters()]
    current = [whole(p.data).to(s.device, s.dtype) for p, s in zip(student.parameters(), shadow, strict=True)]
    torch._foreach_lerp_(shadow, current, 1.0 - decay)


@torch.no_grad()
def copy_buffers(teacher: nn.Module, student: nn.Module) -> None:
    """Give the teacher the student's BatchNorm statistics: in evaluation mode it gathers none of its own."""
    for shadow, current in zip(teacher.buffers(), student.buffers(), strict=True):
        shadow.copy_(current)
