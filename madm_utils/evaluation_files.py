"""The folder of results: everything is written beside it first, then takes the place of an earlier evaluation.

metrics.json, confusion_matrix.csv, confusion_matrix.png, pictures/, worst/, report.html    of one model
comparison.json, comparison.md, comparison.csv, report.html, <model>/ with the above        of several
"""

import csv
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from madm_utils import comparison as tables
from madm_utils.cli import UserError
from madm_utils.comparison import Evaluation, compare
from madm_utils.evaluated_models import FILES, MARKS, PICTURE_FOLDERS, EvaluatedModel, folder_name
from madm_utils.report import write_report
from madm_utils.sample_pictures import PICTURE_NAME, save_grids

_STAGING = ".evaluation.tmp"


def check_places(output_dir: Path, models: Sequence[EvaluatedModel]) -> None:
    """Raise `UserError` where a file lies in the place of a folder of the results, or a folder in that of a file."""
    sub_folders = [output_dir / folder_name(model) for model in models] if len(models) > 1 else []
    for folder in (output_dir, *sub_folders):
        for path in (folder, *(folder / name for name in PICTURE_FOLDERS)):
            if path.is_file():
                raise UserError(f"{path} is a file, where results need a folder; move it or give another --output_dir")
        for path in (folder / name for name in (*FILES, *MARKS)):
            if path.is_dir():
                raise UserError(f"{path} is a folder, where results need a file; move it or give another --output_dir")


def write_results(output_dir: Path, evaluations: Sequence[Evaluation], classes: Sequence[str] = ()) -> None:
    """Write the results of one model, or of several with a comparison, in place of an earlier evaluation.

    Args:
        output_dir: the folder; files in it that are not of an evaluation stay.
        evaluations: in the order of the rows.
        classes: see `comparison.compare`.

    Raises:
        UserError: it cannot be written; an earlier evaluation is still there then.
    """
    _remove_unfinished(output_dir)
    # With the machine, because those that share a disk may have processes of equal numbers.
    staging = output_dir / f"{_STAGING}-{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        staging.mkdir(parents=True)
        if len(evaluations) == 1:
            _write_single(staging, evaluations[0])
        else:
            for evaluation in evaluations:
                folder = staging / folder_name(evaluation.model)
                folder.mkdir()
                _write_single(folder, evaluation)
            _write_comparison(staging, evaluations, classes)
        _publish(staging, output_dir)
    except OSError as error:
        raise UserError(f"cannot write the results to {output_dir} ({error}); give another --output_dir") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _remove_unfinished(output_dir: Path) -> None:
    """Delete what killed processes of this machine left half-written.

    Of another machine it is not known whether its process still writes.
    """
    for path in output_dir.glob(f"{_STAGING}-*"):
        made = re.fullmatch(rf"{re.escape(_STAGING)}-(.*)-(\d+)-[0-9a-f]+", path.name)
        # An equal number is not this process, which begins here: a container may give the same one at every start.
        if made and made[1] == platform.node() and (int(made[2]) == os.getpid() or not _is_running(int(made[2]))):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except OSError:
        return True  # of another user
    return True


def _write_single(folder: Path, evaluation: Evaluation) -> None:
    from madm_utils.visualization import save_confusion_plot

    metrics, measurement, task = evaluation.metrics, evaluation.measurement, evaluation.model.task
    with open(folder / "confusion_matrix.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prediction \\ label", *task.class_names, "ignored"])
        rows = zip(task.class_names, measurement.confusion[:-1].tolist(), strict=True)
        writer.writerows([name, *counts] for name, counts in rows)
    save_confusion_plot(measurement.confusion, task.class_names, folder / "confusion_matrix.png")
    shown = [measurement.samples[index] for index in sorted(evaluation.spread)]
    save_grids(folder / "pictures", [(sample.file_name, sample) for sample in shown], task)
    worst = [(f"IoU {image.iou():.2f} %  {image.file_name}", measurement.samples[image.index])
             for image in measurement.worst()]  # fmt: skip
    save_grids(folder / "worst", worst, task, errors=True)
    write_report(folder / "report.html", [evaluation], compare([evaluation]))
    _write_json(folder / "metrics.json", metrics)


def _write_comparison(folder: Path, evaluations: Sequence[Evaluation], classes: Sequence[str]) -> None:
    comparison = compare(evaluations, classes)
    (folder / "comparison.md").write_text(tables.to_markdown(comparison), encoding="utf-8")
    (folder / "comparison.csv").write_text(tables.to_csv(comparison), encoding="utf-8")
    write_report(folder / "report.html", evaluations, comparison)
    _write_json(folder / "comparison.json", comparison)


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _publish(staged: Path, folder: Path) -> None:
    """Move everything of `staged` into `folder`, and remove what an earlier evaluation left there beside it."""
    earlier = _earlier_results(folder)
    for name in PICTURE_FOLDERS:
        for path in sorted((staged / name).glob("*")):
            (folder / name).mkdir(exist_ok=True)
            os.replace(path, folder / name / path.name)
            earlier.discard(folder / name / path.name)
    for mark in sorted(staged.glob("*/metrics.json")):
        sub_folder = folder / mark.parent.name
        sub_folder.mkdir(exist_ok=True)
        _publish(mark.parent, sub_folder)
        earlier = {path for path in earlier if sub_folder not in path.parents}
    # Marks come last: where one of them lies, the files beside it are ours.
    for name in (*FILES, *MARKS):
        if (staged / name).exists():
            os.replace(staged / name, folder / name)
            earlier.discard(folder / name)
    for path in earlier:
        path.unlink(missing_ok=True)
    emptied = {path.parent for path in earlier} - {folder}
    for path in sorted(emptied, key=lambda path: len(path.parts), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _earlier_results(folder: Path) -> set[Path]:
    """Files of an earlier evaluation in `folder`; without its mark, what lies there is not ours."""
    marks = [folder / name for name in MARKS if (folder / name).is_file()]
    if not marks:
        return set()
    found = {*marks, *(folder / name for name in FILES)}
    for name in PICTURE_FOLDERS:
        found |= {path for path in (folder / name).glob("*") if PICTURE_NAME.fullmatch(path.name)}
    if folder / "comparison.json" in marks:
        try:
            rows = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))["models"]
            sub_folders = [folder / row["folder"] for row in rows]
        except (ValueError, KeyError, TypeError):
            sub_folders = []  # damaged: whose sub-folders these are is not known
        found |= {path for sub_folder in sub_folders for path in _earlier_results(sub_folder)}
    return found
