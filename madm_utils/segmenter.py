"""What MADM adds to Stable Diffusion: learned conditioning, feature projections and the segmentation head.

The mean teacher is a copy of this module; it shares the student's UNet (MADM, section 3.2).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from madm_utils.base_model import vae_scale
from madm_utils.cli import UserError
from madm_utils.feature_extractor import DiffusionFeatureExtractor
from madm_utils.heads import DAFormerHead, recompute_in_backward


class LearnedConditioning(nn.Module):
    """Prompt and time conditioning, one set for all images.

    `prompt = tanh(a) * embedding_of_empty_text + tanh(b) * prompt_embed` and `time = tanh(c) * time_embed`; the time
    branch is off at initialisation (c = 0).
    """

    def __init__(self, num_tokens: int, prompt_dim: int, time_dim: int):
        super().__init__()
        self.prompt_embed = nn.Parameter(torch.empty(1, num_tokens, prompt_dim))
        self.alpha_cond_prompt = nn.Parameter(torch.rand(1, num_tokens, prompt_dim))
        self.alpha_uncond_prompt = nn.Parameter(torch.rand(1, num_tokens, prompt_dim))
        self.alpha_cond_time = nn.Parameter(torch.zeros(time_dim))
        self.time_embed = nn.Parameter(torch.empty(1, 1, time_dim))
        nn.init.trunc_normal_(self.prompt_embed, std=0.02)
        nn.init.trunc_normal_(self.time_embed, std=0.02)

    def forward(self, empty_text_embedding: Tensor) -> tuple[Tensor, Tensor]:
        """(1, tokens, D) -> prompt (1, tokens, D) and time (1, 1, T)."""
        prompt = torch.tanh(self.alpha_uncond_prompt) * empty_text_embedding
        prompt = prompt + torch.tanh(self.alpha_cond_prompt) * self.prompt_embed
        return prompt, torch.tanh(self.alpha_cond_time) * self.time_embed


class ConvGN(nn.Conv2d):
    """Bias-free convolution followed by GroupNorm(32); Kaiming-normal (fan out) weights."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.GroupNorm(32, out_channels)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class Bottleneck(nn.Module):
    """ResNet bottleneck, stride 1: the projection of one feature map, (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, bottleneck_channels: int):
        super().__init__()
        self.shortcut = ConvGN(in_channels, out_channels) if in_channels != out_channels else nn.Identity()
        self.conv1 = ConvGN(in_channels, bottleneck_channels)
        self.conv2 = ConvGN(bottleneck_channels, bottleneck_channels, 3)
        self.conv3 = ConvGN(bottleneck_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.conv1(x))
        out = F.relu(self.conv2(out))
        return F.relu(self.conv3(out) + self.shortcut(x))


def check_classes(num_classes: int, class_names: Sequence[str], where: str) -> None:
    """Raise `UserError` unless a segmenter of `num_classes` classes belongs to the task with these names."""
    if num_classes != len(class_names):
        raise UserError(
            f"{where}: its segmenter knows {num_classes} classes, its task has {len(class_names)} "
            f"({', '.join(class_names)}); a part of another model lies there: copy or download it again"
        )


class Segmenter(ModelMixin, ConfigMixin):
    """Conditioning, projections and DAFormer head on top of a diffusion feature extractor.

    Args:
        num_classes: K.
        feature_channels: channels of [decoded image, finest, middle, coarsest UNet feature].
        projection_channels: channels after the projections, same order (all divisible by 32).
        bottleneck_channels: inner width of the projections (divisible by 32).
        head_channels: fusion width of the head.
        embed_channels: per-level width in the head.
        num_tokens, prompt_dim, time_dim: shape of the UNet's conditioning.
        dropout: `Dropout2d` probability of the head.
        head_resolution: n: projection of the decoded image and head work at 1/n of the image (an approximation; the
            head of DAFormer works at 1/4). The logits are brought back to the size of the image.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        num_classes: int,
        feature_channels: Sequence[int] = (3, 320, 640, 1280),
        projection_channels: Sequence[int] = (128, 512, 512, 512),
        bottleneck_channels: int = 128,
        head_channels: int = 256,
        embed_channels: int = 256,
        num_tokens: int = 77,
        prompt_dim: int = 768,
        time_dim: int = 1280,
        dropout: float = 0.1,
        head_resolution: int = 1,
    ):
        super().__init__()
        self.register_buffer("empty_text_embedding", torch.zeros(1, num_tokens, prompt_dim))
        self.conditioning = LearnedConditioning(num_tokens, prompt_dim, time_dim)
        self.projections = nn.ModuleList(
            Bottleneck(c_in, c_out, bottleneck_channels)
            for c_in, c_out in zip(feature_channels, projection_channels, strict=True)
        )
        self.head = DAFormerHead(projection_channels, num_classes, head_channels, embed_channels, dropout)
        self.gradient_checkpointing = False

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Tensor] | None = None) -> None:
        """Recompute projections and the head's branches in backward instead of keeping their activations.

        The default is not that of diffusers: BatchNorm must not count a batch twice.
        """
        super().enable_gradient_checkpointing(gradient_checkpointing_func or recompute_in_backward)

    def condition(self) -> tuple[Tensor, Tensor]:
        """Prompt (1, tokens, D) and time (1, 1, T) conditioning of the UNet."""
        return self.conditioning(self.empty_text_embedding)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """[decoded image, finest, middle, coarsest UNet feature] -> logits (B, K, H, W) at the image's size."""
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        size, factor = features[0].shape[-2:], self.config.head_resolution
        if factor > 1:
            # The mean of each block of pixels: no pixel goes unseen (bilinear sampling would read 4 of 16), and the
            # centres of the blocks are where bilinear enlargement without aligned corners expects them.
            features = [F.avg_pool2d(features[0], factor), *features[1:]]
        logits = self.head(
            [
                self._gradient_checkpointing_func(project, x) if recompute else project(x)
                for project, x in zip(self.projections, features, strict=True)
            ]
        )
        # Enlarged in float32: the gradient of a coarse pixel is a sum over many fine ones.
        return logits if factor == 1 else F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)


def segmenter_config(
    extractor: DiffusionFeatureExtractor,
    num_classes: int,
    projection_channels: int = 512,
    bottleneck_channels: int = 128,
    head_channels: int = 256,
    head_resolution: int = 1,
) -> dict[str, Any]:
    """Arguments of `Segmenter` for this extractor; only the three widths and the head's resolution are free.

    Raises:
        UserError: the head would be coarser than the UNet's finest feature.
    """
    finest = vae_scale(extractor.vae)
    if head_resolution > finest:
        raise UserError(
            f"--head_resolution {head_resolution} is coarser than the latents of this base model, which have "
            f"1/{finest} of the image's size; give at most {finest}"
        )
    image_channels = max(32, projection_channels // 4)
    return {
        "num_classes": num_classes,
        "feature_channels": extractor.feature_channels,
        "projection_channels": [image_channels, *[projection_channels] * 3],
        "bottleneck_channels": bottleneck_channels,
        "head_channels": head_channels,
        "embed_channels": head_channels,
        "head_resolution": head_resolution,
        "time_dim": extractor.unet.time_embedding.linear_2.out_features,
    }
