"""The demo's result page: numbers worked out by hand, curves measured in the drawing, no request, texts escaped."""

import base64
import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import browser
import numpy as np
import pytest
from PIL import Image

from recipes.demo_page import write_page

chromium, page = browser.chromium, browser.page

VOID = ("meta", "img")
LOSSES = {"source-only": [2.0, 1.0, 0.75], "adapted": [2.0, 1.5, 0.5]}
STEPS = [1, 11, 21]


@dataclass
class Element:
    """An element of a page with all that is in it."""

    tag: str
    attributes: dict[str, str | None]
    inside: list = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text in it, every run of white space one space."""
        parts = (part if isinstance(part, str) else part.text for part in self.inside)
        return " ".join("".join(parts).split())

    def every(self, tag: str = "", **attributes: str) -> list["Element"]:
        """Elements in it of this tag with these attributes, in their order."""
        found = []
        for part in self.inside:
            if isinstance(part, Element):
                if tag in ("", part.tag) and attributes.items() <= part.attributes.items():
                    found.append(part)
                found += part.every(tag, **attributes)
        return found

    def one(self, tag: str = "", **attributes: str) -> "Element":
        """The only such element."""
        (found,) = self.every(tag, **attributes)
        return found


class Parser(HTMLParser):
    """Builds the elements; fails where an end tag does not belong to the last element that is open."""

    def __init__(self, text: str):
        super().__init__()
        self.open = [Element("", {})]
        self.feed(text)
        self.close()
        assert len(self.open) == 1, f"never closed: {self.open[-1].tag}"

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), f"an attribute of {tag} twice"
        element = Element(tag, dict(attrs))
        self.open[-1].inside.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].inside.append(data)


def parsed(path: Path) -> Element:
    return Parser(path.read_text(encoding="utf-8")).open[0]


def metrics(miou: float | None, pacc: float | None, **iou: float | None) -> dict:
    """What results.json holds of a model; `a_b` becomes the class `a<b`."""
    per_class = {name.replace("_", "<"): {"iou": value, "acc": value} for name, value in iou.items()}
    return {
        "task": "synthetic_to_infrared", "split": "test", "protocol": "paper", "num_images": 60, "miou": miou,
        "macc": miou, "pacc": pacc, "fwiou": pacc, "per_class": per_class, "class_names": list(per_class),
        "model": "outputs/demo/adapted", "settings": {"weights": "student"},
    }  # fmt: skip


def write_log(folder: Path, name: str, validations: dict[int, float]) -> None:
    """A log of three steps as train_madm.py writes it, with the scores of validations after some of them."""
    lines = []
    for step, loss in zip(STEPS, LOSSES[name], strict=True):
        line = {"step": step, "name": "", "source_loss": loss, "lplr_source_loss": loss / 10}
        if name == "adapted":
            line |= {"target_loss": 1.0, "lplr_target_loss": 0.0, "pseudo_label_weight": step / 42,
                     "confident_fraction": {"a<b": 0.5, "road": None}}  # fmt: skip
        line |= {"gradient_norm": "inf", "learning_rate": 0.002, "timing": {"seconds_per_step": 4.3}}
        lines.append(line)
        if step in validations:
            scores = {"split": "val", "num_images": 5, "miou": validations[step], "iou": {"a<b": 1.0, "road": None}}
            lines.append({"step": step, "name": "", "validation": scores})
    (folder / "training_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@dataclass
class Demo:
    """What a demo leaves behind, in small."""

    folder: Path
    results: dict

    @property
    def models(self) -> dict[str, Path]:
        return {"source-only": self.folder / "source_only", "adapted": self.folder / "adapted"}

    def write(self) -> Element:
        write_page(self.folder / "index.html", self.results, self.models, self.folder / "comparison.png")
        return parsed(self.folder / "index.html")


def made(folder: Path) -> Demo:
    """A demo whose adapted model has four pictures of its training; the logs hold nothing to draw."""
    found = Demo(folder, {
        "settings": {"task": "synthetic_to_infrared", "steps": 21, "seed": 42},
        "seconds": {"data": 30.1, "total": 88.1},
        "metrics": {
            "source-only": metrics(45.1, 60.0, a_b=10.0, road=80.25, pole=None, sky=50.0),
            "adapted": metrics(45.75, 60.001, a_b=12.5, road=79.0, pole=None, sky=50.0),
        },
        "commands": ["python train_madm.py --steps 21 > log", "python eval_madm.py && echo '<done>'"],
    })  # fmt: skip
    for run in found.models.values():
        (run / "validation").mkdir(parents=True)
        (run / "training_log.jsonl").write_text('{"step": 1, "name": "", "gradient_norm": "nan", "timing": {}}\n')
    for step in (2, 10, 9, 100):
        Image.new("RGB", (6, 4), (step, 0, 0)).save(found.models["adapted"] / f"validation/step-{step}.png")
    Image.new("RGB", (10, 8)).save(folder / "comparison.png")
    return found


@pytest.fixture
def demo(tmp_path) -> Demo:
    """To be changed, then written; without curves, which take most of the time."""
    return made(tmp_path)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Demo:
    """With a page, for which source-only was not validated."""
    found = made(tmp_path_factory.mktemp("demo"))
    for name, folder in found.models.items():
        write_log(folder, name, {1: 2.0, 21: 12.5} if name == "adapted" else {})
    found.write()
    return found


def table(page: Element, number: int) -> list[list[str]]:
    """Texts of the cells of a table, by row."""
    rows = page.every("table")[number].every("tr")
    return [[cell.text for cell in row.inside if isinstance(cell, Element)] for row in rows]


def test_scores_and_settings(demo):
    page = demo.write()
    assert table(page, 0) == [
        ["class", "source-only", "adapted", "difference"],
        ["a<b", "10.00", "12.50", "+2.50"],
        ["road", "80.25", "79.00", "\N{MINUS SIGN}1.25"],
        ["pole", "-", "-", "-"],
        ["sky", "50.00", "50.00", "0.00"],
        ["mIoU", "45.10", "45.75", "+0.65"],
        ["pACC", "60.00", "60.00", "0.00"],
    ]
    signs = [row.every("td")[2].attributes["class"] for row in page.every("table")[0].every("tr")[1:]]
    assert signs == ["gain", "loss", "none", "same", "gain", "same"]
    assert table(page, 1) == [["name", "value"], ["task", "synthetic_to_infrared"], ["steps", "21"], ["seed", "42"]]
    assert table(page, 2) == [["part", "seconds"], ["data", "30.1"], ["total", "88.1"]]
    assert page.one("code").inside[0].strip().splitlines() == demo.results["commands"]
    del demo.results["commands"]
    assert not demo.write().every("code")


@pytest.mark.parametrize(
    ("adapted", "headline", "meaning"),
    [
        (45.75, "+0.65 points of mIoU: a gain", "Adaptation helped in this run."),
        (43.1, "\N{MINUS SIGN}2.00 points of mIoU: a loss", "Adaptation did harm in this run"),
        (45.104, "0.00 points of mIoU: no difference", "neither helped nor harmed"),
        (45.096, "0.00 points of mIoU: no difference", "neither helped nor harmed"),
        (None, "- mIoU is not defined", "no labelled pixels"),
    ],
)
def test_the_headline_says_what_happened(demo, adapted, headline, meaning):
    demo.results["metrics"]["adapted"]["miou"] = adapted
    gain = demo.write().one("section", id="gain")
    assert gain.every("p")[0].text == headline
    shown = "-" if adapted is None else f"{adapted:.2f}"
    assert meaning in gain.text and f"The mIoU of adapted is {shown} %, that of source-only 45.10 %" in gain.text
    assert "on 60 labelled test images" in gain.text


def charts(page: Element) -> dict[str, Element]:
    return {figure.one("figcaption").text: figure for figure in page.one("section", id="curves").every("figure")}


def curves(figure: Element) -> dict[int, np.ndarray]:
    """Number of a model -> corners of its line in the drawing, (N, 2)."""
    found = {}
    for group in figure.one("svg").every("g"):
        if "-curve-" in (group.attributes.get("id") or ""):
            (line,) = [part for part in group.inside if isinstance(part, Element) and part.tag == "path"]
            numbers = [float(word) for word in line.attributes["d"].split() if word not in "ML"]
            found[int(group.attributes["id"][-1])] = np.reshape(numbers, (-1, 2))
    return found


def test_every_curve_of_both_models_is_drawn(written):
    found = charts(parsed(written.folder / "index.html"))
    assert {title: sorted(curves(figure)) for title, figure in found.items()} == {
        "Validation mIoU, %": [1],
        "Loss on source images: cross-entropy": [0, 1],
        "LPLR loss on source images": [0, 1],
        "Loss on mixed images: weighted cross-entropy": [1],
        "LPLR loss on mixed images": [1],
        "Weight of the pseudo-labels, 0 to 1": [1],
    }
    figure = found["Loss on source images: cross-entropy"]
    for k, values in enumerate(LOSSES.values()):
        x, y = curves(figure)[k].T
        assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.01) and x[0] < x[1]
        height = y - curves(figure)[0][0, 1]  # below the first point of both, down is positive
        per_unit = (curves(figure)[0][1, 1] - curves(figure)[0][0, 1]) / (2.0 - 1.0)
        np.testing.assert_allclose(height / per_unit, [2.0 - value for value in values], atol=1e-3)
    words = "source-only from 2 at step 1 to 0.75 at step 21; adapted from 2 at step 1 to 0.5 at step 21"
    assert figure.one("p").text == words and words in figure.one("div").attributes["aria-label"]
    texts = [text.text for text in figure.every("text")]
    assert "step" in texts and "0.0" in texts  # words in the drawing are text, and its axis begins at zero


def test_without_validation_there_is_no_such_curve_and_numbers_that_are_none_leave_gaps(demo):
    assert charts(demo.write()) == {}
    log, values = demo.models["source-only"] / "training_log.jsonl", (4.0, "nan", 2.0, "inf")
    log.write_text("".join(json.dumps({"step": k, "other_loss": v}) + "\n" for k, v in enumerate(values)))
    found = charts(demo.write())
    assert list(found) == ["other loss"] and len(curves(found["other loss"])[0]) == 2
    assert found["other loss"].one("p").text == "source-only from 4 at step 0 to inf at step 3"
    log.write_text(json.dumps({"step": 21, "name": "", "validation": {"split": "val", "miou": 12.5, "iou": {}}}))
    figure = charts(demo.write())["Validation mIoU, %"]
    assert len(figure.one("g", id="miou-curve-0").every("use")) == 1  # a line of one point would not be seen
    assert figure.one("p").text == "source-only 12.5 at step 21"


def test_everything_is_in_the_file(written):
    page = parsed(written.folder / "index.html")
    text = (written.folder / "index.html").read_text(encoding="utf-8")
    assert "http://" not in text and "https://" not in text and "@import" not in text and "<script" not in text
    identifiers = [element.attributes["id"] for element in page.every() if "id" in element.attributes]
    assert len(set(identifiers)) == len(identifiers)
    for element in page.every():
        for name, value in element.attributes.items():
            assert name not in ("srcset", "data", "action", "background", "poster")
            if name in ("href", "xlink:href"):
                assert value[0] == "#" and value[1:] in identifiers
            if "url(" in (value or ""):
                assert value.startswith("url(#") and value[5:-1] in identifiers


def test_pictures_are_those_of_the_files(demo):
    page, adapted = demo.write(), demo.models["adapted"] / "validation"
    comparison = page.every("img")[0]
    files = (demo.folder / "comparison.png", adapted / "step-2.png", adapted / "step-100.png")
    for image, path in zip(page.every("img"), files, strict=True):
        kind, data = image.attributes["src"].split(",")
        assert kind == "data:image/png;base64" and base64.b64decode(data) == path.read_bytes()
    assert (comparison.attributes["width"], comparison.attributes["height"]) == ("10", "8")
    captions = [caption.text for caption in page.one("section", id="pseudo-labels").every("figcaption")]
    assert captions == ["Early: step 2 of adapted", "Late: step 100 of adapted"]
    for step in (2, 9, 10):
        (adapted / f"step-{step}.png").unlink()
    section = demo.write().one("section", id="pseudo-labels")
    assert section.one("figcaption").text == "The only picture: step 100 of adapted"


def test_texts_are_escaped_and_readable_without_eyes(demo):
    name = "\"><script>'x"
    (demo.models["adapted"] / "training_log.jsonl").write_text('{"step": 1, "name": "", "<b>_loss": 1.0}')
    models = {name: demo.models["source-only"], "adapted": demo.models["adapted"]}
    demo.results["metrics"] = dict(zip(models, demo.results["metrics"].values(), strict=True))
    demo.results["settings"]["<i>note"] = "</table>"
    write_page(demo.folder / "index.html", demo.results, models, demo.folder / "comparison.png")
    page = parsed(demo.folder / "index.html")
    assert "a&lt;b" in (demo.folder / "index.html").read_text(encoding="utf-8")
    assert not page.every("script") and table(page, 0)[0][1] == name and table(page, 0)[1][0] == "a<b"
    assert table(page, 1)[-1] == ["<i>note", "</table>"]
    assert page.one("html").attributes["lang"] == "en" and name in page.one("title").text
    assert all(image.attributes["alt"] for image in page.every("img"))
    assert name in page.every("img")[0].attributes["alt"]
    assert {cell.attributes.get("scope") for cell in page.every("th")} == {"row", "col"}
    drawing = page.one("div", role="img")
    assert drawing.attributes["aria-label"].startswith("<b> loss, over training steps") and not page.every("b")


def broken(demo: Demo, what: str) -> Path:
    """Damage one file of the demo; returns what the message has to name."""
    paths = {
        "log": demo.models["source-only"] / "training_log.jsonl",
        "line": demo.models["adapted"] / "training_log.jsonl",
        "empty": demo.models["adapted"] / "training_log.jsonl",
        "comparison": demo.folder / "comparison.png",
        "picture": demo.models["adapted"] / "validation/step-100.png",
        "pictures": demo.models["adapted"] / "validation",
    }
    path = paths[what]
    if what in ("line", "picture", "empty"):
        path.write_text("" if what == "empty" else '{"step": 1, "na')
    else:
        for file in path.glob("*") if what == "pictures" else [path]:
            file.unlink()
    return path


@pytest.mark.parametrize("what", ["log", "line", "empty", "comparison", "picture", "pictures"])
def test_what_is_missing_or_damaged_is_named(demo, what):
    path = broken(demo, what)
    with pytest.raises(ValueError) as error:
        demo.write()
    assert str(error.value).startswith(f"{path}: ")
    assert not list(demo.folder.glob("*index.html*"))


def test_models_and_metrics_belong_together(demo):
    del demo.results["metrics"]["adapted"]
    with pytest.raises(ValueError, match="two models with metrics; got source-only, adapted, metrics of source-only"):
        demo.write()


def test_it_fits_a_phone_in_both_colour_schemes(page, written):
    page.set_viewport_size({"width": 380, "height": 700})
    papers, lines = set(), set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.goto((written.folder / "index.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == 380
        papers.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        lines.add(page.evaluate("getComputedStyle(document.querySelector('#source_loss-curve-0 path')).stroke"))
        assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    assert page.problems == [] and len(papers) == 2 and len(lines) == 2
