"""Exported graphs: the numbers of the PyTorch model, for any batch and size, and files that explain themselves.

The models are of real classes, with as few layers as MADM's features need: tracing costs by the layer.
"""

import functools
import importlib.util
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tiny_model import WIDTHS, base_folder

import export_madm
from madm_utils import export
from madm_utils.base_model import BaseModelReference
from madm_utils.cli import UserError
from madm_utils.modeling_madm import MADMModel
from madm_utils.tasks import TASKS

HAS_ONNX = all(importlib.util.find_spec(name) for name in export.PACKAGES["onnx"])
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="onnx, onnxscript or onnxruntime is not installed")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The tiny base model of the suite with a shorter VAE and UNet."""
    folder = tmp_path_factory.mktemp("base")
    for part in ("scheduler", "text_encoder", "tokenizer"):
        (folder / part).symlink_to(base_folder() / part)
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=[8, 8], layers_per_block=1, norm_num_groups=4, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    ).save_pretrained(folder / "vae")  # fmt: skip
    UNet2DConditionModel(
        block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=32, mid_block_type="UNetMidBlock2D",
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
    ).save_pretrained(folder / "unet")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def model_folder(base, tmp_path_factory) -> Path:
    """A LoRA model whose LoRA, teacher and BatchNorm statistics matter."""
    folder = tmp_path_factory.mktemp("model")
    task = TASKS["synthetic_to_depth"]
    torch.manual_seed(1)
    student, other = (MADMModel.from_base(BaseModelReference(str(base)), task, 64, "lora", **WIDTHS) for _ in "12")
    for name, parameter in student.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    for module in (*student.segmenter.modules(), *other.segmenter.modules()):
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    student.save_pretrained(folder, other.segmenter)
    return folder


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(7))


def logits(folder: Path, weights: str, batch: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return MADMModel.from_pretrained(folder, weights=weights)(batch).logits


def run(folder: Path, output: Path, format: str, *flags: object) -> dict:
    flags = ("--model_path", folder, "--output_dir", output, "--format", format, *flags)
    export_madm.main([str(flag) for flag in flags])
    return json.loads((output / "model.json").read_text())


def onnx_logits(folder: Path, info: dict, batch: torch.Tensor) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / info["file"], providers=["CPUExecutionProvider"])
    return session.run([info["output"]["name"]], {info["input"]["name"]: batch.numpy()})[0]


@needs_onnx
def test_onnx_of_any_batch(model_folder, tmp_path, capsys):
    """A batch that the graph was not traced with; the LoRA is in it."""
    info = run(model_folder, tmp_path / "out", "onnx", "--batch_size", "dynamic")
    assert "checked model.onnx against PyTorch" in capsys.readouterr().out
    batch = images(4, 3, 64, 64)
    expected = logits(model_folder, "student", batch)
    assert np.abs(onnx_logits(tmp_path / "out", info, batch) - expected.numpy()).max() < 1e-3 < expected.std()
    assert info["input"]["shape"] == ["batch", 3, 64, 64] and info["opset"] == 20
    assert info["check"]["shapes"] == [[1, 64, 64], [3, 64, 64]] and info["check"]["largest_difference"] < 1e-3
    assert info["class_names"] == list(TASKS["synthetic_to_depth"].class_names) and len(info["palette"]) == 11


@needs_onnx
@pytest.mark.skipif(
    not os.environ.get("MADM_SLOW_TESTS"), reason="a minute and a half of tracing; set MADM_SLOW_TESTS"
)
def test_onnx_of_any_batch_and_size(model_folder, tmp_path):
    """One file serves sizes and batches it was not traced with; the noise of each size is torch's own draw."""
    info = run(model_folder, tmp_path / "out", "onnx", "--batch_size", "dynamic", "--resolution", "dynamic",
               "--max_resolution", "192x192")  # fmt: skip
    for shape in ((2, 3, 128, 64), (1, 3, 192, 192)):
        batch = images(*shape)
        expected = logits(model_folder, "student", batch)
        assert np.abs(onnx_logits(tmp_path / "out", info, batch) - expected.numpy()).max() < 1e-3 < expected.std()
    with pytest.raises(Exception, match=r"(?i)reshape|shape"):  # more noise than the table holds: an error, no numbers
        onnx_logits(tmp_path / "out", info, images(1, 3, 256, 192))
    assert info["input"]["shape"] == ["batch", 3, "height", "width"] and info["input"]["max_pixels"] == 192 * 192
    assert info["check"]["shapes"] == [[1, 64, 64], [3, 64, 128]]


def test_graph_of_any_size(model_folder):
    """The module behind the graph takes the noise of every size from one table."""
    model = MADMModel.from_pretrained(model_folder)
    graph = export.SegmentationGraph(model, 128 * 128).eval()
    for shape in ((1, 3, 64, 128), (2, 3, 128, 128)):
        batch = images(*shape)
        with torch.no_grad():
            assert (graph(batch) - logits(model_folder, "student", batch)).abs().max() < 1e-5
            with pytest.raises(RuntimeError, match="shape"):
                graph(images(1, 3, 192, 128))


def test_torch_export_of_the_teacher(model_folder, tmp_path):
    """A fixed size and batch; the file is read by torch alone."""
    info = run(model_folder, tmp_path / "out", "torch_export", "--weights", "teacher", "--batch_size", 2)
    assert info["input"]["shape"] == [2, 3, 64, 64] and info["weights"] == "teacher" and "opset" not in info
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    batch = images(2, 3, 64, 64)
    expected = logits(model_folder, "teacher", batch)
    assert (program(batch) - expected).abs().max() < 1e-4
    assert (logits(model_folder, "student", batch) - expected).abs().max() > 0.1


def test_noise_of_small_sizes_begins_that_of_large_ones(model_folder):
    """What the table of a dynamic size rests on."""
    extractor = MADMModel.from_pretrained(model_folder).extractor
    table = extractor.draw_noise(1, 128 * 128).flatten()
    for size in ((32, 32), (32, 64), (96, 32), (128, 128)):
        draw = extractor.draw_noise(*size).flatten()
        assert torch.equal(draw, table[: len(draw)])


def test_half_precision_noise_level_of_published_models(model_folder):
    """sigma at t = 0 is 0.03125 in half precision, 0.02916 otherwise (published code, section 4 of the paper)."""
    model = MADMModel.from_pretrained(model_folder, dtype=torch.float16)
    assert export.SegmentationGraph(model, 64 * 64).noise_rate == pytest.approx(0.02916, abs=1e-5)
    model.extractor.noise_in_latent_dtype = True
    assert export.SegmentationGraph(model, 64 * 64).noise_rate == pytest.approx(0.03125, abs=1e-5)


def test_description_says_what_is_approximate(model_folder):
    model = MADMModel.from_pretrained(model_folder)
    shape = export.ExportShape(1, None, 64 * 64)
    keys = ("head_resolution", "vae_decoder")
    assert [export.description(model, shape, "onnx", 20)[key] for key in keys] == [1, None]
    model.segmenter.register_to_config(head_resolution=2)
    for reference, name in (("/models/taesd", "taesd"), ("user/taesd", "user/taesd")):
        model.vae_decoder = reference
        assert [export.description(model, shape, "onnx", 20)[key] for key in keys] == [2, name]


def test_a_graph_that_differs_is_not_kept(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "write", lambda program, path, format, opset: path.write_bytes(b""))
    monkeypatch.setattr(export, "trace", lambda model, shape: None)
    reference = MADMModel.from_pretrained(model_folder)
    for wrong, message in ((0.01, "up to 0.01 off PyTorch's, more than --tolerance 0.001"), (torch.nan, "up to inf")):
        offset = functools.partial(lambda wrong, batch: reference(batch).logits + wrong, wrong)
        monkeypatch.setattr(export, "load", functools.partial(lambda graph, path, format: graph, offset))
        with pytest.raises(UserError, match=message):
            run(model_folder, tmp_path / "out", "torch_export")
        assert not any(tmp_path.iterdir())


def test_missing_packages(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name.startswith("onnx") else object())
    message = "not installed: onnx, onnxscript, onnxruntime. pip install -r requirements-export.txt"
    with pytest.raises(UserError, match=message):
        run(model_folder, tmp_path / "out", "onnx")
    export.check_packages("torch_export")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--format", "tflite"), "invalid choice: 'tflite'"),
        (("--resolution", "100"), "'100': a side, HEIGHTxWIDTH .multiples of 64., or dynamic"),
        (("--max_resolution", "dynamic"), "--max_resolution is a size"),
        (("--tolerance", "0"), "--tolerance is a positive number"),
        (("--batch_size", "0"), "--batch_size"),
    ],
)
def test_wrong_flags(flags, message, capsys):
    with pytest.raises(SystemExit):
        export_madm.parse_args(["--model_path", "x", "--output_dir", "y", "--format", "onnx", *flags])
    assert re.search(message, capsys.readouterr().err)


def test_folders_that_do_not_fit(model_folder, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").write_text("")
    with pytest.raises(UserError, match="already holds something"):
        run(model_folder, tmp_path / "used", "torch_export")
    with pytest.raises(UserError, match="--modality event: .* holds one model; leave the flag out"):
        run(model_folder, tmp_path / "out", "torch_export", "--modality", "event")
    for name in ("depth", "event"):
        (tmp_path / "run" / name).mkdir(parents=True)
        config = {"format": 2, "task": {"modality": name}}
        (tmp_path / "run" / name / "madm_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="holds models of depth, event; choose one with --modality"):
        run(tmp_path / "run", tmp_path / "out", "torch_export")
    with pytest.raises(UserError, match="is not a trained model"):
        run(tmp_path / "used", tmp_path / "out", "torch_export")
    assert not (tmp_path / "out").exists()
