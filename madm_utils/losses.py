"""Losses: weighted cross entropy and latent regression."""

import torch
import torch.nn.functional as F
from torch import Tensor

from madm_utils.distributed import LOCAL_BATCH, BatchScope
from madm_utils.label_spaces import IGNORE_INDEX


def pixel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    average: str = "all",
    across: BatchScope = LOCAL_BATCH,
) -> Tensor:
    """Cross entropy per pixel, times `weight`, averaged.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W) int64, 255 is ignored (loss 0).
        weight: (B, H, W) pixel weights, or None for 1.
        average: `all` divides by B*H*W, ignored pixels included (DAFormer, MADM); `valid` by the labelled pixels.
        across: processes of the batch; the mean of their losses is the loss of the whole batch.

    Returns:
        Scalar loss, float32.
    """
    loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="none")
    if weight is not None:
        loss = loss * weight
    return loss.mean() if average == "all" else _divide(loss.sum(), (labels != IGNORE_INDEX).sum(), across)


def latent_regression_loss(
    label_latent: Tensor, target: Tensor, mask: Tensor, average: str = "all", across: BatchScope = LOCAL_BATCH
) -> Tensor:
    """L1 between the UNet's label latent and the VAE latent of the palette image (MADM, section 3.3).

    Args:
        label_latent: (B, C, h, w), output of the UNet.
        target: (B, C, h, w), scaled latent of the palette image.
        mask: (B, 1, H, W) weights at image size; resized to the latents by nearest neighbour.
        average: `all` divides by the number of latent elements (published); `valid` by the sum of the mask.
        across: processes of the batch; the mean of their losses is the loss of the whole batch.

    Returns:
        Scalar loss, float32.
    """
    mask = F.interpolate(mask.float(), size=label_latent.shape[-2:], mode="nearest")
    error = (label_latent.float() - target.float()).abs() * mask
    if average == "all":
        return error.mean()
    return _divide(error.sum(), mask.sum() * label_latent.shape[1], across)


def _divide(total: Tensor, count: Tensor, across: BatchScope) -> Tensor:
    """`total` by the mean count per process, so that the processes' mean is the quotient of their sums; 0 / 0 is 0."""
    return total / across.mean(count.float()).clamp(min=torch.finfo(torch.float32).tiny)
