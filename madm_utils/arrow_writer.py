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
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from madm_utils.cli import UserError
from madm_utils.conversion import row_features
from madm_utils.files import replace_folder, replacing
from madm_utils.interruption import LastingInterrupt
from madm_utils.prepared_data import METADATA_FILE, Metadata
from madm_utils.raw_search import RawFile
from madm_utils.split_plan import SplitPlan, json_digest
from madm_utils.workers import SPAWN, stopped, worker_pool, worker_state

ROWS_IN_MEMORY = 16
"""Rows a process holds before they go to disk; a native Cityscapes image is about 2.5 MB."""
PLAN_FILE = "plan.json"
_POLL_SECONDS = 0.2
_LOOK_SECONDS = 2.0


@dataclass(frozen=True)
class Chunk:
    """What a finished chunk holds."""

    digest: str
    """Of the items and settings it was made from."""
    stamp: str
    """Of the files it was made from, on the machine that made it."""
    num_bytes: int
    """Size of its Arrow file."""
    sha256: str
    """Of its Arrow file."""
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

    def check(self, path: Path) -> None:
        """Compare the Arrow file `path` with the record; a damaged chunk is removed.

        Raises:
            UserError: the file has changed since it was written.
        """
        if _sha256(path) != self.sha256:
            path.with_suffix(".json").unlink()
            path.unlink()
            raise UserError(
                f"{path} was damaged after it was written and is removed; run its share (--shard I/N) again, with "
                f"--output_dir {path.parents[2]}, then --merge"
            )


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


def partial_folder(output_dir: Path, dataset: str, split: str) -> Path:
    """Folder of the work in progress on a split."""
    return output_dir / dataset / f".{split}.partial"


def write_chunks(
    plan: SplitPlan,
    output_dir: Path,
    num_proc: int = 1,
    share: Share = Share(),  # noqa: B008 (frozen)
    on_error: OnError = OnError(),  # noqa: B008 (frozen)
    overwrite: bool = False,
    splits: Sequence[str] = (),
) -> None:
    """Make the chunks of `share` that are not there yet.

    Memory does not grow with the number of images: every process holds `ROWS_IN_MEMORY` of them.

    Args:
        plan: what to write.
        output_dir: folder of the prepared data.
        num_proc: worker processes.
        share: chunks to make.
        on_error: what to do about images that cannot be used.
        overwrite: discard work in progress of another plan.
        splits: every `<dataset>/<split>` of the command, which `--merge` then expects.

    Raises:
        UserError: an image or label that cannot be used (the message names the file), more of them than
            `on_error` allows, work in progress of another plan, another process at work in the same folder, or no
            space on the disk. Finished chunks stay, and the same call goes on from there.
    """
    from tqdm import tqdm

    folder = partial_folder(output_dir, plan.dataset, plan.split)
    with _claimed(folder, share):
        if overwrite and not _same_plan(_stored_plan(folder), plan.describe()):
            for path in folder.iterdir():
                if not path.name.endswith(".lock"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        chunks = plan.chunks()
        mine = [i for i in range(len(chunks)) if i in share]
        finished = _finished_chunks(plan, folder, on_error)
        done = [i for i in mine if i in finished]
        if done:
            print(f"{plan.dataset} {plan.split}: {len(done)} of {len(mine)} shards are there already, going on")
        with replacing(folder / PLAN_FILE) as path:
            path.write_text(json.dumps({**plan.describe(), "splits": list(splits)}, indent=1) + "\n", encoding="utf-8")
        tally = _Tally(plan, on_error)
        for i in done:
            tally.add(finished[i])
        jobs = [_Job(i, chunks[i], _chunk_path(folder, i, len(chunks))) for i in mine if i not in finished]
        with tqdm(
            total=sum(len(chunks[i]) for i in mine),
            initial=sum(len(chunks[i]) for i in done),
            desc=f"{plan.dataset} {plan.split}" + (f" ({share})" if share.count > 1 else ""),
            unit="image",
        ) as progress:
            _run(_Work(plan, on_error), jobs, num_proc, progress, tally)


def check_complete(output_dir: Path, dataset: str, split: str) -> tuple[dict[str, Any], list[Chunk]]:
    """Return the plan of a split in progress (`SplitPlan.describe`) and its chunks, which are all there.

    Raises:
        UserError: chunks are missing; the message says what to do.
    """
    folder = partial_folder(output_dir, dataset, split)
    plan = _stored_plan(folder)
    if plan is None:
        raise UserError(f"{dataset} {split}: {folder} holds no finished share; prepare it first")
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
    return plan, chunks


def publish_split(output_dir: Path, dataset: str, split: str, max_skipped: int | None = None) -> Metadata:
    """Give a split whose chunks are all there its final name, `output_dir/<dataset>/<split>`, replacing an older one.

    Raises:
        UserError: chunks are missing (the message says which shares make them), more than `max_skipped` images were
            left out, or what has the final name is no prepared data.
    """
    import datasets

    folder = partial_folder(output_dir, dataset, split)
    plan, chunks = check_complete(output_dir, dataset, split)
    paths = [_chunk_path(folder, i, len(chunks)) for i in range(len(chunks))]
    final = output_dir / dataset / split
    check_replaceable(final)
    num_images = sum(len(chunk.rows) for chunk in chunks)
    skipped = [skip for chunk in chunks for skip in chunk.skipped]
    if max_skipped is not None and len(skipped) > max_skipped:
        raise UserError(_too_many(dataset, split, skipped, max_skipped))
    if not num_images:
        raise UserError(f"{dataset} {split}: not one image could be used; first: {skipped[0]['reason']}")
    sizes = {size for chunk in chunks for size in chunk.sizes}
    content = content_digest(row for chunk in chunks for row in chunk.rows)
    metadata = Metadata(
        dataset,
        split,
        tuple(plan["class_names"]),
        num_images,
        sizes.pop() if len(sizes) == 1 else None,
        _total(chunk.class_pixel_counts for chunk in chunks) if plan["labelled"] else None,
        json_digest(plan["fingerprint"], skipped, content),
        plan["resized"],
        _total(chunk.images_per_class for chunk in chunks) if plan["labelled"] else None,
        plan["settings"],
        tuple(skipped),
        content,
        plan["licence"],
        plan["fingerprint"],
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
    replace_folder(folder, final)
    written = {path.name for path, chunk in zip(paths, chunks, strict=True) if chunk.rows}
    for path in final.iterdir():  # records of the chunks, locks, and what killed runs have left
        if path.name not in written | {"dataset_info.json", "state.json", METADATA_FILE}:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return metadata


def check_replaceable(final: Path) -> None:
    """Raise `UserError` if `final` exists and is no prepared split; it may be the raw files themselves."""
    if final.exists() and not (final / METADATA_FILE).is_file():
        raise UserError(
            f"{final} exists and is no prepared data (it has no {METADATA_FILE}); choose another --output_dir"
        )


def planned_splits(output_dir: Path, dataset: str) -> list[str]:
    """Every `<dataset>/<split>` that the command meant to make which left work in progress on `dataset`."""
    plans = [_stored_plan(folder) for folder in sorted((output_dir / dataset).glob(".*.partial"))]
    return [f"{plan['dataset']}/{plan['split']}" for plan in plans if plan] + [
        split for plan in plans if plan for split in plan["splits"]
    ]


def collect_chunks(others: Sequence[Path], output_dir: Path, dataset: str, split: str) -> None:
    """Copy finished chunks of a split from the output folders `others` of further machines into `output_dir`.

    Raises:
        UserError: one of them holds work on other files or with other settings, or a damaged chunk.
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
        elif not _same_plan(own, plan):
            raise UserError(f"{source} was made from other files or settings than {folder}: {_difference(own, plan)}")
        for record in sorted(source.glob("data-*.json")):
            chunk = Chunk.load(record)
            if chunk and not Chunk.load(folder / record.name):
                chunk.check(record.with_suffix(".arrow"))
                for name in (record.with_suffix(".arrow").name, record.name):
                    with replacing(folder / name) as path:
                        shutil.copyfile(source / name, path)


def check_chunks(output_dir: Path, dataset: str, split: str) -> None:
    """Read every finished chunk of a split again.

    Raises:
        UserError: a chunk was damaged after it was written; it is removed, so that its share can make it again.
    """
    from tqdm import tqdm

    folder = partial_folder(output_dir, dataset, split)
    for record in tqdm(sorted(folder.glob("data-*.json")), desc=f"check {dataset} {split}", unit="shard"):
        chunk = Chunk.load(record)
        if chunk:
            chunk.check(record.with_suffix(".arrow"))


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
                            if len(skipped) > self.on_error.limit:
                                raise UserError(
                                    _too_many(plan.dataset, plan.split, skipped, self.on_error.limit)
                                ) from None
                        else:
                            sizes.add((row.pop("height"), row.pop("width")))
                            digests.append(row_digest(row))
                            counts.append(row.get("class_pixel_counts"))
                            writer.write(features.encode_example(row))
                        advance()
                    writer.finalize()
            counts = np.array(counts, np.int64) if plan.labelled and counts else None
            chunk = Chunk(
                plan.chunk_digest(job.items),
                plan.chunk_stamp(job.items),
                job.path.stat().st_size,
                _sha256(job.path),
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
    """Images left out so far, over all chunks of this process's share."""

    def __init__(self, plan: SplitPlan, on_error: OnError):
        self._plan, self._on_error = plan, on_error
        self._skipped: list[dict[str, str]] = []

    def add(self, chunk: Chunk) -> None:
        from tqdm import tqdm

        for skip in chunk.skipped:
            tqdm.write(f"skipped {skip['file']}: {skip['reason']}")
        self._skipped += chunk.skipped
        if len(self._skipped) > self._on_error.limit:
            raise UserError(_too_many(self._plan.dataset, self._plan.split, self._skipped, self._on_error.limit))


class _Stopped(Exception):
    """The main process wants no more chunks."""


def _make_in_worker(job: _Job) -> Chunk:
    work, counter = worker_state()

    def advance() -> None:
        if stopped():
            raise _Stopped
        with counter.get_lock():
            counter.value += 1

    return work.make(job, advance)


def _run(work: _Work, jobs: list[_Job], num_proc: int, progress: Any, tally: _Tally) -> None:
    """Make all `jobs`, in this process or in `num_proc` others."""
    num_proc = min(num_proc, len(jobs))
    if num_proc <= 1:
        with LastingInterrupt() as interrupt:

            def advance() -> None:
                progress.update()
                interrupt.check()

            for job in jobs:
                tally.add(work.make(job, advance))
        return
    counter, shown = SPAWN.Value("q", 0), 0
    with worker_pool(num_proc, (work, counter)) as pool:
        pending: set[Future[Chunk]] = {pool.submit(_make_in_worker, job) for job in jobs}
        while pending:
            ready, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
            progress.update(counter.value - shown)
            shown = counter.value
            for future in ready:
                tally.add(future.result())


# --- The folder of the work in progress


@contextmanager
def _claimed(folder: Path, share: Share) -> Iterator[None]:
    """Hold the folder of the work in progress for this share.

    A process that makes all of the work excludes every other one, a share only the same share and one that makes all.
    The folder is removed again only by a process that has made all of it alone and has not finished one chunk.
    """
    import filelock

    existing = next(parent for parent in folder.parents if parent.exists())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error})") from None
    own, whole = (folder / f".{part.index}-of-{part.count}.lock" for part in (share, Share()))
    with ExitStack() as held:
        try:
            held.enter_context(filelock.FileLock(own, timeout=0))
            if own == whole:
                for other in sorted(folder.glob(".*-of-*.lock")):
                    if other != own:
                        held.enter_context(filelock.FileLock(other, timeout=0))
            elif whole.exists():
                with filelock.FileLock(whole, timeout=_LOOK_SECONDS):  # other shares look at the same time
                    pass
        except filelock.Timeout:
            raise UserError(
                f"another process is preparing this in {folder}; wait for it, or choose another --output_dir"
            ) from None
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror or error})") from None
        if own == whole:  # left by a process that was killed
            for path in (*folder.glob(".data-*.tmp-*"), *folder.glob("tmp*"), *folder.glob("state-*")):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield
        finally:
            if own == whole and not any(folder.glob("data-*.json")):
                shutil.rmtree(folder, ignore_errors=True)
                for parent in folder.parents:
                    if parent == existing or any(parent.iterdir()):
                        break
                    parent.rmdir()


def _finished_chunks(plan: SplitPlan, folder: Path, on_error: OnError) -> dict[int, Chunk]:
    """Chunks in `folder` that this plan would make again as they are.

    Raises:
        UserError: there are finished chunks, and not one of them is of this plan.
    """
    expected, chunks = plan.describe(), plan.chunks()
    found = {i: Chunk.load(_chunk_path(folder, i, len(chunks)).with_suffix(".json")) for i in range(len(chunks))}
    ours = {i: chunk for i, chunk in found.items() if chunk and chunk.digest == expected["chunks"][i]}
    if not ours and any(folder.glob("data-*.json")):
        stored = _stored_plan(folder) or {}
        raise UserError(
            f"{folder} holds an interrupted run on other files or with other settings: "
            f"{_difference(stored, expected)}. Give the settings of that run to go on with it, or --overwrite to "
            "discard it"
        )
    return {
        i: chunk
        for i, chunk in ours.items()
        if chunk.stamp == plan.chunk_stamp(chunks[i]) and (on_error.skip or not chunk.skipped)
    }


def _stored_plan(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / PLAN_FILE} cannot be read ({error}); remove {folder} and prepare again") from None


def _same_plan(was: dict[str, Any] | None, now: dict[str, Any]) -> bool:
    return was is None or all(was.get(key) == value for key, value in now.items() if key != "splits")


def _too_many(dataset: str, split: str, skipped: Sequence[dict[str, str]], limit: int) -> str:
    return (
        f"{dataset} {split}: {len(skipped)} images cannot be used, more than --max_errors {limit}; first "
        f"{skipped[0]['file']}: {skipped[0]['reason']}"
    )


def _difference(was: dict[str, Any], now: dict[str, Any]) -> str:
    """`key: was -> now` of the settings that differ between two plans."""
    old, new = ({**plan.get("settings", {}), "num_items": plan.get("num_items")} for plan in (was, now))
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return "; ".join(f"{key}: {old.get(key)} -> {new.get(key)}" for key in changed) or "the raw files changed"


def _chunk_path(folder: Path, index: int, count: int) -> Path:
    return folder / f"data-{index:05d}-of-{count:05d}.arrow"


def _name(item: Any) -> str:
    return item.file_name if isinstance(item, RawFile) else str(item)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _total(counts: Iterator[tuple[int, ...] | None]) -> tuple[int, ...]:
    return tuple(np.sum([c for c in counts if c is not None], axis=0).tolist())
