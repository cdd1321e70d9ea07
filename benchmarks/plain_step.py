"""The published method in its straightforward arrangement: what the suite's speed is a ratio against.

The mathematics and the parameters are those of the suite (a `MADMModel`); the arrangement is the one that the method's
description suggests (MADM, sections 3.1 to 3.3):

- the head brings all levels to the size of the image, concatenates them and runs every branch on that; BatchNorm is a
  layer of its own in evaluation too
- the VAE encodes one kind of image at a time
- the graphs of both branches live until one backward pass of the sum of the losses
- labels become palette images with PIL, on the host, one after the other
- a pixel's confidence is the largest value of a softmax
- EMA visits the parameters one by one; AdamW is PyTorch's default, which does so on a CPU

`Arrangement` puts parts of the suite in their place, so that a table can show what each of them gains. Published
settings only: one weight of the pseudo labels for the batch, losses averaged over all pixels, a teacher in training
mode.
`tests/test_plain_step.py` compares every arrangement with the suite, and plain with the published code.
"""

import copy
from argparse import Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from madm_utils.augmentations import mix
from madm_utils.ema import ema_decay, update_teacher
from madm_utils.label_spaces import IGNORE_INDEX
from madm_utils.optimization import build_adamw, parameter_groups
from madm_utils.pseudo_labels import palette_image, palette_table, pseudo_label

if TYPE_CHECKING:
    from accelerate import Accelerator

    from madm_utils.draws import Draws
    from madm_utils.modeling_madm import MADMModel
    from madm_utils.segmenter import Segmenter


@dataclass(frozen=True)
class Arrangement:
    """Which parts are the suite's; by default none of them, which is plain."""

    head: bool = False
    """Head level by level, without the concatenation; BatchNorm folded in evaluation."""
    vae: bool = False
    """One VAE call for everything that is known before the networks run; the suite's choice of images at a time."""
    palette: bool = False
    """Palette images by table look-up on the device."""
    confidence: bool = False
    """Confidence without the probabilities of all classes."""
    backward: bool = False
    """Backward of each branch as soon as its losses are there."""
    ema: bool = False
    """Teacher update of all parameters together."""
    optimizer: bool = False
    """AdamW on all parameters together, fused where the device has it."""


PLAIN = Arrangement()
ARRANGEMENTS = {"plain": PLAIN} | {part.name: Arrangement(**{part.name: True}) for part in fields(Arrangement)}
"""Plain, and plain with one part of the suite, by the name of the part."""


# --- network ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode(model: "MADMModel", images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> scaled mean latents (B, C, h, w)."""
    vae = model.extractor.vae
    # `contiguous`: float32 GroupNorm of torch is inaccurate on strided CPU tensors.
    return vae.encode(images.to(vae.dtype).contiguous()).latent_dist.mode() * vae.config.scaling_factor


@torch.no_grad()
def decode(model: "MADMModel", latents: Tensor) -> Tensor:
    """Scaled latents (B, C, h, w) -> un-clipped images (B, 3, H, W)."""
    vae = model.extractor.vae
    return vae.decode(latents.to(vae.dtype).contiguous() / vae.config.scaling_factor).sample


def conv_bn_relu(layer: nn.Module, x: Tensor) -> Tensor:
    """Convolution, BatchNorm and ReLU of a layer of the head, one after the other."""
    return F.relu(layer.bn(layer.conv(x)), inplace=True)


def head_logits(head: nn.Module, features: Sequence[Tensor]) -> Tensor:
    """DAFormer head at full resolution: projected levels (B, c_i, h_i, w_i) -> logits (B, K, h_0, w_0)."""
    size = features[0].shape[-2:]
    levels = []
    for embed, feature in zip(head.embed_layers, features, strict=True):
        x = F.conv2d(feature, embed.proj.weight[:, :, None, None], embed.proj.bias)
        levels.append(x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear"))
    x = torch.cat(levels, dim=1)
    branches = []
    for branch in head.fuse_layer.aspp_modules:
        if hasattr(branch, "conv"):
            branches.append(conv_bn_relu(branch, x))
        else:
            branches.append(conv_bn_relu(branch.pointwise_conv, conv_bn_relu(branch.depthwise_conv, x)))
    x = conv_bn_relu(head.fuse_layer.bottleneck, torch.cat(branches, dim=1))
    return head.conv_seg(head.dropout(x))


def segment(
    model: "MADMModel", latents: Tensor, timestep: int, segmenter: "Segmenter", arrangement: Arrangement
) -> tuple[Tensor, Tensor]:
    """Latents (B, C, h, w) -> logits (B, K, H, W) and label latent (B, C, h, w)."""
    noisy = model.extractor.add_noise(latents, timestep)
    features, label_latent = model.extractor.denoise(noisy, timestep, *segmenter.condition())
    decoded = model.extractor.decode(label_latent) if arrangement.vae else decode(model, label_latent)
    features = [decoded, *features]
    if arrangement.head:
        return segmenter(features), label_latent
    projected = [project(x) for project, x in zip(segmenter.projections, features, strict=True)]
    return head_logits(segmenter.head, projected), label_latent


@torch.no_grad()
def predict(model: "MADMModel", images: Tensor, arrangement: Arrangement = PLAIN) -> Tensor:
    """Logits (B, K, H, W) of images (B, 3, H, W) in [0, 1]; the model is in evaluation mode."""
    images = images * 2 - 1
    latents = model.extractor.encode(images) if arrangement.vae else encode(model, images)
    return segment(model, latents, 0, model.segmenter, arrangement)[0]


# --- labels and losses -----------------------------------------------------------------------------------------------


def paint(labels: Tensor, palette: Sequence[Sequence[int]]) -> Tensor:
    """Labels (B, H, W) -> palette images (B, 3, H, W) in [-1, 1] on the same device; what has no colour is black."""
    colors = np.zeros((256, 3), dtype=np.uint8)
    colors[: len(palette)] = palette
    images = []
    for label in labels.byte().cpu().numpy():
        image = Image.fromarray(label)
        image.putpalette(colors.tobytes())
        images.append(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))
    return (torch.stack(images).to(labels.device).float() / 255 - 0.5) / 0.5


def softmax_pseudo_label(logits: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Logits (B, K, H, W) -> labels and weights (B, H, W): everywhere the fraction of confident pixels."""
    probability, label = logits.float().softmax(dim=1).max(dim=1)
    return label, (probability >= threshold).float().mean().expand_as(probability)


def cross_entropy(logits: Tensor, label: Tensor, weight: Tensor | float) -> Tensor:
    """Mean over all pixels of weight times cross entropy, which is 0 at 255."""
    loss = F.cross_entropy(logits.float(), label, ignore_index=IGNORE_INDEX, reduction="none")
    return (loss * weight).mean()


def latent_l1(label_latent: Tensor, target: Tensor, label: Tensor, weight: Tensor | float) -> Tensor:
    """L1 of label latents (B, C, h, w), times the weight of the label's pixel, which is 0 at 255; mean over all."""
    mask = ((label != IGNORE_INDEX) * weight).float()[:, None]
    mask = F.interpolate(mask, label_latent.shape[-2:], mode="nearest")
    return ((label_latent.float() - target.float()).abs() * mask).mean()


# --- one training step -----------------------------------------------------------------------------------------------


class PlainTraining:
    """Teacher, optimiser and steps of a model's training.

    Args:
        model: the student; put into training mode and onto the accelerator's device.
        args: settings of `train_madm.py`; `lplr_loss` is `source` or `both`.
        accelerator: for device and precision; one process.
        arrangement: what is the suite's.
    """

    def __init__(
        self, model: "MADMModel", args: Namespace, accelerator: "Accelerator", arrangement: Arrangement = PLAIN
    ):
        self.args, self.accelerator, self.arrangement = args, accelerator, arrangement
        groups = parameter_groups(model.train(), args.learning_rate, args.weight_decay)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        betas = (args.adam_beta1, args.adam_beta2)
        if arrangement.optimizer:
            optimizer = build_adamw(groups, betas, args.adam_epsilon, use_8bit=False)
        else:
            groups = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in groups]
            optimizer = torch.optim.AdamW(groups, betas=betas, eps=args.adam_epsilon)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.teacher = copy.deepcopy(self.model.segmenter).requires_grad_(False).train()
        self.table = palette_table(model.task.palette, self.teacher.device)
        self.num_steps = 0

    def step(self, batch: dict[str, Tensor], draws: "Draws") -> dict[str, Tensor]:
        """One optimiser step; see `adapt`."""
        if self.num_steps:
            self.update_teacher(ema_decay(self.num_steps, self.args.ema_decay))
        scalars = self.adapt(batch, draws)
        self.accelerator.clip_grad_norm_(self.parameters, self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_steps += 1
        return scalars

    def adapt(self, batch: dict[str, Tensor], draws: "Draws") -> dict[str, Tensor]:
        """One pass over a batch: losses, and their gradients in the model.

        Args:
            batch: `source_image`, `target_image` uint8 (B, 3, H, W); `source_label` int64 (B, H, W).
            draws: the random choices, as for the suite's `adaptation_pass`.

        Returns:
            The losses and `pseudo_label_weight`, detached.
        """
        per_branch = self.arrangement.backward
        source, target = batch["source_image"].float() / 255, batch["target_image"].float() / 255
        source_label, mask = batch["source_label"], draws.mix_masks
        mixed = draws.augment(mix(mask, source, target))
        # Under autocast both graphs share the weights cast to half precision, which a backward in between would free.
        with nullcontext() if per_branch else self.accelerator.autocast():
            latents = self.encode([source * 2 - 1, target * 2 - 1, mixed * 2 - 1, self.paint(source_label)])
            source_latent, target_latent, mixed_latent, source_label_latent = latents

            output = self.segment(source_latent)
            losses = self.losses("source", output, source_label, source_label_latent, 1.0, 1.0)
            if per_branch:
                self.backward(losses)
            else:
                output = self.segment(mixed_latent)
            label, weight = self.pseudo_label(target_latent, draws.teacher_timestep)
            if per_branch:  # after the teacher, whose activations then live alone
                output = self.segment(mixed_latent)

            label = mix(mask, source_label, label)
            pixel_weight = mix(mask, torch.ones_like(weight), weight)
            if self.args.lplr_loss == "both":
                [label_latent] = self.encode([self.paint(label)])
            else:
                label_latent = None
            mixed_losses = self.losses("target", output, label, label_latent, pixel_weight, weight)
        self.backward(mixed_losses if per_branch else losses | mixed_losses)
        scalars = {name: loss.detach() for name, loss in (losses | mixed_losses).items()}
        return scalars | {"pseudo_label_weight": weight.mean()}

    def encode(self, images: list[Tensor]) -> Sequence[Tensor]:
        """Latents (B, C, h, w) of each of `images` (B, 3, H, W) in [-1, 1]."""
        with self.accelerator.autocast():
            if self.arrangement.vae:
                return self.model.extractor.encode(torch.cat(images)).chunk(len(images))
            return [encode(self.model, image) for image in images]

    def segment(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The student's pass: see the function `segment`."""
        with self.accelerator.autocast():
            return segment(self.model, latents, 0, self.model.segmenter, self.arrangement)

    @torch.no_grad()
    def pseudo_label(self, latents: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        """The teacher's labels of the target and their weights, (B, H, W)."""
        with self.accelerator.autocast():
            logits, _ = segment(self.model, latents, timestep, self.teacher, self.arrangement)
        if self.arrangement.confidence:
            return pseudo_label(logits, self.args.pseudo_label_threshold)[:2]
        return softmax_pseudo_label(logits, self.args.pseudo_label_threshold)

    def paint(self, label: Tensor) -> Tensor:
        """Palette images (B, 3, H, W) in [-1, 1] of labels (B, H, W)."""
        return palette_image(label, self.table) if self.arrangement.palette else paint(label, self.model.task.palette)

    def losses(
        self,
        branch: str,
        output: tuple[Tensor, Tensor],
        label: Tensor,
        label_target: Tensor | None,
        pixel_weight: Tensor | float,
        latent_weight: Tensor | float,
    ) -> dict[str, Tensor]:
        """Losses of the `source` or `target` branch by name; without `label_target` the cross entropy only."""
        logits, label_latent = output
        losses = {f"{branch}_loss": cross_entropy(logits, label, pixel_weight)}
        if label_target is not None:
            regression = latent_l1(label_latent, label_target, label, latent_weight)
            losses[f"lplr_{branch}_loss"] = self.args.lplr_weight[branch == "target"] * regression
        return losses

    def backward(self, losses: dict[str, Tensor]) -> None:
        """Add the gradients of the sum of the losses."""
        self.accelerator.backward(sum(losses.values()))

    @torch.no_grad()
    def update_teacher(self, decay: float) -> None:
        """`teacher <- decay * teacher + (1 - decay) * student`."""
        if self.arrangement.ema:
            update_teacher(self.teacher, self.model.segmenter, decay)
            return
        for shadow, current in zip(self.teacher.parameters(), self.model.segmenter.parameters(), strict=True):
            shadow.mul_(decay).add_(current, alpha=1 - decay)
