"""The ablation runs the real scripts, keeps what is done, and says what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.ablation import ROWS
from madm_utils.small_model import build_small_stable_diffusion

ROOT = Path(__file__).parents[1]


def call(out: Path, *flags: object) -> subprocess.CompletedProcess:
    small = ("--num_train", 3, "--num_eval", 2, "--max_train_steps", 2, "--validations", 1, "--modalities", "infrared")
    small += ("--data_dir", out / "data", "--output_dir", out / "results", "--base_model", out / "base")
    small += ("--flags", "--projection_channels 32 --head_channels 16 --rare_class_min_pixels 1")
    command = [sys.executable, "benchmarks/ablation.py", *map(str, small + flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ablation")
    build_small_stable_diffusion(out / "base", (16, 32, 32, 32), (8, 16, 16), norm_groups=4)
    result = call(out, "--rows", "madm-random", "supervised", "--seeds", 3)
    assert result.returncode == 0, result.stderr + result.stdout
    return out


def record(out: Path, row: str) -> dict:
    return json.loads((out / f"results/infrared/{row}/seed-3/result.json").read_text())


def test_results(done):
    for row in ("madm-random", "supervised"):
        found = record(done, row)
        scores = json.loads((done / f"results/infrared/{row}/seed-3/test/metrics.json").read_text())
        assert found["miou"] == scores["miou"] and len(found["iou"]) == 9
        assert found["steps"] == 2 and found["seed"] == 3 and found["train_cpu_seconds"] > 0
        assert (done / f"results/infrared/{row}/seed-3/training/validation/step-2.png").is_file()


def test_the_ceiling_learns_from_target_labels_and_the_random_row_from_a_new_unet(done):
    runs = {row: done / f"results/infrared/{row}/seed-3/training/run.json" for row in ("madm-random", "supervised")}
    settings = {row: json.loads(path.read_text()) for row, path in runs.items()}
    assert settings["supervised"]["task"]["source"] == "synthetic_infrared"
    assert settings["madm-random"]["task"]["source"] == "synthetic_rgb"
    base, random = done / "base", done / "data/random-base"
    name = "diffusion_pytorch_model.safetensors"
    assert (base / "unet" / name).read_bytes() != (random / "unet" / name).read_bytes()
    assert (base / "vae" / name).read_bytes() == (random / "vae" / name).read_bytes()


def test_what_is_done_is_kept(done):
    before = record(done, "supervised")
    again = call(done, "--rows", "supervised", "--seeds", 3)
    assert again.returncode == 0 and f"{before['miou']:.2f}" in again.stdout
    assert record(done, "supervised") == before


def test_errors(done, tmp_path):
    other = call(done, "--rows", "supervised", "--num_train", 4)
    assert other.returncode == 2 and "holds data made with" in other.stderr
    missing = call(done, "--base_model", tmp_path)
    assert missing.returncode == 2 and "holds no model" in missing.stderr


def test_rows_differ_by_what_they_are_called():
    """Every part is on in exactly the rows that are named after it."""
    has_dplg = {name for name, row in ROWS.items() if "--dplg_timestep" not in row.flags and not is_supervised(row)}
    has_lplr = {name for name, row in ROWS.items() if "--lplr_loss" not in row.flags}
    assert has_dplg == {"dplg", "madm", "madm-lora", "madm-random"}
    assert has_lplr == {"lplr", "madm", "madm-lora", "madm-random"}
    assert {name for name, row in ROWS.items() if is_supervised(row)} == {"source-only", "supervised"}


def is_supervised(row) -> bool:
    return "--source_only" in row.flags
