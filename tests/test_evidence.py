"""Tables and verdicts of docs/evidence.md from result files with numbers that can be computed by hand."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import evidence
from benchmarks.ablation import MODALITIES, ROWS
from benchmarks.common import ROOT
from madm_utils.cli import UserError

# mIoU of seeds 0, 1 and 2 where all modalities are alike.
SCORES = {
    "source-only": (30.0, 32.0, 31.0),
    "self-training": (35.0, 35.0, 35.0),
    "dplg": (36.0, 38.0, 37.0),
    "lplr": (34.0, 35.0, 36.0),
    "madm": (44.0, 46.0, 45.0),
    "madm-lora": (42.0, 43.5, 42.0),
    "madm-random": (41.0, 43.0, 42.0),
    "supervised": (61.0, 63.0, 62.0),
}


def write(folder: Path, modality: str, row: str, seed: int, miou: float, **changes) -> None:
    place = folder / modality / row / f"seed-{seed}"
    (place / "training/validation").mkdir(parents=True)
    record = {
        "modality": modality, "row": row, "seed": seed, "split": "test",
        "settings": {"steps": 100, "flags": ["--rank", "4", "--dplg_end_step", "50" if modality == "depth" else "80"],
                     "row_flags": list(ROWS[row].flags), "more_flags": [], "num_train": 9, "num_eval": 7,
                     "hyperparameters": {"learning_rate": 3e-4, "lplr_loss": modality, "dplg_end_step": 7},
                     "validations": 2, "base_model": "abc", "scenes": "def"},
        "miou": miou, "iou": {"sky": 90.0 + seed, "a|b": None}, "curve": [(50, miou - 2), (100, miou - 1)],
        "starts": 1, "train_seconds": 120.0, "train_cpu_seconds": 60.0, "parallel": 2,
        "num_threads": 1, "machine": "a machine", "date": f"2026-01-0{seed + 1}",
    }  # fmt: skip
    (place / "result-test.json").write_text(json.dumps(record | changes))
    for step in (50, 100):
        Image.new("RGB", (4, 4), (step, 0, 0)).save(place / f"training/validation/step-{step}.png")


@pytest.fixture
def results(tmp_path) -> Path:
    for modality in MODALITIES:
        for row, scores in SCORES.items():
            for seed, miou in enumerate(scores):
                write(tmp_path / "results", modality, row, seed, miou)
    return tmp_path / "results"


def text_of(results: Path, out: Path) -> str:
    evidence.main(["--results", str(results), "--output", str(out / "docs/evidence.md")])
    return (out / "docs/evidence.md").read_text()


def test_tables(results, tmp_path):
    text = text_of(results, tmp_path)
    assert "a pre-trained model that is not in the repository (digest of its weights: abc)" in text
    cell = "31.0 ± 1.0"
    assert f"| source only | {cell} | {cell} | {cell} | 31.0 |" in text
    assert "at least 8 on each | +14.00 ± 0.00, +14.00 ± 0.00, +14.00 ± 0.00 | met |" in text
    assert "at least 12 on average | +14.00 ± 0.00 | met |" in text
    gain = "+10.00 ± 1.00"
    assert f"MADM above plain self-training on each | {gain}, {gain}, {gain} | met |" in text
    assert "DPLG alone positive on average | +2.00 ± 1.00 | met |" in text
    assert "LPLR alone positive on average | +0.00 ± 1.00 | **missed** |" in text  # none is not a gain
    assert "LPLR beside DPLG positive on average | +8.00 ± 0.00 | met |" in text
    assert "at least 5 on average | +3.00 ± 0.00 | **missed** |" in text
    gain = "-2.50 ± 0.50"
    assert f"LoRA within 2 of full tuning on each | {gain}, {gain}, {gain} | **missed** |" in text
    assert "at least 60 mIoU on each | 62.0 ± 1.0, 62.0 ± 1.0, 62.0 ± 1.0 | met |" in text
    assert "| sky | 91 |" in text and "| MADM with LoRA | 100 | 2.0 | 1.0 |" in text
    assert "    --rank 4\n" in text and "9 training scenes per domain, 7 validation and 7 test scenes." in text
    assert "| `learning_rate` | 0.0003 | 0.0003 | 0.0003 |\n| `lplr_loss` | depth | infrared | event |\n\n" in text
    assert "2 trainings side by side, CPU threads of each: 1." in text
    assert "72 trainings, a machine, 2026-01-01 to 2026-01-03" in text
    assert Image.open(tmp_path / "docs/images/evidence_curves.png").width > 500
    late = tmp_path / "docs/images/evidence_depth_dplg_seed-0_late.png"
    assert Image.open(late).getpixel((0, 0))[0] == 100 and f"images/{late.name}" in text


def test_what_was_not_run_is_said(results, tmp_path):
    for path in results.glob("event/madm/seed-*/result-test.json"):
        path.unlink()
    text = text_of(results, tmp_path)
    title = ROWS["madm"].title
    assert f"| {title} | 45.0 ± 1.0 | 45.0 ± 1.0 | not run | - |" in text
    assert "at least 12 on average | not run | not measured |" in text
    assert "at least 8 on each | +14.00 ± 0.00, +14.00 ± 0.00, not run | not measured |" in text


def test_flags_of_the_whole_suite(results, tmp_path):
    for path in results.glob("*/*/seed-*/result-test.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"settings": record["settings"] | {"more_flags": ["--rank", "64"]}}))
    text = text_of(results, tmp_path)
    assert text.index("- MADM with LoRA: `--unet_tuning lora") < text.index("And all of them, last: `--rank 64`")
    assert "experiments.md#" not in text  # reasons and remarks are those of the suite in the repository


def test_two_seeds_are_too_few_for_a_verdict(results, tmp_path):
    (results / "depth/supervised/seed-1/result-test.json").unlink()
    text = text_of(results, tmp_path)
    assert "| supervised on the target | 61.5 ± 0.7 (2 seeds) |" in text
    assert "at least 60 mIoU on each | 61.5 ± 0.7 (2 seeds), 62.0 ± 1.0, 62.0 ± 1.0 | too few seeds |" in text


def test_what_is_left_of_deleted_and_interrupted_trainings(results, tmp_path):
    """Tables and curves need the records alone; a cost that is not of one go is not in the mean."""
    shutil.rmtree(results / "infrared/dplg/seed-0/training")
    for seed in range(3):
        shutil.rmtree(results / f"depth/self-training/seed-{seed}/training")
    for modality in MODALITIES:
        path = results / modality / "madm/seed-0/result-test.json"
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"starts": 2, "train_seconds": 9e9, "curve": record["curve"][:1]}))
    path = (
        results / "depth/madm/seed-1/result-test.json"
    )  # killed after its model was written, before its seconds were
    path.write_text(json.dumps(json.loads(path.read_text()) | {"train_seconds": 0.0, "train_cpu_seconds": 0.0}))
    text = text_of(results, tmp_path)
    assert f"| {ROWS['madm'].title} | 100 | 2.0 | 1.0 |" in text
    # pictures come in pairs: of infrared from another seed, of depth none
    assert "images/evidence_depth" not in text and "images/evidence_infrared_dplg_seed-1_late.png" in text
    assert "images/evidence_infrared_self-training_seed-1_early.png" in text and "infrared_dplg_seed-0" not in text


def test_pictures_outlive_the_trainings(results, tmp_path):
    text = text_of(results, tmp_path)
    for folder in results.glob("*/*/seed-*/training"):
        shutil.rmtree(folder)
    assert text.count("images/evidence_") == 1 + 3 * 2 * 2
    assert text_of(results, tmp_path) == text


def test_the_document_of_the_repository(tmp_path):
    """Nothing in it is typed by hand: it comes from the result files beside the benchmark."""
    shutil.copytree(ROOT / "docs/images", tmp_path / "docs/images")
    assert text_of(ROOT / "benchmarks/results/ablation", tmp_path) == (ROOT / "docs/evidence.md").read_text()


def test_gain_is_of_shared_seeds(tmp_path):
    for seed, miou in enumerate((40.0, 41.0, 42.0, 90.0)):
        write(tmp_path, "depth", "madm", seed, miou)
    for seed in range(3):
        write(tmp_path, "depth", "source-only", seed, 30.0)
    assert evidence.load(tmp_path).gains("madm", "source-only", ["depth"]) == [10.0, 11.0, 12.0]


def test_average_gain_is_of_seeds_that_all_modalities_have(results):
    for seed in (1, 2):
        shutil.rmtree(results / f"event/madm/seed-{seed}")
    write(results, "event", "madm", 2, 60.0)
    assert evidence.load(results).gains("madm", "dplg", MODALITIES) == [8.0, (8.0 + 8.0 + 23.0) / 3]


def test_errors(tmp_path):
    with pytest.raises(UserError, match="holds no result-test.json"):
        evidence.load(tmp_path)
    write(tmp_path, "depth", "madm", 0, 40.0)
    write(tmp_path, "depth", "madm", 1, 40.0)
    path = tmp_path / "depth/madm/seed-1/result-test.json"
    record = json.loads(path.read_text())

    def with_settings(path: Path, **changes) -> None:
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"settings": original | changes}))

    original = record["settings"]
    with_settings(path, steps=7)
    with pytest.raises(UserError, match="differ in steps: 100 and 7"):
        evidence.load(tmp_path)
    with_settings(path, flags=["--rank", "4", "--dplg_end_step", "60"])
    with pytest.raises(UserError, match="differ in flags: .*'50'. and .*'60'.; a table needs results of one suite"):
        evidence.load(tmp_path)
    with_settings(path, hyperparameters={"learning_rate": 2e-4})
    with pytest.raises(UserError, match="differ in hyperparameters: .*0.0003.* and .*0.0002"):
        evidence.load(tmp_path)
    with_settings(path)
    write(tmp_path, "event", "madm", 0, 40.0)  # hyper-parameters of its own, but no flags
    evidence.load(tmp_path)
    with_settings(tmp_path / "event/madm/seed-0/result-test.json", flags=["--rank", "5", "--dplg_end_step", "80"])
    with pytest.raises(UserError, match="differ in flags: .'--rank', '4'. and .'--rank', '5'."):
        evidence.load(tmp_path)
    with_settings(tmp_path / "event/madm/seed-0/result-test.json")
    path.write_text(json.dumps(record | {"settings": record["settings"] | {"row_flags": ["--ema_decay", "0.9"]}}))
    with pytest.raises(
        UserError, match="seed-1 was trained with the row's flags .'--ema_decay', '0.9'., which now are"
    ):
        evidence.load(tmp_path)
