"""The DAFormer head works level by level; here it is held to the head that the paper draws, built on one big map."""

import copy

import pytest
import torch
import torch.nn.functional as F

from benchmarks.plain_step import head_logits
from madm_utils.heads import DAFormerHead, resize_bilinear, resized_depthwise_conv


def features(sizes: list[tuple[int, int]], widths: tuple[int, ...] = (8, 6, 5, 4)) -> list[torch.Tensor]:
    shapes = [(2, width, *size) for width, size in zip(widths, sizes, strict=True)]
    return [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    ("size", "new_size"), [((4, 4), (32, 32)), ((3, 5), (12, 40)), ((16, 8), (16, 32)), ((2, 2), (16, 16))]
)
@pytest.mark.parametrize("dilation", [1, 6, 18])
def test_convolution_of_a_map_that_is_never_enlarged(size, new_size, dilation):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.double, requires_grad=True)
    weight = torch.randn(3, 1, 3, 3, dtype=torch.double, requires_grad=True)
    bias = torch.randn(3, dtype=torch.double, requires_grad=True)
    enlarged = F.interpolate(x, new_size, mode="bilinear", align_corners=False)
    expected = F.conv2d(enlarged, weight, bias, padding=dilation, dilation=dilation, groups=3)
    actual = resized_depthwise_conv(x, weight, bias, dilation, torch.Size(new_size))
    assert relative(actual, expected) < 1e-14
    gradient = torch.randn_like(expected)
    pairs = zip(
        torch.autograd.grad(actual, (x, weight, bias), gradient),
        torch.autograd.grad(expected, (x, weight, bias), gradient),
        strict=True,
    )
    assert max(relative(a, e) for a, e in pairs) < 1e-13
    without = resized_depthwise_conv(x, weight, None, dilation, torch.Size(new_size))
    assert relative(without + bias[:, None, None], expected) < 1e-14


def test_enlarging_by_two_products():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 6, dtype=torch.double)
    expected = F.interpolate(x, (32, 48), mode="bilinear", align_corners=False)
    assert relative(resize_bilinear(x, torch.Size((32, 48))), expected) < 1e-14
    assert resize_bilinear(x, x.shape[-2:]) is x


@pytest.mark.parametrize("sizes", [[(32, 32), (8, 8), (4, 4), (2, 2)], [(64, 32), (8, 4), (4, 2), (2, 1)]])
@pytest.mark.parametrize("mode", ["train", "recompute", "eval"])
def test_level_by_level_is_the_head_on_one_map(sizes, mode):
    torch.manual_seed(0)
    head = DAFormerHead((8, 6, 5, 4), num_classes=3, channels=4, embed_channels=5, dropout=0.0).double()
    for bn in (module for module in head.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
        torch.nn.init.normal_(bn.weight)
        torch.nn.init.normal_(bn.bias)
    reference = copy.deepcopy(head)
    for module in (head, reference):
        module.train(mode != "eval")
    head.fuse_layer.gradient_checkpointing = mode == "recompute"
    levels = features(sizes)
    actual, expected = head(levels), head_logits(reference, levels)
    gradient = torch.randn_like(expected)
    found = torch.autograd.grad(actual, [*levels, *head.parameters()], gradient)
    wanted = torch.autograd.grad(expected, [*levels, *reference.parameters()], gradient)
    assert relative(actual, expected) < 1e-13
    assert max(relative(f, w) for f, w in zip(found, wanted, strict=True)) < 1e-11
    for own, other in zip(head.buffers(), reference.buffers(), strict=True):  # num_batches_tracked, too
        assert torch.allclose(own.double(), other.double(), rtol=1e-13)


def test_no_map_of_all_levels_at_the_size_of_the_image():
    """The widest tensor of a forward pass has the channels of one level, not of four."""
    torch.manual_seed(0)
    head = DAFormerHead((8, 6, 5, 4), num_classes=3, channels=4, embed_channels=8)
    levels = [level.float().detach() for level in features([(64, 64), (16, 16), (8, 8), (4, 4)])]
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 4 and tensor.shape[-2:] == (64, 64):
            kept[tensor.untyped_storage().data_ptr()] = tensor.shape[1]
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        head(levels)
    assert max(kept.values()) == 8
