"""A saved model on a machine that has diffusers but not this package: from a folder, and from a Hub repository."""

import json
import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import WRITE_TOKEN, HubServer, Repo
from safetensors import safe_open
from tiny_model import base_folder, new_model

from madm_utils import MADMPipeline, standalone
from madm_utils.cli import UserError
from madm_utils.hub import _FILES
from madm_utils.segmentation_pipeline import DiffusionSegmentationPipeline
from madm_utils.standalone import standalone_source
from madm_utils.tasks import TASKS


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Models whose LoRA and output layers are not those of a fresh model, with an alpha other than the rank."""
    torch.manual_seed(0)
    made = {}
    for tuning in ("lora", "full"):
        options = {"rank": 4, "lora_alpha": 16} if tuning == "lora" else {}
        model = new_model(TASKS["synthetic_to_depth"], tuning, **options)
        for name, parameter in model.unet.named_parameters():
            if "lora_B" in name or name.startswith("conv_out"):
                torch.nn.init.normal_(parameter, std=0.3)
        made[tuning] = tmp_path_factory.mktemp(tuning) / "model"
        model.save_pretrained(made[tuning])
    return made


def run_without_the_package(code: str, place: Path, hub: HubServer) -> str:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(place / "cache"), "HF_TOKEN": WRITE_TOKEN}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    run = subprocess.run([sys.executable, "-c", code], cwd=place, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


def test_pushed_and_local_models_run_with_diffusers_alone(folders, tmp_path):
    """What training uploads, a local folder, and the LoRA alone in plain Stable Diffusion."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    np.save(tmp_path / "image.npy", pixels)
    with HubServer() as hub:
        sent = {path.relative_to(folders["lora"]).as_posix(): path for path in folders["lora"].rglob("*.*")}
        sent = {name: path.read_bytes() for name, path in sent.items() if any(fnmatch(name, p) for p in _FILES)}
        hub.repos["me/pushed"] = Repo(files=sent)
        code = f"""
import importlib.util, sys
import numpy as np, torch
torch.set_num_threads(1)
assert importlib.util.find_spec("madm_utils") is None
from diffusers import DiffusionPipeline, StableDiffusionPipeline
image = np.load("image.npy")
folder = {str(folders["full"])!r}
for name, repo in (("pushed", "me/pushed"), ("full", folder)):
    pipe = DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)
    out = pipe(image, window=64, return_probabilities=True, return_overlay=True)
    np.save(name, out.probabilities[0])
    assert out.overlay[0].size == (90, 50)
    print(pipe.class_names[0], pipe.modality, "madm_utils" in sys.modules)
pipe = StableDiffusionPipeline.from_pretrained({str(base_folder())!r})
pipe.load_lora_weights("me/pushed")
print(sum("lora_B" in name for name, _ in pipe.unet.named_parameters()), "layers")
"""
        printed = run_without_the_package(code, tmp_path, hub)
    with safe_open(folders["lora"] / "pytorch_lora_weights.safetensors", "pt") as file:
        layers = len(file.keys()) // 2
    assert layers > 200 and printed.count("sky depth False") == 2 and f"\n{layers} layers" in printed
    assert "might require" not in printed  # diffusers misses no package
    for name, folder in (("pushed", folders["lora"]), ("full", folders["full"])):
        expected = MADMPipeline.from_pretrained(folder)(pixels, window=64, return_probabilities=True)
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), expected.probabilities[0])


def test_base_model_that_is_gone_is_named(folders, monkeypatch):
    pipe = MADMPipeline.from_pretrained(folders["lora"])
    settings = json.loads((folders["lora"] / "madm_config.json").read_text())
    settings["base_model"]["pretrained_model_name_or_path"] = "/nowhere"
    with pytest.raises(UserError, match=r"needs 'vae' of its base model /nowhere.*vae=AutoencoderKL.from_pretrained"):
        DiffusionSegmentationPipeline(pipe.segmenter, settings=settings)
    whole = DiffusionSegmentationPipeline(
        pipe.segmenter,
        pipe.vae,
        pipe.unet,
        pipe.scheduler,
        pipe.config.settings,
    )
    with pytest.raises(UserError, match="copy or download"):
        whole.save_pretrained("anywhere")
    with pytest.raises(UserError, match="needs `settings`"):
        DiffusionSegmentationPipeline(pipe.segmenter)


def test_lora_of_another_base_is_refused(folders, tmp_path):
    from diffusers import UNet2DConditionModel

    pipe = MADMPipeline.from_pretrained(folders["lora"])
    config = {**pipe.unet.config, "cross_attention_dim": 64}
    settings = json.loads((folders["lora"] / "madm_config.json").read_text())
    pipe.segmenter.register_to_config(_name_or_path=str(folders["lora"] / "segmenter"))
    with pytest.raises(UserError, match="cannot be put into the UNet of the base model"):
        DiffusionSegmentationPipeline(
            pipe.segmenter, pipe.vae, UNet2DConditionModel.from_config(config), pipe.scheduler, settings
        )


@pytest.mark.parametrize(
    "where", [("segmentation_pipeline", "DiffusionSegmentationPipeline"), ("segmenter", "Segmenter")]
)
def test_source_defines_all_it_uses(where):
    """Every name is defined or imported, this package is not, and what is not needed stays behind."""
    source = standalone_source(*where, "A test.")
    check = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", "--quiet", "-"]
    assert not subprocess.run(check, input=source, capture_output=True, text=True).stdout
    assert "madm_utils" not in source.replace("madm_config", "") and "def picture_grid" not in source


def test_one_name_for_two_things_is_refused(monkeypatch):
    modules = {
        "a": "from madm_utils.b import used\ndef helper():\n    pass\ndef main():\n    helper()\n    used()\n",
        "b": "def helper():\n    pass\ndef used():\n    helper()\n",
    }
    monkeypatch.setattr(Path, "read_text", lambda path, **_: modules[path.stem])
    standalone._parse.cache_clear()
    with pytest.raises(ValueError, match="b and a both define helper"):
        standalone_source("a", "main", "A test.")
    standalone._parse.cache_clear()
