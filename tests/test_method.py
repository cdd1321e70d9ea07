"""Parts of the method against goldens of the published code, hand-computed numbers, and slow references."""

import random

import kornia
import numpy as np
import pytest
import torch
from torch import nn

from madm_utils import augmentations
from madm_utils.ema import ema_decay, update_teacher
from madm_utils.losses import latent_regression_loss, pixel_cross_entropy
from madm_utils.optimization import lr_scheduler, multistep_factor, parameter_groups
from madm_utils.pseudo_labels import dplg_timestep, palette_image, palette_table, pseudo_label


def class_mix_masks(labels: torch.Tensor, rng: np.random.Generator, scope: str = "batch") -> torch.Tensor:
    chosen = augmentations.choose_classes(augmentations.label_classes(labels), rng, scope)
    return augmentations.class_masks(labels, chosen)


def test_warmup_steps():
    factor = multistep_factor(100, warmup_steps=10)
    assert factor(0) == pytest.approx(0.067)
    assert factor(5) == pytest.approx(0.067 + 0.933 / 2)
    assert factor(10) == 1.0


def test_scheduler_names():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = lr_scheduler("linear", optimizer, 10, None)
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(0.9)


def test_hsv_against_kornia():
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    image[:, :2] = image[:1, :2]  # grey pixels have no hue
    hue, saturation, value = augmentations.rgb_to_hsv(image)
    expected = kornia.color.rgb_to_hsv(image)
    torch.testing.assert_close(torch.stack([hue * 2 * torch.pi, saturation, value]), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(augmentations.hsv_to_rgb(hue + 3, saturation, value), image, atol=1e-5, rtol=0)


def test_strong_augment_is_drawn_once_per_batch():
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(augmentations.strong_augment(images, random.Random(0), 0.0, 0.0), images)
    jittered = [
        not torch.equal(augmentations.strong_augment(images, random.Random(i), 0.8, 0.0), images) for i in range(200)
    ]
    assert 0.7 < np.mean(jittered) < 0.9
    both = augmentations.strong_augment(images, random.Random(0), 1.0, 1.0)
    assert not torch.allclose(both[0], images[0]) and not torch.allclose(both[1], images[1])


@pytest.mark.parametrize("seed", range(5))
def test_class_mix(seed):
    """Half of the batch's classes, 255 among them, rounded up; the mask is exactly their pixels."""
    labels = torch.tensor([[[0, 1, 2, 255]], [[3, 3, 4, 255]]])  # 6 values in the batch
    masks = class_mix_masks(labels, np.random.default_rng(seed))
    for label, mask in zip(labels, masks, strict=True):
        chosen = set(label[mask].tolist())
        assert not chosen & set(label[~mask].tolist()) and len(chosen) <= 3
    own = class_mix_masks(labels, np.random.default_rng(seed), scope="image")
    assert not own[labels == 255].any()
    assert [len(set(label[mask].tolist())) for label, mask in zip(labels, own, strict=True)] == [2, 1]
    source, target = torch.ones(2, 3, 1, 4), torch.zeros(2, 3, 1, 4)
    assert torch.equal(augmentations.mix(masks, source, target)[:, 0], masks.float())


def test_class_mix_counts_the_batch():
    """With one image the number of chosen classes is exactly half, rounded up."""
    label = torch.tensor([[[0, 1, 2, 3, 255]]])
    sizes = {len(label[class_mix_masks(label, np.random.default_rng(i))].unique()) for i in range(10)}
    assert sizes == {3}


def test_pixel_cross_entropy_by_hand():
    logits = torch.tensor([0.0, np.log(3.0)]).view(1, 2, 1, 1).expand(1, 2, 1, 4)
    labels = torch.tensor([[[0, 1, 255, 1]]])
    weight = torch.tensor([[[1.0, 1.0, 1.0, 0.5]]])
    losses = np.array([np.log(4), np.log(4 / 3), 0, 0.5 * np.log(4 / 3)])
    assert pixel_cross_entropy(logits, labels, weight).item() == pytest.approx(losses.sum() / 4)
    assert pixel_cross_entropy(logits, labels, weight, "valid").item() == pytest.approx(losses.sum() / 3)


def test_latent_regression_by_hand():
    """2x2 latents of a 4x4 image: nearest takes the mask at the pixels (0|2, 0|2); the mean is over all elements."""
    latent, target = torch.full((1, 4, 2, 2), 3.0), torch.ones(1, 4, 2, 2)
    mask = torch.ones(1, 1, 4, 4)
    mask[0, 0, 0, 0] = 0.0
    mask[0, 0, 2, 2] = 0.5
    mask[0, 0, 1, 1] = 0.0  # not sampled
    assert latent_regression_loss(latent, target, mask).item() == pytest.approx(2 * (0 + 1 + 1 + 0.5) / 4)
    assert latent_regression_loss(latent, target, mask, "valid").item() == pytest.approx(2.0)


def test_dplg_schedule():
    """Values of the published schedule: depth at 0, 1, 1000, 2500, 4917, 5000, 9999."""
    expected = {0: {60, 61}, 1: {59, 60}, 1000: {48}, 2500: {30}, 4917: {0, 1}, 5000: {0}, 9999: {0}}
    for step, values in expected.items():
        drawn = {dplg_timestep(step, (60, 61), 5000, random.Random(seed)) for seed in range(40)}
        assert drawn == values, step
    assert dplg_timestep(0, (0,), 5000, random.Random(0)) == 0
    assert dplg_timestep(3, (60,), 0, random.Random(0)) == 0


def test_pseudo_label_weights():
    """Two images of two pixels with probabilities .99, .5 and .99, .99; threshold .968."""
    sure, unsure = [np.log(99.0), 0.0], [0.0, 0.0]
    logits = torch.tensor([[sure, unsure], [sure, sure]]).permute(0, 2, 1)[:, :, None].float()
    label, weight, probability = pseudo_label(logits, 0.968)
    assert label.shape == (2, 1, 2) and (label[probability > 0.9] == 0).all()
    assert torch.allclose(weight, torch.tensor(0.75))
    _, weight, _ = pseudo_label(logits, 0.968, "image")
    assert weight[:, 0, 0].tolist() == [0.5, 1.0]
    _, weight, _ = pseudo_label(logits, 0.968, "pixel")
    assert weight[:, 0].tolist() == [[1.0, 0.0], [1.0, 1.0]]


def test_palette():
    table = palette_table([(255, 0, 51)])
    image = palette_image(torch.tensor([[[0, 255]]]), table)
    torch.testing.assert_close(image[0, :, 0], torch.tensor([[1.0, -1.0], [-1.0, -1.0], [-0.6, -1.0]]))
    assert image.is_contiguous()


def test_ema_by_hand():
    """alpha = 1/2, 2/3, ... up to the maximum; parameters only, buffers stay."""
    assert [ema_decay(i) for i in (1, 2, 3)] == pytest.approx([1 / 2, 2 / 3, 3 / 4])
    assert ema_decay(999) == pytest.approx(0.999) and ema_decay(10**6) == 0.999
    student, teacher = nn.BatchNorm2d(1), nn.BatchNorm2d(1)
    nn.init.constant_(student.weight, 4.0)
    student.running_mean.fill_(7.0)
    update_teacher(teacher, student, ema_decay(1))
    assert teacher.weight.item() == pytest.approx(2.5)
    update_teacher(teacher, student, ema_decay(2))
    assert teacher.weight.item() == pytest.approx(2.5 * 2 / 3 + 4 / 3)
    assert teacher.running_mean.item() == 0.0 and student.weight.item() == 4.0


def test_parameter_groups():
    """Norms and biases are not decayed; segmenter and LoRA have their own learning rates; frozen ones are left out."""
    adapted = nn.ModuleDict({"lora_A": nn.ModuleDict({"depth": nn.Linear(2, 1, bias=False)})})
    model = nn.ModuleDict(
        {
            "unet": nn.Sequential(nn.Conv2d(1, 32, 1), nn.GroupNorm(32, 32), adapted),
            "segmenter": nn.Linear(2, 2),
        }
    )
    model["unet"][0].bias.requires_grad_(False)
    groups = parameter_groups(model, 1e-3, 0.05, head_lr_multiplier=10, lora_lr_multiplier=20)
    found = {name: (g["lr"], g["weight_decay"]) for g in groups for name in g["names"]}
    assert found == {
        "unet.0.weight": (1e-3, 0.05),
        "unet.1.weight": (1e-3, 0.0),
        "unet.1.bias": (1e-3, 0.0),
        "unet.2.lora_A.depth.weight": (2e-2, 0.05),
        "segmenter.weight": (1e-2, 0.05),
        "segmenter.bias": (1e-2, 0.0),
    }
