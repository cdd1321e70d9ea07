"""`eval_madm.py`: its numbers against a slow reference, its files, several processes, and a message per mistake."""

import csv
import dataclasses
import json
import logging
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from fork_server import run_script
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_model import RESOLUTION, new_model, write_data, write_model

import eval_madm
from madm_utils import MADMModel, MADMPipeline
from madm_utils.cli import UserError
from madm_utils.evaluation import check_validation_split, validate
from madm_utils.small_model import build_small_stable_diffusion
from madm_utils.tasks import TASKS
from madm_utils.train_args import parse_train_args, train_parser

TASK = TASKS["synthetic_to_depth"]
FILES = {"metrics.json", "confusion_matrix.csv", "confusion_matrix.png", "pictures", "worst", "report.html"}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """What a training of two modalities leaves: a model folder of each."""
    folder = tmp_path_factory.mktemp("run")
    write_model(folder / "depth")
    write_model(folder / "infrared", "synthetic_to_infrared")
    return folder


@pytest.fixture(scope="module")
def model(run_folder):
    return run_folder / "depth"


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """A second model of the task of `model`, with other weights."""
    folder = tmp_path_factory.mktemp("other") / "depth"
    torch.manual_seed(1)
    new_model(TASK).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def without_plots(monkeypatch):
    """matplotlib takes a second per plot."""
    monkeypatch.setattr("madm_utils.visualization.save_confusion_plot", lambda matrix, names, path: path.touch())


def arguments(model, data, out, *more) -> list[str]:
    paths = ("--model_path", model, "--data_dir", data, "--output_dir", out)
    return [str(a) for a in (*paths, "--num_cpu_threads", 1, "--dataloader_num_workers", 0, *more)]


def evaluate(model, data, out, *more) -> dict:
    eval_madm.main(arguments(model, data, out, *more))
    return json.loads((out / "metrics.json").read_text())


def slow_confusion(data: Path, protocol: str, *models: Path, num_images: int = 5) -> np.ndarray:
    """Pixel by pixel from the Arrow file, (K, K), rows prediction, columns label; several models are an ensemble."""
    networks = [MADMModel.from_pretrained(model) for model in models]
    confusion = np.zeros((TASK.num_classes, TASK.num_classes), np.int64)
    size = (RESOLUTION, RESOLUTION)
    for row in datasets.load_from_disk(str(data / "synthetic_depth" / "test")).select(range(num_images)):
        image, label = row["image"].convert("RGB").resize(size, Image.Resampling.BILINEAR), row["label"]
        if protocol == "paper":
            label = label.resize(size, Image.Resampling.NEAREST)
        images = torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())[None].float() / 255
        with torch.no_grad():
            logits = torch.cat([network(images).logits for network in networks])
        logits = torch.nn.functional.interpolate(logits, size=label.size[::-1], mode="bilinear", align_corners=False)
        chosen = logits.softmax(1).mean(0).argmax(0) if len(models) > 1 else logits[0].argmax(0)
        for p, g in zip(chosen.flatten().tolist(), np.asarray(label).flatten().tolist(), strict=True):
            if g != 255:
                confusion[p, g] += 1
    return confusion


@pytest.mark.parametrize("protocol", ["paper", "native"])
def test_numbers_and_files(model, data, tmp_path, capsys, protocol):
    metrics = evaluate(model, data, tmp_path, "--protocol", protocol, "--num_pictures", 3)
    confusion = slow_confusion(data, protocol, model)
    np.testing.assert_array_equal(metrics["confusion_matrix"], confusion)
    assert confusion.sum() == pytest.approx(5 * {"paper": 64, "native": 96}[protocol] ** 2, rel=0.1)

    true, labelled, predicted = confusion.diagonal(), confusion.sum(0), confusion.sum(1)
    iou = [t / (g + p - t) if g else None for t, g, p in zip(true, labelled, predicted, strict=True)]
    for name, value in zip(TASK.class_names, iou, strict=True):
        assert metrics["per_class"][name]["iou"] == (None if value is None else pytest.approx(100 * value))
    seen = np.count_nonzero(labelled + predicted)
    assert metrics["miou"] == pytest.approx(100 * sum(v for v in iou if v is not None) / seen)
    assert metrics["pacc"] == pytest.approx(100 * true.sum() / labelled.sum())

    assert set(metrics) == {
        "task", "split", "protocol", "num_images", "miou", "macc", "pacc", "fwiou", "per_class", "confusion_matrix",
        "class_names", "model", "settings", "versions", "boundary_iou", "calibration", "confidence_intervals",
        "conditions", "worst_images",
    }  # fmt: skip
    assert metrics["settings"] == {
        "weights": "student", "resolution": RESOLUTION, "mixed_precision": "no", "window": None, "stride": None,
        "tta": [], "compile": False, "merge_lora": False, "quantize_unet": None, "head_resolution": 1,
        "vae_decoder": None,
    }  # fmt: skip
    assert [metrics[k] for k in ("task", "split", "protocol", "num_images", "class_names", "model")] == [
        TASK.name, "test", protocol, 5, list(TASK.class_names), str(model),
    ]  # fmt: skip

    assert {path.name for path in tmp_path.iterdir()} == FILES
    with open(tmp_path / "confusion_matrix.csv", newline="") as file:
        table = list(csv.reader(file))
    assert table[0] == ["prediction \\ label", *TASK.class_names, "ignored"]
    assert [row[0] for row in table[1:]] == list(TASK.class_names)
    np.testing.assert_array_equal([[int(cell) for cell in row[1:-1]] for row in table[1:]], confusion)
    with Image.open(tmp_path / "confusion_matrix.png") as plot:
        assert plot.width > 400
    pictures = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert [name[:6] for name in pictures] == ["00000_", "00002_", "00004_"]
    assert f"mIoU{metrics['miou']:8.2f}" in capsys.readouterr().out


@pytest.mark.usefixtures("without_plots")
def test_teacher_task_and_sample_limit(model, data, tmp_path):
    student = evaluate(model, data, tmp_path / "student", "--max_samples", 2, "--task", TASK.name)
    other = dataclasses.replace(TASK, hyperparameters={"rank": 3})
    (tmp_path / "task.json").write_text(json.dumps(other.to_dict()))
    teacher = evaluate(
        model, data, tmp_path / "teacher", "--max_samples", 2, "--weights", "teacher",
        "--task_config", tmp_path / "task.json",
    )  # fmt: skip
    assert (student["num_images"], teacher["num_images"]) == (2, 2)
    assert teacher["settings"]["weights"] == "teacher"
    assert student["confusion_matrix"] != teacher["confusion_matrix"]


@pytest.mark.usefixtures("without_plots")
def test_bf16_is_close_to_float32(model, data, tmp_path):
    full = np.array(evaluate(model, data, tmp_path / "full")["confusion_matrix"])
    AcceleratorState._reset_state(reset_partial_state=True)
    metrics = evaluate(model, data, tmp_path / "half", "--mixed_precision", "bf16", "--batch_size", 4)
    assert metrics["settings"]["mixed_precision"] == "bf16"
    moved = np.abs(np.array(metrics["confusion_matrix"]) - full).sum() / 2
    assert 0 < moved < 0.5 * full.sum()


@pytest.mark.usefixtures("without_plots")
def test_an_earlier_evaluation_is_replaced_and_nothing_else(model, data, tmp_path):
    evaluate(model, data, tmp_path, "--num_pictures", 5)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "pictures" / "holiday.png").write_text("mine")
    metrics = evaluate(model, data, tmp_path, "--num_pictures", 1, "--max_samples", 1)
    assert metrics["num_images"] == 1
    assert {path.name for path in tmp_path.iterdir()} == FILES | {"notes.txt"}
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["00000_000000.png", "holiday.png"]


def test_two_processes_write_what_one_writes(model, data, tmp_path):
    evaluate(model, data, tmp_path / "one", "--protocol", "native", "--batch_size", 2)
    command = arguments(model, data, tmp_path / "two", "--protocol", "native", "--batch_size", 2)
    done = run_script("eval_madm.py", *command, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    # 5 images in batches of 2: rank 0 has batches 0 and 2 (3 images), which proves that two processes shared the work.
    assert "3/3" in done.stderr and "5/5" not in done.stderr
    assert done.stdout.count("results: ") == 1
    files = [{p.relative_to(tmp_path / run): p.read_bytes() for p in (tmp_path / run).rglob("*.*")}
             for run in ("one", "two")]  # fmt: skip
    assert files[0] == files[1] and len(files[0]) == 4 + 5 + 5


# --- several models --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data_with_conditions(data, tmp_path_factory):
    """The depth images as fog, night, fog, ..., the infrared ones without conditions."""
    folder = tmp_path_factory.mktemp("conditions")
    shutil.copytree(data / "synthetic_infrared" / "test", folder / "synthetic_infrared" / "test")
    rewrite(data, folder, lambda row, k: {"condition": ("fog", "night")[k % 2]})
    return folder


def rewrite(data: Path, folder: Path, change) -> None:
    """Copy the depth test split with changed rows."""
    part = Path("synthetic_depth", "test")
    rows = datasets.load_from_disk(str(data / part))
    for column in ("image", "label"):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    rows.map(change, with_indices=True).save_to_disk(str(folder / part))
    shutil.copy(data / part / "metadata.json", folder / part)


@pytest.mark.usefixtures("without_plots")
def test_comparison_of_models_and_tasks(model, other_model, run_folder, data, data_with_conditions, tmp_path, capsys):
    more = [other_model, run_folder, "--names", "new", "d", "ir", "--max_samples", 3, "--protocol", "native"]
    out = tmp_path / "out"
    eval_madm.main([*arguments(model, data_with_conditions, out, "--model_path", *more)])
    assert {path.name for path in out.iterdir()} == {
        "comparison.json", "comparison.md", "comparison.csv", "report.html", "new", "d", "ir",
    }  # fmt: skip
    assert all({path.name for path in (out / name).iterdir()} == FILES for name in ("new", "d", "ir"))
    comparison = json.loads((out / "comparison.json").read_text())
    new, depth, infrared = comparison["models"]
    assert [row["task"] for row in comparison["models"]] == [TASK.name, TASK.name, "synthetic_to_infrared"]
    assert depth["model"] == [f"{run_folder}/depth"] and new["model"] == [str(other_model)]
    metrics = {name: json.loads((out / name / "metrics.json").read_text()) for name in ("new", "d", "ir")}
    assert depth["difference"]["difference"] == pytest.approx(metrics["d"]["miou"] - metrics["new"]["miou"])
    assert new["difference"] is infrared["difference"] is None
    np.testing.assert_array_equal(
        metrics["d"]["confusion_matrix"], slow_confusion(data, "native", model, num_images=3)
    )
    assert comparison["per_class"]["wall"].keys() == {"new", "d", "ir"}
    assert comparison["per_class"]["wall"]["ir"] is None

    conditions = metrics["d"]["conditions"]
    assert conditions["column"] == "condition" and metrics["ir"]["conditions"] is None
    assert {name: group["num_images"] for name, group in conditions["groups"].items()} == {"fog": 2, "night": 1}
    parts = [group["pacc"] * group["num_images"] for group in conditions["groups"].values()]
    assert sum(parts) / 3 == pytest.approx(metrics["d"]["pacc"], abs=0.5)  # images have nearly equally many labels
    assert comparison["conditions"][0]["groups"]["fog"]["miou"]["d"] == conditions["groups"]["fog"]["miou"]

    # What was worst for the first model is shown of the second too.
    shown = set(json.loads(report_data(out / "report.html"))["models"][1]["predictions"])
    assert shown == {"0", "1", "2"}
    text = capsys.readouterr().out
    assert (
        "3 models, test split, protocol native" in text
        and f"{new['miou']:.2f} [" in text
        and "| night | 1 |" in (out / "comparison.md").read_text()
    )


def report_data(report: Path) -> str:
    text = report.read_text(encoding="utf-8")
    return text.split('<script type="application/json" id="data">')[1].split("</script>")[0]


@pytest.mark.usefixtures("without_plots")
def test_an_ensemble_is_the_mean_of_probabilities(model, other_model, data, tmp_path):
    flags = ("--model_path", model, other_model, "--ensemble", "--max_samples", 2, "--num_pictures", 0)
    metrics = evaluate(model, data, tmp_path, *flags)
    expected = slow_confusion(data, "paper", model, other_model, num_images=2)
    np.testing.assert_array_equal(metrics["confusion_matrix"], expected)
    assert metrics["model"] == [str(model), str(other_model)]
    assert not np.array_equal(expected, slow_confusion(data, "paper", model, num_images=2))


@pytest.mark.usefixtures("without_plots")
def test_windows_and_augmentation_are_those_of_the_pipeline(model, data, tmp_path):
    flags = ("--protocol", "native", "--window", 64, "--stride", 32, "--tta", "flip", "--max_samples", 2)
    metrics = evaluate(model, data, tmp_path, *flags, "--batch_size", 2)
    assert [metrics["settings"][key] for key in ("window", "stride", "tta")] == [64, 32, ["flip"]]
    pipe = MADMPipeline.from_pretrained(model)
    confusion = np.zeros((TASK.num_classes,) * 2, np.int64)
    for row in datasets.load_from_disk(str(data / "synthetic_depth" / "test")).select(range(2)):
        label_map = pipe(row["image"], window=64, stride=32, tta=("flip",)).label_maps[0]
        label = np.asarray(row["label"])
        np.add.at(confusion, (label_map[label != 255], label[label != 255]), 1)
    np.testing.assert_array_equal(metrics["confusion_matrix"], confusion)


# --- while training --------------------------------------------------------------------------------------------------


def training_run(model: Path, data: Path) -> SimpleNamespace:
    """A run as `train_madm.py` has it, somewhere in the middle of a training."""
    student = MADMModel.from_pretrained(model).train()
    student.extractor.vae.eval()
    student.segmenter.head.dropout.eval()
    args = SimpleNamespace(data_dir=data, streaming=False, resolution=RESOLUTION, dataloader_num_workers=0)
    return SimpleNamespace(name="", task=TASK, model=student, args=args, step=7)


def everything(run: SimpleNamespace) -> dict:
    """Whatever of a training a validation could disturb."""
    state = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    modes = [module.training for module in run.model.modules()]
    numpy_state = np.random.get_state()[1].tobytes()
    return {"weights": state, "modes": modes, "torch": torch.get_rng_state().tolist(), "numpy": numpy_state,
            "python": random.getstate(), "gradients": [p.grad is None for p in run.model.parameters()],
            "requires_grad": [p.requires_grad for p in run.model.parameters()]}  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_is_the_evaluation_and_leaves_the_training_alone(model, data, tmp_path, workers):
    run, accelerator = training_run(model, data), Accelerator(cpu=True)
    run.args.dataloader_num_workers = workers
    before = everything(run)
    scores = validate(run, "test", accelerator)
    after = everything(run)
    weights, expected = after.pop("weights"), before.pop("weights")
    assert all(torch.equal(weights[name], expected[name]) for name in expected) and after == before
    assert True in before["modes"] and False in before["modes"]
    metrics = evaluate(model, data, tmp_path)
    assert scores == {"split": "test", **{key: metrics[key] for key in list(scores) if key != "split"}}
    assert {"num_images", "miou", "per_class"} <= set(scores)


def test_validation_gives_up_when_asked(model, data):
    run, calls = training_run(model, data), []
    assert validate(run, "test", Accelerator(cpu=True), stop=lambda: len(calls) == 2 or calls.append(0)) is None
    assert len(calls) == 2 and run.model.training


def test_validation_that_fails_does_not_end_the_training(model, data, caplog):
    run = training_run(model, data)
    run.model.segmenter.head.conv_seg.bias.data.fill_(float("nan"))
    assert validate(run, "test", Accelerator(cpu=True)) is None
    assert "no score on test at step 7: the model's output is not finite" in caplog.text and run.model.training

    caplog.clear()
    run = training_run(model, data)
    run.task = dataclasses.replace(TASK, target_label_map=dict.fromkeys(range(11), 255))
    assert validate(run, "test", Accelerator(cpu=True)) is None
    assert "no score on test at step 7: its labels hold no class of the task" in caplog.text


def test_validating_on_target_labels_is_checked_and_warned_about(model, data, caplog):
    Accelerator(cpu=True)
    caplog.set_level(logging.WARNING)
    check_validation_split(training_run(model, data), "test")
    assert "scores on 5 labelled images of synthetic_depth" in caplog.text
    assert "breaks the unsupervised protocol" in caplog.text
    with pytest.raises(UserError, match="images without labels"):
        check_validation_split(training_run(model, data), "train")


# --- the model card --------------------------------------------------------------------------------------------------


def test_scores_go_into_the_model_card(model, data, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(model, folder)
    flags = ["--task", TASK.name, "--data_dir", str(data), "--output_dir", str(folder)]
    settings = vars(parse_train_args(train_parser(""), [*flags, "--pretrained_model_name_or_path", "base"])[0][0])
    record = {
        "settings": settings,
        "task": TASK.to_dict(),
        "mixed_precision": "no",
        "num_processes": 1,
        "versions": {},
    }
    (folder / "run.json").write_text(json.dumps(record))
    metrics = evaluate(folder, data, folder / "evaluation", "--update_model_card")
    card = ModelCard.load(folder / "README.md")
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values["mean_iou"] == pytest.approx(metrics["miou"], abs=0.005)
    assert f"{metrics['miou']:.2f}" in card.text


def test_model_card_of_something_else(model, data, tmp_path):
    with pytest.raises(UserError, match="--update_model_card needs the local --output_dir of a finished training"):
        eval_madm.main(arguments(model, data, tmp_path / "out", "--update_model_card"))
    with pytest.raises(UserError, match="--update_model_card needs .* got --model_path some/model"):
        eval_madm.main(arguments("some/model", data, tmp_path / "out", "--update_model_card"))
    assert not (tmp_path / "out").exists()


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--task", "synthetic_to_event"), r"checkpoint of another task.*'synthetic_to_depth', expected"),
        (("--task", "nonsense"), "unknown task 'nonsense'"),
        (("--data_dir", "nowhere"), r"nowhere/synthetic_depth/test does not exist.*prepare_datasets\.py"),
        (("--split", "val"), r"synthetic_depth/val does not exist .*splits test, train"),
        (("--split", "train"), "images without labels"),
        (("--model_path", "nowhere"), "nowhere: no such folder"),
        (("--mixed_precision", "fp16"), "fp16 needs a GPU, found none; use bf16 or no"),
        (("--stride", "32"), "a stride of 32 means nothing without a window"),
        (("--classes", "road"), "--classes chooses what is compared; give several models"),
        (("--ensemble",), "--ensemble needs at least two models, got depth"),
        (("--names", "a", "b"), "--names needs one name for each of depth; got 2: a, b"),
    ],
)
def test_mistakes_are_named_and_write_nothing(model, data, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        eval_madm.main(arguments(model, data, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), r"--model_path names .*run.*/depth twice"),
        (("--names", "a", "A"), "--names must differ, also as names of folders; got a, A"),
        (("--names", "a", "Pictures"), "--names: Pictures would be the folder of a model's results"),
        (
            ("--ensemble",),
            r"models of one task: depth is of 'synthetic_to_depth', infrared of 'synthetic_to_infrared'",
        ),
        (
            ("--classes", "road", "wall"),
            r"infrared \(task synthetic_to_infrared\) has no class 'wall'; classes of all",
        ),
        (("--classes", "tram"), r"depth \(task synthetic_to_depth\) has no class 'tram'; classes of all models: sky,"),
        (("--task", TASK.name), r"infrared is a checkpoint of another task"),
        (("--data_dir", "nowhere"), "nowhere/synthetic_depth/test does not exist"),
    ],
)
def test_models_that_cannot_be_compared(run_folder, model, data, tmp_path, more, message):
    paths = [run_folder] if more else [run_folder, model]
    with pytest.raises(UserError, match=message):
        eval_madm.main(arguments(model, data, tmp_path / "out", "--model_path", *paths, *more))
    assert not (tmp_path / "out").exists()


def test_damage_is_found_before_any_image_and_an_image_names_itself(model, data, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "damaged")
    (tmp_path / "damaged" / "segmenter" / "diffusion_pytorch_model.safetensors").write_bytes(b"not tensors")
    flags = ("--model_path", model, tmp_path / "damaged")
    with pytest.raises(UserError, match="damaged/segmenter"):
        eval_madm.main(arguments(model, data, tmp_path / "out", *flags))
    assert "evaluate" not in capsys.readouterr().err

    rewrite(data, tmp_path / "data", lambda row, k: {"image": {"bytes": b"no", "path": None}} if k == 1 else {})
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(UserError, match=r"cannot be decoded: synthetic_depth/test test/000001\.png \(not an image\)"):
        eval_madm.main(arguments(model, tmp_path / "data", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_labels_without_a_class_of_the_task(model, data, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    config = json.loads((model / "madm_config.json").read_text())
    config["task"]["target_label_map"] = dict.fromkeys(range(11), 255)
    (tmp_path / "model" / "madm_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="labels of synthetic_depth/test hold no class of task synthetic_to_depth"):
        eval_madm.main(arguments(tmp_path / "model", data, tmp_path / "out", "--max_samples", 1))
    assert not (tmp_path / "out").exists()


def test_adapter_of_another_base(data, tmp_path):
    folder = write_model(tmp_path / "lora", unet_tuning="lora")
    shape = ((16, 32, 32, 32), (8, 16, 16))
    base = build_small_stable_diffusion(tmp_path / "base", *shape, norm_groups=4, seed=1)
    with pytest.raises(UserError, match="this model was trained on another base model than .*base, whose weights"):
        eval_madm.main(arguments(folder, data, tmp_path / "out", "--pretrained_model_name_or_path", base))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_model_ends_with_exit_code_2(data, tmp_path):
    command = arguments(data, data, tmp_path / "out")
    done = run_script("eval_madm.py", *command)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: {data} is not a trained model" in done.stderr


def test_a_failed_evaluation_leaves_the_earlier_one(model, data, tmp_path):
    evaluate(model, data, tmp_path / "out", "--max_samples", 1)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.*")}
    shutil.copytree(model, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "segmenter" / "diffusion_pytorch_model.safetensors"
    save_file({k: v * float("nan") if v.is_floating_point() else v for k, v in load_file(weights).items()}, weights)
    with pytest.raises(UserError, match="not finite"):
        eval_madm.main(arguments(tmp_path / "damaged", data, tmp_path / "out"))
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.*")} == before


def test_output_dir_that_cannot_be_written(model, data, run_folder, tmp_path):
    (tmp_path / "infrared").touch()
    with pytest.raises(UserError, match="infrared is a file, where results need a folder"):
        eval_madm.main(arguments(run_folder, "no data", tmp_path))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(UserError, match="is a file; give a folder"):
        eval_madm.main(arguments(model, data, Path(__file__)))
    with pytest.raises(UserError, match="test_eval_madm.py is a file; give a folder"):
        eval_madm.main(arguments(model, data, Path(__file__) / "below"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--batch_size", 0), "--batch_size: expected a positive number, got 0"),
        (("--num_pictures", -1), "--num_pictures: expected a non-negative number, got -1"),
        (("--task", "a", "--task_config", "b"), "--task or --task_config, not both"),
        (("--update_model_card", "--max_samples", 2), "--update_model_card needs the whole split"),
        (("--update_model_card", "--model_path", "a", "b"), "--update_model_card writes into the card of one model"),
        (("--window", 64), "--window needs --protocol native: the published protocol scores the whole image"),
    ],
)
def test_impossible_flags_are_named(tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as stopped:
        eval_madm.main(arguments("m", "d", tmp_path / "out", *more))
    assert stopped.value.code == 2 and message in capsys.readouterr().err
