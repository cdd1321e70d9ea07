"""`predict_madm.py` on files and folders, good and bad."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image
from tiny_model import write_model

import predict_madm
from madm_utils import MADMPipeline
from madm_utils.cli import UserError
from madm_utils.tasks import TASKS
from madm_utils.visualization import colorize, overlay

SCRIPT = Path(predict_madm.__file__)
TASK = TASKS["synthetic_to_depth"]
KINDS = ("label", "color", "overlay")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def photos(tmp_path):
    """Five good images in three folders, equal stems included; one text file."""
    random = np.random.default_rng(0)
    images = {
        "a.png": random.integers(0, 256, (40, 70, 3), np.uint8),
        "night/a.PNG": random.integers(0, 256, (70, 40, 4), np.uint8),
        "night/late/b.jpg": random.integers(0, 256, (33, 33, 3), np.uint8),
        "night/late/depth.tif": random.integers(0, 65536, (20, 90), np.uint16),
        "c.webp": random.integers(0, 256, (64, 64, 3), np.uint8),
    }
    for name, pixels in images.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    return tmp_path / "photos"


def predict(model, source, out, *more) -> int:
    return predict_madm.main([str(a) for a in ("--model_path", model, "--input", source, "--output_dir", out, *more)])


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def written(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_folder_is_mirrored(model, photos, tmp_path):
    out = tmp_path / "out"
    assert predict(model, photos, out, "--batch_size", 2) == 0
    stems = ("a", "night/a", "night/late/b", "night/late/depth", "c")
    assert written(out) == {f"{stem}_{kind}.png" for stem in stems for kind in KINDS} | {"legend.json"}
    for stem, size in zip(stems, [(40, 70), (70, 40), (33, 33), (20, 90), (64, 64)], strict=True):
        label = read(out / f"{stem}_label.png")
        assert label.dtype == np.uint8 and label.shape == size and label.max() < TASK.num_classes
        np.testing.assert_array_equal(read(out / f"{stem}_color.png"), colorize(label, TASK.palette))
    legend = json.loads((out / "legend.json").read_text())
    assert legend["5"] == {"name": "road", "color": [128, 64, 128]} and len(legend) == TASK.num_classes


def test_single_file_equals_the_pipeline(model, photos, tmp_path):
    file = photos / "night" / "a.PNG"
    assert predict(model, file, tmp_path / "out", "--overlay_alpha", 0.25) == 0
    assert written(tmp_path / "out") == {*(f"a_{kind}.png" for kind in KINDS), "legend.json"}
    label = MADMPipeline.from_pretrained(model)(file).label_maps[0]
    np.testing.assert_array_equal(read(tmp_path / "out" / "a_label.png"), label)
    blend = overlay(read(file)[..., :3], colorize(label, TASK.palette), 0.25)
    np.testing.assert_array_equal(read(tmp_path / "out" / "a_overlay.png"), blend)


def test_weights_and_precision_are_used(model, photos, tmp_path):
    labels = []
    for k, more in enumerate(((), ("--weights", "teacher"), ("--mixed_precision", "bf16"))):
        AcceleratorState._reset_state(reset_partial_state=True)
        predict(model, photos / "c.webp", tmp_path / str(k), *more)
        labels.append(read(tmp_path / str(k) / "c_label.png"))
    assert (labels[0] != labels[1]).any()
    assert 0 < (labels[0] != labels[2]).mean() < 0.5


def test_unreadable_images_are_reported_and_the_others_done(model, photos, tmp_path):
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:300])
    (photos / "night" / "empty.jpg").touch()
    command = ["--model_path", model, "--input", photos, "--output_dir", tmp_path / "out", "--batch_size", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # tiny tensors, shared machine
    done = subprocess.run([sys.executable, SCRIPT, *command], capture_output=True, text=True, env=env)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "5 of 7 images predicted" in done.stdout
    summary = done.stderr[done.stderr.index("2 failed:") :]
    assert "broken.png: cannot be read" in summary and "empty.jpg: cannot be read" in summary
    assert len(written(tmp_path / "out")) == 5 * 3 + 1


def test_own_predictions_are_no_inputs(model, photos):
    out = photos / "predictions"
    assert predict(model, photos, out) == 0
    first = written(out)
    assert predict(model, photos, out) == 0
    assert written(out) == first


def test_equal_names_in_one_folder_are_refused(model, photos, tmp_path):
    Image.new("RGB", (8, 8)).save(photos / "a.jpeg")
    with pytest.raises(UserError, match=r"a\.jpeg, .*a\.png differ in their ending only"):
        predict(model, photos, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_folders_are_named_and_nothing_is_written(model, photos, tmp_path):
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    cases = [
        (model, tmp_path / "nowhere", out, r"--input .*nowhere: no such file or folder"),
        (model, empty, out, r"empty holds no images; looked for \.png"),
        (model, photos, photos, "is the input folder"),
        (model, photos, photos / "notes.txt", "notes.txt is a file; give a folder"),
        (empty, photos, out, "empty is not a trained model"),
        (tmp_path / "nowhere", photos, out, "nowhere: no such folder"),
    ]
    for folder, source, target, message in cases:
        with pytest.raises(UserError, match=message):
            predict(folder, source, target)
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--batch_size", 0), "--batch_size: expected a positive number, got 0"),
        (("--overlay_alpha", 1.5), "--overlay_alpha: expected a number from 0 to 1, got 1.5"),
    ],
)
def test_impossible_flags_are_named(capsys, more, message):
    with pytest.raises(SystemExit) as stopped:
        predict("m", "i", "o", *more)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(model, photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "night").write_text("a file where a folder is needed")
    with pytest.raises(UserError, match="cannot write to .*night"):
        predict(model, photos, tmp_path / "out")
