"""Converting published checkpoints: every real-size key finds its place, and one message per unfit file.

That the converted numbers are right is proven in `test_reference_parity.py`.
"""

import argparse
import collections
import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tiny_model import WIDTHS
from transformers import CLIPTextConfig, CLIPTextModel

import convert_original_madm
from madm_utils import original_checkpoint, original_writer
from madm_utils.base_model import BaseModelReference, check_keys, load_scheduler, load_vae, read_safetensors
from madm_utils.cli import UserError
from madm_utils.feature_extractor import DiffusionFeatureExtractor
from madm_utils.modeling_madm import MADMModel
from madm_utils.segmenter import Segmenter
from madm_utils.tasks import TASKS

ROOT = Path(__file__).parent.parent


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


def convert(flags: dict, *more: object) -> None:
    convert_original_madm.main([str(x) for x in (*(x for pair in flags.items() for x in pair), *more)])


def fails(flags: dict, message: str, *more: object) -> None:
    with pytest.raises(UserError, match=message):
        convert(flags, *more)
    assert not flags["--output_dir"].is_dir() or flags["--output_dir"].name == "used"
    assert not [p for p in flags["--output_dir"].parent.iterdir() if ".tmp" in p.name]


@pytest.mark.parametrize("name", ["depth", "infrared", "event"])
def test_every_key_of_the_released_files_has_a_place(name, fixtures):
    """Names and shapes of the 1418 published tensors against the real-size modules, on the meta device, both ways."""
    # The list of the event files is that of the depth files, line by line.
    path = fixtures / f"common/real_size_keys_{'depth' if name == 'event' else name}.txt.gz"
    rows = [line.split("\t") for line in gzip.open(path, "rt").read().splitlines() if line and line[0] != "#"]
    published = {key: (json.loads(shape), dtype) for key, shape, dtype, *_ in rows}
    state = {key: torch.empty(shape, device="meta") for key, (shape, _) in published.items()}
    assert len(state) == 1418
    [task] = [t for t in TASKS.values() if t.modality == name and t.source == "cityscapes"]
    with torch.device("meta"):
        segmenter = Segmenter(task.num_classes)
        unet = UNet2DConditionModel(
            cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
        )
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        )  # fmt: skip
        text_encoder = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
        noise = torch.empty(1, 4, 64, 64)
    text_state = original_checkpoint.published_text_names(text_encoder.state_dict())
    parts = SimpleNamespace(vae=vae, unet=unet)
    back = original_writer.published_state(parts, segmenter, segmenter, text_state, noise)
    written = {key: (list(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for key, tensor in back.items()}
    assert list(written) == list(published) and written == published

    extractor = original_checkpoint._EXTRACTOR
    expected = segmenter.state_dict()
    embedding = {"empty_text_embedding": state.pop(f"{extractor}uncond_inputs")}
    for prefixes in (original_checkpoint._STUDENT, original_checkpoint._TEACHER):
        check_keys(expected, original_checkpoint._rename(state, prefixes) | embedding, "segmenter")
    check_keys(unet.state_dict(), original_checkpoint._rename(state, {f"{extractor}unet.": ""}), "unet")
    check_keys(vae.state_dict(), original_checkpoint._rename(state, {f"{extractor}vae.": ""}), "vae")
    check_keys(text_state, original_checkpoint._rename(state, {f"{extractor}text_encoder.": ""}), "text encoder")
    rest = [k for k in state if not k.startswith(tuple(original_checkpoint._DUPLICATES))]
    assert rest == [f"{extractor}shared_noise"]


def rewritten(flags: dict, state: dict, tmp_path) -> dict:
    torch.save({"model": state, "iteration": 1}, tmp_path / "changed.pth")
    return {**flags, "--checkpoint_path": tmp_path / "changed.pth"}


def test_everything_the_published_trainer_writes_is_accepted(flags, state, tmp_path, capsys):
    """Contents of a periodic checkpoint in the middle of training: optimiser, gradient scaler, learning rate."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([{"params": [parameter], "weight_decay": 0.05}], lr=5e-6)
    parameter.grad = torch.ones(3)
    optimizer.step()
    trainer = {
        "iteration": 999,
        "hooks": {"LRScheduler": {"base_lrs": [5e-6], "last_epoch": 999}},
        "optimizer": optimizer.state_dict(),
        "grad_scaler": {"scale": 65536.0, "growth_factor": 2.0, "growth_interval": 2000, "_growth_tracker": 7},
    }
    content = {"model": collections.OrderedDict(state), "trainer": trainer}
    torch.save(content, tmp_path / "with_trainer.pth")
    convert({**flags, "--checkpoint_path": tmp_path / "with_trainer.pth"})
    assert "iteration unknown, 1254 tensors" in capsys.readouterr().out
    assert list(read_safetensors(flags["--output_dir"] / original_checkpoint.ORIGINAL_NAME)) == ["shared_noise"]
    # the format of torch before 1.6, which cannot be mapped
    torch.save({**content, "iteration": 5}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    original_checkpoint.check_file(tmp_path / "old.pth", len)
    found, iteration = original_checkpoint.read_checkpoint(tmp_path / "old.pth")
    assert iteration == 5 and all(torch.equal(found[key], value) for key, value in state.items())


def test_missing_file(flags, tmp_path):
    fails({**flags, "--checkpoint_path": tmp_path / "absent.pth"}, "absent.pth cannot be opened: No such file")
    fails({**flags, "--checkpoint_path": tmp_path}, "cannot be opened: Is a directory")


def test_file_that_is_no_checkpoint(flags, tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    fails({**flags, "--checkpoint_path": tmp_path / "text.pth"}, "cannot be read as plain tensors")
    torch.save({"weights": 1}, tmp_path / "other.pth")
    fails({**flags, "--checkpoint_path": tmp_path / "other.pth"}, "no 'model' entry with tensors")


def test_damaged_files(flags, tmp_path):
    """Empty, cut off, and with one wrong byte in a weight, which torch.load would not notice."""
    content = flags["--checkpoint_path"].read_bytes()
    flags["--checkpoint_path"] = tmp_path / "damaged.pth"
    flags["--checkpoint_path"].write_bytes(b"")
    fails(flags, r"damaged.pth is empty \(0 bytes\); download it again")
    flags["--checkpoint_path"].write_bytes(content[:-2000])
    fails(flags, "ends too early, as after an interrupted download")
    middle = len(content) // 2
    flags["--checkpoint_path"].write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    torch.load(flags["--checkpoint_path"], weights_only=True, mmap=True)
    fails(flags, r"is damaged: \S+/data/\d+ differs from its checksum; download it again")


@pytest.mark.parametrize(
    ("value", "name"), [(np.float64(1), "numpy"), (argparse.Namespace(lr=1), "argparse.Namespace")]
)
def test_anything_pickled_beyond_tensors_is_refused(flags, value, name, tmp_path):
    torch.save({"model": {"a": torch.ones(1)}, "trainer": {"lr": value}}, tmp_path / "more.pth")
    message = rf"holds a pickled {name}\S*, and unpickling can run code: .* torch.save\(\{{'model': c\['model'\]"
    fails({**flags, "--checkpoint_path": tmp_path / "more.pth"}, message)


class Evil:
    def __reduce__(self):
        return print, ("code in a checkpoint ran",)


def test_pickled_code_does_not_run(flags, state, tmp_path, capsys):
    torch.save({"model": state, "trainer": Evil()}, tmp_path / "evil.pth")
    fails(
        {**flags, "--checkpoint_path": tmp_path / "evil.pth"}, "holds a pickled .*print, and unpickling can run code"
    )
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


def assert_same_file(path: Path, other: Path) -> None:
    found, expected = (torch.load(p, weights_only=True) for p in (path, other))
    assert list(found) == list(expected) and found["iteration"] == expected["iteration"]
    found, expected = found["model"], expected["model"]
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key
    assert found["sem_seg_head.conv_seg.bias"].data_ptr() == found["sem_seg_head_sec_modal.conv_seg.bias"].data_ptr()


def test_verified_conversion_and_the_way_back(flags, fixtures, tmp_path, capsys):
    """Against logits of the published code; .pth -> folder -> .pth -> folder keeps every bit, both ways."""
    golden = np.load(fixtures / "madm_depth/eval_golden.npz")["logits_s4_0"]
    image = np.load(fixtures / "madm_depth/inputs.npz")["target"][0]
    torch.save({"image": torch.from_numpy(image), "logits": torch.from_numpy(golden)}, tmp_path / "golden.pt")
    convert(flags, "--verify", "--golden", tmp_path / "golden.pt")
    out = capsys.readouterr().out
    assert "iteration 9999, 1254 tensors" in out and "gives back all 1254 tensors of the file, bit by bit" in out
    assert "(largest difference 0)" in out and "logits of the published code on the image of --golden" in out
    folder, again = flags["--output_dir"], tmp_path / "again.pth"
    convert_original_madm.main(["--model_path", str(folder), "--to_original", str(again), "--verify"])
    out = capsys.readouterr().out
    assert "verified: all 1254 tensors read back" in out and "there is no optimiser state" in out
    assert_same_file(again, flags["--checkpoint_path"])
    second = tmp_path / "second"
    convert({**flags, "--checkpoint_path": again, "--output_dir": second})
    for file in folder.rglob("*.safetensors"):
        assert file.read_bytes() == (second / file.relative_to(folder)).read_bytes(), file
    with pytest.raises(UserError, match="again.pth exists; give another name or delete it"):
        convert_original_madm.main(["--model_path", str(folder), "--to_original", str(again)])


def test_a_file_with_another_text_encoder_and_other_noise_bits(flags, state, tmp_path, capsys):
    """Neither is needed here nor drawn or loaded with the same bits, so both are kept for the way back."""
    prefix = "backbone.feature_extractor.ldm_extractor."
    changed = dict(state)
    for key in (f"{prefix}text_encoder.text_model.final_layer_norm.bias", f"{prefix}shared_noise"):
        changed[key] = state[key] + 1e-6
    torch.save({"model": changed, "iteration": 3}, tmp_path / "changed.pth")
    convert({**flags, "--checkpoint_path": tmp_path / "changed.pth"})
    assert "note: its text encoder is not that of" in capsys.readouterr().out
    back = original_writer.published_checkpoint(flags["--output_dir"])
    assert back.iteration == 3 and all(torch.equal(back.state[key], value) for key, value in changed.items())


@pytest.fixture
def base(flags, tmp_path) -> BaseModelReference:
    """The fixture's base model, which comes without weights of a UNet, with some."""
    shutil.copytree(flags["--pretrained_model_name_or_path"], tmp_path / "base")
    config = UNet2DConditionModel.load_config(tmp_path / "base/unet")
    UNet2DConditionModel.from_config(config).save_pretrained(tmp_path / "base/unet")
    return BaseModelReference(str(tmp_path / "base"))


def test_lora_is_merged_for_the_published_code(base, tmp_path, capsys):
    """The file converted back gives the logits of the LoRA model; what the format cannot hold is said."""
    torch.manual_seed(0)
    model = MADMModel.from_base(base, TASKS["cityscapes_to_deliver_depth"], 512, "lora", **WIDTHS).eval()
    for name, parameter in model.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "lora")
    target = tmp_path / "new" / "lora.pth"
    convert_original_madm.main(["--model_path", str(tmp_path / "lora"), "--to_original", str(target)])
    out = capsys.readouterr().out
    for remark in ("LoRA was merged into the UNet", "no teacher", "no 'iteration'", "rounds the noise level"):
        assert remark in out
    state, iteration = original_checkpoint.read_checkpoint(target)
    back = original_checkpoint.convert(state, model.task, base, target)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(image).logits
        assert iteration is None and (back.model(image).logits - expected).abs().max() < 1e-4
        model.unet.disable_adapters()
        assert (model(image).logits - expected).abs().max() > 1e-2


def test_folders_that_the_published_code_cannot_use(base, tmp_path):
    model = MADMModel.from_base(base, TASKS["cityscapes_to_deliver_depth"], 64, **WIDTHS)
    model.save_pretrained(tmp_path / "run" / "depth")
    (tmp_path / "run" / "event").mkdir()
    config = (tmp_path / "run/depth/madm_config.json").read_text()
    (tmp_path / "run/event/madm_config.json").write_text(config.replace('"modality": "depth"', '"modality": "event"'))
    for folder, message in (
        (tmp_path / "run", "holds models of depth, event; give one of them"),
        (tmp_path / "run/depth", "trained at 64x64 pixels, .* runs on latents of 64 only"),
        (tmp_path / "run/event", "holds no|is missing"),
        (tmp_path, "is not a trained model"),
    ):
        with pytest.raises(UserError, match=message):
            convert_original_madm.main(["--model_path", str(folder), "--to_original", str(tmp_path / "x.pth")])
    assert not (tmp_path / "x.pth").exists()


def test_a_folder_that_differs_is_not_kept(flags, tmp_path, monkeypatch):
    save = original_checkpoint.save_converted

    def damage(converted, folder, iteration):
        with torch.no_grad():
            converted.teacher.head.conv_seg.bias[0] += 1
        save(converted, folder, iteration)
        converted.teacher.head.conv_seg.bias[0] -= 1

    monkeypatch.setattr(original_checkpoint, "save_converted", torch.no_grad()(damage))
    fails(flags, r"verification failed: 1 tensors .*\(ema_sem_seg_head.conv_seg.bias\); nothing was kept", "--verify")


def test_golden_files_that_do_not_fit(flags, state, tmp_path):
    path = tmp_path / "golden.pt"
    fails(flags, "golden.pt cannot be read", "--verify", "--golden", path)
    image, logits = torch.zeros(3, 64, 64, dtype=torch.uint8), torch.zeros(11, 64, 64)
    for content, message in (
        ({"image": image}, "cannot be read .'logits'.; expected"),
        ({"image": image / 1.0, "logits": logits}, "image torch.float32"),
        ({"image": image[:, :63], "logits": logits}, "H and W multiples of 64"),
    ):
        torch.save(content, path)
        fails(flags, message, "--verify", "--golden", path)
    base = BaseModelReference(str(flags["--pretrained_model_name_or_path"]))
    model = original_checkpoint.convert(state, TASKS["cityscapes_to_deliver_depth"], base, path).model
    with pytest.raises(UserError, match=r"gives logits \(11, 64, 64\), the file holds \(9,"):
        original_writer._compare_with_golden(model, image, logits[:9])
    with torch.no_grad():
        right = model(image[None].float()).logits[0]
    assert "100.00 % of the pixels" in original_writer._compare_with_golden(model, image, right[:, ::4, ::4])
    right[0] += 3e-3  # just beyond the tolerance
    with pytest.raises(UserError, match="up to 0.003 off those of the published code .tolerance 0.002"):
        original_writer._compare_with_golden(model, image, right)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "missing --checkpoint_path, --pretrained_model_name_or_path, --output_dir; or give --model_path"),
        (["--model_path", "m", "--to_original", "x", "--task", "t"], "takes --model_path DIR, not --task"),
        (["--to_original", "x"], "--to_original FILE takes --model_path DIR"),
    ],
)
def test_flags_of_one_direction(argv, message, capsys):
    with pytest.raises(SystemExit):
        convert_original_madm.parse_args(argv)
    assert message in capsys.readouterr().err


MEASURE = """
import sys
import transformers
from transformers import CLIPTextModel
import convert_original_madm
from madm_utils import original_writer

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
convert_original_madm.main(sys.argv[1:])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_is_one_copy_of_the_file(flags, tmp_path):
    """A UNet of 61 M parameters, as most of a released file is UNet: at most 1.2 times its bytes, all included."""
    tiny = flags["--pretrained_model_name_or_path"]
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    config = json.loads((tiny / "unet/config.json").read_text()) | {"block_out_channels": [64, 256, 320, 320]}
    (base / "unet/config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    unet.to_empty(device="cpu")
    for parameter in unet.parameters():
        parameter.data.zero_()
    segmenter = Segmenter(11, (3, 64, 256, 320), (32, 64, 64, 32), 32, 16, 16, prompt_dim=32, time_dim=256)
    reference = BaseModelReference(str(base))
    extractor = DiffusionFeatureExtractor(load_vae(reference), unet, load_scheduler(reference), 64)
    text_encoder = original_checkpoint.text_encoder_state(reference)
    noise = extractor.shared_noise
    state = original_writer.published_state(extractor, segmenter, segmenter, text_encoder, noise)
    size = sum(tensor.nbytes for tensor in state.values())
    flags["--checkpoint_path"] = tmp_path / "large.pth"
    torch.save({"model": state, "iteration": 0}, flags["--checkpoint_path"])
    del unet, extractor, state
    flags["--pretrained_model_name_or_path"] = base
    argv = [str(x) for pair in flags.items() for x in pair]
    done = subprocess.run([sys.executable, "-c", MEASURE, *argv], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    copies = int(done.stdout.splitlines()[-1]) / size
    assert size > 150e6 and copies <= 1.2, f"{copies:.2f} copies of {size / 1e6:.0f} MB"
