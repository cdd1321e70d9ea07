"""DAFormer segmentation head (2111.14887, section 3.2): embed every level, fuse with a depthwise-separable ASPP.

Shared by every system of the suite; nothing here knows about diffusion models.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recompute_in_backward(module: nn.Module, *inputs: Any) -> Tensor:
    """`module(*inputs)` that keeps no activations but its inputs; backward computes the others again, bit by bit.

    The second forward pass leaves BatchNorm's running statistics alone, which the first has already updated.
    """
    return checkpoint(
        module, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _buffers_unchanged(module))
    )


@contextmanager
def _buffers_unchanged(module: nn.Module) -> Iterator[None]:
    """What is written into the buffers below `module` goes into copies, which are dropped at the end."""
    # Copies, not absent statistics (`track_running_stats`): autograd saves them, and recomputing must save as much.
    buffers = [(m, name, buffer) for m in module.modules() for name, buffer in m.named_buffers(recurse=False)]
    for owner, name, buffer in buffers:
        setattr(owner, name, buffer.clone())
    try:
        yield
    finally:
        for owner, name, buffer in buffers:
            setattr(owner, name, buffer)


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` for channels that arrive in parts."""

    def part(self, x: Tensor, start: int) -> Tensor:
        """Normalise (B, c, H, W), which are the channels from `start` on."""
        channels = slice(start, start + x.shape[1])
        if self.training and start == 0:
            self.num_batches_tracked.add_(1)
        statistics = self.running_mean[channels], self.running_var[channels]
        return F.batch_norm(
            x, *statistics, self.weight[channels], self.bias[channels], self.training, self.momentum, self.eps
        )


class ConvBNReLU(nn.Module):
    """Bias-free convolution + BatchNorm + ReLU; Kaiming-normal (fan out) convolution weights.

    In evaluation mode the BatchNorm is folded into the convolution: its statistics are constants there.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, dilation: int = 1, groups: int = 1):
        super().__init__()
        padding = dilation * (kernel_size // 2)
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, groups=groups, bias=False
        )
        self.bn = BatchNorm2d(out_channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, parts: Iterable[Tensor], size: Sequence[int]) -> Tensor:
        """The layer on maps that are resized to `size` and concatenated; neither of the two is done.

        A convolution is a sum over its input channels; and one of kernel size 1 commutes with bilinear interpolation,
        whose weights sum to 1.

        Args:
            parts: maps (B, c_i, h_i, w_i), taken one after the other; of `size` unless the kernel size is 1.
            size: height and width of the result.
        """
        weight, bias = self.folded()
        total, start = None, 0
        for x in parts:
            stop = start + x.shape[1]
            y = F.conv2d(x, weight[:, start:stop], bias if start == 0 else None, padding=self.conv.padding)
            y = resize_bilinear(y, size)
            total, start = (y if total is None else total.add_(y)), stop
        return F.relu(self.bn(total) if self.bn.training else total, inplace=True)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the convolution, in evaluation mode with BatchNorm's affine map in them."""
        if self.bn.training:
            return self.conv.weight, None
        bn, dtype = self.bn, self.conv.weight.dtype
        precise = torch.promote_types(dtype, torch.float32)
        scale = bn.weight.to(precise) * (bn.running_var.to(precise) + bn.eps).rsqrt()
        weight = self.conv.weight * scale[:, None, None, None]
        return weight.to(dtype), (bn.bias - bn.running_mean * scale).to(dtype)


class DepthwiseConvBNReLU(ConvBNReLU):
    """Depthwise dilated 3x3 convolution + BatchNorm + ReLU."""

    def __init__(self, channels: int, dilation: int):
        super().__init__(channels, channels, 3, dilation, groups=channels)

    def each(self, parts: Iterable[Tensor], size: Sequence[int]) -> Iterator[Tensor]:
        """The layer on maps (B, c_i, h_i, w_i) resized to `size`: the results (B, c_i, *size), one after the other."""
        weight, bias = self.folded()
        start = 0
        for x in parts:
            stop = start + x.shape[1]
            own = slice(start, stop)
            shift = None if bias is None else bias[own]
            y = resized_depthwise_conv(x, weight[own], shift, self.conv.dilation[0], size)
            yield F.relu(self.bn.part(y, start) if self.bn.training else y, inplace=True)
            start = stop


def resized_depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, size: Sequence[int]
) -> Tensor:
    """Depthwise 3x3 convolution, zero-padded by `dilation`, of `x` resized bilinearly to `size`.

    Resizing and the shifts of a convolution are linear and act on rows and columns apart. With the matrices R_i and
    C_j, which resize and shift by `(i - 1) * dilation`, the result is `sum_ij weight_ij * R_i @ x @ C_j.T`: products
    of small matrices in place of nine taps at each pixel of an enlarged map, which is never made.

    Args:
        x: (B, C, h, w).
        weight: (C, 1, 3, 3).
        bias: (C,), or None.
        dilation: pixels of the result between two taps.
        size: (H, W).

    Returns:
        (B, C, H, W).
    """
    batch, channels, height, width = x.shape
    if x.shape[-2:] == size:
        return F.conv2d(x, weight, bias, padding=dilation, dilation=dilation, groups=channels)
    shifts = (-dilation, 0, dilation)
    rows = _resizing_matrices(height, size[0], shifts, x).permute(1, 0, 2).reshape(1, size[0], 3 * height)
    columns = _resizing_matrices(width, size[1], shifts, x).permute(2, 0, 1).reshape(width, 3 * size[1])
    x = (x.reshape(-1, width) @ columns).view(batch, channels, height, 3, size[1])
    x = torch.einsum("cij,bchjw->bcihw", weight[:, 0], x).reshape(batch * channels, 3 * height, size[1])
    y = torch.bmm(rows.expand(batch * channels, -1, -1), x).view(batch, channels, *size)
    return y if bias is None else y.add_(bias[:, None, None])


def resize_bilinear(x: Tensor, size: Sequence[int]) -> Tensor:
    """`F.interpolate(x, size, mode="bilinear")` for enlarging, as two products with small matrices.

    Its gradient is two products as well: faster than scattering, and in the same order every time.
    """
    if x.shape[-2:] == size:
        return x
    [rows], [columns] = (_resizing_matrices(x.shape[i], size[i], (0,), x) for i in (-2, -1))
    return rows @ (x @ columns.T)


_MATRICES: dict[tuple, Tensor] = {}
"""Made by `_resizing_matrices`; few, as images have few sizes."""


def _resizing_matrices(length: int, new_length: int, shifts: Sequence[int], like: Tensor) -> Tensor:
    """(len(shifts), new_length, length): matrices that enlarge bilinearly and then read that far away, zeros beyond.

    Of the device and type of `like`, and made there: a copy from the host would wait for the device.
    """
    key = (length, new_length, *shifts, like.device, like.dtype)
    # A graph must not hold what another one made, nor autograd what inference mode made.
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return _make_resizing_matrices(length, new_length, shifts, like)
    if key not in _MATRICES:
        matrices = _make_resizing_matrices(length, new_length, shifts, like)
        if type(matrices) is not Tensor:  # one without memory, of a pass that only counts
            return matrices
        _MATRICES[key] = matrices
    return _MATRICES[key]


def _make_resizing_matrices(length: int, new_length: int, shifts: Sequence[int], like: Tensor) -> Tensor:
    position = torch.stack([torch.arange(shift, new_length + shift, device=like.device) for shift in shifts])
    inside = (position >= 0) & (position < new_length)
    source = ((position + 0.5) * (length / new_length) - 0.5).clamp(0, length - 1)
    weight = (1 - (source[..., None] - torch.arange(length, device=like.device)).abs()).clamp(min=0)
    return (weight * inside[..., None]).to(like.dtype)


class SeparableConvBNReLU(nn.Module):
    """Depthwise 3x3 + BN + ReLU, then pointwise 1x1 + BN + ReLU."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int):
        super().__init__()
        self.depthwise_conv = DepthwiseConvBNReLU(in_channels, dilation)
        self.pointwise_conv = ConvBNReLU(in_channels, out_channels)

    def forward(self, parts: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Maps (B, c_i, h_i, w_i), resized to `size` and concatenated -> (B, out_channels, *size)."""
        return self.pointwise_conv(self.depthwise_conv.each(parts, size), size)


class SeparableASPP(nn.Module):
    """Parallel 1x1 and dilated separable branches without image pooling, fused by a 3x3 convolution.

    A separable branch keeps 2 * (in_channels + channels) activations per pixel for backward. With gradient
    checkpointing they live only while the branch's own gradients are computed.
    """

    def __init__(self, in_channels: int, channels: int, dilations: Sequence[int] = (1, 6, 12, 18)):
        super().__init__()
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., Tensor] = recompute_in_backward
        self.aspp_modules = nn.ModuleList(
            ConvBNReLU(in_channels, channels) if d == 1 else SeparableConvBNReLU(in_channels, channels, d)
            for d in dilations
        )
        self.bottleneck = ConvBNReLU(len(dilations) * channels, channels, 3)

    def forward(self, parts: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Maps (B, c_i, h_i, w_i), resized to `size` and concatenated -> (B, channels, *size)."""
        return self.bottleneck((self._run(branch, parts, size) for branch in self.aspp_modules), size)

    def _run(self, branch: nn.Module, parts: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        return self._gradient_checkpointing_func(branch, parts, size) if recompute else branch(parts, size)


class PixelLinear(nn.Module):
    """The same linear layer for every pixel: (B, C, H, W) -> (B, E, H, W)."""

    def __init__(self, in_channels: int, embed_channels: int):
        super().__init__()
        self.proj = nn.Linear(in_channels, embed_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.proj.weight[:, :, None, None], self.proj.bias)


class DAFormerHead(nn.Module):
    """Multi-level features to class logits at the resolution of the first level.

    All levels are embedded to the same width, brought to the size of the first and concatenated; every layer on that
    concatenation works level by level instead, so that it is never built.

    Args:
        in_channels: channels of the levels, finest first.
        num_classes: K, classes of the logits.
        channels: width of the fusion and of the classifier's input.
        embed_channels: width to which each level is embedded.
        dropout: probability of `Dropout2d` in front of the classifier.

    Shape:
        features: list of (B, in_channels[i], H_i, W_i); output: (B, K, H_0, W_0).
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 256,
        embed_channels: int = 256,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.embed_layers = nn.ModuleList(PixelLinear(width, embed_channels) for width in in_channels)
        self.fuse_layer = SeparableASPP(len(in_channels) * embed_channels, channels)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        embedded = [embed(feature) for embed, feature in zip(self.embed_layers, features, strict=True)]
        return self.conv_seg(self.dropout(self.fuse_layer(embedded, features[0].shape[-2:])))
