"""The ablation runs the real scripts, keeps what is done, and says what is wrong."""

import itertools
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from filelock import FileLock

from benchmarks.ablation import RESULTS_LOCK, ROWS, random_base, validation_curve
from madm_utils.modeling_madm import LORA_TARGET_MODULES
from madm_utils.small_model import build_small_stable_diffusion
from madm_utils.train_args import train_parser

ROOT = Path(__file__).parents[1]


def call(out: Path, *flags: object) -> subprocess.CompletedProcess:
    small = ("--num_train", 3, "--num_eval", 2, "--max_train_steps", 2, "--validations", 1, "--modalities", "infrared")
    small += ("--data_dir", out / "data", "--output_dir", out / "results", "--base_model", out / "base")
    small += ("--flags", "--projection_channels 32 --head_channels 16 --rare_class_min_pixels 1 --rank 4")
    command = [sys.executable, "benchmarks/ablation.py", *map(str, small + flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ablation")
    build_small_stable_diffusion(out / "base", (16, 32, 32, 32), (8, 16, 16), norm_groups=4)
    result = call(out, "--rows", "supervised", "madm-lora", "--seeds", 3)
    assert result.returncode == 0, result.stderr + result.stdout
    return out


def record(out: Path) -> dict:
    return json.loads((out / "results/infrared/supervised/seed-3/result-test.json").read_text())


def test_results(done):
    """The ceiling learns from labels of the target; scores are those of eval_madm.py."""
    found, folder = record(done), done / "results/infrared/supervised/seed-3"
    scores = json.loads((folder / "test/metrics.json").read_text())
    assert found["miou"] == scores["miou"] and len(found["iou"]) == 9
    assert found["settings"]["steps"] == 2 and found["seed"] == 3
    assert found["train_cpu_seconds"] > 0 and found["starts"] == 1 and [step for step, _ in found["curve"]] == [2]
    assert (folder / "training/validation/step-2.png").is_file()
    assert json.loads((folder / "training/run.json").read_text())["task"]["source"] == "synthetic_infrared"


def test_flags_override_those_of_a_row(done):
    settings = json.loads((done / "results/infrared/madm-lora/seed-3/training/run.json").read_text())["settings"]
    assert settings["unet_tuning"] == "lora" and settings["rank"] == 4  # the row itself says 32


def test_random_base_differs_in_the_unet_alone(done, tmp_path):
    """Another for every seed, and another when the base model is another."""
    args = Namespace(data_dir=tmp_path, base_model=done / "base")
    folders = [random_base(args, seed) for seed in (0, 1)]
    name = "diffusion_pytorch_model.safetensors"
    unets = {(folder / "unet" / name).read_bytes() for folder in (*folders, done / "base")}
    assert len(unets) == 3
    assert all((folder / "vae" / name).read_bytes() == (done / "base/vae" / name).read_bytes() for folder in folders)
    build_small_stable_diffusion(tmp_path / "base", (16, 32, 32, 32), (8, 16, 16), norm_groups=4, seed=5)
    assert random_base(Namespace(data_dir=tmp_path, base_model=tmp_path / "base"), 0) not in folders


def test_what_is_done_is_kept(done):
    """A result, and a training where only its evaluation is missing."""
    before, folder = record(done), done / "results/infrared/supervised/seed-3"
    again = call(done, "--rows", "supervised", "--seeds", 3)
    assert again.returncode == 0 and f"{before['miou']:.2f}" in again.stdout
    assert record(done) == before
    (folder / "result-test.json").unlink()
    assert call(done, "--rows", "supervised", "--seeds", 3).returncode == 0
    assert record(done) == before and (folder / "log.txt").read_text().count("train_madm.py") == 1


def test_curve_of_an_interrupted_training(tmp_path):
    """One validation twice, lines of losses between."""
    lines = [{"step": 10, "source_loss": 1.0}]
    lines += [{"step": step, "validation": {"miou": miou}} for step, miou in ((20, 3.0), (40, 5.0), (40, 6.0))]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert validation_curve(tmp_path / "log.jsonl") == [(20, 3.0), (40, 6.0)]


def test_errors(done, tmp_path):
    other = call(done, "--rows", "supervised", "--num_train", 4)
    assert other.returncode == 2 and "holds data made with" in other.stderr
    changed = call(done, "--rows", "supervised", "--seeds", 3, "--max_train_steps", 3)
    assert changed.returncode == 2 and "steps: 2 -> 3" in changed.stderr and "other settings" in changed.stderr
    assert "mIoU" not in changed.stdout
    own = call(done, "--rows", "supervised", "--flags=--max_train_steps=9 --source_only")
    assert own.returncode == 2 and "--flags holds --max_train_steps, --source_only" in own.stderr
    made_of = call(done, "--rows", "madm", "lplr", "--flags=--dplg_timestep=50 --rank 4")
    assert made_of.returncode == 2 and "--flags holds --dplg_timestep, which is what the row 'lplr'" in made_of.stderr
    missing = call(done, "--base_model", tmp_path)
    assert missing.returncode == 2 and "holds no model" in missing.stderr
    with FileLock(done / "results" / RESULTS_LOCK):
        second = call(done, "--rows", "supervised", "--seeds", 3)
    assert second.returncode == 2 and "another ablation writes to" in second.stderr


def test_rows_differ_by_what_they_are_called():
    """Every part is on in exactly the rows that are named after it."""
    has_dplg = {name for name, row in ROWS.items() if "--dplg_timestep" not in row.flags and not is_supervised(row)}
    has_lplr = {name for name, row in ROWS.items() if "--lplr_loss" not in row.flags}
    assert has_dplg == {"dplg", "madm", "madm-lora", "madm-random"}
    assert has_lplr == {"lplr", "madm", "madm-lora", "madm-random"}
    assert {name for name, row in ROWS.items() if is_supervised(row)} == {"source-only", "supervised"}


def test_the_lora_is_the_default_one():
    flags = ROWS["madm-lora"].flags
    explicit = dict(zip(flags[::2], flags[1::2], strict=True))
    assert explicit.pop("--lora_layers").split(",") == list(LORA_TARGET_MODULES)
    needed = [
        "--task",
        "synthetic_to_depth",
        "--data_dir",
        "x",
        "--pretrained_model_name_or_path",
        "x",
        "--output_dir",
        "x",
    ]
    assert explicit.keys() == {"--unet_tuning", "--rank", "--lora_lr_multiplier"}
    given = train_parser("").parse_args([*needed, *itertools.chain(*explicit.items())])
    assert given == train_parser("").parse_args(needed)


def is_supervised(row) -> bool:
    return "--source_only" in row.flags
