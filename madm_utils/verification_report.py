"""What a verification found: a table on screen, `report.json`, and a contact sheet per split."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from madm_utils.files import replacing, writing

OK, NOTE, PROBLEM = "ok", "note", "PROBLEM"
PRINTED_LINES = 20
"""Problems, and notes, of one split on the screen; `report.json` has all."""


@dataclass(frozen=True)
class Check:
    """One line of the table. A note is worth knowing, e.g. equal frames in the owners' files; nothing is broken."""

    what: str
    expected: str
    found: str
    status: str = OK


@dataclass
class Report:
    """What the verification of one split found."""

    dataset: str
    split: str
    kind: str
    """`prepared` or `raw`."""
    num_images: int = 0
    checks: list[Check] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """One line each: the file, what is wrong with it."""
    notes: list[str] = field(default_factory=list)
    class_names: tuple[str, ...] = ()
    class_pixel_counts: list[int] | None = None
    """Labelled pixels per class at native resolution, `None` without labels."""
    images_per_class: list[int] | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    """`HEIGHTxWIDTH` -> number of images."""
    duplicates: list[list[str]] = field(default_factory=list)
    """Groups of files that show the same pixels."""
    fingerprint: str = ""
    """Of the prepared split, from its metadata."""
    sheet: Image.Image | None = field(default=None, repr=False, compare=False)
    """Contact sheet, `None` when no image could be decoded."""

    @property
    def ok(self) -> bool:
        """Whether nothing is broken; notes do not count."""
        return not self.problems

    def class_shares(self) -> list[float] | None:
        """Share of each class in the labelled pixels, 0..1; `None` without labelled pixels."""
        total = sum(self.class_pixel_counts or ())
        return [count / total for count in self.class_pixel_counts] if total else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form, as `report.json` holds it."""
        shares = self.class_shares() or [0.0] * len(self.class_names)
        classes = None
        if self.class_pixel_counts is not None:
            columns = zip(self.class_names, self.class_pixel_counts, shares, self.images_per_class, strict=True)
            classes = [
                {"id": class_id, "name": name, "pixels": pixels, "share": share, "images": images}
                for class_id, (name, pixels, share, images) in enumerate(columns)
            ]
        return {
            "dataset": self.dataset,
            "split": self.split,
            "kind": self.kind,
            "ok": self.ok,
            "images": self.num_images,
            "fingerprint": self.fingerprint,
            "checks": [vars(check) for check in self.checks],
            "problems": self.problems,
            "notes": self.notes,
            "sizes": self.sizes,
            "duplicates": self.duplicates,
            "classes": classes,
        }


def write_report(reports: Sequence[Report], folder: Path) -> list[Path]:
    """Write the reports of the splits of one dataset into `folder`, each file complete or not at all.

    Prepared splits: `report.json` and `<split>.png`; raw ones: `raw_report.json` and `raw_<split>.png`. What an
    earlier report says about further splits is kept.

    Returns:
        The files written.

    Raises:
        UserError: they cannot be written, e.g. because the disk is full.
    """
    written = []
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for kind in dict.fromkeys(report.kind for report in reports):
            written += _write_kind([report for report in reports if report.kind == kind], folder)
    return written


def _write_kind(reports: Sequence[Report], folder: Path) -> list[Path]:
    """Write the reports of prepared, or of raw splits."""
    prefix = "" if reports[0].kind == "prepared" else f"{reports[0].kind}_"
    path = folder / f"{prefix}report.json"
    splits = {**_earlier(path), **{report.split: report.to_dict() for report in reports}}
    content = {"ok": all(split["ok"] for split in splits.values()), "splits": list(splits.values())}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    written = [path]
    for report in reports:
        picture = folder / f"{prefix}{report.split}.png"
        if report.sheet is None:
            picture.unlink(missing_ok=True)
            continue
        with replacing(picture) as temporary:
            report.sheet.save(temporary, format="PNG")
        written.append(picture)
    return written


def _earlier(path: Path) -> dict[str, dict[str, Any]]:
    """Split -> entry of the report in `path`; nothing where there is none, or none that can be read."""
    try:
        return {entry["split"]: {"ok": False, **entry} for entry in json.loads(path.read_text("utf-8"))["splits"]}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def print_report(report: Report) -> None:
    """Print the table of checks, the class histogram, and the first problems and notes."""
    print(f"\n{report.dataset} {report.split} ({report.kind}): {report.num_images} images")
    _print_table(
        [("check", "expected", "found", ""), *(tuple(vars(check).values()) for check in report.checks)], "<<<<"
    )
    if report.class_pixel_counts is not None:
        shares = report.class_shares() or [0.0] * len(report.class_names)
        columns = zip(report.class_names, report.class_pixel_counts, shares, report.images_per_class, strict=True)
        print()
        _print_table(
            [
                ("id", "class", "pixels", "share", "images"),
                *(
                    (str(class_id), name, str(pixels), f"{100 * share:.2f} %", str(images))
                    for class_id, (name, pixels, share, images) in enumerate(columns)
                ),
            ],
            "><>>>",
        )
    for title, lines in (("problems", report.problems), ("notes", report.notes)):
        if lines:
            print(f"\n  {len(lines)} {title if len(lines) > 1 else title[:-1]}:")
            for line in lines[:PRINTED_LINES]:
                print(f"    {line}")
            if len(lines) > PRINTED_LINES:
                print(f"    ... and {len(lines) - PRINTED_LINES} more")


def _print_table(rows: Sequence[Sequence[str]], alignment: str) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:{side}{width}}" for cell, side, width in zip(row, alignment, widths, strict=True))
        print(("  " + "  ".join(cells)).rstrip())
