"""Tables and verdicts of docs/evidence.md from result files with numbers that can be computed by hand."""

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import evidence
from benchmarks.ablation import MODALITIES, ROWS
from madm_utils.cli import UserError

# mIoU of seeds 0 and 1 where all modalities are alike.
SCORES = {
    "source-only": (30.0, 32.0),
    "self-training": (35.0, 35.0),
    "dplg": (36.0, 38.0),
    "lplr": (34.0, 35.0),
    "madm": (44.0, 46.0),
    "madm-lora": (42.0, 43.5),
    "madm-random": (41.0, 43.0),
    "supervised": (61.0, 63.0),
}


def write(folder: Path, modality: str, row: str, seed: int, miou: float, **changes) -> None:
    place = folder / modality / row / f"seed-{seed}"
    (place / "training/validation").mkdir(parents=True)
    record = {
        "modality": modality, "row": row, "seed": seed, "split": "test", "flags": ["--rank", "4", "--seed", "0"],
        "miou": miou, "iou": {"sky": 90.0 + seed, "a|b": None}, "train_seconds": 120.0, "train_cpu_seconds": 60.0,
        "resumed": False, "steps": 100, "machine": "a machine", "date": f"2026-01-0{seed + 1}",
    }  # fmt: skip
    (place / "result.json").write_text(json.dumps(record | changes))
    log = [{"step": step, "name": "", "validation": {"miou": miou - 100 / step}} for step in (50, 100)]
    (place / "training/training_log.jsonl").write_text("\n".join(map(json.dumps, log)))
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
    cell = "31.0 ± 1.4 (2 seeds)"
    assert f"| source only | {cell} | {cell} | {cell} | 31.0 |" in text
    assert "at least 8 on each | +14.0, +14.0, +14.0 | met |" in text
    assert "at least 12 on average | +14.0 | met |" in text
    assert "DPLG alone positive on average | +2.0 | met |" in text
    assert "LPLR alone positive on average | -0.5 | **missed** |" in text
    assert "at least 5 on average | +3.0 | **missed** |" in text
    assert "LoRA within 2 of full tuning on each | -2.2, -2.2, -2.2 | **missed** |" in text  # -2.25, even digit
    assert "at least 60 mIoU on each | +62.0, +62.0, +62.0 | met |" in text
    assert "| sky | 90 |" in text and "| MADM with LoRA | 100 | 2.0 | 1.0 |" in text
    assert "48 trainings, a machine, 2026-01-01 to 2026-01-02" in text
    assert Image.open(tmp_path / "docs/images/evidence_curves.png").width > 500
    late = tmp_path / "docs/images/evidence_depth_dplg_late.png"
    assert Image.open(late).getpixel((0, 0))[0] == 100 and f"images/{late.name}" in text


def test_what_was_not_run_is_said(results, tmp_path):
    for path in results.glob("event/madm/seed-*/result.json"):
        path.unlink()
    text = text_of(results, tmp_path)
    title = ROWS["madm"].title
    assert f"| {title} | 45.0 ± 1.4 (2 seeds) | 45.0 ± 1.4 (2 seeds) | not run | - |" in text
    assert "at least 12 on average | - | not measured |" in text
    assert "at least 8 on each | +14.0, +14.0, - | not measured |" in text


def test_gain_is_of_shared_seeds(tmp_path):
    for row, seed, miou in (("madm", 0, 40.0), ("madm", 1, 90.0), ("source-only", 0, 30.0)):
        write(tmp_path, "depth", row, seed, miou)
    assert evidence.load(tmp_path).gain("depth", "madm", "source-only") == 10.0


def test_errors(tmp_path):
    with pytest.raises(UserError, match="holds no result.json"):
        evidence.load(tmp_path)
    write(tmp_path, "depth", "madm", 0, 40.0, split="val")
    with pytest.raises(UserError, match="scored on val scenes"):
        evidence.load(tmp_path)
