"""`index.html` of the demo: one file with everything in it, which asks nothing of the network and opens from a disk.

`demo_page.html` is the page, a Jinja template that escapes every text; the styles are those of the evaluation report.
"""

import io
import json
import math
import re
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

import madm_utils
from madm_utils.cli import UserError
from madm_utils.files import replacing

TEMPLATE = Path(__file__).with_name("demo_page.html")
STYLE = Path(madm_utils.__file__).with_name("report.css")
LOG_NAME = "training_log.jsonl"  # as in madm_utils.tracking, which takes seconds to import

TITLES = {
    "miou": "Validation mIoU, %",
    "source_loss": "Loss on source images: cross-entropy",
    "target_loss": "Loss on mixed images: weighted cross-entropy",
    "lplr_source_loss": "LPLR loss on source images",
    "lplr_target_loss": "LPLR loss on mixed images",
    "pseudo_label_weight": "Weight of the pseudo-labels, 0 to 1",
}
"""Key in the log -> title of its chart; other losses go by their key."""

VERDICTS = {
    "gain": ("points of mIoU: a gain", "Adaptation helped in this run."),
    "loss": ("points of mIoU: a loss", "Adaptation did harm in this run: the model without it is better."),
    "same": ("points of mIoU: no difference", "Adaptation neither helped nor harmed in this run."),
    "none": ("mIoU is not defined", "The test images have no labelled pixels."),
}
"""Sign of the difference in mIoU -> what stands beside it, and what it means."""

# matplotlib knows no variables of a style sheet: it draws in these colours, which are replaced by them.
_INK, _LINE, _FIRST, _SECOND = "#000001", "#000002", "#000003", "#000004"
_PAINTS = {_INK: "var(--soft)", _LINE: "var(--line)", _FIRST: "var(--first)", _SECOND: "var(--second)"}
_CURVES = ({"color": _FIRST, "linestyle": "--"}, {"color": _SECOND, "linestyle": "-"})
_CHART = {
    "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 11, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": _INK, "axes.labelcolor": _INK, "xtick.color": _INK,
    "ytick.color": _INK, "axes.grid": True, "grid.color": _LINE, "lines.linewidth": 1.8, "savefig.transparent": True,
}  # fmt: skip
_MARKED = 12
"""Curves of fewer points show them: so few may lie far apart, and one alone makes no line."""


@dataclass(frozen=True)
class Chart:
    """One quantity over the training steps."""

    key: str
    """What the log calls it."""
    title: str
    curves: tuple[list[tuple[int, float]], ...]
    """(step, value) of each model, in the order of the log; empty where its log does not hold the quantity."""

    def words(self, names: Sequence[str]) -> str:
        """First and last value of every curve, for those who cannot see it."""
        texts = []
        for name, points in zip(names, self.curves, strict=True):
            if points:
                (first, start), (last, end) = points[0], points[-1]
                begins = f"from {start:.3g} at step {first} to " if len(points) > 1 else ""
                texts.append(f"{name} {begins}{end:.3g} at step {last}")
        return "; ".join(texts)


@dataclass(frozen=True)
class Picture:
    """A picture as the page holds it."""

    source: str
    """Data URI."""
    width: int
    height: int
    step: int = 0
    """Of the training, where it shows one."""


@dataclass(frozen=True)
class Row:
    """A score of both models, as text."""

    name: str
    values: tuple[str, str]
    difference: str
    sign: str
    """A key of `VERDICTS`."""


def write_page(path: Path, results: dict[str, Any], models: dict[str, Path], comparison: Path) -> None:
    """Write the page about a model without adaptation and one with it.

    Args:
        path: of the file; what lies there is replaced.
        results: `metrics`, displayed name -> what eval_madm.py measured, of which `task`, `num_images`, `class_names`,
            `per_class[name]["iou"]`, `miou` and `pacc` are shown (percent, None where undefined); `settings` and
            `seconds`, name -> value, shown in their order; `commands`, a list of lines, may be absent.
        models: displayed name -> folder of a training of one task: the source-only one, then the adapted one.
        comparison: picture of test images with the predictions of both.

    Raises:
        UserError: other than two models, one without metrics, or a log or picture that is missing or unreadable, by
            its name. It is a ValueError.
    """
    names = list(models)
    if len(names) != 2 or not set(names) <= set(results["metrics"]):
        measured = ", ".join(results["metrics"]) or "none"
        raise UserError(f"the page is about two models with metrics; got {', '.join(names)}, metrics of {measured}")
    metrics = [results["metrics"][name] for name in names]
    charts = find_charts([read_log(folder / LOG_NAME) for folder in models.values()])
    classes, means = score_rows(*metrics)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template(TEMPLATE.name).render(
        style=STYLE.read_text(encoding="utf-8"),
        task=metrics[0]["task"],
        names=names,
        num_images=metrics[0]["num_images"],
        verdict=VERDICTS[means[0].sign],
        classes=classes,
        means=means,
        comparison=read_picture(comparison),
        pictures=training_pictures(models[names[1]] / "validation"),
        charts=[(chart, draw(chart), chart.words(names)) for chart in charts],
        settings=results["settings"],
        seconds=results["seconds"],
        commands=results.get("commands", []),
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a `training_log.jsonl`, of which there is at least one; `UserError` names the file otherwise."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as the log of a training ({error})") from None
    if not records:
        raise UserError(f"{path}: the log of the training is empty")
    return records


def find_charts(logs: Sequence[Iterable[dict[str, Any]]]) -> list[Chart]:
    """Validation scores, losses and the weight of the pseudo-labels, as far as a log of each model holds them."""
    losses = dict.fromkeys(key for log in logs for record in log for key in record if key.endswith("_loss"))
    charts = []
    for key in ("miou", *losses, "pseudo_label_weight"):
        curves = tuple(_curve(log, key) for log in logs)
        if any(curves):
            charts.append(Chart(key, TITLES.get(key, key.replace("_", " ")), curves))
    return charts


def _curve(log: Iterable[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of all lines that hold it; "nan" and "inf" become the numbers."""
    values = ((record["step"], record.get("validation", record)) for record in log)
    return [(step, float(found[key])) for step, found in values if key in found]


def draw(chart: Chart) -> str:
    """A chart as an `svg` element for HTML: coloured by the page's variables, text as text, ids that start with the
    chart's key. The line of the k-th model is in the group with the id `{key}-curve-{k}`; what is not finite is a gap.
    """
    import matplotlib  # takes half a second
    from matplotlib.figure import Figure

    svg = io.StringIO()
    # The salt makes equal charts equal text.
    with matplotlib.rc_context({**_CHART, "svg.hashsalt": chart.key}):
        figure = Figure(figsize=(4.4, 2.3), layout="constrained")
        axes = figure.add_subplot()
        for k, (points, look) in enumerate(zip(chart.curves, _CURVES, strict=True)):
            if points:
                values = [value if math.isfinite(value) else math.nan for _, value in points]
                marker = "o" if len(points) < _MARKED else ""
                # Not clipped, or a marker at zero would be cut in halves.
                axes.plot([step for step, _ in points], values, marker=marker, markersize=4, clip_on=False,
                          gid=f"curve-{k}", **look)  # fmt: skip
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="x", integer=True, nbins=6)
        axes.locator_params(axis="y", nbins=5)
        figure.savefig(svg, format="svg")
    text = svg.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'( id="| xlink:href="#|url\(#)', rf"\g<1>{chart.key}-", text)
    return re.sub("|".join(_PAINTS), lambda found: _PAINTS[found[0]], text)


def score_rows(first: dict[str, Any], second: dict[str, Any]) -> tuple[list[Row], list[Row]]:
    """Rows of the IoU of each class, and those of mIoU and pACC; `first` and `second` are metrics of one task."""
    classes = [
        _row(name, first["per_class"][name]["iou"], second["per_class"][name]["iou"]) for name in first["class_names"]
    ]
    return classes, [_row(name, first[key], second[key]) for key, name in (("miou", "mIoU"), ("pacc", "pACC"))]


def _row(name: str, first: float | None, second: float | None) -> Row:
    values = tuple("-" if value is None else f"{value:.2f}" for value in (first, second))
    if first is None or second is None:
        return Row(name, values, "-", "none")
    difference = round(second - first, 2)
    if difference == 0:
        return Row(name, values, "0.00", "same")
    text = f"{difference:+.2f}".replace("-", "\N{MINUS SIGN}")
    return Row(name, values, text, "gain" if difference > 0 else "loss")


def read_picture(path: Path, step: int = 0) -> Picture:
    """Embed a picture file as it is; `UserError` names the file if there is none or it is no picture."""
    try:
        with Image.open(path) as image:
            width, height, kind = *image.size, image.get_format_mimetype()
        data = b64encode(path.read_bytes()).decode("ascii")
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a picture ({error})") from None
    return Picture(f"data:{kind};base64,{data}", width, height, step)


def training_pictures(folder: Path) -> list[Picture]:
    """First and last `step-*.png` of a training, or the only one; `UserError` names the folder if it has none."""
    found = {}
    for path in folder.glob("step-*.png"):
        if match := re.fullmatch(r"step-(\d+)\.png", path.name):
            found[int(match[1])] = path
    if not found:
        raise UserError(f"{folder}: holds no step-*.png, the pictures of a training")
    return [read_picture(found[step], step) for step in sorted({min(found), max(found)})]
