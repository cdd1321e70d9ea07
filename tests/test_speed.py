"""What makes training fast and must not change its numbers: no waiting for the device, bf16, attention, compilation.

Speed itself is not asserted; it is measured in `benchmarks/`. One test really compiles, with `MADM_SLOW_TESTS=1` only.
"""

import copy
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from tiny_model import new_model
from torch import nn

import train_madm
from benchmarks.common import random_batch, training_settings
from benchmarks.count_syncs import reads, real_step, reason, refusing_to_wait
from madm_utils import compilation
from madm_utils.augmentations import choose_classes, class_masks, label_classes
from madm_utils.cli import UserError
from madm_utils.compilation import _compile_clock, check_compiler, compile_model
from madm_utils.engines import TrainingAccelerator
from madm_utils.loader_wait import LoaderWait
from madm_utils.pseudo_labels import palette_table
from madm_utils.segmenter import Segmenter
from madm_utils.tasks import TASKS
from madm_utils.train_args import parse_train_args, train_parser

TASK = TASKS["synthetic_to_depth"]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


# --- no waiting for the device ---------------------------------------------------------------------------------------


STEP = ("--class_mix_scope", "image", "--pseudo_label_weight", "image", "--loss_average", "valid", "--teacher_mode",
        "eval", "--color_jitter_probability", "1", "--blur_probability", "1", "--lplr_mask", "mixed")  # fmt: skip
"""The longer way at every turn; `benchmarks/count_syncs.py` takes the default one too."""


def test_a_step_reads_nothing_from_the_device():
    torch.manual_seed(0)
    model = new_model(TASK, "lora")
    args = training_settings(model, *STEP)
    accelerator = TrainingAccelerator("no", 1, args.max_grad_norm)
    step = real_step(args, model, accelerator)
    found = reads(step)
    assert ("from_numpy", "madm_utils/augmentations.py:class_masks") in found  # so it does count
    assert not {read: count for read, count in found.items() if not reason(read)}
    if torch.cuda.is_available():
        refusing_to_wait(step)


def test_reads_are_found():
    """The counter itself: a value taken by a method, by a condition, and by an operation."""
    x = torch.arange(6.0)

    def reading() -> None:
        x.sum().item()
        assert x[0] == 0
        x[x > 2]
        torch.tensor([1.0])

    found = reads(reading)
    here = "tests/test_speed.py:reading"
    assert {(name, here) for name in ("item", "__bool__", "tensor")} <= set(found)
    assert ("nonzero", "index") in found or ("nonzero", "nonzero") in found
    assert not any(reason(read) for read in found)


def slow_class_mix(labels, rng, scope):
    """As published: classes counted on the device, masks by comparison."""
    masks = []
    for label in labels:
        classes = labels.unique() if scope == "batch" else label[label != 255].unique()
        chosen = rng.choice(len(classes), (len(classes) + 1) // 2, replace=False)
        masks.append(torch.isin(label, classes[torch.as_tensor(chosen)]))
    return torch.stack(masks)


@pytest.mark.parametrize("scope", ["batch", "image"])
def test_class_mix_from_counted_classes(scope):
    """Equal to the draws and masks of a slow reference, also for an image without a label."""
    for seed in range(20):
        labels = torch.randint(0, 9, (3, 4, 5), generator=torch.Generator().manual_seed(seed))
        labels[labels > 6] = 255
        labels[2, :, : seed % 6] = 255
        expected = slow_class_mix(labels, np.random.default_rng(seed), scope)
        assert torch.equal(
            class_masks(labels, choose_classes(label_classes(labels), np.random.default_rng(seed), scope)), expected
        )
        chosen = choose_classes(label_classes(labels), np.random.default_rng(seed), scope)
        assert torch.equal(class_masks(labels[1:], chosen[1:]), expected[1:])


# --- bf16 ------------------------------------------------------------------------------------------------------------


def losses_and_gradients(model, precision: str) -> tuple[dict[str, float], torch.Tensor]:
    """Of one pass with fixed weights, batch and draws."""
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = ("--task", TASK.name, "--data_dir", "-", "--output_dir", "-", "--pretrained_model_name_or_path", "-")
    # Every pixel is confident, so that rounding cannot move the weight of the pseudo labels.
    [(args, _)] = parse_train_args(train_parser(""), [*flags, "--pseudo_label_threshold", "0"])
    accelerator = TrainingAccelerator(precision, 1, args.max_grad_norm)
    teacher = copy.deepcopy(model.segmenter).requires_grad_(False)
    batch = random_batch(model, torch.device("cpu"))
    draws = train_madm.draw(batch["source_label"], label_classes(batch["source_label"]), 0, "0", args)
    prepared = accelerator.prepare_model(model)
    scalars, _ = train_madm.adaptation_pass(
        prepared, teacher, batch, draws, args, palette_table(TASK.palette), accelerator
    )
    assert all(value.dtype == torch.float32 for value in scalars.values())
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return {name: value.item() for name, value in scalars.items() if name.endswith("_loss")}, gradient


def test_bf16_keeps_losses_and_gradients():
    """bf16 has 8 bits of mantissa: one rounding changes a value by up to 2^-9 = 0.2 %. Losses are means over all
    pixels in float32, in which most of it averages out; what was measured is in docs/training.md."""
    torch.manual_seed(0)
    model = new_model(TASK, "lora").train()
    results = []
    for precision in ("no", "bf16"):
        torch.manual_seed(1)
        results.append(losses_and_gradients(copy.deepcopy(model), precision))
    (exact, exact_gradient), (rounded, rounded_gradient) = results
    assert len(exact) == 4
    differences = {name: abs(rounded[name] - value) / value for name, value in exact.items()}
    cosine = F.cosine_similarity(exact_gradient, rounded_gradient, dim=0).item()
    assert 0 < max(differences.values()) < 0.005, differences  # 0 would mean that nothing ran in bf16
    assert cosine > 0.9


# --- attention -------------------------------------------------------------------------------------------------------


@pytest.fixture
def attention_calls(monkeypatch):
    """Every call of PyTorch's fused attention."""
    calls, original = [], F.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(args[0].shape)
        return original(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    return calls


def attention_layers(module: nn.Module) -> int:
    return sum(type(m).__name__ == "Attention" for m in module.modules())


def test_all_attention_is_fused(attention_calls, tmp_path):
    """UNet, and the middle of encoder and decoder: fresh with its LoRA, and loaded again."""
    model = new_model(TASK, "lora")
    model.save_pretrained(tmp_path)
    for network in (model.eval(), type(model).from_pretrained(tmp_path)):
        attention_calls.clear()
        with torch.no_grad():
            network(torch.rand(1, 3, 64, 64))
        assert len(attention_calls) == attention_layers(network.unet) + attention_layers(network.extractor.vae) > 10


# --- waiting for data ------------------------------------------------------------------------------------------------


def test_loader_wait(monkeypatch, caplog):
    """By a clock in the hand: 2 of 10 seconds, a pause not counted; one warning, and none while workers start."""
    now = [0.0]
    monkeypatch.setattr("madm_utils.loader_wait.time.monotonic", lambda: now[0])
    Accelerator(cpu=True)

    def slow_batches():
        for batch in range(3):
            now[0] += 2
            yield batch

    wait = LoaderWait(workers=1)
    batches = wait.timed(slow_batches())
    assert next(batches) == 0 and wait.waited == 2
    assert wait.fraction(wait.waited, passed=4, starting=True) == 0.5 and wait.waited == 0
    assert not caplog.records
    assert next(batches) == 1
    with wait.pause():
        now[0] += 30
    assert wait.fraction(wait.waited, passed=40, starting=False) == pytest.approx(0.2)
    assert "waits for its data 20% of the time: raise --dataloader_num_workers (1)" in caplog.text
    assert next(batches) == 2
    assert wait.fraction(wait.waited, passed=2, starting=False) == 1.0
    assert len(caplog.records) == 1 and list(batches) == []
    assert wait.fraction(0.0, passed=5, starting=False) == 0.0


# --- compilation -----------------------------------------------------------------------------------------------------


class SmallExtractor(nn.Module):
    """One block of each kind that is compiled, of the real classes."""

    def __init__(self):
        super().__init__()
        self.unet = nn.Module()
        self.unet.up_blocks = nn.ModuleList()
        self.unet.resnet = ResnetBlock2D(in_channels=8, out_channels=8, temb_channels=8, groups=4)
        self.unet.transformer = BasicTransformerBlock(8, 2, 4, cross_attention_dim=8)
        self.vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).requires_grad_(False)
        self.vae_decoder = None

    def forward(self, images: torch.Tensor, noisy: torch.Tensor, prompt: torch.Tensor) -> list[torch.Tensor]:
        latents = self.vae.encode(images).latent_dist.mode()
        x = self.unet.resnet(noisy, prompt[:, 0])
        tokens = self.unet.transformer(x.flatten(2).transpose(1, 2), encoder_hidden_states=prompt)
        return [self.vae.decode(latents).sample, tokens.transpose(1, 2).view(x.shape)]


def small_model() -> tuple[SmallExtractor, Segmenter]:
    torch.manual_seed(0)
    return SmallExtractor(), Segmenter(3, (3, 8), (32, 32), 32, 8, 8, 4, 8, 8)


def small_step(extractor, segmenter, side: int = 16) -> torch.Tensor:
    """Logits, gradients and statistics of a training step, in one vector."""
    torch.manual_seed(1)
    inputs = torch.rand(1, 3, side, side), torch.rand(1, 8, side, side), torch.rand(1, 2, 8)
    logits = segmenter(extractor(*inputs))
    logits.square().mean().backward()
    gradients = [p.grad.flatten() for m in (extractor, segmenter) for p in m.parameters() if p.grad is not None]
    for module in (extractor, segmenter):
        module.zero_grad()
    statistics = [b.flatten().float() for b in segmenter.buffers()]
    return torch.cat([logits.detach().flatten(), *gradients, *statistics])


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.callback_handler.clear()
    _compile_clock.cache_clear()


def compare_with_eager(backend: str, checkpointing: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What a step computes before and after compilation, whose traces in the model are checked."""
    Accelerator(cpu=True)
    extractor, segmenter = small_model()
    if checkpointing:
        segmenter.enable_gradient_checkpointing()
    plain = copy.deepcopy((extractor, segmenter))
    names = list(segmenter.state_dict())
    compile_model(extractor, [segmenter], torch.device("cpu"), backend)
    result = small_step(extractor, segmenter)
    assert list(segmenter.state_dict()) == names
    assert copy.deepcopy(segmenter).projections[0]._compiled_call_impl is None  # the teacher has to be compiled itself
    return result, small_step(*plain)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_compute_the_same(checkpointing, fresh_compiler, capsys):
    """Traced as whole graphs, without generated code: equal to the last bit, dropout and statistics included."""
    compiled, plain = compare_with_eager("eager", checkpointing)
    assert torch.equal(compiled, plain)
    first, second = capsys.readouterr().err.splitlines()
    assert "blocks of UNet, VAE and head are compiled when they first run; that takes minutes" in first
    assert "graphs compiled in" in second


@pytest.mark.skipif("MADM_SLOW_TESTS" not in os.environ, reason="compiles C++; MADM_SLOW_TESTS=1 runs it")
def test_generated_code_computes_the_same(fresh_compiler):
    compiled, plain = compare_with_eager("inductor", checkpointing=False)
    assert 0 < ((compiled - plain).norm() / plain.norm()).item() < 1e-5


def test_too_many_sizes_end_with_a_message(fresh_compiler, monkeypatch):
    """Not with uncompiled blocks, which is what PyTorch does by default."""
    monkeypatch.setattr(compilation, "_VARIANTS", 1)
    Accelerator(cpu=True)
    extractor, segmenter = small_model()
    compile_model(extractor, [], torch.device("cpu"), "eager")
    for side in (8, 8):
        extractor.unet.resnet(torch.rand(1, 8, side, side), torch.rand(1, 8))
    with pytest.raises(UserError, match="unet.resnet and its like have been compiled for 1 shapes, too many sizes"):
        extractor.unet.resnet(torch.rand(1, 8, 16, 16), torch.rand(1, 8))


def test_what_cannot_be_compiled_is_named(fresh_compiler):
    Accelerator(cpu=True)
    _, segmenter = small_model()
    extractor, _ = small_model()
    segmenter.projections[0].shortcut.register_forward_hook(lambda module, args, out: print(out.sum().item()))
    compile_model(extractor, [segmenter], torch.device("cpu"), "eager")
    with pytest.raises(UserError, match=r"cannot compile segmenter.projections.0: .*Leave --compile out"):
        segmenter.projections[0](torch.rand(1, 3, 8, 8))


def test_missing_compilers(monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    with pytest.raises(UserError, match="needs a C.. compiler on the CPU and found none: install g"):
        check_compiler("cpu")
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    with pytest.raises(UserError, match="needs Triton and a GPU that it supports"):
        check_compiler("cuda")
    check_compiler("mps")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--quantize_base", "nf4"), "--compile cannot compile the layers of --quantize_base"),
        (("--sync_batch_statistics",), "--compile cannot compile what --sync_batch_statistics sends"),
    ],
)
def test_flags_that_do_not_go_with_compilation(flags, message, capsys):
    required = ("--task", TASK.name, "--data_dir", "-", "--output_dir", "-", "--pretrained_model_name_or_path", "-")
    with pytest.raises(SystemExit):
        parse_train_args(train_parser(""), [*required, "--compile", *flags])
    assert message in " ".join(capsys.readouterr().err.split())
