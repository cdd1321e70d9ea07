"""Converting published checkpoints: every real-size key finds its place, and one message per unfit file.

That the converted numbers are right is proven in `test_reference_parity.py`.
"""

import gzip
import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

import convert_original_madm
from madm_utils import original_checkpoint
from madm_utils.base_model import check_keys
from madm_utils.cli import UserError
from madm_utils.segmenter import Segmenter


@pytest.fixture
def flags(fixtures, tmp_path):
    """Flags of a conversion that would succeed."""
    fixture = fixtures / "madm_depth"
    return {
        "--task": "cityscapes_to_deliver_depth",
        "--checkpoint_path": fixture / "reference_checkpoint.pth",
        "--pretrained_model_name_or_path": fixture / "tiny_sd",
        "--output_dir": tmp_path / "out",
    }


@pytest.fixture
def state(flags):
    return torch.load(flags["--checkpoint_path"], weights_only=True)["model"]


def fails(flags: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        convert_original_madm.main([str(x) for pair in flags.items() for x in pair])
    assert not flags["--output_dir"].is_dir() or flags["--output_dir"].name == "used"
    assert not [p for p in flags["--output_dir"].parent.iterdir() if ".tmp" in p.name]


@pytest.mark.parametrize("name", ["depth", "infrared"])
def test_every_key_of_the_released_files_has_a_place(name, fixtures):
    """Names and shapes of the 1418 published tensors against the real-size modules, on the meta device."""
    lines = gzip.open(fixtures / f"common/real_size_keys_{name}.txt.gz", "rt").read().splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    state = {key: torch.empty(json.loads(shape), device="meta") for key, shape, *_ in rows}
    assert len(state) == 1418
    num_classes = {"depth": 11, "infrared": 9}[name]
    with torch.device("meta"):
        segmenter = Segmenter(num_classes)
        unet = UNet2DConditionModel(
            cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
        )
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        )  # fmt: skip
    extractor = original_checkpoint._EXTRACTOR
    expected = segmenter.state_dict()
    embedding = {"empty_text_embedding": state.pop(f"{extractor}uncond_inputs")}
    for prefixes in (original_checkpoint._STUDENT, original_checkpoint._TEACHER):
        check_keys(expected, original_checkpoint._rename(state, prefixes) | embedding, "segmenter")
    check_keys(unet.state_dict(), original_checkpoint._rename(state, {f"{extractor}unet.": ""}), "unet")
    check_keys(vae.state_dict(), original_checkpoint._rename(state, {f"{extractor}vae.": ""}), "vae")
    rest = [k for k in state if not k.startswith((f"{extractor}text_encoder.", *original_checkpoint._DUPLICATES))]
    assert rest == [f"{extractor}shared_noise"]


def rewritten(flags: dict, state: dict, tmp_path) -> dict:
    torch.save({"model": state, "iteration": 1}, tmp_path / "changed.pth")
    return {**flags, "--checkpoint_path": tmp_path / "changed.pth"}


def test_optimiser_state_and_missing_iteration_are_accepted(flags, state, tmp_path, capsys):
    content = {"model": state, "trainer": {"optimizer": {"state": {0: torch.zeros(3)}}}}
    torch.save(content, tmp_path / "with_trainer.pth")
    flags["--checkpoint_path"] = tmp_path / "with_trainer.pth"
    convert_original_madm.main([str(x) for pair in flags.items() for x in pair])
    assert (flags["--output_dir"] / "unet").is_dir() and "converted" in capsys.readouterr().out


def test_missing_file(flags, tmp_path):
    fails({**flags, "--checkpoint_path": tmp_path / "absent.pth"}, "absent.pth cannot be opened: No such file")
    fails({**flags, "--checkpoint_path": tmp_path}, "cannot be opened: Is a directory")


def test_file_that_is_no_checkpoint(flags, tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    fails({**flags, "--checkpoint_path": tmp_path / "text.pth"}, "cannot be read as plain tensors")
    torch.save({"weights": 1}, tmp_path / "other.pth")
    fails({**flags, "--checkpoint_path": tmp_path / "other.pth"}, "no 'model' entry with tensors")


class Evil:
    def __reduce__(self):
        return print, ("code in a checkpoint ran",)


def test_pickled_code_does_not_run(flags, state, tmp_path, capsys):
    torch.save({"model": state, "trainer": Evil()}, tmp_path / "evil.pth")
    fails({**flags, "--checkpoint_path": tmp_path / "evil.pth"}, "cannot be read as plain tensors")
    assert "ran" not in capsys.readouterr().out


def test_checkpoint_of_another_task(flags):
    fails({**flags, "--task": "cityscapes_to_fmb_infrared"}, "has 11 classes, task cityscapes_to_fmb_infrared has 9")


def test_missing_unknown_and_misshaped_tensors(flags, state, tmp_path):
    key = "sem_seg_head.fuse_layer.bottleneck.bn.bias"
    without = {k: v for k, v in state.items() if not k.endswith("sem_seg_head.fuse_layer.bottleneck.bn.bias")}
    without = {k: v for k, v in without.items() if k != key.replace("head.", "head_sec_modal.")}
    fails(rewritten(flags, without, tmp_path), "1 missing: head.fuse_layer.bottleneck.bn.bias")
    fails(rewritten(flags, {**state, "stranger": torch.zeros(1)}, tmp_path), "unknown tensors .'stranger'")
    key = "backbone.feature_extractor.ldm_extractor.unet.conv_in.bias"
    fails(rewritten(flags, {**state, key: torch.zeros(3)}, tmp_path), r"\(unet\): .*1 mis-shaped: conv_in.bias \(3,\)")
    no_projection = {k: v for k, v in state.items() if "feature_projections.0" not in k}
    fails(rewritten(flags, no_projection, tmp_path), "lacks projections.0.conv3.weight")


def test_duplicates_that_differ(flags, state, tmp_path):
    key = "sem_seg_head_sec_modal.conv_seg.bias"
    fails(rewritten(flags, {**state, key: state[key] + 1}, tmp_path), "should be the same tensor and are not")


def test_another_noise(flags, state, tmp_path):
    key = "backbone.feature_extractor.ldm_extractor.shared_noise"
    fails(rewritten(flags, {**state, key: state[key] + 1}, tmp_path), "another fixed noise")


def test_another_base_model(flags, state, tmp_path):
    key = "backbone.feature_extractor.ldm_extractor.vae.decoder.conv_in.bias"
    fails(rewritten(flags, {**state, key: state[key] + 1}, tmp_path), "another base model .*1 VAE tensors differ")
    shutil.copytree(flags["--pretrained_model_name_or_path"], tmp_path / "sd")
    shutil.rmtree(tmp_path / "sd/vae")
    fails({**flags, "--pretrained_model_name_or_path": tmp_path / "sd"}, "lacks vae")


def test_output_dir_in_use(flags, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").write_text("")
    fails({**flags, "--output_dir": tmp_path / "used"}, "already holds something")
