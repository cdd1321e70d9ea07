"""`MADMPipeline` on every kind of image, against the model called by hand."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image
from tiny_model import RESOLUTION, write_model

from madm_utils import MADMPipeline
from madm_utils.cli import UserError
from madm_utils.images import read_image
from madm_utils.inference import to_network_input
from madm_utils.modeling_madm import MADMModel
from madm_utils.tasks import TASKS

COMMON = Path(__file__).parent / "fixtures" / "common" / "dataset_case"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipe(folder):
    pipe = MADMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_pixels(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def test_label_map_equals_the_model_called_by_hand(pipe, folder):
    pixels = random_pixels(50, 90, 3)
    small = np.asarray(Image.fromarray(pixels).resize((RESOLUTION, RESOLUTION), Image.Resampling.BILINEAR))
    images = torch.from_numpy(small.transpose(2, 0, 1).copy())[None].float() / 255
    with torch.no_grad():
        logits = MADMModel.from_pretrained(folder)(images).logits
    logits = torch.nn.functional.interpolate(logits, size=(50, 90), mode="bilinear", align_corners=False)[0]

    output = pipe(pixels, return_confidence=True)
    assert output.label_maps[0].dtype == np.uint8 and output.label_maps[0].shape == (50, 90)
    np.testing.assert_array_equal(output.label_maps[0], logits.argmax(0).numpy())
    assert len(np.unique(output.label_maps[0])) > 1
    np.testing.assert_allclose(output.confidence[0], logits.softmax(0).max(0).values.numpy(), atol=1e-6)
    output = pipe(pixels)
    assert (output.confidence, output.probabilities, output.color, output.overlay) == (None,) * 4


def test_everything_that_can_be_asked_for(pipe):
    pixels = random_pixels(50, 90, 3)
    flags = {f"return_{name}": True for name in ("confidence", "probabilities", "color", "overlay")}
    output = pipe([pixels, pixels[:30]], **flags, overlay_alpha=0.25)
    label_map, probabilities = output.label_maps[1], output.probabilities[1]
    assert probabilities.shape == (11, 30, 90) and probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(0), 1, atol=1e-5)
    np.testing.assert_array_equal(probabilities.argmax(0), label_map)
    np.testing.assert_array_equal(probabilities.max(0), output.confidence[1])
    color = np.array(pipe.palette, np.uint8)[label_map]
    np.testing.assert_array_equal(np.asarray(output.color[1]), color)
    np.testing.assert_allclose(np.asarray(output.overlay[1]), 0.75 * pixels[:30] + 0.25 * color, atol=0.51)
    label_maps, colors = pipe(pixels, return_color=True, return_dict=False)
    np.testing.assert_array_equal(label_maps[0], output.label_maps[0])
    assert colors[0].size == (90, 50)


def test_tensors_and_batches_of_arrays_agree(pipe):
    batch = random_pixels(2, 40, 70, 3)
    expected = pipe(list(batch)).label_maps
    for images in (batch, torch.from_numpy(batch).permute(0, 3, 1, 2), batch / np.float32(255)):
        np.testing.assert_array_equal(pipe(images).label_maps, expected)


def test_windows_augmentation_and_ensembles_change_the_scores(pipe, folder):
    """Each reaches the engine, whose numbers `test_inference.py` checks."""
    pixels = random_pixels(64, 90, 3)
    teacher = MADMPipeline.from_pretrained(folder, weights="teacher")

    def probabilities(**options):
        return pipe(pixels, return_probabilities=True, **options).probabilities[0]

    plain = probabilities()
    assert np.abs(probabilities(window=64) - plain).max() > 1e-3
    assert np.abs(probabilities(tta=("flip",)) - plain).max() > 1e-3
    assert np.abs(probabilities(window=64, stride=16) - probabilities(window=64)).max() > 1e-3
    mean = (plain + teacher(pixels, return_probabilities=True).probabilities[0]) / 2
    np.testing.assert_allclose(probabilities(ensemble=[teacher]), mean, atol=1e-6)


def test_ensembles_of_other_classes_are_refused(pipe, tmp_path):
    other = MADMPipeline.from_pretrained(write_model(tmp_path, "synthetic_to_infrared"))
    with pytest.raises(UserError, match="equal classes and resolutions: sky, building, fence"):
        pipe(random_pixels(9, 9), ensemble=[other])
    with pytest.raises(UserError, match="overlay_alpha is a share from 0 to 1, got 2"):
        pipe(random_pixels(9, 9), overlay_alpha=2)


def test_memory_switches_keep_the_result(folder):
    pixels = random_pixels(60, 60, 3)
    pipe = MADMPipeline.from_pretrained(folder)
    expected = pipe(pixels, return_probabilities=True).probabilities[0]
    pipe.enable_attention_slicing(1)
    pipe.vae.enable_slicing()
    np.testing.assert_allclose(pipe(pixels, return_probabilities=True).probabilities[0], expected, atol=1e-5)
    pipe.enable_model_cpu_offload(device="cpu")  # the same hooks as with a GPU
    np.testing.assert_allclose(pipe(pixels, return_probabilities=True).probabilities[0], expected, atol=1e-5)


def test_saved_pipeline_is_the_same_model(pipe, folder, tmp_path):
    pipe.save_pretrained(tmp_path / "copy")
    for name in ("madm_config.json", "model_index.json", "pipeline.py"):
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes()
    pixels = random_pixels(50, 50, 3)
    again = MADMPipeline.from_pretrained(tmp_path / "copy")
    np.testing.assert_array_equal(again(pixels).label_maps[0], pipe(pixels).label_maps[0])
    assert repr(pipe).startswith("MADMPipeline")
    assert set(pipe.components) == {"segmenter", "vae", "unet", "scheduler", "vae_decoder"}
    with pytest.raises(UserError, match="copy already holds something"):
        pipe.save_pretrained(tmp_path / "copy")
    for options in ({"safe_serialization": False}, {"variant": "fp16"}):
        with pytest.raises(UserError, match="plain safetensors"):
            pipe.save_pretrained(tmp_path / "other", **options)
    assert not (tmp_path / "other").exists()


def test_one_or_many_paths_arrays_and_pictures_agree(pipe, tmp_path):
    pixels = random_pixels(40, 70, 3)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "image.png")
    alone = pipe(image).label_maps
    assert len(alone) == 1
    for label_map in pipe([pixels, tmp_path / "image.png", str(tmp_path / "image.png")]).label_maps:
        np.testing.assert_array_equal(label_map, alone[0])
    assert pipe([]).label_maps == []


def test_an_image_is_segmented_alike_in_every_company(pipe):
    """Alone, or in batches of 4 with others of other sizes: the same probabilities to the last bit."""
    images = [random_pixels(20 + 30 * k, 100 - 10 * k, 3) for k in range(5)]
    together = pipe(images, batch_size=4, return_probabilities=True)
    for k, image in enumerate(images):
        alone = pipe(image, return_probabilities=True)
        np.testing.assert_array_equal(together.label_maps[k], alone.label_maps[0])
        np.testing.assert_array_equal(together.probabilities[k], alone.probabilities[0])


@pytest.mark.parametrize("kind", ["depth", "infrared", "event"])
def test_preprocessing_equals_published(kind):
    images = to_network_input([read_image(COMMON / kind / "a/b/c/img.png")], 512)
    golden = np.load(COMMON / kind / "golden.npz")["image"]
    assert images.is_contiguous() and images.dtype == torch.float32
    assert np.abs(255 * images[0].numpy() - golden).max() <= 1 + 1e-4


def test_classes_weights_and_dtype(pipe, folder):
    task = TASKS["synthetic_to_depth"]
    assert (pipe.class_names, pipe.palette) == (task.class_names, task.palette)
    pixels = random_pixels(64, 64, 3)
    student = pipe(pixels).label_maps[0]
    teacher = MADMPipeline.from_pretrained(folder, weights="teacher", device="cpu")
    assert (teacher(pixels).label_maps[0] != student).any()
    half = MADMPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert (half(pixels).label_maps[0] == student).mean() > 0.5


def test_lora_folder_predicts_too(tmp_path):
    pipe = MADMPipeline.from_pretrained(write_model(tmp_path, unet_tuning="lora"))
    assert pipe(random_pixels(30, 40, 3)).label_maps[0].shape == (30, 40)


def test_adapters_of_one_modality_and_foreign_segmenters_are_refused(folder, tmp_path):
    for name in ("first", "second"):
        shutil.copytree(folder, tmp_path / "runs" / name)
    with pytest.raises(UserError, match="runs holds several models for depth: first, second; give the folder of one"):
        MADMPipeline.from_pretrained(tmp_path / "runs")
    other = write_model(tmp_path / "infrared", "synthetic_to_infrared")
    shutil.copytree(other / "segmenter", tmp_path / "runs/first/segmenter", dirs_exist_ok=True)
    with pytest.raises(UserError, match="its segmenter knows 9 classes, its task has 11 .*part of another model"):
        MADMPipeline.from_pretrained(tmp_path / "runs/first")


def test_reduced_precision_keeps_the_fixed_noise(pipe, folder):
    half = MADMPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(half.extractor.shared_noise, pipe.extractor.shared_noise)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"tta": "flip"}, r"a list of names, e\.g\. \['flip', 'scales'\], got 'flip'"),
        ({"ensemble": ["a/model"]}, "list of loaded pipelines, got 'a/model'"),
    ],
)
def test_wrong_options_are_named(pipe, options, message):
    with pytest.raises(UserError, match=message):
        pipe(random_pixels(9, 9), **options)


def test_push_to_hub_brings_a_card_and_removes_an_earlier_model(pipe, monkeypatch):
    """What the upload is told to send; the transfer itself is that of `test_hub.py`."""
    sent = {}

    def upload_folder(self, repo_id, folder_path, commit_message, delete_patterns):
        files = [p.relative_to(folder_path).as_posix() for p in Path(folder_path).rglob("*.*")]
        sent.update(files=set(files), card=Path(folder_path, "README.md").read_text(), delete=delete_patterns)

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=f"me/{repo_id}"))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    assert pipe.push_to_hub("mine").endswith("/me/mine")
    assert {"pipeline.py", "model_index.json", "segmenter/segmenter.py", "madm_config.json"} <= sent["files"]
    assert 'MADMPipeline.from_pretrained("me/mine")' in sent["card"] and "trust_remote_code=True" in sent["card"]
    assert (
        "More Information" not in sent["card"] and "## Licences" in sent["card"] and "## Training" not in sent["card"]
    )
    assert "teacher/*" in sent["delete"]
