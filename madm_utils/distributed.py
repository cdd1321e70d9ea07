"""What "the batch" is when several processes train: the images of this process, or those of all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator

PATIENCE = timedelta(hours=2)
"""How long processes wait for one that writes a checkpoint or reaches the Hub."""
PerImage = TypeVar("PerImage", Tensor, np.ndarray, Sequence)


@dataclass(frozen=True)
class BatchScope:
    """The batch within which MADM decides: BatchNorm, dropout, class mix, augmentation, pseudo-label weight.

    Published: every process decides within its own images, which is the default here and makes every method the
    identity. With `--sync_batch_statistics` the processes decide together, so that n processes with B images each
    follow one process with n * B. They must then call the methods in the same order, with equally many images.

    Args:
        num_processes: processes that share the batch.
        index: place of this process among them; its images follow those of the processes before it.
        number: which batch of the pass this is; separates the random streams of processes that decide alone.
    """

    num_processes: int = 1
    index: int = 0
    number: int = 0

    @classmethod
    def of(cls, accelerator: "Accelerator", synchronized: bool) -> "BatchScope":
        """All processes where `synchronized`, else this one."""
        if synchronized:
            return cls(accelerator.num_processes, accelerator.process_index)
        return cls(number=accelerator.process_index)

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the processes, without gradient."""
        if self.num_processes == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.num_processes

    def gather(self, images: Tensor) -> Tensor:
        """(B, ...) of every process -> (num_processes * B, ...), without gradient."""
        if self.num_processes == 1:
            return images
        images = images.detach().contiguous()
        parts = [torch.empty_like(images) for _ in range(self.num_processes)]
        dist.all_gather(parts, images)
        return torch.cat(parts)

    def gather_host(self, values: np.ndarray) -> np.ndarray:
        """(B, ...) uint8 or bool of every process -> (num_processes * B, ...), without waiting for a device."""
        if self.num_processes == 1:
            return values
        own = torch.from_numpy(values.view(np.uint8))
        parts = [torch.empty_like(own) for _ in range(self.num_processes)]
        dist.all_gather(parts, own, group=host_group())
        return torch.cat(parts).numpy().view(values.dtype)

    def local(self, images: PerImage) -> PerImage:
        """The entries of this process's images, out of one entry per image of the batch."""
        size = len(images) // self.num_processes
        return images[self.index * size : (self.index + 1) * size]


LOCAL_BATCH = BatchScope()
_host_group: dist.ProcessGroup | None = None


def host_group() -> dist.ProcessGroup | None:
    """All processes, for exchanging CPU tensors while the devices go on; None means the default group.

    The first call is collective.
    """
    global _host_group
    if dist.get_backend() == "gloo":
        return None
    if _host_group is None:
        _host_group = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _host_group


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`BatchNorm2d` over the batch of all processes, on any device (torch's SyncBatchNorm refuses the CPU)."""

    def __init__(self, num_features: int, eps: float, momentum: float, scope: BatchScope):
        super().__init__(num_features, eps, momentum)
        self.scope = scope

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x, 0) if self.training else super().forward(x)

    def part(self, x: Tensor, start: int) -> Tensor:
        """In training, normalise (B, c, H, W), which are the channels from `start` on."""
        channels = slice(start, start + x.shape[1])
        if start == 0:
            self.num_batches_tracked.add_(1)
        affine = self.weight[channels], self.bias[channels]
        y, mean, variance = _NormalizeBatch.apply(x, *affine, self.eps, self.scope)
        count = x.numel() // x.shape[1] * self.scope.num_processes
        self.running_mean[channels].lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var[channels].lerp_((variance * (count / (count - 1))).to(self.running_var.dtype), self.momentum)
        return y


class _NormalizeBatch(torch.autograd.Function):
    """Batch normalisation over all processes (1502.03167); keeps one tensor of the input's size for the backward."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float, scope: BatchScope):
        precise = torch.promote_types(x.dtype, torch.float32)
        variance, mean = torch.var_mean(x.to(precise), dim=(0, 2, 3), correction=0)
        means, variances = scope.gather(torch.stack([mean, variance])[None]).unbind(dim=1)
        # Variance of all = mean of the variances + variance of the means, for equally many images.
        mean = means.mean(dim=0)
        variance = (variances + (means - mean).square()).mean(dim=0)
        ctx.scope, ctx.eps = scope, eps
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps), mean, variance

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        x, weight, mean, variance = ctx.saved_tensors
        scale = (variance + ctx.eps).rsqrt()
        normalized = (x.to(mean.dtype) - mean[:, None, None]) * scale[:, None, None]
        grad = grad.to(mean.dtype)
        grad_bias = grad.sum(dim=(0, 2, 3))
        grad_weight = (grad * normalized).sum(dim=(0, 2, 3))
        # Of the affine parameters every process keeps its own gradient: DDP averages it as it does all others.
        count = x.numel() // x.shape[1]
        mean_grad, mean_product = ctx.scope.mean(torch.stack([grad_bias, grad_weight]) / count)[:, :, None, None]
        grad_x = (grad - mean_grad - normalized * mean_product) * (weight * scale)[:, None, None]
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None


class SyncDropout2d(nn.Dropout2d):
    """`Dropout2d` that draws for the images of all processes, whose generators must be in the same state."""

    def __init__(self, p: float, scope: BatchScope):
        super().__init__(p)
        self.scope = scope

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        everyone = x.new_ones(len(x) * self.scope.num_processes, x.shape[1], 1, 1)
        return x * self.scope.local(F.dropout2d(everyone, self.p))


def share_statistics(module: nn.Module, accelerator: "Accelerator") -> None:
    """Give every process the BatchNorm statistics of the main one, which are those that are saved. Collective."""
    if accelerator.num_processes > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def synchronize_statistics(module: nn.Module, scope: BatchScope) -> None:
    """Replace every `BatchNorm2d` and `Dropout2d` inside `module` by one that acts on the batch of `scope`.

    Parameters and buffers stay the same tensors under the same names. Nothing changes for a scope of one process.
    """
    if scope.num_processes == 1:
        return
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            replacement = SyncBatchNorm2d(child.num_features, child.eps, child.momentum, scope)
            replacement.weight, replacement.bias = child.weight, child.bias
            replacement.running_mean, replacement.running_var = child.running_mean, child.running_var
            replacement.num_batches_tracked = child.num_batches_tracked
            setattr(module, name, replacement.train(child.training))
        elif isinstance(child, nn.Dropout2d):
            setattr(module, name, SyncDropout2d(child.p, scope).train(child.training))
        else:
            synchronize_statistics(child, scope)
