"""`make demo` in small: the real scripts, one after the other, on the model of the repository."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from madm_utils.cli import UserError
from recipes import demo
from recipes.demo import format_gain

ROOT = Path(__file__).parents[1]
FLAGS = ("--task", "synthetic_to_depth", "--steps", "2", "--num_train", "3", "--num_test", "2", "--batch_size", "1")


def run(*flags: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "recipes/demo.py", *map(str, flags)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_it_prepares_trains_evaluates_and_shows(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "of-an-earlier-demo").touch()
    done = run(*FLAGS, "--output_dir", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    adapted, source_only = (results["metrics"][name] for name in ("adapted", "source-only"))
    folders = {"adapted": "adapted", "source-only": "source_only"}
    for name, folder in folders.items():
        assert results["metrics"][name] == json.loads((tmp_path / folder / "evaluation/metrics.json").read_text())
        settings = json.loads((tmp_path / folder / "run.json").read_text())["settings"]
        assert settings["max_train_steps"] == 2 and settings["dplg_end_step"] == 1
        assert settings["source_only"] == (name == "source-only")
        assert "street-diffusion-small" in settings["pretrained_model_name_or_path"]
    assert adapted["num_images"] == 2 and adapted["task"] == "synthetic_to_depth"
    assert format_gain(results["metrics"]) in done.stdout
    assert f"-- miou{source_only['miou']:>23.2f}{adapted['miou']:>14.2f}" in done.stdout
    assert len(results["commands"]) == 5 and all(line.startswith("python ") for line in results["commands"])
    picture = Image.open(tmp_path / "comparison.png")
    assert picture.width > 4 * 256 and picture.height > 2 * 128
    assert "<html" in (tmp_path / "index.html").read_text()
    assert not (tmp_path / "data" / "of-an-earlier-demo").exists()


def test_gain():
    gain = format_gain({"source-only": {"miou": 17.6}, "adapted": {"miou": 33.28}})
    assert gain == "Adaptation: +15.68 mIoU (17.60 -> 33.28)"


def test_a_flag_that_cannot_be_costs_no_earlier_results(tmp_path, capsys):
    (tmp_path / "results.json").touch()
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--steps", "0", "--output_dir", str(tmp_path)])
    assert stopped.value.code == 2 and "expected a positive number, got 0" in capsys.readouterr().err
    assert (tmp_path / "results.json").exists()


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match="--output_dir .*taken is a file"):
        demo.main(["--output_dir", str(tmp_path / "taken")])
