"""Several evaluated models beside each other: one dictionary, and the tables made from it."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from madm_utils.bootstrap import LEVEL, interval, paired_difference, resampled_sums
from madm_utils.cli import UserError
from madm_utils.evaluated_models import EvaluatedModel, folder_name
from madm_utils.measurement import Measurement
from madm_utils.metrics import class_iou, defined, mean_scores

COLUMNS = {
    "miou": "mIoU",
    "macc": "mAcc",
    "pacc": "pAcc",
    "fwiou": "fwIoU",
    "boundary_iou": "boundary IoU",
    "ece": "ECE",
}
"""Key of a score -> its name in tables, in their order."""


@dataclass(frozen=True)
class Evaluation:
    """One model, what was measured of it, and what is written about it."""

    model: EvaluatedModel
    measurement: Measurement
    metrics: dict[str, Any]
    """What `metrics.json` holds."""
    data: str
    """Equal for equal images and labels."""
    spread: frozenset[int] = frozenset()
    """Images of which `pictures/` is made."""

    def comparable(self, other: "Evaluation") -> bool:
        """Whether both are scored on the same pixels for the same classes, image by image."""
        same = [(e.model.task.class_names, e.model.task.target_label_map) for e in (self, other)]
        return same[0] == same[1] and self._same_images(other)

    def comparable_in(self, other: "Evaluation", classes: Sequence[str]) -> bool:
        """Whether both are scored on the same images with the same pixels of `classes`, whatever else they know."""
        return self._same_images(other) and all(
            np.array_equal(self.of_class(name)[:, 1], other.of_class(name)[:, 1]) for name in classes
        )

    def of_class(self, name: str) -> np.ndarray:
        """Counts of `metrics.class_counts` per image of one class, (N, 3)."""
        return self.measurement.stacked("pixels")[:, :, self.model.task.class_names.index(name)]

    def _same_images(self, other: "Evaluation") -> bool:
        same = [
            (e.data, e.model.task.target, e.metrics["protocol"], e.metrics["num_images"],
             # The published protocol brings labels to the resolution of the model.
             e.model.resolution if e.metrics["protocol"] == "paper" else None)
            for e in (self, other)
        ]  # fmt: skip
        return same[0] == same[1]


def check_classes(models: Sequence[EvaluatedModel], classes: Sequence[str]) -> None:
    """Raise `UserError` unless all models know the classes that a comparison is about."""
    for model in models:
        unknown = [name for name in classes if name not in model.task.class_names]
        if unknown:
            shared = [name for name in models[0].task.class_names if all(name in m.task.class_names for m in models)]
            raise UserError(
                f"--classes: {model.name} (task {model.task.name}) has no class {', '.join(map(repr, unknown))}; "
                f"classes of all models: {', '.join(shared) or 'none'}"
            )


def compare(evaluations: Sequence[Evaluation], classes: Sequence[str] = ()) -> dict[str, Any]:
    """What `comparison.json` holds: a row per model, IoU per class and per condition, in percent.

    Args:
        evaluations: the first one is what the others are compared with.
        classes: IoU of these only, and the mean of their IoUs as a further score `classes_miou` with its
            `classes_interval` and `classes_difference`; default: all. Every other score stays over all classes.
    """
    classes = list(dict.fromkeys(classes))
    names = classes or list(dict.fromkeys(name for e in evaluations for name in e.metrics["class_names"]))
    per_class = {
        name: {e.model.name: e.metrics["per_class"].get(name, {}).get("iou") for e in evaluations} for name in names
    }
    return {
        "models": [_row(e, evaluations[0], classes) for e in evaluations],
        "level": LEVEL,
        "classes": names,
        "chosen_classes": classes,
        "same_classes": len({e.model.task.class_names for e in evaluations}) == 1,
        "per_class": per_class,
        "conditions": _condition_tables(evaluations),
    }


def _row(evaluation: Evaluation, first: Evaluation, classes: Sequence[str]) -> dict[str, Any]:
    metrics = evaluation.metrics
    values = {**metrics, "boundary_iou": metrics["boundary_iou"]["miou"], "ece": metrics["calibration"]["ece"]}
    intervals = metrics["confidence_intervals"]
    row = {
        "name": evaluation.model.name,
        "folder": folder_name(evaluation.model),
        "model": list(evaluation.model.paths),
        **{key: metrics[key] for key in ("task", "split", "protocol", "num_images")},
        "dataset": evaluation.model.task.target,
        "approximations": approximations(metrics["settings"]),
        **{key: values[key] for key in COLUMNS},
        "confidence_intervals": {key: intervals[key] for key in COLUMNS},
        "difference": None,
    }
    if evaluation is not first and evaluation.comparable(first):
        pixels = (first.measurement.stacked("pixels"), evaluation.measurement.stacked("pixels"))
        row["difference"] = paired_difference(lambda counts: mean_scores(counts)["miou"], *pixels)
    return row | (_chosen_classes(evaluation, first, classes) if classes else {})


def approximations(settings: Mapping[str, Any]) -> str:
    """What was approximate about an evaluation with these settings of its `metrics.json`; empty: nothing."""
    exact_and_text = {
        "head_resolution": (1, "head at 1/{}"),
        "vae_decoder": (None, "VAE decoder {}"),
        "merge_lora": (False, "merged LoRA"),
        "quantize_unet": (None, "UNet in {}"),
    }
    values = {key: settings.get(key, exact) for key, (exact, _) in exact_and_text.items()}
    return ", ".join(t.format(values[key]) for key, (exact, t) in exact_and_text.items() if values[key] != exact)


def _chosen_classes(evaluation: Evaluation, first: Evaluation, classes: Sequence[str]) -> dict[str, Any]:
    """The mean IoU of `classes`, its interval and its difference to `first`.

    `None` where one of the classes has no IoU. Resamples in which one of them has none are left out.
    """
    own, others = (np.stack([e.of_class(name) for name in classes], axis=-1) for e in (evaluation, first))
    mean = _mean_iou(own.sum(0))
    paired = evaluation is not first and evaluation.comparable_in(first, classes)
    difference = paired_difference(_mean_iou, others, own) if paired else None
    return {
        "classes_miou": defined(mean),
        "classes_interval": None if np.isnan(mean) else interval(_mean_iou(resampled_sums(own))),
        "classes_difference": difference if difference and difference["difference"] is not None else None,
    }


def _mean_iou(counts: np.ndarray) -> np.ndarray:
    """Mean IoU of all classes of counts (..., 3, K) -> (...); NaN where one of them is not labelled."""
    return class_iou(counts).mean(-1)


def _condition_tables(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """One table per dataset that has conditions: mIoU of each model on the images of each."""
    tables: dict[str, dict[str, Any]] = {}
    for evaluation in evaluations:
        found = evaluation.metrics["conditions"]
        if found is None:
            continue
        key = f"{evaluation.model.task.target} {evaluation.metrics['split']}"
        table = tables.setdefault(key, {"dataset": key, "column": found["column"], "groups": {}})
        for name, scores in found["groups"].items():
            group = table["groups"].setdefault(name, {"num_images": scores["num_images"], "miou": {}})
            group["miou"][evaluation.model.name] = scores["miou"]
    return [table | {"names": list(table["groups"])} for table in tables.values()]


# --- tables ----------------------------------------------------------------------------------------------------------


def number(value: float | None, sign: str = "") -> str:
    """Two digits after the point, `-` for what is not defined."""
    return "-" if value is None else format(value, f"{sign}.2f")


def with_interval(value: float | None, bounds: Sequence[float] | None, sign: str = "") -> str:
    """e.g. `53.49 [51.20, 55.61]`."""
    if value is None or bounds is None:
        return number(value, sign)
    return f"{number(value, sign)} [{', '.join(number(bound, sign) for bound in bounds)}]"


def score_table(comparison: dict[str, Any]) -> list[list[str]]:
    """Header and one row per model."""
    first, several = comparison["models"][0]["name"], len(comparison["models"]) > 1
    means = ["mIoU"]
    if comparison["chosen_classes"]:
        means.append(f"mIoU of {len(comparison['chosen_classes'])} classes")
    heads = [head for mean in means for head in ((mean, f"{mean} - {first}") if several else (mean,))]
    table = [["model", "task", "images", *heads, *list(COLUMNS.values())[1:]]]
    for k, row in enumerate(comparison["models"]):
        cells = [(row["miou"], row["confidence_intervals"]["miou"], row["difference"])]
        if comparison["chosen_classes"]:
            cells.append((row["classes_miou"], row["classes_interval"], row["classes_difference"]))
        line = [row["name"], row["task"], str(row["num_images"])]
        for value, bounds, paired in cells:
            line.append(with_interval(value, bounds))
            if several and paired:
                line.append(with_interval(paired["difference"], paired["interval"], "+"))
            elif several:
                line.append("-" if k else "")
        table.append([*line, *(number(row[key]) for key in list(COLUMNS)[1:])])
    return table


def class_table(comparison: dict[str, Any]) -> list[list[str]]:
    """Header and one row per class."""
    names = [row["name"] for row in comparison["models"]]
    rows = [[name, *(number(ious[model]) for model in names)] for name, ious in comparison["per_class"].items()]
    return [["IoU", *names], *rows]


def condition_tables(comparison: dict[str, Any]) -> dict[str, list[list[str]]]:
    """Title -> header and one row per condition."""
    names = [row["name"] for row in comparison["models"]]
    return {
        f"mIoU by {table['column']}, {table['dataset']}": [
            [table["column"], "images", *names],
            *(
                [name, str(group["num_images"]), *(number(group["miou"].get(model)) for model in names)]
                for name, group in table["groups"].items()
            ),
        ]
        for table in comparison["conditions"]
    }


def notes(comparison: dict[str, Any]) -> list[str]:
    """What a reader of the tables has to know."""
    lines = [f"All numbers in percent; in brackets the {comparison['level']:g} % interval of a bootstrap over images."]
    lines += [f"{row['name']} is approximate: {row['approximations']}." for row in comparison["models"]
              if row["approximations"]]  # fmt: skip
    if any(row["difference"] for row in comparison["models"]):
        lines.append("The difference to the first model is paired: both on the same resampled images.")
    if any(row["difference"] is None for row in comparison["models"][1:]):
        lines.append("No difference (-) where images, labels, their size or classes are not those of the first model.")
    chosen = comparison["chosen_classes"]
    if chosen:
        lines.append(
            f"IoU per class and the mIoU of {len(chosen)} classes are of {', '.join(chosen)}; every other score, also "
            "by condition, is over all classes of its model. No mean (-) where one of them has no IoU."
        )
    if not comparison["same_classes"]:
        lines.append("The models know different classes, so their means are not of the same things; IoU per class is.")
    return lines


def to_text(comparison: dict[str, Any]) -> str:
    """The tables for a screen."""
    parts = [aligned(score_table(comparison)), aligned(class_table(comparison))]
    parts += [f"{title}\n{aligned(table)}" for title, table in condition_tables(comparison).items()]
    return "\n\n".join([*parts, "\n".join(notes(comparison))])


def to_markdown(comparison: dict[str, Any]) -> str:
    """The tables as a Markdown document."""
    titled = {"Scores": score_table(comparison), "IoU per class": class_table(comparison)}
    titled |= condition_tables(comparison)
    lines = ["# Comparison of models", "", *notes(comparison)]
    for title, (header, *rows) in titled.items():
        lines += ["", f"## {title}", "", _cells(header), "|" + "---|" * len(header), *map(_cells, rows)]
    return "\n".join(lines) + "\n"


def to_csv(comparison: dict[str, Any]) -> str:
    """One line per model with everything that `to_markdown` shows; what is not defined is empty."""
    rows = [_flat(row, comparison) for row in comparison["models"]]
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _flat(row: dict[str, Any], comparison: dict[str, Any]) -> dict[str, Any]:
    flat = {key: row[key] for key in ("name", "task", "dataset", "split", "protocol", "num_images")}
    bounded = {key: (row[key], row["confidence_intervals"][key]) for key in COLUMNS}
    bounded["miou_difference"] = _difference(row["difference"])
    if comparison["chosen_classes"]:
        bounded["classes_miou"] = (row["classes_miou"], row["classes_interval"])
        bounded["classes_miou_difference"] = _difference(row["classes_difference"])
    for key, (value, bounds) in bounded.items():
        flat[key] = value
        flat[f"{key}_low"], flat[f"{key}_high"] = bounds or (None, None)
    for name, ious in comparison["per_class"].items():
        flat[f"iou {name}"] = ious[row["name"]]
    for table in comparison["conditions"]:
        for name, group in table["groups"].items():
            flat[f"miou {table['dataset']} {name}"] = group["miou"].get(row["name"])
    return flat


def _difference(paired: dict[str, Any] | None) -> tuple[float | None, list[float] | None]:
    return (paired["difference"], paired["interval"]) if paired else (None, None)


def aligned(table: Sequence[Sequence[str]]) -> str:
    """A table in columns, the first to the left and the others to the right."""
    widths = [max(len(row[k]) for row in table) for k in range(len(table[0]))]
    lines = []
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def _cells(row: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |"
