"""Logs that can be trusted: exact numbers, real event files, resuming, several processes, a full disk, the banner."""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_model import RESOLUTION, new_model, write_data, write_model

from madm_utils import tracking
from madm_utils.cli import UserError
from madm_utils.datasets import EvaluationDataset
from madm_utils.evaluation import evaluate
from madm_utils.modeling_madm import MADMModel
from madm_utils.tasks import TASKS
from madm_utils.tracking import TrainingLog, banner, check_tracker, summary

TASK = TASKS["synthetic_to_depth"]
NAMES = ("road", "sky", "car")
NAN = float("nan")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def start(out: Path, step: int = 0, max_steps: int = 8, report_to: str = "tensorboard", **settings) -> TrainingLog:
    """A log as `train_madm.py` makes it; `settings` may hold what trackers do not take."""
    AcceleratorState._reset_state(reset_partial_state=True)
    out.mkdir(exist_ok=True)
    log_with = None if report_to == "none" else report_to
    project = ProjectConfiguration(str(out), str(out / "logs"))
    accelerator = Accelerator(cpu=True, log_with=log_with, project_config=project)
    settings = {"seed": 1, "lplr_weight": [1.0, 2.0], "revision": None, **settings}
    return TrainingLog(out, accelerator, settings, max_steps, step, 4, report_to, "logs")


def finish(log: TrainingLog) -> None:
    log.close()
    log.accelerator.end_training()


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / tracking.LOG_NAME).read_text().splitlines()]


def events(out: Path) -> EventAccumulator:
    return EventAccumulator(str(out / "logs/madm"), {"images": 0, "scalars": 0}).Reload()


def drawn(out: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(out).Scalars(tag)]


def some_scalars(step: int) -> dict:
    return {
        "source_loss": torch.tensor(0.1 * step),
        "learning_rate": 0.1 / step,
        "confident_fraction": torch.tensor([0.5, NAN, 1 / 3]),
    }


def some_scores(miou: float) -> dict:
    per_class = {"road": {"iou": 2 * miou, "acc": 1.0}, "sky": {"iou": None, "acc": None}}
    return {"split": "test", "num_images": 5, "miou": miou, "pacc": 50.0, "per_class": per_class}


def some_pictures() -> dict:
    image, label = torch.rand(2, 3, 16, 16), torch.randint(0, 11, (2, 16, 16))
    return {"source": image, "source_label": label, "source_logits": torch.randn(2, 11, 16, 16)}


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_numbers_are_exact_in_the_log_and_in_tensorboard(tmp_path):
    log = start(tmp_path)
    loss = torch.tensor(0.1)  # float32, which is another number than 0.1
    log.scalars(1, {"source_loss": loss, "learning_rate": 1e-3, "teacher_timestep": 57, "target_loss": NAN,
                    "confident_fraction": torch.tensor([0.25, NAN, 1.0])}, "", NAMES)  # fmt: skip
    log.validation(1, some_scores(12.5))
    finish(log)
    logged, validated = lines(tmp_path)
    assert set(logged.pop("timing")) == {"images_per_second", "seconds_per_step", "memory_gib", "loader_wait"}
    assert logged == {
        "step": 1, "name": "", "source_loss": float(loss), "learning_rate": 1e-3, "teacher_timestep": 57.0,
        "target_loss": "nan", "confident_fraction": {"road": 0.25, "sky": None, "car": 1.0},
    }  # fmt: skip
    iou = {"road": 25.0, "sky": None}
    expected = {"split": "test", "num_images": 5, "miou": 12.5, "pacc": 50.0, "iou": iou}
    assert validated == {"step": 1, "name": "", "validation": expected}

    assert set(events(tmp_path).Tags()["scalars"]) == {
        "train/source_loss", "train/learning_rate", "train/teacher_timestep", "train/target_loss",
        "train/confident_fraction/road", "train/confident_fraction/car", "train/images_per_second",
        "train/seconds_per_step", "train/memory_gib", "train/loader_wait", "validation/miou", "validation/iou/road",
    }  # fmt: skip
    assert drawn(tmp_path, "train/source_loss") == [(1, float(loss))]
    assert np.isnan(drawn(tmp_path, "train/target_loss")[0][1])
    assert drawn(tmp_path, "validation/iou/road") == [(1, 25.0)]


def test_several_tasks_have_names(tmp_path):
    log = start(tmp_path)
    for name in ("depth", "event"):
        log.scalars(1, some_scalars(1), name, NAMES)
    log.validation(1, some_scores(3.0), "event")
    log.pictures(1, some_pictures(), TASK, "event")
    finish(log)
    assert [(line["step"], line["name"], "validation" in line) for line in lines(tmp_path)] == [
        (1, "depth", False), (1, "event", False), (1, "event", True),
    ]  # fmt: skip
    assert lines(tmp_path)[0]["timing"]["seconds_per_step"] == lines(tmp_path)[1]["timing"]["seconds_per_step"]
    tags = events(tmp_path).Tags()
    assert {"train/depth/source_loss", "train/event/confident_fraction/road", "validation/event/miou",
            "validation/event/iou/road"} <= set(tags["scalars"])  # fmt: skip
    assert tags["images"] == ["validation/event/pictures"]
    assert (tmp_path / "validation/event/step-1.png").exists()


def test_equal_runs_write_equal_lines(tmp_path):
    texts = []
    for name in ("one", "two"):
        log = start(tmp_path / name, report_to="none")
        for step in (1, 2, 3):
            log.scalars(step, some_scalars(step), "", NAMES)
        finish(log)
        assert not (tmp_path / name / "logs").exists()
        found = lines(tmp_path / name)
        timings = [line.pop("timing") for line in found]
        texts.append(json.dumps(found))
    assert texts[0] == texts[1] and all(t["seconds_per_step"] > 0 for t in timings)


@pytest.mark.parametrize("source_only", [False, True])
def test_speed_and_memory(tmp_path, monkeypatch, source_only):
    now = [100.0]
    monkeypatch.setattr(tracking.time, "monotonic", lambda: now[0])
    log = start(tmp_path, source_only=source_only)
    for step, seconds in ((1, 4.0), (3, 1.0)):
        now[0] += seconds
        log.scalars(step, some_scalars(step), "", NAMES)
    finish(log)
    images = 4 if source_only else 8  # 4 pairs per step
    speeds = [(line["timing"]["seconds_per_step"], line["timing"]["images_per_second"]) for line in lines(tmp_path)]
    assert speeds == [(4.0, images / 4), (0.5, images / 0.5)]
    assert log.memory_gib >= 0.9 * psutil.Process().memory_info().rss / 2**30
    assert drawn(tmp_path, "train/memory_gib")[-1][1] == pytest.approx(log.memory_gib)


# --- resuming --------------------------------------------------------------------------------------------------------


def test_resume_leaves_every_step_once(tmp_path):
    """Steps 1 to 4, killed in the middle of a line, resumed at 2, on to 4."""
    log = start(tmp_path)
    for step in (1, 2, 3, 4):
        log.scalars(step, some_scalars(step), "", NAMES)
        log.validation(step, some_scores(step))
        log.pictures(step, some_pictures(), TASK)
    finish(log)
    path = tmp_path / tracking.LOG_NAME
    time.sleep(1)  # event files are read in the order of the second in their name
    before = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(before) + before[0][:17])

    log = start(tmp_path, step=2)
    assert path.read_bytes() == b"".join(before[:4])
    for step in (3, 4):
        log.scalars(step, {**some_scalars(step), "source_loss": 9.0}, "", NAMES)
        log.validation(step, some_scores(step))
        log.pictures(step, some_pictures(), TASK)
    finish(log)
    assert [line["step"] for line in lines(tmp_path)] == [1, 1, 2, 2, 3, 3, 4, 4]
    expected = [(1, np.float32(0.1)), (2, np.float32(0.2)), (3, 9.0), (4, 9.0)]
    assert drawn(tmp_path, "train/source_loss") == expected
    assert [step for step, _ in drawn(tmp_path, "validation/miou")] == [1, 2, 3, 4]
    images = events(tmp_path).Images("validation/pictures")
    assert [image.step for image in images] == [1, 2, 3, 4]
    assert not list(tmp_path.glob(".*"))


def test_what_a_run_left_that_never_reached_a_checkpoint_is_dropped(tmp_path):
    for loss in (1.0, 2.0):
        log = start(tmp_path)
        log.scalars(1, {"source_loss": loss})
        finish(log)
        time.sleep(1)
    assert [line["source_loss"] for line in lines(tmp_path)] == [2.0]
    assert drawn(tmp_path, "train/source_loss") == [(1, 2.0)]


# --- several processes, and a full disk ------------------------------------------------------------------------------


def test_two_processes(tmp_path):
    model, data = write_model(tmp_path / "model"), write_data(tmp_path / "data")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(Path(__file__).with_name("watch_worker.py")), str(model), str(data), str(tmp_path)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"report-{rank}.json").read_text()) for rank in (0, 1))

    # Means over the processes; a class counts where it is defined, a loss that is NaN anywhere is NaN.
    line = lines(tmp_path)[0]
    assert (line["source_loss"], line["target_loss"], line["learning_rate"]) == (1.5, "nan", 0.1)
    assert line["confident_fraction"] == {"road": 0.375, "sky": 0.75, "car": None}
    assert drawn(tmp_path, "train/source_loss") == [(1, 1.5)]
    assert (first["bar_off"], second["bar_off"]) == (False, True)

    # Five images in batches of 2 and of 8: each counted once, and what one process finds.
    assert first["indices"] == [[0, 1, 4], [0, 1, 2, 3, 4]] and second["indices"] == [[2, 3], []]
    accelerator, network = Accelerator(cpu=True), MADMModel.from_pretrained(model)
    dataset = EvaluationDataset(data, network.task, "test", RESOLUTION)
    for batch_size in (2, 8):
        alone = evaluate(network, dataset, accelerator, batch_size)
        assert alone[:-1, :-1].sum() > 0.9 * 5 * RESOLUTION**2
        for report in (first, second):
            np.testing.assert_array_equal(report[f"confusion {batch_size}"], alone)

    assert first["statistics"] and second["statistics"]

    # One process is told to stop, or finds a mistake: both end alike.
    assert first["stopped"] and second["stopped"]
    assert first["damaged"] == second["damaged"] == "image 3 is damaged"
    assert first["not finite"] == second["not finite"] and "not finite" in first["not finite"]

    # Disk full at step 2, room again at step 3.
    assert [line["step"] for line in lines(tmp_path)] == [1, 3]
    for text in ("step 2 is missing in", "step-2.png could not be written", "tensorboard cannot write"):
        assert done.stdout.count(text) == 1 and "Traceback" not in done.stdout
    assert [path.name for path in (tmp_path / "validation").iterdir()] == ["step-3.png"]


# --- for the eye -----------------------------------------------------------------------------------------------------


def test_pictures_in_the_folder_and_in_tensorboard(tmp_path):
    log = start(tmp_path)
    log.pictures(5, some_pictures(), TASK)
    (image,) = events(tmp_path).Images("validation/pictures")  # readable before the log is closed
    finish(log)
    with Image.open(tmp_path / "validation/step-5.png") as picture:
        assert (image.step, image.width, image.height) == (5, *picture.size)
        assert picture.width == 3 * 256 + 4 * 6
    assert not (tmp_path / tracking.LOG_NAME).exists()


def test_progress_bar(tmp_path, capsys):
    log = start(tmp_path, step=2, report_to="none")
    log.scalars(3, {"source_loss": 0.25, "pseudo_label_weight": 0.5, "learning_rate": 1e-3})
    log.advance()
    log.progress.refresh()
    bar = capsys.readouterr().err
    assert "training:  38%" in bar and "3/8" in bar
    assert "source=0.250, lr=1.0e-03, images/s=" in bar
    log.scalars(3, {"source_loss": 0.75, "target_loss": 0.25, "learning_rate": 1e-3}, "depth")
    assert "source=0.250, depth=1.000, lr=" in capsys.readouterr().err
    finish(log)


def test_estimated_time_appears_once(tmp_path, caplog, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tracking.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO, "madm_utils.tracking")
    log = start(tmp_path, step=10, max_steps=1000, report_to="none")
    for seconds in (60, 2, 2, 2, 4, 9, 9):  # the slow first step does not count
        assert "estimated" not in caplog.text or seconds == 9
        now[0] += seconds
        log.advance()
    finish(log)
    assert caplog.text.count("estimated time") == 1
    assert "0:41:02 for 985 more steps of 2.50 s" in caplog.text


def adapter_run(model, name: str, out: Path, **args) -> SimpleNamespace:
    dataset = SimpleNamespace(num_source=3, num_target=4)
    settings = {
        "source_only": False,
        "unet_tuning": model.unet_tuning,
        "train_batch_size": 2,
        "max_train_steps": 50,
        "gradient_accumulation_steps": 3,
        "resolution": 64,
        "data_dir": "my data",
        "streaming": name == "event",
        "output_dir": str(out),
    }
    return SimpleNamespace(
        name=name, task=model.task, model=model, args=SimpleNamespace(**{**settings, **args}), step=8,
        batches=SimpleNamespace(dataset=dataset),
    )  # fmt: skip


def test_banner_counts_what_trains(tmp_path, caplog):
    caplog.set_level(logging.INFO, "madm_utils.tracking")
    accelerator = Accelerator(cpu=True)
    depth = new_model(TASKS["synthetic_to_depth"], "lora", rank=4)
    event = new_model(TASKS["synthetic_to_event"], "lora", rank=2, shared=depth)
    runs = [adapter_run(depth, "depth", tmp_path), adapter_run(event, "event", tmp_path)]
    banner(runs, runs[0].args, accelerator)
    segmenter = depth.segmenter
    parts = {"conditioning": segmenter.conditioning, "projections": segmenter.projections, "head": segmenter.head}
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    for model, rank in ((depth, 4), (event, 2)):
        layers = [m for m in depth.unet.modules() if isinstance(m, BaseTunerLayer)]
        sizes["UNet LoRA"] = rank * sum(m.weight[0].numel() + m.weight.shape[0] for m in layers)
        assert f"trainable parameters: {sum(sizes.values()):,} (" in caplog.text
        for name, size in sizes.items():
            assert size and f"{name} {size:,}" in caplog.text
        assert f"MADM training: {model.task.name}" in caplog.text
    assert "examples: source 3 (synthetic_rgb), target 4 (synthetic_depth)" in caplog.text
    assert "steps: 8 to 50, 64 x 64 pixels" in caplog.text
    assert "effective batch: 6 per task (2 pairs x 1 processes x 3 accumulated)" in caplog.text
    assert "device: 1 x cpu, precision no" in caplog.text

    caplog.clear()
    full = new_model(TASK, "full")
    run = adapter_run(full, "", tmp_path, source_only=True)
    banner([run], run.args, accelerator)
    trained = sum(
        p.numel() for n, p in full.unet.named_parameters() if not n.startswith(("conv_out", "conv_norm_out"))
    )
    assert f"UNet {trained:,}" in caplog.text and "source-only training" in caplog.text
    assert "examples: source 3 (synthetic_rgb), target none" in caplog.text
    assert "effective batch: 6 (2 images x 1" in caplog.text


def test_summary(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tracking.time, "monotonic", lambda: now[0])
    log = start(tmp_path, step=3, report_to="none")
    log.scalars(8, {"source_loss": 0.5, "lplr_source_loss": 0.25, "learning_rate": 1.0})
    log.scalars(8, {"source_loss": 0.125}, "event")
    now[0] = 20.0
    model = SimpleNamespace(unet_tuning="lora", task=TASK)
    runs = [adapter_run(model, name, tmp_path / "out put") for name in ("", "event")]
    state = SimpleNamespace(best={"event": {"step": 6, "miou": 41.237}})
    summary(runs, log, state, log.accelerator)
    finish(log)
    printed = capsys.readouterr().out
    assert "5 steps after 3 of an earlier start in 0:00:20, 2.0 images/s, peak memory " in printed
    assert "last losses: source 0.5000, lplr_source 0.2500\n" in printed
    assert "last losses (event): source 0.1250\nbest validation (event): mIoU 41.24 at step 6\n" in printed
    assert printed.count("best validation") == 1
    assert f"trained model: {tmp_path}/out put\n" in printed
    folder = f"{tmp_path}/out put/event"
    command = (
        f"eval_madm.py --model_path '{folder}' --data_dir 'my data' --output_dir '{folder}/evaluation' --streaming"
    )
    assert f"trained model (event): {folder}\nnext (event): python {command}\n" in printed


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_trackers_that_cannot_be_used():
    check_tracker("tensorboard")
    check_tracker("none")
    with pytest.raises(UserError, match="--report_to tensorbord is unknown; one of .*tensorboard.*or none"):
        check_tracker("tensorbord")
    with pytest.raises(UserError, match="--report_to dvclive is not installed: pip install dvclive, or use"):
        check_tracker("dvclive")
