"""Approximations: head at a lower resolution, small VAE decoder, merged LoRA, UNet in 8 bits; each error message."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline
from fork_server import run_script
from tiny_model import RESOLUTION, WIDTHS, base_folder, new_model, write_data

import eval_madm
import export_madm
import predict_madm
from benchmarks import bench_approximations
from madm_utils import MADMPipeline
from madm_utils.approximations import approximate
from madm_utils.cli import UserError
from madm_utils.comparison import approximations
from madm_utils.model_folder import built_in_approximations
from madm_utils.modeling_madm import MADMModel
from madm_utils.original_writer import published_checkpoint
from madm_utils.segmentation_pipeline import DiffusionSegmentationPipeline
from madm_utils.segmenter import segmenter_config
from madm_utils.small_decoder import load_decoder
from madm_utils.storage import open_output
from madm_utils.tasks import TASKS

TASK = TASKS["synthetic_to_depth"]
IMAGE = next(Path(__file__).parent.glob("fixtures/common/dataset_case/**/*.png"))


def write_decoder(folder: Path, **options) -> Path:
    """A small decoder of random weights for the VAE of `base_folder`."""
    widths = {f"{part}_block_out_channels": (8, 8, 8) for part in ("encoder", "decoder")}
    blocks = {f"num_{part}_blocks": (1, 1, 1) for part in ("encoder", "decoder")}
    AutoencoderTiny(**{**widths, **blocks, **options}).save_pretrained(folder)
    return folder


def with_lora(task_name: str = "synthetic_to_depth", **options) -> MADMModel:
    """A model whose LoRA and BatchNorm statistics are not those of a fresh one."""
    model = new_model(TASKS[task_name], "lora", rank=4, lora_alpha=16, **options)
    for name, parameter in model.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)  # of all layers: a larger one makes rounding grow
    return model.eval()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    torch.manual_seed(0)
    return write_decoder(tmp_path_factory.mktemp("decoder") / "small", scaling_factor=0.5)


@pytest.fixture(scope="module")
def saved(decoder, tmp_path_factory):
    """Model folders: of a LoRA with a head at 1/4 and a small decoder, and of a whole UNet, exact."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    with_lora(head_resolution=4, vae_decoder=str(decoder)).save_pretrained(folder / "lora")
    new_model(TASK).save_pretrained(folder / "full")
    return folder


@pytest.fixture
def images():
    return torch.rand(1, 3, RESOLUTION, RESOLUTION)


# --- head at a lower resolution, small decoder -----------------------------------------------------------------------


def test_head_sees_the_means_of_blocks_and_its_logits_are_enlarged():
    segmenter = new_model(TASK, head_resolution=2).segmenter.eval()
    channels = segmenter.config.feature_channels
    features = [torch.randn(1, c, side, side) for c, side in zip(channels, (64, 16, 8, 4), strict=True)]
    with torch.no_grad():
        logits = segmenter(features)
        means = features[0].reshape(1, 3, 32, 2, 32, 2).mean((3, 5))
        projected = [project(x) for project, x in zip(segmenter.projections, [means, *features[1:]], strict=True)]
        small = segmenter.head(projected)
    assert small.shape == (1, TASK.num_classes, 32, 32) and logits.shape == (1, TASK.num_classes, 64, 64)
    # Between the centres of two coarse pixels, at 1/4 and 3/4 of the way.
    torch.testing.assert_close(logits[0, :, 0, 1], 0.75 * small[0, :, 0, 0] + 0.25 * small[0, :, 0, 1])
    torch.testing.assert_close(logits, F.interpolate(small, (64, 64), mode="bilinear", align_corners=False))


def test_small_decoder_takes_scaled_latents_and_is_not_clipped(decoder):
    model = new_model(TASK, vae_decoder=str(decoder))
    latents = 5 * torch.randn(2, 4, 16, 16, requires_grad=True)
    decoded = model.extractor.decode(latents)
    expected = AutoencoderTiny.from_pretrained(decoder).decode(latents / 0.5).sample
    torch.testing.assert_close(decoded, expected)
    assert decoded.shape == (2, 3, 64, 64) and not decoded.requires_grad and decoded.abs().max() > 1
    assert not any(parameter.requires_grad for parameter in model.extractor.vae_decoder.parameters())
    assert "extractor.vae_decoder.decoder.layers.0.weight" in model.state_dict()


def test_folder_pipeline_and_code_without_the_package_agree(saved, decoder, images):
    """Both settings travel with the folder; the decoder is referred to, not copied."""
    with torch.no_grad():
        expected = MADMModel.from_pretrained(saved / "lora")(images).logits
        exact = MADMModel.from_pretrained(saved / "lora")
        exact.segmenter.register_to_config(head_resolution=1)
        assert (exact(images).logits - expected).abs().max() > 0.01
        exact.extractor.vae_decoder = None
        assert (exact(images).decoded - MADMModel.from_pretrained(saved / "lora")(images).decoded).abs().max() > 0.01
        standalone = DiffusionPipeline.from_pretrained(
            saved / "lora", custom_pipeline=str(saved / "lora"), trust_remote_code=True
        )
        for pipe in (MADMPipeline.from_pretrained(saved / "lora"), standalone):
            torch.testing.assert_close(pipe.forward(images), expected, rtol=0, atol=0)
            assert isinstance(pipe.components["vae_decoder"], AutoencoderTiny)
    assert type(standalone).__module__ != DiffusionSegmentationPipeline.__module__
    config = json.loads((saved / "lora" / "madm_config.json").read_text())
    assert config["vae_decoder"] == str(decoder) and len(config["vae_decoder_signature"]) == 32
    assert not list((saved / "lora").rglob("*decoder*"))
    assert built_in_approximations(saved / "lora") == {"head_resolution": 4, "vae_decoder": "small"}
    assert built_in_approximations(saved / "full") == {"head_resolution": 1, "vae_decoder": None}


def test_folders_from_before_there_was_a_choice_load(saved, images, tmp_path):
    shutil.copytree(saved / "full", tmp_path / "old")
    for path, keys in (("madm_config.json", ("vae_decoder", "vae_decoder_signature")),
                       ("segmenter/config.json", ("head_resolution",))):  # fmt: skip
        config = json.loads((tmp_path / "old" / path).read_text())
        config = {key: value for key, value in config.items() if key not in keys}
        (tmp_path / "old" / path).write_text(json.dumps(config))
    with torch.no_grad():
        old, new = (MADMModel.from_pretrained(folder)(images) for folder in (tmp_path / "old", saved / "full"))
    assert torch.equal(old.logits, new.logits)


def test_adapters_share_one_decoder_and_each_uses_its_own(saved, decoder, images, tmp_path):
    """The later ones, though the first has none."""
    for name, options in (("depth", {}), ("event", {"vae_decoder": str(decoder)}),
                          ("infrared", {"vae_decoder": str(decoder)})):  # fmt: skip
        with_lora(f"synthetic_to_{name}", **options).save_pretrained(tmp_path / name)
    pipe = MADMPipeline.from_pretrained(tmp_path)
    decoders = {}
    for name in ("depth", "event", "infrared"):
        pipe.set_adapters(name)
        decoders[name] = pipe.vae_decoder
        with torch.no_grad():
            alone = MADMModel.from_pretrained(tmp_path / name)(images).logits
            torch.testing.assert_close(pipe.forward(images), alone, rtol=0, atol=0)
    assert decoders["infrared"] is decoders["event"] is not None and decoders["depth"] is None
    with pytest.raises(
        UserError, match="LoRAs of depth, event, infrared share one UNet, so none of them can be merged"
    ):
        pipe.merge_lora()


def test_adapters_with_parts_of_their_own_follow_the_pipeline_in_its_precision(decoder, images):
    whole = new_model(TASKS["synthetic_to_event"], vae_decoder=str(decoder))
    pipe = MADMPipeline.of_models(with_lora(), whole)
    alone = copy.deepcopy(whole).to(torch.bfloat16)
    alone.extractor.shared_noise = alone.extractor.draw_noise(16, 16)  # which stays in full precision
    pipe.to(torch.bfloat16).set_adapters("event")
    with torch.no_grad():
        torch.testing.assert_close(pipe.forward(images), alone(images).logits, rtol=0, atol=0)
    assert {part.dtype for part in (pipe.vae, pipe.unet, pipe.vae_decoder, pipe.segmenter)} == {torch.bfloat16}
    assert pipe.vae is whole.extractor.vae


def test_decoder_that_has_moved(saved, decoder, images, tmp_path, monkeypatch):
    """All that load a model take its new place; of models without a small decoder nobody does."""
    folder = shutil.copytree(saved / "lora", tmp_path / "lora")
    path = folder / "madm_config.json"
    path.write_text(path.read_text().replace(str(decoder), "/gone"))
    with pytest.raises(UserError, match="VAE decoder /gone cannot be loaded.*--vae_decoder, in Python `vae_decoder=`"):
        MADMModel.from_pretrained(folder)
    model = MADMModel.from_pretrained(folder, vae_decoder=str(decoder))
    with torch.no_grad():
        assert torch.equal(model(images).logits, MADMModel.from_pretrained(saved / "lora")(images).logits)
    assert model.config()["vae_decoder"] == str(decoder)

    asked = []
    flags = ["--model_path", str(folder), "--vae_decoder", str(decoder), "--output_dir", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(MADMModel, "from_pretrained", lambda *_, vae_decoder, **__: asked.append(vae_decoder) or model)
        scripts_load(flags, saved / "full")
    assert asked == [str(decoder), str(decoder), None, str(decoder), None]

    refused = "--vae_decoder small .in Python `vae_decoder=`. takes the place .* none in .*/full: leave it out"
    flags = ["--model_path", str(saved / "full"), "--vae_decoder", "small", "--output_dir", str(tmp_path / "out")]
    for load in (
        lambda: MADMPipeline.from_pretrained(saved / "full", vae_decoder="small"),
        lambda: MADMModel.from_pretrained(saved / "full", vae_decoder="small"),
        lambda: eval_madm.main([*flags, "--data_dir", "nowhere"]),
        lambda: predict_madm.main([*flags, "--input", str(IMAGE)]),
    ):
        with pytest.raises(UserError, match=refused):
            load()
        AcceleratorState._reset_state(reset_partial_state=True)


def scripts_load(flags, other) -> None:
    """Load as export, evaluation and prediction do, the last two the model `other` as well."""
    export_madm.load_merged(export_madm.parse_args([*flags, "--format", "torch_export"]))
    both = [*flags[:2], str(other), *flags[2:]]
    args = eval_madm.parse_args([*both, "--data_dir", "data"])
    for model in eval_madm.checked_models(args, None):
        model.load(args.weights, None, args.vae_decoder)
    args = predict_madm.parse_args([*both, "--input", str(IMAGE)])
    predict_madm.load(args, predict_madm.make_plan(args, open_output(args.output_dir, 1)).decoders, "cpu")


def test_decoder_that_cannot_be_used(saved, decoder, tmp_path):
    vae = AutoencoderKL.from_pretrained(base_folder(), subfolder="vae")
    with pytest.raises(UserError, match=r"VAE decoder .*/vae lacks \d+ tensors of an AutoencoderTiny"):
        load_decoder(str(base_folder() / "vae"), vae)
    with pytest.raises(UserError, match="VAE decoder /nowhere cannot be loaded.*such as madebyollin/taesd"):
        load_decoder("/nowhere", vae)
    options = {f"{part}_block_out_channels": (8, 8) for part in ("encoder", "decoder")}
    options |= {f"num_{part}_blocks": (1, 1) for part in ("encoder", "decoder")}
    folder = write_decoder(tmp_path / "half", **options)
    with pytest.raises(UserError, match="4 channels at 1/2 of the image; the base model's VAE has 3, 4 and 1/4"):
        load_decoder(str(folder), vae)
    # Of the same shape, in the place of the one that the model was trained with.
    shutil.copytree(saved / "lora", tmp_path / "model")
    path = tmp_path / "model" / "madm_config.json"
    path.write_text(path.read_text().replace(str(decoder), str(write_decoder(tmp_path / "other"))))
    with pytest.raises(UserError, match="trained with another VAE decoder than .*/other, whose weights differ"):
        MADMModel.from_pretrained(tmp_path / "model")
    pipe = MADMPipeline.from_pretrained(saved / "full")
    with pytest.raises(UserError, match="trained with the VAE's own decoder; leave `vae_decoder` out"):
        DiffusionSegmentationPipeline(
            *(pipe.segmenter, pipe.vae, pipe.unet, pipe.scheduler, pipe.config.settings),
            vae_decoder=AutoencoderTiny.from_pretrained(decoder),
        )


def test_head_that_is_coarser_than_the_latents():
    vae = AutoencoderKL(block_out_channels=(4, 4), down_block_types=["DownEncoderBlock2D"] * 2,
                        up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=2)  # fmt: skip
    with pytest.raises(UserError, match="--head_resolution 4 is coarser than the latents .* 1/2 .*give at most 2"):
        segmenter_config(SimpleNamespace(vae=vae), 5, head_resolution=4)


def test_published_format_has_no_place_for_them(saved, tmp_path):
    config = json.loads((saved / "lora" / "madm_config.json").read_text())
    shutil.copytree(saved / "lora", tmp_path / "model")
    # 512 pixels of a VAE that makes latents of a quarter would be 128; this is the size that the format takes.
    (tmp_path / "model" / "madm_config.json").write_text(json.dumps(config | {"resolution": 256}))
    with pytest.raises(
        UserError, match="trained with --head_resolution 4, --vae_decoder .*/small; the published code"
    ):
        published_checkpoint(tmp_path / "model")


def test_training_has_both_and_only_goes_on_with_both(decoder, tmp_path):
    data = write_data(tmp_path / "data")
    widths = [part for name, value in WIDTHS.items() for part in (f"--{name}", value)]
    flags = ["--task", TASK.name, "--data_dir", data, "--pretrained_model_name_or_path", base_folder(), "--resolution",
             RESOLUTION, *widths, "--dataloader_num_workers", 0, "--rare_class_min_pixels", 10, "--report_to", "none",
             "--output_dir", tmp_path / "out"]  # fmt: skip
    both = ["--head_resolution", 4, "--vae_decoder", decoder]
    done = run_script("train_madm.py", *flags, *both, "--max_train_steps", 1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert built_in_approximations(tmp_path / "out") == {"head_resolution": 4, "vae_decoder": "small"}
    flags += ["--max_train_steps", 2, "--resume_from_checkpoint", "latest"]
    for changed, message in ((both[:2], r"data VAE decoder: \w+ -> None"), (both[2:], "head_resolution: 4 -> 1")):
        done = run_script("train_madm.py", *flags, *changed)
        assert done.returncode == 2
        pytest.raises(UserError, raise_error, done.stderr).match(message)


def raise_error(text: str) -> None:
    raise UserError(text)


# --- inference -------------------------------------------------------------------------------------------------------


def test_merged_and_8_bit_unets_are_close(saved, images):
    """Merging rounds in float32. int8: 1/254 of the largest weight of a row and activation; fp8: 3 bits of mantissa,
    the same as weights that were rounded beforehand, bit by bit."""
    expected = MADMModel.from_pretrained(saved / "lora")
    with torch.no_grad():
        exact = expected(images).label_latent
        scale = exact.std()
        approximate(expected, merge=True)
        merged = expected(images).label_latent
        assert 0 < (merged - exact).abs().max() < 1e-4 * scale
        for quantization, bound in (("int8", 0.03), ("fp8", 0.2)):
            model = MADMModel.from_pretrained(saved / "lora")
            approximate(model, quantization=quantization)
            found = model(images).label_latent
            assert 1e-4 * scale < (found - exact).square().mean().sqrt() < bound * scale, quantization
            bytes_per_weight = (
                model.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.element_size()
            )
            assert bytes_per_weight == 1 and model.unet_tuning == "full"
        for name, module in expected.unet.named_modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and "norm" not in name:
                for parameter in module.parameters():
                    parameter.copy_(parameter.to(torch.float8_e4m3fn).float())
        torch.testing.assert_close(found, expected(images).label_latent, rtol=0, atol=0)
    with pytest.raises(UserError, match="the UNet is stored in fp8 already; load the model again"):
        approximate(model, quantization="int8")
    with pytest.raises(UserError, match="the UNet is stored in fp8 and cannot be saved"):
        model.save_pretrained("anywhere")
    assert not Path("anywhere").exists()


def test_what_is_refused_changes_nothing(saved, images):
    model = with_lora()
    pipe = MADMPipeline.of_models(model, new_model(TASKS["synthetic_to_event"]))
    adapters = dict(model.unet.peft_config)
    with torch.no_grad():
        expected = model(images).logits
        with pytest.raises(UserError, match="can be quantised to int8 or fp8, got 'nf4'"):
            approximate(model, merge=True, quantization="nf4")
        with pytest.raises(UserError, match="there is no LoRA to merge"):  # in the second model
            pipe.merge_lora()
        assert model.unet_tuning == "lora" and model.unet.peft_config == adapters != {}
        assert torch.equal(model(images).logits, expected)


def test_pipeline_methods(saved, images, tmp_path):
    pipe = MADMPipeline.from_pretrained(saved / "lora")
    expected = pipe(images, return_probabilities=True).probabilities[0]
    pipe.merge_lora()
    pipe.save_pretrained(tmp_path / "merged")
    for merged in (pipe, MADMPipeline.from_pretrained(tmp_path / "merged")):
        np.testing.assert_allclose(merged(images, return_probabilities=True).probabilities[0], expected, atol=1e-4)
    pipe.quantize_unet("int8")
    difference = np.abs(pipe(images, return_probabilities=True).probabilities[0] - expected).max()
    assert 1e-5 < difference < 0.1
    with pytest.raises(UserError, match="there is no LoRA to merge"):
        pipe.merge_lora()
    with pytest.raises(UserError, match="can be quantised to int8 or fp8, got 'nf4'"):
        MADMPipeline.from_pretrained(saved / "full").quantize_unet("nf4")


def test_records_say_what_was_approximate(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("madm_utils.visualization.save_confusion_plot", lambda *_: None)
    data = write_data(tmp_path / "data", num_test=2)
    flags = ["--model_path", saved / "lora", "--merge_lora", "--quantize_unet", "fp8", "--num_cpu_threads", 1]
    flags += ["--data_dir", data, "--dataloader_num_workers", 0, "--num_pictures", 0, "--output_dir", tmp_path / "out"]
    monkeypatch.setattr("madm_utils.evaluation_files.save_grids", lambda *_, **__: None)
    eval_madm.main([str(flag) for flag in flags])
    settings = json.loads((tmp_path / "out" / "metrics.json").read_text())["settings"]
    expected = {"merge_lora": True, "quantize_unet": "fp8", "head_resolution": 4, "vae_decoder": "small"}
    assert {key: settings[key] for key in expected} == expected
    text = "head at 1/4, VAE decoder small, merged LoRA, UNet in fp8"
    assert approximations(settings) == text and f"({text})" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"lora is approximate: {text}." in page and '"quantize_unet": "fp8"' in page
    assert approximations({"weights": "student", "merge_lora": False, "head_resolution": 1}) == ""

    AcceleratorState._reset_state(reset_partial_state=True)
    flags = ["--model_path", saved / "lora", "--quantize_unet", "int8", "--input", IMAGE]
    assert predict_madm.main([str(flag) for flag in (*flags, "--output_dir", tmp_path / "predictions")]) == 0
    settings = json.loads((tmp_path / "predictions" / "summary.json").read_text())["settings"]
    assert "merge_lora" not in settings and settings["quantize_unet"] == "int8"
    assert settings["built_in_approximations"] == [{"head_resolution": 4, "vae_decoder": "small"}]


def test_flags_that_do_not_fit(saved, tmp_path, capsys, monkeypatch):
    flags = ["--model_path", str(saved / "full"), "--output_dir", str(tmp_path / "out")]
    for switch in (["--merge_lora"], ["--quantize_unet", "int8"]):
        with pytest.raises(SystemExit):
            eval_madm.parse_args([*flags, "--data_dir", "data", "--update_model_card", *switch])
        assert "leave --merge_lora, --quantize_unet out" in capsys.readouterr().err
    for parse, more in ((eval_madm.parse_args, "--data_dir"), (predict_madm.parse_args, "--input")):
        with pytest.raises(SystemExit):
            parse([*flags, more, "data", "--compile", "--quantize_unet", "fp8"])
        assert "--compile cannot compile a UNet that is cast layer by layer" in capsys.readouterr().err
    monkeypatch.setattr(MADMModel, "from_pretrained", lambda *_, **__: pytest.fail("loaded, but one has no LoRA"))
    flags = ["--model_path", str(saved / "lora"), *flags[1:], "--merge_lora"]
    for main, more in ((predict_madm.main, ["--input", str(IMAGE)]), (eval_madm.main, ["--data_dir", "nowhere"])):
        with pytest.raises(UserError, match="/full: there is no LoRA to merge: the UNet of this model was trained"):
            main([*flags, *more])
        AcceleratorState._reset_state(reset_partial_state=True)


# --- the benchmark ---------------------------------------------------------------------------------------------------


def test_cost_is_the_mean_over_seeds_with_a_paired_interval(tmp_path):
    """Two classes, four equal images: IoU 60/100 and 20/60 of 'head-4' in seed 0, all right otherwise."""
    right = np.array([[100, 20], [100, 20], [100, 20]])  # correct, labelled, predicted
    wrong = np.array([[60, 20], [100, 20], [60, 60]])
    for seed, counts in ((0, wrong), (1, right)):
        for row, values in (("exact", right), ("head-4", counts)):
            path = bench_approximations.counts_file(tmp_path, seed, row)
            path.parent.mkdir(exist_ok=True)
            np.save(path, np.stack([values] * 4))
    found = bench_approximations.quality(tmp_path, "head-4", [0, 1])
    of_seed = 100 * (60 / 100 + 20 / 60) / 2
    assert found["reference"] == pytest.approx(100) and found["miou"] == pytest.approx((of_seed + 100) / 2)
    assert found["per_seed"] == pytest.approx([of_seed - 100, 0])
    assert found["interval"] == pytest.approx([(of_seed - 100) / 2] * 2) and found["seeds"] == 2


def test_benchmark_does_not_mix_settings_and_knows_what_it_needs(tmp_path):
    args = bench_approximations.parse_args(["--steps", "5"])
    bench_approximations.check_settings(tmp_path, args)
    bench_approximations.check_settings(tmp_path, args)
    args.steps = 6
    with pytest.raises(UserError, match="holds results of .*'steps': 5.*'steps': 6.*another --output_dir"):
        bench_approximations.check_settings(tmp_path, args)
    assert bench_approximations.needed(["merged-lora", "unet-fp8"]) == ["exact", "unet-fp8", "lora", "merged-lora"]
    assert bench_approximations.seeds_of("trained-in-bf16", [3, 4], bf16=False) == [3]
    timed = {name for name, row in bench_approximations.ROWS.items() if row.is_timed("training", bf16=False)}
    assert timed == {"exact", "head-2", "head-4", "small-decoder", "head-4-small-decoder", "lora"}
