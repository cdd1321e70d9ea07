"""The model: structure, saving and loading, LoRA, and one message per broken folder."""

import json
import re
import shutil

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_model import RESOLUTION, WIDTHS, base_folder, new_model, write_model

import train_madm
from madm_utils import base_model
from madm_utils.augmentations import label_classes
from madm_utils.base_model import BaseModelReference, base_signature, check_base
from madm_utils.cli import UserError
from madm_utils.feature_extractor import DiffusionFeatureExtractor
from madm_utils.modeling_madm import LORA_TARGET_MODULES, MADMModel
from madm_utils.pseudo_labels import palette_table
from madm_utils.small_model import build_small_stable_diffusion
from madm_utils.tasks import TASKS
from madm_utils.train_args import parse_train_args, train_parser

TASK = TASKS["synthetic_to_depth"]


@pytest.fixture
def images():
    return torch.rand(2, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return {tuning: write_model(tmp_path_factory.mktemp(tuning), unet_tuning=tuning) for tuning in ("lora", "full")}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randomize_lora(unet: torch.nn.Module) -> None:
    """LoRA starts as the identity; give it something to do."""
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def test_output_shapes_follow_image_and_configs(images):
    model = new_model(TASK).eval()
    for side in (64, 128):
        output = model(torch.rand(1, 3, side, side))
        assert output.logits.shape == (1, TASK.num_classes, side, side)
        assert output.label_latent.shape == (1, 4, side // 4, side // 4)
        assert output.decoded.shape == (1, 3, side, side)


def test_taps_are_the_pairs_before_the_upsamplers(images):
    """SD indices 5, 8, 11: recorded here by walking the up path, against what the extractor returns."""
    model = new_model(TASK).eval()
    pairs, unet, extractor = [], model.unet, model.extractor
    for block in unet.up_blocks:
        for last in getattr(block, "attentions", None) or block.resnets:
            last.register_forward_hook(lambda m, a, out: pairs.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        prompt, time = model.segmenter.condition()
        noisy = extractor.add_noise(extractor.encode(images * 2 - 1), 0)
        features, _ = extractor.denoise(noisy, 0, prompt, time)
    assert len(pairs) == 12
    for feature, index in zip(features, (11, 8, 5), strict=True):
        assert torch.equal(feature, pairs[index])
    assert [f.shape[1] for f in features] == extractor.feature_channels[1:]


def test_shared_noise_is_one_draw_of_seed_42(images):
    extractor = new_model(TASK).extractor
    generator = torch.Generator().manual_seed(42)
    assert torch.equal(extractor.shared_noise, torch.randn(1, 4, 16, 16, generator=generator))
    latents = torch.zeros(3, 4, 16, 16)
    noisy = extractor.add_noise(latents, 0)
    torch.testing.assert_close(noisy, 0.029155 * extractor.shared_noise.expand(3, -1, -1, -1), rtol=1e-4, atol=0)
    assert extractor.add_noise(torch.zeros(1, 4, 24, 40), 0).shape == (1, 4, 24, 40)


def test_noise_level_in_half_precision():
    """Published under fp16: sigma 0.03125 at t = 0; our default stays at 0.029155."""
    model = new_model(TASK)
    latents = torch.zeros(1, 4, 16, 16, dtype=torch.float16)
    unit = model.extractor.shared_noise
    ours = (model.extractor.add_noise(latents, 0) / unit).mean().item()
    model.extractor.noise_in_latent_dtype = True
    published = (model.extractor.add_noise(latents, 0).float() / unit).mean().item()
    assert ours == pytest.approx(0.029155, rel=1e-3)
    assert published == pytest.approx(0.03125, rel=1e-3)


def test_time_conditioning_is_added_after_the_embedding(images):
    """A zero gate (initial state) changes nothing; an open gate does."""
    model = new_model(TASK).eval()
    with torch.no_grad():
        off = model(images).label_latent
        model.segmenter.conditioning.time_embed.fill_(3.0)
        assert torch.equal(model(images).label_latent, off)
        model.segmenter.conditioning.alpha_cond_time.fill_(1.0)
        assert not torch.allclose(model(images).label_latent, off)


def test_no_gradient_through_the_decoded_image(images):
    model = new_model(TASK)
    assert not model(images).decoded.requires_grad


def trainable(model: MADMModel) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_what_trains():
    full = trainable(new_model(TASK))
    assert not any(".vae." in name for name in full)
    assert not any(".conv_norm_out." in name or ".conv_out." in name for name in full)
    output_layers = trainable(new_model(TASK, train_unet_output_layers=True)) - full
    assert output_layers == {
        f"extractor.unet.{layer}.{tensor}" for layer in ("conv_norm_out", "conv_out") for tensor in ("weight", "bias")
    }
    lora = trainable(new_model(TASK, "lora"))
    assert {name for name in lora if name.startswith("extractor.")} == {name for name in lora if ".lora_" in name}
    # Every convolution and linear layer of the blocks, and none beside them.
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    layers = {name for name, module in new_model(TASK).named_modules() if isinstance(module, kinds)}
    blocks = {name for name in layers if re.match(r"extractor\.unet\.(down_blocks|mid_block|up_blocks)\.", name)}
    assert {name.split(".lora_")[0] for name in lora if ".lora_" in name} == blocks


def test_lora_on_other_layers(images, tmp_path):
    """Convolutions and linear layers, found by the ends of their names; saved, loaded and restored like attention."""
    layers = ["conv_in", "conv1", "ff.net.2", "to_q"]
    model = new_model(TASK, "lora", rank=4, lora_layers=layers).eval()
    lora = {name.split(".lora_")[0] for name in trainable(model) if ".lora_" in name}
    assert all(name.endswith((".conv_in", ".conv1", ".ff.net.2", ".to_q")) for name in lora)
    assert {name.rsplit(".", 1)[1] for name in lora} == {"conv_in", "conv1", "2", "to_q"}
    randomize_lora(model.unet)
    model.save_pretrained(tmp_path / "m", model.segmenter)
    again = new_model(TASK, "lora", rank=4, lora_layers=layers).eval()
    again.restore(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(MADMModel.from_pretrained(tmp_path / "m")(images).logits, model(images).logits)
        assert torch.equal(again(images).logits, model(images).logits)


@pytest.mark.parametrize(
    "layers, message",
    [(["to_k", "to_x"], "no layer of the UNet is called to_x"), (["norm1"], "norm1: .*not supported")],
)
def test_layers_that_take_no_lora(layers, message):
    with pytest.raises(UserError, match=message):
        new_model(TASK, "lora", lora_layers=layers)


def test_trainable_weights_are_float32_beside_a_half_precision_base():
    model = new_model(TASK, "lora", frozen_dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_round_trip(tuning, images, tmp_path):
    """Save and load give the same student and teacher; the folder holds no copy of the base model."""
    model = new_model(TASK, tuning, **({"rank": 4, "lora_alpha": 16} if tuning == "lora" else {})).eval()
    teacher = new_model(TASK, tuning).segmenter.eval()
    randomize_lora(model.unet)
    model.save_pretrained(tmp_path / "m", teacher)
    with torch.no_grad():
        loaded = MADMModel.from_pretrained(tmp_path / "m")
        assert torch.equal(loaded(images).logits, model(images).logits)
        loaded = MADMModel.from_pretrained(tmp_path / "m", weights="teacher")
        assert torch.equal(loaded(images).logits, model(images, segmenter=teacher).logits)
    assert loaded.task == TASK and loaded.resolution == RESOLUTION and not loaded.training
    files = {p.relative_to(tmp_path / "m").as_posix() for p in (tmp_path / "m").rglob("*") if p.is_file()}
    parts = ["segmenter", "teacher"] + (["unet"] if tuning == "full" else [])
    expected = {f"{part}/{name}" for part in parts for name in ("config.json", "diffusion_pytorch_model.safetensors")}
    expected |= {"madm_config.json", "model_index.json", "pipeline.py", "segmenter/segmenter.py"}
    assert files == expected | ({"pytorch_lora_weights.safetensors"} if tuning == "lora" else set())


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_restore(tuning, images, saved):
    model = new_model(TASK, tuning).eval()
    teacher = new_model(TASK, tuning).segmenter.eval()
    model.restore(saved[tuning], teacher)
    expected = MADMModel.from_pretrained(saved[tuning], weights="teacher")
    with torch.no_grad():
        assert torch.equal(model(images, segmenter=teacher).logits, expected(images).logits)


def test_another_base_of_the_same_shape_is_refused(saved, tmp_path):
    """Its weights differ; those of the right one may have been rounded."""
    other = tmp_path / "other"
    shutil.copytree(base_folder(), other)
    unet = UNet2DConditionModel.from_pretrained(other / "unet")
    torch.nn.init.normal_(unet.conv_in.weight)
    unet.save_pretrained(other / "unet")
    with pytest.raises(UserError, match="trained on another base model than .*other, whose weights differ"):
        MADMModel.from_pretrained(saved["lora"], base=str(other))
    MADMModel.from_pretrained(saved["full"], base=str(other))  # brings its own UNet
    vae = base_model.load_vae(BaseModelReference(str(base_folder())), torch.bfloat16)
    unet = base_model.load_unet(BaseModelReference(str(base_folder())), torch.float16)
    scheduler = base_model.load_scheduler(BaseModelReference(str(base_folder())))
    expected = json.loads((saved["lora"] / "madm_config.json").read_text())["base_signature"]
    check_base(base_signature(vae, scheduler, unet), expected, "rounded")


@pytest.mark.parametrize("layers", [None, ["conv1", "ff.net.2"], ["conv_in", "to_q"], ["to_q", "conv2"]])
def test_lora_loads_in_plain_diffusers(layers, images, tmp_path):
    """Same UNet output from a StableDiffusionPipeline, alpha included, whatever layer is the first in the file."""
    model = new_model(TASK, "lora", rank=4, lora_alpha=16, lora_layers=layers).eval()
    randomize_lora(model.unet)
    model.save_pretrained(tmp_path / "m")
    pipe = StableDiffusionPipeline.from_pretrained(base_folder())
    plain = pipe.unet(images[:, [0, 0, 1, 2], :16, :16], 3, torch.ones(2, 77, 32)).sample
    pipe.load_lora_weights(tmp_path / "m")
    sample, prompt = images[:, [0, 0, 1, 2], :16, :16], torch.ones(2, 77, 32)
    with torch.no_grad():
        expected, actual = model.unet(sample, 3, prompt).sample, pipe.unet(sample, 3, prompt).sample
    torch.testing.assert_close(actual, expected)
    assert not torch.allclose(expected, plain)


# --- the two silent LoRA gradient traps (switching adapters between forward and backward) --------------------------


def lora_gradients(unet, adapter: str) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in unet.named_parameters() if f".{adapter}." in n and p.grad is not None}


def two_adapters():
    unet = new_model(TASK, "lora", rank=16).unet.double()
    unet.add_adapter(LoraConfig(r=16, target_modules=list(LORA_TARGET_MODULES)), adapter_name="rgb")
    randomize_lora(unet)
    unet.enable_gradient_checkpointing()
    return unet.train()


def branch_loss(unet, adapter: str) -> torch.Tensor:
    unet.set_adapter(adapter)
    generator = torch.Generator().manual_seed(len(adapter))
    sample = torch.randn(1, 4, 16, 16, generator=generator, dtype=torch.double)
    return unet(sample, 3, torch.ones(1, 77, 32, dtype=torch.double)).sample.square().mean()


def test_trap_one_switching_adapters_before_backward():
    """One backward after both forwards leaves the first adapter without any gradient, silently; backward per branch
    gives both theirs."""
    unet = two_adapters()
    (branch_loss(unet, "rgb") + branch_loss(unet, "depth")).backward()
    count = len(lora_gradients(unet, "depth"))
    assert count > 0 and not lora_gradients(unet, "rgb")
    unet.zero_grad()
    for adapter in ("rgb", "depth"):
        branch_loss(unet, adapter).backward()
    assert len(lora_gradients(unet, "rgb")) == len(lora_gradients(unet, "depth")) == count


def test_trap_two_checkpointing_recomputes_with_the_active_adapter():
    """With gradient checkpointing, gradients per branch equal those of each branch alone and without checkpointing."""
    unet = two_adapters()
    for adapter in ("rgb", "depth"):
        branch_loss(unet, adapter).backward()
    both = lora_gradients(unet, "rgb") | lora_gradients(unet, "depth")
    unet.disable_gradient_checkpointing()
    for adapter in ("rgb", "depth"):
        unet.zero_grad()
        branch_loss(unet, adapter).backward()
        for name, gradient in lora_gradients(unet, adapter).items():
            torch.testing.assert_close(both[name], gradient, msg=name)


class RecordingAccelerator(Accelerator):
    """The real one, with a list of what happened in which order."""

    def backward(self, loss, **kwargs):
        self.events.append("backward")
        super().backward(loss, **kwargs)


def pass_gradients(
    tuning: str, checkpointing: bool, *flags: str, events: list | None = None, pictures: dict | None = None
) -> tuple[dict, dict]:
    """Scalars and gradients of one `adaptation_pass` on random images.

    `events` gets its forwards and backwards, `pictures` what it gives to look at.
    """
    torch.manual_seed(0)
    required = ["--data_dir", "d", "--output_dir", "o", "--pretrained_model_name_or_path", "b"]
    published = ["--pseudo_label_weight", "batch", "--lplr_mask", "pseudo"]
    [(args, _)] = parse_train_args(train_parser(""), ["--task", TASK.name, *required, *published, *flags])
    output_layers = {"train_unet_output_layers": True} if args.train_unet_output_layers else {}
    model = new_model(TASK, tuning, **output_layers).train()
    if tuning == "lora":
        # A second adapter beside the trained one, as when several modalities share a base.
        model.unet.add_adapter(LoraConfig(r=4, target_modules=list(LORA_TARGET_MODULES)), adapter_name="other")
        model.unet.set_adapter(TASK.modality)
        randomize_lora(model.unet)
    if checkpointing:
        model.unet.enable_gradient_checkpointing()
        model.segmenter.enable_gradient_checkpointing()
    teacher = new_model(TASK, tuning).segmenter.requires_grad_(False).train()
    generator = torch.Generator().manual_seed(1)
    shape = (2, 3, RESOLUTION, RESOLUTION)
    batch = {
        "source_image": torch.randint(256, shape, generator=generator, dtype=torch.uint8),
        "target_image": torch.randint(256, shape, generator=generator, dtype=torch.uint8),
        "source_label": torch.randint(TASK.num_classes, (2, *shape[2:]), generator=generator),
    }
    batch["source_label"][:, :8] = 255
    accelerator = RecordingAccelerator(cpu=True)
    accelerator.events = [] if events is None else events
    model.register_forward_hook(lambda *_: accelerator.events.append("forward"))
    draws = train_madm.draw(batch["source_label"], label_classes(batch["source_label"]), 0, "stream", args)
    palette = palette_table(TASK.palette)
    scalars, shown = train_madm.adaptation_pass(model, teacher, batch, draws, args, palette, accelerator)
    if pictures is not None:
        pictures |= shown
    return scalars, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_every_trainable_tensor_learns_and_checkpointing_changes_nothing(tuning):
    scalars, plain = pass_gradients(tuning, False)
    missing = [name for name, gradient in plain.items() if gradient is None and ".other." not in name]
    assert not missing
    losses = {"source_loss", "lplr_source_loss", "target_loss", "lplr_target_loss"}
    assert set(scalars) == losses | {"pseudo_label_weight", "confident_fraction"}
    _, recomputed = pass_gradients(tuning, True)
    for name, gradient in plain.items():
        if gradient is not None:
            torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_each_branch_is_back_propagated_before_the_next():
    """Source forward and backward; then teacher, mixed, backward. So neither trap can reach `adaptation_pass`."""
    events = []
    pass_gradients("lora", True, events=events)
    assert events == ["forward", "backward", "forward", "forward", "backward"]


@pytest.mark.parametrize(
    ("choice", "losses", "shown"),
    [
        (
            "both",
            {"lplr_source_loss", "lplr_target_loss"},
            {"source_palette", "source_decoded", "mixed_palette", "decoded"},
        ),
        ("source", {"lplr_source_loss"}, {"source_palette", "source_decoded", "decoded"}),
        ("none", set(), set()),
    ],
)
def test_latent_regression_switch(choice, losses, shown):
    pictures = {}
    scalars, _ = pass_gradients("full", False, "--lplr_loss", choice, pictures=pictures)
    assert {name for name in scalars if "lplr" in name} == losses
    assert {name for name in pictures if "decoded" in name or "palette" in name} == shown


def test_output_layers_get_gradients_in_the_synchronising_branch():
    _, gradients = pass_gradients(
        "full", False, "--train_unet_output_layers", "--lplr_loss", "source", "--unet_tuning", "full"
    )
    assert gradients["extractor.unet.conv_out.weight"].abs().sum() > 0


@pytest.mark.parametrize(
    "flags",
    [
        ("--lplr_mask", "mixed"),
        ("--loss_average", "valid"),
        ("--pseudo_label_weight", "pixel", "--pseudo_label_threshold", "0.2"),
        ("--class_mix_scope", "image"),
        ("--lplr_weight", "3"),
        ("--pseudo_label_threshold", "0.0"),
    ],
)
def test_every_switch_of_the_method_changes_the_losses(flags):
    base, _ = pass_gradients("full", False, "--color_jitter_probability", "0", "--blur_probability", "0")
    changed, _ = pass_gradients("full", False, "--color_jitter_probability", "0", "--blur_probability", "0", *flags)
    assert any(not torch.equal(base[name], changed[name]) for name in base)


# --- one message per broken folder -----------------------------------------------------------------------------------


def damaged(saved, tmp_path, tuning: str, part: str, change) -> None:
    """Copy a saved model and apply `change` to the tensors of one part."""
    shutil.copytree(saved[tuning], tmp_path / "m")
    path = tmp_path / "m" / part
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


SEGMENTER = "segmenter/diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize(
    ("tuning", "part"), [("full", SEGMENTER), ("full", "unet/" + SEGMENTER.split("/")[1]), ("lora", LORA)]
)
def test_missing_unexpected_and_misshaped_tensors_are_listed(tuning, part, saved, tmp_path):
    def change(tensors):
        first, second = sorted(tensors)[:2]
        del tensors[first]
        tensors[second] = tensors[second].flatten()[:-1].clone()
        tensors[f"{second}.stranger"] = torch.zeros(1)

    names = sorted(load_file(saved[tuning] / part))[:2]
    damaged(saved, tmp_path, tuning, part, change)
    with pytest.raises(UserError) as error:
        MADMModel.from_pretrained(tmp_path / "m")
    message = str(error.value)
    assert part in message
    if part != LORA or "tensors do not fit" in message:
        assert names[0] in message and names[1] in message and "stranger" in message


def test_lora_of_another_unet(saved, tmp_path):
    damaged(saved, tmp_path, "lora", LORA, lambda tensors: tensors.pop(sorted(tensors)[0]))
    with pytest.raises(UserError, match="1 missing"):
        MADMModel.from_pretrained(tmp_path / "m")


def test_folder_that_is_no_model(tmp_path, saved):
    with pytest.raises(UserError, match="no such folder"):
        MADMModel.from_pretrained(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="lacks madm_config.json .found: nothing."):
        MADMModel.from_pretrained(tmp_path / "empty")
    shutil.copytree(saved["full"], tmp_path / "m")
    (tmp_path / "m/segmenter/config.json").unlink()
    with pytest.raises(UserError, match="segmenter is missing or lacks config.json"):
        MADMModel.from_pretrained(tmp_path / "m")
    config = (tmp_path / "m/madm_config.json").read_text().replace('"resolution": 64', '"resolution": "wide"')
    for content in (b"{}", b"\xff\xfe", config.encode()):
        (tmp_path / "m/madm_config.json").write_bytes(content)
        with pytest.raises(UserError, match="madm_config.json cannot be read"):
            MADMModel.from_pretrained(tmp_path / "m")


def test_a_folder_of_another_format_is_named(saved, tmp_path):
    shutil.copytree(saved["full"], tmp_path / "m")
    path = tmp_path / "m/madm_config.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(UserError, match="is of format 1, this version reads and writes 2; use the version"):
        MADMModel.from_pretrained(tmp_path / "m")


def test_damaged_and_absent_files(tmp_path, saved):
    shutil.copytree(saved["full"], tmp_path / "m")
    path = tmp_path / "m" / SEGMENTER
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="is damaged"):
        MADMModel.from_pretrained(tmp_path / "m")
    path.unlink()
    with pytest.raises(UserError, match="is missing; the folder is incomplete"):
        MADMModel.from_pretrained(tmp_path / "m")


def test_no_teacher(tmp_path):
    new_model(TASK).save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="holds no teacher"):
        MADMModel.from_pretrained(tmp_path / "m", weights="teacher")


@pytest.mark.parametrize("part", ["vae", "unet", "scheduler", "text_encoder", "tokenizer"])
def test_base_model_that_lacks_a_part(part, tmp_path):
    shutil.copytree(base_folder(), tmp_path / "sd")
    shutil.rmtree(tmp_path / "sd" / part)
    with pytest.raises(UserError, match=f"lacks {part}; a Stable Diffusion folder"):
        MADMModel.from_base(BaseModelReference(str(tmp_path / "sd")), TASK, RESOLUTION, **WIDTHS)


def test_base_model_that_is_not_there(tmp_path):
    for name in (str(tmp_path / "absent"), "./absent", "one-word"):
        with pytest.raises(UserError, match="no such folder; give a Stable Diffusion folder"):
            MADMModel.from_base(BaseModelReference(name), TASK, RESOLUTION)
    with pytest.raises(UserError, match="cannot load 'vae' of base model some/where"):
        MADMModel.from_base(BaseModelReference("some/where"), TASK, RESOLUTION)


def test_base_model_without_weights(tmp_path):
    shutil.copytree(base_folder(), tmp_path / "sd")
    (tmp_path / "sd/unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load 'unet'"):
        MADMModel.from_base(BaseModelReference(str(tmp_path / "sd")), TASK, RESOLUTION)


@pytest.mark.parametrize(
    ("part", "name"),
    [("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")],
)
def test_base_weights_that_lack_a_tensor(part, name, tmp_path):
    """Absent tensors would be random numbers."""
    shutil.copytree(base_folder(), tmp_path / "sd")
    path = tmp_path / "sd" / part / f"{name}.safetensors"
    tensors = load_file(path)
    dropped = sorted(tensors)[0]
    save_file({k: v for k, v in tensors.items() if k != dropped}, path, {"format": "pt"})
    with pytest.raises(UserError, match=f"'{part}' of base model .* lacks 1 tensors"):
        MADMModel.from_base(BaseModelReference(str(tmp_path / "sd")), TASK, RESOLUTION, **WIDTHS)


@pytest.mark.parametrize("part", ["vae/diffusion_pytorch_model", "text_encoder/model"])
def test_truncated_base_weights(part, tmp_path):
    shutil.copytree(base_folder(), tmp_path / "sd")
    path = tmp_path / "sd" / f"{part}.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=f"cannot load '{part.split('/')[0]}'"):
        MADMModel.from_base(BaseModelReference(str(tmp_path / "sd")), TASK, RESOLUTION, **WIDTHS)


def test_base_that_is_no_text_to_image_model(tmp_path):
    build_small_stable_diffusion(tmp_path / "sd", (16, 32, 32, 32), (8, 16, 16), prompt_dim=64, norm_groups=4)
    shutil.rmtree(tmp_path / "sd/text_encoder")
    shutil.copytree(base_folder() / "text_encoder", tmp_path / "sd/text_encoder")
    with pytest.raises(UserError, match="its text encoder has width 32, its UNet expects 64"):
        MADMModel.from_base(BaseModelReference(str(tmp_path / "sd")), TASK, RESOLUTION, **WIDTHS)
    inpainting = UNet2DConditionModel.from_config({**new_model(TASK).unet.config, "in_channels": 9})
    extractor = new_model(TASK).extractor
    with pytest.raises(UserError, match="takes 9 and gives 4 channels"):
        DiffusionFeatureExtractor(extractor.vae, inpainting, extractor.scheduler, 16)


def test_damaged_configs(tmp_path, saved):
    shutil.copytree(saved["full"], tmp_path / "m")
    (tmp_path / "m/segmenter/config.json").write_text("{")
    with pytest.raises(UserError, match="segmenter/config.json is damaged"):
        MADMModel.from_pretrained(tmp_path / "m")


def test_moved_base_is_named_and_can_be_replaced(tmp_path, saved):
    shutil.copytree(saved["lora"], tmp_path / "m")
    config = json.loads((tmp_path / "m/madm_config.json").read_text())
    config["base_model"]["pretrained_model_name_or_path"] = str(tmp_path / "moved")
    (tmp_path / "m/madm_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="moved: no such folder"):
        MADMModel.from_pretrained(tmp_path / "m")
    MADMModel.from_pretrained(tmp_path / "m", base=str(base_folder()))


def test_unet_with_too_few_blocks():
    model = new_model(TASK)
    unet = model.unet
    unet.up_blocks = unet.up_blocks[:2]
    with pytest.raises(UserError, match="2 up blocks; features need at least 3"):
        DiffusionFeatureExtractor(model.extractor.vae, unet, model.extractor.scheduler, 16)
