"""Comparison of evaluated models: what is paired, the tables, names of rows, and the folder of results."""

import csv
import dataclasses
import io
import json
import os
import platform
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_report import evaluation

import eval_madm
from madm_utils import evaluation_files
from madm_utils.cli import UserError
from madm_utils.comparison import compare, to_csv, to_markdown, to_text
from madm_utils.evaluated_models import distinct_names, find_models
from madm_utils.evaluation_files import check_places, write_results
from madm_utils.metrics import class_counts
from madm_utils.tasks import TASKS


@pytest.fixture(scope="module")
def evaluations():
    return [
        evaluation("early", 0.8, 6), evaluation("late", 0.3, 6),
        evaluation("event|x", 0.5, 3, TASKS["synthetic_to_event"], shown=()),
    ]  # fmt: skip


def test_rows_say_what_the_metrics_say(evaluations):
    comparison = compare(evaluations)
    early, late, event = comparison["models"]
    for row, one in zip(comparison["models"], evaluations, strict=True):
        assert row["miou"] == one.metrics["miou"] and row["ece"] == one.metrics["calibration"]["ece"]
        assert row["boundary_iou"] == one.metrics["boundary_iou"]["miou"]
        low, high = row["confidence_intervals"]["miou"]
        assert low < row["miou"] < high
    assert late["miou"] > early["miou"] and late["difference"]["interval"][0] > 0
    assert late["difference"]["difference"] == pytest.approx(late["miou"] - early["miou"])
    assert early["difference"] is None and event["difference"] is None  # itself; other classes
    fence = comparison["per_class"]["fence"]
    assert fence["early"] is None and fence["event|x"] is not None
    assert [table["dataset"] for table in comparison["conditions"]] == [
        "synthetic_infrared test",
        "synthetic_event test",
    ]
    json.dumps(comparison, allow_nan=False)


def test_nothing_is_paired_but_the_same_pixels(evaluations):
    early, late, _ = evaluations
    for change in ({"data": "other"}, {"metrics": late.metrics | {"protocol": "paper"}},
                   {"metrics": late.metrics | {"num_images": 5}},
                   {"model": dataclasses.replace(late.model, task=dataclasses.replace(
                       late.model.task, target_label_map={}))}):  # fmt: skip
        assert compare([early, dataclasses.replace(late, **change)])["models"][1]["difference"] is None
    assert compare([early, late])["models"][1]["difference"] is not None
    # Other resolutions are other pixels where the labels are brought to them, and the same with labels of their size.
    larger = dataclasses.replace(late, model=dataclasses.replace(late.model, resolution=128))
    assert early.comparable(larger) and early.comparable_in(larger, ["road"])
    paper = [dataclasses.replace(e, metrics=e.metrics | {"protocol": "paper"}) for e in (early, late, larger)]
    assert paper[0].comparable(paper[1]) and not paper[0].comparable(paper[2])
    assert compare([paper[0], paper[2]], ["road"])["models"][1]["classes_difference"] is None


def test_conditions_are_scored_by_themselves(evaluations):
    measured = evaluations[0]
    groups = measured.metrics["conditions"]["groups"]
    assert list(groups) == ["fog", "night"] and groups["fog"]["num_images"] == 3
    images = [image for image in measured.measurement.images if image.condition == "night"]
    counts = sum(image.pixels for image in images)
    assert groups["night"]["pacc"] == pytest.approx(100 * counts[0].sum() / counts[1].sum())
    total = sum(image.pixels for image in measured.measurement.images)
    np.testing.assert_array_equal(total, class_counts(measured.measurement.confusion))


def test_chosen_classes(evaluations):
    comparison = compare(evaluations[:2], ["road", "car"])
    row = comparison["models"][0]
    ious = [evaluations[0].metrics["per_class"][name]["iou"] for name in ("road", "car")]
    assert row["classes_miou"] == pytest.approx(np.mean(ious))
    assert list(comparison["per_class"]) == ["road", "car"]
    assert "mIoU of 2 classes - early" in to_text(comparison) and "| building |" not in to_markdown(comparison)
    assert "every other score, also by condition, is over all classes" in to_text(comparison)

    def slow(one, draws):
        """Mean IoU of both classes of the images as drawn."""
        correct, labelled, predicted = np.tensordot(draws, one.measurement.stacked("pixels"), 1)[:, columns]
        return 100 * np.mean(correct / (labelled + predicted - correct))

    columns = [evaluations[0].model.task.class_names.index(name) for name in ("road", "car")]
    draws = np.random.default_rng(0).multinomial(6, np.full(6, 1 / 6), 1000)
    early, late = (np.array([slow(one, row) for row in draws]) for one in evaluations[:2])
    assert row["classes_interval"] == pytest.approx(np.percentile(early, (2.5, 97.5)))
    difference = comparison["models"][1]["classes_difference"]
    assert difference["interval"] == pytest.approx(np.percentile(late - early, (2.5, 97.5)))
    means = [slow(one, np.ones(6)) for one in evaluations[:2]]
    assert difference["difference"] == pytest.approx(means[1] - means[0])
    table = list(csv.DictReader(io.StringIO(to_csv(comparison))))
    assert float(table[1]["classes_miou_difference_low"]) == difference["interval"][0]
    assert table[0]["classes_miou_difference"] == "" != table[0]["classes_miou_high"]


def test_chosen_classes_of_models_that_know_different_ones(evaluations):
    early, late, _ = evaluations
    task = late.model.task
    renamed = dataclasses.replace(task, class_names=tuple("bus" if n == "car" else n for n in task.class_names))
    metrics = late.metrics | {"class_names": list(renamed.class_names)}
    other = dataclasses.replace(late, model=dataclasses.replace(late.model, task=renamed), metrics=metrics)
    row = compare([early, other], ["road"])["models"][1]
    assert row["difference"] is None
    assert row["classes_difference"] == compare([early, late], ["road"])["models"][1]["classes_difference"]

    # Without labels of a class there is no mean of it, and nothing to compare.
    images = [dataclasses.replace(image, pixels=image.pixels.copy()) for image in late.measurement.images]
    for image in images:
        image.pixels[:2, task.class_names.index("car")] = 0
    without = dataclasses.replace(late, measurement=dataclasses.replace(late.measurement, images=images))
    comparison = compare([without, without, early], ["road", "car"])
    first, same, labelled = comparison["models"]
    assert first["classes_miou"] is first["classes_interval"] is same["classes_difference"] is None
    assert labelled["classes_miou"] is not None and labelled["classes_difference"] is None
    assert to_text(comparison).splitlines()[2].split()[-6] == "-"


def test_tables(evaluations):
    comparison = compare(evaluations)
    early, late, event = comparison["models"]
    text = to_text(comparison)
    low, high = late["difference"]["interval"]
    assert f"{late['difference']['difference']:+.2f} [{low:+.2f}, {high:+.2f}]" in text
    assert "The models know different classes" in text and "No difference (-)" in text
    assert "mIoU by condition, synthetic_infrared test\ncondition  images" in text
    markdown = to_markdown(comparison)
    assert r"| event\|x | synthetic_to_event | 3 |" in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(line.replace(r"\|", "").count("|") >= 5 for line in rows)
    assert f"| fog | 3 | {comparison['conditions'][0]['groups']['fog']['miou']['early']:.2f} |" in markdown

    table = list(csv.DictReader(io.StringIO(to_csv(comparison))))
    assert [row["name"] for row in table] == ["early", "late", "event|x"]
    assert float(table[1]["miou"]) == late["miou"] and float(table[1]["miou_difference_low"]) == low
    assert table[0]["miou_difference"] == table[2]["miou_difference"] == table[0]["iou wall"] == ""
    assert float(table[0]["iou road"]) == comparison["per_class"]["road"]["early"]
    assert float(table[2]["miou synthetic_event test fog"]) > 0
    assert event["num_images"] == 3


def test_screen_of_a_single_model(evaluations, capsys):
    first = evaluations[0]
    args = SimpleNamespace(split="test", protocol="native", weights="student", output_dir=Path("out"), classes=())
    eval_madm.print_results([first], args)
    text = capsys.readouterr().out
    low, high = first.metrics["confidence_intervals"]["miou"]
    assert f"mIoU {first.metrics['miou']:.2f} [{low:.2f}, {high:.2f}] with its 95 % interval, boundary IoU" in text
    assert "mIoU by condition, synthetic_infrared test\ncondition  images  early\nfog             3" in text
    assert "open out/report.html" in text


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["outputs/depth"], ["depth"]),
        (["outputs/a/depth", "outputs/b/depth/", "outputs/ir"], ["a/depth", "b/depth", "ir"]),
        (["runs/depth/checkpoint-100", "runs/depth"], ["checkpoint-100", "depth"]),
        (["depth", "x/depth"], ["depth", "x/depth"]),
        (["user/model", "./user-model"], ["model", "user-model"]),
        (["a/b", "x/a-b", "a-b"], ["b", "x/a-b", "a-b"]),
        (["a/Pictures", "report.html", "m"], ["Pictures (1)", "report.html (1)", "m"]),  # names of results
        (["a/worst", "worst-1"], ["worst (2)", "worst-1"]),
    ],
)
def test_names_are_short_and_tell_models_apart(paths, names):
    assert distinct_names(paths) == names


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        find_models(["nowhere"])
    with pytest.raises(UserError, match="is not a trained model: it lacks madm_config.json"):
        find_models([str(tmp_path)])
    (tmp_path / "madm_config.json").write_text('{"task": 3}')
    with pytest.raises(UserError, match=r"madm_config\.json cannot be read"):
        find_models([str(tmp_path)])
    (tmp_path / "madm_config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match=r"madm_config\.json cannot be read \(UnicodeDecodeError"):
        find_models([str(tmp_path)])
    task = TASKS["synthetic_to_depth"].to_dict()
    (tmp_path / "madm_config.json").write_text(json.dumps({"task": task, "resolution": "abc"}))
    with pytest.raises(UserError, match=r"madm_config\.json cannot be read \(ValueError: .*'abc'"):
        find_models([str(tmp_path)])
    (tmp_path / "madm_config.json").write_text(json.dumps({"task": task | {"palette": []}, "resolution": 64}))
    with pytest.raises(UserError, match=r"json: palette has 0 colours"):
        find_models([str(tmp_path)])


def test_names_that_results_have_and_a_model_named_twice(tmp_path):
    (tmp_path / "madm_config.json").write_text(
        json.dumps({"task": TASKS["synthetic_to_depth"].to_dict(), "resolution": 64})
    )
    for name in ("pictures", "Worst", "REPORT.html", "comparison.csv", "metrics.json"):
        with pytest.raises(UserError, match=f"--names: {name} would be the folder .* give another name"):
            find_models([str(tmp_path)], [name])
    for again in (f"{tmp_path}/", f"{tmp_path}/../{tmp_path.name}"):
        with pytest.raises(UserError, match=f"--model_path names {again} twice"):
            find_models([str(tmp_path), again])


# --- the folder of results -------------------------------------------------------------------------------------------


@pytest.fixture
def without_plots(monkeypatch):
    """matplotlib takes a second per plot."""
    monkeypatch.setattr("madm_utils.visualization.save_confusion_plot", lambda matrix, names, path: path.touch())


def listing(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_results_replace_earlier_ones_of_any_kind_and_nothing_else(evaluations, tmp_path, without_plots):
    early, late, event = evaluations
    write_results(tmp_path, [early, late, event])
    assert {"comparison.json", "early/metrics.json", "event-x/report.html", "late/worst"} <= listing(tmp_path) | {
        "late/worst"
    }
    (tmp_path / "late" / "notes.txt").write_text("mine")
    (tmp_path / "early" / "pictures" / "holiday.png").write_text("mine")
    write_results(tmp_path, [event, early])
    files = listing(tmp_path)
    assert {"late/notes.txt", "early/pictures/holiday.png", "early/metrics.json"} <= files
    assert not any(name.startswith("late/") and name != "late/notes.txt" for name in files)

    write_results(tmp_path, [early])
    files = listing(tmp_path)
    assert {"metrics.json", "report.html", "pictures/00000_street_0.png"} <= files
    assert "comparison.json" not in files and "comparison.md" not in files
    assert {name for name in files if name.count("/") and not name.startswith(("pictures/", "worst/"))} == {
        "late/notes.txt", "early/pictures/holiday.png",
    }  # fmt: skip
    assert not (tmp_path / "event-x").exists()
    write_results(tmp_path, [event, early])
    assert "metrics.json" not in listing(tmp_path) and not (tmp_path / "worst").exists()


def test_what_is_in_the_way_of_results_is_named(evaluations, tmp_path):
    models = [one.model for one in evaluations]
    check_places(tmp_path, models)
    (tmp_path / "late").touch()
    check_places(tmp_path, models[:1])
    with pytest.raises(UserError, match="late is a file, where results need a folder; move it or give another"):
        check_places(tmp_path, models)
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report\.html is a folder, where results need a file"):
        check_places(tmp_path, models[:1])


def test_what_a_killed_run_left_is_removed(evaluations, tmp_path, without_plots):
    here, ended = platform.node(), 2**30  # more than any process's number
    running, elsewhere, gone, same = (
        tmp_path / f".evaluation.tmp-{machine}-{process}-0a"
        for machine, process in ((here, os.getppid()), ("other", ended), (here, ended), (here, os.getpid()))
    )
    for folder in (running, elsewhere, gone, same):
        (folder / "pictures").mkdir(parents=True)
    write_results(tmp_path, evaluations[:1])
    assert set(tmp_path.glob(".evaluation.*")) == {running, elsewhere}


def test_a_failure_while_writing_leaves_the_earlier_results(evaluations, tmp_path, without_plots, monkeypatch):
    write_results(tmp_path, evaluations[:1])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation_files, "write_report", full)
    with pytest.raises(UserError, match=r"cannot write the results to .*No space left.*give another --output_dir"):
        write_results(tmp_path, evaluations)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == before
