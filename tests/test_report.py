"""`report.html`: rendered and clicked through in headless Chromium, without any request; pictures and data in it."""

import dataclasses
import json
import re
from pathlib import Path

import browser
import numpy as np
import pytest
import torch

from madm_utils.boundary_iou import boundary_counts
from madm_utils.calibration import calibration_counts
from madm_utils.comparison import Evaluation, compare
from madm_utils.evaluated_models import EvaluatedModel
from madm_utils.measurement import ImageCounts, Measurement, metrics_of
from madm_utils.metrics import class_counts, confusion_matrix
from madm_utils.report import report_data, write_report
from madm_utils.sample_pictures import CORRECT, NOT_LABELLED, NUM_WORST, WRONG, Sample, SampleKeeper, error_map
from madm_utils.tasks import TASKS

chromium, page = browser.chromium, browser.page

TASK = TASKS["synthetic_to_infrared"]
CONDITIONS = ("fog", "night")


def label_of(index: int, size: int = 48) -> torch.Tensor:
    """Class ids of an image, uint8 (size, size); the upper rows are not labelled."""
    coarse = torch.randint(0, TASK.num_classes, (6, 6), generator=torch.Generator().manual_seed(index))
    label = coarse.repeat_interleave(size // 6, 0).repeat_interleave(size // 6, 1).to(torch.uint8)
    label[:4] = 255
    return label


def evaluation(name: str, wrong: float, num_images: int = 14, task=TASK, shown=(0, 5)) -> Evaluation:
    """What measuring a model would give that is wrong about a share of the pixels, more of them in later images."""
    images, keeper = [], SampleKeeper(shown)
    total = np.zeros((task.num_classes + 1,) * 2, np.int64)
    for index in range(num_images):
        label = label_of(index)
        generator = torch.Generator().manual_seed(100 + index)
        moved = torch.rand(label.shape, generator=generator) < wrong * (index + 1) / num_images
        prediction = torch.where(moved, (label + 1) % task.num_classes, label).clamp(max=task.num_classes - 1)
        confusion = confusion_matrix(prediction, label, task.num_classes)
        counts = ImageCounts(
            index, f"test/street {index}.png", CONDITIONS[index % 2], "", class_counts(confusion),
            boundary_counts(prediction, label, task.num_classes).numpy(),
            calibration_counts(1 - 0.5 * moved.float(), prediction, label).numpy(),
        )  # fmt: skip
        images.append(counts)
        total += confusion.numpy()
        image = torch.full((3, 48, 48), 8 * index, dtype=torch.uint8)
        keeper.offer(counts.iou(), index, counts.file_name, image, label, prediction)
    measurement = Measurement(total, images, keeper.samples())
    metrics = {
        "task": task.name, "split": "test", "protocol": "native", "num_images": num_images,
        **metrics_of(measurement, task.class_names), "settings": {"weights": "student"}, "versions": {"madm": "1"},
    }  # fmt: skip
    model = EvaluatedModel(name, (f"runs/{name}",), (Path("runs"),), task, 64)
    return Evaluation(model, measurement, metrics, "data", frozenset(shown))


NASTY = "</script><b>bold"
LABEL, FIRST, SECOND = 1, 2, 3
"""Panes by their place; the input is 0."""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A comparison of two models of one split and one of another, with names that are HTML, a pane's or a number."""
    task = TASKS["synthetic_to_event"]
    task = dataclasses.replace(task, class_names=tuple("7" if n == "fence" else n for n in task.class_names))
    other = evaluation("event", 0.9, 3, task, shown=())
    evaluations = [evaluation("label", 0.8), evaluation(NASTY, 0.3, shown=(0, 2, 5)), other]
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, evaluations, compare(evaluations))
    return path


def first_column(page, table: str) -> list[str]:
    return page.locator(f"{table} tbody tr td:first-child").all_inner_texts()


def opened(page, report: Path, image: str = "test/street 0.png"):
    page.goto(report.as_uri())
    page.wait_for_selector(f"#panes[data-image='{image}']")
    return page


def painted(page, pane: int) -> np.ndarray:
    """RGBA of the class colours in a pane, (48, 48, 4)."""
    values = page.evaluate(
        "(pane) => [...document.querySelector(`#panes figure[data-pane='${pane}'] canvas`)"
        ".getContext('2d').getImageData(0, 0, 48, 48).data]",
        pane,
    )
    return np.array(values, np.uint8).reshape(48, 48, 4)


def test_it_renders_without_errors_or_requests(page, report):
    opened(page, report)
    assert page.problems == []
    assert page.locator("h1").inner_text() == "Comparison of 3 models"
    assert first_column(page, "#score-table") == ["label", NASTY, "event"]  # names are text, whatever they hold
    assert page.locator("#panes figure").count() == 4
    assert first_column(page, "#condition-tables > .scroll:nth-child(2)") == ["fog", "night"]
    assert page.locator("#reliability svg").count() == 3
    assert page.locator("#worst-lists button").count() == 2 * NUM_WORST + 3
    width = page.evaluate("document.documentElement.scrollWidth")
    page.set_viewport_size({"width": 380, "height": 700})
    assert width == 1280 and page.evaluate("document.documentElement.scrollWidth") == 380


def test_tables_sort_by_any_column(page, report):
    opened(page, report)
    page.click("#score-table th:has-text('pAcc') button")
    assert first_column(page, "#score-table") == [NASTY, "label", "event"]
    page.click("#score-table th:has-text('pAcc') button")
    assert first_column(page, "#score-table") == ["event", "label", NASTY]
    assert page.locator("#score-table th[aria-sort='ascending']").inner_text() == "pAcc"
    classes = first_column(page, "#class-table")
    assert classes == [*TASK.class_names, "7", "wall"]  # as listed, also those that are numbers
    page.click("#class-table th:first-child button")
    assert first_column(page, "#class-table") == sorted(classes) != classes
    page.click("#class-table th:nth-child(2) button")
    # "7" and "wall" are no classes of the first model: what is not defined is last
    assert set(first_column(page, "#class-table")[-2:]) == {"7", "wall"}
    assert page.problems == []


def test_viewer_shows_classes_and_errors_of_every_model(page, report):
    opened(page, report)
    label = label_of(0).numpy()
    colours = np.array([*TASK.palette, *[(0, 0, 0)] * (256 - TASK.num_classes)], np.uint8)[label]
    np.testing.assert_array_equal(painted(page, LABEL)[..., :3], colours)
    page.keyboard.press("e")
    assert page.locator("#errors").is_checked()
    errors = painted(page, FIRST)[..., :3]
    assert set(map(tuple, errors.reshape(-1, 3).tolist())) == {CORRECT, WRONG, NOT_LABELLED}
    assert (errors[label == 255] == 0).all()
    np.testing.assert_array_equal(painted(page, LABEL)[..., :3], colours)
    page.keyboard.press("e")

    chosen = int(label[30, 20])
    page.click(f"#legend button:has-text('{TASK.class_names[chosen]}')")
    page.mouse.move(5, 5)
    np.testing.assert_array_equal(painted(page, LABEL)[..., 3], np.where(label == chosen, 0, 255))
    page.hover(f"#panes figure[data-pane='{LABEL}'] .frame", position={"x": 10, "y": 150})
    assert page.locator("#readout").inner_text().count("label: ") == 2  # the label and the model of that name
    assert f"{NASTY}: " in page.locator("#readout").inner_text()
    page.click(f"#panes figure[data-pane='{LABEL}'] .frame")
    assert "zoomed" in page.locator("#panes").get_attribute("class")
    assert page.problems == []


def test_images_and_models_change_by_key_mouse_and_list(page, report):
    opened(page, report)
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#panes[data-image='test/street 2.png']")
    assert "Not kept" in page.locator(f"#panes figure[data-pane='{FIRST}']").inner_text()
    assert page.locator("#panes canvas").count() == 2  # of the label and of the model that was asked for it
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("#panes[data-image='test/street 13.png']")
    page.click("#next")
    page.wait_for_selector("#panes[data-image='test/street 0.png']")
    page.select_option("#image", label="test/street 5.png (night)")
    page.wait_for_selector("#panes[data-image='test/street 5.png']")

    page.uncheck(f"#panes-choice input[value='{FIRST}']")
    assert page.locator("#panes figure:visible").count() == 3
    assert not page.locator(f"#panes figure[data-pane='{FIRST}']").is_visible()
    assert page.locator(f"#panes figure[data-pane='{LABEL}']").is_visible()
    page.keyboard.press("3")
    assert page.locator("#panes figure:visible").count() == 4
    page.keyboard.press("9")
    assert page.locator("#panes figure:visible").count() == 4

    page.click("#worst-lists button >> nth=1")  # of the first model, whose errors grow with the index
    page.wait_for_selector("#panes[data-image='test/street 12.png']")
    assert page.locator("#set").input_value() == "0"
    page.select_option("#group", label="synthetic_event, test split")
    page.wait_for_selector("#panes figure[data-pane='2']:has-text('event')")
    assert page.locator("#panes figure").count() == 3
    page.select_option("#confusion-model", label="event")
    assert page.locator("#confusion-table tbody tr").count() == 11
    assert page.problems == []


def test_chosen_classes_have_an_interval_and_a_difference(page, tmp_path):
    evaluations = [evaluation("early", 0.8, 3, shown=(0,)), evaluation("late", 0.3, 3, shown=(0,))]
    comparison = compare(evaluations, ["car", "road"])
    write_report(tmp_path / "report.html", evaluations, comparison)
    opened(page, tmp_path / "report.html")
    late = comparison["models"][1]
    cells = page.locator("#score-table tbody tr >> nth=1").locator("td").all_inner_texts()
    low, high = late["classes_interval"]
    assert cells[3] == f"{late['classes_miou']:.2f} [{low:.2f}, {high:.2f}]"
    assert cells[4].startswith(f"+{late['classes_difference']['difference']:.2f} [")
    heads = page.locator("#score-table thead th").all_inner_texts()
    assert heads[3].startswith("mIoU of 2 classes") and heads[4].startswith("mIoU of 2 classes − early")
    assert first_column(page, "#class-table") == ["car", "road"]
    assert page.problems == []


def test_theme_and_opacity(page, report):
    opened(page, report)
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light == "rgb(255, 255, 255)"
    page.locator("#opacity").fill("30")
    opacity = "getComputedStyle(document.querySelector('canvas.colours')).opacity"
    assert page.evaluate(opacity) == "0.3"
    assert page.problems == []


def test_groups_of_one_split_are_told_apart_by_their_models():
    one = evaluation("one", 0.8, 2)
    other = dataclasses.replace(one, model=dataclasses.replace(one.model, name="other"), data="other")
    event = evaluation("event", 0.9, 2, TASKS["synthetic_to_event"])
    names = [group["name"] for group in report_data([one, other, event], compare([one, other, event]))["groups"]]
    split = "synthetic_infrared, test split"
    assert names == [f"{split} (one)", f"{split} (other)", "synthetic_event, test split"]


def test_file_holds_nothing_to_fetch_and_its_data_cannot_end_the_script(report):
    text = report.read_text(encoding="utf-8")
    # The only addresses are names of namespaces.
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    assert "<" not in data and json.loads(data)["models"][1]["name"] == NASTY
    assert not re.search(r"/\* (DATA|STYLE|SCRIPT|VIEWER) \*/", text)
    assert "default-src 'none'" in text


def test_worst_images_and_those_asked_for_are_kept_and_nothing_else():
    measured = evaluation("m", 0.8, 30, shown=(0, 29))
    assert sorted(measured.measurement.samples) == [0, *range(20, 30)]
    worst = measured.measurement.worst()
    assert [image.iou() for image in worst] == sorted(image.iou() for image in measured.measurement.images)[:NUM_WORST]
    unlabelled = SampleKeeper(())
    unlabelled.offer(float("nan"), 0, "x.png", torch.zeros(3, 8, 8).byte(), label_of(0), label_of(0))
    assert unlabelled.samples() == {}


def test_a_sample_gives_back_its_class_ids_and_is_small():
    label = label_of(1, 48)
    large = label.repeat_interleave(30, 0).repeat_interleave(30, 1)  # 1440 x 1440
    image = torch.zeros((3, 100, 100), dtype=torch.uint8)
    sample = Sample.of(7, "a/b c.png", image, large, large)
    assert sample.size == (640, 640) and sample.picture_name() == "00007_b_c.png"
    ids = sample.ids(sample.label)
    assert set(np.unique(ids)) == set(np.unique(label)) and ids.shape == sample.pixels().shape[:2]
    assert ids[0, 0] == 255 and ids[639, 639] == label[47, 47]
    np.testing.assert_array_equal(Sample.of(0, "x", image, label, label).ids(
        Sample.of(0, "x", image, label, label).prediction), label)  # fmt: skip
    assert len(sample.label) + len(sample.prediction) + len(sample.image) < 20_000


def test_error_map_has_three_colours():
    label, prediction = np.array([[0, 1, 255]], np.uint8), np.array([[0, 2, 2]], np.uint8)
    assert error_map(label, prediction).tolist() == [[list(CORRECT), list(WRONG), list(NOT_LABELLED)]]
