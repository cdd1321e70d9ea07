"""What the modules and functions that take a `BatchScope` compute: in one process, or as one of two ranks."""

import copy
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from accelerate import Accelerator
from tiny_model import base_folder, new_model
from torch import Tensor, nn

import train_madm
from madm_utils.augmentations import label_classes, strong_augment
from madm_utils.distributed import BatchScope, synchronize_statistics
from madm_utils.heads import recompute_in_backward
from madm_utils.losses import latent_regression_loss, pixel_cross_entropy
from madm_utils.pseudo_labels import palette_table, pseudo_label
from madm_utils.train_args import parse_train_args, train_parser

IMAGES, CLASSES = 4, 5


def layers(scope: BatchScope) -> nn.Module:
    """Convolutions around BatchNorm, dropout and BatchNorm; float64."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Sequential(nn.Dropout2d(0.4), nn.Conv2d(8, CLASSES, 1), nn.BatchNorm2d(CLASSES, eps=1e-2, momentum=0.3)),
    ).double()  # fmt: skip
    for module in (model[1], model[3][2]):
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
        module.running_mean.normal_()
    synchronize_statistics(model, scope)
    return model


def results(scope: BatchScope) -> dict[str, dict[str, Tensor]]:
    """`per_image`: results with one entry per image of this process; `mean`: what averages over the processes to the
    result of the whole batch; `same`: what every process has alike; `adaptation`: see `adaptation_gradient`."""
    generator = torch.Generator().manual_seed(1)
    # The images differ in level, so that the statistics of a half are not those of the whole.
    images = torch.randn(IMAGES, 3, 7, 6, generator=generator, dtype=torch.float64)
    images = images * 3 + torch.arange(IMAGES)[:, None, None, None] + 2
    direction = torch.randn(IMAGES, CLASSES, 5, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (IMAGES, 5, 4), generator=generator)
    labels[0], labels[1, :2] = 255, 255
    latents = torch.rand(IMAGES, 4, 5, 4, generator=generator)
    per_image, mean, same = {}, {}, {}

    for name, recompute in (("plain", False), ("recomputed", True)):
        model, x = layers(scope), scope.local(images).clone().requires_grad_()
        torch.manual_seed(2)
        logits = recompute_in_backward(model, x) if recompute else model(x)
        (logits * scope.local(direction)).mean().backward()
        per_image |= {f"{name} logits": logits.detach(), f"{name} gradient": x.grad / scope.num_processes}
        mean |= {f"{name} {key}": p.grad for key, p in model.named_parameters()}
        same |= {f"{name} {key}": b for key, b in model.named_buffers()}
        per_image[f"{name} evaluated"] = model.eval()(x).detach()

    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(2)
        model = layers(scope).float()
        logits = model(scope.local(images).float())
    logits.float().mul(scope.local(direction)).mean().backward()
    per_image["bfloat16 logits"] = logits.detach()
    mean["bfloat16 gradient"] = model[1].weight.grad

    mine, logits = scope.local(labels), per_image["plain logits"]
    _, weight, _ = pseudo_label(logits, 0.6, "batch", scope)
    same["pseudo-label weight"] = weight.flatten()[0]
    mean["cross entropy"] = pixel_cross_entropy(logits, mine, weight, "all", scope)
    mean["cross entropy, valid"] = pixel_cross_entropy(logits, mine, weight, "valid", scope)
    mask, target = (mine != 255)[:, None], torch.zeros_like(scope.local(latents))
    mean["latent regression, valid"] = latent_regression_loss(scope.local(latents), target, mask, "valid", scope)
    per_image["augmented"] = strong_augment(scope.local(images[:, :, :6]) / 12, random.Random(3), 1.0, 1.0, scope)
    return {"per_image": per_image, "mean": mean, "same": same, "adaptation": {"gradient": adaptation_gradient(scope)}}


def adaptation_gradient(scope: BatchScope) -> Tensor:
    """Of the first pass over a batch of two pairs, all trainable parameters in one vector; float64."""
    flags = (
        "--task synthetic_to_depth --data_dir - --output_dir - --pretrained_model_name_or_path - --unet_tuning full"
    )
    method = "--loss_average valid --pseudo_label_threshold 0.2 --color_jitter_probability 1 --blur_probability 1"
    method += " --pseudo_label_weight batch --lplr_mask pseudo"
    ((args, task),) = parse_train_args(train_parser(""), [*flags.split(), *method.split()])
    torch.manual_seed(0)
    model = new_model(task, "full").double().train()
    synchronize_statistics(model.segmenter, scope)
    teacher = copy.deepcopy(model.segmenter)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 2, 3, 64, 64), dtype=torch.uint8, generator=generator)
    labels = (torch.arange(2 * 64 * 64) // 500).view(2, 64, 64) % task.num_classes
    labels[0, :48] = 255
    batch = {"source_image": images[0], "target_image": images[1], "source_label": labels}
    batch = {name: scope.local(value) for name, value in batch.items()}
    draws = train_madm.draw(batch["source_label"], label_classes(batch["source_label"]), 0, "0", args, scope)
    palette, accelerator = palette_table(task.palette), Accelerator(cpu=True)
    train_madm.adaptation_pass(model, teacher, batch, draws, args, palette, accelerator, scope)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def work(rank: int, world: int, folder: str) -> None:
    """Rank `rank` of `world`: writes its results."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    base_folder()  # in a process group, transformers saves on rank 0 only
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    torch.save(results(BatchScope(world, rank)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
