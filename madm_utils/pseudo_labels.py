"""Pseudo labels of the teacher, the noise schedule of DPLG, and the label palette of LPLR."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from madm_utils.distributed import LOCAL_BATCH, BatchScope
from madm_utils.label_spaces import IGNORE_INDEX


def dplg_timestep(step: int, timestep_range: Sequence[int], end_step: int, rng: random.Random) -> int:
    """Diffusion step of the teacher's pass: diffusion-based pseudo-label generation (MADM, section 3.2).

    A timestep is drawn from `timestep_range` (both ends included) and decays linearly to 0 at `end_step`; from then
    on it is 0. The draw happens also after the end, so that the generator's state depends on `step` alone.
    """
    timestep = rng.randint(timestep_range[0], timestep_range[-1])
    return int(timestep * (1 - step / end_step)) if step <= end_step and end_step > 0 else 0


def pseudo_label(
    logits: Tensor, threshold: float, scope: str = "batch", across: BatchScope = LOCAL_BATCH
) -> tuple[Tensor, Tensor, Tensor]:
    """Hard pseudo labels with DAFormer's confidence weight.

    Args:
        logits: (B, K, H, W) of the teacher.
        threshold: a pixel is confident when its largest probability is at least this.
        scope: `batch`: one weight, the confident fraction of the whole batch (published); `image`: one weight per
            image; `pixel`: weight 1 where confident, else 0.
        across: processes of the batch.

    Returns:
        labels (B, H, W) int64, weights (B, H, W) float32, largest probabilities (B, H, W) float32.
    """
    logits = logits.float()
    top, label = logits.max(dim=1)
    probability = (top - logits.logsumexp(dim=1)).exp()
    confident = (probability >= threshold).float()
    if scope == "batch":
        confident = across.mean(confident.mean()).expand_as(confident)
    elif scope == "image":
        confident = confident.mean(dim=(1, 2), keepdim=True).expand_as(confident)
    return label, confident, probability


def confident_fraction(label: Tensor, probability: Tensor, threshold: float, num_classes: int) -> Tensor:
    """Fraction of confident pixels per predicted class, computed without waiting for the device.

    Args:
        label, probability: (B, H, W), as `pseudo_label` returns them.
        threshold: a pixel is confident when its probability is at least this.
        num_classes: K.

    Returns:
        (K,) float32 in [0, 1]; NaN where no pixel is predicted as the class.
    """
    predicted = label == torch.arange(num_classes, device=label.device)[:, None, None, None]
    confident = predicted & (probability >= threshold)
    return confident.sum(dim=(1, 2, 3)) / predicted.sum(dim=(1, 2, 3))


def palette_table(palette: Sequence[Sequence[int]], device: torch.device | None = None) -> Tensor:
    """(256, 3) float32 colours in [-1, 1]; ids without a colour, 255 among them, are black (-1, -1, -1)."""
    table = torch.zeros(256, 3, device=device)
    table[: len(palette)] = torch.tensor(palette, dtype=torch.float32, device=device)
    return (table / 255 - 0.5) / 0.5


def palette_image(labels: Tensor, table: Tensor) -> Tensor:
    """Labels (B, H, W) int64 -> palette images (B, 3, H, W) in [-1, 1] (label palette, MADM, section 3.3)."""
    return table[labels].permute(0, 3, 1, 2).contiguous()


def valid_mask(labels: Tensor) -> Tensor:
    """(B, H, W) labels -> (B, 1, H, W) float32, 1 where labelled and 0 at 255."""
    return (labels != IGNORE_INDEX).float()[:, None]
