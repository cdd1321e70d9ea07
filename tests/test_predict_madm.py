"""`predict_madm.py` on files and folders, good and bad, local and elsewhere, alone and in company."""

import errno
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import fsspec
import huggingface_hub
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from fsspec.implementations.memory import MemoryFileSystem
from hub_server import WRITE_TOKEN, HubServer, Repo
from PIL import Image
from tiny_model import write_model
from torch._dynamo.exc import TorchDynamoException

import predict_madm
from madm_utils import MADMPipeline, prediction_files, prediction_streams, storage
from madm_utils.cli import UserError
from madm_utils.compilation import CompileError, _explained
from madm_utils.inference import InferenceSettings
from madm_utils.prediction_files import Job, Picture
from madm_utils.tasks import TASKS
from madm_utils.visualization import colorize, overlay

TASK = TASKS["synthetic_to_depth"]
KINDS = ("label", "color", "overlay")
NOTES = {"legend.json", "summary.json"}
STEMS = ("a", "night/a", "night/late/b", "night/late/depth", "c")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", autouse=True)
def load_once():
    """Loading takes longer than five small images do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MADMPipeline, "from_pretrained", functools.cache(MADMPipeline.from_pretrained))
        yield


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


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


@pytest.fixture
def two_photos(photos, tmp_path):
    folder = tmp_path / "two"
    (folder / "sub").mkdir(parents=True)
    shutil.copy(photos / "a.png", folder)
    shutil.copy(photos / "c.webp", folder / "sub" / "c.webp")
    return folder


def predict(model, source, out, *more) -> int:
    models = model if isinstance(model, list) else [model]
    flags = ("--model_path", *models, "--input", source, "--output_dir", out, *more)
    code = predict_madm.main([str(flag) for flag in flags])
    AcceleratorState._reset_state(reset_partial_state=True)
    return code


def second_process(flags, environment, log) -> None:
    os.environ.update(environment)
    sys.stdout = sys.stderr = open(log, "w")
    sys.exit(predict_madm.main([str(flag) for flag in flags]))


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def written(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def pictures(folder: Path) -> dict[str, bytes]:
    """Everything in the folder but the summary, which knows how it was launched."""
    return {name: (folder / name).read_bytes() for name in written(folder) - {"summary.json"}}


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


# --- what is written -------------------------------------------------------------------------------------------------


def test_folder_is_mirrored(model, photos, tmp_path):
    out = tmp_path / "out"
    assert predict(model, photos, out, "--batch_size", 2) == 0
    assert written(out) == {f"{stem}_{kind}.png" for stem in STEMS for kind in KINDS} | NOTES
    for stem, size in zip(STEMS, [(40, 70), (70, 40), (33, 33), (20, 90), (64, 64)], strict=True):
        label = read(out / f"{stem}_label.png")
        assert label.dtype == np.uint8 and label.shape == size and label.max() < TASK.num_classes
        np.testing.assert_array_equal(read(out / f"{stem}_color.png"), colorize(label, TASK.palette))
    legend = json.loads((out / "legend.json").read_text())
    assert legend["5"] == {"name": "road", "color": [128, 64, 128]} and len(legend) == TASK.num_classes
    told = summary(out)
    assert (told["status"], told["images"], told["predicted"], told["skipped"], told["left"]) == (
        "complete",
        5,
        5,
        0,
        0,
    )
    assert told["failed"] == {} and told["settings"]["window"] is None and "torch" in told["versions"]


def test_single_file_equals_the_pipeline(model, photos, tmp_path):
    file = photos / "night" / "a.PNG"
    out = tmp_path / "out"
    flags = ("--overlay_alpha", 0.25, "--save_confidence", "--window", 64, "--stride", 32, "--tta", "flip")
    assert predict(model, file, out, *flags) == 0
    assert written(out) == {*(f"a_{kind}.png" for kind in (*KINDS, "confidence")), *NOTES}
    pipe = MADMPipeline.from_pretrained(model)
    output = pipe(file, window=64, stride=32, tta=("flip",), return_confidence=True)
    label, confidence = output.label_maps[0], output.confidence[0]
    np.testing.assert_array_equal(read(out / "a_label.png"), label)
    assert (pipe(file).label_maps[0] != label).any()  # the flags matter
    np.testing.assert_array_equal(read(out / "a_confidence.png"), np.round(confidence * 255))
    blend = overlay(read(file)[..., :3], colorize(label, TASK.palette), 0.25)
    np.testing.assert_array_equal(read(out / "a_overlay.png"), blend)


def test_weights_and_precision_are_used(model, photos, tmp_path):
    labels = []
    for k, more in enumerate(((), ("--weights", "teacher"), ("--mixed_precision", "bf16"))):
        predict(model, photos / "c.webp", tmp_path / str(k), *more)
        labels.append(read(tmp_path / str(k) / "c_label.png"))
    assert (labels[0] != labels[1]).any()
    assert 0 < (labels[0] != labels[2]).mean() < 0.5


def test_several_models_are_an_ensemble(model, photos, tmp_path):
    """The mean of the probabilities; models of other classes are refused."""
    other = tmp_path / "other"
    shutil.copytree(model, other)
    shutil.rmtree(other / "segmenter")
    (other / "teacher").rename(other / "segmenter")
    assert predict([model, other], photos / "c.webp", tmp_path / "out") == 0
    one, two = (
        MADMPipeline.from_pretrained(folder)(photos / "c.webp", return_probabilities=True).probabilities[0]
        for folder in (model, other)
    )
    label = read(tmp_path / "out" / "c_label.png")
    np.testing.assert_array_equal(label, (one + two).argmax(0))
    assert (label != one.argmax(0)).any() and (label != two.argmax(0)).any()

    config = json.loads((other / "madm_config.json").read_text())
    config["task"]["class_names"] = [*config["task"]["class_names"][:-1], "kerb"]
    (other / "madm_config.json").write_text(json.dumps(config))
    kerb = other.rename(tmp_path / "kerb")
    with pytest.raises(UserError, match=r"ensemble needs equal classes.*kerb"):
        predict([model, kerb], photos / "c.webp", tmp_path / "mixed")


def test_results_depend_on_nothing_but_the_image(model, photos, tmp_path, capsys, monkeypatch):
    """Byte for byte the same in batches of 1 and 4, alone, and from two processes, which tell of all images."""
    assert predict(model, photos, tmp_path / "one") == 0
    expected = pictures(tmp_path / "one")
    assert predict(model, photos, tmp_path / "four", "--batch_size", 4) == 0
    assert pictures(tmp_path / "four") == expected
    assert predict(model, photos / "night" / "late", tmp_path / "alone") == 0
    alone = pictures(tmp_path / "alone")
    assert alone["depth_label.png"] == expected["night/late/depth_label.png"]

    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:300])
    (photos / "d.png").write_bytes(b"")
    flags = ("--model_path", model, "--input", photos, "--output_dir", tmp_path / "two")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(probe.getsockname()[1])}
    launched = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", **place}  # as launchers do
    log = tmp_path / "log"
    second = multiprocessing.get_context("fork").Process(
        target=second_process, args=(flags, {**launched, "RANK": "1", "LOCAL_RANK": "1"}, log)
    )
    second.start()
    # Should the other one fail at its start, this one would wait for it for half an hour.
    monkeypatch.setattr(torch.distributed.distributed_c10d, "default_pg_timeout", timedelta(minutes=3))
    for name, value in {**launched, "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert predict(*flags[1::2]) == 1
    second.join()
    printed = log.read_text()
    assert second.exitcode == 0, printed
    said = capsys.readouterr()
    assert "5 of 7 images predicted, 2 failed" in said.out and "predicted" not in printed
    for name in ("broken.png: cannot be read", "d.png: cannot be read as an image (the file is empty)"):
        assert name in said.err[said.err.index("2 failed:") :]
    assert pictures(tmp_path / "two") == expected
    assert sorted(summary(tmp_path / "two")["failed"]) == ["broken.png", "d.png"]


# --- going on --------------------------------------------------------------------------------------------------------


def test_what_is_done_is_skipped_and_nothing_else(model, photos, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert predict(model, photos, out) == 0
    expected = pictures(out)
    with monkeypatch.context() as patch:
        patch.setattr(predict_madm, "load", lambda *_: pytest.fail("the model is loaded though all is done"))
        assert predict(model, photos, out) == 0
    assert "0 of 5 images predicted, 5 done before" in capsys.readouterr().out
    assert summary(out)["skipped"] == 5

    Image.fromarray(np.full((33, 33, 3), 200, np.uint8)).save(photos / "night" / "late" / "b.jpg")
    (out / "c_color.png").unlink()
    (out / "night" / "a_overlay.png").write_bytes(b"shorter")
    label = (out / "a_label.png").read_bytes()
    (out / "a_label.png").write_bytes(label[:-1])
    assert predict(model, photos, out) == 0
    assert "4 of 5 images predicted, 1 done before" in capsys.readouterr().out
    again = pictures(out)
    assert {name for name in again if again[name] != expected[name]} == {f"night/late/b_{kind}.png" for kind in KINDS}


def test_another_model_or_setting_is_refused_or_redone(model, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert predict(model, photos / "c.webp", out) == 0
    first = pictures(out)
    with pytest.raises(UserError, match=r"another model or of other settings \(window: None -> 64\).*--overwrite"):
        predict(model, photos / "c.webp", out, "--window", 64)
    with pytest.raises(UserError, match=r"\(models: \['\w+'\] -> \['\w+'\]; weights: student -> teacher\)"):
        predict(model, photos / "c.webp", out, "--weights", "teacher")
    assert pictures(out) == first
    assert predict(model, photos / "c.webp", out, "--weights", "teacher", "--overwrite") == 0
    assert "1 of 1 images predicted" in capsys.readouterr().out
    assert pictures(out)["c_label.png"] != first["c_label.png"]
    assert predict(model, photos / "c.webp", out, "--weights", "teacher") == 0
    assert "1 done before" in capsys.readouterr().out
    (out / "summary.json").write_text('{"mine": 1}')
    with pytest.raises(UserError, match=r"summary.json was not written by this script"):
        predict(model, photos / "c.webp", out)


def test_predictions_of_versions_without_approximations_go_on(model):
    """Their marks hold the digest of exactly these settings; compilation is not one of them."""
    before = {
        "models": [prediction_files.model_digest(model, "student")], "weights": "student", "mixed_precision": "no",
        "window": None, "stride": None, "flip": False, "scales": (1.0,), "overlay_alpha": 0.5,
        "save_confidence": False,
    }  # fmt: skip
    required = ["--model_path", str(model), "--input", "photos", "--output_dir", "out"]
    for more, changed in (([], {}), (["--compile"], {}), (["--merge_lora"], {"merge_lora": True}),
                          (["--quantize_unet", "fp8"], {"quantize_unet": "fp8"})):  # fmt: skip
        settings = predict_madm.describe_settings(predict_madm.parse_args([*required, *more]), [model])
        assert settings == before | changed
        same = prediction_files.settings_digest(settings) == prediction_files.settings_digest(before)
        assert same != bool(changed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_work_in_order(model, photos, tmp_path, capsys, monkeypatch, number):
    """What was begun is complete, nothing half-written is left, and the same command goes on."""
    out, segment = tmp_path / "out", predict_madm.segment
    count = 0

    def interrupted(*args):
        nonlocal count
        count += 1
        if count == 2:
            os.kill(os.getpid(), number)
        yield from segment(*args)

    with monkeypatch.context() as patch:
        patch.setattr(predict_madm, "segment", interrupted)
        assert predict(model, photos / "night", out) == 128 + number
    said = capsys.readouterr()
    assert "2 of 3 images predicted, 1 left" in said.out
    assert f"stopped by {number.name}; the same command goes on where it stopped" in said.err
    assert len(written(out)) == 2 * 3 + 2 and summary(out)["status"] == "interrupted"
    assert predict(model, photos / "night", out) == 0
    assert "1 of 3 images predicted, 2 done before" in capsys.readouterr().out
    assert len(written(out)) == 3 * 3 + 2 and summary(out)["status"] == "complete"


def test_unchanged_images_are_known_without_reading_them(photos, tmp_path, monkeypatch):
    """An image whose time is that of its prediction is the same; any other is compared by its content."""
    source, target = storage.LocalStorage(photos), storage.LocalStorage(tmp_path / "out")
    entry = source.files()["a.png"]

    def predicted(modified):
        picture = prediction_files.read_picture(source, Job("a.png", "a", modified))
        assert picture.sha256 == hashlib.sha256((photos / "a.png").read_bytes()).hexdigest()
        label_map = np.zeros((40, 70), np.uint8)
        target.write(prediction_files.prediction_files("a", "run", picture, label_map, [(1, 2, 3)], 0.5))
        return picture.sha256

    def done(run="run", **changes) -> bool:
        changed = storage.Entry(**{**vars(entry), **changes})
        return prediction_files.is_done("a", run, source, "a.png", changed, target, target.files())

    sha256 = predicted(entry.modified)
    assert done() and not done(run="another run") and not done(size=entry.size + 1)
    assert done(sha256=sha256) and not done(sha256="0" * 64)
    assert done(modified=entry.modified - 1) and done(modified=None)  # the content is the same
    with monkeypatch.context() as patch:
        patch.setattr(source, "read", lambda name: pytest.fail("read"))
        assert done()
    content = (photos / "a.png").read_bytes()
    (photos / "a.png").write_bytes(bytes(entry.size))  # of the same size
    assert not any(done(modified=entry.modified + seconds) for seconds in (-100, -1e-3, 1e-3, 100))
    assert not done(modified=None) and not done(size=None)
    (photos / "a.png").write_bytes(content)
    predicted(None)
    (photos / "a.png").write_bytes(bytes(entry.size))
    assert not done()


def test_only_times_that_tell_changes_are_kept(monkeypatch):
    monkeypatch.setattr(prediction_files.time, "time", lambda: 1000.0)
    there = dict.fromkeys(("sub/a_overlay.png", "sub/a_label.png", "sub/a.png"), storage.Entry(1))
    known = {modified: prediction_files.plan_job("a.png", "sub/a", storage.Entry(1, modified), there) for modified in (
        939.0, 941.0, 1e9, None)}  # fmt: skip
    assert [job.modified for job in known.values()] == [939.0, None, None, None]
    assert known[939.0].earlier == ("sub/a_label.png", "sub/a_overlay.png")


def test_a_changed_image_is_predicted_again_however_new_its_label_looks(model, tmp_path, capsys, monkeypatch):
    """The other image has the same size in bytes, and its label's file was touched after it came."""
    monkeypatch.setattr(prediction_files, "_CLOCKS", -60.0)  # as if the image had been there for long
    photo, out = tmp_path / "in" / "a.bmp", tmp_path / "out"
    photo.parent.mkdir()
    Image.new("RGB", (8, 8), "red").save(photo)
    assert predict(model, photo, out) == 0
    assert prediction_files.read_mark((out / "a_label.png").read_bytes())["modified"] == photo.stat().st_ctime
    Image.new("RGB", (8, 8), "blue").save(photo)
    os.utime(out / "a_label.png", (2e9, 2e9))
    assert predict(model, photo, out) == 0
    said = capsys.readouterr().out
    assert (
        said.count("1 of 1 images predicted") == 2 and read(out / "a_overlay.png").tolist() != [[[255, 0, 0]] * 8] * 8
    )


def test_nothing_of_an_earlier_prediction_stays_beside_another(model, two_photos, tmp_path):
    """Neither a file that is not asked for any more, nor the prediction of an image that is broken."""
    out = tmp_path / "out"
    assert predict(model, two_photos, out, "--save_confidence") == 0
    (two_photos / "sub" / "c.webp").write_bytes(b"broken")
    assert predict(model, two_photos, out, "--overwrite") == 1
    assert written(out) == {f"a_{kind}.png" for kind in KINDS} | NOTES


def test_a_lost_legend_is_written_again(model, two_photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert predict(model, two_photos, out) == 0
    first = pictures(out)
    (out / "legend.json").unlink()
    monkeypatch.setattr(predict_madm, "load", lambda *_: pytest.fail("the model is loaded though all is done"))
    assert predict(model, two_photos, out) == 0
    assert pictures(out) == first


# --- elsewhere -------------------------------------------------------------------------------------------------------


def test_any_address_is_read_and_written(model, two_photos, tmp_path, capsys):
    assert predict(model, two_photos, tmp_path / "local") == 0
    expected = pictures(tmp_path / "local")
    memory = fsspec.filesystem("memory")
    memory.put(f"{two_photos}/", "/photos/", recursive=True)
    out = "memory://photos/predictions"  # inside the input: its files are no images

    def contents() -> dict[str, bytes]:
        found = memory.find("/photos/predictions")
        return {name.removeprefix("/photos/predictions/"): memory.cat_file(name) for name in found}

    for told in ("2 of 2 images predicted", "0 of 2 images predicted, 2 done before"):
        assert predict(model, "memory://photos", out) == 0
        assert told in capsys.readouterr().out
        assert {k: v for k, v in contents().items() if k != "summary.json"} == expected
    memory.rm_file("/photos/predictions/sub/c_overlay.png")
    assert predict(model, "memory://photos/", out) == 0
    assert "1 of 2 images predicted, 1 done before" in capsys.readouterr().out
    assert predict(model, "memory://photos/a.png", f"file://{tmp_path}/single") == 0
    assert pictures(tmp_path / "single") == {k: v for k, v in expected.items() if "/" not in k}
    with pytest.raises(UserError, match="is the input folder"):
        predict(model, "memory://photos", "memory://photos")


def test_repositories_on_the_hub_are_read_and_written(model, two_photos, tmp_path, capsys, monkeypatch):
    """Digests of large files come with the list, so that going on reads none of them; commits hold many files."""
    assert predict(model, two_photos, tmp_path / "local") == 0
    for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    with HubServer() as hub:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": hub.url, "token": WRITE_TOKEN})
        files = {f"in/{name}": content for name, content in pictures(two_photos).items()}
        hub.repos["datasets/me/photos"] = Repo(files=files, large=set(files))
        with pytest.raises(UserError, match=r"--output_dir hf://datasets/me/new/run does not exist.*hf repos create"):
            predict(model, "hf://datasets/me/photos/in", "hf://datasets/me/new/run")
        target = hub.repos["datasets/me/new"] = Repo(private=True)
        assert predict(model, "hf://datasets/me/photos/in", "hf://datasets/me/new/run") == 0
        got = {name.removeprefix("run/"): content for name, content in target.files.items()}
        assert got.pop("summary.json") and got == pictures(tmp_path / "local")
        assert len(target.commits) == 3  # at the start, the predictions, the summary
        hub.requests.clear()
        assert predict(model, "hf://datasets/me/photos/in", "hf://datasets/me/new/run") == 0
        assert "0 of 2 images predicted, 2 done before" in capsys.readouterr().out
        assert not any("/me/photos/resolve/" in request for request in hub.requests)

        good, files["in/sub/c.webp"] = files["in/sub/c.webp"], b"broken"
        assert predict(model, "hf://datasets/me/photos/in", "hf://datasets/me/new/run") == 1
        assert {name for name in target.files if "_" in name} == {f"run/a_{kind}.png" for kind in KINDS}
        assert "Add 0 files of predictions, remove 3" in target.commits
        capsys.readouterr()

        del target.files["run/a_label.png"]
        files["in/sub/c.webp"] = good
        hub.fail("POST .*/commit/main", 403)
        monkeypatch.setattr(predict_madm, "write_summary", lambda *_: None)  # its commit would be the one to fail
        with monkeypatch.context() as patch:
            patch.setattr(predict_madm, "write_json", lambda *_: None)
            assert predict(model, "hf://datasets/me/photos/in", "hf://datasets/me/new/run") == 1
        said = capsys.readouterr()
        assert "0 of 2 images predicted, 2 left" in said.out
        assert "error: cannot write to hf://datasets/me/new/run" in said.err
    assert "hf_Secret" not in said.err


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_images_are_reported_and_the_others_done(model, photos, tmp_path, monkeypatch, capfd):
    """One message for each, naming the file; tiny images and those that Pillow finds suspiciously large are done."""
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:300])
    (photos / "night" / "empty.jpg").touch()
    (photos / "gone.png").write_bytes(b"not for long")
    Image.new("RGB", (1, 1)).save(photos / "one.png")
    Image.new("L", (200, 200)).save(photos / "enormous.png")
    values = np.zeros((8, 8), np.float32)
    values[0, 0] = np.nan
    Image.fromarray(values).save(photos / "nan.tif")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2500)  # a.png has 2800, enormous.png 40000
    load = predict_madm.load

    def load_while_an_image_vanishes(*args):
        (photos / "gone.png").unlink()
        return load(*args)

    monkeypatch.setattr(predict_madm, "load", load_while_an_image_vanishes)
    out = tmp_path / "out"
    assert predict(model, photos, out, "--batch_size", 3) == 1
    said = capfd.readouterr()
    assert "6 of 11 images predicted, 5 failed" in said.out and "Warning" not in said.err
    told = said.err[said.err.index("5 failed:") :]
    for message in (
        "broken.png: cannot be read as an image",
        "empty.jpg: cannot be read as an image (the file is empty)",
        "gone.png: no such file (any more)",
        "nan.tif: 1 values are not finite",
        "enormous.png: cannot be read as an image (Image size (40000 pixels) exceeds limit",
    ):
        assert told.count(message) == 1
    assert len(written(out)) == 6 * 3 + 2 and read(out / "one_label.png").shape == (1, 1)
    assert set(summary(out)["failed"]) == {"broken.png", "night/empty.jpg", "gone.png", "nan.tif", "enormous.png"}


def test_a_failing_image_does_not_take_its_batch_with_it(model, two_photos, tmp_path, monkeypatch, capsys):
    load = predict_madm.load

    def load_sensitive(*args):
        predictor, *rest = load(*args)

        def sensitive(images, **options):
            if any(image.size == (70, 40) for image in images):
                raise UserError("the model's output is not finite")
            return predictor(images, **options)

        return sensitive, *rest

    monkeypatch.setattr(predict_madm, "load", load_sensitive)
    assert predict(model, two_photos, tmp_path / "out", "--batch_size", 2) == 1
    said = capsys.readouterr()
    assert "1 of 2 images predicted, 1 failed" in said.out
    assert f"{two_photos / 'a.png'}: the model's output is not finite" in said.err


def test_files_that_cannot_be_written(model, photos, tmp_path, monkeypatch, capsys):
    """One sub-folder fails alone; a full disk ends the work, which says how to go on."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "night").write_text("a file where a folder is needed")
    assert predict(model, photos, out) == 1
    said = capsys.readouterr()
    assert "2 of 5 images predicted, 3 failed" in said.out
    assert "cannot write" in said.err and "night" in said.err[said.err.index("3 failed:") :]

    (out / "night").unlink()
    write_bytes = Path.write_bytes

    def write_until_full(path, content):
        if "label" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_until_full)
        assert predict(model, photos, out) == 1
    said = capsys.readouterr()
    assert "2 done before, 3 left" in said.out
    assert "No space left on device); make room" in said.err and "goes on where it stopped" in said.err
    assert not [name for name in written(out) if "tmp" in name]
    assert predict(model, photos, out) == 0


def test_predictions_are_no_inputs(model, two_photos, capsys):
    """Neither those of this run nor those of earlier ones; a file that only has the summary's name says nothing."""
    (two_photos / "a.png").unlink()
    (two_photos / "sub" / "summary.json").write_text('{"settings": {}}')
    ours, other = two_photos / "predictions", two_photos / "sub" / "more"
    assert predict(model, two_photos, ours) == 0
    first = written(ours)
    assert predict(model, two_photos, other) == 0
    assert predict(model, two_photos, ours, "--overwrite") == 0
    assert written(ours) == written(other) == first
    said = capsys.readouterr().out
    assert said.count("1 of 1 images predicted") == 3
    assert f"left out of --input: the predictions in {ours}\n" in said and f"the predictions in {other}\n" in said
    with pytest.raises(UserError, match=r"--input .*predictions holds predictions \(summary.json\)"):
        predict(model, ours, two_photos / "third")


# --- memory ----------------------------------------------------------------------------------------------------------


class Failures(dict):
    """In place of a `Writer`: why images failed."""

    def fail(self, job, reason):
        self[job.name] = reason


def batch_of(*sizes) -> list[tuple[Job, Picture]]:
    return [(Job(f"{k}.png", str(k)), Picture(Image.new("RGB", size), "", 0, None)) for k, size in enumerate(sizes)]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        MemoryError(),
    ],
)
def test_a_batch_without_room_is_tried_in_parts(error):
    """After everything that belonged to the whole has been given back."""

    class Tensor:
        pass

    held = []

    def predictor(images, confidence):
        assert not any(tensor() for tensor in held)
        tensor = Tensor()
        held.append(weakref.ref(tensor))
        if len(images) > 1 or images[0].width == 9:
            raise type(error)(*error.args)
        return ["prediction"]

    failures = Failures()
    source = storage.LocalStorage(Path("photos"))
    done = list(predict_madm.segment(predictor, batch_of((8, 8), (9, 7), (8, 8)), False, source, failures))
    assert [job.name for job, _, _ in done] == ["0.png", "2.png"] and len(held) == 4
    assert failures == {"1.png": "photos/1.png: 9x7 pixels do not fit into memory; --window bounds it"}


def test_other_errors_of_a_network_are_not_taken_for_a_lack_of_memory():
    def predictor(images, confidence):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert predict_madm.is_out_of_memory(caught.value)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        list(predict_madm.segment(predictor, batch_of((8, 8)), False, storage.LocalStorage(Path()), Failures()))


def test_what_cannot_be_compiled_ends_the_run():
    calls = []

    def block(images, confidence):
        calls.append(images)
        raise TorchDynamoException("no g++")

    failures = Failures()
    found = predict_madm.segment(
        _explained("unet.block", block), batch_of((8, 8), (8, 8)), False, storage.LocalStorage(Path()), failures
    )
    with pytest.raises(CompileError, match=r"cannot compile unet.block: no g\+\+. Leave --compile out"):
        list(found)
    assert len(calls) == 1 and not failures


def test_an_image_whose_files_need_too_much_memory_fails_alone(model, two_photos, tmp_path, monkeypatch, capsys):
    """While it is read, or while its predictions are compressed."""

    def without_room(function, name):
        def limited(*args):
            if name in map(str, args) or any(getattr(arg, "name", "") == name for arg in args):
                raise MemoryError
            return function(*args)

        return limited

    for module, function, name, place in (
        (prediction_streams, "read_picture", "a.png", two_photos / "a.png: does not fit into memory"),
        (predict_madm, "prediction_files", "sub/c", tmp_path / "out" / "sub" / "c: its files do not fit into memory"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, function, without_room(getattr(module, function), name))
            assert predict(model, two_photos, tmp_path / "out", "--overwrite") == 1
        said = capsys.readouterr()
        assert "1 of 2 images predicted, 1 failed" in said.out and f"error: {place}\n" in said.err


def test_batches_and_what_waits_are_bounded_in_pixels(monkeypatch, photos):
    for module in (predict_madm, prediction_streams):
        monkeypatch.setattr(module, "MAX_PIXELS", 3000)
    pictures = [
        *batch_of((10, 100), (20, 100), (1, 1), (100, 100), (1, 1), (1, 1), (1, 1)),
        (Job("x", "x"), UserError("!")),
    ]
    failures = Failures()
    batches = predict_madm.batches(pictures, 2, failures)
    assert [[job.name[0] for job, _ in batch] for batch in batches] == [["0", "1"], ["2"], ["3"], ["4", "5"], ["6"]]
    assert failures == {"x": "!"}

    class Pool(ThreadPoolExecutor):
        submitted = 0

        def submit(self, *args):
            self.submitted += 1
            return super().submit(*args)

    jobs = [Job("night/late/b.jpg", "b")] * 10  # 33 * 33 pixels: two of them wait
    with Pool(1) as pool:
        ahead = prediction_streams.read_ahead(storage.LocalStorage(photos), jobs, pool, 5)
        waiting = [pool.submitted - taken for taken, _ in enumerate(ahead, 1)]
    assert waiting == [1, 2, 2, 2, 2, 2, 2, 2, 1, 0]


def test_equal_names_in_one_folder_are_refused(model, photos, tmp_path):
    Image.new("RGB", (8, 8)).save(photos / "a.jpeg")
    with pytest.raises(UserError, match=r"a\.jpeg, .*a\.png differ in their ending only"):
        predict(model, photos, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_places_are_named_and_nothing_is_written(model, photos, tmp_path):
    out, empty, several = tmp_path / "out", tmp_path / "empty", tmp_path / "several"
    empty.mkdir()
    config = (model / "madm_config.json").read_text()
    for name in ("depth", "event"):
        (several / name).mkdir(parents=True)
        (several / name / "madm_config.json").write_text(
            config.replace('"modality": "depth"', f'"modality": "{name}"')
        )
    lacking = tmp_path / "lacking"
    shutil.copytree(model, lacking)
    shutil.rmtree(lacking / "segmenter")
    cases = [
        (model, tmp_path / "nowhere", out, r"--input .*nowhere: no such file or folder"),
        (model, "memory://nowhere", out, r"--input memory://nowhere does not exist"),
        (model, "parchment://x", out, r"--input parchment://x cannot be opened"),
        (model, empty, out, r"empty holds no images; looked for \.png"),
        (model, photos, photos, "is the input folder"),
        (model, photos, photos / "notes.txt", "notes.txt is a file; give a folder"),
        (model, photos, "https://example.org/out", "nothing can be written to a web address"),
        (empty, photos, out, "empty is not a trained model"),
        (tmp_path / "nowhere", photos, out, "nowhere: no such folder"),
        (several, photos, out, "several holds models for depth, event; give one of them: .*several/depth, "),
        (lacking, photos, out, "segmenter"),
    ]
    for folder, source, target, message in cases:
        with pytest.raises(UserError, match=message):
            predict(folder, source, target)
        AcceleratorState._reset_state(reset_partial_state=True)
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


def test_impossible_windows_are_named_before_the_model_is_loaded(model, two_photos, tmp_path, monkeypatch):
    monkeypatch.setattr(predict_madm, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match="the window must be a multiple of 64 pixels, got 100"):
        predict(model, two_photos, tmp_path / "out", "--window", 100)
    assert InferenceSettings(64).step() == 48
