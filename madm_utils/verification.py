"""`--verify`: everything that is wrong with a prepared or a raw split, its class histogram, and a contact sheet.

Every image is decoded once, in worker processes; of each only digests and counts are kept, and a few small pictures.
Two frames are duplicates when their decoded pixels are equal (SHA-256), whatever their files look like.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from madm_utils.arrow_writer import content_digest
from madm_utils.cli import UserError
from madm_utils.contact_sheet import LABELLED_SAMPLES, UNLABELLED_SAMPLES, Sample, contact_sheet
from madm_utils.conversion import PublishedStatistics
from madm_utils.event_recording import close_recording
from madm_utils.files import writing
from madm_utils.inspection import PreparedRows, RawImages, Seen, inspect_all, one_line
from madm_utils.label_spaces import IGNORE_INDEX
from madm_utils.prepared_data import METADATA_FILE, Metadata, undecoded
from madm_utils.raw_datasets import RAW_DATASETS, RawDataset, RawFile
from madm_utils.sampling import evenly_spaced
from madm_utils.verification_report import NOTE, OK, PROBLEM, Check, Report

if TYPE_CHECKING:
    import datasets

MOSTLY = 0.5
"""Where more than this share of the images have one value only, something went wrong; fewer are worth a note."""
_NAMES_PER_LINE = 6


def verify_prepared(folder: Path, num_proc: int = 1) -> Report:
    """Re-read the whole prepared split in `folder` with `num_proc` processes; nothing is changed.

    Checked are: Arrow files, columns and numbers against the metadata, the published number of images, that every
    image and label decodes, sizes and modes, class ids, class statistics per image and in total, names, equal,
    constant and unlabelled images. What is wrong is in the report, nothing is raised for it.

    Which dataset and split it is, `folder` says, `DIR/<dataset>/<split>`: training finds the data by it, and a
    report goes beside them whatever their metadata hold.
    """
    folder = Path(os.path.abspath(folder))
    report = Report(folder.parent.name, folder.name, "prepared")
    try:
        metadata = Metadata.load(folder)
        report.fingerprint = metadata.fingerprint
        data = _open(folder)
    except UserError as error:
        return _unusable(report, "files", "metadata and Arrow files", error)
    report.num_images, report.class_names = len(data), metadata.class_names
    _check_identity(report, folder, metadata)
    _check_columns(report, data, metadata)
    _compare_number(report, "images", metadata.num_images, METADATA_FILE, PROBLEM)
    known = RAW_DATASETS.get(report.dataset)
    if known and report.split in known.splits:
        _compare_number(report, "published images", known.splits[report.split].published_count, "published", NOTE)
    if "image" not in data.column_names or not len(data):
        if not len(data):
            report.problems.append(f"{folder} holds no image; prepare it again")
        return report
    labelled = metadata.labelled and "label" in data.column_names
    names = data["file_name"] if "file_name" in data.column_names else range(len(data))
    tally = _Tally(report, labelled, names, len(metadata.class_names))
    rows = PreparedRows(data, metadata, labelled, tally.sampled)
    tally.add_all(inspect_all(rows, range(len(data)), num_proc, f"verify {report.dataset} {report.split}"))
    size = "any" if metadata.image_size is None else _size(metadata.image_size)
    tally.finish(size, "classes of the native label" if metadata.resized else "of the label")
    _compare_totals(report, metadata)
    _check_names(report, data)
    _list_skipped(report, metadata)
    _compare_content(report, metadata, tally.row_digests)
    _draw(report, tally.samples)
    return report


def verify_raw(
    dataset: RawDataset,
    split: str,
    files: Sequence[RawFile],
    num_proc: int = 1,
    *,
    image_range: tuple[float, float] | None = None,
    complete: bool = True,
    statistics: PublishedStatistics | None = None,
    scratch: Path | None = None,
) -> Report:
    """Read every file of a raw split, as preparing it would, without writing anything.

    Args:
        dataset: description of the dataset.
        split: one of its splits.
        files: what `find_files` returned.
        num_proc: worker processes.
        image_range: of images with more than 8 bits: the values that become 0 and 255.
        complete: whether `files` is meant to be the whole published selection; another number is then a problem.
        statistics: published class statistics to compare with.
        scratch: folder for what has to be unpacked meanwhile, created if need be; default: the system's temporary
            folder.
    """
    spec = dataset.splits[split]
    report = Report(dataset.name, split, "raw", len(files), class_names=dataset.class_names)
    _compare_number(report, "published images", spec.published_count, "published", PROBLEM if complete else NOTE)
    if not files:
        report.problems.append(f"{dataset.name} {split} holds no image")
        return report
    labelled = bool(spec.labels) or any(file.label is not None for file in files)
    num_ids = max((file.label_files.num_ids for file in files if file.label_files), default=0)
    tally = _Tally(report, labelled, [file.file_name for file in files], num_ids)
    if scratch is not None:
        with writing(scratch):
            scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="verify-") as unpacked:
        inspect = RawImages(dataset.class_names, labelled, image_range, statistics, Path(unpacked), tally.sampled)
        found = inspect_all(inspect, list(enumerate(files)), num_proc, f"verify raw {dataset.name} {split}")
        try:
            tally.add_all(found)
        finally:
            close_recording()  # it may lie unpacked in this folder
    tally.finish("any", "")
    _draw(report, tally.samples)
    return report


def unusable_raw(dataset: RawDataset, split: str, error: UserError) -> Report:
    """Report of a raw split whose files could not even be found or paired, as `error` says."""
    return _unusable(Report(dataset.name, split, "raw"), "files", "found and paired", error)


def _unusable(report: Report, what: str, expected: str, error: UserError) -> Report:
    report.checks.append(Check(what, expected, "not usable", PROBLEM))
    report.problems.append(one_line(error))
    return report


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _open(folder: Path) -> "datasets.Dataset":
    """The Arrow data of a split, images undecoded, even where it does not fit the metadata."""
    import datasets

    try:
        data = undecoded(datasets.load_from_disk(str(folder)))
        # Damaged offsets would have rows read from anywhere in the memory. This does not read the images.
        data.data.validate(full=True)
        return data
    except Exception as error:  # missing files, broken JSON and broken Arrow streams all raise types of their own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder} cannot be opened as an Arrow dataset ({reason}); prepare it again") from None


class _Tally:
    """Adds up what the images of a split showed, and writes the result into its report."""

    def __init__(self, report: Report, labelled: bool, names: Sequence[object], num_ids: int) -> None:
        self.report, self.labelled, self.names, self.num_ids = report, labelled, names, num_ids
        number = LABELLED_SAMPLES if labelled else UNLABELLED_SAMPLES
        self.sampled = frozenset(evenly_spaced(len(names), number))
        self.samples: list[Sample] = []
        self.problems: dict[str, list[str]] = {}
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.modes: Counter[str] = Counter()
        self.constant: list[str] = []
        self.unlabelled: list[str] = []
        self.first: dict[bytes, tuple[int, bytes]] = {}
        self.groups: dict[int, list[int]] = {}
        self.contradictions: list[tuple[int, int]] = []
        self.unknown_ids: set[int] = set()
        self.unknown_files: list[str] = []
        self.row_digests: list[str] = []
        self.pixels = np.zeros(len(report.class_names), np.int64)
        self.images = np.zeros(len(report.class_names), np.int64)

    def add_all(self, found: Generator[Seen, None, None]) -> None:
        with closing(found):  # ends the workers when reading is interrupted
            for index, seen in enumerate(found):
                self._add(index, seen)

    def _add(self, index: int, seen: Seen) -> None:
        for check, text in seen.problems:
            self.problems.setdefault(check, []).append(text)
        if seen.unknown_ids:
            self.unknown_ids.update(seen.unknown_ids)
            self.unknown_files.append(seen.unknown_in or seen.file_name)
        if seen.counts is not None:
            counts = np.asarray(seen.counts, np.int64)
            self.pixels += counts
            self.images += counts > 0
        self.row_digests.append(seen.row_digest)
        if seen.sample is not None:
            self.samples.append(seen.sample)
        if seen.unlabelled:
            self.unlabelled.append(seen.file_name)
        if seen.size is None:
            return
        self.sizes[seen.size] += 1
        self.modes[{"L": "grey"}.get(seen.mode, seen.mode)] += 1
        if seen.constant:  # not counted as duplicates too: empty pictures are all alike
            self.constant.append(seen.file_name)
            return
        first, label_digest = self.first.setdefault(seen.digest, (index, seen.label_digest))
        if first != index:
            self.groups.setdefault(first, [first]).append(index)
            if label_digest and seen.label_digest and label_digest != seen.label_digest:
                self.contradictions.append((first, index))

    def finish(self, expected_size: str, expected_counts: str) -> None:
        """Write everything into the report: table, problems, notes, histogram."""
        report = self.report
        report.sizes = {_size(size): number for size, number in self.sizes.most_common()}
        if self.labelled:
            report.class_pixel_counts, report.images_per_class = self.pixels.tolist(), self.images.tolist()
        self._row("image", "images readable", "all", "all")
        sizes = next(iter(report.sizes), "none") if len(self.sizes) < 2 else f"{len(self.sizes)} sizes"
        self._row("sizes", "image size", expected_size, sizes)
        self._row("modes", "image mode", "grey or RGB", " and ".join(sorted(self.modes)) or "none")
        self._row("events", "events", "finite values", hidden="events" not in self.problems)
        if self.labelled:
            self._row("pairs", "labels", "for all", "for all", hidden=report.kind == "prepared")
            self._row("label", "labels readable", "all", "all")
            self._row("label size", "label size", "of the image", "equal")
            self._unknown()
            self._row("counts", "pixel counts", expected_counts, "equal", hidden=report.kind == "raw")
            self._row("statistics", "published counts", "of the labels", hidden="statistics" not in self.problems)
            self._listed("unlabelled images", self.unlabelled, "no labelled pixel")
        self._duplicates()
        self._listed("constant images", self.constant, "one value only")

    def _row(self, check: str, what: str, expected: str, found: str = "", hidden: bool = False) -> None:
        wrong = self.problems.get(check, [])
        if wrong:
            self.report.problems += wrong
            self.report.checks.append(Check(what, expected, f"{len(wrong)} wrong", PROBLEM))
        elif not hidden:
            self.report.checks.append(Check(what, expected, found))

    def _unknown(self) -> None:
        highest = self.num_ids - 1
        expected = f"0..{highest}, {IGNORE_INDEX}"
        if not self.unknown_files:
            shown = f"{np.count_nonzero(self.images)} of {len(self.images)} classes"
            self.report.checks.append(Check("class ids", expected, shown))
            return
        ids, number = sorted(self.unknown_ids), len(self.unknown_files)
        self.report.checks.append(Check("class ids", expected, f"also {_some(ids)}", PROBLEM))
        self.report.problems.append(
            f"class ids {ids} outside the map in {number} label{'s' if number > 1 else ''}, first "
            f"{self.unknown_files[0]}; expected 0..{highest} or {IGNORE_INDEX} (ignore). Check that these are the "
            "right label files and that their ids were converted."
        )

    def _listed(self, what: str, names: list[str], meaning: str) -> None:
        """A line about images that are unusual; they are a problem when most images are."""
        status = OK if not names else PROBLEM if len(names) > MOSTLY * self.report.num_images else NOTE
        self.report.checks.append(Check(what, "none", str(len(names) or "none"), status))
        if names:
            lines = self.report.problems if status == PROBLEM else self.report.notes
            lines.append(f"{meaning} in {len(names)} of {self.report.num_images} images: {_some(names)}")

    def _duplicates(self) -> None:
        report = self.report
        names = [[one_line(self.names[index]) for index in group] for group in self.groups.values()]
        report.duplicates = names
        extra = sum(len(group) - 1 for group in names)
        status = PROBLEM if self.contradictions else NOTE if names else OK
        report.checks.append(Check("duplicate frames", "none", str(extra or "none"), status))
        report.notes += [f"{len(group)} images show the same pixels: {_some(group)}" for group in names]
        for first, second in self.contradictions:
            pair = " and ".join(one_line(self.names[index]) for index in (first, second))
            report.problems.append(f"{pair} show the same pixels but have different labels; one of them is wrong")


def _some(values: Sequence[object]) -> str:
    shown = ", ".join(str(value) for value in values[:_NAMES_PER_LINE])
    return shown + (f" and {len(values) - _NAMES_PER_LINE} more" if len(values) > _NAMES_PER_LINE else "")


# --- The whole split


def _compare_number(report: Report, what: str, expected: int | None, where: str, status: str) -> None:
    if expected is None:
        return
    if report.num_images == expected:
        report.checks.append(Check(what, str(expected), str(report.num_images)))
        return
    report.checks.append(Check(what, str(expected), str(report.num_images), status))
    place = f"{report.dataset} {report.split} holds {report.num_images} images"
    if where == METADATA_FILE:
        report.problems.append(f"{place}, its {METADATA_FILE} says {expected} images; prepare it again")
    else:
        lines = report.problems if status == PROBLEM else report.notes
        reason = "was everything downloaded and unpacked?" if status == PROBLEM else "expected if a part was chosen"
        lines.append(f"{place}, the published selection has {expected}; {reason}")


def _check_identity(report: Report, folder: Path, metadata: Metadata) -> None:
    """Compare the folder's place with what its metadata say it holds."""
    place, said = f"{report.dataset} {report.split}", one_line(f"{metadata.dataset} {metadata.split}")
    report.checks.append(Check("dataset and split", place, said, OK if place == said else PROBLEM))
    if place != said:
        report.problems.append(
            f"{one_line(folder)} is the place of {place}, but its {METADATA_FILE} says that it holds {said}; was it "
            "copied or renamed? Move it back, or prepare it again"
        )


def _check_columns(report: Report, data: "datasets.Dataset", metadata: Metadata) -> None:
    import datasets

    images = ["image", "label"] if metadata.labelled else ["image"]
    expected = [*images, "file_name", "sequence", "condition", *(["class_pixel_counts"] if metadata.labelled else [])]
    missing = [name for name in expected if name not in data.column_names]
    wrong = [name for name in images if name not in missing and not isinstance(data.features[name], datasets.Image)]
    names = getattr(getattr(data.features.get("classes"), "feature", None), "names", None)
    problems = [
        *([f"columns {missing} are missing, there are {sorted(data.column_names)}"] if missing else []),
        *([f"columns {wrong} are not images"] if wrong else []),
        *(
            [f"class names of the Arrow data are {names}, {METADATA_FILE} says {list(metadata.class_names)}"]
            if names is not None and list(names) != list(metadata.class_names)
            else []
        ),
    ]
    found = f"{len(missing)} missing" if missing else "wrong" if problems else "all"
    report.checks.append(Check("columns", ", ".join(images) + ", ...", found, PROBLEM if problems else OK))
    report.problems += [f"{report.dataset} {report.split}: {problem}; prepare it again" for problem in problems]


def _compare_totals(report: Report, metadata: Metadata) -> None:
    if report.class_pixel_counts is None:
        return
    pairs = [
        ("class statistics", metadata.class_pixel_counts, report.class_pixel_counts),
        ("images per class", metadata.images_per_class, report.images_per_class),
    ]
    for what, stored, counted in pairs:
        if stored is None:
            continue
        agree = list(stored) == counted
        report.checks.append(
            Check(what, f"of {METADATA_FILE}", "equal" if agree else "others", OK if agree else PROBLEM)
        )
        if not agree:
            report.problems.append(
                f"{what} in {METADATA_FILE} are {list(stored)}, the sum over the images is {counted}; prepare it again"
            )


def _compare_content(report: Report, metadata: Metadata, row_digests: Sequence[str]) -> None:
    if not metadata.content:
        return
    agree = all(row_digests) and content_digest(iter(row_digests)) == metadata.content
    found = "equal" if agree else "another"
    report.checks.append(Check("content", f"of {METADATA_FILE}", found, OK if agree else PROBLEM))
    if not agree:
        report.problems.append(
            f"{report.dataset} {report.split}: the images and labels are not those that were written (the content "
            f"digest in {METADATA_FILE} differs); prepare it again"
        )


def _check_names(report: Report, data: "datasets.Dataset") -> None:
    if "file_name" not in data.column_names:
        return
    twice = [str(name) for name, number in Counter(data["file_name"]).items() if number > 1]
    report.checks.append(
        Check(
            "file names",
            "all different",
            "all different" if not twice else f"{len(twice)} twice",
            PROBLEM if twice else OK,
        )
    )
    if twice:
        report.problems.append(one_line(f"file names occur more than once: {_some(twice)}; prepare it again"))


def _list_skipped(report: Report, metadata: Metadata) -> None:
    skipped = metadata.skipped
    report.checks.append(Check("skipped files", "none", str(len(skipped) or "none"), NOTE if skipped else OK))
    report.notes += [one_line(f"skipped: {entry['file']} ({entry['reason']})") for entry in skipped]


def _draw(report: Report, samples: Sequence[Sample]) -> None:
    if not samples:
        return
    size = ", ".join(list(report.sizes)[:3]) + (", ..." if len(report.sizes) > 3 else "")
    title = f"{report.dataset} {report.split} ({report.kind}): {report.num_images} images, {size}"
    file = "report.json" if report.kind == "prepared" else "raw_report.json"
    number = len(report.problems)
    verdict = "" if report.ok else f"{number} problem{'s' if number > 1 else ''}, see {file}"
    report.sheet = contact_sheet(samples, title, verdict, report.class_names, report.class_shares())
