"""DAFormer segmentation head (2111.14887, section 3.2): embed every level, fuse with a depthwise-separable ASPP.

Shared by every system of the suite; nothing here knows about diffusion models.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recompute_in_backward(module: nn.Module, *inputs: Tensor) -> Tensor:
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


class ConvBNReLU(nn.Module):
    """Bias-free convolution + BatchNorm + ReLU; Kaiming-normal (fan out) convolution weights."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, dilation: int = 1, groups: int = 1):
        super().__init__()
        padding = dilation * (kernel_size // 2)
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class SeparableConvBNReLU(nn.Module):
    """Depthwise 3x3 + BN + ReLU, then pointwise 1x1 + BN + ReLU."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int):
        super().__init__()
        self.depthwise_conv = ConvBNReLU(in_channels, in_channels, 3, dilation, groups=in_channels)
        self.pointwise_conv = ConvBNReLU(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise_conv(self.depthwise_conv(x))


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

    def forward(self, x: Tensor) -> Tensor:
        return self.bottleneck(torch.cat([self._run(branch, x) for branch in self.aspp_modules], dim=1))

    def _run(self, branch: nn.Module, x: Tensor) -> Tensor:
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        return self._gradient_checkpointing_func(branch, x) if recompute else branch(x)


class PixelLinear(nn.Module):
    """The same linear layer for every pixel: (B, C, H, W) -> (B, E, H, W)."""

    def __init__(self, in_channels: int, embed_channels: int):
        super().__init__()
        self.proj = nn.Linear(in_channels, embed_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.proj.weight[:, :, None, None], self.proj.bias)


class DAFormerHead(nn.Module):
    """Multi-level features to class logits at the resolution of the first level.

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
        return self.conv_seg(self.dropout(self.fuse_layer(self._embed(features))))

    def _embed(self, features: Sequence[Tensor]) -> Tensor:
        """All levels embedded, at the size of the first, concatenated; the parts end with this function."""
        size = features[0].shape[-2:]
        embedded = []
        for embed, feature in zip(self.embed_layers, features, strict=True):
            # Embedding before resizing: the linear map commutes with bilinear interpolation and is cheaper there.
            x = embed(feature)
            embedded.append(x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear"))
        return torch.cat(embedded, dim=1)
