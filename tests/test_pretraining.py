"""Pre-training of the small Stable Diffusion: its pictures, going on where it stopped, the whole script."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from fork_server import run_script
from safetensors import safe_open
from torch import nn

from benchmarks import pretrain_small_diffusion as pretraining
from benchmarks.ablation import ASSET
from benchmarks.pretraining_images import FIRST_SEED, KINDS, PICTURES_PER_SCENE, scene_pictures
from benchmarks.small_diffusion_card import card_text
from madm_utils.cli import UserError
from madm_utils.scenes import INDEX_BITS, MODALITIES, SEED_BITS, SPLITS, scene_seed


def test_pictures_of_a_scene():
    pictures = scene_pictures(FIRST_SEED, 64)
    assert len(pictures) == PICTURES_PER_SCENE
    assert all(picture.image.shape == (64, 64, 3) and picture.image.dtype == np.uint8 for picture in pictures)
    kinds = [picture.kind for picture in pictures]
    assert len(set(kinds)) == len(kinds) and set(kinds) <= set(KINDS)
    assert {"depth", "infrared", "event", "flat street", "flat shapes"} <= set(kinds)
    again = scene_pictures(FIRST_SEED, 64)
    assert all(
        np.array_equal(a.image, b.image) and a.caption == b.caption for a, b in zip(pictures, again, strict=True)
    )
    assert not np.array_equal(pictures[0].image, scene_pictures(FIRST_SEED + 1, 64)[0].image)


def test_every_kind_is_drawn_and_named_in_its_caption():
    words = {"night": "at night", "fog": "in fog", "depth": "depth map", "sketch": "pencil sketch", "day": "by day"}
    found = {}
    for scene in range(24):
        found |= {picture.kind: picture for picture in scene_pictures(FIRST_SEED + scene, 32)}
    assert set(found) == set(KINDS)
    assert all(word in found[kind].caption for kind, word in words.items())
    assert found["night"].image.mean() < 0.5 * found["day"].image.mean()


def test_flat_drawings_have_one_colour_per_surface():
    """Far fewer colours than pixels, and none of texture: a neighbour is equal or of another surface."""
    for picture in scene_pictures(FIRST_SEED + 5):
        if picture.kind.startswith("flat"):
            colours = len(np.unique(picture.image.reshape(-1, 3), axis=0))
            assert colours < 400
            assert (picture.image[:, 1:] == picture.image[:, :-1]).all(axis=2).mean() > 0.8


def test_no_scene_of_the_datasets():
    """But for the exception that the card names: NumPy cuts seeds into words, so other numbers may be one seed."""
    largest = max(scene_seed(2**SEED_BITS - 1, s, m, 2**INDEX_BITS - 1) for s in SPLITS for m in MODALITIES)
    assert largest < FIRST_SEED
    layout = [0, scene_seed(1, "val", "rgb", 0)]  # as `render_scene` makes its generator
    word = FIRST_SEED >> 32
    assert layout == [0, word] and np.random.default_rng(layout).random() == np.random.default_rng(FIRST_SEED).random()
    assert max(scene_seed(0, s, m, 2**INDEX_BITS - 1) for s in SPLITS for m in MODALITIES) < word
    with pytest.raises(ValueError, match="may be those of the synthetic datasets, got 7"):
        scene_pictures(7)


def settings(folder: Path) -> argparse.Namespace:
    return pretraining.parse_args(["--output_dir", str(folder), "--checkpointing_steps", "3", "--seed", "4"])


def fit(folder: Path, fail_at: int | None = None) -> nn.Module:
    """Ten steps of a linear layer on noise; stopped by an error at step `fail_at`."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)

    def loss(step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        if step == fail_at:
            raise RuntimeError("power failure")
        inputs = torch.randn(8, 4, generator=generator)
        return {"error": (layer(inputs) - inputs.flip(1)).square().mean()}

    accelerator = Accelerator(cpu=True)
    if fail_at is not None:  # a stage before in the same run, which is done when the next run goes on
        accelerator.prepare(nn.Linear(2, 2), torch.optim.SGD([nn.Parameter(torch.zeros(1))]))
    (trained,) = pretraining.train("fit", [layer], loss, 10, 1e-2, settings(folder), accelerator)
    return trained


def test_training_goes_on_where_it_stopped(tmp_path):
    whole = fit(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power failure"):
        fit(tmp_path / "cut", fail_at=8)
    assert json.loads((tmp_path / "cut/fit-state/progress.json").read_text())["step"] == 6
    resumed = fit(tmp_path / "cut")
    assert torch.equal(whole.weight, resumed.weight) and torch.equal(whole.bias, resumed.bias)
    logs = [json.loads((tmp_path / name / "fit-state/progress.json").read_text())["log"] for name in ("whole", "cut")]
    assert logs[0][-1]["step"] == logs[1][-1]["step"] == 10


def flags_of(folder: Path, *flags: str) -> list[str]:
    small = ("--num_scenes", 2, "--vae_steps", 3, "--vae_batch_size", 2, "--unet_steps", 3, "--unet_batch_size", 2)
    small += ("--decoder_steps", 3, "--decoder_batch_size", 2, "--num_held_out", 12, "--num_samples", 1)
    small += ("--sampling_steps", 1, "--num_proc", 1, "--output_dir", folder)
    return [str(flag) for flag in (*small, *flags)]


def test_script(tmp_path):
    """From nothing to a model that the suite takes, and the card with its numbers."""
    from madm_utils.base_model import BaseModelReference
    from madm_utils.modeling_madm import MADMModel
    from madm_utils.tasks import TASKS

    out = tmp_path / "out"
    with pytest.raises(UserError, match="stage vae needs the result of images"):
        pretraining.main(flags_of(out, "--stages", "vae"))
    assert not out.exists()
    done = run_script("benchmarks/pretrain_small_diffusion.py", *flags_of(out))
    assert done.returncode == 0, done.stderr
    model = MADMModel.from_base(
        BaseModelReference(str(out / "model")), TASKS["synthetic_to_depth"], 128, "full",
        projection_channels=32, bottleneck_channels=32, head_channels=16,
    ).eval()  # fmt: skip
    with torch.no_grad():
        assert model(torch.rand(1, 3, 128, 128)).logits.shape == (1, 11, 128, 128)
    measured = json.loads((out / "card/measured.json").read_text())
    assert 0 < measured["palette"]["all"] < 100 and set(measured["psnr_db"]) == set(KINDS)
    card = (out / "model/README.md").read_text()
    assert f"**{measured['palette']['all']:.2f} %**" in card and "**missed**" in card
    assert all((out / "model" / picture).stat().st_size for picture in ("samples.png", "losses.png"))
    assert not any(str(tmp_path) in path.read_text() for path in (out / "model").rglob("*.json"))
    with safe_open(out / "model/unet/diffusion_pytorch_model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    with pytest.raises(UserError, match="was begun with --vae_steps 3"):
        pretraining.main(flags_of(out, "--vae_steps", "4"))


def test_the_model_of_the_repository():
    """Made with the script's defaults (of scenes that changed since), in its size; loads like any Stable Diffusion."""
    from diffusers import StableDiffusionPipeline

    weights = sorted(ASSET.rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in weights) <= 20e6 and not list(ASSET.rglob("*.bin"))
    measured = json.loads((ASSET / "measured.json").read_text())
    defaults = vars(pretraining.parse_args([]))
    assert measured["settings"] == {name: defaults[name] for name in pretraining.OF_THE_RESULT}
    assert (ASSET / "README.md").read_text() == card_text(measured)
    pipeline = StableDiffusionPipeline.from_pretrained(ASSET)
    pipeline.set_progress_bar_config(disable=True)
    caption = "a depth map of a street with cars and people"
    generator = torch.Generator().manual_seed(0)
    drawn = pipeline(caption, num_inference_steps=10, generator=generator, output_type="np").images
    assert drawn.shape == (1, 128, 128, 3)
    # Grey, and smooth apart from edges, as no picture of an untrained model is.
    assert np.ptp(drawn, axis=3).mean() < 0.05 and np.abs(np.diff(drawn, axis=1)).mean() < 0.05 < drawn.std()
