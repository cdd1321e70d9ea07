"""Writing a split as Arrow shards that can be interrupted, taken up again, and made on several machines.

A split is cut into chunks of consecutive images; each becomes one Arrow file. Work in progress lies beside the split:

    DIR/<dataset>/.<split>.partial/
      plan.json                        what is being made: `SplitPlan.describe`
      data-00003-of-00047.arrow        a finished chunk, and
      data-00003-of-00047.json         its `Chunk` record: the chunk counts as finished once this is there

A chunk that an earlier run has finished from the same files with the same settings is not made again. `--shard I/N`
makes every N-th share of the chunks in the same folder, so joining the shares of many machines is `publish_split` on
a folder that holds all of them.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from madm_utils.cli import UserError
from madm_utils.conversion import PublishedStatistics, RawConversion, SceneConversion, row_features
from madm_utils.files import replace_folder, replacing
from madm_utils.label_spaces import STREET_CLASSES
from madm_utils.prepared_data import METADATA_FILE, Metadata, undecoded
from madm_utils.raw_files import RawPath
from madm_utils.raw_search import RawDataset, RawFile
from madm_utils.transforms import Size

ROWS_IN_MEMORY = 16
"""Rows a process holds before they go to disk; a native Cityscapes image is about 2.5 MB."""
SMALLEST_CHUNK = 16
MOST_CHUNKS = 48
"""A split of any size becomes about so many Arrow files. Fixed, so that every machine cuts it alike."""
PLAN_FILE = "plan.json"
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class SplitPlan:
    """A split that is to be written: what it is called, and how each of its items becomes a row."""

    dataset: str
    split: str
    class_names: tuple[str, ...]
    labelled: bool
    items: Sequence[Any]
    convert: Callable[[Any, Path], dict[str, Any]]
    """Picklable; (item, scratch folder) -> row, with `height` and `width` of the stored image."""
    identities: Sequence[Any]
    """What each item's row depends on beside `settings`, as JSON values."""
    settings: dict[str, Any] = field(default_factory=dict)
    resized: bool = False
    events: bool = False
    """Whether rows have an `events` column."""
    licence: dict[str, Any] | None = None

    @property
    def fingerprint(self) -> str:
        """Digest of all items and of how they are converted."""
        return _digest(self._head(), list(self.identities))

    def chunks(self) -> list[range]:
        """Positions of the items of each chunk."""
        count = len(self.items)
        size = max(SMALLEST_CHUNK, -(-count // MOST_CHUNKS))
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def describe(self) -> dict[str, Any]:
        """What `publish_split` needs to know, as JSON values; it does without the raw files."""
        return {
            **self._head(),
            "labelled": self.labelled,
            "events": self.events,
            "resized": self.resized,
            "licence": self.licence,
            "fingerprint": self.fingerprint,
            "num_items": len(self.items),
            "chunks": [_digest(self._head(), [self.identities[i] for i in chunk]) for chunk in self.chunks()],
        }

    def _head(self) -> dict[str, Any]:
        return {
            "dataset": self.dataset,
            "split": self.split,
            "class_names": list(self.class_names),
            "settings": self.settings,
        }


@dataclass(frozen=True)
class Chunk:
    """What a finished chunk holds."""

    digest: str
    """Of the items and settings it was made from."""
    num_bytes: int
    """Size of its Arrow file."""
    rows: tuple[str, ...]
    """SHA-256 of each row's images and label."""
    sizes: tuple[tuple[int, int], ...]
    """The different (height, width) of its images."""
    class_pixel_counts: tuple[int, ...] | None
    images_per_class: tuple[int, ...] | None
    skipped: tuple[dict[str, str], ...]

    @classmethod
    def load(cls, path: Path) -> "Chunk | None":
        """Read the record of a chunk; `None` unless it is there and its Arrow file has the size that it says."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            for key, value in values.items():
                if isinstance(value, list):
                    values[key] = tuple(tuple(v) if isinstance(v, list) else v for v in value)
            chunk = cls(**values)
            return chunk if path.with_suffix(".arrow").stat().st_size == chunk.num_bytes else None
        except (OSError, ValueError, TypeError, AttributeError):
            return None


@dataclass(frozen=True)
class OnError:
    """What to do about an image that cannot be used: stop, or leave it out, at most `limit` times."""

    skip: bool = False
    limit: int = 0


@dataclass(frozen=True)
class Share:
    """The part of a split's chunks that this process makes: share `index` of `count`, counted from 1."""

    index: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def __contains__(self, chunk: int) -> bool:
        return chunk % self.count == self.index - 1


def plan_raw_split(
    dataset: RawDataset,
    split: str,
    files: Sequence[RawFile],
    stored_size: Size | None,
    settings: dict[str, Any],
    image_range: tuple[float, float] | None = None,
    published: PublishedStatistics | None = None,
) -> SplitPlan:
    """Plan the conversion of `files`, the selected ones of one split, to `stored_size` (native for `None`)."""
    labelled = any(file.label is not None for file in files)
    return SplitPlan(
        dataset.name,
        split,
        dataset.class_names,
        labelled,
        files,
        RawConversion(len(dataset.class_names), stored_size, image_range, published),
        [_identity(file) for file in files],
        {**settings, "stored_size": None if stored_size is None else list(stored_size)},
        stored_size is not None,
        any(file.events is not None for file in files),
        None if dataset.licence is None else asdict(dataset.licence),
    )


def plan_synthetic_split(modality: str, split: str, labelled: bool, count: int, seed: int, side: int) -> SplitPlan:
    """Plan `count` procedural street scenes of `side` x `side` pixels; `seed` and `split` decide what they show."""
    from madm_utils.scenes import scene_seed

    items = [(index, scene_seed(seed, split, modality, index)) for index in range(count)]
    return SplitPlan(
        f"synthetic_{modality}",
        split,
        STREET_CLASSES,
        labelled,
        items,
        SceneConversion(split, modality, side, labelled),
        items,
        {"seed": seed, "resolution": side, "labelled": labelled},
    )


def partial_folder(output_dir: Path, dataset: str, split: str) -> Path:
    """Folder of the work in progress on a split."""
    return output_dir / dataset / f".{split}.partial"


def write_chunks(
    plan: SplitPlan, output_dir: Path, num_proc: int, share: Share, on_error: OnError, overwrite: bool = False
) -> None:
    """Make the chunks of `share` that are not there yet.

    Memory does not grow with the number of images: every process holds `ROWS_IN_MEMORY` of them.

    Raises:
        UserError: an image or label that cannot be used (the message names the file), more of them than
            `on_error` allows, work in progress of another plan, another process at work in the same folder, or no
            space on the disk. Finished chunks stay, and the same call goes on from there.
    """
    from tqdm import tqdm

    folder = partial_folder(output_dir, plan.dataset, plan.split)
    with _claimed(folder, share):
        if overwrite and _stored_plan(folder) not in (None, plan.describe()):
            for path in folder.iterdir():
                if not path.name.endswith(".lock"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        finished = _finished_chunks(plan, folder)
        chunks = plan.chunks()
        mine = [i for i in range(len(chunks)) if i in share]
        done = [i for i in mine if i in finished]
        if done:
            print(f"{plan.dataset} {plan.split}: {len(done)} of {len(mine)} shards are there already, going on")
        with replacing(folder / PLAN_FILE) as path:
            path.write_text(json.dumps(plan.describe(), indent=1) + "\n", encoding="utf-8")
        tally = _Tally(plan, on_error, [skip for i in done for skip in finished[i].skipped])
        jobs = [_Job(i, chunks[i], _chunk_path(folder, i, len(chunks))) for i in mine if i not in finished]
        with tqdm(
            total=sum(len(chunks[i]) for i in mine),
            initial=sum(len(chunks[i]) for i in done),
            desc=f"{plan.dataset} {plan.split}" + (f" ({share})" if share.count > 1 else ""),
            unit="image",
        ) as progress:
            _run(_Work(plan, on_error), jobs, num_proc, progress, tally)


def publish_split(output_dir: Path, dataset: str, split: str) -> Metadata:
    """Give a split whose chunks are all there its final name, `output_dir/<dataset>/<split>`, replacing an older one.

    Raises:
        UserError: chunks are missing; the message says which shares make them.
    """
    import datasets

    folder = partial_folder(output_dir, dataset, split)
    plan = _stored_plan(folder)
    if plan is None:
        raise UserError(f"{folder} holds no work in progress; prepare {dataset} first")
    count = len(plan["chunks"])
    paths = [_chunk_path(folder, i, count) for i in range(count)]
    found = [Chunk.load(path.with_suffix(".json")) for path in paths]
    chunks = [chunk for chunk, digest in zip(found, plan["chunks"], strict=True) if chunk and chunk.digest == digest]
    if len(chunks) < count:
        missing = [path.name for path, chunk in zip(paths, found, strict=True) if chunk is None]
        raise UserError(
            f"{dataset} {split}: {count - len(chunks)} of {count} shards are missing in {folder}, first "
            f"{(missing or ['one of other settings'])[0]}; run the shares (--shard I/N) that have not finished, "
            "then --merge again"
        )
    num_images = sum(len(chunk.rows) for chunk in chunks)
    skipped = [skip for chunk in chunks for skip in chunk.skipped]
    if not num_images:
        raise UserError(f"{dataset} {split}: not one image could be used; first: {skipped[0]['reason']}")
    sizes = {size for chunk in chunks for size in chunk.sizes}
    metadata = Metadata(
        dataset,
        split,
        tuple(plan["class_names"]),
        num_images,
        sizes.pop() if len(sizes) == 1 else None,
        _total(chunk.class_pixel_counts for chunk in chunks) if plan["labelled"] else None,
        _digest(plan["fingerprint"], skipped) if skipped else plan["fingerprint"],
        plan["resized"],
        _total(chunk.images_per_class for chunk in chunks) if plan["labelled"] else None,
        plan["settings"],
        tuple(skipped),
        content_digest(row for chunk in chunks for row in chunk.rows),
        plan["licence"],
    )
    features = row_features(metadata.class_names, plan["labelled"], plan["events"])
    with tempfile.TemporaryDirectory(dir=folder, prefix="state-") as temporary:
        # The library writes its own description of the columns; only the list of data files is ours.
        datasets.disable_progress_bars()
        try:
            datasets.Dataset.from_dict({name: [] for name in features}, features=features).save_to_disk(temporary)
        finally:
            datasets.enable_progress_bars()
        state = json.loads((Path(temporary) / "state.json").read_text(encoding="utf-8"))
        state["_fingerprint"] = metadata.fingerprint
        state["_data_files"] = [
            {"filename": path.name} for path, chunk in zip(paths, chunks, strict=True) if chunk.rows
        ]
        (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(Path(temporary) / "dataset_info.json", folder / "dataset_info.json")
    metadata.save(folder)
    final = output_dir / dataset / split
    replace_folder(folder, final)
    written = {path.name for path, chunk in zip(paths, chunks, strict=True) if chunk.rows}
    for path in final.iterdir():  # records of the chunks, locks, and what killed runs have left
        if path.name not in written | {"dataset_info.json", "state.json", METADATA_FILE}:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return metadata


def collect_chunks(others: Sequence[Path], output_dir: Path, dataset: str, split: str) -> None:
    """Copy finished chunks of a split from the output folders `others` of further machines into `output_dir`.

    Raises:
        UserError: one of them holds work on other files or with other settings.
    """
    folder = partial_folder(output_dir, dataset, split)
    for other in others:
        source = partial_folder(other, dataset, split)
        plan = _stored_plan(source)
        if plan is None:
            continue
        own = _stored_plan(folder)
        if own is None:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / PLAN_FILE, folder / PLAN_FILE)
        elif own != plan:
            raise UserError(f"{source} was made from other files or settings than {folder}: {_difference(own, plan)}")
        for record in sorted(source.glob("data-*.json")):
            if Chunk.load(record) and not Chunk.load(folder / record.name):
                for name in (record.with_suffix(".arrow").name, record.name):
                    with replacing(folder / name) as path:
                        shutil.copyfile(source / name, path)


def check_chunks(output_dir: Path, dataset: str, split: str) -> None:
    """Read every finished chunk of a split again and compare its rows with their digests.

    Raises:
        UserError: a chunk was damaged after it was written; it is removed, so that its share can make it again.
    """
    import datasets
    from tqdm import tqdm

    folder = partial_folder(output_dir, dataset, split)
    for record in tqdm(sorted(folder.glob("data-*.json")), desc=f"check {dataset} {split}", unit="shard"):
        chunk, path = Chunk.load(record), record.with_suffix(".arrow")
        try:
            if not chunk:
                raise ValueError("size")
            if chunk.rows:
                rows = undecoded(datasets.Dataset.from_file(str(path)))
                if tuple(row_digest(row) for row in rows) != chunk.rows:
                    raise ValueError("content")
        except Exception as error:  # a broken Arrow stream raises types of its own
            path.unlink(missing_ok=True)
            record.unlink()
            raise UserError(
                f"{path} was damaged after it was written ({error}) and is removed; run its share (--shard I/N) again"
            ) from None


def row_digest(row: dict[str, Any]) -> str:
    """SHA-256 over the bytes of a row's pictures, in hexadecimal."""
    digest = hashlib.sha256()
    for name in ("image", "label", "events"):
        if row.get(name) is not None:
            digest.update(row[name]["bytes"])
    return digest.hexdigest()


def content_digest(rows: Iterator[str]) -> str:
    """SHA-256 over the digests of all rows, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(bytes.fromhex(row))
    return digest.hexdigest()


# --- Work of one process


@dataclass(frozen=True)
class _Job:
    """A chunk to make: its number, its items, its file."""

    index: int
    items: range
    path: Path


@dataclass(frozen=True)
class _Work:
    """What every process needs to make any chunk."""

    plan: SplitPlan
    on_error: OnError

    def make(self, job: _Job, advance: Callable[[], None]) -> Chunk:
        """Convert the items of one chunk and write its Arrow file and record."""
        from datasets.arrow_writer import ArrowWriter

        plan = self.plan
        features = row_features(plan.class_names, plan.labelled, plan.events)
        digests, sizes, skipped, counts = [], set(), [], []
        try:
            with replacing(job.path) as path, tempfile.TemporaryDirectory(dir=job.path.parent) as scratch:
                with ArrowWriter(path=str(path), features=features, writer_batch_size=ROWS_IN_MEMORY) as writer:
                    for i in job.items:
                        try:
                            row = plan.convert(plan.items[i], Path(scratch))
                        except UserError as error:
                            if not self.on_error.skip:
                                raise
                            skipped.append({"file": _name(plan.items[i]), "reason": str(error)})
                        else:
                            sizes.add((row.pop("height"), row.pop("width")))
                            digests.append(row_digest(row))
                            counts.append(row.get("class_pixel_counts"))
                            writer.write(features.encode_example(row))
                        advance()
                    writer.finalize()
            counts = np.array(counts, np.int64) if plan.labelled and counts else None
            chunk = Chunk(
                _digest(plan._head(), [plan.identities[i] for i in job.items]),
                job.path.stat().st_size,
                tuple(digests),
                tuple(sorted(sizes)),
                None if counts is None else tuple(counts.sum(axis=0).tolist()),
                None if counts is None else tuple((counts > 0).sum(axis=0).tolist()),
                tuple(skipped),
            )
            with replacing(job.path.with_suffix(".json")) as path:
                path.write_text(json.dumps(asdict(chunk)) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"writing below {job.path.parent} failed ({error.strerror or error}); finished shards are kept: make "
                "room, or mend the disk, and run the same command again"
            ) from None
        return chunk


class _Tally:
    """Images left out so far, over all chunks."""

    def __init__(self, plan: SplitPlan, on_error: OnError, skipped: list[dict[str, str]]):
        self._plan, self._on_error, self._skipped = plan, on_error, skipped

    def add(self, chunk: Chunk) -> None:
        from tqdm import tqdm

        for skip in chunk.skipped:
            tqdm.write(f"skipped {skip['file']}: {skip['reason']}")
        self._skipped += chunk.skipped
        if len(self._skipped) > self._on_error.limit:
            raise UserError(
                f"{self._plan.dataset} {self._plan.split}: {len(self._skipped)} images cannot be used, more than "
                f"--max_errors {self._on_error.limit}; first {self._skipped[0]['file']}: {self._skipped[0]['reason']}"
            )


class _Stopped(Exception):
    """The main process wants no more chunks."""


_worker: tuple[_Work, Any, Any] | None = None
"""In a worker process: the work, the counter of finished images, and the event that ends the work before its end."""


def _start_worker(work: _Work, counter: Any, stop: Any) -> None:
    global _worker
    _worker = (work, counter, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the work in order
    parent = multiprocessing.parent_process()
    # Without this, workers outlive a main process that was killed, and go on writing.
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _make_in_worker(job: _Job) -> Chunk:
    work, counter, stop = _worker

    def advance() -> None:
        if stop.is_set():
            raise _Stopped
        with counter.get_lock():
            counter.value += 1

    return work.make(job, advance)


def _run(work: _Work, jobs: list[_Job], num_proc: int, progress: Any, tally: _Tally) -> None:
    """Make all `jobs`, in this process or in `num_proc` others."""
    num_proc = min(num_proc, len(jobs))
    if num_proc <= 1:
        for job in jobs:
            tally.add(work.make(job, progress.update))
        return
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(num_proc, context, _start_worker, (work, counter, stop))
    try:
        pending: set[Future[Chunk]] = {pool.submit(_make_in_worker, job) for job in jobs}
        shown = 0
        while pending:
            ready, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
            progress.update(counter.value - shown)
            shown = counter.value
            for future in ready:
                tally.add(future.result())
    except BrokenProcessPool:
        raise UserError(
            "a worker process was ended from outside, perhaps for want of memory; finished shards are kept: run the "
            "same command again with a smaller --num_proc"
        ) from None
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


# --- The folder of the work in progress


@contextmanager
def _claimed(folder: Path, share: Share) -> Iterator[None]:
    """Hold the folder of the work in progress for this share; a folder that stays without chunks is removed."""
    import filelock

    existing = next(parent for parent in folder.parents if parent.exists())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / f".{share.index}-of-{share.count}.lock", timeout=0)
        with lock:
            for path in (*folder.glob(".data-*.tmp-*"), *folder.glob("tmp*"), *folder.glob("state-*")):
                if share.count == 1:  # left by a process that was killed; another share's may be in use
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            yield
    except filelock.Timeout:
        raise UserError(
            f"another process is preparing this in {folder}; wait for it, or choose another --output_dir"
        ) from None
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error})") from None
    finally:
        if folder.is_dir() and not any(folder.glob("data-*.json")):
            shutil.rmtree(folder, ignore_errors=True)
            for parent in folder.parents:
                if parent == existing or any(parent.iterdir()):
                    break
                parent.rmdir()


def _finished_chunks(plan: SplitPlan, folder: Path) -> dict[int, Chunk]:
    """Chunks in `folder` that this plan would make again as they are.

    Raises:
        UserError: there are finished chunks, and not one of them is of this plan.
    """
    expected = plan.describe()
    count = len(expected["chunks"])
    found = {i: Chunk.load(_chunk_path(folder, i, count).with_suffix(".json")) for i in range(count)}
    finished = {i: chunk for i, chunk in found.items() if chunk and chunk.digest == expected["chunks"][i]}
    if not finished and any(folder.glob("data-*.json")):
        stored = _stored_plan(folder) or {}
        raise UserError(
            f"{folder} holds an interrupted run on other files or with other settings: "
            f"{_difference(stored, expected)}. Give the settings of that run to go on with it, or --overwrite to "
            "discard it"
        )
    return finished


def _stored_plan(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / PLAN_FILE} cannot be read ({error}); remove {folder} and prepare again") from None


def _difference(was: dict[str, Any], now: dict[str, Any]) -> str:
    """`key: was -> now` of the settings that differ between two plans."""
    old, new = ({**plan.get("settings", {}), "num_items": plan.get("num_items")} for plan in (was, now))
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return "; ".join(f"{key}: {old.get(key)} -> {new.get(key)}" for key in changed) or "the raw files changed"


def _chunk_path(folder: Path, index: int, count: int) -> Path:
    return folder / f"data-{index:05d}-of-{count:05d}.arrow"


def _identity(file: RawFile) -> list[Any]:
    """What the row of a raw file depends on: names and sizes of the files, windows of events."""

    def of(source: Any) -> Any:
        return source.size if isinstance(source, RawPath) else source.identity()

    parts = [file.file_name, of(file.image)]
    if file.label is not None:
        parts += [file.label.name, file.label.size]
    if file.events is not None:
        parts.append(of(file.events))
    return parts


def _name(item: Any) -> str:
    return item.file_name if isinstance(item, RawFile) else str(item)


def _total(counts: Iterator[tuple[int, ...] | None]) -> tuple[int, ...]:
    return tuple(np.sum([c for c in counts if c is not None], axis=0).tolist())


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
