"""Every random choice of a training pass, made on the host."""

import random
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from madm_utils.augmentations import choose_classes, class_masks, strong_augment
from madm_utils.distributed import LOCAL_BATCH, BatchScope
from madm_utils.pseudo_labels import dplg_timestep


@dataclass
class Draws:
    """Every random choice of one pass over a batch, except dropout (torch's global generator)."""

    teacher_timestep: int
    mix_masks: Tensor
    """(B, H, W) bool, True where the source pixel is pasted."""
    augment: Callable[[Tensor], Tensor]
    """Strong augmentation of the mixed images (B, 3, H, W) in [0, 1]."""


def draw(
    source_label: Tensor,
    source_classes: np.ndarray,
    step: int,
    stream: str,
    args: Namespace,
    across: BatchScope = LOCAL_BATCH,
) -> Draws:
    """Make the draws of one pass. They depend on `stream` (seed, process, step, pass) alone, so a resumed run repeats
    them without any stored generator. Processes that share a batch draw for all of it and keep what is theirs.

    Args:
        source_label: (B, H, W) int64, on the device.
        source_classes: (B, 256) bool of `label_classes`, with which nothing has to be read back from the device.
        step: optimiser steps done.
        stream: names the random stream.
        args: settings of the method.
        across: processes that share the batch.
    """
    rng = random.Random(stream)
    torch.manual_seed(rng.getrandbits(63))
    timestep = dplg_timestep(step, args.dplg_timestep, args.dplg_end_step, rng)
    present = across.gather_host(source_classes)
    chosen = choose_classes(present, np.random.default_rng(rng.getrandbits(63)), args.class_mix_scope)
    masks = class_masks(source_label, across.local(chosen))

    def augment(images: Tensor) -> Tensor:
        return strong_augment(images, rng, args.color_jitter_probability, args.blur_probability, across)

    return Draws(timestep, masks, augment)
