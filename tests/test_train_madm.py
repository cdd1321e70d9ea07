"""The real scripts as subprocesses: raw layouts -> prepare -> train -> evaluate -> predict, resume, and mistakes."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from accelerate.state import AcceleratorState
from fork_server import run_script
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_model import RESOLUTION, base_folder, write_data

import train_madm
from madm_utils.cli import UserError
from madm_utils.raw_layouts import write_raw_layouts
from madm_utils.tasks import TASKS
from madm_utils.train_args import train_parser

ROOT = Path(__file__).parent.parent
WIDTHS = ("--projection_channels", "32", "--bottleneck_channels", "32", "--head_channels", "16", "--rank", "4")
TARGET_IMAGES = {"depth": "DELIVER/depth", "infrared": "FMB/test/Infrared", "event": "DSEC/69mask_test_edges"}
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}


PYTHON = (sys.executable,)


def script(
    name: str, *flags, check: bool = True, launcher: tuple = (), processes: int = 1
) -> subprocess.CompletedProcess:
    """Run a script of the repository, by default forked from a process that has the libraries imported.

    Args:
        name: of the script.
        flags: of its command line.
        check: expect success.
        launcher: start it with this command instead, e.g. `PYTHON`.
        processes: how many, without a launcher.
    """
    if launcher:
        command = [*launcher, str(ROOT / name), *map(str, flags)]
        done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD)
    else:
        done = run_script(name, *flags, processes=processes)
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def train_flags(data: Path, out: Path, *more, task: str = "synthetic_to_depth") -> list[str]:
    paths = ("--data_dir", data, "--output_dir", out, "--pretrained_model_name_or_path", base_folder())
    small = ("--resolution", RESOLUTION, *WIDTHS, "--dataloader_num_workers", 0, "--rare_class_min_pixels", 10)
    return [str(f) for f in ("--task", task, *paths, *small, "--max_train_steps", 2, "--logging_steps", 1, *more)]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """In-process calls must not inherit the precision of the one before."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw") / "trees"
    write_raw_layouts(folder, num_train=4, num_test=2, seed=0, height=96, progress=False)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    ("name", "tuning"),
    [
        ("cityscapes_to_deliver_depth", "lora"),
        ("cityscapes_to_fmb_infrared", "lora"),
        ("cityscapes_to_dsec_event", "full"),
    ],
)
def test_every_published_task_end_to_end(name, tuning, raw, tmp_path_factory):
    """prepare -> two steps -> evaluate -> predict on a tree in the official layout; once with preparation and
    training started as users do."""
    task, folder = TASKS[name], tmp_path_factory.mktemp(name)
    run = functools.partial(script, launcher=PYTHON if tuning == "full" else ())
    run("prepare_datasets.py", "--task", name, "--raw_dir", raw, "--output_dir", folder / "data", "--verify")
    out = folder / tuning
    run("train_madm.py", *train_flags(folder / "data", out, "--unet_tuning", tuning, task=name))
    expected = {"madm_config.json", "run.json", "README.md", "segmenter", "teacher", "logs", "training_log.jsonl"}
    expected |= {"model_index.json", "pipeline.py"}
    expected.add("unet" if tuning == "full" else "pytorch_lora_weights.safetensors")
    assert {p.name for p in out.iterdir()} == expected | {"checkpoint-2"}
    record = json.loads((out / "run.json").read_text())
    for key, value in task.hyperparameters.items():
        assert record["settings"][key] == value
    assert record["task"]["class_names"] == list(task.class_names) and "torch" in record["versions"]

    script("eval_madm.py", "--model_path", out, "--data_dir", folder / "data", "--output_dir", out / "evaluation")
    metrics = json.loads((out / "evaluation/metrics.json").read_text())
    assert metrics["task"] == name and metrics["num_images"] == 2
    assert list(metrics["per_class"]) == list(task.class_names)

    pictures = next((raw / TARGET_IMAGES[task.modality]).rglob("*.png")).parent
    script("predict_madm.py", "--model_path", out, "--input", pictures, "--output_dir", out / "predictions")
    inputs = sorted(pictures.glob("*.png"))
    for path in inputs:
        label = Image.open(out / "predictions" / f"{path.stem}_label.png")
        assert label.size == Image.open(path).size and np.asarray(label).max() < task.num_classes
    assert inputs


def scalars(out: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(out / "logs/madm"))
    events.Reload()
    return {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def weights(out: Path) -> dict[str, bytes]:
    paths = [p for p in out.rglob("*.safetensors") if not p.relative_to(out).parts[0].startswith("checkpoint")]
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in paths}


@pytest.fixture(scope="module")
def finished_run(data, tmp_path_factory):
    """Four steps with a checkpoint, a picture and a log entry at every second step."""
    out = tmp_path_factory.mktemp("run") / "out"
    steps = ("--max_train_steps", 4, "--checkpointing_steps", 1, "--checkpoints_total_limit", 2)
    train_madm_run(data, out, *steps, "--validation_steps", 2)
    return out


def train_madm_run(data, out, *more, **options):
    return script("train_madm.py", *train_flags(data, out, *more), **options)


def test_logs_pictures_and_rotation(finished_run):
    logged = scalars(finished_run)
    per_class = {tag for tag in logged if tag.startswith("train/confident_fraction/")}
    names = {"source_loss", "target_loss", "lplr_source_loss", "lplr_target_loss", "pseudo_label_weight"}
    names |= {"teacher_timestep", "learning_rate", "gradient_norm"}
    names |= {"memory_gib", "images_per_second", "seconds_per_step", "loader_wait"}
    assert {f"train/{name}" for name in names} == set(logged) - per_class
    assert all(np.isfinite(values).all() for values in logged.values())
    assert all(len(logged[tag]) == 4 for tag in set(logged) - per_class) and per_class
    assert logged["train/teacher_timestep"][0] in (60, 61)
    assert max(logged["train/learning_rate"]) == pytest.approx(1e-4 * 10)  # the task's, times that of a LoRA
    assert {p.name for p in finished_run.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}
    for step in (2, 4):
        assert Image.open(finished_run / f"validation/step-{step}.png").width > 9 * 128
    assert not [p for p in finished_run.rglob("*") if p.suffix in (".pt", ".bin", ".pkl", ".pth")]


def test_equal_settings_give_equal_weights(finished_run, data, tmp_path):
    train_madm_run(data, tmp_path / "again", "--max_train_steps", 4, "--dataloader_num_workers", 2)
    assert weights(tmp_path / "again") == weights(finished_run)


def test_checkpoint_is_a_model(finished_run, data, tmp_path):
    script(
        "eval_madm.py",
        "--model_path",
        finished_run / "checkpoint-3",
        "--data_dir",
        data,
        "--output_dir",
        tmp_path / "e",
    )
    assert (tmp_path / "e/metrics.json").exists()


def test_source_only(data, tmp_path):
    """No target image is read (there is none here), no teacher is kept."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/synthetic_rgb").symlink_to(data / "synthetic_rgb")
    train_madm_run(tmp_path / "data", tmp_path / "out", "--source_only")
    assert not (tmp_path / "out/teacher").exists()
    assert set(scalars(tmp_path / "out")) >= {"train/source_loss"}
    assert "train/target_loss" not in scalars(tmp_path / "out")


def test_own_task_with_accumulation_8bit_and_bf16(data, tmp_path):
    """A user's task file: three classes on the synthetic data. Resumed under 8-bit AdamW, it ends the same."""
    task = {
        "name": "mine", "source": "synthetic_rgb", "target": "synthetic_infrared", "modality": "infrared",
        "class_names": ["ground", "sky", "thing"], "palette": [[128, 64, 128], [70, 130, 180], [0, 0, 142]],
        "source_label_map": {i: {5: 0, 6: 0, 0: 1}.get(i, 2) for i in range(11)},
        "target_label_map": {i: {5: 0, 6: 0, 0: 1}.get(i, 255) for i in range(11)},
        "resolution": 64, "source_size": [64, 64], "target_size": [64, 80],
        "hyperparameters": {"max_train_steps": 2, "learning_rate": 0.001, "lplr_loss": "source"},
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(task))
    flags = train_flags(data, tmp_path / "out", "--gradient_accumulation_steps", 2, "--use_8bit_adam")
    flags = ["--task_config", str(tmp_path / "mine.yaml"), *flags[2:], "--mixed_precision", "bf16"]
    flags += ["--gradient_checkpointing", "--lr_scheduler", "cosine", "--checkpointing_steps", "1"]
    script("train_madm.py", *flags)
    last, again = tmp_path / "out/checkpoint-2", tmp_path / "uninterrupted"
    last.rename(again)
    script("train_madm.py", *flags, "--resume_from_checkpoint", "checkpoint-1")
    for name in ("training_state.safetensors", "segmenter/diffusion_pytorch_model.safetensors"):
        assert (last / name).read_bytes() == (again / name).read_bytes()
    flags = ("--model_path", tmp_path / "out", "--data_dir", data, "--output_dir", tmp_path / "e")
    script("eval_madm.py", *flags, "--task_config", tmp_path / "mine.yaml")
    assert list(json.loads((tmp_path / "e/metrics.json").read_text())["per_class"]) == task["class_names"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--unet_tuning", "lora"),
        ("--unet_tuning", "full", "--train_unet_output_layers", "--lplr_loss", "source",
         "--gradient_accumulation_steps", 2),
    ],
)  # fmt: skip
def test_two_processes(flags, data, tmp_path):
    """Two gloo processes train one model: equal parameters and teachers, statistics of their own, every gradient
    reduced once per step, and one of them writes."""
    more = ("--checkpointing_steps", 1, *flags)
    flags = train_flags(data, tmp_path / "out", *more)
    done = script("tests/two_processes.py", tmp_path / "report.json", *flags, processes=2)
    assert "2 x cpu" in done.stdout and done.stdout.count("trained model") == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["parameters"] == report["teacher"] == 0.0
    assert report["statistics"] > 0.0
    assert report["reduced"] == 2 * report["trainable"]
    assert report["in_order"] and not (tmp_path / "out-rank1").exists()
    assert json.loads((tmp_path / "out/run.json").read_text())["num_processes"] == 2
    assert (tmp_path / "out/checkpoint-1").is_dir()


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_messages_of_the_script(data, tmp_path):
    """Exit code 2, one line, no traceback, nothing written: through the real script once."""
    for flags, message in (
        (train_flags(data, tmp_path / "o", task="unknown"), "error: unknown task 'unknown'"),
        (train_flags(tmp_path / "absent", tmp_path / "o"), "prepare_datasets.py"),
    ):
        done = script("train_madm.py", *flags, check=False)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
        assert not (tmp_path / "o").exists()


def test_output_dir_of_another_run(finished_run, data):
    with pytest.raises(UserError, match="already holds a run.*--resume_from_checkpoint latest"):
        train_madm.main(train_flags(data, finished_run))


def test_output_dir_is_a_file(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; give a folder"):
        train_madm.main(train_flags(data, tmp_path / "file"))


def test_nothing_to_resume(data, tmp_path):
    with pytest.raises(UserError, match="no checkpoint-"):
        train_madm.main(train_flags(data, tmp_path / "o", "--resume_from_checkpoint", "latest"))


def test_resume_from_something_else(finished_run, data, tmp_path):
    flags = ("--resume_from_checkpoint", "checkpoint-77")
    with pytest.raises(UserError, match="no training checkpoint .*checkpoint-3, checkpoint-4"):
        train_madm.main(train_flags(data, finished_run, *flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--learning_rate", "5"), "learning_rate: 0.0001 -> 5.0"),
        (("--unet_tuning", "full"), "unet_tuning: lora -> full"),
        (("--mixed_precision", "bf16"), "mixed_precision: no -> bf16"),
    ],
)
def test_resume_as_another_run(flags, message, finished_run, data):
    """A checkpoint of another task, model or setting: the message says what changed, and nothing is overwritten."""
    record = (finished_run / "run.json").read_bytes()
    with pytest.raises(UserError, match="other settings .*" + message):
        train_madm.main(train_flags(data, finished_run, "--resume_from_checkpoint", "latest", *flags))
    assert (finished_run / "run.json").read_bytes() == record


def test_resume_of_another_folder_over_a_run(finished_run, data, tmp_path):
    train_madm_run(data, tmp_path / "other")
    with pytest.raises(UserError, match="belongs to another one; give a new --output_dir"):
        flags = ("--resume_from_checkpoint", finished_run / "checkpoint-3")
        train_madm.main(train_flags(data, tmp_path / "other", *flags))


def test_finished_run_can_be_extended(finished_run, data, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished_run, out)
    done = train_madm_run(data, out, "--max_train_steps", 5, "--resume_from_checkpoint", "latest")
    assert "max_train_steps: 4 -> 5" in done.stdout and "at step 4" in done.stdout


def test_finished_run_without_checkpoints_does_not_offer_to_resume(finished_run, data, tmp_path):
    shutil.copytree(finished_run, tmp_path / "out", ignore=shutil.ignore_patterns("checkpoint-*"))
    with pytest.raises(UserError, match="already holds a run; give another folder, or delete this one$"):
        train_madm.main(train_flags(data, tmp_path / "out"))


def test_run_that_died_before_its_first_checkpoint_starts_over(data, tmp_path):
    """Its record and logs are no reason to refuse; half-written checkpoints are removed."""
    (tmp_path / "out/.checkpoint-1.tmp-7").mkdir(parents=True)
    (tmp_path / "out/run.json").write_text("{}")
    train_madm_run(data, tmp_path / "out")
    assert not (tmp_path / "out/.checkpoint-1.tmp-7").exists()
    assert json.loads((tmp_path / "out/run.json").read_text())["settings"]["task"] == "synthetic_to_depth"


def test_fp16_without_a_gpu(data, tmp_path):
    with pytest.raises(UserError, match="fp16 needs a GPU, found none"):
        train_madm.main(train_flags(data, tmp_path / "o", "--mixed_precision", "fp16"))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(("name", "message"), [("foo", "foo is unknown; one of"), ("wandb", "pip install wandb")])
def test_trackers_that_are_not_there(name, message, data, tmp_path):
    with pytest.raises(UserError, match=message):
        train_madm.main(train_flags(data, tmp_path / "o", "--report_to", name))


def test_checkpoint_of_another_task(finished_run, data, tmp_path):
    flags = ("--model_path", finished_run, "--data_dir", data, "--output_dir", tmp_path / "e")
    done = script("eval_madm.py", *flags, "--task", "synthetic_to_event", check=False)
    assert done.returncode == 2 and "synthetic_to_depth" in done.stderr and "synthetic_to_event" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--resolution", "100"), "--resolution must be a multiple of 64, got 100"),
        (("--dplg_timestep", "61", "60"), "--dplg_timestep takes T or LOW HIGH"),
        (("--lora_layers", "to_k,,to_q"), "expected names with commas between them, got 'to_k,,to_q'"),
        (("--dplg_timestep", "2000"), "from 0 to 999, got 2000"),
        (("--lplr_weight", "1", "2", "3"), "--lplr_weight takes one number"),
        (("--projection_channels", "48"), "--projection_channels must be a multiple of 32"),
        (("--projection_channels", "160"), "above 128 must be a multiple of 128"),
        (("--train_unet_output_layers",), "needs --unet_tuning full"),
        (("--unet_tuning", "full", "--quantize_base", "nf4"), "--quantize_base needs --unet_tuning lora"),
        (("--preempt_signal", "KILL"), "expected HUP, USR1 or USR2, got KILL"),
        (("--unet_tuning", "full", "--train_unet_output_layers", "--lplr_loss", "none"), "needs latent regression"),
        (("--learning_rate", "-1"), "expected a positive number, got -1"),
        (("--ema_decay", "2"), "expected a number from 0 to 1, got 2"),
        (("--learning_rate", "nan"), "expected a positive number, got nan"),
        (("--adam_beta2", "1"), "expected a number from 0 to below 1, got 1"),
        (("--seed", "-1"), "expected a number from 0 to 4294967295, got -1"),
        (("--logging_dir", "/logs"), "--logging_dir is a folder inside --output_dir"),
    ],
)
def test_bad_flags(flags, message, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train_madm.main(train_flags(data, tmp_path / "o", *flags))
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_every_flag_is_read():
    """A flag that nobody reads is a lie in `--help`."""
    names = ("run_folder", "engines", "tracking", "evaluation", "draws")
    readers = ("train_madm.py", *(f"madm_utils/{name}.py" for name in names))
    source = "".join((ROOT / name).read_text() for name in readers)
    for action in train_parser("")._actions:
        assert action.help
        if action.dest not in ("help", "task", "task_config"):
            assert re.search(rf"args\.{action.dest}\b", source), action.dest


def test_help_is_quick_and_complete():
    done = script("train_madm.py", "--help", launcher=PYTHON)
    assert "--pseudo_label_threshold" in done.stdout and "accelerate launch" in done.stdout
