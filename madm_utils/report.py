"""`report.html`: one file with everything in it, which asks nothing of the network and opens from a disk.

`report_template.html` is the page; the styles, the scripts and the data, as JSON, are put into it. Pictures are WebP;
labels and predictions are compressed class ids that the page colours, so that classes can be switched off and errors
shown. Of a 512x512 scene the input takes 11 kB (depth) to 51 kB (event), a label or prediction 3 kB, ten times that of
noise; written as text it is a third more.
"""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from madm_utils.comparison import COLUMNS, Evaluation, notes

TEMPLATE = Path(__file__).with_name("report_template.html")
PARTS = {"STYLE": "report.css", "SCRIPT": "report.js", "VIEWER": "report_viewer.js"}


def write_report(path: Path, evaluations: Sequence[Evaluation], comparison: dict[str, Any]) -> None:
    """Write the page about one model or several.

    Args:
        path: of the file.
        evaluations: with the pictures to show.
        comparison: of them, of `comparison.compare`.
    """
    page = TEMPLATE.read_text(encoding="utf-8")
    for mark, name in PARTS.items():
        page = page.replace(f"/* {mark} */", TEMPLATE.with_name(name).read_text(encoding="utf-8"))
    # In a script element `<` could end it or begin a comment, whatever the names of models and files are.
    data = json.dumps(report_data(evaluations, comparison), allow_nan=False).replace("<", r"\u003c")
    path.write_text(page.replace("/* DATA */", data), encoding="utf-8")


def report_data(evaluations: Sequence[Evaluation], comparison: dict[str, Any]) -> dict[str, Any]:
    """What the page shows, as JSON has it.

    `groups` are the sets of images that models have in common, each with its classes; a model names its group.
    """
    groups: list[list[Evaluation]] = []
    for evaluation in evaluations:
        for group in groups:
            if group[0].comparable(evaluation):
                group.append(evaluation)
                break
        else:
            groups.append([evaluation])
    numbers = {id(evaluation): number for number, group in enumerate(groups) for evaluation in group}
    return {
        "title": evaluations[0].model.name if len(evaluations) == 1 else f"Comparison of {len(evaluations)} models",
        "columns": COLUMNS,
        "notes": notes(comparison),
        "comparison": comparison,
        "groups": [_group_data(*named) for named in zip(groups, _group_names(groups), strict=True)],
        "models": [_model_data(evaluation, numbers[id(evaluation)]) for evaluation in evaluations],
        "versions": evaluations[0].metrics["versions"],
    }


def _group_names(groups: Sequence[Sequence[Evaluation]]) -> list[str]:
    """The split of each group, with its models where several groups are of one split."""
    splits = [f"{group[0].model.task.target}, {group[0].metrics['split']} split" for group in groups]
    return [
        f"{split} ({', '.join(e.model.name for e in group)})" if splits.count(split) > 1 else split
        for split, group in zip(splits, groups, strict=True)
    ]


def _group_data(group: Sequence[Evaluation], name: str) -> dict[str, Any]:
    task = group[0].model.task
    samples = {index: sample for e in reversed(group) for index, sample in e.measurement.samples.items()}
    conditions = {image.index: image.condition or image.sequence for image in group[0].measurement.images}
    return {
        "name": name,
        "classes": list(task.class_names),
        "palette": [list(color) for color in task.palette],
        "images": [
            {
                "index": index,
                "file": sample.file_name,
                "condition": conditions[index],
                "size": list(sample.size),
                "input": f"data:image/webp;base64,{_text(sample.image)}",
                "label": _text(sample.label),
            }
            for index, sample in sorted(samples.items())
        ],
    }


def _model_data(evaluation: Evaluation, group: int) -> dict[str, Any]:
    metrics, measurement = evaluation.metrics, evaluation.measurement
    ious = {image.index: image.iou() for image in measurement.images if image.index in measurement.samples}
    return {
        "name": evaluation.model.name,
        "group": group,
        "paths": list(evaluation.model.paths),
        "settings": metrics["settings"],
        "protocol": metrics["protocol"],
        "confusion": metrics["confusion_matrix"],
        "classes": metrics["class_names"],
        "boundary": metrics["boundary_iou"]["per_class"],
        "accuracy": {name: row["acc"] for name, row in metrics["per_class"].items()},
        "calibration": metrics["calibration"],
        "worst": [row["index"] for row in metrics["worst_images"]],
        "iou": {index: iou if iou == iou else None for index, iou in ious.items()},
        "predictions": {index: _text(sample.prediction) for index, sample in measurement.samples.items()},
    }


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
